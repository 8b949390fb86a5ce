import hashlib
import shutil
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from sqlalchemy.exc import OperationalError

from hatespeech import task
from hatespeech.serving.store import ANSWERED, RECEIVED, Base, Store
from tests.conftest import ROOT


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(f"sqlite:///{tmp_path}/new/folder/requests.sqlite3")


def test_a_request_is_there_before_and_after(store):
    request_id = store.received("wörds".encode(), "model")
    (row,) = store.latest()
    assert (row.id, row.status, row.text, row.label) == (request_id, RECEIVED, "wörds", None)
    assert row.text_sha256 == hashlib.sha256("wörds".encode()).hexdigest()
    assert row.prompt_version == task.PROMPT_VERSION

    store.finished(
        request_id, status=ANSWERED, http_status=200, duration_ms=1.5, probabilities=(0.2, 0.5, 0.3), model_digest="d"
    )
    (row,) = store.latest()
    assert (row.status, row.http_status, row.label, row.model_digest) == (ANSWERED, 200, "Neutral", "d")
    assert (row.p_hate, row.p_neutral, row.p_supportive, row.duration_ms) == (0.2, 0.5, 0.3, 1.5)
    assert row.received_at <= row.finished_at


def test_bytes_that_are_no_text_lose_nothing(store):
    store.received(b"ok \xff\xfe", "model")
    assert store.latest()[0].text == r"ok \xff\xfe"


def test_sqlite_is_durable_and_locks_at_once(store):
    with store.engine.connect() as connection:
        pragma = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
        }
    assert pragma == {"journal_mode": "wal", "synchronous": 2}  # 2 is FULL
    with store.engine.begin():
        other = sqlite3.connect(store.engine.url.database, timeout=0, isolation_level=None)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()


@pytest.mark.slow
def test_concurrent_writers_lose_nothing(store):
    def one(i: int) -> None:
        store.finished(store.received(str(i).encode(), "m"), status=ANSWERED, http_status=200, duration_ms=0)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(400)))
    rows = store.latest(1000)
    assert sorted(int(row.text) for row in rows) == list(range(400))
    assert all(row.status == ANSWERED for row in rows)


@pytest.mark.slow
def test_kill_9_loses_no_acknowledged_row(tmp_path):
    database = f"sqlite:///{tmp_path}/requests.sqlite3"
    code = (
        "import sys; from hatespeech.serving.store import Store; store = Store(sys.argv[1])\n"
        "while True: print(store.received(b'x', 'm'), flush=True)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, database], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    acknowledged = []
    timer = threading.Timer(2.0, writer.kill)
    timer.start()
    for line in writer.stdout:
        if line.endswith("\n"):
            acknowledged.append(line.strip())
    writer.wait()
    assert len(acknowledged) > 50
    stored = {row.id for row in Store(database).latest(1_000_000)}
    assert set(acknowledged) <= stored


def test_check_fails_where_there_is_no_log(store):
    store.check()
    Base.metadata.drop_all(store.engine)
    with pytest.raises(OperationalError):
        store.check()


def test_a_step_of_the_wall_clock_makes_no_live_process_dead(store, monkeypatch):
    """What a process is known by does not change when the clock is set; its row stays its own."""
    request_id = store.received(b"being asked", "m")
    created = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) + 3600)
    again = Store(str(store.engine.url))
    assert again.process == store.process
    assert [(row.id, row.status) for row in again.latest()] == [(request_id, RECEIVED)]


def test_a_row_of_a_process_that_is_gone_is_interrupted(store, monkeypatch):
    host, pid, start = store.process.split(":")
    for gone in (f"{host}:{pid}:{start}9", f"{host}:999999999:{start}"):  # its pid was given again; there is none
        monkeypatch.setattr(store, "process", gone)
        store.received(b"lost", "m")
    monkeypatch.setattr(store, "process", f"elsewhere:{pid}:{start}")
    store.received(b"on another machine", "m")
    statuses = {row.text: row.status for row in Store(str(store.engine.url)).latest()}
    assert statuses == {"lost": "interrupted", "on another machine": RECEIVED}


def test_a_percent_sign_in_the_checkouts_path_is_no_variable(tmp_path):
    checkout = tmp_path / "50% done"
    shutil.copytree(ROOT / "hatespeech", checkout / "hatespeech", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from hatespeech.serving.store import Store; import hatespeech; print(hatespeech.__file__); Store('sqlite:///a.db')"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "50% done" in done.stdout
