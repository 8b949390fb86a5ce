"""`python -m train` from end to end at full size: the Mistral-7B shape and 135,556 rows of 39,565 comments.

    python -m tests.benchmarks.full_size            # a CUDA GPU, 15 minutes, 60 GB of disk; writes full_size.json
    python -m tests.benchmarks.full_size --quick    # a CPU, a tiny base, few rows; prints only

The base has random weights and the rows are made (texts of train.parquet, numbered; MHS's columns), so it tells times
and memory, and no quality. All settings are the command's defaults. results/benchmarks/full_size.json has the log of
what the command printed, each line with its second.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from hatespeech import runs
from hatespeech.training import recording, tuning
from tests.benchmarks.training import BASE, ROOT, ROWS

TARGETS = ("race", "religion", "origin", "gender", "sexuality", "age", "disability")


def made_rows(n_comments: int = 39_565, n_rows: int = 135_556) -> pd.DataFrame:
    """Annotation rows in MHS's schema: 3 or 4 a comment, the score the same in each, answers and targets random."""
    rng, scored = np.random.default_rng(0), pd.read_parquet(ROWS).dropna(subset="hate_speech_score").reset_index()
    comments = scored.loc[np.arange(n_comments) % len(scored), ["text", "hate_speech_score"]].reset_index(drop=True)
    comments["comment_id"] = np.arange(n_comments)
    comments["text"] += " " + comments.index.astype(str)
    rows = comments.loc[np.sort(np.arange(n_rows) % n_comments)].reset_index(drop=True)
    rows["annotator_id"] = rng.integers(0, 7912, n_rows)
    rows["hatespeech"] = rng.integers(0, 3, n_rows).astype(float)
    return rows.assign(**{f"target_{name}": rng.random(n_rows) < 0.3 for name in TARGETS})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model on a CPU; nothing is stored")
    parser.add_argument("--tokenizer", default=str(BASE), help="a hub id, directory or .gguf file")
    parser.add_argument("--max-steps", type=int, help="stop training so early; stored with the rest")
    arguments = parser.parse_args()
    shape, size = "Mistral-7B", {}
    options = ["--max-steps", str(arguments.max_steps)] if arguments.max_steps else []
    if arguments.quick:
        shape, size, options = (
            "tiny",
            {"n_comments": 300, "n_rows": 1000},
            ["--max-steps", "60", "--learning-rate", "1e-2"],
        )
    with tempfile.TemporaryDirectory() as scratch:
        base, rows, output = (f"{scratch}/{name}" for name in ("base", "rows.parquet", "run"))
        make = [sys.executable, "-m", "tests.benchmarks.training", "--make", shape, base]
        quick = ["--quick"] if arguments.quick else []
        subprocess.run([*make, "--tokenizer", arguments.tokenizer, *quick], cwd=ROOT, check=True)
        made_rows(**size).to_parquet(rows)
        command = [sys.executable, "-u", "-m", "train", "--model", base, "--dataset", rows, "--output", output]
        started, log = time.time(), []
        with subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                log.append(f"{time.time() - started:6.1f} s  {line.rstrip()}".replace(scratch, "SCRATCH"))
                print(log[-1], flush=True)
        if process.returncode:
            sys.exit(f"python -m train ended with exit status {process.returncode}")
        files = sorted(Path(output).iterdir(), key=lambda path: path.stat().st_mtime)
        run = runs.read_settings(Path(output))
        result = {
            "command": " ".join(["python -m tests.benchmarks.full_size", *options]),
            "commit": recording.commit(),
            "hardware": tuning.hardware(),
            "versions": recording.versions(),
            "settings": run["settings"] | {"model": shape, "dataset": "made_rows()"},
            "comments": run["data"]["comments"],
            "training": run["training"],
            "seconds": round(time.time() - started, 1),
            "peak_host_memory_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2),
            "written_after_s": {path.name: round(path.stat().st_mtime - started, 1) for path in files},
            "gb": {path.name: round(path.stat().st_size / 1e9, 3) for path in files if path.suffix == ".gguf"},
            "log": log,
        }
    print(json.dumps({name: value for name, value in result.items() if name != "log"}, indent=2))
    if not arguments.quick:
        runs.write_json(ROOT / "results" / "benchmarks" / "full_size.json", result)


if __name__ == "__main__":
    main()
