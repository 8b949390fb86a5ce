"""The command `hatespeech`: lines through a pipe, and what its doctor finds."""

import io
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

from hatespeech import UserError, doctor
from hatespeech.serving import files
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


def test_who_waits_for_more_lines_is_told_at_once(shell, stand_in):
    """The engine fails while a pipe stays open, as that of `tail -f`: one line and exit code 1, no abort."""
    stand_in.status = 500
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([COMMAND, "classify"], env=os.environ | shell.settings, cwd=ROOT, **pipes) as process:
        process.stdin.write(b"a text\n")
        process.stdin.flush()
        assert process.wait(30) == 1
        assert process.stderr.read().startswith(b"Error: line 1: ")


def test_what_can_not_be_read_on_is_said(client):
    """A disk that fails in mid-file; what was read before is answered."""

    class Broken(io.BytesIO):
        def __next__(self):
            if line := self.readline():
                return line
            raise OSError(5, "Input/output error")

    service = client.application.extensions["hatespeech"].service
    answered = files.classify_lines(service, Broken(b"thank you\nsome text\n"))
    assert [next(answered)["error"], next(answered)["error"]] == ["", ""]
    with pytest.raises(UserError, match="line 3 can't be read"):
        next(answered)


def test_head_ends_it_without_a_word(shell, tmp_path):
    (tmp_path / "many.txt").write_text("some text\n" * 50)
    line = f"{COMMAND} classify {tmp_path}/many.txt | head -1"
    done = subprocess.run(["bash", "-c", line], env=os.environ | shell.settings, cwd=ROOT, capture_output=True)
    assert (done.stdout.count(b"\n"), done.stderr) == (1, b"")


def test_it_serves_its_own_app_whatever_lies_in_the_folder(shell, tmp_path):
    (tmp_path / "app.py").write_text("raise SystemExit('another app')")
    (tmp_path / "hatespeech").mkdir()
    done = subprocess.run(
        [COMMAND, "keys", "list"], env=os.environ | shell.settings, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("classify", "comments.csv"), "as TARGET"),
        (("classify", "lines.txt", "--encoding", "cp1252"), "--encoding is for a table"),
        (("classify", "a.csv", "b.csv", "--jsonl"), "--jsonl is for lines"),
        (("serve", "--host", "0.0.0.0"), "there is no API key yet"),
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
        ({"DATABASE_URL": "foo"}, "WRONG log: DATABASE_URL is no address"),
        ({"DATABASE_URL": "postgresql://127.0.0.1:1/x?password=secret"}, "WRONG log: postgresql"),
        ({"TRUSTED_PROXIES": "1"}, "WRONG keys: others can reach the service, and there is none"),
        ({"DATABASE_URL": "postgresql://u:p@secret@127.0.0.1:1/x"}, "WRONG log: postgresql: "),
        ({"DATABASE_URL": "postgresql://u:12@34:secret"}, "WRONG log: "),
        ({"PORT": "99999"}, "WRONG service: "),
        ({"HOST": "::1", "REQUIRE_API_KEY": "1"}, "ok service: none at http://[::1]:1"),
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
