import json

import numpy as np
import pytest

from hatespeech import task
from hatespeech.calibration import (
    COVERAGE,
    FLAG_PRECISION,
    MIN_FLAGGED,
    Calibration,
    cross_fit,
    fit,
    flag_above,
    precision_and_recall,
)

SCORES = (2.0, -0.5, -3.0)  # one for each class


def draw(n: int, seed: int, temperature: float = 1.0, biases=(0.0, 0.0, 0.0)):
    """Labels and scores drawn from known probabilities, and those distorted as an overconfident model's are.

    Returns (distorted, labels, scores, true).
    """
    rng = np.random.default_rng(seed)
    true = rng.dirichlet((0.7, 0.7, 0.7), size=n)
    classes = np.array([rng.choice(3, p=row) for row in true])
    logits = (np.log(true) - np.asarray(biases)) * temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    labels, scores = np.array(task.LABELS)[classes], np.array(SCORES)[classes]
    return weights / weights.sum(axis=1, keepdims=True), labels, scores, true


def test_fit_finds_the_distortion():
    distorted, labels, scores, true = draw(20_000, 0, temperature=2.0, biases=(0.8, 0.0, -0.8))
    calibration = fit(distorted, labels, scores)
    assert calibration.temperature == pytest.approx(2.0, abs=0.1)
    assert calibration.biases == pytest.approx((0.8, 0.0, -0.8), abs=0.1)
    assert np.abs(calibration.apply(distorted) - true).max() < 0.05
    assert calibration.class_scores == pytest.approx(SCORES, abs=0.05)  # each score is its class's, exactly
    confident = calibration.apply(distorted).max(axis=1) >= calibration.abstain_below
    assert confident.mean() == pytest.approx(COVERAGE, abs=0.01)
    assert calibration.fitted_on == {"comments": 20_000}


def test_labels_that_say_only_not_hate_find_it_too():
    """Half of what is not Hate is known to be no more; a wrong class for them would pull the biases apart."""
    distorted, labels, scores, true = draw(20_000, 0, temperature=2.0, biases=(0.8, 0.0, -0.8))
    partial = (labels != "Hate") & (np.random.default_rng(1).random(len(labels)) < 0.5)
    labels[partial], scores[partial] = task.NOT_HATE, np.nan
    calibration = fit(distorted, labels, scores)
    assert calibration.temperature == pytest.approx(2.0, abs=0.1)
    assert calibration.biases == pytest.approx((0.8, 0.0, -0.8), abs=0.1)
    assert np.abs(calibration.apply(distorted) - true).max() < 0.05


def test_of_flags_alone_hate_is_calibrated_and_the_scores_are_mhss():
    distorted, labels, scores, true = draw(5000, 0, temperature=2.0, biases=(0.8, -0.4, -0.4))
    labels[labels != "Hate"] = task.NOT_HATE
    calibration = fit(distorted, labels, np.full(len(scores), np.nan))
    assert np.abs(calibration.apply(distorted) - true)[:, 0].mean() < 0.02
    assert calibration.class_scores == pytest.approx(task.TYPICAL_SCORES)
    calibrated, expected = cross_fit(distorted, labels, np.full(len(scores), np.nan))
    assert np.isfinite(calibrated).all()
    assert np.isfinite(expected).all()


def test_cross_fitting_uses_no_comments_own_label():
    probabilities, labels, scores, _ = draw(60, 1)
    calibrated, expected = cross_fit(probabilities, labels, scores)
    for i in (0, 17, 59):
        flipped, moved = labels.copy(), scores.copy()
        other = task.LABELS.index(labels[i]) - 1
        flipped[i], moved[i] = task.LABELS[other], SCORES[other]
        changed, others = cross_fit(probabilities, flipped, moved)
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
    calibration = fit(probabilities, [task.label_of(score) for score in scores], scores)
    truth = np.select([scores > 0.5, scores < -1], [0, 2], 1)
    means = np.array([scores[truth == k].mean() for k in range(3)])
    calibrated = calibration.apply(probabilities)
    ours, by_means = calibration.expected(calibrated), calibrated @ means
    assert np.square(ours - scores).mean() < np.square(by_means - scores).mean()
    assert ours.mean() == pytest.approx(scores.mean(), abs=0.02)


def test_a_perfect_model_stays_finite():
    probabilities = np.eye(3)[[0, 1, 2] * 10] * 0.97 + 0.01
    calibration = fit(probabilities, task.LABELS * 10, SCORES * 10)
    assert np.isfinite([calibration.temperature, *calibration.biases]).all()


def test_precision_and_recall_by_hand():
    rows = precision_and_recall(np.array([0.9, 0.8, 0.8, 0.3, 0.1]), np.array([True, True, False, True, False]))
    by = {row["threshold"]: row for row in rows}
    assert by[0.9] == {"threshold": 0.9, "n": 1, "precision": 1.0, "recall": 0.3333}
    assert by[0.8] == {"threshold": 0.8, "n": 3, "precision": 0.6667, "recall": 0.6667}
    assert by[0.1] == {"threshold": 0.1, "n": 5, "precision": 0.6, "recall": 1.0}
    assert 0.95 not in by  # nobody reached it
    assert precision_and_recall(np.array([0.9]), np.array([False])) == []


def test_the_threshold_is_the_least_at_which_enough_are_hate():
    """Of the surest 40 all are Hate, of the next ten none: 40 of 50 are 80 %, and the eleventh is one too many."""
    p_hate = np.linspace(0.99, 0.01, 99)
    hate = np.arange(99) < 40
    assert flag_above(p_hate, hate) == pytest.approx(p_hate[49], abs=1e-4)
    assert hate[p_hate >= flag_above(p_hate, hate)].mean() == FLAG_PRECISION
    order = np.random.default_rng(0).permutation(99)
    assert flag_above(p_hate[order], hate[order]) == flag_above(p_hate, hate)
    assert flag_above(p_hate, ~hate) is None
    few = MIN_FLAGGED - 1
    assert flag_above(p_hate[:few], np.ones(few, dtype=bool)) is None  # of so few it is chance


def test_fit_keeps_threshold_and_curve_of_comments_that_it_did_not_see():
    distorted, labels, scores, _ = draw(3000, 3, temperature=2.0)
    calibration = fit(distorted, labels, scores)
    honest, _ = cross_fit(distorted, labels, scores)
    hate = labels == "Hate"
    assert calibration.flag_above == flag_above(honest[:, 0], hate)
    assert list(calibration.thresholds) == precision_and_recall(honest[:, 0], hate)
    fresh, fresh_labels, _, _ = draw(3000, 4, temperature=2.0)
    flagged = calibration.apply(fresh)[:, 0] >= calibration.flag_above
    assert (fresh_labels == "Hate")[flagged].mean() == pytest.approx(FLAG_PRECISION, abs=0.04)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    rows = ({"threshold": 0.5, "n": 9, "precision": 0.8, "recall": 0.7},)
    about = {"model_sha256": "f" * 64, "fitted_on": {"split": "validation", "comments": 9}}
    calibration = Calibration(1.5, (0.1, 0.2, -0.3), SCORES, 0.4, 0.61, rows, **about)
    calibration.save(tmp_path / "calibration.json")
    loaded = Calibration.load(tmp_path / "calibration.json")
    assert loaded == calibration
    assert loaded.version == calibration.version != Calibration(1.4, (0.1, 0.2, -0.3), SCORES, 0.4).version
    stored = json.loads((tmp_path / "calibration.json").read_text())
    for name in ("flag_above", "thresholds"):  # of a run from before there were any
        del stored[name]
    (tmp_path / "calibration.json").write_text(json.dumps(stored))
    older = Calibration.load(tmp_path / "calibration.json")
    assert (older.flag_above, older.thresholds, older.version) == (None, (), calibration.version)
