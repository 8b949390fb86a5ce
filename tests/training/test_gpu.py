"""The parts for a GPU that a CPU can show; what runs on one is measured by tests/benchmarks (results/benchmarks)."""

import pytest
import torch

from hatespeech import UserError
from hatespeech.training import gpu


class Card:
    """A GPU's memory: what it has, and what a forward and backward pass takes for each token."""

    def __init__(self, monkeypatch, free_gb: float, mb_a_token: float, checkpointed_mb: float):
        self.free, self.costs, self.cost = free_gb * 1e9, {False: mb_a_token, True: checkpointed_mb}, mb_a_token
        self.used = 0.0
        for name, value in (
            ("mem_get_info", lambda: (int(self.free), int(self.free))),
            ("memory_allocated", lambda: 0),
            ("max_memory_allocated", lambda: int(self.used)),
            ("reset_peak_memory_stats", lambda: None),
            ("empty_cache", lambda: None),
        ):
            monkeypatch.setattr(torch.cuda, name, value)

    def gradient_checkpointing_enable(self, **_) -> None:
        self.cost = self.costs[True]

    def run(self, tokens: int) -> int:
        self.used = tokens * self.cost * 1e6
        if self.used > self.free:
            raise torch.cuda.OutOfMemoryError
        return tokens


@pytest.fixture
def weights() -> list[torch.Tensor]:
    weight = torch.zeros(1000, requires_grad=True)
    weight.grad = torch.ones(1000)
    return [weight]


@pytest.mark.parametrize(
    ("free_gb", "needed", "expected"),
    [
        (80, 1024, (9187, False)),  # MB a token as measured for the Mistral-7B shape: results/benchmarks
        (16, 1024, (1837, False)),
        (6, 1024, (2520, True)),  # too little to keep activations
        (16, 2048, (6720, True)),  # enough for most prompts, not for the longest
        (8000, 1024, (gpu.MAX_TOKENS_AT_ONCE, False)),
    ],
)
def test_tokens_at_once_and_checkpointing_follow_from_the_free_memory(monkeypatch, weights, free_gb, needed, expected):
    card = Card(monkeypatch, free_gb, mb_a_token=3.657, checkpointed_mb=1.0)
    found, checkpointing = gpu.tokens_that_fit(card.run, card, weights, needed)
    assert (found, checkpointing) == (pytest.approx(expected[0], rel=0.01), expected[1])
    assert not weights[0].grad.any()  # nothing of the trial is left in the gradients


def test_a_card_too_small_says_what_to_do(monkeypatch, weights):
    card = Card(monkeypatch, 0.4, mb_a_token=3.657, checkpointed_mb=1.0)
    with pytest.raises(UserError, match="can't hold the longest comment: choose a smaller base with --model"):
        gpu.tokens_that_fit(card.run, card, weights, 1024)


def test_models_whose_attention_takes_no_mask_are_padded():
    class Attention:
        def forward(self):
            pass

    class Model:
        config = type("Config", (), {"model_type": "gemma2"})

        def get_base_model(self):
            return self

        get_decoder = get_base_model
        layers = (type("Layer", (), {"self_attn": Attention()})(),)

    assert gpu.teach_unsloth_masks(Model()) is False
