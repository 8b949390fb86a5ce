"""Files that people give the page to classify: kept in a folder each, classified by files.py in a thread.

A file is for the key it was sent with; who needs no key, being on this machine, sees all. `reader` is the key's sha256,
since a name may be given again.

All that is known of one is on disk, so any process can tell how far it is, and after a restart it goes on from its
journal when it is started again.
"""

import json
import logging
import re
import shutil
import threading
import time
import uuid
from pathlib import Path

from flask import Response, send_file
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import BadRequest, Conflict, Forbidden, NotFound

from hatespeech import UserError, answers, runs, tables
from hatespeech.ollama import OllamaError
from hatespeech.serving import files
from hatespeech.serving.service import Service, status_of
from hatespeech.tables import Table

# How many rows' errors the page keeps; the file itself has all.
MAX_ERRORS_KEPT = 1_000
# How a file is read, where the page is to know better than what is found out.
READING = ("delimiter", "encoding", "prefix")


class Uploads:
    """folder: where they are. keeps_texts: False where the log keeps none (LOG_TEXT): then no file is taken."""

    def __init__(self, folder: Path, service: Service, keeps_texts: bool = True):
        self.folder, self.service, self.keeps_texts = folder, service, keeps_texts
        for left in folder.glob(".*"):  # by a process that was killed while a file came; nobody else's
            ours = re.fullmatch(r"\.[0-9a-f]{32}", left.name) and left.is_dir() and not left.is_symlink()
            if ours and time.time() - left.stat().st_mtime > 24 * 3600:
                shutil.rmtree(left, ignore_errors=True)
        self._lock = threading.Lock()  # of two starts at once, one runs

    def keep(self, sent: FileStorage, reader: str | None) -> str:
        """Keep an uploaded file; returns its name here. BadRequest where its name is no table's."""
        filename = re.sub(r"[\x00-\x1f\x7f]", "_", Path(sent.filename).name).encode("utf-8", "replace").decode()
        if not self.keeps_texts:
            raise Forbidden("LOG_TEXT says that no text is kept here, and a file would be: classify it in the shell")
        if tables.ending_of(filename.lower()) is None:
            raise BadRequest(f"a file to classify is one of {', '.join(tables.KINDS)}; a .csv or .jsonl also with .gz")
        name = uuid.uuid4().hex
        # Under a name that is not looked for until all is there, so that nobody sees half of it.
        unfinished = self.folder / f".{name}"
        self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        unfinished.mkdir(mode=0o700)
        try:
            sent.save(unfinished / f"input{tables.whole_ending(filename.lower())}")
            runs.write_json(unfinished / "about.json", {"filename": filename, "api_key": reader})
            unfinished.rename(self.folder / name)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        return name

    def state(self, name: str, reader: str | None) -> dict:
        """filename, columns and how it is read (or why it can't be), column (the chosen one), rows, done, finished,
        running, wrong (rows, by line), n_wrong, error."""
        folder, about = self._folder(name, reader)
        target = _target(folder)
        unknown = {"column": "text", "rows": None, "wrong": [], "n_wrong": None, "error": None}
        unknown |= {"delimiter": None, "encoding": None, "prefix": "", "columns": [], "read_as": ""}
        known = unknown | about | {"name": name}
        known |= {"finished": target.exists(), "running": files.is_running(target)}
        known["done"] = known["rows"] if known["finished"] else files.n_done(target)
        if not known["finished"] and not known["running"]:
            known |= _columns(folder, known)
        del known["api_key"]
        return known

    def all(self, reader: str | None) -> list[dict]:
        """filename, name, rows, done and finished of each file that the reader may see."""
        found = []
        for path in self.folder.glob("[!.]*/about.json"):
            about = json.loads(path.read_text())
            if _may_see(reader, about):
                target = _target(path.parent)
                rows, finished = about.get("rows"), target.exists()
                done = rows if finished else files.n_done(target)
                about = {"filename": about["filename"], "name": path.parent.name, "rows": rows, "done": done}
                found.append(about | {"finished": finished})
        return sorted(found, key=lambda about: about["filename"])

    def start(self, name: str, column: str, reading: dict[str, str], reader: str | None) -> None:
        """Classify the file, or resume it, in a thread of its own. reading: of READING, empty to find out."""
        folder, about = self._folder(name, reader)
        target = _target(folder)
        with self._lock:
            if files.is_running(target) or target.exists():
                raise Conflict("this file is being classified, or was")
            about |= {"column": column, "error": None, **reading}
            try:
                table = _table(folder, about, column)
                about["rows"] = files.count(table)
            except UserError as error:
                raise BadRequest(_without_path(error, folder, about)) from error
            runs.write_json(folder / "about.json", about)
            if not files.n_done(target):  # a journal without rows may be of a model that is served no more
                files.journal_of(target).unlink(missing_ok=True)
            arguments = (folder, about, table, target)
            threading.Thread(target=self._run, args=arguments, daemon=True, name=f"file {name}").start()
            for _ in range(100):  # until its lock tells other requests, and other processes, that it runs
                if files.is_running(target) or target.exists():
                    break
                time.sleep(0.02)

    def read_again(self, name: str, reading: dict[str, str], reader: str | None) -> None:
        """Keep how the file is to be read, before a column is chosen."""
        folder, about = self._folder(name, reader)
        runs.write_json(folder / "about.json", about | reading)

    def _run(self, folder: Path, about: dict, table: Table, target: Path) -> None:
        try:
            prefix = about.get("prefix", "")
            wrong = files.classify(self.service, table, target, prefix=prefix, advance=lambda n: None)["wrong"]
            found = {"wrong": wrong[:MAX_ERRORS_KEPT], "n_wrong": len(wrong)}
        except (UserError, OllamaError, OSError) as error:
            found = {"error": _without_path(error, folder, about) if folder.exists() else ""}
        except Exception as error:  # noqa: BLE001  whatever it is, who waits for the file is told
            logging.getLogger("app").error("unexpected %s in classifying a file", type(error).__name__)
            found = {"error": status_of(error)[1]}
        if folder.exists():
            runs.write_json(folder / "about.json", about | found)

    def send(self, name: str, reader: str | None) -> Response:
        folder, about = self._folder(name, reader)
        path = _target(folder)
        if not path.exists():
            raise NotFound("this file is not classified yet")
        return send_file(path, as_attachment=True, download_name=f"classified-{about['filename']}")

    def delete(self, name: str, reader: str | None) -> None:
        shutil.rmtree(self._idle_folder(name, reader))

    def forget_answers(self, name: str, reader: str | None) -> None:
        """Begin from the beginning, where what is done was of another model or column."""
        files.journal_of(_target(self._idle_folder(name, reader))).unlink(missing_ok=True)

    def _idle_folder(self, name: str, reader: str | None) -> Path:
        folder, _ = self._folder(name, reader)
        if files.is_running(_target(folder)):
            raise Conflict("this file is being classified: wait until it is done")
        return folder

    def _folder(self, name: str, reader: str | None) -> tuple[Path, dict]:
        folder = self.folder / name
        if re.fullmatch(r"[0-9a-f]{32}", name) and (folder / "about.json").exists():
            about = json.loads((folder / "about.json").read_text())
            if _may_see(reader, about):
                return folder, about
        raise NotFound("there is no such file")


def _may_see(reader: str | None, about: dict) -> bool:
    return reader is None or about.get("api_key") == reader


def _source(folder: Path) -> Path:
    return next(folder.glob("input.*"))


def _target(folder: Path) -> Path:
    return folder / _source(folder).name.replace("input", "output", 1)


def _table(folder: Path, about: dict, column: str) -> Table:
    added = [about.get("prefix", "") + name for name in answers.COLUMNS]
    reading = {"delimiter": about.get("delimiter") or None, "encoding": about.get("encoding") or None}
    return tables.open_table(str(_source(folder)), text_column=column, added=added, **reading)


def _columns(folder: Path, about: dict) -> dict:
    """The file's columns and how it is read; or why it can't be, as `error`."""
    try:
        columns, read_as = tables.columns_of(
            str(_source(folder)), delimiter=about["delimiter"] or None, encoding=about["encoding"] or None
        )
        return {"columns": columns, "read_as": read_as}
    except UserError as error:
        return {"error": about["error"] or _without_path(error, folder, about)}


def _without_path(error: Exception, folder: Path, about: dict) -> str:
    source = _source(folder)
    words = str(error).replace(str(source), about["filename"]).replace(source.name, about["filename"])
    return words.replace(f"{folder}/", "")
