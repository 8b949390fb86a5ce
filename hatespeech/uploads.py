"""Files that people give the page to classify: kept in a folder each, classified by table.py in a thread.

A file is for the key it was sent with; who needs no key, being on this machine, sees all. `reader` is the key's sha256,
since a name may be given again.

All that is known of one is on disk, so any process can tell how far it is, and after a restart it goes on from its
journal when it is started again.
"""

import csv
import json
import re
import shutil
import threading
import uuid
from pathlib import Path

from flask import Response, send_file
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import BadRequest, Conflict, NotFound

from hatespeech import UserError, export, table
from hatespeech.ollama import OllamaError
from hatespeech.service import Service

KINDS = (".csv", ".parquet")


class Uploads:
    """folder: where they are."""

    def __init__(self, folder: Path, service: Service):
        self.folder, self.service = folder, service
        self._running: dict[str, threading.Thread] = {}

    def keep(self, sent: FileStorage, reader: str | None) -> str:
        """Keep an uploaded file; returns its name here. BadRequest where it is no table."""
        kind = Path(sent.filename).suffix.lower()
        if kind not in KINDS:
            raise BadRequest(f"a file to classify is {' or '.join(KINDS)}")
        name = uuid.uuid4().hex
        place = self.folder / name
        place.mkdir(parents=True)
        try:
            sent.save(place / f"input{kind}")
            columns = table.columns(place / f"input{kind}")
            about = {"filename": Path(sent.filename).name, "kind": kind, "columns": columns, "api_key": reader}
            export.write_json(place / "about.json", about)
        except (UserError, OSError, ValueError, csv.Error) as error:  # a header that is not UTF-8 is a ValueError
            shutil.rmtree(place)
            words = str(error) if isinstance(error, UserError) else "it can't be read as a table in UTF-8"
            raise BadRequest(words.replace(str(place / f"input{kind}"), sent.filename)) from error
        return name

    def state(self, name: str, reader: str | None) -> dict:
        """filename, columns, column (the chosen one), rows, done, finished, running, wrong (rows, by line), error."""
        place, about = self._place(name, reader)
        journal = place / f"output{about['kind']}.progress"
        finished = (place / f"output{about['kind']}").exists()
        done = max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0
        running = name in self._running and self._running[name].is_alive()
        unknown = {"column": None, "rows": None, "wrong": [], "error": None}
        known = unknown | about | {"name": name, "finished": finished, "running": running}
        return known | {"done": known["rows"] if finished else done}

    def all(self, reader: str | None) -> list[dict]:
        found = [(path.parent.name, json.loads(path.read_text())) for path in self.folder.glob("*/about.json")]
        theirs = [self.state(name, reader) for name, about in found if _may_see(reader, about)]
        return sorted(theirs, key=lambda state: state["filename"])

    def start(self, name: str, column: str, reader: str | None) -> None:
        """Classify the file, or go on with it, in a thread of its own."""
        place, about = self._place(name, reader)
        source, target = place / f"input{about['kind']}", place / f"output{about['kind']}"
        state = self.state(name, reader)
        if state["running"] or target.exists():
            raise Conflict("this file is being classified, or was")
        try:
            about |= {"column": column, "rows": table.count(source, column), "error": None}
        except UserError as error:
            raise BadRequest(str(error).replace(str(source), about["filename"])) from error
        export.write_json(place / "about.json", about)
        if not state["done"]:  # a journal without rows may be of a model that is served no more
            target.with_name(target.name + ".progress").unlink(missing_ok=True)

        def run() -> None:
            try:
                wrong = table.classify(self.service, source, target, column, advance=lambda n: None)
                found = {"wrong": wrong}
            except (UserError, OllamaError, OSError) as error:
                found = {"error": str(error).replace(str(place) + "/", "")}
            export.write_json(place / "about.json", about | found)

        self._running[name] = threading.Thread(target=run, daemon=True, name=f"file {name}")
        self._running[name].start()

    def send(self, name: str, reader: str | None) -> Response:
        place, about = self._place(name, reader)
        path = place / f"output{about['kind']}"
        if not path.exists():
            raise NotFound("this file is not classified yet")
        return send_file(path, as_attachment=True, download_name=f"classified-{about['filename']}")

    def delete(self, name: str, reader: str | None) -> None:
        if self.state(name, reader)["running"]:
            raise Conflict("this file is being classified: wait until it is done")
        shutil.rmtree(self._place(name, reader)[0])

    def _place(self, name: str, reader: str | None) -> tuple[Path, dict]:
        place = self.folder / name
        if re.fullmatch(r"[0-9a-f]{32}", name) and (place / "about.json").exists():
            about = json.loads((place / "about.json").read_text())
            if _may_see(reader, about):
                return place, about
        raise NotFound("there is no such file")


def _may_see(reader: str | None, about: dict) -> bool:
    return reader is None or about.get("api_key") == reader
