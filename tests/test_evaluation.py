import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from hatespeech import UserError, data, evaluation, pictures, task
from tests.test_data import GOLD, SILVER, UPSTREAM


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
    metrics = evaluation.measure(frame, probabilities, probabilities @ [1.5, 0.0, -2.0])
    assert metrics["n"] == 300
    assert metrics["accuracy"]["value"] == pytest.approx(accuracy_score(truth, decided), abs=1e-4)
    assert metrics["macro_f1"]["value"] == pytest.approx(f1_score(truth, decided, average="macro"), abs=1e-4)
    assert metrics["weighted_f1"]["value"] == pytest.approx(f1_score(truth, decided, average="weighted"), abs=1e-4)
    expected = probabilities @ [1.5, 0.0, -2.0]
    assert metrics["pearson_r"]["value"] == pytest.approx(np.corrcoef(frame["score"], expected)[0, 1], abs=1e-4)


def test_intervals_hold_the_value_and_narrow_with_n(example):
    frame, probabilities = example
    many = evaluation.measure(frame, probabilities, probabilities @ [1, 0, -1])["accuracy"]
    few = evaluation.measure(frame[:50], probabilities[:50], probabilities[:50] @ [1, 0, -1])["accuracy"]
    assert many["low"] < many["value"] < many["high"]
    # sqrt(300 / 50) = 2.4 times wider
    assert 1.7 < (few["high"] - few["low"]) / (many["high"] - many["low"]) < 3.2


def test_a_constant_prediction_has_no_correlation(example):
    frame, _ = example
    constant = np.tile([0.2, 0.3, 0.5], (len(frame), 1))
    assert evaluation.measure(frame, constant, constant @ [1, 0, -1])["pearson_r"]["value"] is None


def test_ranking_and_calibration_metrics_are_scikit_learns(example):
    frame, probabilities = example
    truth, hate = evaluation.numbers(frame["label"]), (frame["label"] == "Hate").to_numpy()
    metrics = evaluation.measure(frame, probabilities, probabilities @ [1.5, 0.0, -2.0])
    expected = {
        "roc_auc_hate": roc_auc_score(hate, probabilities[:, 0]),
        "average_precision_hate": average_precision_score(hate, probabilities[:, 0]),
        "spearman_r": spearmanr(frame["score"], probabilities @ [1.5, 0.0, -2.0]).statistic,
        "brier_score": brier_score_loss(truth, probabilities, scale_by_half=False),
        "precision_Hate": precision_score(hate, probabilities.argmax(axis=1) == 0),
        "recall_Neutral": recall_score(truth == 1, probabilities.argmax(axis=1) == 1),
    }
    assert {name: metrics[name]["value"] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_expected_calibration_error_by_hand():
    """Four comments at 0.65, half of them right: 0.15 off. Four at 0.95, all right: 0.05 off."""
    frame = pd.DataFrame(
        {"label": ["Hate"] * 2 + ["Neutral"] * 2 + ["Hate"] * 4, "score": [1.0] * 2 + [0.0] * 2 + [1] * 4}
    )
    probabilities = np.array([[0.65, 0.35, 0.0]] * 4 + [[0.95, 0.05, 0.0]] * 4)
    metrics = evaluation.measure(frame, probabilities, probabilities @ [1, 0, -1])
    assert metrics["expected_calibration_error"]["value"] == pytest.approx((0.15 + 0.05) / 2)
    assert metrics["accuracy_at_80_coverage"]["value"] == pytest.approx(6 / 6)  # the four sure ones and two of the rest


def test_a_paired_bootstrap_tells_a_real_difference_from_none(example):
    frame, probabilities = example
    guessing = np.random.default_rng(1).dirichlet((1, 1, 1), len(frame))
    ours, theirs = ((each, each @ [1.5, 0.0, -2.0]) for each in (probabilities, guessing))
    better = evaluation.compare(frame, ours, theirs)
    assert better["accuracy"]["low"] > 0
    assert better["accuracy"]["p"] < 0.01
    same = evaluation.compare(frame, ours, ours)
    assert (same["macro_f1"]["difference"], same["macro_f1"]["p"]) == (0, 1)
    worse = evaluation.compare(frame, theirs, ours)
    assert worse["pearson_r"]["difference"] == -better["pearson_r"]["difference"]


def test_error_rates_by_group_and_their_gaps():
    """Of 40 comments about women that are not Hate 20 are called so, of 40 about race none: that gap is named."""
    frame = pd.DataFrame({"label": ["Neutral"] * 80 + ["Hate"] * 4, "text": ["short"] * 84, "score": 0.0})
    frame["targets"] = [("gender",)] * 40 + [("race",)] * 40 + [("race", "gender")] * 4
    frame["agreement"] = [1.0] * 84
    called = np.array([True] * 20 + [False] * 60 + [True, True, True, False])
    rows = evaluation.groups(frame, np.where(called[:, None], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]))
    by = {(row["by"], row["group"]): row for row in rows}
    assert by["target", "gender"]["false_positive_rate"]["value"] == 0.5
    assert by["target", "race"]["false_positive_rate"] == {"value": 0.0, "low": 0.0, "high": 0.0876, "n": 40}
    assert by["target", "race"]["false_negative_rate"]["value"] == 0.25
    assert by["annotators agree", "all"]["n"] == 84
    assert evaluation.gaps(rows) == ["false positive rate by target: gender 0.50, race 0.00"]
    assert "| target | gender | 44 | 0.50 (0.35 to 0.65), n = 40 |" in evaluation.groups_table(rows)


@pytest.mark.slow
def test_baselines_on_real_comments():
    silver, gold = (data.comments(data.read(str(path))).frame for path in (SILVER, GOLD))
    found = evaluation.baselines(silver, gold, None, [1.3, -0.4, -1.9])
    results = {name: evaluation.measure(gold, *predicted) for name, predicted in found.items()}
    assert results["majority_class"]["accuracy"]["value"] == pytest.approx(
        (gold["label"] == "Supportive").mean(), abs=1e-4
    )
    assert 0.5 < results["tfidf_logistic_regression"]["accuracy"]["value"] < 0.65
    assert "| tfidf_logistic_regression | 0.5" in evaluation.table(results)
    errors = {name: result["expected_calibration_error"]["value"] for name, result in results.items()}
    assert errors["tfidf_calibrated"] < errors["tfidf_logistic_regression"]
    on_others = evaluation.baselines(silver, gold[:100], gold[100:], [1.3, -0.4, -1.9])["tfidf_calibrated"]
    assert on_others[1].shape == (100,)


@pytest.mark.slow
def test_a_split_by_row_flatters():
    """Three rows a comment: nearly every test row's comment is in training, and TF-IDF then knows its label."""
    frame = data.comments(data.read(str(SILVER))).frame[:2000].assign(n_annotations=3)
    leaky = evaluation.by_row(frame, [1.3, -0.4, -1.9])
    honest = data.split(frame, {"train": 0.8, "test": 0.2}, seed=0)
    found = evaluation.baselines(honest["train"], honest["test"], None, [1.3, -0.4, -1.9])
    predicted = found["tfidf_logistic_regression"]
    assert leaky["test_rows_seen_in_training"] > 0.9
    assert leaky["accuracy"]["value"] > evaluation.measure(honest["test"], *predicted)["accuracy"]["value"] + 0.1


def test_annotators_votes_are_the_ceiling_where_rows_have_them():
    frame = data.comments(data.read(str(UPSTREAM))).frame
    ceiling = evaluation.vote(frame)
    assert ceiling["n"] == len(frame)
    assert 0.6 < ceiling["roc_auc_hate"] < 1
    assert evaluation.vote(data.comments(data.read(str(GOLD))).frame) is None


def test_predictions_are_kept_without_texts(example, tmp_path):
    frame, probabilities = example
    frame = frame.assign(comment_id=[f"c{i}" for i in range(len(frame))], text="secret")
    path = tmp_path / evaluation.PREDICTIONS
    expected = probabilities @ [1, 0, -1]
    evaluation.save_predictions(path, frame, "test", dict.fromkeys(("one", "two"), (probabilities, expected)))
    evaluation.save_predictions(path, frame, "test", {"two": (probabilities[::-1], expected[::-1])})
    assert "secret" not in path.read_text()
    stored = evaluation.load_predictions(tmp_path)
    assert list(stored) == ["one", "two"]
    assert evaluation.predicted_of(stored["one"])[0] == pytest.approx(probabilities, abs=1e-5)
    assert evaluation.predicted_of(stored["two"])[0] == pytest.approx(probabilities[::-1], abs=1e-5)
    assert evaluation.predicted_of(stored["two"])[1] == pytest.approx(expected[::-1], abs=1e-5)


def test_runs_that_cannot_be_compared_are_explained(tmp_path):
    with pytest.raises(UserError, match=r"holds no predictions\.csv: python -m train --evaluate-only"):
        evaluation.compare_runs(tmp_path, tmp_path)


def test_report_and_pictures(example, tmp_path):
    frame, probabilities = example
    frame = frame.assign(text="words", agreement=np.nan, targets=[()] * len(frame))
    assert "weighted avg" in evaluation.report(frame, probabilities)
    pd.DataFrame({"rows": range(20), "loss": range(20)}).to_csv(tmp_path / "learning_curve.csv")
    pictures.draw_all(tmp_path, "a title", frame, probabilities, probabilities, probabilities @ [1.5, 0.0, -2.0])
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert len(drawn) == 6
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
