"""The real parts that tests share: a real Ollama with the shipped model, a real SQLite file, a real PostgreSQL.

`pytest -m "not ollama and not train"` is the quick step, for whoever changes a route: it needs what `./bootstrap.sh`
installs, pytest and hypothesis, and no Ollama. What then asks `client` for an answer gets it from a stand-in.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from flask.cli import ScriptInfo
from pyarrow import parquet
from sqlalchemy import create_engine, text

from app import create_app
from hatespeech import cli, runs
from hatespeech.ollama import Ollama, private_server
from hatespeech.runs import model_name
from tests.stand_in import StandIn

ROOT = Path(__file__).parent.parent
BASE = ROOT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
RUN = ROOT / "results" / "smollm2-135m"
os.environ["PATH"] = f"{ROOT}/.cache/ollama/bin:{os.environ['PATH']}"


DATA = ROOT / "tests" / "data"
TRAIN, TEST, ANNOTATIONS = (DATA / f"{name}.parquet" for name in ("train", "test", "annotations"))
# What needs more than the base install, where only that is there.
NEED_TRAINING = ["training/*", "bulk/*", "benchmarks/*", "test_packing.py", "test_readme.py"]
collect_ignore_glob = [] if importlib.util.find_spec("torch") else NEED_TRAINING


def is_quick(config) -> bool:
    return "not ollama" in (config.option.markexpr or "")


def pytest_collection_modifyitems(config, items) -> None:
    """What needs a real Ollama, or the train extra, says so by its fixtures or its folder; `long` waits to be asked."""
    for item in items:
        folder = item.path.parent.name
        if {"ollama_host", "server", "create", "scratch"} & set(item.fixturenames):
            item.add_marker("ollama")
        needs_training = folder in ("training", "bulk") or item.path.name in NEED_TRAINING
        if needs_training or {"tokenizer", "base_gguf"} & set(item.fixturenames):
            item.add_marker("train")
    if "long" not in (config.option.markexpr or ""):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]


def some_texts(n: int | None = None) -> list[str]:
    """The first n of the test comments' texts."""
    return parquet.read_table(TEST, columns=["text"])["text"].to_pylist()[:n]


def command(client, *words: str, **more):
    """The result of `hatespeech words ...`, run on a test client's app."""
    app = client.application
    return CliRunner().invoke(cli.main, words, obj=ScriptInfo(create_app=lambda: app), **more)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def base_gguf() -> Path:
    assert BASE.exists(), f"{BASE} is missing: ./bootstrap.sh test fetches it"
    return BASE


@pytest.fixture(scope="session")
def tokenizer(base_gguf):
    from hatespeech import tokens

    return tokens.load_tokenizer(str(base_gguf))


@pytest.fixture(scope="session")
def ollama_host(tmp_path_factory):
    """An Ollama of the tests' own, host:port: of the command on the PATH, or of TESTS_OLLAMA."""
    command = os.environ.get("TESTS_OLLAMA", "ollama")
    assert shutil.which(command), "no ollama command: ./bootstrap.sh test gets it"
    with private_server(tmp_path_factory.mktemp("ollama"), command) as host:
        yield host


@pytest.fixture(scope="session")
def create(ollama_host):
    """create(run): give a run's folder to the tests' Ollama, as bootstrap.sh does, and return its client."""

    def create(run: Path, name: str | None = None) -> Ollama:
        name = name or model_name(run)
        command = ["ollama", "create", name, "-f", str(run / "Modelfile")]
        subprocess.run(command, env=os.environ | {"OLLAMA_HOST": ollama_host}, check=True, capture_output=True)
        return Ollama(ollama_host, name, tuple(runs.read_settings(run)["label_tokens"]), timeout_s=60)

    return create


@pytest.fixture(scope="session")
def run(request, tmp_path_factory) -> Path:
    """A copy of the shipped run, with its model.gguf: bootstrap.sh's, or made as it makes it. Quick: without one."""
    folder = tmp_path_factory.mktemp("results") / RUN.name
    shutil.copytree(RUN, folder, ignore=shutil.ignore_patterns("model.gguf*"))
    if is_quick(request.config):
        return folder
    from hatespeech.training import export

    base_gguf = request.getfixturevalue("base_gguf")
    if (RUN / "model.gguf").exists():
        (folder / "model.gguf").symlink_to(RUN / "model.gguf")
    export.complete(folder, base_gguf)
    return folder


@pytest.fixture(scope="session")
def server(create, run) -> Ollama:
    """The shipped model, served."""
    client = create(run)
    client.preload()
    return client


@pytest.fixture
def make_client(run, tmp_path):
    """make_client(host, **config): a test client of the app with a SQLite file of its own, at client.database."""

    def make(host: str, **config):
        database = tmp_path / "requests.sqlite3"
        settings = {"MODEL_DIR": str(run), "OLLAMA_HOST": host, "DATABASE_URL": f"sqlite:///{database}"}
        settings["UPLOADS_DIR"] = str(tmp_path / "files")
        client = create_app(settings | config).test_client()
        client.database = database
        return client

    return make


@pytest.fixture
def client(make_client, request):
    """A client of the app before the tests' Ollama; in the quick step, before a stand-in."""
    if is_quick(request.config):
        return make_client(request.getfixturevalue("stand_in").host)
    request.getfixturevalue("server")
    return make_client(request.getfixturevalue("ollama_host"), OLLAMA_TIMEOUT_S=60)  # however busy this machine is


INITDB = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


@contextmanager
def postgres_server() -> Iterator[str]:
    """A PostgreSQL server from Debian's package, with a cluster of its own; its URL."""
    user = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}  # initdb refuses root
    folder, port = Path(tempfile.mkdtemp(prefix="hatespeech-pg-")), free_port()
    if user:
        shutil.chown(folder, **user)
    tool = {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL, **user}
    subprocess.run([INITDB[-1], "-D", folder / "data", "-U", "tests", "-A", "trust"], **tool)
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c max_connections=200"
    control = INITDB[-1].with_name("pg_ctl")
    subprocess.run([control, "-D", folder / "data", "-l", folder / "log", "-o", options, "-w", "start"], **tool)
    yield f"postgresql://tests@127.0.0.1:{port}/postgres"
    subprocess.run([control, "-D", folder / "data", "-m", "immediate", "stop"], **tool)
    shutil.rmtree(folder)


def restart_postgres(url: str) -> None:
    """A crash and a new start of postgres_server's."""
    with create_engine(url.replace("postgresql:", "postgresql+psycopg:")).connect() as connection:
        data = Path(connection.execute(text("SHOW data_directory")).scalar_one())
    user = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
    command = [
        INITDB[-1].with_name("pg_ctl"),
        "-D",
        data,
        "-l",
        data.parent / "log",
        "-m",
        "immediate",
        "-w",
        "restart",
    ]
    subprocess.run(command, cwd=data.parent, check=True, stdout=subprocess.DEVNULL, **user)


@pytest.fixture(scope="session")
def postgres():
    if not INITDB:
        pytest.skip("no PostgreSQL server here: apt-get install postgresql")
    with postgres_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/requests.sqlite3"
    url = request.getfixturevalue("postgres").replace("postgresql:", "postgresql+psycopg:")
    name = f"t{time.monotonic_ns()}"
    with create_engine(url, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    return url.replace("/postgres", f"/{name}")


@pytest.fixture
def stand_in():
    with StandIn.running() as server:
        yield server
