"""Texts that a moderator meets, asked of a run as Ollama serves it: what does it get wrong?

    python -m tests.benchmarks.moderation results/smollm2-135m     # writes results/smollm2-135m/NOTES.md

Twenty-four texts of our own (tests/data/moderation.csv), one opinion each on their label: it illustrates, and measures
nothing.
"""

import argparse
from pathlib import Path

import pandas as pd

import train
from hatespeech import calibration, export, task

TEXTS = Path(train.__file__).parent / "tests" / "data" / "moderation.csv"


def notes(run: Path) -> str:
    """Markdown: right answers by kind, and every wrong one."""
    frame = pd.read_csv(TEXTS)
    probabilities, _ = train.predict_as_served(run, export.read_settings(run), frame["text"].tolist())
    calibrated = calibration.Calibration.load(run / "calibration.json").apply(probabilities)
    frame["answer"] = [task.decide(row) for row in calibrated]
    frame["confidence"] = calibrated.max(axis=1)
    right = frame["answer"] == frame["label"]
    kinds = (f"{kind} {right[rows].sum()} of {len(rows)}" for kind, rows in frame.groupby("kind").groups.items())
    lines = [
        f"**On {len(frame)} texts of our own**, of kinds a moderator meets, it agrees with the writer on {right.sum()}",
        f"({', '.join(kinds)}). Where not (hateful words ahead):",
        "",
        "| kind | text | its writer | the model |",
        "| --- | --- | --- | --- |",
    ]
    for row in frame[~right].itertuples():
        lines.append(f"| {row.kind} | {row.text} | {row.label} | {row.answer} ({row.confidence:.2f}) |")
    return "\n".join(
        [*lines, "", "`python -m tests.benchmarks.moderation` asks again. One opinion each: no measurement.", ""]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder, which Ollama at OLLAMA_HOST serves")
    run = parser.parse_args().run
    (run / "NOTES.md").write_text(notes(run))
    print((run / "NOTES.md").read_text())


if __name__ == "__main__":
    main()
