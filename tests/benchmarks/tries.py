"""The search for the shipped model's settings, on comments with silver labels alone; none of gold is read.

    python -m tests.benchmarks.tries    # a CUDA GPU, 10 minutes; writes results/smollm2-135m/tries.{csv,json}

One setting at a time is changed from START, with two seeds more to tell chance from gain, then the learning curve:
fewer comments, as many steps. Every try is measured on the same tenth of silver.csv, calibration cross-fitted there.
Tries that tries.csv holds are not made again. tries.json has the ceiling that the labels' noise sets.
"""

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

import train
from hatespeech import UserError, calibration, data, evaluation, export, tuning

ROOT = Path(train.__file__).parent
BASE = ROOT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SILVER = ROOT / "tests" / "data" / "silver.csv"
SHOWN = ("pearson_r", "spearman_r", "roc_auc_hate", "accuracy", "macro_f1", "brier_score")

START = train.Learning(targets="soft", score_error=0.5, epochs=3, learning_rate=2e-3, batch_size=256)
CHANGES = [
    {},
    {"seed": 1},
    {"seed": 2},
    *({"learning_rate": rate} for rate in (5e-4, 1e-3, 4e-3)),
    *({"share_of_comments": share} for share in (0.0625, 0.125, 0.25, 0.5)),
    {"orders_averaged": 3},
    {"targets": "hard"},
    {"score_error": 1.0},
    {"at_least_raters": 4},
    *({"epochs": epochs} for epochs in (2.0, 6.0)),
    {"rank": 4, "alpha": 8},
    {"batch_size": 64},
    {"class_weights": "balanced"},
]


def measure(
    base: str,
    tokenizer,
    splits: dict,
    at_least_raters: int = 3,
    share_of_comments: float = 1.0,
    orders_averaged: int = 1,
    **changes,
):
    """One try: its settings and what it reached on validation.

    orders_averaged: LoRAs of one beginning, trained on the comments in so many orders, averaged to one ("model soup":
    Wortsman et al. 2022).
    """
    learning, rows = replace(START, **changes), splits["train"]
    steps = round(learning.epochs * len(rows) / learning.batch_size)
    rows = rows[rows["n_raters"] >= at_least_raters].sample(frac=share_of_comments, random_state=0)
    prompts = tuning.encode(tokenizer, rows["text"].tolist())
    started, mean = time.monotonic(), None
    for order in range(orders_averaged):
        lora = {"rank": learning.rank, "alpha": learning.alpha, "seed": learning.seed}
        classifier = tuning.load(base, tokenizer, **lora)
        schedule = {"steps": steps, "batch_size": learning.batch_size, "learning_rate": learning.learning_rate}
        done = tuning.fit(classifier, prompts, train.targets_of(rows, learning), **schedule, seed=learning.seed + order)
        weights = [weight for weight in classifier.model.parameters() if weight.requires_grad]
        trained = [weight.detach().clone() for weight in weights]
        mean = trained if mean is None else [a + b for a, b in zip(mean, trained, strict=True)]
    for weight, total in zip(weights, mean, strict=True):
        weight.data.copy_(total / orders_averaged)
    validation = splits["validation"]
    probabilities = tuning.label_probabilities(classifier, tuning.encode(tokenizer, validation["text"].tolist()))
    found = evaluation.measure(validation, *calibration.cross_fit(probabilities, validation["score"]))
    settings = asdict(learning) | {"at_least_raters": at_least_raters, "comments": len(rows), "steps": steps}
    settings.pop("max_steps")
    reached = {name: found[name]["value"] for name in SHOWN}
    return settings | reached | {"last_loss": done["last_loss"], "seconds": round(time.monotonic() - started, 1)}


def ceiling(raters: pd.Series, votes: pd.Series) -> dict[str, float]:
    """How well the silver score can be predicted at all, from how much raters differ about the same comment.

    reliability: the share of the vote shares' variance that is not chance, 1 - mean(p (1 - p) / (n - 1)) / var(p); a
    predictor that knew what share of all people would vote so could correlate with the observed share by its root.
    """
    share = votes / raters
    reliability = 1 - (share * (1 - share) / (raters - 1)).mean() / share.var()
    return {"reliability": round(float(reliability), 4), "pearson_r_ceiling": round(float(np.sqrt(reliability)), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=str(BASE), help="a hub id, directory or .gguf file")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "smollm2-135m")
    parser.add_argument("--quick", action="store_true", help="few comments, one try: whether it runs at all")
    arguments = parser.parse_args()
    evaluation.N_BOOTSTRAP = 10  # intervals are not kept: the seeds tell how much is chance
    tuning.check_base(arguments.base)
    tokenizer = tuning.load_tokenizer(arguments.base)
    silver = pd.read_csv(SILVER, dtype={"comment_id": str})[: 480 if arguments.quick else None]
    comments = data.comments(silver, lambda texts: [len(ids) for ids in tuning.encode(tokenizer, texts)]).frame
    comments = comments.merge(silver[["comment_id", "n_raters", "n_hate_votes"]], on="comment_id")
    splits = data.split(comments, {"train": 0.9, "validation": 0.1}, seed=0)
    about = {
        "command": "python -m tests.benchmarks.tries",
        "commit": train.commit(),
        "hardware": tuning.hardware(),
        "versions": train.versions(),
        "comments": {name: len(part) for name, part in splits.items()},
        "ceiling": ceiling(comments["n_raters"], comments["n_hate_votes"]),
    }
    export.write_json(arguments.output / "tries.json", about)
    path = arguments.output / "tries.csv"
    done = pd.read_csv(path, dtype={"changed": str}, keep_default_na=False) if path.exists() else pd.DataFrame()
    changes = [{"epochs": 0.1, "batch_size": 8}] if arguments.quick else CHANGES
    for number, change in enumerate(changes, start=1):
        changed = ", ".join(f"{name} {value}" for name, value in change.items()) or "nothing"
        if len(done) and done["changed"].str.startswith(changed).any():
            continue
        print(f"try {number} of {len(changes)}: changed {changed}", file=sys.stderr, flush=True)
        try:
            row = {"changed": changed} | measure(arguments.base, tokenizer, splits, **change)
        except UserError as error:  # the loss is no number any more
            row = {"changed": f"{changed}: {error}"}
        done = pd.concat([done, pd.DataFrame([row])])
        done.to_csv(path, index=False)
    print(done[["changed", *SHOWN, "seconds"]].to_string(index=False))
    print(about["ceiling"])


if __name__ == "__main__":
    main()
