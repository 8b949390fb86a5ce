import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score

from hatespeech import data, evaluation, task
from tests.test_data import GOLD, SILVER


@pytest.fixture(scope="module")
def example():
    rng = np.random.default_rng(0)
    scores = rng.normal(-0.5, 2, 300)
    frame = pd.DataFrame({"score": scores, "label": [task.label_of(score) for score in scores]})
    noisy = data.soft_targets(scores + rng.normal(0, 1.5, 300), 1.0)
    return frame, noisy


def test_metrics_are_scikit_learns(example):
    frame, probabilities = example
    truth = [task.LABELS.index(label) for label in frame["label"]]
    decided = probabilities.argmax(axis=1)
    metrics = evaluation.measure(frame, probabilities, [1.5, 0.0, -2.0])
    assert metrics["n"] == 300
    assert metrics["accuracy"]["value"] == pytest.approx(accuracy_score(truth, decided), abs=1e-4)
    assert metrics["macro_f1"]["value"] == pytest.approx(f1_score(truth, decided, average="macro"), abs=1e-4)
    assert metrics["weighted_f1"]["value"] == pytest.approx(f1_score(truth, decided, average="weighted"), abs=1e-4)
    expected = probabilities @ [1.5, 0.0, -2.0]
    assert metrics["pearson_r"]["value"] == pytest.approx(np.corrcoef(frame["score"], expected)[0, 1], abs=1e-4)


def test_intervals_hold_the_value_and_narrow_with_n(example):
    frame, probabilities = example
    many = evaluation.measure(frame, probabilities, [1, 0, -1])["accuracy"]
    few = evaluation.measure(frame[:50], probabilities[:50], [1, 0, -1])["accuracy"]
    assert many["low"] < many["value"] < many["high"]
    # sqrt(300 / 50) = 2.4 times wider
    assert 1.7 < (few["high"] - few["low"]) / (many["high"] - many["low"]) < 3.2


def test_a_constant_prediction_has_no_correlation(example):
    frame, _ = example
    constant = np.tile([0.2, 0.3, 0.5], (len(frame), 1))
    assert evaluation.measure(frame, constant, [1, 0, -1])["pearson_r"]["value"] is None


@pytest.mark.slow
def test_baselines_on_real_comments():
    silver, gold = (data.comments(data.read(str(path))).frame for path in (SILVER, GOLD))
    results = evaluation.baselines(silver, gold, [1.3, -0.4, -1.9])
    assert results["majority_class"]["accuracy"]["value"] == pytest.approx(
        (gold["label"] == "Supportive").mean(), abs=1e-4
    )
    assert 0.5 < results["tfidf_logistic_regression"]["accuracy"]["value"] < 0.65
    assert "| tfidf_logistic_regression | 0.5" in evaluation.table(results)


def test_report_and_plot(example, tmp_path):
    frame, probabilities = example
    assert "weighted avg" in evaluation.report(frame, probabilities)
    evaluation.plot_confusion(frame, probabilities, "a title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
