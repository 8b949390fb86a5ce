"""`python -m train` on a CPU with real rows and the real small base, and its exports under a real Ollama."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import pytest
from huggingface_hub import ModelCard

import train
from hatespeech import UserError, runs, task, tokens
from hatespeech.training import checks, data, evaluation, export, recording, tuning
from tests.benchmarks.exactness import random_base
from tests.benchmarks.training import SHAPES
from tests.conftest import ANNOTATIONS, DATA, ROOT, TEST, TRAIN, free_port
from tests.training.test_checks import SMALL

# F16 weights and Ollama's CPU kernels against fp32. A q or k in the wrong order moves more: see below.
TOLERANCE = 0.01


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """Intervals of 50 resamples, but for the commands in processes of their own: a third of the time goes into them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "N_BOOTSTRAP", 50)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def some_rows(folder) -> Path:
    """240 comments with a score, 40 with a class, 20 of which only is known that they are not Hate."""
    frame, path = pd.read_parquet(TRAIN), folder / "some.csv"
    scored, not_hate = frame["hate_speech_score"].notna(), frame["label"] == task.NOT_HATE
    kinds = (frame[scored][:240], frame[~scored & ~not_hate][:40], frame[not_hate][:20])
    pd.concat(kinds).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def flags(folder) -> Path:
    """60 comments of another corpus: hateful 1 or 0, and no more."""
    pd.read_parquet(DATA / "hatemojibuild.parquet")[:60].to_csv(folder / "flags.csv", index=False)
    return folder / "flags.csv"


@pytest.fixture(scope="module")
def some_checks(folder) -> Path:
    """A pair of each kind."""
    frame = checks.load(checks.FUNCTIONAL)
    frame[frame["pair"].isin(frame.drop_duplicates("kind")["pair"])].to_csv(folder / "checks.csv", index=False)
    return folder / "checks.csv"


def gate(path: Path, **gates: float) -> Path:
    """A file that asks for at least so much of each metric of the test comments."""
    path.write_text(json.dumps([{"metric": f"test.{name}", "at_least": least} for name, least in gates.items()]))
    return path


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "train", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def trained(some_rows, flags, some_checks, base_gguf, tmp_path_factory) -> Path:
    """A run of some steps, made by the command, which passes its gate."""
    folder = tmp_path_factory.mktemp("results") / "trained"
    settings = ["--model", base_gguf, "--dataset", some_rows, "--also", flags, "--also-weight", "0.5"]
    settings += ["--functional", some_checks, "--gate", gate(folder.parent / "gates.json", accuracy=0.0)]
    settings += ["--output", folder, "--max-steps", 12, "--batch-size", 16, "--learning-rate", "2e-3"]
    done = command(*settings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "is complete. Serve it" in done.stdout
    assert "training: 100%" in done.stderr
    assert "loss=" in done.stderr
    assert "passed  test.accuracy: 0." in done.stdout
    return folder


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return pd.read_parquet(TEST)["text"][:100].tolist()


def by_torch(base: str, adapter: Path, texts: list[str]) -> np.ndarray:
    """(n, 3) label probabilities of base + PEFT adapter in fp32."""
    tokenizer = tokens.load_tokenizer(base)
    classifier = tuning.load(base, tokenizer, rank=16, alpha=32, seed=0, adapter=adapter)
    return tuning.label_probabilities(classifier, tokens.encode(tokenizer, texts))


def by_ollama(client, texts: list[str]) -> np.ndarray:
    return np.array([client.classify(text).probabilities for text in texts])


@pytest.mark.slow
def test_the_folder_holds_all_that_is_promised(trained, some_rows, flags, some_checks):
    assert {path.name for path in trained.iterdir()} == {
        *("settings.json", "splits.json", "metrics.json", "report.txt", "calibration.json", "predictions.csv"),
        *("confusion_matrix.png", "reliability.png", "scores.png", "coverage.png", "groups.png"),
        *("learning_curve.png", "learning_curve.csv", "precision_recall.png"),
        *("adapter", "adapter.gguf", "model.gguf", "Modelfile", "README.md"),
    }
    settings = json.loads((trained / "settings.json").read_text())
    assert settings["command"].startswith("python -m train --model ")
    assert settings["settings"]["learning_rate"] == 2e-3
    assert settings["settings"]["also"] == [str(flags)]
    assert settings["commit"] == recording.commit()
    assert settings["versions"]["torch"]
    counts = settings["data"]["counts"]
    assert (counts[str(some_rows)]["rows"], counts[str(flags)]["rows"]) == (300, 60)
    splits = json.loads((trained / "splits.json").read_text())
    ids = [id for part in splits.values() for id in part]
    assert {name: len(part) for name, part in splits.items()} == settings["data"]["comments"]
    left_out = [n for name, n in counts.items() if name.startswith("comments_left_out")]
    left_out.append(counts[str(flags)]["comments_left_out_for_being_like_a_measured_one"])
    assert len(ids) == len(set(ids)) == 300 + counts[str(flags)]["comments"] - sum(left_out)
    by_source = {(row["source"], row["known"]): 0 for row in settings["data"]["trained_on"]}
    for row in settings["data"]["trained_on"]:
        by_source[row["source"], row["known"]] += row["comments"]
    kinds = [(str(some_rows), kind) for kind in data.KINDS] + [(str(flags), kind) for kind in data.KINDS[1:]]
    assert by_source.keys() == set(kinds)
    assert sum(by_source.values()) == len(splits["train"])
    assert by_source[str(some_rows), "not_hate"] == 20  # held out were comments with a score alone
    metrics = json.loads((trained / "metrics.json").read_text())
    assert set(metrics["test"]) == {
        *("majority_class", "tfidf_logistic_regression", "tfidf_calibrated", "zero_shot"),
        *("torch", "torch_uncalibrated"),
    }
    assert set(metrics["validation"]) == {"torch", "torch_uncalibrated"}
    assert 0 < metrics["test_differences"]["torch"]["metrics"]["macro_f1"]["p"] <= 1
    assert sum(row["n"] for row in metrics["test_groups"]["torch"]) == len(splits["test"])
    assert metrics["test_annotators"]["torch"] is None
    assert metrics["test_thresholds"]["torch"][0]["n"] <= len(splits["test"])
    assert metrics["gates"]["torch"][0]["passed"] is True
    assert metrics["test"]["torch"]["n"] == len(splits["test"])
    functional = metrics["functional"]["torch"]
    assert functional["accuracy"]["n"] == len(checks.load(some_checks))
    assert {row["accuracy_hate"]["n"] for row in functional["by_kind"]} == {2}
    predictions = pd.read_csv(trained / "predictions.csv", dtype={"comment_id": str})
    assert predictions.groupby("classifier")["comment_id"].apply(list).map(splits["test"].__eq__).all()
    assert len(pd.read_csv(trained / "learning_curve.csv")) == 12
    card = (trained / "README.md").read_text()
    assert "| torch |" in card
    assert "| `flags.csv` | only that it is not Hate | Not hate |" in card
    assert "| **all checks** |" in card
    assert "- passed  test.accuracy: 0." in card
    assert "weighted avg" in (trained / "report.txt").read_text()


@pytest.mark.slow
def test_served_it_answers_with_torchs_probabilities(trained, create, base_gguf, texts):
    """Merged, F16, through Ollama: on 100 real texts the same label on at least 99, and near in every probability."""
    expected = by_torch(str(base_gguf), trained / "adapter", texts)
    merged = by_ollama(create(trained), texts)
    assert np.abs(merged - expected).max() < TOLERANCE
    assert (merged.argmax(axis=1) == expected.argmax(axis=1)).sum() >= 99


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantize", "shrinks_to", "tolerance"),
    [pytest.param("Q8_0", 0.6, 0.05, marks=pytest.mark.long), ("Q4_K_M", 0.5, 0.15)],
)
def test_quantised_it_is_smaller_and_nearly_the_same(trained, create, texts, tmp_path, quantize, shrinks_to, tolerance):
    for name in ("model.gguf", "Modelfile", "settings.json"):
        shutil.copy(trained / name, tmp_path)
    export.quantise(tmp_path, quantize)
    assert (tmp_path / "model.gguf").stat().st_size < shrinks_to * (trained / "model.gguf").stat().st_size
    assert (tmp_path / "Modelfile").read_text() == (trained / "Modelfile").read_text()
    whole, quantised = (
        by_ollama(create(trained), texts),
        by_ollama(create(tmp_path, name=f"hs-{quantize.lower()}"), texts),
    )
    difference, same = np.abs(quantised - whole).mean(), (quantised.argmax(axis=1) == whole.argmax(axis=1)).sum()
    print(f"{quantize}: mean difference {difference:.4f}, the same label on {same} of {len(texts)}")
    assert 0 < difference < tolerance


@pytest.mark.long
def test_a_misordered_adapter_would_be_seen(trained, create, base_gguf, texts, tmp_path):
    """Leave q and k in PEFT's rotary order, and the test above must fail."""
    reader = gguf.GGUFReader(trained / "adapter.gguf")
    heads = {"attn_q": 9, "attn_k": 3}
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", reader.get_field("adapter.lora.alpha").contents())
    for tensor in reader.tensors:
        values, layer = np.array(tensor.data), tensor.name.split(".")[2]
        if layer in heads and tensor.name.endswith("lora_b"):
            values = values.reshape(heads[layer], -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values))
    export.write_gguf(writer, tmp_path / "adapter.gguf", tmp_path / "adapter.gguf")
    export.merge(base_gguf, tmp_path / "adapter.gguf", tmp_path / "model.gguf")
    for name in ("Modelfile", "settings.json"):
        shutil.copy(trained / name, tmp_path)
    expected = by_torch(str(base_gguf), trained / "adapter", texts)
    wrong = by_ollama(create(tmp_path, name="hatespeech-wrong"), texts)
    print(f"misordered: up to {np.abs(wrong - expected).max():.3f}, mean {np.abs(wrong - expected).mean():.4f}")
    assert np.abs(wrong - expected).max() > 2 * TOLERANCE


@pytest.mark.long
def test_a_base_directory_goes_through_llama_cpps_converter(some_rows, some_checks, base_gguf, create, texts, tmp_path):
    """--model DIRECTORY: merged 16-bit weights, converted to model.gguf, served with torch's probabilities."""
    with tuning._as_directory(str(base_gguf), tokens.load_tokenizer(str(base_gguf))) as base:
        settings = ["--model", base, "--dataset", some_rows, "--output", tmp_path / "run", "--max-steps", 4]
        done = command(*settings, "--batch-size", 8, "--learning-rate", "2e-3", "--functional", some_checks)
        assert done.returncode == 0, done.stderr[-2000:]
        assert re.search(r"converting the merged weights to GGUF with \S*convert_hf_to_gguf\.py", done.stdout)
        assert "served by Ollama, label probabilities differ from training's by 0.0" in done.stdout
        expected = by_torch(base, tmp_path / "run" / "adapter", texts[:40])
    assert not (tmp_path / "run" / "merged").exists()
    assert (tmp_path / "run" / "Modelfile").read_text() == export.MODELFILE
    stored = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert stored["model_sha256"] == runs.sha256_of(tmp_path / "run" / "model.gguf")
    assert np.abs(by_ollama(create(tmp_path / "run"), texts[:40]) - expected).mean() < TOLERANCE


@pytest.mark.slow
def test_evaluate_only_measures_the_run_as_served(
    trained, some_rows, flags, some_checks, create, ollama_host, monkeypatch, capsys
):
    create(trained)
    monkeypatch.setenv("OLLAMA_HOST", ollama_host)
    again = train.Settings(output=trained, evaluate_only=True, functional=some_checks)
    train.main(again)
    printed = capsys.readouterr().out
    assert "weighted avg" in printed
    assert "test.roc_auc_hate: 0." in printed  # a gate of results/gates.json, of which is only said
    metrics = json.loads((trained / "metrics.json").read_text())
    test = metrics["test"]
    assert len(test["as_served"]["digest"]) == 64
    difference = test["as_served_uncalibrated"]["pearson_r"]["value"] - test["torch_uncalibrated"]["pearson_r"]["value"]
    assert abs(difference) < 0.02
    assert metrics["functional"]["as_served"]["accuracy"]["n"] == metrics["functional"]["torch"]["accuracy"]["n"]
    bound = json.loads((trained / "calibration.json").read_text())
    assert bound["fitted_on"]["engine"] == "as_served"

    # The same by torch, from adapter/: what training measured, and the served model's calibration stays.
    before = json.loads((trained / "metrics.json").read_text())["test"]["torch"]
    train.main(replace(again, engine="torch"))
    after = json.loads((trained / "metrics.json").read_text())["test"]["torch"]
    assert after["pearson_r"]["value"] == pytest.approx(before["pearson_r"]["value"], abs=1e-3)
    assert json.loads((trained / "calibration.json").read_text()) == bound
    with pytest.raises(UserError, match=r"gates\.json asks for more than this run reaches"):
        train.main(replace(again, gate=gate(trained.parent / "gates.json", accuracy=1.01)))

    # On rows of one's own, and one run less itself.
    pd.read_parquet(TEST)[:60].to_csv(trained.parent / "yours.csv", index=False)
    yours = replace(again, test_dataset=str(trained.parent / "yours.csv"), annotations=str(ANNOTATIONS))
    train.main(yours)
    assert "yours.csv: 60 comments; 0 left out" in capsys.readouterr().out
    stored = json.loads((trained / "evaluations" / "yours.json").read_text())
    assert stored["as_served"]["n"] == 60
    assert {row["by"] for row in stored["as_served_by_group"]} == {"length, characters", "target"}
    same = evaluation.compare_runs(trained, trained)
    assert "| accuracy | +0.000 | +0.000 to +0.000 | 1.000 |" in same

    # Of texts that it was trained on, and of those the service refuses, nothing is measured.
    of_flags = pd.read_csv(flags)[:10].assign(comment_id=[f"f{number}" for number in range(10)])
    seen = [pd.read_csv(some_rows).sample(40, random_state=0), of_flags.assign(label="Neutral")]
    refused = pd.DataFrame({"comment_id": ["long", "nul"], "text": ["word " * 3000, "a\0b"], "label": "Hate"})
    mixed = pd.concat([pd.read_csv(trained.parent / "yours.csv"), *seen, refused]).astype({"comment_id": str})
    mixed.to_parquet(trained.parent / "mixed.parquet")
    train.main(replace(yours, test_dataset=str(trained.parent / "mixed.parquet"), annotations=None))
    assert "2 left out: the service refuses them" in capsys.readouterr().out
    trained_on = set(json.loads((trained / "splits.json").read_text())["train"])
    expected = mixed["comment_id"].isin(trained_on) | mixed["text"].map(data.text_key).isin(trained_on)
    stored = json.loads((trained / "evaluations" / "mixed.json").read_text())
    assert stored["left_out"] == expected.sum() > 30
    assert stored["as_served"]["n"] == len(mixed) - stored["left_out"] - 2


@pytest.mark.slow
def test_a_gguf_that_ollama_reads_otherwise_is_not_called_finished(run, base_gguf, tmp_path, capsys):
    """The shipped model against probabilities that are not its own."""
    for name in ("model.gguf", "Modelfile", "settings.json", "calibration.json"):
        (tmp_path / name).symlink_to(run / name)
    tokenizer = tokens.load_tokenizer(str(base_gguf))
    classifier = tuning.Classifier(None, tokenizer, tokens.label_ids(tokenizer))
    with pytest.raises(UserError, match=r"no model\.gguf serves what was trained"):
        train.finish_gguf(tmp_path, classifier, "F16", ["a lovely day"], np.array([[1.0, 0.0, 0.0]]))
    assert "merging with the gguf package: Ollama serves other probabilities" in capsys.readouterr().out


@pytest.mark.slow
def test_no_gpu_for_the_default_base_says_what_to_do(tmp_path):
    """Offline, the default run stops at once, with a remedy, and leaves no half-made run under its name."""
    done = command("--output", tmp_path / "run", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 1
    assert "train: unsloth/mistral-7b-instruct-v0.3-bnb-4bit: neither a local model nor to be had" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def load(tokenizer, **changes) -> tuple[dict[str, pd.DataFrame], dict]:
    functional = pd.DataFrame(SMALL, columns=checks.COLUMNS)
    return train.load_splits(train.Settings(**changes), functional, tokenizer)


def test_a_missing_column_or_class_is_named(tokenizer, tmp_path):
    frame = pd.read_parquet(TRAIN)[:60]
    frame[["comment_id", "text"]].to_csv(tmp_path / "no_label.csv")
    frame.assign(hate_speech_score=-0.5).to_csv(tmp_path / "neutral.csv")
    reasons = {"no_label.csv": "no column hate_speech_score, label or hateful", "neutral.csv": "hold no Hate"}
    for file, reason in reasons.items():
        with pytest.raises(UserError, match=reason):
            load(tokenizer, dataset=str(tmp_path / file))


def test_other_rows_teach_with_their_weight_and_are_not_measured_on(tokenizer, some_rows, flags, tmp_path):
    plain, _ = load(tokenizer, dataset=str(some_rows))
    # One like a functional check, one like a validation comment, and one new.
    seen = plain["validation"]["text"][0]
    (tmp_path / "more.csv").write_text("")
    pd.DataFrame({"text": ["women are VILE", seen.upper(), "a new text"], "hateful": 1}).to_csv(
        tmp_path / "more.csv", index=False
    )
    sources = str(some_rows), str(flags), str(tmp_path / "more.csv")
    changes = {"dataset": sources[0], "also": sources[1:], "also_weight": (0.5, 3.0)}
    splits, counts = load(tokenizer, **changes)
    for name in ("validation", "test"):
        assert data.fingerprint(splits[name]) == data.fingerprint(plain[name])
    found = splits["train"]
    assert found.groupby("source", sort=False)["weight"].agg(["first", "nunique"]).T.to_dict("list") == dict(
        zip(sources, [[1.0, 1], [0.5, 1], [3.0, 1]], strict=True)
    )
    assert counts[sources[2]]["comments_left_out_for_being_like_a_measured_one"] == 2
    assert found[found["source"] == sources[2]]["text"].tolist() == ["a new text"]
    goals = train.goals_of(found, train.Settings(**changes))
    assert goals.sum(axis=1) == pytest.approx(found["weight"].to_numpy())
    not_hate = (found["label"] == task.NOT_HATE).to_numpy()
    assert (goals[:, 3] > 0).tolist() == not_hate.tolist()
    assert set(goals[not_hate, 3]) == {1.0, 0.5}
    even, _ = load(tokenizer, **changes | {"also_weight": ()})
    assert set(even["train"]["weight"]) == {1.0}


def test_on_test_rows_of_their_own_what_is_like_them_teaches_nothing(tokenizer, some_rows, tmp_path):
    own = pd.read_csv(some_rows)[:50]
    more = pd.DataFrame({"comment_id": ["a", "b"], "text": ["Women are vile.", "a new text"], "label": "Hate"})
    pd.concat([pd.read_csv(some_rows), more]).to_csv(tmp_path / "rows.csv", index=False)
    own.to_parquet(tmp_path / "own.parquet")
    splits, counts = load(tokenizer, dataset=str(tmp_path / "rows.csv"), test_dataset=str(tmp_path / "own.parquet"))
    assert splits["test"]["comment_id"].tolist() == own["comment_id"].astype(str).tolist()
    assert counts["comments_left_out_for_being_like_one_of_test"] == 50
    assert counts["comments_left_out_for_being_like_one_of_functional"] == 1
    everything = pd.concat([splits["train"], splits["validation"]])
    assert not set(everything["comment_id"]) & {*splits["test"]["comment_id"], "a"}
    assert len(everything) + counts["comments_left_out_for_being_like_a_held_out_one"] == 300 - 50 + 1


REFUSED = [
    ("validation-share", {"validation_share": 0.0}),
    ("validation-share", {"validation_share": 1.0}),
    ("validation-share", {"validation_share": float("nan")}),
    ("test-share", {"test_share": 0.0}),
    ("test-share", {"test_share": -0.1}),
    ("test-share", {"test_share": 0.5, "validation_share": 0.5}),
    ("also-weight", {"also_weight": (0.5,)}),
    ("also-weight", {"also": ("a.csv", "b.csv"), "also_weight": (0.5,)}),
    ("also-weight", {"also": ("a.csv",), "also_weight": (0.0,)}),
    ("also-weight", {"also": ("a.csv",), "also_weight": (float("nan"),)}),
    ("score-error", {"score_error": -0.1}),
    ("epochs", {"epochs": 0.0}),
    ("epochs", {"epochs": float("inf")}),
    ("learning-rate", {"learning_rate": 0.0}),
    ("learning-rate", {"learning_rate": 1.0}),
    ("batch-size", {"batch_size": 0}),
    ("rank", {"rank": 0}),
    ("alpha", {"alpha": 0}),
    ("members", {"members": 0}),
    ("max-steps", {"max_steps": 0}),
    ("seed", {"seed": -1}),
    ("seed", {"seed": 2**32}),
    ("checkpoint-every-s", {"checkpoint_every_s": -1.0}),
]


@pytest.mark.parametrize(("flag", "changes"), REFUSED)
def test_what_can_not_end_well_is_refused_by_name_before_anything_is_read(tmp_path, flag, changes):
    with pytest.raises(UserError, match=f"^--{flag} "):
        train.main(train.Settings(model="no such base", dataset="no.csv", output=tmp_path / "run", **changes))
    assert list(tmp_path.iterdir()) == []


def test_what_makes_sense_is_not_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("own.csv", "a.csv", "b.csv"):
        Path(name).write_text("text,hateful\na,1\n")
    train.check(train.Settings())
    train.check(train.Settings(test_dataset="own.csv", test_share=0.0, validation_share=0.9))
    train.check(train.Settings(also=("a.csv", "b.csv"), also_weight=(0.5, 2.0), score_error=0.0, epochs=0.1))
    train.check(train.Settings(also=("a.csv",), max_steps=1, members=3))


def test_gates_checks_and_runs_that_can_not_be_read_are_named_first(tmp_path, base_gguf):
    (tmp_path / "gates.json").write_text('[{"metric": "accuracy"}]')
    (tmp_path / "checks.csv").write_text("text,label\na,Hate\n")
    wrong = {"gates.json: a gate is": {"gate": tmp_path / "gates.json"}}
    wrong |= {"checks.csv: functional checks have": {"functional": tmp_path / "checks.csv"}}
    wrong |= {"no finished run": {"evaluate_only": True}}
    for reason, changes in wrong.items():
        with pytest.raises(UserError, match=reason):
            train.main(train.Settings(model=str(base_gguf), output=tmp_path / "run", **changes))
    assert not (tmp_path / "run.incomplete").exists()


def test_flags_may_be_given_several_times():
    given = train.parse(["--also", "a.csv", "--also", "b.csv", "--also-weight", "1", "--also-weight", "0.5"])
    assert (given.also, given.also_weight) == (("a.csv", "b.csv"), (1.0, 0.5))
    assert train.parse([]) == train.Settings()


def test_a_runs_settings_are_read_back_and_an_older_ones_too():
    given = train.Settings(also=("a.csv",), also_weight=(0.5,), functional=Path("checks.csv"), members=3)
    stored = json.loads(json.dumps(given.as_json()))
    again = train.Settings.of(stored)
    assert (again.also, again.also_weight, str(again.functional), again.members) == (
        ("a.csv",),
        (0.5,),
        "checks.csv",
        3,
    )
    older = {"dataset": "old.csv", "targets": "soft", "calibrate_on": "test", "class_weights": "none", "epochs": 3.0}
    assert train.Settings.of(older) == train.Settings(dataset="old.csv", epochs=3.0)


@pytest.fixture(scope="module")
def tiny(tokenizer, tmp_path_factory) -> str:
    """A base of random weights, of which nothing is asked but that it is small."""
    shape = SHAPES["tiny"] | {"tie_word_embeddings": False}
    return random_base(tokenizer, str(tmp_path_factory.mktemp("tiny")), **shape)


@pytest.fixture
def quick(tiny, folder, tmp_path, monkeypatch) -> train.Settings:
    """Settings of a run that its gate keeps from being exported, which is half the work of a run so small."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pd.DataFrame(SMALL, columns=checks.COLUMNS).to_csv(tmp_path / "checks.csv", index=False)
    asked = gate(tmp_path / "gates.json", accuracy=1.01, roc_auc_hate=0.0)
    start = {"model": tiny, "output": tmp_path / "run", "functional": tmp_path / "checks.csv", "gate": asked}
    return train.Settings(**start, max_steps=3, batch_size=8, learning_rate=1e-2)


def test_a_model_below_its_gate_is_not_exported(quick, some_rows, tmp_path):
    """Exit status 1; what was measured stays."""
    given = {name.replace("_", "-"): value for name, value in quick.as_json().items() if value and name != "also"}
    given |= {"dataset": some_rows, "output": quick.output}
    given = {name: value for name, value in given.items() if name not in ("also", "also-weight", "note")}
    done = command(*(part for name, value in given.items() for part in (f"--{name}", value)))
    assert done.returncode == 1, done.stderr[-2000:]
    assert "FAILED  test.accuracy: 0." in done.stdout
    assert "passed  test.roc_auc_hate: 0." in done.stdout
    assert "train: no model is exported: " in done.stderr
    assert "Traceback" not in done.stderr
    work = tmp_path / "run.incomplete"
    assert not quick.output.exists()
    assert not [path for path in work.rglob("*") if path.suffix in (".gguf", ".safetensors")]
    metrics = json.loads((work / "metrics.json").read_text())
    assert [result["passed"] for result in metrics["gates"]["torch"]] == [False, True]
    assert "- FAILED  test.accuracy: 0." in (work / "README.md").read_text()


def refused(settings: train.Settings) -> tuple[dict, dict, str]:
    """Settings, metrics and model card of a run that its gate ends."""
    with pytest.raises(UserError, match=r"no model is exported: .*gates\.json asks for more"):
        train.main(settings)
    work = settings.output.with_name("run.incomplete")
    stored, metrics = (json.loads((work / f"{name}.json").read_text()) for name in ("settings", "metrics"))
    return stored, metrics, (work / "README.md").read_text()


def test_members_are_averaged_and_annotators_stand_beside_the_model(quick, some_rows, folder):
    pd.read_parquet(TEST)[:120].to_parquet(folder / "own.parquet")
    more = {"dataset": str(some_rows), "test_dataset": str(folder / "own.parquet"), "annotations": str(ANNOTATIONS)}
    stored, metrics, card = refused(replace(quick, members=2, **more))
    training = stored["training"]
    assert (training["members"], training["steps"], training["rows"]) == (2, 6, 48)
    assert 0 <= training["update_lost_by_the_rank"] < 1
    beside = metrics["test_annotators"]["torch"]
    assert beside["annotator"]["n"] == beside["model"]["n"] > 100
    targets = {row["group"] for row in metrics["test_groups"]["torch"] if row["by"] == "target"}
    assert "race" in targets
    assert "the mean of 2 LoRAs of one beginning" in card
    assert "**Beside one person**" in card
    assert stored["data"]["comments"]["test"] == 120


def test_a_set_of_flags_alone_is_trained_calibrated_and_measured(quick, flags, folder):
    """Hate is told from the rest; of three classes nothing is said."""
    pd.read_parquet(DATA / "hatemojibuild.parquet")[:300].to_csv(folder / "only_flags.csv", index=False)
    stored, metrics, card = refused(replace(quick, dataset=str(folder / "only_flags.csv")))
    assert stored["class_scores"] == pytest.approx(task.TYPICAL_SCORES)
    test = metrics["test"]["torch"]
    assert test["accuracy_hate"]["value"] > 0.3
    assert test["accuracy"] == test["pearson_r"] == {"value": None, "low": None, "high": None}
    assert metrics["gates"]["torch"][0]["reached"] is None
    assert "FAILED  test.accuracy: not measured" in card
    assert "nan" not in card.lower().replace("finance", "")
    about = ModelCard(card).data
    assert {result.metric_name for result in about.eval_results} == {"roc_auc_hate"}
    assert "Measuring Hate Speech" not in card  # these rows are their user's own


def test_the_references_recipe_says_that_it_leaks(quick, folder, capsys):
    """Its report, of a split by row: accuracy, by label, scikit-learn's table and the confusion matrix."""
    rows = data.read(str(ANNOTATIONS))
    several = rows.groupby("comment_id")["comment_id"].transform("size") > 5
    some = pd.concat([rows[several][:120], rows[~several][:40]])
    some.to_csv(folder / "annotated.csv", index=False)
    train.main(replace(quick, reference=True, dataset=str(folder / "annotated.csv"), max_steps=2))
    printed = capsys.readouterr().out
    report = printed[printed.index("LEAKY") :].splitlines()
    assert report[0].startswith("LEAKY: a split by row; ")
    assert report[0].endswith("% of the 32 test rows' texts were in training.")
    assert int(report[0].split("; ")[1].split("%")[0]) > 50
    assert report[2].startswith("Accuracy: 0.")
    labels = [line.split(":")[0] for line in report if line.startswith("Accuracy for label")]
    assert labels == [f"Accuracy for label {label}" for label in task.LABELS]
    assert report[report.index("Classification Report:") + 1].split() == ["precision", "recall", "f1-score", "support"]
    matrix = " ".join(report[report.index("Confusion Matrix:") + 1 :])
    counts = [int(number) for number in matrix.replace("[", " ").replace("]", " ").split()]
    assert (len(counts), sum(counts)) == (9, 32)
    assert not quick.output.exists()
    (folder / "few.csv").write_text("text,label\na,Hate\n")
    with pytest.raises(UserError, match="takes rows with a hate_speech_score: there are fewer than ten"):
        train.main(replace(quick, reference=True, dataset=str(folder / "few.csv")))


def test_an_evaluation_of_changed_data_is_refused(tmp_path, base_gguf, run, monkeypatch):
    stored = json.loads((run / "settings.json").read_text())
    stored["data"]["sha256"]["test"] = "0" * 64
    (tmp_path / "settings.json").write_text(json.dumps(stored))
    shutil.copy(run / "splits.json", tmp_path)
    with pytest.raises(UserError, match="has changed since"):
        train.evaluate(tmp_path, train.Settings())
    splits = json.loads((run / "splits.json").read_text())
    (tmp_path / "splits.json").write_text(json.dumps(splits | {"test": [*splits["test"], "no such comment"]}))
    with pytest.raises(UserError, match="its test comments differ"):
        train.evaluate(tmp_path, train.Settings())


def test_evaluate_only_without_ollama_says_how_to_start_it(run, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=r"can't be reached.*MODEL_DIR=.*bootstrap\.sh"):
        train.evaluate(run, train.Settings())


def test_the_shipped_metrics_are_of_the_shipped_data(run):
    """Measured on comments it did not learn from, above the plain baseline from the same data."""
    stored, metrics = (json.loads((run / name).read_text()) for name in ("settings.json", "metrics.json"))
    splits = train.stored_splits(run, stored, train.Settings.of(stored["settings"]))
    kept = {name: data.fingerprint(splits[name]) for name in ("validation", "test")}
    assert kept == {name: stored["data"]["sha256"][name] for name in kept}
    for name in kept:
        assert not set(splits["train"]["text"]) & set(splits[name]["text"])
    served, plain, tfidf = (
        metrics["test"][name] for name in ("as_served", "as_served_uncalibrated", "tfidf_logistic_regression")
    )
    for metric in ("accuracy", "macro_f1", "pearson_r", "roc_auc_hate"):  # like with like: neither is calibrated
        assert plain[metric]["value"] > tfidf[metric]["value"]
        assert served[metric]["value"] > metrics["test"]["tfidf_calibrated"][metric]["value"]
    assert (run / "adapter.gguf").stat().st_size < 12e6


def test_main_fits_a_screen():
    source = (ROOT / "train.py").read_text()
    body = source.split("def main(")[1].split("\ndef ")[0]
    assert body.count("\n") <= 40
