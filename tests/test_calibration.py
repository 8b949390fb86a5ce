import numpy as np
import pytest

from hatespeech import task
from hatespeech.calibration import Calibration, cross_fit, fit


def draw(n: int, seed: int, temperature: float = 1.0, biases=(0.0, 0.0, 0.0)):
    """Labels drawn from known probabilities, and those probabilities distorted as an overconfident model's are."""
    rng = np.random.default_rng(seed)
    true = rng.dirichlet((0.7, 0.7, 0.7), size=n)
    labels = [task.LABELS[rng.choice(3, p=row)] for row in true]
    logits = (np.log(true) - np.asarray(biases)) * temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True), labels, true


def test_fit_finds_the_distortion():
    distorted, labels, true = draw(20_000, 0, temperature=2.0, biases=(0.8, 0.0, -0.8))
    calibration = fit(distorted, labels)
    assert calibration.temperature == pytest.approx(2.0, abs=0.1)
    assert calibration.biases == pytest.approx((0.8, 0.0, -0.8), abs=0.1)
    assert np.abs(calibration.apply(distorted) - true).max() < 0.05


def test_none_needed_changes_nothing():
    probabilities = np.array([0.2, 0.3, 0.5])
    assert Calibration().apply(probabilities) == pytest.approx(probabilities)


def test_cross_fitting_uses_no_comments_own_label():
    probabilities, labels, _ = draw(60, 1)
    calibrated = cross_fit(probabilities, labels)
    for i in (0, 17, 59):
        flipped = list(labels)
        flipped[i] = task.LABELS[(task.LABELS.index(labels[i]) + 1) % 3]
        changed = cross_fit(probabilities, flipped)
        assert changed[i].tolist() == calibrated[i].tolist()
        assert not np.array_equal(changed, calibrated)  # while others' calibrations did see it


def test_a_missing_class_or_a_perfect_model_stays_finite():
    probabilities = np.array([[0.98, 0.01, 0.01], [0.01, 0.98, 0.01]] * 10)
    calibration = fit(probabilities, ["Hate", "Neutral"] * 10)
    assert np.isfinite([calibration.temperature, *calibration.biases]).all()


def test_saved_and_loaded_it_is_the_same(tmp_path):
    calibration = Calibration(1.5, (0.1, 0.2, -0.3), {"split": "validation", "comments": 9})
    calibration.save(tmp_path / "calibration.json")
    loaded = Calibration.load(tmp_path / "calibration.json")
    assert loaded == calibration
    assert loaded.version == calibration.version != Calibration().version
