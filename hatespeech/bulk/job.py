"""Millions of texts, on this machine or a cluster: files in, the same rows with answers out, on Ray Data.

    pip install '.[bulk]'
    hatespeech bulk comments/ scored/ --text-column text
    hatespeech bulk s3://bucket/comments s3://bucket/scored --address auto    # a running Ray cluster
    hatespeech bulk comments.csv scored/ --ollama gpu-1:11434,gpu-2:11434     # Ollama computes

INPUT is a table or a folder of tables (CSV, JSONL, Parquet) on any path that fsspec knows; OUTPUT a folder of the same
kind of files. Rows are dealt to parts by their text, so equal texts meet in one part and are scored once; a part is a
file, written whole or not at all. Killed, the same command goes on with the parts that are not there. Rows leave in
another order than they came: keep a column that names them.
"""

import argparse
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fsspec.core import url_to_fs

from hatespeech import UserError, answers, ollama, runs, tables, task
from hatespeech.bulk import scoring
from hatespeech.calibration import Calibration
from hatespeech.hosts import Hosts
from hatespeech.tables import Table

PROVENANCE = "_provenance.json"
# Rows are counted by so many of their texts' hashes, of which a part gets neighbours.
N_BUCKETS = 65_536
# What a killed worker loses at most: half a minute of a GPU, some minutes of a CPU.
ROWS_PER_PART = {"gpu": 100_000, "cpu": 2_000}
# What Ray sets aside of a core for each worker. A worker keeps its core busy all the same; the rest is left for the
# tasks that read and deal rows, which have to run again when a machine is lost.
CPUS_PER_WORKER = 0.25


@dataclass(frozen=True)
class Job:
    """What every worker knows. output: a path of its fsspec file system. run: a folder that each machine has.

    n_gpus: of each worker; 0 on a CPU. prefix: before the names of the columns that are added.
    """

    table: Table
    output: str
    filesystem: object
    run: str
    hosts: tuple[str, ...]
    n_gpus: int
    provenance: dict
    n_parts: int
    prefix: str = ""

    def part_of(self, buckets: np.ndarray) -> np.ndarray:
        """The part of each bucket."""
        return buckets.astype(np.int64) * self.n_parts // N_BUCKETS

    def path(self, part: int) -> str:
        return f"{self.output}/part-{part:05}-of-{self.n_parts:05}{self.table.ending}"


def buckets(texts: Sequence[str | None]) -> np.ndarray:
    """(n,) a number below N_BUCKETS each, the same for equal texts, anywhere and always."""
    import pandas as pd

    hashes = pd.util.hash_array(np.array([text or "" for text in texts], dtype=object), categorize=False)
    return (hashes % N_BUCKETS).astype(np.int32)


class PartWriter:
    """A worker: classifies parts, and writes each to its file."""

    def __init__(self, job: Job):
        self._job, run = job, Path(job.run)
        settings = runs.read_settings(run)
        self._calibration = Calibration.of_run(run) if job.provenance["calibration"] else None
        self._class_scores = settings["class_scores"]
        if job.hosts:
            self._probabilities = _through_ollama(job, tuple(settings["label_tokens"]))
            return
        if runs.sha256_of(scoring.weights_path(run)) != job.provenance["weights_sha256"]:
            raise UserError(f"{run} has other weights on this machine than where the run began")
        import torch

        torch.set_num_threads(1)
        self._probabilities = scoring.load(run, self._calibration).label_probabilities

    def __call__(self, rows):
        """One part's rows, a pyarrow table -> a table of one row that tells of it."""
        import pyarrow

        part, started = int(rows["part"][0].as_py()), time.time()
        asked = list(zip(rows["text"].to_pylist(), rows["error"].to_pylist(), strict=True))
        distinct = {each: number for number, each in enumerate(dict.fromkeys(asked))}
        found = self._answers(list(distinct))
        added = {self._job.prefix + name: [found[distinct[each]][name] for each in asked] for name in answers.COLUMNS}
        self._write(rows, added, part)
        reports = {
            "part": part,
            "rows": len(asked),
            "distinct": len(distinct),
            "started": started,
            "ended": time.time(),
        }
        return pyarrow.table({name: [value] for name, value in reports.items()})

    def _answers(self, asked: list[tuple[str | None, str]]) -> list[dict]:
        """Columns of (text, error) pairs. A text that can't be classified has an error, and nothing else."""
        errors = [error or task.text_error(text) for text, error in asked]
        good = [number for number, error in enumerate(errors) if not error]
        columns = [answers.error_columns(error) for error in errors]
        if not good:
            return columns
        probabilities = self._probabilities([asked[number][0] for number in good])
        fits = ~np.isnan(probabilities).any(axis=1)
        verdicts = iter(answers.verdicts(probabilities[fits], self._calibration, self._class_scores))
        too_long = str(ollama.TextTooLong())
        for number, fit in zip(good, fits, strict=True):
            columns[number] = answers.as_columns(next(verdicts)) if fit else answers.error_columns(too_long)
        return columns

    def _write(self, rows, added: dict[str, list], part: int) -> None:
        job, kinds = self._job, {self._job.prefix + name: kind for name, kind in answers.COLUMNS.items()}
        path = job.path(part)
        unfinished = _unfinished(path)
        with (
            job.filesystem.open(unfinished, "wb") as file,
            tables.writing(job.table, file, path, kinds, job.provenance) as writer,
        ):
            writer.write(rows, added)
        job.filesystem.mv(unfinished, path)


def _through_ollama(job: Job, tokens: tuple[str, ...]) -> Callable[[list[str]], np.ndarray]:
    """Scoring by Ollama hosts, two texts a host at a time."""
    name = job.provenance["model"]
    hosts = Hosts([ollama.Ollama(host, name, tokens, timeout_s=60) for host in job.hosts])

    def probabilities(texts: list[str]) -> np.ndarray:
        def one(text: str) -> tuple[float, ...]:
            try:
                prediction, _, weights_sha256 = hosts.ask(text)
            except ollama.TextTooLong:
                return (np.nan,) * len(task.LABELS)
            if weights_sha256 != job.provenance["weights_sha256"]:
                raise UserError(f"an Ollama host serves other weights as {name} than when the run began")
            return prediction.probabilities

        with ThreadPoolExecutor(2 * len(job.hosts)) as pool:
            return np.array(list(pool.map(one, texts)))

    return probabilities


def run(
    source: str,
    output: str,
    *,
    text_column: str = "text",
    delimiter: str | None = None,
    encoding: str | None = None,
    prefix: str = "",
    model_dir: str = "results/smollm2-135m",
    hosts: Sequence[str] = (),
    address: str | None = None,
    workers: int | None = None,
    rows_per_part: int | None = None,
) -> dict:
    """Score all rows of source that output does not have yet.

    Returns what _provenance.json then holds and, where something was left to score, `scored`: how many rows, distinct
    texts among them, and seconds from the start of the first part to the end of the last.

    hosts: Ollama's, where they are to compute; else transformers does. workers: processes; by default so many as the
    cluster's GPUs allow, or else one for each CPU.
    Raises UserError: no such input or column, an output of another input or model, no model or no engine.
    """
    added = [prefix + name for name in answers.COLUMNS]
    table = tables.open_table(source, text_column=text_column, delimiter=delimiter, encoding=encoding, added=added)
    ray = _ray(address)
    resources = ray.cluster_resources()
    n_gpus = 0 if hosts else int(resources.get("GPU", 0))
    workers = workers or (1 if hosts else n_gpus or int(resources["CPU"]))
    provenance = _provenance(Path(model_dir), tuple(hosts)) | {
        "input": tables.content_of(table),
        "read_as": table.described(),
        "text_column": text_column,
        "prefix": prefix,
    }
    out, folder = url_to_fs(output)
    folder = folder.rstrip("/")
    state = _resumed(out, folder, provenance)
    rows = _read(ray, table)
    if state is None:
        n_rows = rows_per_part or ROWS_PER_PART["gpu" if n_gpus else "cpu"]
        state = provenance | {"finished": False, "rows": _rows_of_parts(ray, rows, n_rows)}
        _store(out, folder, state)
    expected = state["rows"]
    job = Job(
        table=table,
        output=folder,
        filesystem=out,
        run=str(Path(model_dir).resolve()),
        hosts=tuple(hosts),
        n_gpus=1 if n_gpus else 0,
        provenance=provenance,
        n_parts=len(expected),
        prefix=prefix,
    )
    missing = np.array([n_rows > 0 and not out.exists(job.path(part)) for part, n_rows in enumerate(expected)])
    scored = _score(ray, rows, job, missing, expected, workers) if missing.any() else {}
    _finish(out, folder, state)
    return state | ({"scored": scored} if scored else {})


def _rows_of_parts(ray, rows, n_rows: int) -> list[int]:
    """How many rows each part is to have: about n_rows, all of one text in one part."""
    print("counting rows ...", file=sys.stderr, flush=True)
    counts = _count(ray, rows)
    n_parts = min(N_BUCKETS, max(1, -(-int(counts.sum()) // n_rows)))
    by_part = np.bincount(np.arange(N_BUCKETS) * n_parts // N_BUCKETS, counts, minlength=n_parts)
    return by_part.astype(int).tolist()


def _finish(out, folder: str, state: dict) -> None:
    for path in out.glob(f"{folder}/_*"):  # what killed workers left
        if not path.endswith(PROVENANCE):
            out.rm(path)
    state["finished"] = True
    _store(out, folder, state)


def _score(ray, rows, job: Job, missing: np.ndarray, expected: list[int], workers: int) -> dict:
    from tqdm import tqdm

    scored = (
        rows.map_batches(_with_part, fn_args=[job, missing], batch_format="pyarrow", batch_size=None)
        .groupby("part", num_partitions=job.n_parts)
        .map_groups(
            PartWriter,
            fn_constructor_args=[job],
            batch_format="pyarrow",
            concurrency=min(workers, int(missing.sum())),
            scheduling_strategy="SPREAD",
            **({"num_gpus": job.n_gpus} if job.n_gpus else {"num_cpus": CPUS_PER_WORKER}),
        )
    )
    total, done = sum(expected), sum(n for n, is_missing in zip(expected, missing, strict=True) if not is_missing)
    with tqdm(total=total, initial=done, desc="scoring", unit="row", mininterval=1.0) as progress:
        reports, distinct = {}, 0
        with _failures_named(ray, "What is scored is kept: the same command goes on"):
            for part in scored.iter_rows():
                reports[part["part"]] = part
                distinct += part["distinct"]
                progress.update(part["rows"])
                progress.set_postfix(distinct=distinct)
    wrong = [part for part in np.flatnonzero(missing) if part not in reports or reports[part]["rows"] != expected[part]]
    if wrong:
        for part in wrong:
            if job.filesystem.exists(job.path(part)):
                job.filesystem.rm(job.path(part))
        raise UserError(f"{len(wrong)} parts have not the rows they should have: the same command makes them again")
    sums = {name: sum(part[name] for part in reports.values()) for name in ("rows", "distinct")}
    started, ended = min(part["started"] for part in reports.values()), max(part["ended"] for part in reports.values())
    return sums | {"seconds": round(ended - started, 2)}


def _read(ray, table: Table):
    """The table's rows as Ray Data, one task for each unit of the table."""
    units = table.units()

    def read(batch):
        for number in batch["unit"].tolist():
            for rows in table.batches(units[number]):
                yield rows.drop_columns(["line"])

    numbers = ray.data.from_items([{"unit": number} for number in range(len(units))], override_num_blocks=len(units))
    return numbers.map_batches(read, batch_format="numpy", batch_size=None)


def _with_part(block, job: Job, missing: np.ndarray):
    """The block's rows whose part is left to do, with its number."""
    import pyarrow

    parts = job.part_of(buckets(block["text"].to_pylist()))
    return block.append_column("part", pyarrow.array(parts)).filter(pyarrow.array(missing[parts]))


def _count(ray, rows) -> np.ndarray:
    """(N_BUCKETS,) how many rows each has."""
    import pyarrow

    def count(block):
        numbers, n = np.unique(buckets(block["text"].to_pylist()), return_counts=True)
        return pyarrow.table({"bucket": numbers, "rows": n})

    counts = np.zeros(N_BUCKETS, dtype=np.int64)
    counted = rows.map_batches(count, batch_format="pyarrow", batch_size=None)
    with _failures_named(ray, "Nothing was scored"):
        for batch in counted.iter_batches(batch_size=None):
            np.add.at(counts, batch["bucket"], batch["rows"])
    return counts


@contextmanager
def _failures_named(ray, consequence: str):
    """What failed in a task or worker of Ray, as a UserError with the last words of its traceback."""
    try:
        yield
    except ray.exceptions.RayError as error:
        reasons = re.findall(r"^(?:[\w.]+\.)?(\w+): (.+)$", str(error), re.MULTILINE)
        kind, reason = reasons[-1] if reasons else (type(error).__name__, "")
        said = reason if kind == "UserError" or not reason else f"{kind}: {reason}"
        raise UserError(f"{said or kind}. {consequence}") from error


def _ray(address: str | None):
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install '.[bulk]'") from error
    import logging

    if not ray.is_initialized():
        here = {} if address else {"include_dashboard": False}
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **here)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is said once, by _failures_named
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def _provenance(run: Path, hosts: tuple[str, ...]) -> dict:
    """Which model, prompt and calibration answer, through what. UserError where the run or the hosts have no model."""
    name = runs.model_name(run)
    try:
        if hosts:
            tokens = tuple(runs.read_settings(run)["label_tokens"])
            weights = Hosts([ollama.Ollama(host, name, tokens) for host in hosts]).model_served()[1]
        else:
            weights = runs.sha256_of(scoring.weights_path(run))
    except ollama.OllamaError as error:
        raise UserError(str(error)) from error
    calibration, why_not = Calibration.for_weights(Calibration.of_run(run), weights)
    if why_not:
        print(f"uncalibrated: {why_not}", file=sys.stderr)
    return {
        "model": name,
        "weights_sha256": weights,
        "prompt_version": task.PROMPT_VERSION,
        "calibration": calibration and calibration.version,
        "flag_above": calibration and calibration.flag_above,
        "engine": "ollama" if hosts else "transformers",
    }


def _resumed(out, folder: str, provenance: dict) -> dict | None:
    """What _provenance.json of an earlier start says; None where there was none. UserError where it was another's."""
    if not out.exists(f"{folder}/{PROVENANCE}"):
        if out.exists(folder) and out.ls(folder):
            raise UserError(f"{folder} is not empty: name another output")
        out.makedirs(folder, exist_ok=True)
        return None
    state = json.loads(out.cat_file(f"{folder}/{PROVENANCE}"))
    if changed := [name for name in provenance if state.get(name) != provenance[name]]:
        raise UserError(f"{folder} was begun with another {', '.join(changed)}: name another output")
    return state


def _store(out, folder: str, state: dict) -> None:
    _write_whole(out, f"{folder}/{PROVENANCE}", json.dumps(state, indent=1).encode())


def _write_whole(fs, path: str, content: bytes) -> None:
    """Whole or not at all: under a name that no reader takes for data, then under the right one."""
    unfinished = _unfinished(path)
    fs.pipe_file(unfinished, content)
    fs.mv(unfinished, path)


def _unfinished(path: str) -> str:
    return f"{path.rpartition('/')[0]}/_{uuid.uuid4().hex}"


def main(arguments: list[str] | None = None) -> None:
    about, *rest = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="hatespeech bulk",
        description=about,
        epilog="\n\n".join(rest),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--delimiter", help="between a CSV's fields, where it is not what the header has most of")
    parser.add_argument("--encoding", help="of a CSV that is not UTF-8, e.g. cp1252")
    parser.add_argument("--prefix", default="", help="before the names of the columns that are added, e.g. model_")
    shipped = os.environ.get("MODEL_DIR") or "results/smollm2-135m"
    parser.add_argument("--model-dir", default=shipped, help="a run, in the same place on each machine")
    parser.add_argument(
        "--ollama", metavar="HOST,HOST", help="let these Ollama hosts compute, which have the run's model"
    )
    parser.add_argument("--address", help="of a Ray cluster, or `auto`; without it Ray runs here, for the moment")
    parser.add_argument("--workers", type=int, help="default: one for each GPU of the cluster, or else for each CPU")
    parser.add_argument(
        "--rows-per-part", type=int, help="about so many rows in each file, which a kill at most costs a worker"
    )
    chosen = vars(parser.parse_args(arguments))
    hosts = [host for host in (chosen.pop("ollama") or "").split(",") if host]
    source, output = chosen.pop("input"), chosen.pop("output")
    try:
        done = run(source, output, hosts=hosts, **chosen)
    except (UserError, OSError) as error:
        sys.exit(f"bulk: {error}")
    except KeyboardInterrupt:
        sys.exit("bulk: stopped. The same command goes on")
    print(f"{output}: {sum(done['rows'])} rows in {sum(map(bool, done['rows']))} parts")
    if "scored" in done:
        rows, distinct, seconds = done["scored"].values()
        print(f"scored now: {rows} rows, {distinct} distinct texts, {rows / max(seconds, 0.01):.1f} rows/s")


if __name__ == "__main__":
    main()
