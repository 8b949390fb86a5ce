"""A run's pictures: PNG, colour-blind safe. What they show is in predictions.csv, metrics.json, learning_curve.csv."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from hatespeech import task
from hatespeech.training import evaluation

# Okabe and Ito's colours: https://jfly.uni-koeln.de/color/
COLOURS = {"Hate": "#D55E00", "Neutral": "#999999", "Supportive": "#0072B2"}
BEFORE, AFTER = "#999999", "#0072B2"


@contextmanager
def _axes(path: Path, title: str, size: tuple[float, float] = (4.8, 4.2)) -> Iterator:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=size, layout="constrained")
    yield axes
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_all(
    folder: Path, title: str, frame: pd.DataFrame, before: np.ndarray, after: np.ndarray, expected: np.ndarray
) -> None:
    """All pictures of the test comments. before, after: (n, 3) probabilities, uncalibrated and calibrated.

    frame: comments with label, score, text and targets. expected: (n,) expected scores.
    """
    precision_recall(frame, after, title, folder / "precision_recall.png")
    known = (frame["label"] != task.NOT_HATE).to_numpy()
    if known.any():
        part = frame[known]
        confusion(part, after[known], title, folder / "confusion_matrix.png")
        reliability(part, before[known], after[known], title, folder / "reliability.png")
        coverage(part, after[known], title, folder / "coverage.png")
    scored = frame["score"].notna().to_numpy()
    if scored.any():
        scatter(frame[scored], expected[scored], title, folder / "scores.png")
    error_rates(evaluation.groups(frame, after), title, folder / "groups.png")
    if (curve := folder / "learning_curve.csv").exists():
        learning_curve(pd.read_csv(curve), title, folder / "learning_curve.png")


def precision_recall(frame: pd.DataFrame, probabilities: np.ndarray, title: str, path: Path) -> None:
    """Precision and recall of Hate by the least P(Hate) at which one acts."""
    hate = (frame["label"] == "Hate").to_numpy()
    p_hate = probabilities[:, task.LABELS.index("Hate")]
    order = np.argsort(-p_hate, kind="stable")
    found = hate[order].cumsum()
    start = min(len(order) - 1, 19)  # of fewer the precision is chance
    with _axes(path, title, (4.8, 3.4)) as axes:
        thresholds = p_hate[order][start:]
        axes.plot(thresholds, (found / np.arange(1, len(order) + 1))[start:], color=AFTER, label="precision")
        axes.plot(
            thresholds, (found / max(1, hate.sum()))[start:], color=COLOURS["Hate"], linestyle="--", label="recall"
        )
        axes.set(xlabel="P(Hate) at least", ylabel="share", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def confusion(frame: pd.DataFrame, probabilities: np.ndarray, title: str, path: Path) -> None:
    """Counts, shaded by the share of each true class."""
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    counts = confusion_matrix(evaluation.numbers(frame["label"]), probabilities.argmax(axis=1), labels=range(3))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with _axes(path, title) as axes:
        display = ConfusionMatrixDisplay(shares, display_labels=task.LABELS)
        display.plot(ax=axes, cmap="cividis", colorbar=False, im_kw={"vmin": 0, "vmax": 1}, include_values=False)
        for row, column in np.ndindex(3, 3):
            colour = "black" if shares[row, column] > 0.5 else "white"
            text = f"{counts[row, column]}\n{shares[row, column]:.0%}"
            axes.text(column, row, text, ha="center", va="center", color=colour)


def reliability(frame: pd.DataFrame, before: np.ndarray, after: np.ndarray, title: str, path: Path) -> None:
    """How often the label is right, by the confidence it was given with, before and after calibration."""
    truth = evaluation.numbers(frame["label"])
    with _axes(path, title) as axes:
        axes.plot([1 / 3, 1], [1 / 3, 1], color="black", linewidth=1, linestyle="--", label="as sure as right")
        for name, probabilities, colour, marker in (("before", before, BEFORE, "s"), ("after", after, AFTER, "o")):
            confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
            bins = np.array_split(np.argsort(confidence), min(8, max(1, len(truth) // 20)))  # as many in each
            points = np.array([(confidence[rows].mean(), right[rows].mean()) for rows in bins])
            axes.plot(*points.T, color=colour, marker=marker, label=f"{name} calibration")
        axes.set(xlabel="confidence", ylabel="share that is right", xlim=(0.3, 1.02), ylim=(0, 1.02))
        axes.legend(fontsize=8)


def scatter(frame: pd.DataFrame, expected: np.ndarray, title: str, path: Path) -> None:
    """Expected against true score, with the cut points."""
    with _axes(path, title) as axes:
        for (label, colour), marker in zip(COLOURS.items(), "^os", strict=True):
            rows = (frame["label"] == label).to_numpy()
            axes.scatter(
                frame["score"][rows], expected[rows], s=12, alpha=0.6, color=colour, marker=marker, label=label
            )
        for cut in (task.SUPPORTIVE_BELOW, task.HATE_ABOVE):
            axes.axvline(cut, color="black", linewidth=0.8, linestyle="--")
            axes.axhline(cut, color="black", linewidth=0.8, linestyle="--")
        axes.set(xlabel="true hate_speech_score", ylabel="expected score")
        axes.legend(fontsize=8)


def coverage(frame: pd.DataFrame, probabilities: np.ndarray, title: str, path: Path) -> None:
    """Accuracy of the surest share, which the others could be left to people for."""
    right = probabilities.argmax(axis=1) == evaluation.numbers(frame["label"])
    right = right[np.argsort(-probabilities.max(axis=1), kind="stable")]
    kept = np.arange(1, len(right) + 1)
    with _axes(path, title, (4.8, 3.4)) as axes:
        start = min(len(right) - 1, 19)  # of fewer the accuracy is chance
        axes.plot(kept[start:] / len(right), (right.cumsum() / kept)[start:], color=AFTER)
        axes.set(xlabel="share that gets an answer, surest first", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axes.grid(alpha=0.3)


def error_rates(rows: list[dict], title: str, path: Path) -> None:
    """False positive and negative rates of Hate by group, with intervals."""
    with _axes(path, title, (6.4, 1.4 + 0.28 * len(rows))) as axes:
        styles = (("false_positive_rate", "#D55E00", "o", -0.12), ("false_negative_rate", "#0072B2", "s", 0.12))
        for name, colour, marker, offset in styles:
            found = [(k, row[name]) for k, row in enumerate(rows) if row[name]["value"] is not None]
            values = np.array([rate["value"] for _, rate in found])
            bars = np.array([(rate["value"] - rate["low"], rate["high"] - rate["value"]) for _, rate in found])
            places = [k + offset for k, _ in found]
            label = name.replace("_", " ")
            axes.errorbar(values, places, xerr=np.abs(bars.T), fmt=marker, color=colour, markersize=4, label=label)
        labels = [f"{row['by']}: {row['group']} ({row['n']})" for row in rows]
        axes.set_yticks(range(len(rows)), labels, fontsize=8)
        axes.set(xlabel="rate, with its 95 % interval", xlim=(0, 1))
        axes.invert_yaxis()
        axes.legend(fontsize=8)


def learning_curve(curve: pd.DataFrame, title: str, path: Path) -> None:
    """The training loss by the comments seen, each step and smoothed."""
    with _axes(path, title, (4.8, 3.4)) as axes:
        axes.plot(curve["rows"], curve["loss"], color=BEFORE, linewidth=0.6, label="a batch")
        smoothed = curve["loss"].ewm(halflife=max(1, len(curve) / 40)).mean()
        axes.plot(curve["rows"], smoothed, color=AFTER, label="smoothed")
        axes.set(xlabel="comments seen", ylabel="training loss (cross-entropy, nats)")
        axes.legend(fontsize=8)
