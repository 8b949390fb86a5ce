"""The search for the shipped model's settings, on validation comments alone; no test row is read.

    python -m tests.benchmarks.tries --dynahate dynahate.csv    # a CUDA GPU; writes tries.csv and tries.json

Every try is measured on the same tenth of train.parquet's scored comments, its calibration cross-fitted there, and on a
tenth of each other file, of which only Hate against the rest is known. Tries that tries.csv holds are not made again.
Several processes may share a GPU, which one alone does not fill: --share 0/3, 1/3, 2/3, each to a file of its own.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

import train
from hatespeech import UserError, calibration, runs, task, tokens
from hatespeech.training import averaging, data, evaluation, loop, recording, tuning

ROOT = Path(train.__file__).parent
BASE = ROOT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = ROOT / "tests" / "data"
SHOWN = ("pearson_r", "roc_auc_hate", "accuracy", "macro_f1", "expected_calibration_error", "brier_score")
ALSO = ("hatemojibuild", "dynahate", "sbic", "hatexplain")

START = train.Settings(score_error=0.5, epochs=3, learning_rate=1e-3, batch_size=128)
BOTH, HALF = {"hatemojibuild": 1.0, "dynahate": 1.0}, {"hatemojibuild": 0.5, "dynahate": 0.5}
TRIES = [
    *({"also": also} for also in ({}, BOTH, HALF, HALF | {"sbic": 0.5, "hatexplain": 0.5})),
    *({"also": BOTH, "seed": seed} for seed in (1, 2)),
    *({"also": BOTH, "epochs": epochs} for epochs in (2, 6)),
    *({"also": BOTH, "score_error": error} for error in (0.0, 1.0)),
    {"also": BOTH, "learning_rate": 5e-4},
    {"also": BOTH, "learning_rate": 2e-3, "batch_size": 256},
    {"also": BOTH, "rank": 64, "alpha": 64},
    {"also": BOTH, "members": 3},
    *({"also": BOTH, "share": share} for share in (0.0625, 0.125, 0.25, 0.5)),
]


def load(source: str, tokenizer) -> pd.DataFrame:
    return data.comments(data.read(source), lambda texts: [len(ids) for ids in tokens.encode(tokenizer, texts)]).frame


class Rows:
    """What every try learns from and is measured on. dynahate: the CSV, of which the repository has only hashes."""

    def __init__(self, tokenizer, dynahate: Path | None, at_most: int | None = None):
        frame = load(str(DATA / "train.parquet"), tokenizer)[:at_most]
        parts, _ = data.split(frame, {"train": 0.9, "validation": 0.1}, seed=0)
        self.train, self.validation = parts["train"], parts["validation"]
        self.also, self.also_validation = {}, {}
        for name in ALSO:
            if name == "dynahate" and dynahate is None:
                continue
            other = load(str(dynahate if name == "dynahate" else DATA / f"{name}.parquet"), tokenizer)
            other, _ = data.without(other[:at_most], self.validation)
            parts, _ = data.split(other, {"train": 0.9, "validation": 0.1}, seed=0)
            self.also[name], self.also_validation[name] = parts["train"], parts["validation"]

    def chosen(self, also: dict[str, float]) -> tuple[pd.DataFrame, np.ndarray]:
        """Training comments, and each one's weight."""
        frames = [self.train, *(self.also[name] for name in also)]
        weights = np.repeat([1.0, *also.values()], [len(frame) for frame in frames])
        return pd.concat(frames, ignore_index=True), weights


def measure(
    rows: Rows, tokenizer, base: str, keep: Path | None, also: dict, members: int = 1, share: float = 1.0, **changes
):
    """One try: its settings and what it reached.

    members: LoRAs of one start, trained on the comments in so many orders, averaged to one ("model soup": Wortsman et
    al. 2022). share: of the MHS comments. keep: where the probabilities go, for ensembles.
    """
    learning, started = replace(START, **changes), time.monotonic()
    frame, weights = rows.chosen(also)
    steps = round(learning.epochs * len(frame) / learning.batch_size)
    if share < 1:
        kept = np.random.default_rng(0).random(len(frame)) < np.where(np.arange(len(frame)) < len(rows.train), share, 1)
        frame, weights = frame[kept], weights[kept]
    prompts = tokens.encode(tokenizer, frame["text"].tolist())
    goals, states = data.targets(frame, learning.score_error) * weights[:, None], []
    for order in range(members):
        classifier = tuning.load(base, tokenizer, rank=learning.rank, alpha=learning.alpha, seed=learning.seed)
        done = loop.fit(
            classifier,
            prompts,
            goals,
            steps=steps,
            batch_size=learning.batch_size,
            learning_rate=learning.learning_rate,
            seed=learning.seed + order,
        )
        states.append(averaging.state(classifier.model))
    averaging.restore(classifier.model, averaging.average(states)[0])

    def predict(texts: pd.Series) -> np.ndarray:
        return tuning.label_probabilities(classifier, tokens.encode(tokenizer, texts.tolist()))

    probabilities = {"validation": predict(rows.validation["text"])}
    probabilities |= {name: predict(part["text"]) for name, part in rows.also_validation.items()}
    if keep:
        np.savez_compressed(keep, **probabilities)
    changed = ("score_error", "epochs", "learning_rate", "batch_size", "rank", "alpha", "seed")
    settings = {name: getattr(learning, name) for name in changed}
    settings |= {"members": members, "comments": len(frame), "steps": steps}
    return (
        settings
        | reached(rows, probabilities)
        | {
            "last_loss": done["last_loss"],
            "steps_left_out": done["steps_left_out"],
            "rows_per_s": done["rows_per_s"],
            "seconds": round(time.monotonic() - started, 1),
        }
    )


def reached(rows: Rows, probabilities: dict[str, np.ndarray]) -> dict[str, float]:
    """The metrics of validation, and how often Hate is told from the rest in the other files."""
    labels, scores = rows.validation["label"], rows.validation["score"]
    found = evaluation.measure(rows.validation, *calibration.cross_fit(probabilities["validation"], labels, scores))
    metrics = {name: found[name]["value"] for name in SHOWN}
    fitted = calibration.fit(probabilities["validation"], labels, scores)
    for name, part in rows.also_validation.items():
        called = fitted.apply(probabilities[name]).argmax(axis=1) == task.LABELS.index("Hate")
        metrics[name] = round(float((called == (part["label"] == "Hate")).mean()), 4)
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dynahate", type=Path, help="made by python -m hatespeech.training.data; without, it is left out"
    )
    parser.add_argument("--quick", action="store_true", help="few rows, one short try: whether it runs at all")
    parser.add_argument("--base", default=str(BASE), help="a hub id, directory or .gguf file")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "smollm2-135m")
    parser.add_argument("--tries", type=Path, help="JSON: a list of changes, instead of those here")
    parser.add_argument("--share", default="0/1", help="K/N: every Nth try from the Kth on")
    parser.add_argument("--keep", type=Path, help="a folder for each try's probabilities")
    arguments = parser.parse_args()
    evaluation.N_BOOTSTRAP = 10  # intervals are not kept: the seeds tell how much is chance
    tuning.check_base(arguments.base)
    tokenizer = tokens.load_tokenizer(arguments.base)
    rows = Rows(tokenizer, arguments.dynahate, 240 if arguments.quick else None)
    about = {
        "command": "python -m tests.benchmarks.tries --dynahate dynahate.csv",
        "commit": recording.commit(),
        "hardware": tuning.hardware(),
        "versions": recording.versions(),
        "comments": {"train": len(rows.train), "validation": len(rows.validation)}
        | {name: [len(rows.also[name]), len(rows.also_validation[name])] for name in rows.also},
    }
    k, n = map(int, arguments.share.split("/"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    runs.write_json(arguments.output / "tries.json", about)
    path = arguments.output / ("tries.csv" if n == 1 else f"tries{k}.csv")
    done = pd.read_csv(path, dtype={"changed": str}, keep_default_na=False) if path.exists() else pd.DataFrame()
    changes = json.loads(arguments.tries.read_text()) if arguments.tries else TRIES
    changes = [{"also": {"hatemojibuild": 1.0}, "epochs": 0.1, "batch_size": 8}] if arguments.quick else changes
    for number, change in list(enumerate(changes))[k::n]:
        changed = json.dumps(change)
        if len(done) and (done["changed"] == changed).any():
            continue
        print(f"try {number}: {changed}", file=sys.stderr, flush=True)
        keep = arguments.keep / f"{number}.npz" if arguments.keep else None
        try:
            row = {"changed": changed} | measure(rows, tokenizer, arguments.base, keep, **({"also": {}} | change))
        except UserError as error:  # the loss is no number any more
            row = {"changed": changed, "error": str(error)}
        done = pd.concat([done, pd.DataFrame([row])])
        done.to_csv(path, index=False)
        print(done[["changed", *SHOWN, *rows.also, "rows_per_s", "seconds"]].tail(1).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
