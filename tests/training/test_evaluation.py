import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from hatespeech import UserError, task
from hatespeech.training import data, evaluation, pictures
from tests.conftest import ANNOTATIONS, TEST, TRAIN


@pytest.fixture(scope="module")
def example():
    rng = np.random.default_rng(0)
    scores = rng.normal(-0.5, 2, 300)
    frame = pd.DataFrame({"score": scores, "label": [task.label_of(score) for score in scores], "kind": "score"})
    noisy = data.targets(frame.assign(score=scores + rng.normal(0, 1.5, 300)), 1.0)[:, :3]
    return frame, noisy


def test_metrics_are_scikit_learns(example):
    frame, probabilities = example
    truth = [task.LABELS.index(label) for label in frame["label"]]
    decided = probabilities.argmax(axis=1)
    metrics = evaluation.measure(frame, probabilities, probabilities @ [1.5, 0.0, -2.0])
    assert metrics["n"] == 300
    assert metrics["accuracy"]["value"] == pytest.approx(accuracy_score(truth, decided), abs=1e-4)
    assert metrics["macro_f1"]["value"] == pytest.approx(f1_score(truth, decided, average="macro"), abs=1e-4)
    assert metrics["weighted_f1"]["value"] == pytest.approx(f1_score(truth, decided, average="weighted"), abs=1e-4)
    expected = probabilities @ [1.5, 0.0, -2.0]
    assert metrics["pearson_r"]["value"] == pytest.approx(np.corrcoef(frame["score"], expected)[0, 1], abs=1e-4)


def test_intervals_hold_the_value_and_narrow_with_n(example):
    frame, probabilities = example
    many = evaluation.measure(frame, probabilities, probabilities @ [1, 0, -1])["accuracy"]
    few = evaluation.measure(frame[:50], probabilities[:50], probabilities[:50] @ [1, 0, -1])["accuracy"]
    assert many["low"] < many["value"] < many["high"]
    # sqrt(300 / 50) = 2.4 times wider
    assert 1.7 < (few["high"] - few["low"]) / (many["high"] - many["low"]) < 3.2


def test_every_interval_holds_its_value(example):
    """That of the calibration error too, whose resamples all lie above it."""
    frame, probabilities = example
    for name, found in evaluation.measure(frame, probabilities, probabilities @ [1, 0, -1]).items():
        if name != "n":
            assert found["low"] <= found["value"] <= found["high"], name


def test_what_is_known_of_a_comment_decides_what_it_counts_for(example):
    """Three-way metrics are of those with a class, correlations of those with a score, Hate's of all."""
    frame, probabilities = example
    frame, expected = frame.copy(), probabilities @ [1.5, 0.0, -2.0]
    frame.loc[frame.index[::4], "score"] = np.nan
    partial = (frame.index % 4 == 0) & (frame["label"] != "Hate")
    frame.loc[partial, "label"] = task.NOT_HATE
    metrics = {
        name: found if name == "n" else found["value"]
        for name, found in evaluation.measure(frame, probabilities, expected).items()
    }
    classes, scored = ~partial, frame["score"].notna().to_numpy()
    whole = evaluation.measure(frame[classes], probabilities[classes], expected[classes])
    for name in ("accuracy", "macro_f1", "recall_Supportive", "brier_score", "expected_calibration_error"):
        assert metrics[name] == whole[name]["value"]
    of_scored = evaluation.measure(frame[scored], probabilities[scored], expected[scored])
    for name in ("pearson_r", "spearman_r"):
        assert metrics[name] == of_scored[name]["value"]
    hate = (frame["label"] == "Hate").to_numpy()
    assert metrics["n"] == 300
    assert metrics["accuracy_hate"] == pytest.approx(((probabilities.argmax(axis=1) == 0) == hate).mean(), abs=1e-4)
    assert metrics["roc_auc_hate"] == pytest.approx(roc_auc_score(hate, probabilities[:, 0]), abs=1e-4)
    table = evaluation.table({"ours": evaluation.measure(frame, probabilities, expected)})
    assert "nan" not in table
    support = evaluation.report(frame, probabilities).split("accuracy")[1].split()[1]
    assert int(support) == classes.sum()


def test_of_flags_alone_hate_is_measured_and_the_rest_is_null(example):
    frame, probabilities = example
    flags = frame.assign(score=np.nan, label=np.where(frame["label"] == "Hate", "Hate", task.NOT_HATE))
    metrics = evaluation.measure(flags, probabilities, np.zeros(len(flags)))
    hate = (flags["label"] == "Hate").to_numpy()
    assert metrics["accuracy"]["value"] is None  # of those whose class is known, Hate, it would be the recall
    assert metrics["roc_auc_hate"]["value"] == pytest.approx(roc_auc_score(hate, probabilities[:, 0]), abs=1e-4)
    flags = flags[flags["label"] == task.NOT_HATE]
    metrics = evaluation.measure(flags, probabilities[flags.index], np.zeros(len(flags)))
    assert metrics["accuracy_hate"]["value"] > 0.5
    nothing = {"value": None, "low": None, "high": None}
    for name in ("accuracy", "f1_Neutral", "expected_calibration_error", "roc_auc_hate", "pearson_r"):
        assert metrics[name] == nothing
    assert "| ours | - | - | 0." in evaluation.table({"ours": metrics})
    same = (probabilities[flags.index], np.zeros(len(flags)))
    compared = evaluation.compare(flags, same, same)
    assert {found["difference"] for found in compared.values()} == {None}
    assert evaluation.comparison_table(compared).count("\n") == 1  # no line of nothing


def test_a_constant_prediction_has_no_correlation(example):
    frame, _ = example
    constant = np.tile([0.2, 0.3, 0.5], (len(frame), 1))
    assert evaluation.measure(frame, constant, constant @ [1, 0, -1])["pearson_r"]["value"] is None


def test_ranking_and_calibration_metrics_are_scikit_learns(example):
    frame, probabilities = example
    truth, hate = evaluation.numbers(frame["label"]), (frame["label"] == "Hate").to_numpy()
    metrics = evaluation.measure(frame, probabilities, probabilities @ [1.5, 0.0, -2.0])
    expected = {
        "roc_auc_hate": roc_auc_score(hate, probabilities[:, 0]),
        "average_precision_hate": average_precision_score(hate, probabilities[:, 0]),
        "spearman_r": spearmanr(frame["score"], probabilities @ [1.5, 0.0, -2.0]).statistic,
        "brier_score": brier_score_loss(truth, probabilities, scale_by_half=False),
        "precision_Hate": precision_score(hate, probabilities.argmax(axis=1) == 0),
        "recall_Neutral": recall_score(truth == 1, probabilities.argmax(axis=1) == 1),
    }
    assert {name: metrics[name]["value"] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_expected_calibration_error_by_hand():
    """Four comments at 0.65, half of them right: 0.15 off. Four at 0.95, all right: 0.05 off."""
    frame = pd.DataFrame(
        {"label": ["Hate"] * 2 + ["Neutral"] * 2 + ["Hate"] * 4, "score": [1.0] * 2 + [0.0] * 2 + [1] * 4}
    )
    probabilities = np.array([[0.65, 0.35, 0.0]] * 4 + [[0.95, 0.05, 0.0]] * 4)
    metrics = evaluation.measure(frame, probabilities, probabilities @ [1, 0, -1])
    assert metrics["expected_calibration_error"]["value"] == pytest.approx((0.15 + 0.05) / 2)
    assert metrics["accuracy_at_80_coverage"]["value"] == pytest.approx(6 / 6)  # the four sure ones and two of the rest


def test_a_paired_bootstrap_tells_a_real_difference_from_none(example):
    frame, probabilities = example
    guessing = np.random.default_rng(1).dirichlet((1, 1, 1), len(frame))
    ours, theirs = ((each, each @ [1.5, 0.0, -2.0]) for each in (probabilities, guessing))
    better = evaluation.compare(frame, ours, theirs)
    assert better["accuracy"]["low"] > 0
    assert better["accuracy"]["p"] < 0.01
    same = evaluation.compare(frame, ours, ours)
    assert (same["macro_f1"]["difference"], same["macro_f1"]["p"]) == (0, 1)
    worse = evaluation.compare(frame, theirs, ours)
    assert worse["pearson_r"]["difference"] == -better["pearson_r"]["difference"]


def test_error_rates_by_group_and_their_gaps():
    """Of 40 comments about women that are not Hate 20 are called so, of 40 about race none: that gap is named."""
    frame = pd.DataFrame({"label": ["Neutral"] * 80 + ["Hate"] * 4, "text": ["short"] * 84, "score": 0.0})
    frame["targets"] = [("gender",)] * 40 + [("race",)] * 40 + [("race", "gender")] * 4
    called = np.array([True] * 20 + [False] * 60 + [True, True, True, False])
    rows = evaluation.groups(frame, np.where(called[:, None], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]))
    by = {(row["by"], row["group"]): row for row in rows}
    assert by["target", "gender"]["false_positive_rate"]["value"] == 0.5
    assert by["target", "race"]["false_positive_rate"] == {"value": 0.0, "low": 0.0, "high": 0.0876, "n": 40}
    assert by["target", "race"]["false_negative_rate"]["value"] == 0.25
    assert by["length, characters", "to 60"]["n"] == 84
    assert evaluation.gaps(rows) == ["false positive rate by target: gender 0.50, race 0.00"]
    assert "| target | gender | 44 | 0.50 (0.35 to 0.65), n = 40 |" in evaluation.groups_table(rows)


def test_a_rate_has_wilsons_interval():
    assert evaluation.rate(np.array([True] * 8 + [False] * 2)) == {"value": 0.8, "low": 0.4902, "high": 0.9433, "n": 10}
    assert evaluation.rate(np.array([], dtype=bool)) == {"value": None, "low": None, "high": None, "n": 0}


@pytest.fixture(scope="module")
def real() -> dict[str, pd.DataFrame]:
    """Real comments: training ones of every kind, and validation and test ones with a score."""
    frame = data.comments(data.read(str(TRAIN))).frame[:8000]
    parts, _ = data.split(frame, {"train": 0.9, "validation": 0.1}, seed=0)
    return parts | {"test": data.comments(data.read(str(TEST))).frame}


@pytest.mark.slow
def test_baselines_on_real_comments(real):
    assert set(real["train"]["label"]) == {*task.LABELS, task.NOT_HATE}
    found = evaluation.baselines(real["train"], real["test"], real["validation"], [1.4, -0.3, -2.8])
    results = {name: evaluation.measure(real["test"], *predicted) for name, predicted in found.items()}
    commonest = (real["test"]["label"] == "Supportive").mean()
    assert results["majority_class"]["accuracy"]["value"] == pytest.approx(commonest, abs=1e-4)
    assert 0.5 < results["tfidf_logistic_regression"]["accuracy"]["value"] < 0.65
    assert "| tfidf_logistic_regression | 0." in evaluation.table(results)
    errors = {name: result["expected_calibration_error"]["value"] for name, result in results.items()}
    assert errors["tfidf_calibrated"] < errors["tfidf_logistic_regression"]


@pytest.mark.slow
def test_baselines_of_few_kinds_of_label(real):
    """Of a set that knows only Hate and Not hate, and of one without Supportive."""
    flags = {
        name: part[:300].assign(label=np.where(part["label"][:300] == "Hate", "Hate", task.NOT_HATE), score=np.nan)
        for name, part in real.items()
    }
    found = evaluation.baselines(flags["train"], flags["test"], flags["validation"], task.TYPICAL_SCORES)
    assert all(np.isfinite(each).all() for predicted in found.values() for each in predicted)
    two = real["train"][real["train"]["label"] != "Supportive"][:300]
    found = evaluation.baselines(two, real["test"][:100], real["validation"][:100], task.TYPICAL_SCORES)
    assert not found["tfidf_logistic_regression"][0][:, 2].any()
    assert found["tfidf_logistic_regression"][0].sum(axis=1) == pytest.approx(1)


def test_single_annotators_are_held_against_the_true_class_as_the_model_is():
    """Answer by answer: yes is right of Hate, no of the rest; the unsure are counted, and no more."""
    frame = pd.DataFrame({"label": ["Hate", "Neutral", "Supportive"], "answers": [(2.0, 0.0, 1.0), (0.0,), ()]})
    probabilities = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.0, 0.1, 0.9]])
    found = evaluation.annotators(frame, probabilities)
    assert (found["annotator"]["value"], found["annotator"]["n"]) == (0.6667, 3)
    assert (found["model"]["value"], found["model"]["n"]) == (0.6667, 3)
    assert found["unsure_answers"] == 1
    assert evaluation.annotators(frame.assign(answers=[(), (1.0,), ()]), probabilities) is None


def test_real_annotators_are_right_more_often_than_a_guess():
    frame = data.comments(data.read(str(ANNOTATIONS))).frame
    found = evaluation.annotators(frame, np.tile([0.2, 0.3, 0.5], (len(frame), 1)))
    assert (found["annotator"]["n"], found["unsure_answers"]) == (1463 + 893, 170)
    assert found["annotator"]["low"] > found["model"]["high"]


def test_predictions_are_kept_without_texts(example, tmp_path):
    frame, probabilities = example
    frame = frame.assign(comment_id=[f"c{i}" for i in range(len(frame))], text="secret")
    path = tmp_path / evaluation.PREDICTIONS
    expected = probabilities @ [1, 0, -1]
    evaluation.save_predictions(path, frame, "test", dict.fromkeys(("one", "two"), (probabilities, expected)))
    evaluation.save_predictions(path, frame, "test", {"two": (probabilities[::-1], expected[::-1])})
    assert "secret" not in path.read_text()
    stored = evaluation.load_predictions(tmp_path)
    assert list(stored) == ["one", "two"]
    assert evaluation.predicted_of(stored["one"])[0] == pytest.approx(probabilities, abs=1e-5)
    assert evaluation.predicted_of(stored["two"])[0] == pytest.approx(probabilities[::-1], abs=1e-5)
    assert evaluation.predicted_of(stored["two"])[1] == pytest.approx(expected[::-1], abs=1e-5)


def test_runs_that_cannot_be_compared_are_explained(tmp_path):
    with pytest.raises(UserError, match=r"holds no predictions\.csv: python -m train --evaluate-only"):
        evaluation.compare_runs(tmp_path, tmp_path)


def test_report_and_pictures(example, tmp_path):
    frame, probabilities = example
    frame = frame.assign(text="words", targets=[()] * len(frame))
    assert "weighted avg" in evaluation.report(frame, probabilities)
    pd.DataFrame({"rows": range(20), "loss": range(20)}).to_csv(tmp_path / "learning_curve.csv")
    pictures.draw_all(tmp_path, "a title", frame, probabilities, probabilities, probabilities @ [1.5, 0.0, -2.0])
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert len(drawn) == 7
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)


def test_of_flags_alone_the_pictures_of_hate_are_drawn(example, tmp_path):
    frame, probabilities = example
    flags = frame.assign(text="words", targets=[()] * len(frame), score=np.nan)
    flags["label"] = np.where(flags["label"] == "Hate", "Hate", task.NOT_HATE)
    pictures.draw_all(tmp_path, "a title", flags, probabilities, probabilities, np.zeros(len(flags)))
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {"precision_recall", "confusion_matrix", "reliability", "coverage", "groups"}
    flags["label"] = task.NOT_HATE
    (tmp_path / "none").mkdir()
    pictures.draw_all(tmp_path / "none", "a title", flags, probabilities, probabilities, np.zeros(len(flags)))
    assert {path.stem for path in (tmp_path / "none").glob("*.png")} == {"precision_recall", "groups"}
