import json
import time

import pytest

from hatespeech import ollama, runs, task
from tests.conftest import ROOT, RUN, free_port


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("localhost", "http://localhost:11434"),
        ("10.0.0.1:99", "http://10.0.0.1:99"),
        (":99", "http://127.0.0.1:99"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("https://host.example", "https://host.example:443"),
        ("http://host.example:99/", "http://host.example:99"),
    ],
)
def test_ollama_host_is_read_as_ollama_reads_it(host, url):
    assert ollama.base_url(host) == url


def test_model_name_is_one_ollama_takes(tmp_path):
    assert runs.model_name(RUN) == "hatespeech-smollm2-135m"
    assert runs.model_name(tmp_path / "My Run (2)") == "hatespeech-my-run-2-"


def test_no_ollama_there():
    down = ollama.Ollama(f"127.0.0.1:{free_port()}", "m", (), timeout_s=1)
    with pytest.raises(ollama.OllamaError, match="can't be reached"):
        down.classify("x")


ANSWER = {"logprobs": [{"top_logprobs": [{"token": " H", "logprob": -0.1}]}], "prompt_eval_count": 9}


@pytest.mark.parametrize(
    ("status", "body", "error", "reason"),
    [
        (500, b'{"error": "the runner said: secret text"}', ollama.OllamaError, "status 500"),
        (503, b'{"error": "server busy"}', ollama.OllamaError, "status 503"),
        (400, b'{"error": "something else"}', ollama.OllamaError, "status 400"),
        (200, b"{not json", ollama.BadAnswer, "not JSON"),
        (200, b"[]", ollama.BadAnswer, "not a JSON object"),
        (200, b'{"response": "Hate"}', ollama.BadAnswer, "no label probabilities"),
        (200, b'{"logprobs": [], "prompt_eval_count": 9}', ollama.BadAnswer, "no label probabilities"),
        (200, json.dumps(ANSWER).replace(" H", "Sure").encode(), ollama.BadAnswer, "none of Hate, Neutral, Supportive"),
    ],
)
def test_faulty_answers(stand_in, status, body, error, reason):
    stand_in.status, stand_in.body = status, body
    with pytest.raises(error, match=reason) as raised:
        ollama.Ollama(stand_in.host, "m", (" H", " Neutral", " Support")).classify("a text")
    assert "secret" not in str(raised.value)


def test_a_slow_answer_ends_in_time(stand_in):
    stand_in.delay_s = 5
    started = time.monotonic()
    with pytest.raises(ollama.OllamaError, match=r"did not answer within 0\.3 s"):
        ollama.Ollama(stand_in.host, "m", (), timeout_s=0.3).classify("x")
    assert time.monotonic() - started < 2


def test_an_old_ollama_is_refused(stand_in, monkeypatch):
    client = ollama.Ollama(stand_in.host, "m", ())
    assert client.version() == "0.24.0"
    monkeypatch.setattr(client, "_call", lambda *_: {"version": "0.5.4"})
    with pytest.raises(ollama.OllamaError, match=r"is 0\.5\.4; 0\.12\.11 or later is needed"):
        client.version()


def test_the_modelfile_is_the_prompt():
    from hatespeech.training import export

    assert (ROOT / "Modelfile").read_text() == export.MODELFILE == (RUN / "Modelfile").read_text()
    assert f'TEMPLATE """{task.TEMPLATE}"""' in export.MODELFILE
