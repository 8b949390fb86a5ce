"""What `hatespeech doctor` finds: installation, settings, the run, the engine, the log and the service."""

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import requests
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from hatespeech import UserError, __version__, runs
from hatespeech.calibration import Calibration
from hatespeech.ollama import Ollama, OllamaError
from hatespeech.serving import auth, settings
from hatespeech.serving.settings import Settings
from hatespeech.serving.store import Store, without_secrets
from hatespeech.training import checks


@dataclass(frozen=True)
class Finding:
    """remedy: what to do, or what could be done; may be empty."""

    fine: bool
    what: str
    remedy: str = ""


def findings() -> Iterator[Finding]:
    """One after the other, as they are found; where one is wrong, what rests on it is not looked at."""
    python = f"Python {platform.python_version()} in {sys.prefix}"
    extras = {"train": find_spec("unsloth"), "bulk": find_spec("ray"), "test": find_spec("schemathesis")}
    there = [name for name, spec in extras.items() if spec]
    yield Finding(True, f"hatespeech {__version__}, {python}; extras: {', '.join(there) or 'none'}")
    try:
        chosen = settings.read()
    except UserError as error:
        yield Finding(False, f"settings: {error.message}", "mend it in the environment; ./bootstrap.sh --help has all")
        return
    yield Finding(True, "settings are read")
    yield from _of_the_run(chosen)
    yield from _of_the_log(chosen)
    yield _of_the_service(chosen)


def _of_the_run(chosen: Settings) -> Iterator[Finding]:
    """The model's folder, its gates, and each Ollama that is to serve it."""
    folder = chosen.model_dir
    try:
        run = runs.read_settings(folder)
    except UserError as error:
        yield Finding(False, f"model: {error.message}", "set MODEL_DIR to a folder that python -m train made")
        return
    yield Finding(True, f"model: {runs.model_name(folder)}")
    if not (folder / "model.gguf").exists():
        yield Finding(
            True, f"{folder} has no model.gguf: Ollama must have the model already", "./bootstrap.sh makes it"
        )
    yield from _gates(folder)
    timeouts = (chosen.ollama_timeout_s, chosen.ollama_load_timeout_s)
    for host in chosen.hosts:
        yield _engine(Ollama(host, runs.model_name(folder), tuple(run["label_tokens"]), *timeouts), folder)


def _gates(folder: Path) -> Iterator[Finding]:
    """A gate that was not passed is a fact about the model, which is served all the same."""
    try:
        _, results = checks.of_run(folder)
    except UserError as error:
        yield Finding(False, f"gates: {error.message}", f"python -m train --evaluate-only --output {folder}")
        return
    yield Finding(True, f"gates: {sum(result['passed'] for result in results)} of {len(results)} passed")
    for result in results:
        if not result["passed"]:
            yield Finding(True, f"gates: {checks.sentence(result)}")


def _engine(ollama: Ollama, folder: Path) -> Finding:
    try:
        version = ollama.version()
        _, why_not = Calibration.for_weights(Calibration.of_run(folder), ollama.weights_sha256())
    except OllamaError as error:
        return Finding(False, f"engine: {error}", "./bootstrap.sh starts Ollama and gives it the model")
    except (UserError, ValueError) as error:
        return Finding(False, f"{folder}/calibration.json: {error}", "git checkout it, or train anew")
    if why_not:
        remedy = f"python -m train --evaluate-only --output {folder}, while it is served"
        return Finding(False, f"engine: Ollama {version} at {ollama.url}, uncalibrated: {why_not}", remedy)
    return Finding(True, f"engine: Ollama {version} at {ollama.url} has the model, and its calibration fits")


def _of_the_log(chosen: Settings) -> Iterator[Finding]:
    remedy = "is the database there, and DATABASE_URL right?"
    try:
        url = make_url(chosen.database_url)
        shown = without_secrets(url)
    except (ArgumentError, ValueError):
        yield Finding(False, "log: DATABASE_URL is no address of a database", remedy)
        return
    keys = []
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        yield Finding(True, f"log: {url.database} will be made at the first start")
    else:
        try:
            store = Store(chosen.database_url, chosen.log_text, chosen.log_hash_key)
            store.check()
            keys = store.api_keys()
        except Exception as error:  # noqa: BLE001  whatever a driver raises; its words may hold a password
            what = "can't be opened" if isinstance(error, UserError) else type(error).__name__
            yield Finding(False, f"log: {shown}: {what}", remedy)
            return
        yield Finding(True, f"log: {shown}; {len(keys)} API key{'s' * (len(keys) != 1)}")
    if auth.demands_keys(chosen) and not keys:
        yield Finding(False, "keys: others can reach the service, and there is none", "hatespeech keys create NAME")


def _of_the_service(chosen: Settings) -> Finding:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(chosen.host, chosen.host)
    address = f"http://{f'[{host}]' if ':' in host else host}:{os.environ.get('PORT') or 5000}"
    with requests.Session() as session:
        session.trust_env = False  # a proxy from the environment is not asked
        try:
            answered = session.get(f"{address}/healthcheck", timeout=chosen.ollama_timeout_s + 2, allow_redirects=False)
        except requests.Timeout:
            return Finding(False, f"service: {address} does not answer in time", "its own log says why")
        except (requests.exceptions.InvalidURL, ValueError):
            return Finding(
                False, f"service: {address} is no address", "set HOST and PORT as ./bootstrap.sh --help says"
            )
        except requests.ConnectionError:
            return Finding(True, f"service: none at {address}", "./bootstrap.sh starts it")
        except requests.RequestException as error:
            return Finding(False, f"service: what is at {address} is none ({type(error).__name__})", "set another PORT")
    if answered.status_code != 200:
        return Finding(False, f"service: {address} says {answered.status_code}", "its own log says why")
    if answered.text != "OK":
        return Finding(False, f"service: what answers at {address} is another", "set another PORT")
    return Finding(True, f"service: {address} answers")
