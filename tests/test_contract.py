"""What we take for granted of an Ollama, on a real one: the one on the PATH, or TESTS_OLLAMA=path/of/another."""

import csv
import json
from datetime import datetime

import numpy as np
import pytest
import requests
from pyarrow import parquet

from hatespeech import ollama, runs, task, tokens
from hatespeech.calibration import Calibration
from tests.conftest import RUN, TEST, some_texts


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


def test_probabilities_are_those_the_shipped_run_was_measured_with(server):
    """The stored test predictions, as served by the current engine; another engine may differ by rounding."""
    with open(RUN / "predictions.csv", newline="", encoding="utf-8") as file:
        stored = {
            row["comment_id"]: row
            for row in csv.DictReader(file)
            if row["classifier"] == "as_served" and row["split"] == "test"
        }
    calibration, apart = Calibration.load(RUN / "calibration.json"), []
    for row in parquet.read_table(TEST)[:40].to_pylist():
        found = stored.get(str(row["comment_id"]))
        if found:
            expected = [float(found[f"p_{label.lower()}"]) for label in task.LABELS]
            apart.append(np.abs(calibration.apply(server.classify(row["text"]).probabilities) - expected).max())
    print(f"{len(apart)} texts, probabilities differ by {np.mean(apart):.4f} on average, {max(apart):.4f} at most")
    assert len(apart) == 40
    assert np.mean(apart) < 0.01
    assert max(apart) < 0.05


def test_an_empty_text_is_answered_and_a_zero_byte_ends_a_text(server):
    """Why the service refuses both (task.text_error)."""
    assert sum(server.classify("").probabilities) == pytest.approx(1)
    # What follows a zero byte is either not read at all, or read; the service need not know which.
    assert sum(server.classify("such a day\0").probabilities) == pytest.approx(1)


def test_the_model_stays_loaded_and_its_context_is_what_was_asked_for(server):
    server.classify("some text")
    (model,) = [model for model in server._call("GET", "/api/ps")["models"] if model["name"].startswith(server.model)]
    years_left = int(model["expires_at"][:4]) - datetime.now().year
    assert years_left > 100
    assert model.get("context_length", task.CONTEXT_TOKENS) == task.CONTEXT_TOKENS


def test_the_digest_and_the_weights_are_told(server, run):
    assert len(server.digest()) == 64
    assert server.weights_sha256() == runs.sha256_of(run / "model.gguf")
    assert server.weights_path().name == f"sha256-{server.weights_sha256()}"


def test_how_long_a_text_is_that_is_too_long(server):
    """llama-server tells, in JSON within Ollama's error; Ollama 0.24 does not."""
    with pytest.raises(ollama.TextTooLong) as error:
        server.classify("word " * 3000)
    assert error.value.n_tokens is None or 3000 < error.value.n_tokens < 3100


def test_the_version_is_one_we_read(server):
    answer = requests.get(f"{server.url}/api/version", timeout=10).json()
    print("Ollama", json.dumps(answer))
    assert server.version() == answer["version"]
