"""The real parts that tests share: a real Ollama with the shipped model, a real SQLite file."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from app import create_app
from hatespeech import runs, tokens
from hatespeech.ollama import Ollama, private_server
from hatespeech.runs import model_name
from hatespeech.training import export

ROOT = Path(__file__).parent.parent
BASE = ROOT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
RUN = ROOT / "results" / "smollm2-135m"
os.environ["PATH"] = f"{ROOT}/.cache/ollama/bin:{os.environ['PATH']}"


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

    return tokens.load_tokenizer(str(base_gguf))


@pytest.fixture(scope="session")
def ollama_host(tmp_path_factory):
    """An Ollama of the tests' own: host:port."""
    assert shutil.which("ollama"), "no ollama command: ./bootstrap.sh test gets it"
    with private_server(tmp_path_factory.mktemp("ollama")) as host:
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
def run(base_gguf, tmp_path_factory) -> Path:
    """A copy of the shipped run, with its model.gguf: bootstrap.sh's, or made as it makes it."""
    folder = tmp_path_factory.mktemp("results") / RUN.name
    shutil.copytree(RUN, folder, ignore=shutil.ignore_patterns("model.gguf*"))
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
def client(make_client, server, ollama_host):
    return make_client(ollama_host)


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


class StandIn(ThreadingHTTPServer):
    """Answers as an Ollama would that has gone wrong: only for faults the real one won't show on demand."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.host = f"127.0.0.1:{self.server_port}"
        self.status, self.body, self.delay_s = 200, b"{}", 0.0


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        models = [{"name": f"{model_name(RUN)}:latest", "digest": "0" * 64}]
        self.reply(200, json.dumps({"models": models, "version": "0.24.0"}).encode())

    def do_POST(self):
        if self.path == "/api/show":
            return self.reply(200, json.dumps({"modelfile": f"FROM /models/sha256-{'0' * 64}"}).encode())
        time.sleep(self.server.delay_s)
        self.reply(self.server.status, self.server.body)

    def reply(self, status: int, body: bytes):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def stand_in():
    server = StandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
