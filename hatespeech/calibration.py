"""Temperature, class biases, score mapping and threshold: fitted in training, applied in serving by numpy alone.

A model learns the class shares of its training comments, and its probabilities are surer than it is right. Both are
mended after training with three numbers (temperature scaling: Guo et al. 2017; with biases, "bias-corrected temperature
scaling": Alexandari et al. 2020), which never change the model. The expected score is linear in the probabilities.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from hatespeech import UserError, task


@dataclass(frozen=True)
class Calibration:
    """softmax(log(probabilities) / temperature + biases), and what follows from them.

    class_scores: an answer's expected score is their mean, weighted by its probabilities. Not the classes' mean scores,
    which would draw every expectation to the middle, but those that come nearest to the true scores (least squares,
    each within its class).
    abstain_below: the confidence (the highest probability) under which a person should look.
    flag_above: the least P(Hate) from which on FLAG_PRECISION of the comments it was fitted on were Hate; null where
    they never were. thresholds: for some P(Hate), how many of those comments had as much, what share of these was Hate
    (precision), and what share of all Hate that was (recall).
    model_sha256: of the GGUF it was fitted for; for another model it means nothing.
    fitted_on: which comments, for the reader.
    """

    temperature: float
    biases: tuple[float, float, float]
    class_scores: tuple[float, float, float]
    abstain_below: float
    flag_above: float | None = None
    thresholds: tuple[dict, ...] = ()
    model_sha256: str | None = None
    fitted_on: dict = field(default_factory=dict)

    def apply(self, probabilities: np.ndarray | Sequence[float]) -> np.ndarray:
        """Calibrated probabilities, of the shape given: (3,) or (n, 3), in task.LABELS' order."""
        return softmax(_log(probabilities) / self.temperature + np.asarray(self.biases))

    def expected(self, probabilities: np.ndarray) -> np.ndarray:
        """(n,) expected scores of (n, 3) calibrated probabilities."""
        return np.asarray(probabilities) @ np.asarray(self.class_scores)

    @property
    def version(self) -> str:
        """Changes with the numbers: an answer that carries it says which calibration it went through."""
        numbers = [self.temperature, *self.biases, *self.class_scores, self.abstain_below]
        return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:12]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Raises UserError where the file is damaged."""
        try:
            stored = json.loads(path.read_text())
            tuples = {name: tuple(stored[name]) for name in ("biases", "class_scores", "thresholds") if name in stored}
            return cls(**stored | tuples)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no calibration of this version: {error}") from error

    @classmethod
    def of_run(cls, run: Path) -> "Calibration | None":
        path = run / "calibration.json"
        return cls.load(path) if path.exists() else None

    @staticmethod
    def for_weights(stored: "Calibration | None", weights_sha256: str) -> tuple["Calibration | None", str]:
        """A run's calibration, if it was fitted for the weights that answer; else None and why."""
        if stored is None:
            return None, "the run's folder holds no calibration.json"
        if weights_sha256 != stored.model_sha256:
            weights = f"{str(stored.model_sha256)[:12]}, and {weights_sha256[:12]} answer"
            return None, f"calibration.json was fitted for the weights {weights}"
        return stored, ""


# The share of the calibration comments that gets an answer without abstention: the surest four in five.
COVERAGE = 0.8
# What share of the flagged comments is to be Hate, and of how many at least that is to be known.
FLAG_PRECISION, MIN_FLAGGED = 0.8, 20


def fit(probabilities: np.ndarray, labels: Sequence[str], scores: Sequence[float], **fitted_on) -> Calibration:
    """The calibration under which the labels are likeliest.

    probabilities: (n, 3), of comments the model was not trained on; labels: (n,) of task.LABELS or task.NOT_HATE;
    scores: (n,) their true scores, NaN where they are not known.
    """
    scores, events = np.asarray(scores, dtype=float), _events(labels)
    temperature, biases = _likeliest(probabilities, events)
    calibrated = softmax(_log(probabilities) / temperature + biases)
    honest, _ = cross_fit(probabilities, labels, scores)
    hate = np.asarray(labels) == "Hate"
    return Calibration(
        temperature=round(temperature, 4),
        biases=tuple(np.round(biases, 4).tolist()),
        class_scores=tuple(np.round(_nearest(calibrated, scores), 4).tolist()),
        abstain_below=round(float(np.quantile(calibrated.max(axis=1), 1 - COVERAGE)), 4),
        flag_above=flag_above(honest[:, 0], hate),
        thresholds=tuple(precision_and_recall(honest[:, 0], hate)),
        fitted_on=fitted_on | {"comments": len(hate)},
    )


def cross_fit(
    probabilities: np.ndarray, labels: Sequence[str], scores: Sequence[float], folds: int = 10, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated probabilities (n, 3) and expected scores (n,), each by numbers fitted on the other folds: what may be
    reported as measured where calibration and evaluation share their comments."""
    scores, events = np.asarray(scores, dtype=float), _events(labels)
    calibrated, expected = np.empty((len(scores), 3)), np.empty(len(scores))
    for fold in np.array_split(np.random.default_rng(seed).permutation(len(scores)), min(folds, len(scores))):
        others = np.setdiff1d(np.arange(len(scores)), fold)
        temperature, biases = _likeliest(probabilities[others], events[others])
        every = softmax(_log(probabilities) / temperature + biases)
        calibrated[fold] = every[fold]
        expected[fold] = every[fold] @ _nearest(every[others], scores[others])
    return calibrated, expected


def precision_and_recall(p_hate: np.ndarray, hate: np.ndarray) -> list[dict]:
    """Rows {"threshold", "n", "precision", "recall"} for P(Hate) of at least 0.05, 0.1 ... 0.95.

    p_hate: (n,) probabilities. hate: (n,) whether each is Hate.
    """
    rows = []
    for threshold in np.arange(1, 20) / 20:
        flagged = p_hate >= threshold
        if flagged.any() and hate.any():
            found = {"threshold": round(float(threshold), 2), "n": int(flagged.sum())}
            found["precision"] = round(float(hate[flagged].mean()), 4)
            rows.append(found | {"recall": round(float(hate[flagged].sum() / hate.sum()), 4)})
    return rows


def flag_above(p_hate: np.ndarray, hate: np.ndarray) -> float | None:
    """The least P(Hate) from which on FLAG_PRECISION of the comments are Hate; None where they never are."""
    order = np.argsort(-p_hate, kind="stable")
    precision = np.cumsum(hate[order]) / np.arange(1, len(hate) + 1)
    reached = np.flatnonzero(precision[MIN_FLAGGED - 1 :] >= FLAG_PRECISION)
    return round(float(p_hate[order[reached[-1] + MIN_FLAGGED - 1]]), 4) if len(reached) else None


def _nearest(calibrated: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(3,) the class_scores of least squares, each within its class, so that a sure answer's score is of its label."""
    from scipy.optimize import lsq_linear

    known = np.isfinite(scores)
    calibrated, scores = calibrated[known], scores[known]
    low = [task.HATE_ABOVE, task.SUPPORTIVE_BELOW, -np.inf]
    high = [np.inf, task.HATE_ABOVE, task.SUPPORTIVE_BELOW]
    # A weak pull, worth ten comments, towards the classes' means keeps them finite where a class is missing.
    truth, pull = np.array([task.label_of(score) for score in scores]), np.sqrt(10) * np.eye(3)
    typical = zip(task.LABELS, task.TYPICAL_SCORES, strict=True)
    means = np.array([scores[truth == label].mean() if (truth == label).any() else mean for label, mean in typical])
    return lsq_linear(np.vstack([calibrated, pull]), np.concatenate([scores, pull @ means]), (low, high)).x


def _likeliest(probabilities: np.ndarray, events: np.ndarray) -> tuple[float, np.ndarray]:
    """Temperature and biases. A weak pull towards no change, worth one comment, keeps them finite where a class is
    missing or the classes are perfectly told apart."""
    from scipy.optimize import minimize

    log = _log(probabilities)

    def loss(parameters: np.ndarray) -> float:
        slope, biases = parameters[0], parameters[1:]
        likelihood = (softmax(slope * log + biases) * events).sum(axis=1)
        return -np.log(likelihood).sum() + 0.5 * ((slope - 1) ** 2 + (biases**2).sum())

    slope, *biases = minimize(loss, [1.0, 0.0, 0.0, 0.0], bounds=[(0.05, 20.0)] + [(-10.0, 10.0)] * 3).x
    return float(1 / slope), np.array(biases) - np.mean(biases)  # only the biases' differences count


def _events(labels: Sequence[str]) -> np.ndarray:
    """(n, 3) which classes each label allows: one, or with task.NOT_HATE two, whose probabilities add up."""
    labels = np.asarray(labels)[:, None]
    known = labels == np.asarray(task.LABELS)
    return known | ((labels == task.NOT_HATE) & (np.asarray(task.LABELS) != "Hate"))


def _log(probabilities) -> np.ndarray:
    return np.log(np.maximum(np.asarray(probabilities, dtype=float), 1e-12))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
