"""`python -m train` on a CPU with real rows and the real small base, and its exports under a real Ollama."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import pytest

import train
from hatespeech import UserError, data, evaluation, export, ollama, tuning
from tests.conftest import ROOT, free_port
from tests.test_data import GOLD, SILVER

# F16 weights and Ollama's CPU kernels against fp32. A q or k in the wrong order moves more: see below.
TOLERANCE = 0.01


@pytest.fixture(scope="module")
def some_silver(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "some.csv"
    pd.read_csv(SILVER)[:240].to_csv(path, index=False)
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
def trained(some_silver, base_gguf, tmp_path_factory) -> Path:
    """A run of some steps, made by the command."""
    folder = tmp_path_factory.mktemp("results") / "trained"
    settings = ["--model", base_gguf, "--dataset", some_silver, "--output", folder, "--max-steps", 12]
    done = command(*settings, "--batch-size", 16, "--learning-rate", "2e-3")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "is complete. Serve it" in done.stdout
    assert "training: 100%" in done.stderr
    assert "loss=" in done.stderr
    return folder


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return pd.read_csv(GOLD)["text"][:100].tolist()


def by_torch(base: str, adapter: Path, texts: list[str]) -> np.ndarray:
    """(n, 3) label probabilities of base + PEFT adapter in fp32."""
    tokenizer = tuning.load_tokenizer(base)
    classifier = tuning.load(base, tokenizer, rank=16, alpha=32, seed=0, adapter=adapter)
    return tuning.label_probabilities(classifier, tuning.encode(tokenizer, texts))


def by_ollama(client, texts: list[str]) -> np.ndarray:
    return np.array([client.classify(text).probabilities for text in texts])


@pytest.mark.slow
def test_the_folder_holds_all_that_is_promised(trained, some_silver):
    assert {path.name for path in trained.iterdir()} == {
        *("settings.json", "splits.json", "metrics.json", "report.txt", "calibration.json", "predictions.csv"),
        *("confusion_matrix.png", "reliability.png", "scores.png", "coverage.png", "groups.png"),
        *("learning_curve.png", "learning_curve.csv"),
        *("adapter", "adapter.gguf", "model.gguf", "Modelfile", "README.md"),
    }
    settings = json.loads((trained / "settings.json").read_text())
    assert settings["command"].startswith("python -m train --model ")
    assert settings["settings"]["learning_rate"] == 2e-3
    assert settings["commit"] == train.commit()
    assert settings["versions"]["torch"]
    assert settings["data"]["counts"][str(some_silver)]["rows"] == 240
    splits = json.loads((trained / "splits.json").read_text())
    ids = [id for part in splits.values() for id in part]
    assert {name: len(part) for name, part in splits.items()} == settings["data"]["comments"]
    assert len(ids) == len(set(ids)) == 240
    metrics = json.loads((trained / "metrics.json").read_text())
    assert set(metrics["test"]) == {
        *("majority_class", "tfidf_logistic_regression", "tfidf_calibrated", "zero_shot"),
        *("torch", "torch_uncalibrated"),
    }
    assert set(metrics["validation"]) == {"torch", "torch_uncalibrated"}
    assert 0 < metrics["test_differences"]["torch"]["metrics"]["macro_f1"]["p"] <= 1
    assert sum(row["n"] for row in metrics["test_groups"]["torch"]) == len(splits["test"])
    assert metrics["tfidf_by_row_leaky"]["test_rows_seen_in_training"] == 0  # one row a comment here
    assert metrics["annotators_vote"] is None
    assert metrics["test"]["torch"]["n"] == len(splits["test"])
    predictions = pd.read_csv(trained / "predictions.csv", dtype={"comment_id": str})
    assert predictions.groupby("classifier")["comment_id"].apply(list).map(splits["test"].__eq__).all()
    assert len(pd.read_csv(trained / "learning_curve.csv")) == 12
    card = (trained / "README.md").read_text()
    assert "| torch |" in card
    assert "CC-BY-4.0" in card
    assert "weighted avg" in (trained / "report.txt").read_text()


@pytest.mark.slow
def test_served_it_answers_with_torchs_probabilities(trained, create, base_gguf, texts):
    """Merged, F16, through Ollama: on 100 real texts the same label on at least 99, and near in every probability."""
    expected = by_torch(str(base_gguf), trained / "adapter", texts)
    merged = by_ollama(create(trained), texts)
    assert np.abs(merged - expected).max() < TOLERANCE
    assert (merged.argmax(axis=1) == expected.argmax(axis=1)).sum() >= 99

    # The adapter apart, on the Q4_1 base: its kernels round activations to 8 bits, so the tolerance is wider.
    modelfile = (trained / "Modelfile").read_text().replace("./model.gguf", f"{base_gguf}\nADAPTER ./adapter.gguf")
    (trained / "Modelfile.adapter").write_text(modelfile)
    apart = by_ollama(create(trained, "Modelfile.adapter", "hatespeech-apart"), texts)
    (trained / "Modelfile.adapter").unlink()
    assert np.abs(apart - expected).mean() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "shrinks_to", "tolerance"), [("Q8_0", 0.6, 0.05), ("Q4_K_M", 0.5, 0.15)])
def test_quantised_by_ollama_it_is_smaller_and_nearly_the_same(
    trained, create, texts, tmp_path, quantize, shrinks_to, tolerance
):
    for name in ("model.gguf", "Modelfile", "settings.json"):
        shutil.copy(trained / name, tmp_path)
    ollama.convert(tmp_path, "./model.gguf", "--quantize", quantize)
    assert (tmp_path / "model.gguf").stat().st_size < shrinks_to * (trained / "model.gguf").stat().st_size
    assert (tmp_path / "Modelfile").read_text() == (trained / "Modelfile").read_text()
    whole, quantised = (
        by_ollama(create(trained), texts),
        by_ollama(create(tmp_path, name=f"hs-{quantize.lower()}"), texts),
    )
    difference, same = np.abs(quantised - whole).mean(), (quantised.argmax(axis=1) == whole.argmax(axis=1)).sum()
    print(f"{quantize}: mean difference {difference:.4f}, the same label on {same} of {len(texts)}")
    assert 0 < difference < tolerance


@pytest.mark.slow
def test_a_misordered_adapter_would_be_seen(trained, create, base_gguf, texts, tmp_path):
    """Ollama's converter leaves q and k in PEFT's rotary order. Do the same to ours, and the test above must fail."""
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


@pytest.mark.slow
def test_a_base_directory_goes_through_ollamas_converter(some_silver, base_gguf, create, texts, tmp_path):
    """--model DIRECTORY: merged 16-bit weights, converted to model.gguf, served with torch's probabilities."""
    with tuning._as_directory(str(base_gguf), tuning.load_tokenizer(str(base_gguf))) as base:
        settings = ["--model", base, "--dataset", some_silver, "--output", tmp_path / "run", "--max-steps", 4]
        done = command(*settings, "--batch-size", 8, "--learning-rate", "2e-3", "--targets", "soft")
        assert done.returncode == 0, done.stderr[-2000:]
        assert "with Ollama's own converter" in done.stdout
        assert "served by Ollama, label probabilities differ from training's by 0.0" in done.stdout
        expected = by_torch(base, tmp_path / "run" / "adapter", texts[:40])
    assert not (tmp_path / "run" / "merged").exists()
    assert (tmp_path / "run" / "Modelfile").read_text() == export.MODELFILE
    stored = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert stored["model_sha256"] == export.sha256_of(tmp_path / "run" / "model.gguf")
    assert np.abs(by_ollama(create(tmp_path / "run"), texts[:40]) - expected).mean() < TOLERANCE


@pytest.mark.slow
def test_evaluate_only_measures_the_run_as_served(trained, create, ollama_host, monkeypatch, capsys):
    create(trained)
    monkeypatch.setenv("OLLAMA_HOST", ollama_host)
    train.main(train.Settings.of(output=trained, evaluate_only=True))
    assert "weighted avg" in capsys.readouterr().out
    test = json.loads((trained / "metrics.json").read_text())["test"]
    assert len(test["as_served"]["digest"]) == 64
    difference = test["as_served_uncalibrated"]["pearson_r"]["value"] - test["torch_uncalibrated"]["pearson_r"]["value"]
    assert abs(difference) < 0.02
    bound = json.loads((trained / "calibration.json").read_text())

    # The same by torch, from adapter/: what training measured, and the served model's calibration stays.
    before = json.loads((trained / "metrics.json").read_text())["test"]["torch"]
    train.main(train.Settings.of(output=trained, evaluate_only=True, engine="torch"))
    after = json.loads((trained / "metrics.json").read_text())["test"]["torch"]
    assert after["pearson_r"]["value"] == pytest.approx(before["pearson_r"]["value"], abs=1e-3)
    assert json.loads((trained / "calibration.json").read_text()) == bound

    # On rows of one's own, and one run less itself.
    rows = pd.read_csv(GOLD)[:60]
    rows.to_csv(trained.parent / "yours.csv", index=False)
    yours = str(trained.parent / "yours.csv")
    train.main(train.Settings.of(output=trained, evaluate_only=True, test_dataset=yours))
    assert "yours.csv: 60 comments; 0 left out" in capsys.readouterr().out
    stored = json.loads((trained / "evaluations" / "yours.json").read_text())
    assert stored["as_served"]["n"] == 60
    same = evaluation.compare_runs(trained, trained)
    assert "| accuracy | +0.000 | +0.000 to +0.000 | 1.000 |" in same


@pytest.mark.slow
def test_a_gguf_that_ollama_reads_otherwise_is_not_called_finished(run, base_gguf, tmp_path, capsys):
    """The shipped model against probabilities that are not its own."""
    for name in ("model.gguf", "Modelfile", "settings.json", "calibration.json"):
        (tmp_path / name).symlink_to(run / name)
    tokenizer = tuning.load_tokenizer(str(base_gguf))
    classifier = tuning.Classifier(None, tokenizer, tuning.label_ids(tokenizer))
    with pytest.raises(UserError, match=r"no model\.gguf serves what was trained"):
        train.finish_gguf(tmp_path, classifier, "F16", ["a lovely day"], np.array([[1.0, 0.0, 0.0]]))
    assert "merging with the gguf package: Ollama serves other probabilities" in capsys.readouterr().out


def settings(tmp_path, base_gguf, **changes) -> train.Settings:
    defaults = {"model": str(base_gguf), "dataset": str(SILVER), "output": tmp_path / "run"}
    return train.Settings.of(**(defaults | changes))


@pytest.mark.slow
def test_no_gpu_for_the_default_base_says_what_to_do(tmp_path):
    """Offline, the default run stops at once, with a remedy, and leaves no half-made run under its name."""
    done = command("--output", tmp_path / "run", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 1
    assert "train: unsloth/mistral-7b-instruct-v0.3-bnb-4bit: neither a local model nor to be had" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_column_or_class_is_named(tmp_path):
    frame = pd.read_csv(SILVER)[:60]
    frame.drop(columns="hate_speech_score").to_csv(tmp_path / "no_score.csv")
    frame.assign(hate_speech_score=-0.5).to_csv(tmp_path / "neutral.csv")
    for file, reason in (("no_score.csv", "no column hate_speech_score"), ("neutral.csv", "hold no Hate, Supportive")):
        with pytest.raises(UserError, match=reason):
            train.load_splits(train.Settings.of(dataset=str(tmp_path / file)))


def test_settings_that_contradict_are_refused(tmp_path, base_gguf, monkeypatch):
    with pytest.raises(UserError, match="no comments to calibrate on"):
        train.main(settings(tmp_path, base_gguf, validation_share=0.0))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(UserError, match="--quantize Q8_0 is Ollama's work, and there is no `ollama` command"):
        train.main(settings(tmp_path, base_gguf, quantize="Q8_0"))
    with pytest.raises(UserError, match="no finished run"):
        train.main(settings(tmp_path, base_gguf, evaluate_only=True))


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
    """Trained on silver without a word of gold, tested on gold, above the plain baseline from the same data."""
    stored, metrics = (json.loads((run / name).read_text()) for name in ("settings.json", "metrics.json"))
    splits, _ = train.load_splits(train.Settings.of(**stored["settings"]))
    again = train.stored_splits(run, train.Settings.of(**stored["settings"]))
    assert all(data.fingerprint(again[name]) == data.fingerprint(splits[name]) for name in splits)
    assert {name: data.fingerprint(part) for name, part in splits.items()} == stored["data"]["sha256"]
    assert not set(splits["train"]["text"]) & set(splits["test"]["text"])
    served, plain, tfidf = (
        metrics["test"][name] for name in ("as_served", "as_served_uncalibrated", "tfidf_logistic_regression")
    )
    for metric in ("accuracy", "macro_f1", "pearson_r"):  # like with like: neither is calibrated
        assert plain[metric]["value"] > tfidf[metric]["value"]
    for metric in ("accuracy", "roc_auc_hate", "pearson_r"):  # not macro-F1, as the README says
        assert served[metric]["value"] > tfidf[metric]["value"]
    assert (run / "adapter.gguf").stat().st_size < 12e6


def test_class_weights_make_every_class_count_the_same():
    frame = pd.DataFrame(
        {"score": [1.0] * 1 + [0.0] * 3 + [-2.0] * 6, "label": ["Hate"] + ["Neutral"] * 3 + ["Supportive"] * 6}
    )
    plain, balanced = (
        train.targets_of(frame, train.Learning(targets="hard", class_weights=kind)) for kind in ("none", "balanced")
    )
    assert plain.sum(axis=0).tolist() == [1, 3, 6]
    assert balanced.sum(axis=0) == pytest.approx([10 / 3] * 3)


def test_main_fits_a_screen():
    source = (ROOT / "train.py").read_text()
    body = source.split("def main(")[1].split("\ndef ")[0]
    assert body.count("\n") <= 40
