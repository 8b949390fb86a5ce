"""Both ways of bulk scoring give what one prompt at a time gives. (That this is the service's answer: test_bulk.py.)"""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from hatespeech import UserError, task, tokens
from hatespeech.bulk import scoring
from hatespeech.calibration import softmax
from tests.benchmarks.training import SHAPES
from tests.conftest import TEST


@pytest.fixture(scope="module")
def model(tokenizer):
    """A tiny one of random weights, its logits far apart; vLLM takes no heads as small as its own."""
    torch.manual_seed(0)
    shape = SHAPES["tiny"] | {"head_dim": 64, "initializer_range": 0.3}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **shape)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [*pd.read_parquet(TEST)["text"][:40].tolist(), "\n a beginning of its own", "x"]


@pytest.fixture(scope="module")
def expected(model, tokenizer, texts) -> np.ndarray:
    """(n, 3) logits of the labels, one prompt at a time."""
    labels = list(tokens.label_ids(tokenizer))
    with torch.inference_mode():
        return np.array(
            [model(torch.tensor([ids])).logits[0, -1, labels].numpy() for ids in tokens.encode(tokenizer, texts)]
        )


def all_logits(a_pass, prompts: list[list[int]]) -> np.ndarray:
    found = np.full((len(prompts), 3), np.nan)
    with torch.inference_mode():
        for rows, arrays in a_pass.prepare(prompts):
            found[rows] = a_pass.logits(**arrays).numpy()
    return found


def test_the_cpus_way_computes_what_one_at_a_time_does(model, tokenizer, texts, expected):
    labels, prompts = list(tokens.label_ids(tokenizer)), tokens.encode(tokenizer, texts)
    prefixed = scoring._Prefixed(copy.deepcopy(model), labels, tokens.encode(tokenizer, ["."])[0])
    assert np.abs(all_logits(prefixed, prompts) - expected).max() < 1e-4


def test_the_gpus_way_computes_what_one_at_a_time_does(model, tokenizer, texts, expected, monkeypatch):
    """On a CPU, where its layers are traced, but not compiled."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled(self, backend="eager", **options))
    monkeypatch.setitem(scoring.TOKENS_AT_ONCE, "cuda", 1024)
    labels, prompts = list(tokens.label_ids(tokenizer)), tokens.encode(tokenizer, texts)
    packed = scoring._Packed(copy.deepcopy(model), labels)
    assert np.abs(all_logits(packed, prompts) - expected).max() < 1e-4


def test_a_tokenizer_once_asked_to_pad_changes_nothing(tokenizer, texts):
    padding = copy.deepcopy(tokenizer)
    padding.pad_token, padding.padding_side = padding.eos_token, "left"
    padding(texts, padding=True)
    encode = scoring.encoder(padding)
    padding(texts, padding=True)
    assert encode(texts) == tokens.encode(tokenizer, texts)


def test_near_ties_are_computed_in_float32(model, tokenizer, texts, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(scoring, "NEAR_TIE", 2.0)  # all are
    found = scoring.Scorer(copy.deepcopy(model), tokenizer).label_probabilities(texts)
    assert np.abs(found - softmax(expected)).max() < 1e-5
    monkeypatch.setattr(scoring, "NEAR_TIE", 0.0)  # none is
    rounded = scoring.Scorer(copy.deepcopy(model), tokenizer).label_probabilities(texts)
    assert 1e-5 < np.abs(rounded - softmax(expected)).max() < 0.2


def test_a_text_too_long_has_no_probabilities(model, tokenizer):
    found = scoring.Scorer(copy.deepcopy(model), tokenizer).label_probabilities(["a", "word " * 3000, "b"])
    assert np.isnan(found).all(axis=1).tolist() == [False, True, False]


def test_models_and_runs_that_can_not_be_used_are_told(model, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"has no model\.gguf yet"):
        scoring.weights_path(tmp_path)
    narrow = copy.deepcopy(model)
    narrow.config.sliding_window = task.CONTEXT_TOKENS // 2
    with pytest.raises(UserError, match="window is shorter"):
        scoring.Scorer(narrow, tokenizer)
