import hashlib
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

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
