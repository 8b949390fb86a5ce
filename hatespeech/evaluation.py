"""How good a classifier is, with intervals, beside baselines from the same data."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from hatespeech import task

N_BOOTSTRAP = 1000


def measure(frame: pd.DataFrame, probabilities: np.ndarray, class_scores: Sequence[float]) -> dict:
    """Metrics over comments, each with a 95 % percentile-bootstrap interval over comments.

    frame: columns label and score. probabilities: (n, 3) in task.LABELS' order.
    class_scores: the mean score of each class in the training comments; the expected score is their mean, weighted by
    the probabilities. Returns {"n": n, metric: {"value", "low", "high"}}; f1 as scikit-learn defines it, macro_f1 over
    the three classes.
    """
    truth = _numbers(frame["label"])
    decided = probabilities.argmax(axis=1)
    expected = probabilities @ np.asarray(class_scores)
    scores = frame["score"].to_numpy()
    rng = np.random.default_rng(0)
    samples = [np.arange(len(truth)), *rng.integers(0, len(truth), (N_BOOTSTRAP, len(truth)))]
    values = pd.DataFrame([_point(truth[i], decided[i], scores[i], expected[i]) for i in samples])
    low, high = values[1:].quantile(0.025), values[1:].quantile(0.975)
    return {"n": len(truth)} | {
        name: {"value": _rounded(values[name][0]), "low": _rounded(low[name]), "high": _rounded(high[name])}
        for name in values
    }


def _point(truth, decided, scores, expected) -> dict[str, float]:
    confusion = np.bincount(3 * truth + decided, minlength=9).reshape(3, 3)
    hits, support = confusion.diagonal(), confusion.sum(axis=1)
    f1 = 2 * hits / np.maximum(support + confusion.sum(axis=0), 1)
    varies = min(scores.std(), expected.std()) > 1e-9
    return {
        "accuracy": hits.sum() / len(truth),
        "macro_f1": f1.mean(),
        "weighted_f1": f1 @ support / len(truth),
        "pearson_r": np.corrcoef(scores, expected)[0, 1] if varies else np.nan,
        **{f"f1_{label}": value for label, value in zip(task.LABELS, f1, strict=True)},
    }


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def _numbers(labels: Sequence[str]) -> np.ndarray:
    return np.array([task.LABELS.index(label) for label in labels])


def report(frame: pd.DataFrame, probabilities: np.ndarray) -> str:
    """scikit-learn's classification report."""
    from sklearn.metrics import classification_report

    return classification_report(
        _numbers(frame["label"]),
        probabilities.argmax(axis=1),
        labels=range(3),
        target_names=task.LABELS,
        zero_division=0,
    )


def plot_confusion(frame: pd.DataFrame, probabilities: np.ndarray, title: str, path: Path) -> None:
    """Counts, shaded by the share of each true class."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    counts = confusion_matrix(_numbers(frame["label"]), probabilities.argmax(axis=1), labels=range(3))
    figure, axes = plt.subplots(figsize=(4.8, 4.2), layout="constrained")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    display = ConfusionMatrixDisplay(shares, display_labels=task.LABELS)
    display.plot(ax=axes, cmap="cividis", colorbar=False, im_kw={"vmin": 0, "vmax": 1}, include_values=False)
    for row, column in np.ndindex(3, 3):
        text = f"{counts[row, column]}\n{shares[row, column]:.0%}"
        axes.text(column, row, text, ha="center", va="center", color="black" if shares[row, column] > 0.5 else "white")
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def baselines(train: pd.DataFrame, test: pd.DataFrame, class_scores: Sequence[float]) -> dict[str, dict]:
    """What needs no LLM, fitted on the same training comments: the majority class, TF-IDF + logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    tfidf = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=4.0, max_iter=1000)
    )
    tfidf.fit(train["text"], _numbers(train["label"]))
    majority = np.zeros((len(test), 3))
    majority[:, np.bincount(_numbers(train["label"]), minlength=3).argmax()] = 1
    return {
        "majority_class": measure(test, majority, class_scores),
        "tfidf_logistic_regression": measure(test, tfidf.predict_proba(test["text"]), class_scores),
    }


def table(results: dict[str, dict]) -> str:
    """Markdown: one line a classifier, value and interval."""
    metrics = ("accuracy", "macro_f1", "weighted_f1", "pearson_r")
    lines = ["| classifier | " + " | ".join(metrics) + " |", "| --- |" + " --- |" * len(metrics)]
    for name, result in results.items():
        cells = []
        for metric in metrics:
            value, low, high = (result[metric][key] for key in ("value", "low", "high"))
            cells.append("-" if value is None else f"{value:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
