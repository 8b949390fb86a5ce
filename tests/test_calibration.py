import numpy as np
import pytest

from hatespeech.calibration import COVERAGE, Calibration, cross_fit, fit

SCORES = (2.0, -0.5, -3.0)  # one for each class


def draw(n: int, seed: int, temperature: float = 1.0, biases=(0.0, 0.0, 0.0)):
    """Scores drawn from known probabilities, and those probabilities distorted as an overconfident model's are."""
    rng = np.random.default_rng(seed)
    true = rng.dirichlet((0.7, 0.7, 0.7), size=n)
    scores = np.array([SCORES[rng.choice(3, p=row)] for row in true])
    logits = (np.log(true) - np.asarray(biases)) * temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True), scores, true


def test_fit_finds_the_distortion():
    distorted, scores, true = draw(20_000, 0, temperature=2.0, biases=(0.8, 0.0, -0.8))
    calibration = fit(distorted, scores)
    assert calibration.temperature == pytest.approx(2.0, abs=0.1)
    assert calibration.biases == pytest.approx((0.8, 0.0, -0.8), abs=0.1)
    assert np.abs(calibration.apply(distorted) - true).max() < 0.05
    assert calibration.class_scores == pytest.approx(SCORES, abs=0.05)  # each score is its class's, exactly
    confident = calibration.apply(distorted).max(axis=1) >= calibration.abstain_below
    assert confident.mean() == pytest.approx(COVERAGE, abs=0.01)


def test_cross_fitting_uses_no_comments_own_label():
    probabilities, scores, _ = draw(60, 1)
    calibrated, expected = cross_fit(probabilities, scores)
    for i in (0, 17, 59):
        flipped = scores.copy()
        flipped[i] = SCORES[SCORES.index(scores[i]) - 1]
        changed, others = cross_fit(probabilities, flipped)
        assert changed[i].tolist() == calibrated[i].tolist()
        assert others[i] == expected[i]
        assert not np.array_equal(others, expected)
        assert not np.array_equal(changed, calibrated)  # while others' calibrations did see it


def test_expected_scores_come_nearer_than_those_of_the_class_means():
    """Where a class holds scores far apart, and the probabilities tell them apart, by least squares."""
    rng = np.random.default_rng(2)
    scores = rng.uniform(-4, 3, 3000)
    logits = np.stack([scores, -np.abs(scores + 0.25), -scores - 0.5], axis=1) / 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    calibration = fit(probabilities, scores)
    truth = np.select([scores > 0.5, scores < -1], [0, 2], 1)
    means = np.array([scores[truth == k].mean() for k in range(3)])
    calibrated = calibration.apply(probabilities)
    ours, by_means = calibration.expected(calibrated), calibrated @ means
    assert np.square(ours - scores).mean() < np.square(by_means - scores).mean()
    assert ours.mean() == pytest.approx(scores.mean(), abs=0.02)


def test_a_perfect_model_stays_finite():
    probabilities = np.eye(3)[[0, 1, 2] * 10] * 0.97 + 0.01
    calibration = fit(probabilities, SCORES * 10)
    assert np.isfinite([calibration.temperature, *calibration.biases]).all()


def test_saved_and_loaded_it_is_the_same(tmp_path):
    calibration = Calibration(1.5, (0.1, 0.2, -0.3), SCORES, 0.4, "f" * 64, {"split": "validation", "comments": 9})
    calibration.save(tmp_path / "calibration.json")
    loaded = Calibration.load(tmp_path / "calibration.json")
    assert loaded == calibration
    assert loaded.version == calibration.version != Calibration(1.4, (0.1, 0.2, -0.3), SCORES, 0.4).version
