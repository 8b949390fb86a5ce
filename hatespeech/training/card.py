"""The model card of a run: what a reader must know before they use it."""

from pathlib import Path

import yaml

from hatespeech import task
from hatespeech.training import checks, data, evaluation

NAMES = {"score": "score", "class": "class", "not_hate": "only that it is not Hate"}

CREDIT = """
Data: Measuring Hate Speech, UC Berkeley D-Lab (Kennedy et al. 2020; Sachdeva et al. 2022), CC-BY-4.0.
"""


def model_card(folder: Path, run: dict, metrics: dict, engine: str) -> str:
    """README.md of a run's folder. run, metrics: its settings.json and metrics.json. engine: the last measured."""
    name = folder.name.removesuffix(".incomplete")
    sections = [
        front_matter(name, run, metrics["test"][engine]),
        _what_it_is(name, run),
        _how_good_it_is(run, metrics, engine),
        _when_to_act(metrics["test_thresholds"][engine]),
        _on_what_it_errs(run, metrics, engine),
        _what_was_read(name, run),
    ]
    return "\n".join(sections)


def front_matter(name: str, run: dict, measured: dict) -> str:
    """The card's metadata as the Hugging Face hub reads it. measured: metrics.json's of the test comments.

    https://huggingface.co/docs/hub/model-cards#model-card-metadata
    """
    settings = run["settings"]
    learned_from = (settings["dataset"], *settings["also"])
    tested_on = _tested_on(settings)
    figures = {"accuracy": "accuracy", "macro_f1": "f1", "roc_auc_hate": "roc_auc"}
    result = {
        "task": {"type": "text-classification"},
        "dataset": {"name": Path(tested_on).name, "type": tested_on},
        "metrics": [
            {"type": kind, "name": metric, "value": measured[metric]["value"]}
            for metric, kind in figures.items()
            if measured[metric]["value"] is not None
        ],
    }
    about = {
        "language": "en",
        "pipeline_tag": "text-classification",
        "tags": ["hate-speech", "lora", "gguf"],
        "datasets": [source for source in learned_from if not data.is_file(source)],
        "model-index": [{"name": name, "results": [result]}],
    }
    if "/" in run["base"]["name"] and not run["base"]["name"].startswith(("/", ".")):
        about["base_model"] = run["base"]["name"]
    about = {name: value for name, value in about.items() if value}
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n"


def _tested_on(settings: dict) -> str:
    return settings["test_dataset"] or settings["dataset"]


def _what_it_is(name: str, run: dict) -> str:
    settings, training = run["settings"], run["training"]
    members = training.get("members", 1)
    averaged = f", the mean of {members} LoRAs of one beginning" if members > 1 else ""
    return f"""# {name}

A LoRA of `{run["base"]["name"]}` that tells {" / ".join(task.LABELS)} apart by one token{averaged}. Made by

    {run["command"]}

on {run["hardware"]} in {training["seconds"]:.0f} s ({training["rows_per_s"]:.0f} rows/s).

**Trained on** {run["data"]["comments"]["train"]:,} comments, by what is known of them:

{trained_on_table(run["data"]["trained_on"])}

{settings["note"]}
"""


def _how_good_it_is(run: dict, metrics: dict, engine: str) -> str:
    tested_on, versus = _tested_on(run["settings"]), metrics["test_differences"][engine]
    return f"""**Tested on** {run["data"]["comments"]["test"]:,} comments of `{tested_on}`
that share no text with them. Each figure with its 95 % bootstrap interval over comments:

{evaluation.table(metrics["test"])}

`torch` is the model as trained, `as_served` the exported GGUF through Ollama, both calibrated on the
{run["data"]["comments"]["validation"]:,} validation comments; `zero_shot` is the base untrained; `tfidf_calibrated` is
TF-IDF with logistic regression, calibrated the same way. pearson_r is that of the expected score with the true one.
metrics.json has all of it, predictions.csv every comment's; settings.json has the versions, the commit and the data's
sha256.

**Is it better than {versus["baseline"]}?** A paired bootstrap of the differences:

{evaluation.comparison_table(versus["metrics"])}
"""


def _when_to_act(thresholds: list[dict]) -> str:
    return f"""**When to act.** Of the test comments with at least this P(Hate), the share that is Hate (precision), and
the share of all Hate that these are (recall). The service flags above the threshold at which precision reached 0.8 on
the validation comments (`FLAG_ABOVE` sets another).

{thresholds_table(thresholds)}

![Precision and recall](precision_recall.png) ![Confusion matrix](confusion_matrix.png)
![Reliability](reliability.png) ![Scores](scores.png) ![Coverage](coverage.png)
"""


def _on_what_it_errs(run: dict, metrics: dict, engine: str) -> str:
    groups = metrics["test_groups"][engine]
    gaps = evaluation.gaps(groups)
    functional = Path(run["settings"]["functional"]).name
    return f"""**Functional checks**: short texts of known kinds (`{functional}`), the worst first.

{checks.table(metrics["functional"][engine])}

**Gates**:

{gates_list(metrics["gates"][engine])}

**For whom is it wrong?** Of comments that are not Hate the share called Hate, and of Hate the share missed:

{evaluation.groups_table(groups)}

{"Gaps whose intervals do not overlap: " + "; ".join(gaps) + "." if gaps else "No gap whose intervals do not overlap."}

{annotators_sentence(metrics["test_annotators"][engine])}
"""


def _what_was_read(name: str, run: dict) -> str:
    return f"""**Read** and left out, by data set:

{_counts_table(run["data"]["counts"])}

**Serve it** with `MODEL_DIR=results/{name} ./bootstrap.sh`.

**Limits.** It was taught what its data sets call hate speech, by English-language comments. It errs as often as the
tables say; expect more on dialect, quotation, irony and reclaimed words. Let it rank and pre-sort for people; don't let
it punish anyone alone.
{CREDIT if is_of_mhs(run["settings"]["dataset"]) else ""}"""


def is_of_mhs(source: str) -> bool:
    """Whether comments are of the Measuring Hate Speech data set: the hub's, or those of this repository."""
    return source == data.HUB_ID or Path(source).parent == Path("tests/data")


def trained_on_table(rows: list[dict]) -> str:
    """Markdown: how many comments of each source, by what is known of them."""
    lines = ["| source | known | label | comments |", "| --- | --- | --- | ---: |"]
    for row in rows:
        source = Path(row["source"]).name
        lines.append(f"| `{source}` | {NAMES[row['known']]} | {row['label']} | {row['comments']:,} |")
    return "\n".join(lines)


def thresholds_table(rows: list[dict]) -> str:
    """Markdown of calibration.precision_and_recall's rows, every other one."""
    lines = ["| P(Hate) at least | comments | precision | recall |", "| ---: | ---: | ---: | ---: |"]
    for row in rows[1::2]:
        lines.append(f"| {row['threshold']:.1f} | {row['n']:,} | {row['precision']:.2f} | {row['recall']:.2f} |")
    return "\n".join(lines)


def gates_list(results: list[dict]) -> str:
    return "\n".join(f"- {checks.sentence(result)}" for result in results)


def annotators_sentence(found: dict | None) -> str:
    if found is None:
        return ""
    shares = {
        who: f"{found[who]['value']:.3f} ({found[who]['low']:.3f} to {found[who]['high']:.3f})"
        for who in ("annotator", "model")
    }
    return (
        f"**Beside one person**: a single annotator's own answer tells Hate from the rest as the true class does in "
        f"{shares['annotator']} of {found['annotator']['n']:,} answers (those of the unsure, "
        f"{found['unsure_answers']:,}, left out), the model in {shares['model']} on the same rows. The true class "
        f"rests on such answers, the annotator's own among them."
    )


def _counts_table(counts: dict) -> str:
    """Markdown: a line a count, a column a data set; counts that are no data set's come after."""
    sets = {name: found for name, found in counts.items() if isinstance(found, dict)}
    lines = ["| | " + " | ".join(f"`{name}`" for name in sets) + " |", "| --- |" + " ---: |" * len(sets)]
    for what in dict.fromkeys(what for found in sets.values() for what in found):
        cells = (f"{found[what]:,}" if what in found else "-" for found in sets.values())
        lines.append(f"| {what.replace('_', ' ')} | " + " | ".join(cells) + " |")
    rest = (f"{what.replace('_', ' ')}: {n:,}" for what, n in counts.items() if what not in sets)
    return "\n\n".join(["\n".join(lines), *rest])
