"""Commands of cli.py about the service and its log: keys, feedback for training, texts classified, replay, purge."""

import csv
import io
import json
import os
import re
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

import click
from flask.cli import AppGroup, with_appcontext
from tqdm import tqdm

from hatespeech import UserError, answers, runs, tables, task
from hatespeech.calibration import Calibration
from hatespeech.ollama import Ollama, OllamaError, TextTooLong
from hatespeech.runs import model_name
from hatespeech.serving import files, queries
from hatespeech.serving.auth import SCOPES
from hatespeech.serving.parts import parts

keys = AppGroup("keys", help="Who may use the service from elsewhere.")
feedback = AppGroup("feedback", help="What people said of answers.")


@keys.command("create")
@click.argument("name")
@click.option(
    "--scopes",
    default="infer",
    show_default=True,
    help="Separated by commas: infer (classify), read (figures and logged texts), review (decide on them).",
)
def create(name: str, scopes: str) -> None:
    """Make a key and print it, this once. A key of the same name is replaced."""
    if not re.fullmatch(r"[\w.@:-]{1,64}", name):
        raise click.ClickException("a key's name is 1 to 64 letters, digits and . @ : - _")
    wanted = scopes.split(",")
    if unknown := set(wanted) - set(SCOPES):
        raise click.ClickException(f"no such scope: {', '.join(sorted(unknown))}; there are {', '.join(SCOPES)}")
    click.echo(parts().store.create_key(name, wanted))


@keys.command("list")
def list_keys() -> None:
    """Names and scopes of all keys."""
    for key in parts().store.api_keys():
        click.echo(f"{key.name}\t{key.scopes}\t{key.created_at:%Y-%m-%d}")


@keys.command("delete")
@click.argument("name")
def delete(name: str) -> None:
    """Take a key back."""
    if not parts().store.delete_key(name):
        raise click.ClickException(f"no key is named {name}")


@feedback.command("export")
@click.option("--format", "kind", type=click.Choice(["csv", "jsonl"]), default="csv", show_default=True)
def export_feedback(kind: str) -> None:
    """Write the newest feedback on each request to standard output, as rows that train takes.

    \b
    hatespeech feedback export > feedback.csv
    python -m train --dataset feedback.csv --output results/from-feedback

    A row has a score only where a person gave one; the label is what they said, or the score's class. The rows are
    people's corrections, not gold.
    """
    columns = ["comment_id", "text", "hate_speech_score", "label", "note"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as train reads it, whatever the terminal's is
    writer = csv.DictWriter(sys.stdout, columns)
    if kind == "csv":
        writer.writeheader()
    for asked, said in parts().store.newest_feedback():
        label = said.label or task.label_of(said.score)  # a score came with a label of its class, or with none
        row = dict(zip(columns, (asked.id, asked.text, said.score, label, said.note), strict=True))
        writer.writerow(row) if kind == "csv" else click.echo(json.dumps(row, ensure_ascii=False))


@click.command("classify")
@with_appcontext
@click.argument("source", default="-", type=click.Path(allow_dash=True))
@click.argument("target", required=False, type=click.Path(path_type=Path))
@click.option("--jsonl", is_flag=True, help="Of lines: an answer with probabilities for each, instead of its label.")
@click.option("--text-column", help="Of a table: which one holds the texts; text, if none is named.")
@click.option("--delimiter", help="Of a CSV: between its fields, where it is not what the header has most of.")
@click.option("--encoding", help="Of a CSV that is not UTF-8, e.g. cp1252.")
@click.option("--prefix", help="Of a table: before the names of the columns that are added, e.g. model_.")
def classify(source: str, target: Path | None, jsonl: bool, **of_a_table: str | None) -> None:
    """Classify the lines of SOURCE to standard output, or the rows of SOURCE to TARGET.

    \b
    echo 'some text' | hatespeech classify             lines: of standard input (-) or a .txt file
    hatespeech classify comments.csv classified.csv    rows of a table (CSV, JSONL or Parquet, also compressed)
    hatespeech classify comments/ classified.csv       or of a folder of tables; TARGET is of the same kind

    Every text goes through the service and its log. Rows that a killed command has done are not asked again: the same
    command resumes.
    """
    given = {name: value for name, value in of_a_table.items() if value is not None}
    try:
        if target is not None:
            if jsonl:
                raise click.UsageError("--jsonl is for lines; the rows of a table are written as they were read")
            return _classify_table(source, target, **{"text_column": "text"} | given)
        if given:
            raise click.UsageError(f"--{next(iter(given)).replace('_', '-')} is for a table, and needs a TARGET")
        if source != "-" and not source.endswith(".txt"):
            raise click.UsageError(f"{source} is no .txt file of lines: say where the rows of a table go, as TARGET")
        lines = open(os.dup(0) if source == "-" else source, "rb")  # noqa: SIM115  closed by who reads it
        _classify_lines(lines, jsonl)
    except BrokenPipeError:  # of `| head`: click ends without a word
        raise
    except (OllamaError, UserError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _classify_table(source: str, target: Path, prefix: str = "", **reading: str) -> None:
    added = [prefix + name for name in answers.COLUMNS]
    table = tables.open_table(source, **reading, added=added)
    click.echo(f"{source}: {table.described()}", err=True)
    with tqdm(total=files.count(table), desc="classifying", unit="row", disable=None) as bar:
        done = files.classify(parts().service, table, target, prefix=prefix, advance=bar.update)
    for reason in done["wrong"]:
        click.echo(reason, err=True)
    click.echo(f"{target}: {done['rows']} rows, {len(done['wrong'])} of them without a label")


def _classify_lines(lines: BinaryIO, jsonl: bool) -> None:
    """A line out for each line in, as soon as it is answered; an empty one where there is no label."""
    if lines.isatty():
        click.echo("a text on each line; Ctrl-D ends", err=True)
    no_bar = True if sys.stdout.isatty() else None  # None: not in a pipe either
    answered = tqdm(files.classify_lines(parts().service, lines), desc="classifying", unit="line", disable=no_bar)
    for number, columns in enumerate(answered, start=1):
        if columns["error"]:
            click.echo(f"line {number}: {columns['error']}", err=True)
        click.echo(json.dumps({"line": number} | columns) if jsonl else columns["label"] or "")


@click.command("replay")
@with_appcontext
@click.option("--model-dir", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
def replay(model_dir: Path) -> None:
    """Ask another run, which Ollama must serve, about the logged texts, and report what would change."""
    changes, n_texts, n_long = Counter(), 0, 0
    try:
        tokens = tuple(runs.read_settings(model_dir)["label_tokens"])
        other = Ollama(parts().settings.hosts[0], model_name(model_dir), tokens, parts().settings.ollama_timeout_s)
        calibration, why_not = Calibration.for_weights(Calibration.of_run(model_dir), other.weights_sha256())
        if why_not:
            click.echo(f"uncalibrated: {why_not}", err=True)
        for asked in tqdm(parts().store.answered(), desc="replaying", unit="text"):
            try:
                probabilities = other.classify(asked.text).probabilities
            except TextTooLong:  # answered for its beginning, which `truncate` had asked for
                n_long += 1
                continue
            probabilities = calibration.apply(probabilities) if calibration else probabilities
            changes[asked.label, task.decide(probabilities)] += 1
            n_texts += 1
    except (OllamaError, UserError) as error:
        raise click.ClickException(str(error)) from error
    changed = sum(count for (was, is_), count in changes.items() if was != is_)
    click.echo(f"{changed} of {n_texts} answers would change")
    if n_long:
        click.echo(f"{n_long} texts were not asked about: they are too long, and had been cut")
    for (was, is_), count in sorted(changes.items()):
        click.echo(f"{was} -> {is_}\t{count}")


@click.command("purge")
@with_appcontext
@click.option("--older-than", required=True, metavar="AGE", help="E.g. 30d, 12h.")
def purge(older_than: str) -> None:
    """Delete old requests, with the feedback on them."""
    found = re.fullmatch(r"(\d{1,5})([dh])", older_than)
    if not found:
        raise click.ClickException(f"an age is a number of days or hours, 30d or 12h, not {older_than}")
    age = timedelta(**{{"d": "days", "h": "hours"}[found[2]]: int(found[1])})
    queries.roll_up(parts().store)  # the counts by hour stay
    click.echo(f"{parts().store.purge(age)} requests deleted")
