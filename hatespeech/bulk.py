"""Millions of texts, on this machine or a cluster: files in, the same rows with answers out, on Ray Data.

    pip install '.[bulk]'
    python -m hatespeech.bulk comments/ scored/ --text-column text
    python -m hatespeech.bulk s3://bucket/comments s3://bucket/scored --address auto    # a running Ray cluster
    python -m hatespeech.bulk comments.csv scored/ --ollama gpu-1:11434,gpu-2:11434     # Ollama computes
    python -m hatespeech.bulk comments/ scored/ --vllm --gpus-per-worker 4              # vLLM, the model over four GPUs

INPUT is a file or folder of .parquet, .csv or .jsonl on any path that fsspec knows; OUTPUT a folder of the same kind of
files. Rows are dealt to parts by their text, so equal texts meet in one part and are scored once; a part is a file,
written whole or not at all. Killed, the same command goes on with the parts that are not there. Rows leave in another
order than they came: keep a column that names them.
"""

import argparse
import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from werkzeug.exceptions import BadRequest

from hatespeech import UserError, export, ollama, scoring, task
from hatespeech.calibration import Calibration
from hatespeech.hosts import Hosts
from hatespeech.service import text_of
from hatespeech.table import ADDED

KINDS = (".parquet", ".csv", ".jsonl")
PROVENANCE = "_provenance.json"
COLUMNS = tuple(name for name in ADDED if name != "request_id")  # there is no request, and no row in the log
# Rows are counted by so many of their texts' hashes, of which a part gets neighbours.
BUCKETS = 65_536
# What a killed worker loses at most: half a minute of a GPU, some minutes of a CPU.
ROWS_A_PART = {"gpu": 100_000, "cpu": 2_000}
# Of a core, as Ray counts; a worker keeps it busy. The rest is for the tasks that read and deal, which the loss of a
# machine makes needed again.
CPUS_A_WORKER = 0.25


@dataclass(frozen=True)
class Job:
    """What every worker knows. output: a path of its fsspec file system. run: a folder that each machine has.

    gpus: of a worker; 0 on a CPU.
    """

    kind: str
    text_column: str
    output: str
    protocol: str
    run: str
    hosts: tuple[str, ...]
    gpus: int
    provenance: dict
    parts: int

    def filesystem(self):
        import fsspec

        return fsspec.filesystem(self.protocol)

    def part_of(self, keys: np.ndarray) -> np.ndarray:
        """The part of each bucket."""
        return keys.astype(np.int64) * self.parts // BUCKETS

    def path(self, part: int) -> str:
        return f"{self.output}/part-{part:05}-of-{self.parts:05}{self.kind}"


def raw_texts(block, kind: str, column: str) -> list[str | None]:
    """A block's texts as they are; None where a row has none. Of .jsonl a block holds the lines."""
    if kind != ".jsonl":
        return [None if text is None else str(text) for text in block.column(column).to_pylist()]
    texts = [_parsed(line).get(column) for line in block["line"].to_pylist()]
    return [text if isinstance(text, str) else None for text in texts]


def buckets(texts: Sequence[str | None]) -> np.ndarray:
    """(n,) a number below BUCKETS each, the same for equal texts, anywhere and always."""
    import pandas as pd

    encoded = [(text or "").encode("utf-8", "replace").decode() for text in texts]  # half a character has no hash
    hashes = pd.util.hash_array(np.array(encoded, dtype=object), categorize=False)
    return (hashes % BUCKETS).astype(np.int32)


class Score:
    """A worker: scores parts, and writes each to its file."""

    def __init__(self, job: Job):
        self._job, self._fs, run = job, job.filesystem(), Path(job.run)
        settings = export.read_settings(run)
        self._calibration = Calibration.of_run(run) if job.provenance["calibration"] else None
        self._class_scores = np.array(self._calibration.class_scores if self._calibration else settings["class_scores"])
        if job.hosts:
            self._probabilities = _through_ollama(job, tuple(settings["label_tokens"]))
            return
        if export.sha256_of(scoring.weights_path(run)) != job.provenance["weights_sha256"]:
            raise UserError(f"{run} has other weights on this machine than where the run began")
        if job.provenance["engine"] == "vllm":
            self._probabilities = scoring.load_vllm(run, max(1, job.gpus)).label_probabilities
            return
        import torch

        torch.set_num_threads(1)
        self._probabilities = scoring.load(run, self._calibration).label_probabilities

    def __call__(self, rows):
        """One part's rows, a pyarrow table -> a table of one row that tells of it."""
        import pyarrow

        part, started = int(rows["part"][0].as_py()), time.time()
        rows = rows.drop_columns(["part"])
        texts = raw_texts(rows, self._job.kind, self._job.text_column)
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        answers = self._answers(list(distinct))
        places = [distinct[text] for text in texts]
        self._write({name: [values[place] for place in places] for name, values in answers.items()}, rows, part)
        told = {"part": part, "rows": len(texts), "distinct": len(distinct), "started": started, "ended": time.time()}
        return pyarrow.table({name: [value] for name, value in told.items()})

    def _answers(self, texts: list[str | None]) -> dict[str, list]:
        """COLUMNS of the texts. A text that can't be classified has an error, and nothing else."""
        errors = [_error_of(text) for text in texts]
        good = [number for number, error in enumerate(errors) if not error]
        found = np.full((len(texts), len(task.LABELS)), np.nan)
        if good:
            found[good] = self._probabilities([texts[number] for number in good])
        probabilities = self._calibration.apply(found) if self._calibration else found
        for number in good:
            if np.isnan(found[number]).any():
                errors[number] = f"the text is too long: with the instruction it may take {task.CONTEXT_TOKENS} tokens"
        confidence, scores = probabilities.max(axis=1), probabilities @ self._class_scores
        abstain = confidence < self._calibration.abstain_below if self._calibration else [None] * len(texts)
        columns = {f"p_{label.lower()}": probabilities[:, number] for number, label in enumerate(task.LABELS)}
        columns |= {"score": scores, "confidence": confidence}
        answers = {name: [float(value) for value in values] for name, values in columns.items()}
        answers |= {"label": [task.decide(row) for row in probabilities], "abstain": list(map(_bool, abstain))}
        answers["error"] = errors
        for number, error in enumerate(errors):
            if error:
                for name in COLUMNS[:-1]:
                    answers[name][number] = None
        return {name: answers[name] for name in COLUMNS}

    def _write(self, answers: dict[str, list], rows, part: int) -> None:
        job = self._job
        if job.kind == ".jsonl":
            lines = []
            for number, line in enumerate(rows["line"].to_pylist()):
                row = _parsed(line) | {name: values[number] for name, values in answers.items()}
                lines.append(json.dumps(row) + "\n")
            content = "".join(lines).encode()
        else:
            content = _table_bytes(_with(rows, answers), job)
        _write_whole(self._fs, job.path(part), content)


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


def _error_of(text: str | None) -> str:
    """What the service would refuse the text for."""
    try:
        text_of((text or "").encode("utf-8", "surrogatepass"))
        return ""
    except BadRequest as error:
        return error.description


def _bool(value) -> bool | None:
    return None if value is None else bool(value)


def _parsed(line: str) -> dict:
    """A line of .jsonl; one that is no JSON object as {"line": it}."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    return row if isinstance(row, dict) else {"line": line}


def _with(rows, answers: dict[str, list]):
    import pyarrow

    kinds = {"label": pyarrow.string(), "abstain": pyarrow.bool_(), "error": pyarrow.string()}
    for name, values in answers.items():
        rows = rows.append_column(name, pyarrow.array(values, kinds.get(name, pyarrow.float64())))
    return rows


def _table_bytes(table, job: Job) -> bytes:
    buffer = io.BytesIO()
    if job.kind == ".csv":
        from pyarrow import csv as arrow_csv

        arrow_csv.write_csv(table, buffer)
    else:
        from pyarrow import parquet

        metadata = (table.schema.metadata or {}) | {b"hatespeech": json.dumps(job.provenance).encode()}
        parquet.write_table(table.replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def run(
    source: str,
    output: str,
    *,
    text_column: str = "text",
    model_dir: str = "results/smollm2-135m",
    hosts: Sequence[str] = (),
    vllm: bool = False,
    gpus_a_worker: int = 1,
    address: str | None = None,
    workers: int | None = None,
    rows_a_part: int | None = None,
) -> dict:
    """Score all rows of source that output does not have yet.

    Returns what _provenance.json then holds and, where something was left to score, `scored`: how many rows, distinct
    texts among them, and seconds from the first part's begin to the last one's end.

    hosts, vllm: what computes; by default transformers. workers: processes; by default so many as the cluster's GPUs
    allow, or else one for each CPU.
    Raises UserError: no such input or column, an output of another input or model, no model or no engine.
    """
    engine = "ollama" if hosts else "vllm" if vllm else "transformers"
    if vllm and hosts:
        raise UserError("either Ollama hosts or vLLM compute, not both")
    if vllm and not importlib.util.find_spec("vllm"):
        raise UserError("vllm is not installed: pip install '.[vllm]', in an environment of its own")
    if gpus_a_worker > 1 and not vllm:
        raise UserError("only vLLM puts a model on several GPUs: --vllm")
    ray = _ray(address)
    fs, files, kind = _files(source)
    columns = _columns(fs, files[0], kind)
    if text_column not in columns:
        raise UserError(f"{files[0]}: no column {text_column} (there are: {', '.join(columns)}): --text-column NAME")
    if taken := set(columns) & {*COLUMNS, "part"}:
        raise UserError(f"{source} has columns that would be added: {', '.join(sorted(taken))}; rename them")
    resources = ray.cluster_resources()
    gpus = 0 if hosts else int(resources.get("GPU", 0))
    if not 1 <= gpus_a_worker <= max(1, gpus):
        raise UserError(f"a worker was to have {gpus_a_worker} GPUs, and there are {gpus}")
    workers = workers or (1 if hosts else gpus // gpus_a_worker or int(resources["CPU"]))
    provenance = _provenance(Path(model_dir), tuple(hosts), engine) | {
        "text_column": text_column,
        "input": hashlib.sha256(json.dumps([[path, fs.size(path)] for path in files]).encode()).hexdigest(),
    }
    out, folder = _url(output)
    state = _resumed(out, folder, provenance)
    table = _read(ray, fs, files, kind, columns)
    if state is None:
        print("counting rows ...", file=sys.stderr, flush=True)
        counts = _count(table, kind, text_column)
        per_part = rows_a_part or ROWS_A_PART["gpu" if gpus else "cpu"]
        parts = min(BUCKETS, max(1, -(-int(counts.sum()) // per_part)))
        by_part = np.bincount(np.arange(BUCKETS) * parts // BUCKETS, counts, minlength=parts)
        state = provenance | {"finished": False, "rows": by_part.astype(int).tolist()}
        _store(out, folder, state)
    expected = state["rows"]
    job = Job(
        kind=kind,
        text_column=text_column,
        output=folder,
        protocol=out.protocol if isinstance(out.protocol, str) else out.protocol[0],
        run=str(Path(model_dir).resolve()),
        hosts=tuple(hosts),
        gpus=gpus_a_worker if gpus else 0,
        provenance=provenance,
        parts=len(expected),
    )
    left = np.array([rows > 0 and not out.exists(job.path(part)) for part, rows in enumerate(expected)])
    scored = {}
    if left.any():
        scored = _score(ray, table, job, left, expected, workers)
    for path in out.glob(f"{folder}/_*"):  # what killed workers left
        if not path.endswith(PROVENANCE):
            out.rm(path)
    state["finished"] = True
    _store(out, folder, state)
    return state | ({"scored": scored} if scored else {})


def _score(ray, table, job: Job, left: np.ndarray, expected: list[int], workers: int) -> dict:
    from tqdm import tqdm

    scored = (
        table.map_batches(_deal, fn_args=[job, left], batch_format="pyarrow", batch_size=None)
        .groupby("part", num_partitions=job.parts)
        .map_groups(
            Score,
            fn_constructor_args=[job],
            batch_format="pyarrow",
            concurrency=min(workers, int(left.sum())),
            scheduling_strategy="SPREAD",
            **({"num_gpus": job.gpus} if job.gpus else {"num_cpus": CPUS_A_WORKER}),
        )
    )
    total, done = sum(expected), sum(rows for rows, is_left in zip(expected, left, strict=True) if not is_left)
    with tqdm(total=total, initial=done, desc="scoring", unit="row", mininterval=1.0) as progress:
        told, distinct = {}, 0
        try:
            for part in scored.iter_rows():
                told[part["part"]] = part
                distinct += part["distinct"]
                progress.update(part["rows"])
                progress.set_postfix(distinct=distinct)
        except ray.exceptions.RayError as error:
            reasons = re.findall(r"^[\w.]+: (.+)$", str(error), re.MULTILINE)  # the last line of a traceback
            reason = reasons[-1] if reasons else type(error).__name__
            raise UserError(f"a worker failed: {reason}. What is scored is kept: the same command goes on") from error
    wrong = [part for part in np.flatnonzero(left) if part not in told or told[part]["rows"] != expected[part]]
    if wrong:
        for part in wrong:
            if job.filesystem().exists(job.path(part)):
                job.filesystem().rm(job.path(part))
        raise UserError(f"{len(wrong)} parts have not the rows they should have: the same command makes them again")
    sums = {name: sum(part[name] for part in told.values()) for name in ("rows", "distinct")}
    started, ended = min(part["started"] for part in told.values()), max(part["ended"] for part in told.values())
    return sums | {"seconds": round(ended - started, 2)}


def _deal(block, job: Job, left: np.ndarray):
    """The block's rows whose part is left to do, with its number."""
    import pyarrow

    parts = job.part_of(buckets(raw_texts(block, job.kind, job.text_column)))
    return block.append_column("part", pyarrow.array(parts)).filter(pyarrow.array(left[parts]))


def _count(table, kind: str, text_column: str) -> np.ndarray:
    """(BUCKETS,) how many rows each has."""
    import pyarrow

    def count(block):
        numbers, rows = np.unique(buckets(raw_texts(block, kind, text_column)), return_counts=True)
        return pyarrow.table({"bucket": numbers, "rows": rows})

    counts = np.zeros(BUCKETS, dtype=np.int64)
    for batch in table.map_batches(count, batch_format="pyarrow", batch_size=None).iter_batches(batch_size=None):
        np.add.at(counts, batch["bucket"], batch["rows"])
    return counts


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
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def _url(url: str):
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(url)
    return filesystem, path.rstrip("/")


def _files(source: str) -> tuple[object, list[str], str]:
    """The file system, the input's files and their kind. UserError where there are none, or of several kinds."""
    fs, path = _url(source)
    found = sorted(name for name in fs.find(path) if not name.rpartition("/")[2].startswith(("_", ".")))
    kinds = {Path(name).suffix for name in found}
    if not found or not kinds <= set(KINDS) or len(kinds) > 1:
        raise UserError(f"{source}: not a file or a folder of files of one kind of {', '.join(KINDS)}")
    return fs, found, kinds.pop()


def _columns(fs, path: str, kind: str) -> list[str]:
    if kind == ".parquet":
        from pyarrow import parquet

        with fs.open(path, "rb") as file:
            return parquet.read_schema(file).names
    if kind == ".csv":
        with fs.open(path, "r", encoding="utf-8", newline="") as file:
            return next(csv.reader(file), [])
    with fs.open(path, "r", encoding="utf-8") as file:
        return list(_parsed(file.readline()))


def _read(ray, fs, files: list[str], kind: str, columns: list[str]):
    """The rows, a CSV's values as the strings they are, of .jsonl the lines: nothing is guessed, or written anew."""
    if kind == ".parquet":
        return ray.data.read_parquet(files, filesystem=fs)
    if kind == ".jsonl":
        return ray.data.read_text(files, filesystem=fs).rename_columns({"text": "line"})
    import pyarrow
    from pyarrow import csv as arrow_csv

    strings = dict.fromkeys(columns, pyarrow.string())
    return ray.data.read_csv(
        files,
        filesystem=fs,
        parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(column_types=strings, strings_can_be_null=False),
    )


def _provenance(run: Path, hosts: tuple[str, ...], engine: str) -> dict:
    """Which model, prompt and calibration answer, through what. UserError where the run or the hosts have no model."""
    name = ollama.model_name(run)
    try:
        if hosts:
            tokens = tuple(export.read_settings(run)["label_tokens"])
            weights = Hosts([ollama.Ollama(host, name, tokens) for host in hosts]).model_served()[1]
        else:
            weights = export.sha256_of(scoring.weights_path(run))
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
        "engine": engine,
    }


def _resumed(out, folder: str, provenance: dict) -> dict | None:
    """What _provenance.json of an earlier start says; None where there was none. UserError where it was another's."""
    out.makedirs(folder, exist_ok=True)
    if not out.exists(f"{folder}/{PROVENANCE}"):
        if out.ls(folder):
            raise UserError(f"{folder} is not empty: name another output")
        return None
    state = json.loads(out.cat_file(f"{folder}/{PROVENANCE}"))
    if changed := [name for name in provenance if state.get(name) != provenance[name]]:
        raise UserError(f"{folder} was begun with another {', '.join(changed)}: name another output")
    return state


def _store(out, folder: str, state: dict) -> None:
    _write_whole(out, f"{folder}/{PROVENANCE}", json.dumps(state, indent=1).encode())


def _write_whole(fs, path: str, content: bytes) -> None:
    """Whole or not at all: under a name that no reader takes for data, then under the right one."""
    unfinished = f"{path.rpartition('/')[0]}/_{uuid.uuid4().hex}"
    fs.pipe_file(unfinished, content)
    fs.mv(unfinished, path)


def main() -> None:
    about, *rest = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m hatespeech.bulk",
        description=about,
        epilog="\n\n".join(rest),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--model-dir", default="results/smollm2-135m", help="a run, in the same place on each machine")
    parser.add_argument(
        "--ollama", metavar="HOST,HOST", help="let these Ollama hosts compute, which have the run's model"
    )
    parser.add_argument("--vllm", action="store_true", help="let vLLM compute: pip install '.[vllm]'")
    parser.add_argument("--gpus-per-worker", type=int, default=1, help="split the model over so many GPUs; with --vllm")
    parser.add_argument("--address", help="of a Ray cluster, or `auto`; without it Ray runs here, for the moment")
    parser.add_argument("--workers", type=int, help="default: one a GPU of the cluster, or else one a CPU")
    parser.add_argument(
        "--rows-per-part", type=int, help="about so many rows a file, which a kill at most costs a worker"
    )
    arguments = parser.parse_args()
    try:
        done = run(
            arguments.input,
            arguments.output,
            text_column=arguments.text_column,
            model_dir=arguments.model_dir,
            hosts=[host for host in (arguments.ollama or "").split(",") if host],
            vllm=arguments.vllm,
            gpus_a_worker=arguments.gpus_per_worker,
            address=arguments.address,
            workers=arguments.workers,
            rows_a_part=arguments.rows_per_part,
        )
    except (UserError, OSError) as error:
        sys.exit(f"bulk: {error}")
    except KeyboardInterrupt:
        sys.exit("bulk: stopped. The same command goes on")
    print(f"{arguments.output}: {sum(done['rows'])} rows in {sum(map(bool, done['rows']))} parts")
    if "scored" in done:
        rows, distinct, seconds = done["scored"].values()
        print(f"scored now: {rows} rows, {distinct} distinct texts, {rows / seconds:.1f} rows/s")


if __name__ == "__main__":
    main()
