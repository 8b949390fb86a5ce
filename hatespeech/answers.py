"""What follows from a text's probabilities: for an answer of the service, a row of a file and a row of bulk alike."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hatespeech import task
from hatespeech.calibration import Calibration

# What is added to a file's rows: names and Python types. request_id is empty where no service was asked.
COLUMNS = {
    "label": str,
    **{f"p_{label.lower()}": float for label in task.LABELS},
    "score": float,
    "confidence": float,
    "abstain": bool,
    "flagged": bool,
    "request_id": str,
    "error": str,
}


@dataclass(frozen=True)
class Verdict:
    """probabilities: of task.LABELS, calibrated where a calibration applies. confidence: the highest of them.

    score: expected, on MHS's scale. abstain: the confidence is below the calibration's threshold, so a person should
    look; None without a calibration. flagged: P(Hate) reaches the threshold in force; None where there is none.
    """

    label: str
    probabilities: tuple[float, ...]
    score: float
    confidence: float
    abstain: bool | None
    flagged: bool | None

    @property
    def by_label(self) -> dict[str, float]:
        """The probabilities by their labels."""
        return dict(zip(task.LABELS, self.probabilities, strict=True))


def verdicts(
    probabilities: np.ndarray | Sequence[Sequence[float]],
    calibration: Calibration | None,
    class_scores: Sequence[float],
    flag_above: float | None = None,
) -> list[Verdict]:
    """Verdicts on (n, 3) probabilities as the model gave them.

    class_scores: what the expected score is made of where there is no calibration. flag_above: the threshold where it
    is not to be the calibration's own.
    """
    probabilities = np.asarray(probabilities, dtype=float)
    flag_above = threshold(calibration, flag_above)
    if calibration:
        probabilities, class_scores = calibration.apply(probabilities), calibration.class_scores
    scores = probabilities @ np.asarray(class_scores)
    return [
        Verdict(
            label=task.decide(row),
            probabilities=tuple(row),
            score=score,
            confidence=max(row),
            abstain=max(row) < calibration.abstain_below if calibration else None,
            flagged=None if flag_above is None else row[task.LABELS.index("Hate")] >= flag_above,
        )
        for row, score in zip(probabilities.tolist(), scores.tolist(), strict=True)
    ]


def threshold(calibration: Calibration | None, flag_above: float | None) -> float | None:
    """The P(Hate) from which on a text is flagged: the one that was set, else the calibration's own, if any."""
    if flag_above is not None:
        return flag_above
    return calibration.flag_above if calibration else None


def as_columns(verdict: Verdict, request_id: str = "") -> dict:
    """A row's COLUMNS."""
    return {
        "label": verdict.label,
        **{f"p_{label.lower()}": round(p, 6) for label, p in verdict.by_label.items()},
        "score": round(verdict.score, 4),
        "confidence": round(verdict.confidence, 6),
        "abstain": verdict.abstain,
        "flagged": verdict.flagged,
        "request_id": request_id,
        "error": "",
    }


def error_columns(error: str) -> dict:
    """A row's COLUMNS where it could not be classified."""
    return dict.fromkeys(COLUMNS) | {"error": error}
