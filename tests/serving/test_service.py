"""The promises of the service under load, kills and full disks: a real gunicorn, Ollama, SQLite and PostgreSQL."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from hatespeech.serving.service import Busy, Gate
from hatespeech.serving.store import ANSWERED, Store
from tests.conftest import INITDB, ROOT, free_port, postgres_server, restart_postgres


class App:
    """The app under gunicorn, as bootstrap.sh starts it."""

    def __init__(self, run: Path, ollama_host: str, database_url: str, **environment: str):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = os.environ | environment | {
            "MODEL_DIR": str(run),
            "OLLAMA_HOST": ollama_host,
            "DATABASE_URL": database_url,
        }  # fmt: skip

    def start(self) -> None:
        arguments = [
            "-c",
            "python:hatespeech.serving.gunicorn_conf",
            "--bind",
            f"127.0.0.1:{self.port}",
            "app:create_app()",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *arguments], cwd=ROOT, env=self.environment, start_new_session=True
        )
        for _ in range(200):
            try:
                requests.get(f"{self.url}/openapi.json", timeout=5)
                return
            except requests.ConnectionError:
                time.sleep(0.05)
        raise AssertionError("gunicorn does not answer")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def infer(self, text: str, **more) -> requests.Response:
        return requests.post(f"{self.url}/infer", data=text.encode(), **({"timeout": 60} | more))


@pytest.fixture
def start(run, ollama_host, server, tmp_path):
    """start(url, **environment): an App, running; killed afterwards."""
    apps = []

    def start(url: str = f"sqlite:///{tmp_path}/requests.sqlite3", host: str = ollama_host, **environment: str) -> App:
        app = App(run, host, url, **environment)
        apps.append(app)
        app.start()
        return app

    yield start
    for app in apps:
        if app.process.poll() is None:
            app.kill()


def test_the_gate_lets_in_so_many_queues_so_many_and_refuses_the_rest():
    gate, release = Gate(slots=2, queue=1, timeout_s=5), threading.Event()

    def enter() -> str:
        try:
            with gate.slot():
                release.wait(5)
                return "in"
        except Busy:
            return "busy"

    with ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(enter) for _ in range(5)]
        while sum(future.done() for future in waiting) < 2:
            time.sleep(0.01)
        assert (gate.inside, gate.waiting) == (2, 1)
        release.set()
        assert Counter(future.result() for future in waiting) == {"in": 3, "busy": 2}
    assert (gate.inside, gate.waiting) == (0, 0)


def test_the_gate_gives_up_on_a_place_in_time():
    gate = Gate(slots=1, queue=1, timeout_s=0.1)
    with gate.slot(), pytest.raises(Busy, match=r"within 0\.1 s"), gate.slot():
        pass
    with gate.slot():
        pass


@pytest.mark.slow
def test_a_request_is_logged_answered_and_corrected_in_either_database(start, database_url):
    app = start(database_url)
    answer = app.infer("ünïcode 😀 text", headers={"Accept": "application/json"}).json()
    assert app.infer("a\0b").status_code == 400
    assert requests.post(f"{app.url}/feedback", json={"id": answer["id"], "label": "Hate"}).status_code == 204
    store = Store(database_url)
    refused, answered = store.latest()
    assert (answered.id, answered.text, answered.status) == (answer["id"], "ünïcode 😀 text", ANSWERED)
    assert answered.p_hate == pytest.approx(answer["probabilities"]["Hate"])
    assert (refused.status, refused.text) == ("refused", r"a\x00b")
    assert [said.label for _, said in store.newest_feedback()] == ["Hate"]


@pytest.mark.slow
def test_several_processes_share_one_database(start, database_url):
    apps = [start(database_url) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda i: apps[i % 2].infer(f"text {i}"), range(24)))
    assert {response.status_code for response in responses} == {200}
    assert {row.id for row in Store(database_url).latest(100)} == {r.headers["X-Answer-Id"] for r in responses}


@pytest.mark.slow
@pytest.mark.parametrize("n_kills", [5, pytest.param(20, marks=pytest.mark.long)])
def test_kill_9_of_the_app_loses_no_acknowledged_request(start, tmp_path, n_kills):
    app, acknowledged, lock = start(), [], threading.Lock()
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                response = app.infer("some text")
            except requests.RequestException:
                time.sleep(0.02)
                continue
            if response.status_code == 200:
                with lock:
                    acknowledged.append((response.headers["X-Answer-Id"], response.text))

    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(client)
        for kill in range(n_kills):
            seen = len(acknowledged)
            while len(acknowledged) < seen + 3:
                time.sleep(0.02)
            app.kill()
            if kill < n_kills - 1:
                app.start()
        stop.set()
    store = Store(f"sqlite:///{tmp_path}/requests.sqlite3")  # as the next start does, it marks what was interrupted
    rows = {row.id: row for row in store.latest(1_000_000)}
    assert all(rows[id].status == ANSWERED and rows[id].label == label for id, label in acknowledged)
    statuses = Counter(row.status for row in rows.values())
    assert statuses["received"] == 0
    assert statuses["interrupted"] > 0
    print(f"\n{n_kills} kills: {len(acknowledged)} acknowledged, 0 lost; rows: {dict(statuses)}")


@pytest.mark.slow
@pytest.mark.parametrize("n_kills", [5, pytest.param(20, marks=pytest.mark.long)])
def test_kill_9_of_ollama_is_503_and_heals_without_a_restart(start, run, tmp_path, n_kills):
    host = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"OLLAMA_HOST": host, "OLLAMA_MODELS": str(tmp_path / "models")}
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    ollama = subprocess.Popen(["ollama", "serve"], **quiet)
    create = ["ollama", "create", "hatespeech-smollm2-135m", "-f", str(run / "Modelfile")]
    while subprocess.run(create, **quiet).returncode:
        time.sleep(0.2)
    app = start(host=host, OLLAMA_TIMEOUT_S="10")
    assert app.infer("some text").status_code == 200

    def kill() -> None:
        for process in [*psutil.Process(ollama.pid).children(recursive=True), psutil.Process(ollama.pid)]:
            process.kill()
        ollama.wait()

    answered = 1
    for _ in range(n_kills):
        with ThreadPoolExecutor(4) as pool:
            # Long, and none begins as another: still at Ollama when it dies.
            pending = [pool.submit(app.infer, f"{word} text " * 600) for word in ("some", "more", "such", "that")]
            time.sleep(0.3)
            started = time.monotonic()
            kill()
            statuses = Counter(future.result().status_code for future in pending)
        assert time.monotonic() - started < 15
        assert set(statuses) <= {200, 503}
        assert statuses[503] > 0
        answered += statuses[200] + 1
        assert app.infer("some text").status_code == 503
        assert requests.get(f"{app.url}/healthcheck").status_code == 503

        ollama = subprocess.Popen(["ollama", "serve"], **quiet)
        deadline = time.monotonic() + 30
        while requests.get(f"{app.url}/healthcheck").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert app.infer("some text").status_code == 200
    kill()
    logged = Counter(row.status for row in Store(f"sqlite:///{tmp_path}/requests.sqlite3").latest(1000))
    assert logged[ANSWERED] == answered
    print(f"\n{n_kills} kills of Ollama: {answered} answered, 0 lost; rows: {dict(logged)}")


@pytest.mark.slow
@pytest.mark.parametrize("n_kills", [5, pytest.param(20, marks=pytest.mark.long)])
def test_kill_9_of_ollamas_helper_heals_by_itself(start, run, tmp_path, n_kills):
    """llama-server, which Ollama starts for a model: Ollama lives on and starts it again."""
    host = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"OLLAMA_HOST": host, "OLLAMA_MODELS": str(tmp_path / "models")}
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    ollama = subprocess.Popen(["ollama", "serve"], start_new_session=True, **quiet)
    try:
        create = ["ollama", "create", "hatespeech-smollm2-135m", "-f", str(run / "Modelfile")]
        while subprocess.run(create, **quiet).returncode:
            time.sleep(0.2)
        app = start(host=host)
        answered = 0
        for _ in range(n_kills):
            deadline = time.monotonic() + 60
            while app.infer("some text").status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            answered += 1
            for helper in psutil.Process(ollama.pid).children(recursive=True):
                helper.kill()
            started = time.monotonic()
            status = app.infer("some text").status_code
            assert status in (200, 503)
            answered += status == 200
            assert time.monotonic() - started < 15
            assert requests.get(f"{app.url}/metrics", timeout=1).status_code == 200
        logged = Counter(row.status for row in Store(f"sqlite:///{tmp_path}/requests.sqlite3").latest(1000))
        assert logged[ANSWERED] == answered
        print(f"\n{n_kills} kills of the helper: {answered} answered, 0 lost; rows: {dict(logged)}")
    finally:
        os.killpg(ollama.pid, signal.SIGKILL)
        ollama.wait()


@pytest.mark.slow
def test_a_log_that_may_only_be_read_is_503_and_health_says_so(start, tmp_path):
    """SQLite's query_only stands in for a file system that went read-only under it."""
    app = start()
    assert app.infer("some text").status_code == 200
    app.kill()
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nfrom sqlalchemy import event\nfrom sqlalchemy.engine import Engine\n"
        "@event.listens_for(Engine, 'begin')\n"
        f"def read_only(connection):\n    if os.path.exists('{tmp_path}/read-only'):\n"
        "        connection.exec_driver_sql('PRAGMA query_only=1')\n"
    )
    app = start(PYTHONPATH=str(tmp_path))
    (tmp_path / "read-only").touch()
    refused = app.infer("some text")
    assert (refused.status_code, "nothing is answered unlogged" in refused.text) == (503, True)


@pytest.mark.slow
def test_postgresql_restarted_under_load_loses_nothing_and_heals(start):
    if not INITDB:
        pytest.skip("no PostgreSQL server here: apt-get install postgresql")
    with postgres_server() as url:
        app, acknowledged, stop = start(url), [], threading.Event()

        def client() -> None:
            while not stop.is_set():
                answer = app.infer("some text")
                assert answer.status_code in (200, 503), answer.text
                if answer.status_code == 200:
                    acknowledged.append(answer.headers["X-Answer-Id"])
                else:
                    time.sleep(0.1)

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client) for _ in range(4)]
            for _ in range(2):
                wanted = len(acknowledged) + 8
                while len(acknowledged) < wanted:
                    time.sleep(0.05)
                restart_postgres(url)
            wanted = len(acknowledged) + 8
            deadline = time.monotonic() + 60
            while len(acknowledged) < wanted and time.monotonic() < deadline:
                time.sleep(0.05)
            stop.set()
            for each in clients:
                each.result()
        rows = {row.id: row.status for row in Store(url).latest(100_000)}
        assert len(acknowledged) >= wanted
        assert all(rows.get(id) == ANSWERED for id in acknowledged)


@pytest.mark.slow
def test_health_answers_at_once_while_64_batches_are_asked_for(start):
    app, stop = start(), threading.Event()

    def client() -> None:
        while not stop.is_set():
            answer = requests.post(f"{app.url}/infer/batch", json=["some text"] * 20, timeout=120)
            if answer.status_code == 503:
                time.sleep(0.5)

    with ThreadPoolExecutor(64) as pool:
        for _ in range(64):
            pool.submit(client)
        time.sleep(2)
        waited = []
        for _ in range(8):
            for path in ("/healthcheck", "/metrics"):
                started = time.monotonic()
                assert requests.get(f"{app.url}{path}", timeout=30).status_code == 200
                waited.append(time.monotonic() - started)
        stop.set()
    print(f"\nhealth and metrics under 64 batches: {max(waited):.2f} s at most")


@pytest.mark.slow
def test_a_full_disk_is_503_and_nothing_is_answered_unlogged(start, tmp_path):
    """SQLite's own limit on pages stands in for the disk's: the same SQLITE_FULL."""
    app = start()
    assert app.infer("some text").status_code == 200
    stored = sqlite3.connect(tmp_path / "requests.sqlite3").execute("SELECT COUNT(*) FROM requests").fetchone()
    app.kill()
    path = tmp_path / "sitecustomize.py"
    path.write_text(
        "from sqlalchemy import event\nfrom sqlalchemy.engine import Engine\n"
        "@event.listens_for(Engine, 'connect')\n"
        "def full(connection, _):\n    connection.execute('PRAGMA max_page_count=1')\n"
    )
    app = start(PYTHONPATH=str(tmp_path))
    big = app.infer("some text " * 1500)
    assert big.status_code == 503
    assert "nothing is answered unlogged" in big.json()["detail"]
    assert sqlite3.connect(tmp_path / "requests.sqlite3").execute("SELECT COUNT(*) FROM requests").fetchone() == stored


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [16, pytest.param(60, marks=pytest.mark.long)])
def test_200_clients_get_answers_or_503_and_memory_stays_flat(start, seconds):
    app, statuses, reasons, health, stop = start(), Counter(), Counter(), Counter(), threading.Event()
    workers = psutil.Process(app.process.pid).children()

    def memory_mb() -> float:
        return sum(worker.memory_info().rss for worker in workers) / 1e6

    def client() -> None:
        session = requests.Session()
        while not stop.is_set():
            try:
                response = session.post(f"{app.url}/infer", data="some text", timeout=60)
            except requests.RequestException as error:
                statuses[type(error).__name__] += 1
                continue
            statuses[response.status_code] += 1
            if response.status_code != 200:
                reasons[response.json()["detail"]] += 1
                time.sleep(float(response.headers.get("Retry-After", 1)))

    threads = [threading.Thread(target=client) for _ in range(200)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 6)
    early = memory_mb()
    for _ in range(10):
        time.sleep(seconds / 12)
        health[requests.get(f"{app.url}/healthcheck", timeout=10).status_code] += 1
    late = memory_mb()
    stop.set()
    for thread in threads:
        thread.join()
    print(f"\n200 clients: {dict(statuses)}, health {dict(health)}, {early:.0f} -> {late:.0f} MB, {dict(reasons)}")
    assert set(statuses) == {200, 503}
    assert set(health) == {200}
    assert late < 1.2 * early


@pytest.mark.slow
def test_health_tells_the_model_and_its_calibration(start):
    app = start()
    health = requests.get(f"{app.url}/healthcheck", headers={"Accept": "application/json"}).json()
    assert health["status"] == "OK"
    assert health["model"]["calibrated"]
    assert json.dumps(health)
