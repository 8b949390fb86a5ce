"""The model card of a run: what a reader must know before they use it."""

from pathlib import Path

from hatespeech import evaluation, task


def model_card(folder: Path, run: dict, metrics: dict, engine: str) -> str:
    """README.md of a run's folder. run, metrics: its settings.json and metrics.json. engine: the last measured."""
    name, settings, training = folder.name.removesuffix(".incomplete"), run["settings"], run["training"]
    calibrated_on = f"the {settings['calibrate_on']} comments"
    if settings["calibrate_on"] == "test":
        calibrated_on += ", cross-fitted: no comment calibrates itself"
    versus, leaky = metrics["test_differences"][engine], metrics["tfidf_by_row_leaky"]
    groups = metrics["test_groups"][engine]
    gaps = evaluation.gaps(groups)
    notes = (
        (folder / "NOTES.md").read_text() if (folder / "NOTES.md").exists() else ""
    )  # tests/benchmarks/moderation.py's
    return f"""# {name}

A LoRA of `{run["base"]["name"]}` that tells {" / ".join(task.LABELS)} apart by one token, made by

    {run["command"]}

on {run["hardware"]} in {training["seconds"]:.0f} s ({training["rows_per_s"]:.0f} rows/s).

**Trained on** {run["data"]["comments"]["train"]:,} comments of `{settings["dataset"]}`, {settings["targets"]} targets.
{settings["note"]}

**Tested on** {run["data"]["comments"]["test"]:,} comments of `{settings["test_dataset"] or settings["dataset"]}`
that share no text with them. Each figure with its 95 % bootstrap interval over comments:

{evaluation.table(metrics["test"])}

`torch` is the model as trained, `as_served` the exported GGUF through Ollama, both calibrated on {calibrated_on};
`zero_shot` is the base untrained; `tfidf_calibrated` is TF-IDF with logistic regression, calibrated the same way.
pearson_r is that of the expected score with the true one. metrics.json has all of it, predictions.csv every comment's;
settings.json has the versions, the commit and the data's sha256.

**Is it better than {versus["baseline"]}?** A paired bootstrap of the differences:

{evaluation.comparison_table(versus["metrics"])}

A split by annotation rows, as the reference has it, would have had {leaky["test_rows_seen_in_training"]:.0%} of its
test rows' comments in training, and TF-IDF at accuracy {leaky["accuracy"]["value"]:.3f} (leaky, not to be compared).

![Confusion matrix](confusion_matrix.png) ![Reliability](reliability.png) ![Scores](scores.png)
![Coverage](coverage.png)

**For whom is it wrong?** Of comments that are not Hate the share called Hate, and of Hate the share missed:

{evaluation.groups_table(groups)}

{"Gaps whose intervals do not overlap: " + "; ".join(gaps) + "." if gaps else "No gap whose intervals do not overlap."}

{notes}
**Read** and left out, by data set:

{_counts_table(run["data"]["counts"])}

**Serve it** with `MODEL_DIR=results/{name} ./bootstrap.sh`.

**Limits.** It was taught one data set's idea of hate speech, by English-language comments of 2019 or before. It errs as
often as the table says; expect more on dialect, quotation, irony and reclaimed words. Let it rank and pre-sort for
people; don't let it punish anyone alone.

Data: Measuring Hate Speech, UC Berkeley D-Lab (Kennedy et al. 2020; Sachdeva et al. 2022), CC-BY-4.0.
"""


def _counts_table(counts: dict) -> str:
    """Markdown: a line a count, a column a data set; counts that are no data set's come after."""
    sets = {name: found for name, found in counts.items() if isinstance(found, dict)}
    lines = ["| | " + " | ".join(f"`{name}`" for name in sets) + " |", "| --- |" + " ---: |" * len(sets)]
    for what in dict.fromkeys(what for found in sets.values() for what in found):
        cells = (f"{found[what]:,}" if what in found else "-" for found in sets.values())
        lines.append(f"| {what.replace('_', ' ')} | " + " | ".join(cells) + " |")
    rest = (f"{what.replace('_', ' ')}: {n:,}" for what, n in counts.items() if what not in sets)
    return "\n\n".join(["\n".join(lines), *rest])
