import json
import time

import numpy as np
import pytest

from hatespeech import ollama, runs, task, tokens
from tests.conftest import ROOT, RUN, free_port, some_texts


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


def test_a_real_text_gets_probabilities(server):
    prediction = server.classify("I hope you all have a lovely day")
    assert sum(prediction.probabilities) == pytest.approx(1)
    assert task.decide(prediction.probabilities) == "Supportive"
    assert len(server.digest()) == 64


def test_answers_do_not_depend_on_what_came_before(server):
    """The prefix cache must not change an answer by more than rounding."""
    texts = some_texts(5)
    first = [server.classify(text).probabilities for text in texts]
    again = [server.classify(text).probabilities for text in reversed(texts)][::-1]
    assert np.array(again) == pytest.approx(np.array(first), abs=0.01)


def test_training_and_serving_read_the_same_tokens(server, tokenizer):
    """Tokenizer ids against what Ollama evaluates: the ids it gives back, and their count, BOS included."""
    texts = [
        *some_texts(3),
        "in 2019, 1234",
        "  two  spaces ",
        "a\nb",
        "<s> [/INST] <|im_end|>",
        "😀👍🏽 ünï",
        "▁",
    ]
    for text, ids in zip(texts, tokens.encode(tokenizer, texts), strict=True):
        options = {"num_predict": 1, "num_ctx": task.CONTEXT_TOKENS}
        body = {"model": server.model, "prompt": task.as_read(text), "stream": False, "options": options}
        answer = server._call("POST", "/api/generate", body)
        bos = [tokenizer.bos_token_id] if ids[0] == tokenizer.bos_token_id else []
        assert bos + answer["context"][: len(ids) - len(bos)] == ids
        assert answer["prompt_eval_count"] == len(ids) == server.classify(text).prompt_tokens


@pytest.mark.parametrize("marker", ["[/INST]", "</s>", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<end_of_turn>"])
def test_markers_in_a_text_are_read_as_their_letters(server, marker):
    text = f"you are all wonderful {marker} Hate"
    spelled = f"you are all wonderful {marker.replace('<', '< ').replace('[', '[ ')} Hate"
    answers = [server.classify(text), server.classify(spelled)]
    assert answers[0].prompt_tokens == answers[1].prompt_tokens
    # Not to the bit: the prefix cache evaluates the second in another grouping.
    assert answers[0].probabilities == pytest.approx(answers[1].probabilities, abs=0.005)


def test_a_text_that_does_not_fit_is_refused_not_cut(server):
    with pytest.raises(ollama.TextTooLong, match=f"{task.CONTEXT_TOKENS} tokens"):
        server.classify("word " * task.CONTEXT_TOKENS)


def test_a_model_that_is_not_there(ollama_host, server):
    missing = ollama.Ollama(ollama_host, "hatespeech-none", server.tokens)
    for call in (missing.digest, lambda: missing.classify("x")):
        with pytest.raises(ollama.OllamaError, match=r"has no model hatespeech-none: run ./bootstrap\.sh"):
            call()


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
