"""The service on its real parts: a real Ollama with the shipped model, a real SQLite file."""

import sqlite3
import subprocess
import sys
import time

import pandas as pd
import pytest

from hatespeech import task
from hatespeech.calibration import Calibration
from tests.conftest import ROOT, free_port
from tests.test_data import GOLD


def rows(client) -> list[sqlite3.Row]:
    connection = sqlite3.connect(client.database)
    connection.row_factory = sqlite3.Row
    try:
        return connection.execute("SELECT * FROM requests ORDER BY received_at").fetchall()
    finally:
        connection.close()


def is_problem(response, status: int) -> bool:
    body = response.get_json()
    return (
        response.status_code == status == body["status"]
        and response.mimetype == "application/problem+json"
        and set(body) == {"type", "title", "status", "detail"}
    )


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "application/json", "x/nonsense"])
def test_a_text_gets_its_bare_label_whatever_the_content_type(client, content_type):
    response = client.post("/infer", data="I hope you all have a lovely day", content_type=content_type)
    assert (response.status_code, response.text, response.mimetype) == (200, "Supportive", "text/plain")


def test_the_row_holds_what_was_asked_and_answered(client, server, run):
    text = "such a lovely day, ünïcode 😀 & a=b"
    response = client.post("/infer", data=text.encode())
    (row,) = rows(client)
    assert row["id"] == response.headers["X-Request-Id"]
    assert (row["text"], row["status"], row["http_status"], row["error"]) == (text, "answered", 200, None)
    assert row["label"] == response.text
    probabilities = [row["p_hate"], row["p_neutral"], row["p_supportive"]]
    calibration = Calibration.load(run / "calibration.json")
    assert probabilities == pytest.approx(calibration.apply(server.classify(text).probabilities).tolist(), abs=0.01)
    assert sum(probabilities) == pytest.approx(1)
    assert (row["model"], row["model_digest"]) == (server.model, server.digest())
    assert (row["prompt_version"], row["calibration"]) == (task.PROMPT_VERSION, calibration.version)
    assert row["received_at"] < row["finished_at"]
    assert row["duration_ms"] > 0


def test_without_a_calibration_the_raw_probabilities_decide(make_client, ollama_host, server, run, tmp_path):
    bare = tmp_path / run.name  # the same name: the same model in Ollama
    bare.mkdir()
    (bare / "settings.json").write_text((run / "settings.json").read_text())
    client = make_client(ollama_host, MODEL_DIR=str(bare))
    client.post("/infer", data="a text")
    (row,) = rows(client)
    assert row["calibration"] is None
    raw = server.classify("a text").probabilities
    assert [row["p_hate"], row["p_neutral"], row["p_supportive"]] == pytest.approx(raw, abs=0.01)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "holds no text"),
        (b" \n\t", 400, "holds no text"),
        (b"\xff\xfe", 400, "not UTF-8"),
        (b"a\0b", 400, "NUL"),
        (b"word " * 3000, 413, "2048 tokens"),
        (b"x" * 1024 * 1025, 413, "capacity limit"),
    ],
)
def test_what_is_refused_is_explained_and_logged(client, body, status, reason):
    response = client.post("/infer", data=body)
    assert is_problem(response, status)
    assert reason in response.get_json()["detail"]
    (row,) = rows(client)
    assert (row["status"], row["http_status"], row["label"]) == ("refused", status, None)
    assert row["error"]


def test_no_answer_for_other_paths_and_methods(client):
    assert is_problem(client.get("/nope"), 404)
    assert is_problem(client.get("/infer"), 405)
    assert rows(client) == []


def test_healthy(client):
    response = client.get("/healthcheck")
    assert (response.status_code, response.text) == (200, "OK")


def test_ollama_down(make_client):
    client = make_client(f"127.0.0.1:{free_port()}")
    assert is_problem(client.get("/healthcheck"), 503)
    assert is_problem(client.post("/infer", data="a text"), 503)
    (row,) = rows(client)
    assert (row["status"], row["text"]) == ("failed", "a text")
    assert "can't be reached" in row["error"]


def test_the_model_is_not_there(make_client, ollama_host, run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "settings.json").write_text((run / "settings.json").read_text())
    client = make_client(ollama_host, MODEL_DIR=str(other))
    assert is_problem(client.get("/healthcheck"), 503)
    response = client.post("/infer", data="a text")
    assert is_problem(response, 503)
    assert "hatespeech-other" in response.get_json()["detail"]


def test_ollama_slow_is_503_in_time(make_client, stand_in):
    stand_in.delay_s = 5
    client = make_client(stand_in.host, OLLAMA_TIMEOUT_S=0.3)
    started = time.monotonic()
    assert is_problem(client.post("/infer", data="a text"), 503)
    assert time.monotonic() - started < 2
    assert rows(client)[0]["status"] == "failed"


@pytest.mark.parametrize(("status", "body", "answer"), [(500, b"{}", 503), (200, b"{nonsense", 502), (200, b"{}", 502)])
def test_ollama_talks_nonsense(make_client, stand_in, status, body, answer):
    stand_in.status, stand_in.body = status, body
    client = make_client(stand_in.host)
    assert is_problem(client.post("/infer", data="a text"), answer)
    assert (rows(client)[0]["status"], rows(client)[0]["http_status"]) == ("failed", answer)


def test_the_row_is_there_before_ollama_is_asked(make_client, stand_in):
    """What the log holds while Ollama thinks."""
    seen = []
    client = make_client(stand_in.host)
    stand_in.RequestHandlerClass.reply, reply = None, stand_in.RequestHandlerClass.reply
    try:
        stand_in.RequestHandlerClass.reply = lambda handler, *a: (seen.append(rows(client)), reply(handler, *a))
        client.post("/infer", data="a text")
    finally:
        stand_in.RequestHandlerClass.reply = reply
    assert all(len(during) == 1 and during[0]["status"] == "received" for during in seen)
    assert seen


def test_nothing_is_answered_unlogged(client):
    connection = sqlite3.connect(client.database)
    connection.execute("DROP TABLE requests")
    connection.commit()
    assert is_problem(client.post("/infer", data="a text"), 503)
    assert is_problem(client.get("/healthcheck"), 503)


def test_an_unexpected_error_is_a_500_that_is_logged_without_the_text(client, monkeypatch, caplog):
    def broken(_self, text):
        raise RuntimeError(f"about {text}")

    monkeypatch.setattr("hatespeech.ollama.Ollama.classify", broken)
    response = client.post("/infer", data="a secret")
    assert is_problem(response, 500)
    assert "secret" not in response.text + caplog.text
    assert "RuntimeError" in caplog.text
    assert rows(client)[0]["status"] == "failed"


def test_real_comments_are_answered_as_the_model_card_says(client):
    """On 40 gold comments: far better than chance, so neither prompt nor calibration got lost on the way."""
    gold = pd.read_csv(GOLD)[:40]
    answers = [client.post("/infer", data=text.encode()).text for text in gold["text"]]
    truth = [task.label_of(score) for score in gold["hate_speech_score"]]
    assert sum(a == t for a, t in zip(answers, truth, strict=True)) > 18
    assert len(rows(client)) == 40


def test_it_imports_in_under_a_second_and_without_torch():
    code = "import time; t = time.monotonic(); import app, sys; print('torch' in sys.modules, time.monotonic() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True) for _ in range(3)]
    torch_loaded, seconds = zip(*(run.stdout.split() for run in runs), strict=True)
    assert set(torch_loaded) == {"False"}
    print("import app:", min(map(float, seconds)), "s")
