import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from hatespeech import UserError, task
from hatespeech.training import checks
from tests.conftest import ROOT

# Rows: id, pair, kind, group, text, label.
SMALL = [
    ("c1", "p1", "open_hate", "women", "Women are vile.", "Hate"),
    ("c2", "p1", "open_hate", "women", "Gulls are vile.", "Neutral"),
    ("c3", "p2", "open_hate", "Muslims", "Muslims are vile.", "Hate"),
    ("c4", "p2", "counter_speech", "Muslims", "Who says that Muslims are vile is wrong.", "Supportive"),
    ("c5", "p3", "everyday", "", "Such a day.", "Neutral"),
    ("c6", "p3", "everyday", "", "null", "Supportive"),
]
HATE, NEUTRAL, SUPPORTIVE = np.eye(3) * 0.8 + 0.1 / 1.5


@pytest.fixture
def small(tmp_path) -> pd.DataFrame:
    pd.DataFrame(SMALL, columns=checks.COLUMNS).to_csv(tmp_path / "small.csv", index=False)
    return checks.load(tmp_path / "small.csv")


def test_the_checks_at_hand_are_whole():
    """Ids of their own, pairs of two whose texts differ, every label, and of every group and kind what is no Hate."""
    frame = checks.load(checks.FUNCTIONAL)
    assert len(frame) == 656
    assert frame["id"].is_unique
    assert frame["text"].is_unique
    same = frame["text"].map(task.as_read).duplicated(keep=False)
    assert set(frame["kind"][same]) <= {"spelling_tricks"}  # which the normal form undoes
    pairs = frame.groupby("pair")["text"]
    assert set(pairs.size()) == {2}
    assert set(pairs.nunique()) == {2}
    assert set(frame["label"]) == set(task.LABELS)
    assert frame["kind"].value_counts().min() >= 10
    hate = (frame["label"] == "Hate").groupby(frame["group"]).mean()
    assert hate.max() < 1
    assert frame["text"].map(task.as_read).ne("").all()


def test_cells_stay_as_they_are_written(small):
    assert small["text"].tolist()[-1] == "null"
    assert small["group"].tolist()[-1] == ""


def test_figures_by_hand(small):
    """c2 is wrongly called Hate, c6 is Neutral for Supportive: right as to Hate, wrong of the three."""
    found = checks.measure(small, np.array([HATE, HATE, HATE, SUPPORTIVE, NEUTRAL, NEUTRAL]))
    assert {name: (found[name]["value"], found[name]["n"]) for name in ("accuracy_hate", "accuracy", "pairs")} == {
        "accuracy_hate": (0.8333, 6),
        "accuracy": (0.6667, 6),
        "pairs": (0.6667, 3),
    }
    kinds = {row["kind"]: row for row in found["by_kind"]}
    assert next(iter(kinds)) == "open_hate"
    assert kinds["open_hate"]["accuracy_hate"]["value"] == 0.6667
    assert kinds["everyday"]["accuracy_hate"]["value"] == 1
    assert kinds["everyday"]["accuracy"]["value"] == 0.5
    assert found["worst_kind"] == kinds["open_hate"]["accuracy_hate"]
    assert [(row["group"], row["accuracy_hate"]["value"]) for row in found["by_group"]] == [
        ("women", 0.5),
        ("Muslims", 1),
    ]
    assert found["worst_group"]["value"] == 0.5
    table = checks.table(found)
    assert "| **all checks** | 6 | 0.83 (" in table
    assert (
        table.index("| open hate | 3 | 0.67 (") < table.index("| everyday | 2 | 1.00 (") < table.index("| women | 2 |")
    )


def test_checks_without_groups_have_no_worst_one(small):
    found = checks.measure(small.assign(group=""), np.tile(HATE, (6, 1)))
    assert (found["worst_group"], found["by_group"]) == (None, [])
    checks.table(found)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("id,pair,kind,text,label\n1,p,k,a,Hate\n", "group is missing"),
        ("id,pair,kind,group,text,label\n1,p,k,g,a,Hate\n2,p,k,g,b,hate\n", "line 3: a label is Hate, Neutral, Supp"),
        ("", "can't be read as functional checks"),
        (None, "can't be read as functional checks"),
    ],
)
def test_what_are_no_checks_is_named(tmp_path, content, reason):
    path = tmp_path / "mine.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=rf"mine\.csv.*{reason}"):
        checks.load(path)


METRICS = {
    "test": {
        "torch": {"accuracy": {"value": 0.7, "low": 0.6, "high": 0.8}, "pearson_r": {"value": None}, "n": 9},
        "as_served": {"accuracy": {"value": 0.5}},
    },
    "functional": {"torch": {"worst_kind": None, "pairs": {"value": 0.25}}},
}


@pytest.mark.parametrize(
    ("metric", "bound", "reached", "passed"),
    [
        ("test.accuracy", {"at_least": 0.7}, 0.7, True),
        ("test.accuracy", {"at_least": 0.71}, 0.7, False),
        ("test.accuracy", {"at_most": 0.69}, 0.7, False),
        ("functional.pairs", {"at_most": 0.25}, 0.25, True),
        ("functional.worst_kind", {"at_least": 0.0}, None, False),
        ("test.pearson_r", {"at_most": 1}, None, False),
        ("test.no_such", {"at_most": 1}, None, False),
        ("other.accuracy", {"at_least": 0}, None, False),
    ],
)
def test_a_gate_is_passed_by_what_was_measured(metric, bound, reached, passed):
    (result,) = checks.passed(METRICS, "torch", [{"metric": metric} | bound])
    assert result == {"metric": metric, **bound, "reached": reached, "passed": passed}


def test_gates_are_of_one_engine_and_are_told_in_a_line():
    gate = {"metric": "test.accuracy", "at_least": 0.6}
    (torch,), (served,) = (checks.passed(METRICS, engine, [gate]) for engine in ("torch", "as_served"))
    assert checks.sentence(torch) == "passed  test.accuracy: 0.700 (at least 0.6 asked)"
    assert checks.sentence(served) == "FAILED  test.accuracy: 0.500 (at least 0.6 asked)"
    (none,) = checks.passed(METRICS, "torch", [{"metric": "test.pearson_r", "at_most": 0.05}])
    assert checks.sentence(none) == "FAILED  test.pearson_r: not measured (at most 0.05 asked)"


def test_the_gates_at_hand_name_what_is_measured(small, tmp_path):
    """A misspelt metric would fail every model."""
    from hatespeech.training import evaluation

    frame = pd.DataFrame({"label": ["Hate", "Neutral", "Supportive"] * 5, "score": [1.0, 0.0, -2.0] * 5})
    probabilities = np.tile([HATE, NEUTRAL, SUPPORTIVE], (5, 1))
    metrics = {
        "test": {"torch": evaluation.measure(frame, probabilities, probabilities @ [1.4, -0.3, -2.8])},
        "functional": {"torch": checks.measure(small, np.tile(HATE, (6, 1)))},
    }
    results = checks.passed(metrics, "torch", checks.read_gates(checks.GATES))
    assert len(results) >= 5
    assert all(result["reached"] is not None for result in results)


@pytest.mark.parametrize(
    "content",
    [
        *("{", '{"metric": "test.accuracy", "at_least": 0.6}', '["test.accuracy"]', "5", "null"),
        '[{"metric": "test.accuracy"}]',
        '[{"metric": "test.accuracy", "at_least": 0.6, "at_most": 0.9}]',
        '[{"metric": "test.accuracy", "above": 0.6}]',
        '[{"metric": "accuracy", "at_least": 0.6}]',
        '[{"metric": "test.torch.accuracy", "at_least": 0.6}]',
        '[{"metric": "test.accuracy", "at_least": "much"}]',
        '[{"metric": "test.accuracy", "at_least": "0.6"}]',
        '[{"metric": "test.accuracy", "at_least": null}]',
        '[{"metric": 5, "at_least": 0.6}]',
        None,
    ],
)
def test_gates_that_make_no_sense_are_refused(tmp_path, content):
    path = tmp_path / "gates.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r'gates\.json: a gate is \{"metric": "test\.accuracy", "at_least": 0\.6\}'):
        checks.read_gates(path)


def command(folder) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "hatespeech.training.checks", *folder]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_the_command_tells_a_runs_gates(tmp_path):
    gates = [{"metric": "test.accuracy", "at_least": 0.6}]
    found = {engine: checks.passed(METRICS, engine, gates) for engine in ("torch", "as_served")}
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS | {"gates": found}))
    done = command([str(tmp_path)])
    assert done.stdout == "gates, as served:\n  FAILED  test.accuracy: 0.500 (at least 0.6 asked)\n"
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    done = command([str(tmp_path)])
    assert (done.returncode, done.stdout) == (1, "")
    assert "has no gates: python -m train --evaluate-only" in done.stderr
    done = command([str(tmp_path / "none")])
    assert done.returncode == 1
    assert done.stderr.startswith("checks: ")
    assert "usage: python -m hatespeech.training.checks results/RUN" in command([]).stderr
