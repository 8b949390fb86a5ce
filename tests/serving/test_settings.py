"""Settings: what makes sense starts, anything else is refused at start, by name and in one line."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app import create_app
from hatespeech import UserError, ollama
from hatespeech.serving import settings
from tests.conftest import ROOT, RUN

NONSENSE = {
    "OLLAMA_HOST": ["http://a b", "ftp://a", "host:port", "host:99999999", "user@host", ","],
    "OLLAMA_HOSTS": ["a,,b", "a, ", "a:x,b"],
    "OLLAMA_TIMEOUT_S": ["0", "-1", "nan", "inf", "ten", "1e9"],
    "OLLAMA_LOAD_TIMEOUT_S": ["0", "soon"],
    "MAX_IN_FLIGHT": ["0", "-1", "1.5", "many"],
    "MAX_QUEUE": ["-1", "x"],
    "FLAG_ABOVE": ["0", "1", "nan", "much"],
    "LOG_TEXT": ["some", "FULL"],
    "REQUIRE_API_KEY": ["perhaps"],
    "TRUSTED_PROXIES": ["-1", "17", "one"],
    "PERSPECTIVE_UNSUPPORTED": ["maybe"],
    "MAX_CONTENT_LENGTH": ["0", "big"],
    "UPLOADS_DIR": [" ", ".", "/"],
}
DATABASES = {
    "nonsense": "is no URL of a database",
    "mysql://root:secret@host/name": "begins with mysql",
    "/var/lib/requests.sqlite3": "is no URL of a database",
    "sqlite://": "names no file",
    "sqlite:///:memory:": "loses the log",
    "sqlite:////proc/none/requests.sqlite3": "can't be written",
    "sqlite:////etc/hostname": "can't be opened: file is not a database",
    "postgres://user:secret@127.0.0.1:1/name": "can't be opened",
    "postgresql://user:secret@no-such-host.invalid/name": "can't be opened",
    "postgresql://user:secret@127.0.0.1:abc/name": "is no URL of a database",
    "sqlite:////tmp/hatespeech-none/x.db?timeout=abc": "can't be opened",
    "postgresql+asyncpg://user:secret@host/name": "begins with postgresql+asyncpg",
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in NONSENSE for value in NONSENSE[name]])
def test_what_makes_no_sense_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"{name}=") as error:
        settings.read({name: value})
    assert "\n" not in str(error.value)
    assert settings.Settings.model_fields[name.lower()].description in str(error.value)


def test_a_hash_needs_a_secret_and_no_secret_is_shown():
    with pytest.raises(UserError, match="LOG_TEXT=hash needs a secret in LOG_HASH_KEY"):
        settings.read({"LOG_TEXT": "hash"})
    with pytest.raises(UserError, match="a path holds no zero byte") as error:
        settings.read({"DATABASE_URL": "sqlite:///secret\0"})
    assert "secret" not in str(error.value)


def test_a_setting_nobody_knows_is_refused_where_it_is_given_and_ignored_in_the_environment(monkeypatch):
    with pytest.raises(UserError, match="OLLAMA_HOSTZ"):
        settings.read({"OLLAMA_HOSTZ": "a"})
    monkeypatch.setenv("OLLAMA_HOSTZ", "a")
    monkeypatch.setenv("FLAG_ABOVE", "")
    monkeypatch.setenv("REQUIRE_API_KEY", "1")
    read = settings.read()
    assert (read.flag_above, read.require_api_key) == (None, True)


def test_addresses_of_ollama_are_read_as_ollama_reads_them():
    read = {
        "": "http://127.0.0.1:11434",
        ":8080": "http://127.0.0.1:8080",
        "0.0.0.0": "http://127.0.0.1:11434",
        "gpu-1": "http://gpu-1:11434",
        "https://ollama.example": "https://ollama.example:443",
        "http://ollama.example/": "http://ollama.example:80",
        "[::1]:8080": "http://[::1]:8080",
    }
    assert {host: ollama.base_url(host) for host in read} == read


@pytest.mark.parametrize("url", DATABASES)
def test_a_wrong_database_is_one_line_that_says_what_and_holds_no_password(url):
    with pytest.raises(UserError, match="DATABASE_URL") as error:
        create_app({"MODEL_DIR": str(RUN), "DATABASE_URL": url})
    assert DATABASES[url] in str(error.value)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


@hypothesis_settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(settings.Settings.model_fields)), value=st.text(max_size=20))
def test_any_string_in_any_setting_is_read_or_refused_by_name(name, value):
    try:
        settings.read({name.upper(): value})
    except UserError as error:
        said = str(error)
    else:
        said = name.upper()
    assert name.upper() in said or "LOG_TEXT" in said


@pytest.mark.parametrize(
    "origin",
    [
        *("www.example.org", "https://*.example.org", "https://*", "https://a(b", "https://example.org/", "ftp://a"),
        *("https://example.org:443", "http://example.org:80", "null", "https://a b"),
    ],
)
def test_an_origin_that_no_browser_sends_is_refused(origin):
    with pytest.raises(UserError, match="CORS_ORIGINS"):
        settings.read({"CORS_ORIGINS": f"https://www.example.org,{origin}"})


def test_bootstraps_help_names_each_setting():
    shown = subprocess.run([ROOT / "bootstrap.sh", "--help"], capture_output=True, text=True, check=True).stdout
    for name in settings.Settings.model_fields:
        assert name.upper() in shown


COMMANDS = {
    ("-m", "hatespeech.cli", "keys", "list"): {"OLLAMA_TIMEOUT_S": "soon"},
    ("-m", "hatespeech.cli", "purge", "--older-than", "30d"): {"DATABASE_URL": "mysql://root:secret@host/x"},
    ("-m", "hatespeech.cli", "purge", "--older-than", "99999999999d"): {},
    ("-m", "hatespeech.cli", "keys", "create", "a", "--scopes", "all"): {},
    ("-m", "hatespeech.cli", "keys", "delete", "nobody"): {},
    ("-m", "hatespeech.cli", "classify", "none.csv", "out.csv"): {},
    ("-m", "hatespeech.cli", "classify", "README.md", "out.csv"): {},
    ("-m", "hatespeech.cli", "replay", "--model-dir", "tests"): {},
    ("-m", "gunicorn", "-c", "python:hatespeech.serving.gunicorn_conf", "app:create_app()"): {"MAX_QUEUE": "x"},
    ("-m", "gunicorn", "-c", "python:hatespeech.serving.gunicorn_conf", "-w", "4", "app:create_app()"): {},
    ("-m", "hatespeech.cli", "bulk", "none.csv", "out"): {},
    ("-m", "hatespeech.cli", "bulk", "README.md", "out"): {},
    ("-m", "hatespeech.cli", "bulk", "tests/data/functional.csv", "out", "--text-column", "no such"): {},
    ("-m", "hatespeech.training.data", "none.csv", "--hashes", "none", "--output", "out.csv"): {},
    ("-m", "hatespeech.training.evaluation", "none", "results/smollm2-135m"): {},
    ("-m", "hatespeech.training.export", "tests"): {},
    ("-m", "hatespeech.training.checks", "tests"): {},
    ("train.py", "--dataset", "none.csv"): {},
    ("train.py", "--model", "none.gguf", "--dataset", "tests/data/functional.csv"): {},
    ("train.py", "--batch-size", "0"): {},
    ("train.py", "--test-share", "0"): {},
    ("train.py", "--rank", "0"): {},
    ("train.py", "--validation-share", "0.6", "--test-share", "0.6"): {},
}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_wrong_input_is_one_line_and_no_traceback(command, tmp_path):
    """What was wrong is named, the exit code is not 0, nothing is left behind."""
    environment = os.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/requests.sqlite3", "CUDA_VISIBLE_DEVICES": ""}
    environment["HF_HUB_OFFLINE"] = "1"
    before = set(ROOT.iterdir()) | set((ROOT / "results").iterdir())
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment | COMMANDS[command], capture_output=True, text=True
    )
    assert done.returncode not in (0, -9), done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    assert "secret" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip() and "unsloth" not in line.lower()]
    assert len(lines) <= 3, done.stderr
    wrong = [word for word in command if word.strip("-0123456789.")]
    named = {*COMMANDS[command], *wrong, "workers", "age", "scope", "--batch-size", "share", "settings.json"}
    assert any(name in done.stderr for name in named)
    assert set(ROOT.iterdir()) | set((ROOT / "results").iterdir()) == before
