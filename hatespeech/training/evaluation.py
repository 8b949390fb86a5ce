"""How good a classifier is, with intervals, by group, beside baselines from the same data.

    python -m hatespeech.training.evaluation results/a results/b    # two runs on the comments they share

Every interval is of 95 %. Those of metrics are percentile bootstraps over comments, those of error rates Wilson's.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import trange

from hatespeech import UserError, calibration, task
from hatespeech.normal import normal_form

N_BOOTSTRAP = 1000
N_BINS = 10  # of confidence, for the expected calibration error
COVERAGE = 0.8
SHOWN = ("accuracy", "macro_f1", "accuracy_hate", "roc_auc_hate", "pearson_r", "expected_calibration_error")
COMPARED = ("accuracy", "macro_f1", "roc_auc_hate", "pearson_r")
# Fewer comments than this say nothing of a gap between groups.
MIN_GROUP = 20
HATE = task.LABELS.index("Hate")


def measure(frame: pd.DataFrame, probabilities: np.ndarray, expected: np.ndarray) -> dict:
    """Metrics over comments: {"n": n, metric: {"value", "low", "high"}}.

    frame: columns label and score. probabilities: (n, 3) in task.LABELS' order. expected: (n,) expected scores.
    Three-way metrics are of the comments whose class is known, correlations of those whose score is, and what is of
    Hate against the rest (accuracy_hate, roc_auc_hate ...) of all; null where there are none. Where a class is known of
    Hate alone, as in a set of flags, three-way metrics are null too.
    precision, recall and f1 are as scikit-learn defines them, the averages over the three classes; roc_auc_hate and
    average_precision_hate are of P(Hate) against the rest; expected_calibration_error is of the label's confidence in
    ten bins of equal width (Guo et al. 2017), its interval moved by the bootstrap's own estimate of its bias, without
    which it would lie above the value: resampled comments are always worse calibrated; brier_score is summed over the
    classes; accuracy_at_80_coverage is that of the surest four in five.
    """
    columns = _columns(frame, probabilities, expected)
    points = pd.DataFrame([_point(*(column[rows] for column in columns)) for rows in _resamples(len(frame))])
    low, high = points[1:].quantile(0.025), points[1:].quantile(0.975)
    bias = (points[1:].mean() - points.iloc[0])["expected_calibration_error"]
    for bound in (low, high):
        bound["expected_calibration_error"] = np.maximum(0.0, bound["expected_calibration_error"] - bias)
    return {"n": len(frame)} | {
        name: {"value": _rounded(points[name][0]), "low": _rounded(low[name]), "high": _rounded(high[name])}
        for name in points
    }


# (n, 3) probabilities and (n,) expected scores.
Predicted = tuple[np.ndarray, np.ndarray]


def compare(frame: pd.DataFrame, ours: Predicted, theirs: Predicted) -> dict:
    """Paired bootstrap: ours less theirs on the same comments, {metric: {"difference", "low", "high", "p"}}.

    p: two-sided, of no difference (twice the share of samples on the rarer side of 0).
    """
    points = [
        pd.DataFrame([_point(*(column[rows] for column in columns)) for rows in _resamples(len(frame))])[[*COMPARED]]
        for columns in (_columns(frame, *each) for each in (ours, theirs))
    ]
    differences, result = points[0] - points[1], {}
    for name in COMPARED:
        sampled = differences[name][1:].dropna()
        rarer = min((sampled <= 0).mean(), (sampled >= 0).mean()) if len(sampled) else np.nan
        result[name] = {
            "difference": _rounded(differences[name][0]),
            "low": _rounded(sampled.quantile(0.025)),
            "high": _rounded(sampled.quantile(0.975)),
            "p": _rounded(min(1.0, 2 * max(rarer, 1 / N_BOOTSTRAP))),
        }
    return result


def _columns(frame: pd.DataFrame, probabilities: np.ndarray, expected: np.ndarray) -> list[np.ndarray]:
    """What _point takes: (n,) truth, (n,) scores, (n, 3) probabilities, (n,) expected scores."""
    truth, scores = numbers(frame["label"]), frame["score"].to_numpy(dtype=float)
    return [truth, scores, np.asarray(probabilities), np.asarray(expected)]


def _resamples(n: int) -> Iterator[np.ndarray]:
    """Row numbers: all, then the bootstrap's, the same for every classifier, so that differences are paired."""
    rng = np.random.default_rng(0)
    yield np.arange(n)
    for _ in trange(N_BOOTSTRAP, desc="bootstrap", unit="sample", leave=False, delay=2):
        yield rng.integers(0, n, n)


def _point(truth, scores, probabilities, expected) -> dict[str, float]:
    return (
        _of_classes(truth, probabilities)
        | _of_hate(truth == HATE, probabilities)
        | _of_scores(scores, np.asarray(expected))
    )


def _of_classes(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Three-way metrics of the comments whose class is known; of none where that is known of Hate alone."""
    known = truth >= 0
    if not known.all() and (truth[known] == HATE).all():  # of flags alone; accuracy would be the recall of Hate
        known[:] = False
    truth, probabilities, n = truth[known], probabilities[known], known.sum()
    names = ("precision", "recall", "f1")
    if not n:
        of_all = ("accuracy", "macro_f1", "weighted_f1", "expected_calibration_error", "brier_score")
        of_all += ("accuracy_at_80_coverage",)
        return dict.fromkeys((*of_all, *(f"{name}_{label}" for name in names for label in task.LABELS)), np.nan)
    decided, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    right = decided == truth
    confusion = np.bincount(3 * truth + decided, minlength=9).reshape(3, 3)
    hits, support, given = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    precision, recall = hits / np.maximum(given, 1), hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(support + given, 1)
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    gaps = np.bincount(bins, right, N_BINS) - np.bincount(bins, confidence, N_BINS)
    surest = np.argsort(-confidence, kind="stable")[: max(1, round(COVERAGE * n))]
    point = {
        "accuracy": right.mean(),
        "macro_f1": f1.mean(),
        "weighted_f1": f1 @ support / n,
        "expected_calibration_error": np.abs(gaps).sum() / n,
        "brier_score": ((probabilities - np.eye(3)[truth]) ** 2).sum(axis=1).mean(),
        "accuracy_at_80_coverage": right[surest].mean(),
    }
    for name, values in zip(names, (precision, recall, f1), strict=True):
        point |= {f"{name}_{label}": value for label, value in zip(task.LABELS, values, strict=True)}
    return point


def _of_hate(hate: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Metrics of Hate against the rest."""
    from scipy.stats import rankdata
    from sklearn.metrics import average_precision_score

    n, p_hate = len(hate), probabilities[:, HATE]
    both = 0 < hate.sum() < n
    ranks = rankdata(p_hate)  # the area under the ROC curve is the Mann-Whitney statistic
    area = (ranks[hate].sum() - hate.sum() * (hate.sum() + 1) / 2) / max(1, hate.sum() * (n - hate.sum()))
    return {
        "accuracy_hate": ((probabilities.argmax(axis=1) == HATE) == hate).mean(),
        "roc_auc_hate": area if both else np.nan,
        "average_precision_hate": average_precision_score(hate, p_hate) if both else np.nan,
    }


def _of_scores(scores: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Correlations of the expected with the true scores, where these are known."""
    from scipy.stats import rankdata

    known = np.isfinite(scores)
    scores, expected = scores[known], expected[known]
    varies = len(scores) > 1 and min(scores.std(), expected.std()) > 1e-9
    return {
        "pearson_r": np.corrcoef(scores, expected)[0, 1] if varies else np.nan,
        "spearman_r": np.corrcoef(rankdata(scores), rankdata(expected))[0, 1] if varies else np.nan,
    }


def groups(frame: pd.DataFrame, probabilities: np.ndarray) -> list[dict]:
    """How often each group's comments are wrongly called Hate, and its Hate is missed.

    By length in characters, and by target group where the annotations tell them, of MIN_GROUP comments or more. Returns
    rows
    {"by", "group", "n", "false_positive_rate", "false_negative_rate"}, a rate {"value", "low", "high", "n"}.
    """
    hate, called = frame["label"] == "Hate", probabilities.argmax(axis=1) == HATE
    lengths = pd.cut(frame["text"].str.len(), [0, 60, 120, 240, np.inf], labels=["to 60", "to 120", "to 240", "more"])
    members = [("length, characters", str(name), lengths == name) for name in lengths.cat.categories]
    for name in sorted({name for names in frame["targets"] for name in names}):
        members.append(("target", name, frame["targets"].map(lambda names, name=name: name in names)))
    rows = []
    for by, name, member in members:
        row = {"by": by, "group": name, "n": int(member.sum())}
        row["false_positive_rate"] = rate(called[member & ~hate])
        row["false_negative_rate"] = rate(~called[member & hate])
        rows.append(row)
    return [row for row in rows if row["n"] >= (MIN_GROUP if row["by"] == "target" else 1)]


def rate(flags: np.ndarray) -> dict:
    """The share of true flags, with Wilson's interval and n."""
    from scipy.stats import binomtest

    if not len(flags):
        return {"value": None, "low": None, "high": None, "n": 0}
    interval = binomtest(int(flags.sum()), len(flags)).proportion_ci(method="wilson")
    found = {"value": flags.mean(), "low": interval.low, "high": interval.high}
    return {name: _rounded(value) for name, value in found.items()} | {"n": len(flags)}


def gaps(rows: list[dict]) -> list[str]:
    """Sentences: between which groups an error rate differs most, where the intervals do not overlap."""
    found = []
    for by in dict.fromkeys(row["by"] for row in rows):
        for rate in ("false_positive_rate", "false_negative_rate"):
            sure = [row for row in rows if row["by"] == by and row[rate]["n"] >= MIN_GROUP]
            if len(sure) < 2:
                continue
            low, high = (pick(sure, key=lambda row: row[rate]["value"]) for pick in (min, max))
            if low[rate]["high"] < high[rate]["low"]:
                found.append(
                    f"{rate.replace('_', ' ')} by {by}: {high['group']} {high[rate]['value']:.2f}, "
                    f"{low['group']} {low[rate]['value']:.2f}"
                )
    return found


def baselines(
    train: pd.DataFrame, test: pd.DataFrame, validation: pd.DataFrame, class_scores: Sequence[float]
) -> dict[str, Predicted]:
    """What needs no LLM, fitted on the training comments whose class is known, for the test comments.

    tfidf_calibrated went through the same calibration on the same validation comments as the model, or the comparison
    would be unfair. class_scores: (3,) the mean training score of each class.
    """
    known = train[train["label"].isin(task.LABELS)]
    majority = np.zeros((len(test), 3))
    majority[:, np.bincount(numbers(known["label"]), minlength=3).argmax()] = 1
    tfidf, of_validation = _tfidf(known, test, validation)
    fitted = calibration.fit(of_validation, validation["label"], validation["score"])
    calibrated = fitted.apply(tfidf)
    plain = {"majority_class": majority, "tfidf_logistic_regression": tfidf}
    return {name: (each, each @ np.asarray(class_scores)) for name, each in plain.items()} | {
        "tfidf_calibrated": (calibrated, fitted.expected(calibrated))
    }


def annotators(frame: pd.DataFrame, probabilities: np.ndarray) -> dict | None:
    """How often one annotator's own answer to `hatespeech` tells Hate from the rest as the true class does, and how
    often the model does on the same rows; a row per answer, without those of the unsure. None where there are none.

    The true class rests on the answers of all its annotators, so an annotator's own is part of what it is held against.
    """
    answers = [(row, answer) for row, each in enumerate(frame["answers"]) for answer in each if answer in (0, 2)]
    if not answers:
        return None
    rows, said = (np.array(column) for column in zip(*answers, strict=True))
    hate = (frame["label"] == "Hate").to_numpy()[rows]
    called = probabilities.argmax(axis=1)[rows] == HATE
    unsure = sum(answer == 1 for each in frame["answers"] for answer in each)
    return {"annotator": rate((said == 2) == hate), "model": rate(called == hate), "unsure_answers": unsure}


def _tfidf(train: pd.DataFrame, *others: pd.DataFrame) -> list[np.ndarray]:
    """(n, 3) probabilities of each of the others' comments; a class that training lacks has none."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=4.0, max_iter=1000)
    )
    truth = numbers(train["label"])
    if len(set(truth)) < 2:  # of a set that knows only Hate and Not hate
        return [np.tile(np.bincount(truth, minlength=3) / len(truth), (len(other), 1)) for other in others]
    model.fit(train["text"].map(normal_form), truth)
    found = []
    for other in others:
        found.append(np.zeros((len(other), 3)))
        found[-1][:, model.classes_] = model.predict_proba(other["text"].map(normal_form))
    return found


def report(frame: pd.DataFrame, probabilities: np.ndarray) -> str:
    """scikit-learn's classification report of the comments whose class is known."""
    from sklearn.metrics import classification_report

    truth = numbers(frame["label"])
    return classification_report(
        truth[truth >= 0],
        probabilities.argmax(axis=1)[truth >= 0],
        labels=range(3),
        target_names=task.LABELS,
        zero_division=0,
    )


def table(results: dict[str, dict]) -> str:
    """Markdown: one line a classifier, value and interval. results: measure's, by name."""
    lines = ["| classifier | " + " | ".join(SHOWN) + " |", "| --- |" + " --- |" * len(SHOWN)]
    for name, result in results.items():
        cells = []
        for metric in SHOWN:
            value, low, high = (result[metric][key] for key in ("value", "low", "high"))
            cells.append("-" if value is None else f"{value:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison_table(compared: dict) -> str:
    """Markdown of compare's result."""
    lines = ["| metric | difference | 95 % interval | p |", "| --- | ---: | --- | ---: |"]
    for name, found in compared.items():
        if found["difference"] is not None:
            interval = f"{found['low']:+.3f} to {found['high']:+.3f}"
            lines.append(f"| {name} | {found['difference']:+.3f} | {interval} | {found['p']:.3f} |")
    return "\n".join(lines)


def groups_table(rows: list[dict]) -> str:
    """Markdown of groups' rows."""

    def cell(rate: dict) -> str:
        if rate["value"] is None:
            return "-"
        return f"{rate['value']:.2f} ({rate['low']:.2f} to {rate['high']:.2f}), n = {rate['n']}"

    lines = [
        "| by | group | comments | false positive rate | false negative rate |",
        "| --- | --- | ---: | --- | --- |",
    ]
    for row in rows:
        rates = (cell(row[name]) for name in ("false_positive_rate", "false_negative_rate"))
        lines.append(f"| {row['by']} | {row['group']} | {row['n']} | " + " | ".join(rates) + " |")
    return "\n".join(lines)


PREDICTIONS = "predictions.csv"


def save_predictions(path: Path, frame: pd.DataFrame, split: str, by_classifier: dict[str, Predicted]) -> None:
    """Add what classifiers predict, comment by comment and without texts, to a run's predictions.csv."""
    stored = pd.read_csv(path, dtype={"comment_id": str}) if path.exists() else None
    added = []
    for name, (probabilities, expected) in by_classifier.items():
        rows = frame[["comment_id", "score", "label"]].assign(split=split, classifier=name, expected_score=expected)
        added.append(rows.assign(**{f"p_{label.lower()}": probabilities[:, k] for k, label in enumerate(task.LABELS)}))
    if stored is not None:
        again = (stored["split"] == split) & stored["classifier"].isin(by_classifier)
        added = [stored[~again], *added]
    pd.concat(added).to_csv(path, index=False, float_format="%.6g")


def load_predictions(run: Path, split: str = "test", missing_ok: bool = False) -> dict[str, pd.DataFrame]:
    """A split's predictions by classifier: frames with comment_id, score, label, expected_score, p_hate, p_neutral,
    p_supportive."""
    path = run / PREDICTIONS
    if not path.exists():
        if missing_ok:
            return {}
        raise UserError(f"{run} holds no {PREDICTIONS}: python -m train --evaluate-only --output {run}")
    stored = pd.read_csv(path, dtype={"comment_id": str})
    stored = stored[stored["split"] == split]
    return {name: part.reset_index(drop=True) for name, part in stored.groupby("classifier", sort=False)}


def predicted_of(frame: pd.DataFrame) -> Predicted:
    """What a frame of load_predictions holds."""
    return frame[[f"p_{label.lower()}" for label in task.LABELS]].to_numpy(), frame["expected_score"].to_numpy()


def compare_runs(first: Path, second: Path) -> str:
    """Markdown: the second run less the first, on the test comments that both have."""
    predictions = [load_predictions(run) for run in (first, second)]
    engine = next((name for name in ("as_served", "torch") if all(name in each for each in predictions)), None)
    if engine is None:
        raise UserError(f"{first} and {second} were not measured by the same engine: python -m train --evaluate-only")
    ours, theirs = (each[engine].set_index("comment_id") for each in predictions)
    shared = ours.index.intersection(theirs.index)
    if not len(shared):
        raise UserError(f"{first} and {second} share no test comment")
    ours, theirs = ours.loc[shared], theirs.loc[shared]
    compared = compare(ours, predicted_of(theirs), predicted_of(ours))
    return f"{second} less {first}, {engine}, {len(shared)} test comments:\n\n{comparison_table(compared)}"


def numbers(labels: Sequence[str]) -> np.ndarray:
    """The labels' numbers in task.LABELS; -1 for task.NOT_HATE."""
    known = {label: number for number, label in enumerate(task.LABELS)}
    return np.array([known.get(label, -1) for label in labels], dtype=int)


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hatespeech.training.evaluation", description=compare_runs.__doc__)
    parser.add_argument("runs", type=Path, nargs=2, help="two runs' folders, e.g. results/a results/b")
    try:
        print(compare_runs(*parser.parse_args().runs))
    except UserError as error:
        sys.exit(f"evaluation: {error}")


if __name__ == "__main__":
    main()
