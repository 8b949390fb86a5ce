"""Temperature and class biases: fitted in training, applied in serving, where numpy is all it takes.

A model learns the class shares of its training comments, and its probabilities are surer than it is right. Both are
mended after training with three numbers (temperature scaling: Guo et al. 2017; with biases, "bias-corrected temperature
scaling": Alexandari et al. 2020), which never change the model.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from hatespeech import task


@dataclass(frozen=True)
class Calibration:
    """softmax(log(probabilities) / temperature + biases). fitted_on: which comments, for the reader."""

    temperature: float = 1.0
    biases: tuple[float, float, float] = (0.0, 0.0, 0.0)
    fitted_on: dict = field(default_factory=dict)

    def apply(self, probabilities: np.ndarray | Sequence[float]) -> np.ndarray:
        """Calibrated probabilities, of the shape given: (3,) or (n, 3), in task.LABELS' order."""
        return _softmax(_log(probabilities) / self.temperature + np.asarray(self.biases))

    @property
    def version(self) -> str:
        """Changes with the numbers: an answer that carries it says which calibration it went through."""
        return hashlib.sha256(json.dumps([self.temperature, *self.biases]).encode()).hexdigest()[:12]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        stored = json.loads(path.read_text())
        return cls(stored["temperature"], tuple(stored["biases"]), stored["fitted_on"])


def fit(probabilities: np.ndarray, labels: Sequence[str], **fitted_on) -> Calibration:
    """The calibration under which the labels are likeliest.

    probabilities: (n, 3), of comments the model was not trained on. A weak pull towards no change (worth one comment)
    keeps it finite where a class is missing or the classes are perfectly told apart.
    """
    from scipy.optimize import minimize

    log, truth = _log(probabilities), np.array([task.LABELS.index(label) for label in labels])

    def loss(parameters: np.ndarray) -> float:
        slope, biases = parameters[0], parameters[1:]
        likelihood = _softmax(slope * log + biases)[np.arange(len(truth)), truth]
        return -np.log(likelihood).sum() + 0.5 * ((slope - 1) ** 2 + (biases**2).sum())

    best = minimize(loss, [1.0, 0.0, 0.0, 0.0], bounds=[(0.05, 20.0)] + [(-10.0, 10.0)] * 3)
    slope, *biases = best.x
    biases = np.array(biases) - np.mean(biases)  # only differences count
    return Calibration(
        round(float(1 / slope), 4), tuple(np.round(biases, 4).tolist()), fitted_on | {"comments": len(truth)}
    )


def cross_fit(probabilities: np.ndarray, labels: Sequence[str], folds: int = 10, seed: int = 0) -> np.ndarray:
    """Calibrated probabilities, each from a calibration fitted on the other folds: what may be reported as measured
    where calibration and evaluation share their comments."""
    labels, calibrated = np.asarray(labels), np.empty_like(probabilities, dtype=float)
    for fold in np.array_split(np.random.default_rng(seed).permutation(len(labels)), min(folds, len(labels))):
        others = np.setdiff1d(np.arange(len(labels)), fold)
        calibrated[fold] = fit(probabilities[others], labels[others]).apply(probabilities[fold])
    return calibrated


def _log(probabilities) -> np.ndarray:
    return np.log(np.maximum(np.asarray(probabilities, dtype=float), 1e-12))


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
