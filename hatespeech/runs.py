"""A run's folder, `results/<run>/`: all that training hands to serving. Written whole or not at all."""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hatespeech import UserError


def model_name(run: Path) -> str:
    """The name under which bootstrap.sh gives a run to Ollama: results/smollm2-135m -> hatespeech-smollm2-135m."""
    return "hatespeech-" + re.sub(r"[^a-z0-9._-]+", "-", run.resolve().name.lower())


def checkpoint_name(member: int) -> str:
    """The file of a member's progress (checkpoint.py) in the folder of an unfinished run."""
    return f"checkpoint{member}.pt"


@contextmanager
def run_folder(folder: Path) -> Iterator[Path]:
    """Work in `<folder>.incomplete`, which becomes `<folder>` when all is written and stays visible when not.

    What an unfinished run left there goes, but for its checkpoints.

    Raises UserError where the folder exists, or where another run is writing it.
    """
    if folder.exists():
        raise UserError(f"{folder} holds a finished run: choose another --output, or remove it")
    work = folder.with_name(folder.name + ".incomplete")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another run is writing {work}: wait for it, or choose another --output") from error
        checkpoints = list(work.glob("checkpoint*.pt"))
        leftovers = [path for path in work.iterdir() if path.name != ".lock" and path not in checkpoints]
        for path in leftovers:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if checkpoints:
            print(f"{work} is left from a run that did not finish: its checkpoint stays")
        elif leftovers:
            print(f"{work} is left from a run that did not finish: starting it again")
        try:
            yield work
        except BaseException:
            if [path.name for path in work.iterdir()] == [".lock"]:  # refused before anything was made
                shutil.rmtree(work)
            raise
        for path in work.glob("checkpoint*.pt"):
            path.unlink()
        (work / ".lock").unlink()
        work.rename(folder)


def read_settings(run: Path) -> dict:
    """A run's settings.json: its base, label_tokens, class_scores and how it was made. UserError where it is no run."""
    try:
        settings = json.loads((run / "settings.json").read_text())
        return settings | {name: settings[name] for name in ("base", "label_tokens", "class_scores")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run} is no finished run: its settings.json can't be used ({error!r})") from error


def write_json(path: Path, value: object) -> None:
    """Whole or not at all. Raises ValueError for what is no text, a lone surrogate."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
