"""A file's rows, classified: CSV or Parquet in, the same with columns added out. Killed, it goes on where it was.

Each answer is written to a journal beside the output before the next is waited for. When all rows are in it, the output
is put together from input and journal, whole or not at all, and the journal goes.
"""

import csv
import fcntl
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from hatespeech import UserError, export, task
from hatespeech.service import Service, status_of

ADDED = (
    "label",
    *(f"p_{label.lower()}" for label in task.LABELS),
    "score",
    "confidence",
    "abstain",
    "request_id",
    "error",
)
ROUTE = "classify"  # of these rows in the log


def classify(service: Service, source: Path, target: Path, column: str, *, advance: Callable[[int], None]) -> list[str]:
    """Write target: source's rows and, for each, the service's answer. Returns what was wrong with rows, by line.

    A row without a usable text gets its `error`, and no label. As many are asked at a time as the gate has places.
    advance is told how many rows are done, those of an earlier start at once.
    Raises UserError: no such file or column, target there already, a journal of another input or model, and where
    Ollama or the log fail, which a later start goes on from.
    """
    if target.exists():
        raise UserError(f"{target} is there already: remove it, or name another output")
    read = _reader(source, column)
    journal = target.with_name(target.name + ".progress")
    key = {
        "input_sha256": export.sha256_of(source),
        "column": column,
        "model": service.ollama.digest(),
        "prompt": task.PROMPT_VERSION,
    }
    with open(journal, "a+b") as file, ThreadPoolExecutor(service.gate.places) as pool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another run is writing {target}") from error
        answers = _resume(file, key)
        advance(len(answers))
        pending: deque[tuple[int, int, Future]] = deque()

        def take() -> None:
            number, line, future = pending.popleft()
            try:
                answers[number] = {"line": line, **future.result()}
            except Exception as error:
                for _, _, later in pending:
                    later.cancel()
                reason = status_of(error)[1]
                raise UserError(
                    f"line {line}: {reason}. {len(answers)} rows are kept: the same command goes on"
                ) from error
            _append(file, {"row": number, **answers[number]})
            advance(1)

        for number, (line, text, wrong) in enumerate(read()):
            if number not in answers:
                pending.append((number, line, pool.submit(_answer, service, text, wrong)))
                if len(pending) > service.gate.places:
                    take()
        while pending:
            take()
        _write(source, target, answers)
        journal.unlink()
    return [f"line {answer['line']}: {answer['error']}" for _, answer in sorted(answers.items()) if answer["error"]]


def columns(source: Path) -> list[str]:
    """The names of the file's columns. Raises UserError where it is no table with a header."""
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    if source.suffix == ".parquet":
        try:
            return _parquet().read_schema(source).names
        except ValueError as error:  # pyarrow's own errors are such
            raise UserError(f"{source}: can't be read as Parquet") from error
    with _open(source) as file:
        names = next(csv.reader(file), [])
    if not names:
        raise UserError(f"{source}: is empty, without a header")
    return names


def count(source: Path, column: str) -> int:
    """How many rows the file has. Raises UserError as classify does."""
    return sum(1 for _ in _reader(source, column)())


def _answer(service: Service, text: str | None, wrong: str) -> dict:
    """A row's ADDED. What is the row's own fault becomes its error; the rest is raised."""
    empty = dict.fromkeys(ADDED) | {"error": ""}
    if wrong:
        return empty | {"error": wrong}
    try:
        answer = service.classify((text or "").encode("utf-8", "surrogateescape"), route=ROUTE, patient=True)
    except Exception as error:
        status, reason = status_of(error)
        if status >= 500:
            raise
        return empty | {"error": reason}
    found = {f"p_{label.lower()}": round(p, 6) for label, p in answer.probabilities.items()}
    found |= {"label": answer.label, "score": round(answer.score, 4), "confidence": round(answer.confidence, 6)}
    return empty | found | {"abstain": answer.abstain, "request_id": answer.id}


def _reader(source: Path, column: str) -> Callable[[], Iterator[tuple[int, str | None, str]]]:
    """A function that reads the file anew: (line, text, what is wrong with the row) a row."""
    names = columns(source)
    _check_columns(source, names, column)
    if source.suffix == ".parquet":

        def rows() -> Iterator[tuple[int, str | None, str]]:
            number = 0
            for batch in _parquet().ParquetFile(source).iter_batches(columns=[column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield number, None if text is None else str(text), ""

        return rows
    place = names.index(column)

    def lines() -> Iterator[tuple[int, str | None, str]]:
        for line, fields in _csv_rows(source):
            if len(fields) != len(names):
                yield line, None, f"{len(fields)} fields, where the header has {len(names)}"
            else:
                yield line, fields[place], ""

    return lines


def _check_columns(source: Path, names: list[str], column: str) -> None:
    if column not in names:
        raise UserError(f"{source}: no column {column} (there are: {', '.join(names)}): --text-column NAME")
    if taken := set(names) & set(ADDED):
        raise UserError(f"{source} has columns that would be added: {', '.join(sorted(taken))}; rename them")


def _open(source: Path):
    # Bytes that are no UTF-8 come through as they are: the service refuses their row, and the output keeps them.
    return open(source, newline="", encoding="utf-8", errors="surrogateescape")


def _csv_rows(source: Path) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of each row after the header; empty lines are none."""
    csv.field_size_limit(2**30)
    with _open(source) as file:
        reader = csv.reader(file)
        next(reader)
        line = reader.line_num + 1
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1


def _write(source: Path, target: Path, answers: dict[int, dict]) -> None:
    part = target.with_name(target.name + ".part")
    if source.suffix == ".parquet":
        import pyarrow

        table = _parquet().read_table(source)
        for name in ADDED:
            table = table.append_column(name, pyarrow.array([answers[k][name] for k in range(table.num_rows)]))
        _parquet().write_table(table, part)
    else:
        with _open(source) as file, open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as out:
            names, writer = next(csv.reader(file)), csv.writer(out, lineterminator="\n")
            writer.writerow([*names, *ADDED])
            for number, (_, fields) in enumerate(_csv_rows(source)):
                fields = (fields + [""] * len(names))[: len(names)]
                writer.writerow([*fields, *(answers[number][name] for name in ADDED)])
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, target)


def _resume(file, key: dict) -> dict[int, dict]:
    """The answers a journal holds; its last line may be torn and is cut off. A new journal gets its key."""
    file.seek(0)
    answers, good = {}, 0
    for number, raw in enumerate(file):
        try:
            entry = json.loads(raw) if raw.endswith(b"\n") else None
        except ValueError:
            entry = None
        if entry is None:
            break
        good += len(raw)
        if number:
            answers[entry.pop("row")] = entry
        elif entry != key:
            raise UserError(f"{file.name} is of another input, column or model: remove it to start from the beginning")
    file.truncate(good)
    if not good:
        _append(file, key)
    return answers


def _append(file, entry: dict) -> None:
    file.seek(0, os.SEEK_END)
    file.write(json.dumps(entry).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _parquet():
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise UserError("Parquet needs pyarrow: .venv/bin/pip install pyarrow") from error
    return parquet
