"""The service on its real parts: a real Ollama with the shipped model, a real SQLite file."""

import hashlib
import io
import json
import logging
import re
import sqlite3
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from sqlalchemy.exc import OperationalError

from hatespeech import UserError, task
from hatespeech.calibration import Calibration
from hatespeech.serving import openapi
from hatespeech.serving.parts import MAX_BATCHES
from hatespeech.serving.store import Store
from tests.conftest import ROOT, TEST, free_port


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


THRESHOLDS = (
    {"threshold": 0.05, "n": 100, "precision": 0.3, "recall": 1.0},
    {"threshold": 0.5, "n": 40, "precision": 0.7, "recall": 0.9333},
    {"threshold": 0.95, "n": 10, "precision": 0.9, "recall": 0.3},
)


def run_with(run: Path, folder: Path, p_hate: float, **changes) -> Path:
    """A run's folder of the same name, so of the same model in Ollama, whose calibration gives every text this P(Hate).

    changes: to its calibration.json, which otherwise has THRESHOLDS and proposes to flag from 0.5 on.
    """
    other = folder / run.name
    other.mkdir(exist_ok=True)
    (other / "settings.json").write_text((run / "settings.json").read_text())
    stored = json.loads((run / "calibration.json").read_text())
    # So high a temperature leaves nothing of the model's answer but the biases.
    biases = np.log([p_hate, 0.6 * (1 - p_hate), 0.4 * (1 - p_hate)]).tolist()
    stored |= {"temperature": 1e6, "biases": biases, "flag_above": 0.5, "thresholds": THRESHOLDS}
    (other / "calibration.json").write_text(json.dumps(stored | changes))
    return other


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "application/json", "text/plain"])
def test_a_text_gets_its_bare_label_whatever_the_content_type(client, content_type):
    response = client.post("/infer", data="I hope you all have a lovely day", content_type=content_type)
    assert (response.status_code, response.text, response.mimetype) == (200, "Supportive", "text/plain")


def test_the_row_holds_what_was_asked_and_answered(client, server, run):
    text = "such a lovely day, ünïcode 😀 & a=b"
    response = client.post("/infer", data=text.encode())
    (row,) = rows(client)
    assert row["id"] == response.headers["X-Answer-Id"]
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
        (b"", 400, "there is no text"),
        (b" \n\t", 400, "there is no text"),
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


def test_json_in_or_accepted_gives_json_out(client, server, run):
    by_body = client.post("/infer", json={"text": "a lovely day"})
    by_accept = client.post("/infer", data="a lovely day", headers={"Accept": "application/json"})
    calibration = Calibration.load(run / "calibration.json")
    for response in (by_body, by_accept):
        answer = response.get_json()
        assert list(answer) == [
            *("id", "label", "probabilities", "score", "confidence", "abstain", "flagged"),
            *("request_id", "model", "duration_ms"),
        ]
        assert openapi.schema_error("Answer", answer) is None
        probabilities = [answer["probabilities"][label] for label in task.LABELS]
        assert sum(probabilities) == pytest.approx(1)
        assert answer["label"] == task.decide(probabilities)
        assert answer["confidence"] == max(probabilities)
        assert answer["score"] == pytest.approx(np.dot(probabilities, calibration.class_scores))
        assert answer["abstain"] == (answer["confidence"] < calibration.abstain_below)
        assert answer["model"] == {
            "name": server.model,
            "digest": server.digest(),
            "prompt_version": task.PROMPT_VERSION,
            "calibrated": True,
        }
        assert answer["id"] == response.headers["X-Answer-Id"]
    assert [row["text"] for row in rows(client)] == ["a lovely day"] * 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"text": ""}', "text must hold something visible, and no NUL"),
        (b'{"text": 5}', "text must be of the type string"),
        (b'{"text": "a", "lang": "en"}', "takes text"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": "a\\u0000b"}', "NUL"),
        (b"{broken", "the body must be of the type object"),
        (b"[" * 100_000, "the body must be of the type object"),
        (b'{"text": "a", "n": NaN}', "the body must be of the type object"),
        (b'{"inputs": "a"}', "takes text"),
        (b'["a"]', "the body must be of the type object"),
    ],
)
def test_wrong_json_is_explained_and_logged(client, body, reason):
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    response = client.post("/infer", data=body, headers=headers)
    assert is_problem(response, 400)
    assert reason in response.get_json()["detail"]
    assert rows(client)[0]["status"] == "refused"


def test_another_charset_is_refused(client):
    assert is_problem(client.post("/infer", data=b"abc", content_type="text/plain; charset=utf-16"), 415)


@pytest.mark.parametrize("kind", ["application/json", "application/x-ndjson"])
def test_a_batch_is_answered_in_order_and_one_bad_item_fails_alone(client, kind):
    items = ["a lovely day", {"text": "such a nice day"}, " ", {"txt": 1}, "word " * 3000, "\ud800", "the end"]
    body = json.dumps(items) if kind == "application/json" else "\n".join(map(json.dumps, items))
    response = client.post("/infer/batch", data=body, content_type=kind)
    assert (response.status_code, response.mimetype) == (200, "application/x-ndjson")
    answers = [json.loads(line) for line in response.text.splitlines()]
    assert [answer.get("status", 200) for answer in answers] == [200, 200, 400, 400, 413, 400, 200]
    stored = rows(client)
    assert [row["http_status"] for row in stored] == [200, 200, 400, 400, 413, 400, 200]
    assert [row["id"] for row in stored if row["label"]] == [answers[i]["id"] for i in (0, 1, 6)]
    assert {row["route"] for row in stored} == {"/infer/batch"}


def test_what_is_no_batch_is_refused(client):
    assert is_problem(client.post("/infer/batch", json={"text": "a"}), 400)
    assert rows(client)[0]["status"] == "refused"


def test_a_calibration_for_other_weights_is_not_applied(make_client, ollama_host, server, run, tmp_path):
    other = run_with(run, tmp_path, p_hate=0.6, flag_above=0.5, model_sha256="0" * 64)
    client = make_client(ollama_host, MODEL_DIR=str(other))
    answer = client.post("/infer", json={"text": "a text"}).get_json()
    assert (answer["model"]["calibrated"], answer["abstain"], answer["flagged"]) == (False, None, None)
    raw = server.classify("a text").probabilities
    assert list(answer["probabilities"].values()) == pytest.approx(raw, abs=0.01)
    health = client.get("/healthcheck", headers={"Accept": "application/json"}).get_json()
    assert "fitted for the weights 000000000000" in health["uncalibrated_because"]
    assert health["flag_above"] is None
    client = make_client(ollama_host, MODEL_DIR=str(other), FLAG_ABOVE=0.001)
    assert client.post("/infer", json={"text": "a text"}).get_json()["flagged"] is (raw[0] >= 0.001)


@pytest.mark.parametrize(
    ("setting", "flag_above", "in_force", "flagged"),
    [
        ("", 0.5, 0.5, True),
        ("", 0.7, 0.7, False),
        ("", None, None, None),
        ("0.7", 0.5, 0.7, False),
        ("0.5", None, 0.5, True),
    ],
)
def test_an_answer_is_flagged_from_the_threshold_in_force_on(
    make_client, ollama_host, server, run, tmp_path, setting, flag_above, in_force, flagged
):
    other = run_with(run, tmp_path, p_hate=0.6, flag_above=flag_above)
    client = make_client(ollama_host, MODEL_DIR=str(other), FLAG_ABOVE=setting)
    one = client.post("/infer", json={"text": "a text"}).get_json()
    batch = client.post("/infer/batch", json=["a text"])
    for answer in (one, json.loads(batch.text)):
        assert answer["probabilities"]["Hate"] == pytest.approx(0.6, abs=0.001)
        assert (answer["label"], answer["flagged"]) == ("Hate", flagged)  # the label is the likeliest all the same
        assert openapi.schema_error("Answer", answer) is None
    health = client.get("/healthcheck", headers={"Accept": "application/json"}).get_json()
    assert health["flag_above"] == in_force


@pytest.mark.parametrize("setting", ["0", "1", "1.5", "-0.1", "nan", "inf", "much", " "])
def test_a_threshold_that_is_no_probability_is_refused_at_start(make_client, monkeypatch, setting):
    monkeypatch.setenv("FLAG_ABOVE", setting)
    with pytest.raises(UserError, match=r"FLAG_ABOVE='.*': input should be .*FLAG_ABOVE is the P\(Hate\) from which"):
        make_client("127.0.0.1:1")


def test_feedback_is_kept_with_its_request_and_never_overwritten(client):
    answer = client.post("/infer", json={"text": "a text"}).get_json()
    for said in ({"label": "Hate"}, {"score": -2.5, "note": "on second thoughts"}):
        assert client.post("/feedback", json={"id": answer["id"]} | said).status_code == 204
    connection = sqlite3.connect(client.database)
    kept = connection.execute("SELECT request_id, label, score, note FROM feedback ORDER BY id").fetchall()
    assert kept == [(answer["id"], "Hate", None, None), (answer["id"], None, -2.5, "on second thoughts")]


@pytest.mark.parametrize(
    ("said", "status", "reason"),
    [
        ({"id": "none", "label": "Hate"}, 404, "no request has this id"),
        ({"id": "x"}, 400, "needs id and label or score"),
        ({"label": "Hate"}, 400, "needs id"),
        ({"id": "x", "label": "Bad"}, 400, "label must be one of Hate, Neutral, Supportive"),
        ({"id": "x", "score": 21}, 400, "score must be at most 20"),
        ({"id": "x", "score": float("inf")}, 400, "the body must be of the type object"),
        ({"id": "x", "score": float("nan")}, 400, "the body must be of the type object"),
        ({"id": "x", "label": "Hate", "score": float("nan")}, 400, "the body must be of the type object"),
        ({"id": "x", "label": None, "score": None}, 400, "needs id and label or score"),
        ({"id": "x", "label": None, "score": 1}, 404, "no request has this id"),
        ({"id": "x", "label": "Hate", "note": "\ud800"}, 400, "lone surrogate"),
        ({"id": "x", "label": "Hate", "score": -3}, 400, "is Supportive, not Hate"),
        (None, 400, "the body"),
    ],
)
def test_wrong_feedback(client, said, status, reason):
    response = client.post("/feedback", data=json.dumps(said), content_type="application/json")
    assert is_problem(response, status)
    assert reason in response.get_json()["detail"]


ELSEWHERE = {"REMOTE_ADDR": "192.0.2.7"}


def test_off_loopback_the_key_is_in_the_row_and_not_in_the_database(client):
    store = Store(f"sqlite:///{client.database}")
    infer, read = store.create_key("bot", ["infer"]), store.create_key("watcher", ["read"])

    def status(path: str, key: str | None, method: str = "POST", **more) -> int:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        response = client.open(path, method=method, headers=headers, environ_overrides=ELSEWHERE, **more)
        return response.status_code

    assert is_problem(client.post("/infer", data="a text", environ_overrides=ELSEWHERE), 401)
    assert status("/infer", infer, data="a text") == 200
    assert rows(client)[-1]["api_key"] == "bot"
    assert status("/metrics", read, "GET") == 200
    assert infer not in "".join(connection_dump(client))


def connection_dump(client) -> list[str]:
    return list(sqlite3.connect(client.database).iterdump())


def test_request_ids_and_security_headers(client):
    response = client.get("/healthcheck", headers={"X-Request-Id": "my-id.1"})
    assert response.headers["X-Request-Id"] == "my-id.1"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] == "no-store"
    forged = client.get("/healthcheck", headers={"X-Request-Id": "<script>"}).headers["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{32}", forged)


def test_access_log_and_metrics_tell_of_requests_and_not_of_texts(client, caplog):
    caplog.set_level(logging.INFO, "hatespeech.access")
    client.post("/infer", data="a secret", headers={"X-Request-Id": "r1"})
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == "hatespeech.access"]
    assert (line["request_id"], line["path"], line["status"]) == ("r1", "/infer", 200)
    exposed = client.get("/metrics").text
    assert 'hatespeech_http_requests_total{route="/infer",status="200"} 1.0' in exposed
    assert "hatespeech_ollama_in_flight 0.0" in exposed
    assert "secret" not in exposed + caplog.text


@pytest.mark.slow
def test_when_all_slots_are_taken_it_says_when_to_come_again(make_client, stand_in):
    stand_in.delay_s = 1
    client = make_client(stand_in.host, MAX_IN_FLIGHT=1, MAX_QUEUE=1)
    with ThreadPoolExecutor(6) as pool:
        responses = list(pool.map(lambda _: client.application.test_client().post("/infer", data="a"), range(6)))
    busy = [response for response in responses if response.status_code == 503]
    assert len(busy) == 4
    assert all(response.headers["Retry-After"] == "1" for response in busy)
    assert all(is_problem(response, 503) for response in busy)


@pytest.mark.parametrize(("kept", "text", "hashed"), [("hash", None, True), ("none", None, False)])
def some_texts_can_be_kept_out_of_the_log(make_client, ollama_host, server, kept, text, hashed):
    client = make_client(ollama_host, LOG_TEXT=kept, LOG_HASH_KEY="a secret")
    for sent in ("one text", "one text", "another"):
        assert client.post("/infer", data=sent).status_code == 200
    stored = rows(client)
    assert {row["text"] for row in stored} == {text}
    hashes = [row["text_sha256"] for row in stored]
    assert (hashes[0] == hashes[1] != hashes[2]) if hashed else set(hashes) == {None}
    assert hashlib.sha256(b"one text").hexdigest() not in hashes
    assert "one text" not in "".join(connection_dump(client))


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


@pytest.mark.slow
def test_real_comments_are_answered_as_the_model_card_says(client, server):
    """On 40 test comments: far better than chance, so neither prompt nor calibration got lost on the way."""
    some = parquet.read_table(TEST)[:40].to_pylist()
    answers = [client.post("/infer", data=row["text"].encode()).text for row in some]
    truth = [task.label_of(row["hate_speech_score"]) for row in some]
    assert sum(a == t for a, t in zip(answers, truth, strict=True)) > 18
    assert len(rows(client)) == 40


def test_it_imports_in_under_a_second_and_without_torch():
    code = "import time; t = time.monotonic(); import app, sys; print('torch' in sys.modules, time.monotonic() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True) for _ in range(2)]
    torch_loaded, seconds = zip(*(run.stdout.split() for run in runs), strict=True)
    assert set(torch_loaded) == {"False"}
    print("import app:", min(map(float, seconds)), "s")


@pytest.mark.parametrize(
    "sent",
    [
        {"data": {"text": "I hope you all have a lovely day"}},  # a form, as browsers and requests send it
        {"data": "text=I+hope+you+all+have+a+lovely+day&x=1", "content_type": "application/x-www-form-urlencoded"},
        {"data": {"text": (io.BytesIO(b"I hope you all have a lovely day"), "a.txt")}},  # curl -F text=@a.txt
        {"data": "text=I+hope+you+all+have+a+lovely+day", "content_type": "application/x-www-form-urlencoded"},
        {"data": '"I hope you all have a lovely day"', "content_type": "application/json"},
        {"data": b"I hope you all have a lovely day", "content_type": "application/octet-stream"},
    ],
)
def test_a_text_in_an_envelope_is_taken_out_of_it(client, sent):
    assert client.post("/infer", **sent).status_code == 200
    assert rows(client)[0]["text"] == "I hope you all have a lovely day"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"json": {"inputs": "I hope you all have a lovely day"}}, 400),
        ({"json": ["a", "b"]}, 400),
        ({"data": "null", "content_type": "application/json"}, 400),
        ({"data": '"lovely', "content_type": "application/json"}, 400),
        ({"data": {"text": (io.BytesIO(b"caf\xe9 lovely"), "a.txt")}}, 400),
        ({"data": b"text=caf%E9+lovely", "content_type": "application/x-www-form-urlencoded"}, 400),
        (
            {
                "data": b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\ncaf\xe9 lovely\r\n--x--\r\n',
                "content_type": "multipart/form-data; boundary=x",
            },
            400,
        ),
        ({"data": {"comment": "I hope so", "x": "1"}}, 415),
        ({"data": {"file": (io.BytesIO(b"I hope so"), "a.txt")}}, 415),
        ({"data": "<p>I hope so</p>", "content_type": "text/html"}, 415),
        ({"data": b"\x89PNG", "content_type": "image/png"}, 415),
    ],
)
def test_an_envelope_gets_no_label(client, sent, status):
    assert is_problem(client.post("/infer", **sent), status)
    (row,) = rows(client)
    assert (row["status"], row["http_status"], row["label"]) == ("refused", status, None)


@pytest.mark.parametrize("text", ["a=b", "x=1&y=2", "a text with = and & in it", "50%=half"])
def test_a_text_that_looks_like_a_form_is_a_text_all_the_same(client, text):
    assert client.post("/infer", data=text, content_type="application/x-www-form-urlencoded").status_code == 200
    assert rows(client)[0]["text"] == text


def test_a_batchs_lines_are_logged_as_they_came_and_blank_ones_are_none(client):
    body = b'\xef\xbb\xbf"such a day"\n\n{broken\n{"id": "c1", "text": "thanks"}\r\n{"id": "c2", "txt": 1}\n\n'
    response = client.post("/infer/batch", data=body, content_type="application/x-ndjson")
    first, broken, third, fourth = [json.loads(line) for line in response.text.splitlines()]
    assert (first["label"] in task.LABELS, broken["status"], fourth["status"]) == (True, 400, 400)
    assert (third["id"], fourth["id"]) == ("c1", "c2")
    assert first["id"] == first["request_id"]
    stored = rows(client)
    assert [row["text"] for row in stored] == ["such a day", "{broken", "thanks", '{"id": "c2", "txt": 1}']
    assert third["request_id"] == stored[2]["id"]


def test_a_batch_too_many_is_sent_away_and_a_finished_one_makes_room(client):
    for _ in range(MAX_BATCHES + 2):  # one after the other
        with client.post("/infer/batch", json=["a text"]) as response:
            assert response.status_code == 200
    batches = client.application.extensions["hatespeech"].batches
    while batches.acquire(blocking=False):  # as if so many were being answered
        pass
    refused = client.post("/infer/batch", json=["a text"])
    assert is_problem(refused, 503)
    assert refused.headers["Retry-After"] == "1"
    assert client.get("/healthcheck").status_code == 200


@pytest.mark.parametrize("blanks", [" " * 60_000, "\n" * 60_000, "&nbsp;" * 10_000, "\u200b" * 60_000])
def test_a_text_is_not_cut_to_the_blanks_before_it(client, blanks):
    """They would be answered, and what comes after them would not."""
    answer = client.post("/infer?truncate=true", json={"text": blanks + "idiot " * 3000})
    assert answer.status_code == 413 or "idiot" in (blanks + "idiot " * 3000)[: answer.get_json()["cut_to"]]


@pytest.mark.parametrize(
    "text",
    [
        "word " * 3000,
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35" * 700,
        "".join(chr(0x1F600 + number % 60) for number in range(1500)),
    ],
)
def test_a_text_that_is_too_long_is_cut_where_its_sender_wants_it(client, text):
    assert client.post("/infer", json={"text": text}).status_code == 413
    cut = client.post("/infer?truncate=true", json={"text": text})
    assert cut.status_code == 200
    n = cut.get_json()["cut_to"]
    assert 0 < n < len(text)
    assert cut.headers["X-Truncated-To"] == str(n)
    assert rows(client)[1]["text"] == text  # the log has it as it came
    alone = client.post("/infer", json={"text": text[:n]}).get_json()["probabilities"]
    assert cut.get_json()["probabilities"] == pytest.approx(alone, abs=0.02)
    assert client.post("/infer", json={"text": text[: int(n * 1.25)]}).status_code == 413  # not much more would fit
    short = client.post("/infer?truncate=true", json={"text": "a short text"})
    assert "cut_to" not in short.get_json()
    assert "X-Truncated-To" not in short.headers


def test_the_log_and_the_files_are_for_their_owner_alone(make_client, tmp_path):
    client = make_client("127.0.0.1:1", UPLOADS_DIR=str(tmp_path / "new" / "files"))
    assert stat.S_IMODE(Path(client.database).stat().st_mode) == 0o600
    client.post("/file", data={"file": (io.BytesIO(b"text\na\n"), "a.csv")})
    assert stat.S_IMODE((tmp_path / "new" / "files").stat().st_mode) == 0o700


@pytest.mark.parametrize("kept", [{"LOG_TEXT": "none"}, {"LOG_TEXT": "hash", "LOG_HASH_KEY": "secret"}])
def test_where_no_text_is_kept_no_file_is(make_client, tmp_path, kept):
    client = make_client("127.0.0.1:1", **kept)
    refused = client.post("/file", data={"file": (io.BytesIO(b"text\na secret\n"), "a.csv")})
    assert (refused.status_code, "no text is kept here" in refused.text) == (403, True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"a secret" in path.read_bytes()]


def test_a_locked_log_is_503_for_each_item_of_a_batch(client, monkeypatch):
    def locked(*_args, **_more):
        raise OperationalError("INSERT ...", {"text": "a secret"}, Exception("database is locked"))

    monkeypatch.setattr(Store, "received", locked)
    answers = client.post("/infer/batch", json=["a secret", "b"]).text
    assert [json.loads(line)["status"] for line in answers.splitlines()] == [503, 503]
    assert "secret" not in answers


def test_a_model_that_takes_longer_to_load_than_an_answer_may_is_loaded_all_the_same(make_client, stand_in):
    """While it loads, texts are sent away at once, and the health check says so."""
    stand_in.delay_s = 1.0
    client = make_client(stand_in.host, OLLAMA_TIMEOUT_S=0.2)
    assert is_problem(client.post("/infer", data="a text"), 503)
    started = time.monotonic()
    refused = client.post("/infer", data="a text")
    assert is_problem(refused, 503)
    assert "may still be loading" in refused.get_json()["detail"]
    assert time.monotonic() - started < 0.9
    assert "may still be loading" in client.get("/healthcheck").get_json()["detail"]
    time.sleep(1.3)
    stand_in.delay_s = 0.0
    assert client.get("/healthcheck").status_code == 200
