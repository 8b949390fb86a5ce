"""The reference's recipe, to the letter, and its report: what a split by row flatters by.

It draws 14,400 annotation rows, splits them 80 / 20 by row, and learns hard labels for one epoch. In the full set about
3.4 rows share a text, so most of its test texts were in its training. The report is in the reference's own form, and no
figure of it is comparable with any of this project's. It is the one place where a split by row lives.
"""

import numpy as np
import pandas as pd

from hatespeech import UserError, task, tokens
from hatespeech.training import data, evaluation, loop, tuning

ROWS, TEST_SHARE, EPOCHS, LEARNING_RATE, BATCH_SIZE, LORA = 14_400, 0.2, 1, 1e-4, 8, {"rank": 16, "alpha": 16}


def sample(rows: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and test rows with a score: a random sample, split by row. Raises UserError where there are too few."""
    score = pd.to_numeric(rows["hate_speech_score"], errors="coerce") if "hate_speech_score" in rows else None
    text = rows["text"].astype("string").fillna("")
    usable = [] if score is None else np.flatnonzero(np.isfinite(score) & text.str.strip().ne(""))
    if len(usable) < 10:
        raise UserError("the reference's recipe takes rows with a hate_speech_score: there are fewer than ten")
    chosen = np.random.default_rng(seed).permutation(usable)[:ROWS]
    frame = pd.DataFrame({"text": text.iloc[chosen].tolist(), "score": score.iloc[chosen].tolist()})
    frame["label"] = frame["score"].map(task.label_of)
    n_test = round(TEST_SHARE * len(frame))
    return frame[n_test:].reset_index(drop=True), frame[:n_test].reset_index(drop=True)


def run(settings) -> None:
    """Train and print. settings: train's; model, dataset, seed and max_steps are used, the rest is the recipe."""
    train, test = sample(data.read(settings.dataset), settings.seed)
    tokenizer = tokens.load_tokenizer(settings.model)
    classifier = tuning.load(settings.model, tokenizer, **LORA, seed=settings.seed)
    prompts = tokens.encode(tokenizer, train["text"].tolist())
    loop.fit(
        classifier,
        prompts,
        np.eye(4)[evaluation.numbers(train["label"])],
        steps=settings.max_steps or max(1, round(EPOCHS * len(prompts) / BATCH_SIZE)),
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        seed=settings.seed,
    )
    probabilities = tuning.label_probabilities(classifier, tokens.encode(tokenizer, test["text"].tolist()))
    print(report(train, test, probabilities))


def report(train: pd.DataFrame, test: pd.DataFrame, probabilities: np.ndarray) -> str:
    """Accuracy, accuracy by label, scikit-learn's report and the confusion matrix, labelled leaky."""
    from sklearn.metrics import confusion_matrix

    truth, decided = evaluation.numbers(test["label"]), probabilities.argmax(axis=1)
    seen = test["text"].isin(train["text"]).mean()
    lines = [
        f"LEAKY: a split by row; {seen:.0%} of the {len(test):,} test rows' texts were in training.",
        "",
        f"Accuracy: {(decided == truth).mean():.3f}",
        *(
            f"Accuracy for label {label}: {(decided == truth)[truth == number].mean():.3f}"
            for number, label in enumerate(task.LABELS)
            if (truth == number).any()
        ),
        "",
        "Classification Report:",
        evaluation.report(test, probabilities),
        "Confusion Matrix:",
        str(confusion_matrix(truth, decided, labels=range(3))),
    ]
    return "\n".join(lines)
