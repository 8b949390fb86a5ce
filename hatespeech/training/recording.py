"""What is known of a run, written into its folder as it becomes known: settings, calibration, metrics, card."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from hatespeech import calibration, runs, task
from hatespeech.training import card, checks, data, evaluation, pictures, tuning


def read_metrics(folder: Path) -> dict:
    path = folder / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else {}


def read_splits(folder: Path) -> dict[str, list[str]]:
    return json.loads((folder / "splits.json").read_text())


def describe(folder: Path, settings: dict, splits: dict, counts: dict, classifier, training: dict) -> None:
    """Write what a reader needs to run it again, and what serving needs to know: label_tokens, class_scores, base."""
    is_file = settings["model"].endswith(".gguf")
    train, commented = splits["train"], {name: splits[name] for name in ("train", "validation", "test")}
    pd.DataFrame(training.pop("curve")).to_csv(folder / "learning_curve.csv", index=False, float_format="%.5g")
    runs.write_json(folder / "splits.json", {name: part["comment_id"].tolist() for name, part in commented.items()})
    about = {
        "command": "python -m train " + shlex.join(sys.argv[1:]),
        "settings": settings,
        "commit": commit(),
        "versions": versions(),
        "hardware": tuning.hardware(),
        "data": {
            "counts": counts,
            "sha256": {name: data.fingerprint(part) for name, part in commented.items()},
            "comments": {name: len(part) for name, part in commented.items()},
            "trained_on": [
                {"source": source, "known": kind, "label": label, "comments": int(n)}
                for (source, kind, label), n in train.groupby(["source", "kind", "label"], sort=False).size().items()
            ],
        },
        "base": {
            "name": Path(settings["model"]).name if is_file else settings["model"],
            "sha256": runs.sha256_of(Path(settings["model"])) if is_file else None,
        },
        "prompt_version": task.PROMPT_VERSION,
        "label_tokens": classifier.label_tokens,
        "class_scores": class_scores(train),
        "training": training,
    }
    runs.write_json(folder / "settings.json", about)


def class_scores(train: pd.DataFrame) -> list[float]:
    """(3,) the mean score of each class's training comments, or MHS's where none has a score."""
    means = train.groupby("label")["score"].mean()
    found = zip(task.LABELS, task.TYPICAL_SCORES, strict=True)
    return [round(float(means[label]), 4) if np.isfinite(means.get(label, np.nan)) else mean for label, mean in found]


def record(folder: Path, splits: dict, name: str, engine: str, probabilities: np.ndarray, **origin) -> None:
    """Add what an engine predicts of a split to metrics.json and predictions.csv. Validation first: it calibrates.

    A finished run's calibration is of what is served; torch's must not replace it.
    """
    part, metrics = splits[name], read_metrics(folder)
    if name == "validation":
        labels, scores = part["label"], part["score"].to_numpy()
        if engine == "as_served" or folder.suffix == ".incomplete":
            sha256 = runs.read_settings(folder)["data"]["sha256"][name]
            fitted = calibration.fit(probabilities, labels, scores, split=name, engine=engine, sha256=sha256)
            replace(fitted, model_sha256=origin.get("model_sha256")).save(folder / "calibration.json")
        calibrated, expected = calibration.cross_fit(probabilities, labels, scores)
    else:
        fitted = calibration.Calibration.load(folder / "calibration.json")
        calibrated = fitted.apply(probabilities)
        expected = fitted.expected(calibrated)
    if name == "functional":
        metrics.setdefault(name, {})[engine] = origin | checks.measure(part, calibrated)
    else:
        uncalibrated = probabilities, probabilities @ np.asarray(runs.read_settings(folder)["class_scores"])
        found = {f"{engine}_uncalibrated": uncalibrated, engine: (calibrated, expected)}
        for classifier, predicted in found.items():
            metrics.setdefault(name, {})[classifier] = origin | evaluation.measure(part, *predicted)
        if name == "test":
            evaluation.save_predictions(folder / evaluation.PREDICTIONS, part, "test", found)
    runs.write_json(folder / "metrics.json", metrics)


def record_zero_shot(folder: Path, test: pd.DataFrame, probabilities: np.ndarray) -> None:
    """Keep what the base predicted before training."""
    expected = probabilities @ np.asarray(runs.read_settings(folder)["class_scores"])
    evaluation.save_predictions(folder / evaluation.PREDICTIONS, test, "test", {"zero_shot": (probabilities, expected)})


def write_report(folder: Path, splits: dict, engine: str, gates: list[dict]) -> None:
    """Set what an engine reached beside baselines, annotators and gates; write report.txt, pictures and the card."""
    run, metrics, test = runs.read_settings(folder), read_metrics(folder), splits["test"]
    predictions = evaluation.load_predictions(folder)
    if "tfidf_calibrated" not in predictions:
        beside = evaluation.baselines(splits["train"], test, splits["validation"], run["class_scores"])
        evaluation.save_predictions(folder / evaluation.PREDICTIONS, test, "test", beside)
        predictions = evaluation.load_predictions(folder)
    found = {name: evaluation.predicted_of(frame) for name, frame in predictions.items()}
    others = [name for name in found if not name.startswith(("torch", "as_served"))]
    for name in others:
        if name not in metrics["test"]:
            metrics["test"][name] = evaluation.measure(test, *found[name])
    best = max(others, key=lambda name: metrics["test"][name]["macro_f1"]["value"] or 0.0)
    compared = evaluation.compare(test, found[engine], found[best])
    probabilities, expected = found[engine]
    metrics.setdefault("test_differences", {})[engine] = {"baseline": best, "metrics": compared}
    metrics.setdefault("test_groups", {})[engine] = evaluation.groups(test, probabilities)
    metrics.setdefault("test_annotators", {})[engine] = evaluation.annotators(test, probabilities)
    hate = (test["label"] == "Hate").to_numpy()
    thresholds = calibration.precision_and_recall(probabilities[:, evaluation.HATE], hate)
    metrics.setdefault("test_thresholds", {})[engine] = thresholds
    metrics.setdefault("gates", {})[engine] = checks.passed(metrics, engine, gates)
    runs.write_json(folder / "metrics.json", metrics)
    title = f"{folder.name.removesuffix('.incomplete')}: {len(test)} test comments, {engine}"
    (folder / "report.txt").write_text(evaluation.report(test, probabilities))
    pictures.draw_all(folder, title, test, found[f"{engine}_uncalibrated"][0], probabilities, expected)
    (folder / "README.md").write_text(card.model_card(folder, run, metrics, engine))


def commit() -> str | None:
    """The commit the code is at, marked where files differ from it; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parents[2])]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT")
    return head + ("-dirty" if changed.stdout.strip() else "")


def versions() -> dict[str, str | None]:
    names = ("torch", "transformers", "peft", "unsloth", "bitsandbytes", "scikit-learn", "gguf")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
