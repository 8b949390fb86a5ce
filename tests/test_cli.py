"""The command `hatespeech`: lines through a pipe, and what its doctor finds."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from werkzeug.serving import make_server

from hatespeech import doctor
from tests.conftest import ROOT, RUN, command, free_port

COMMAND = str(Path(sys.executable).with_name("hatespeech"))


@pytest.fixture
def shell(stand_in, tmp_path):
    """shell(words ..., input): `hatespeech words ...` in a process of its own; what it printed, by stream."""
    settings = {
        "OLLAMA_HOST": stand_in.host,
        "DATABASE_URL": f"sqlite:///{tmp_path}/log.sqlite3",
        "MODEL_DIR": str(RUN),
    }

    def run(*words: str, given: bytes = b"", **environment: str) -> subprocess.CompletedProcess:
        own = os.environ | settings | environment
        return subprocess.run([COMMAND, *words], input=given, env=own, cwd=ROOT, capture_output=True)

    run.settings = settings
    return run


LINES = b"thank you\r\n\nsome text\n" + "\u00fcber\n".encode() + b"\xff\nthe last one"


def test_a_label_for_each_line(shell):
    """In their order, so that `paste` puts both together; in a pipe nothing else is said of what went well."""
    done = shell("classify", given=LINES)
    assert done.returncode == 0
    labels = done.stdout.decode().split("\n")
    assert [bool(label) for label in labels] == [True, False, True, True, False, True, False]
    assert set(labels) <= {"Hate", "Neutral", "Supportive", ""}
    assert done.stderr.decode().splitlines() == ["line 2: there is no text", "line 5: it is not UTF-8"]


def test_whole_answers_for_each_line(client, tmp_path):
    (tmp_path / "lines.txt").write_bytes(LINES)
    done = command(client, "classify", str(tmp_path / "lines.txt"), "--jsonl")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["line"] for answer in answers] == [1, 2, 3, 4, 5, 6]
    assert [bool(answer["error"]) for answer in answers] == [False, True, False, False, True, False]
    alone = client.post("/infer", json={"text": "thank you"}).get_json()
    assert answers[0]["p_hate"] == pytest.approx(alone["probabilities"]["Hate"], abs=0.01)
    assert answers[0]["label"] == alone["label"]


def test_each_answer_comes_before_the_next_line(shell):
    """As `tail -f comments.log | hatespeech classify` needs it."""
    environment = os.environ | shell.settings
    words = [COMMAND, "classify"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, env=environment, cwd=ROOT, **pipes) as process:
        for _ in range(3):
            process.stdin.write(b"a text\n")
            process.stdin.flush()
            assert process.stdout.readline().strip() in (b"Hate", b"Neutral", b"Supportive")
        process.stdin.close()
        assert process.stdout.read() == b""


def test_a_failing_engine_is_one_line(shell, stand_in):
    stand_in.status = 500
    done = shell("classify", given=b"a text\n" * 100)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"Error: line 1: ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("classify", "comments.csv"), "hatespeech classify comments.csv classified.csv"),
        (("classify", "none.txt"), "none.txt"),
        (("classify", "tests"), "tests"),
        (("no-such-command",), "no-such-command"),
        (("serve", "--port", "0"), "--port"),
        (("bulk", "none.csv", "out"), "none.csv"),
    ],
)
def test_what_can_not_be_done_is_said(shell, words, reason):
    done = shell(*words)
    assert done.returncode in (1, 2)
    assert reason in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_help_teaches(shell):
    done = shell("--help").stdout.decode()
    for name in ("serve", "classify", "feedback", "replay", "purge", "keys", "bulk", "doctor"):
        assert f"\n  {name} " in done, name
    assert "echo 'some text' | hatespeech classify" in done
    assert "--rows-per-part" in shell("bulk", "--help").stdout.decode()
    assert b"_HATESPEECH_COMPLETE" in shell(_HATESPEECH_COMPLETE="bash_source").stdout


def test_serve_serves(shell):
    port = str(free_port())
    words = [COMMAND, "serve", "--port", port]
    with subprocess.Popen(words, env=os.environ | shell.settings, cwd=ROOT, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 30
        while shell("doctor", PORT=port).stdout.count(b":" + port.encode() + b" answers") == 0:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def found(monkeypatch, **settings: str) -> str:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return "\n".join(f"{'ok' if each.fine else 'WRONG'} {each.what} -> {each.remedy}" for each in doctor.findings())


def test_the_doctor_finds_all_well(monkeypatch, client, run):
    listener = make_server("127.0.0.1", 0, client.application, threaded=True)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    chosen = client.application.extensions["hatespeech"].settings
    said = found(
        monkeypatch,
        MODEL_DIR=str(chosen.model_dir),
        OLLAMA_HOST=chosen.ollama_host,
        DATABASE_URL=chosen.database_url,
        PORT=str(listener.port),
    )
    listener.shutdown()
    assert "ok model: hatespeech-" in said
    assert "ok gates: " in said
    assert "ok log: sqlite:///" in said
    assert f"ok service: http://127.0.0.1:{listener.port} answers" in said


@pytest.mark.parametrize(
    ("settings", "finding"),
    [
        ({"MAX_QUEUE": "x"}, "WRONG settings: MAX_QUEUE='x'"),
        ({"MODEL_DIR": "tests"}, "WRONG model: "),
        ({"OLLAMA_HOST": "127.0.0.1:1"}, "WRONG engine: "),
        ({"DATABASE_URL": "postgresql://root:secret@127.0.0.1:1/x"}, "WRONG log: postgresql"),
        ({"PORT": "1"}, "ok service: none at http://127.0.0.1:1 -> ./bootstrap.sh starts it"),
    ],
)
def test_the_doctor_finds_what_is_wrong(monkeypatch, tmp_path, settings, finding):
    defaults = {"DATABASE_URL": f"sqlite:///{tmp_path}/none.sqlite3", "OLLAMA_HOST": "127.0.0.1:1", "PORT": "1"}
    said = found(monkeypatch, **defaults | settings)
    assert finding in said
    assert "secret" not in said


def test_the_doctor_says_how_many_are_to_be_mended(shell):
    done = shell("doctor", OLLAMA_HOST="127.0.0.1:1", PORT="1")
    assert done.returncode == 1
    assert b"to be mended" in done.stderr
    assert b"-> ./bootstrap.sh" in done.stdout
