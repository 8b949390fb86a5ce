"""A file's rows, classified by the service: the same rows with columns added. Killed, it goes on where it was.

Each answer is written to a journal beside the output before the next is waited for, in the order of the rows. When all
rows are in it, the output is put together from input and journal, whole or not at all, and the journal goes.
"""

import fcntl
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import BinaryIO

from hatespeech import UserError, answers, tables
from hatespeech.serving.service import Service, status_of
from hatespeech.tables import Table

ROUTE = "classify"  # of these rows in the log


def classify(service: Service, table: Table, target: Path, *, prefix: str = "", advance: Callable[[int], None]) -> dict:
    """Write target: the table's rows and, for each, the service's answer in columns of answers.COLUMNS.

    A row without a usable text gets its `error`, and no label. As many are asked at a time as the gate has slots.
    prefix: before the names of what is added. advance is told how many rows are done, those of an earlier start at
    once. Returns {"rows", "wrong": what was wrong with rows, by line}.
    Raises UserError: target there already or of another kind than the table, a journal of another input or model, and
    where Ollama or the log fail, which a later start resumes after.
    """
    if target.exists():
        raise UserError(f"{target} is there already: remove it, or name another output")
    if tables.ending_of(target.name) != tables.ending_of(table.ending):
        raise UserError(f"{target}: rows are written as they were read: call it {target.stem}{table.ending}")
    with open(journal_of(target), "a+b") as journal, ThreadPoolExecutor(service.gate.slots) as pool:
        _lock(journal, target)
        key = service.provenance() | {"input": tables.content_of(table), "read_as": table.described()}
        key |= {"column": table.text_column, "prefix": prefix}
        n_done = _resume(journal, key)
        advance(n_done)
        pending: deque[tuple[str, Future]] = deque()

        def take() -> None:
            nonlocal n_done
            where, future = pending.popleft()
            try:
                answer = future.result()
            except Exception as error:
                for _, later in pending:
                    later.cancel()
                reason = status_of(error)[1]
                raise UserError(f"{where}: {reason}. {n_done} rows are kept: the same command goes on") from error
            _append(journal, {"where": where, **answer})
            n_done += 1
            advance(1)

        for number, (where, text, error) in enumerate(_rows(table)):
            if number >= n_done + len(pending):
                pending.append((where, pool.submit(_answer, service, text, error)))
                if len(pending) > service.gate.slots:
                    take()
        while pending:
            take()
        wrong = _write(table, target, journal, prefix)
        journal_of(target).unlink()
    return {"rows": n_done, "wrong": wrong}


def classify_lines(service: Service, lines: BinaryIO) -> Iterator[dict]:
    """The columns of each line's answer, in their order, each as soon as it is there, whether or not more lines come.

    lines: a file that is read, and closed, by a thread of its own: reading may wait for ever, and nobody waits for it.
    Raises UserError where Ollama, the log or reading fail.
    """
    pool = ThreadPoolExecutor(service.gate.slots)
    waiting: Queue[Future | Exception | None] = Queue(2 * service.gate.slots)

    def read() -> None:
        end = None
        try:
            with lines:
                for line in lines:
                    waiting.put(pool.submit(_answer_line, service, line))
        except Exception as error:  # noqa: BLE001  raised again below; where an earlier line failed, nobody reads it
            end = error
        waiting.put(end)

    threading.Thread(target=read, daemon=True).start()
    number = 0
    try:
        while (item := waiting.get()) is not None:
            number += 1
            if isinstance(item, Exception):
                raise UserError(f"line {number} can't be read: {item}") from item
            try:
                columns = item.result()
            except Exception as error:
                raise UserError(f"line {number}: {status_of(error)[1]}") from error
            yield columns
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _answer_line(service: Service, line: bytes) -> dict:
    try:
        return _answer(service, line.rstrip(b"\r\n").decode(), "")
    except UnicodeDecodeError:
        return answers.error_columns("it is not UTF-8")


def _lock(journal, target: Path) -> None:
    """Hold the journal, as long as it is open. UserError where another run does; is_running only looks at it."""
    for _ in range(20):
        try:
            return fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
    raise UserError(f"another run is writing {target}")


def journal_of(target: Path) -> Path:
    return target.with_name(target.name + ".progress")


def is_running(target: Path) -> bool:
    """Whether any process is writing target now: it holds a lock on the journal."""
    try:
        with open(journal_of(target), "rb") as journal:
            fcntl.flock(journal, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def n_done(target: Path) -> int:
    """How many rows the journal of an unfinished target holds."""
    try:
        return max(0, journal_of(target).read_bytes().count(b"\n") - 1)
    except FileNotFoundError:
        return 0


def count(table: Table) -> int:
    """How many rows the table has. Reads all of it, and so finds what can't be read before anything is asked.

    Raises UserError where none has a text: then the column is another one.
    """
    n_rows = n_texts = 0
    for rows in table.batches():
        n_rows += len(rows)
        n_texts += len(rows) - rows["text"].null_count
    if n_rows and not n_texts and table.kind == "jsonl":
        raise UserError(
            f"{', '.join(table.files)}: no line has a text in {table.text_column}: say which one holds them"
        )
    return n_rows


def _rows(table: Table) -> Iterator[tuple[str, str | None, str]]:
    """(where it is, text, what is wrong) of each row."""
    for unit in table.units():
        file = f"{Path(table.files[unit[0]]).name}, " if len(table.files) > 1 else ""
        for rows in table.batches(unit):
            for line, text, error in zip(*(rows[name].to_pylist() for name in ("line", "text", "error")), strict=True):
                yield f"{file}line {line}", text, error


def _answer(service: Service, text: str | None, error: str) -> dict:
    """A row's columns. What is the row's own fault becomes its error; the rest is raised."""
    if error:
        return answers.error_columns(error)
    try:
        answer = service.classify((text or "").encode(), route=ROUTE, wait_for_queue=True)
    except Exception as error:
        status, reason = status_of(error)
        if status >= 500:
            raise
        return answers.error_columns(reason)
    return answers.as_columns(answer, answer.request_id)


def _write(table: Table, target: Path, journal, prefix: str) -> list[str]:
    """Put rows and answers together. Returns what was wrong with rows, by line."""
    part, wrong = target.with_name(target.name + ".part"), []
    journal.seek(0)
    next(journal)
    added = {prefix + name: kind for name, kind in answers.COLUMNS.items()}
    with open(part, "wb") as file:
        with tables.writing(table, file, target.name, added) as writer:
            for rows in table.batches():
                entries = [json.loads(next(journal)) for _ in range(len(rows))]
                wrong += [f"{entry['where']}: {entry['error']}" for entry in entries if entry["error"]]
                writer.write(rows, {prefix + name: [entry[name] for entry in entries] for name in answers.COLUMNS})
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, target)
    return wrong


def _resume(journal, key: dict) -> int:
    """How many answers a journal holds; its last line may be torn and is cut off. A new journal gets its key."""
    journal.seek(0)
    n_entries, good = 0, 0
    for number, raw in enumerate(journal):
        try:
            entry = json.loads(raw) if raw.endswith(b"\n") else None
        except ValueError:
            entry = None
        if number == 0 and raw.endswith(b"\n") and not (isinstance(entry, dict) and entry.keys() == key.keys()):
            raise UserError(f"{journal.name} is no journal of this program: remove it, or name another output")
        if not isinstance(entry, dict) or (number and not entry.keys() >= answers.COLUMNS.keys()):
            break
        if number == 0 and entry != key:
            changed = [name for name in key if entry.get(name) != key[name]]
            raise UserError(
                f"{journal.name} was begun with another {', '.join(changed)}: remove it to start from the beginning"
            )
        good += len(raw)
        n_entries = number
    journal.truncate(good)
    if not good:
        _append(journal, key)
    return n_entries


def _append(file, entry: dict) -> None:
    file.seek(0, os.SEEK_END)
    file.write(json.dumps(entry).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())
