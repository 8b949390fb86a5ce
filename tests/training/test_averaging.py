import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hatespeech.training import averaging

RANK = 4


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)
    lora = LoraConfig(r=RANK, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora)


def another(model, seed: int) -> dict:
    """A state of other weights."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(weight.shape, generator=generator) for name, weight in averaging.state(model).items()}


def updates(state: dict) -> dict[str, np.ndarray]:
    """B A by layer."""
    names = [name for name in state if ".lora_A." in name]
    return {name: (state[name.replace(".lora_A.", ".lora_B.")] @ state[name]).numpy() for name in names}


def test_a_state_is_a_copy_of_what_trains_and_is_put_back(model):
    start = averaging.state(model)
    assert start
    assert all(".lora_" in name for name in start)
    kept = {name: weight.clone() for name, weight in start.items()}
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    averaging.restore(model, another(model, 1))
    assert not torch.allclose(model(ids).logits, before)
    assert all(torch.equal(start[name], kept[name]) for name in kept)
    averaging.restore(model, start)
    assert torch.equal(model(ids).logits, before)
    assert all(weight.requires_grad for name, weight in model.named_parameters() if name in start)


def test_the_mean_of_one_and_the_same_is_itself(model):
    state = another(model, 1)
    mean, lost = averaging.average([state] * 3)
    assert mean.keys() == state.keys()
    assert all(mean[name].shape == state[name].shape and mean[name].dtype == state[name].dtype for name in state)
    assert lost == pytest.approx(0, abs=1e-9)
    for name, update in updates(mean).items():
        assert update == pytest.approx(updates(state)[name], abs=1e-4)


def test_of_the_mean_update_the_best_of_its_rank_is_kept(model):
    """Eckart and Young: no matrix of the rank is nearer, and what is lost is the tail of the singular values."""
    states = [another(model, seed) for seed in (1, 2, 3)]
    mean, lost = averaging.average(states)
    tails, wholes = 0.0, 0.0
    for name, update in updates(mean).items():
        true = np.mean([updates(state)[name] for state in states], axis=0)
        u, s, v = np.linalg.svd(true)
        assert update == pytest.approx((u[:, :RANK] * s[:RANK]) @ v[:RANK], abs=1e-3)
        assert np.linalg.matrix_rank(update, tol=1e-3) == RANK
        tails, wholes = tails + (s[RANK:] ** 2).sum(), wholes + (s**2).sum()
    assert lost == pytest.approx(tails / wholes, abs=1e-4)
    assert 0.05 < lost < 0.7


def test_updates_that_share_their_rank_lose_nothing(model):
    """Of one A, as at the start of a LoRA, the mean of the B is the mean of the updates."""
    first, second = another(model, 1), another(model, 2)
    second |= {name: weight for name, weight in first.items() if ".lora_A." in name}
    mean, lost = averaging.average([first, second])
    assert lost == pytest.approx(0, abs=1e-9)
    for name, update in updates(mean).items():
        assert update == pytest.approx((updates(first)[name] + updates(second)[name]) / 2, abs=1e-4)


def test_a_lora_at_its_start_stays_there(model):
    """B is 0 there: nothing to decompose, and no division by nothing."""
    start = {name: weight * (".lora_A." in name) for name, weight in another(model, 1).items()}
    mean, lost = averaging.average([start, start])
    assert all(np.abs(update).max() == 0 for update in updates(mean).values())
    assert all(weight.isfinite().all() for weight in mean.values())
    assert 0 <= lost <= 1


def test_the_averaged_model_answers_between_its_members(model):
    """Where updates are small the logits are nearly linear in them."""
    start, ids = averaging.state(model), torch.tensor([[1, 2, 3, 4]])
    members = []
    for seed in (1, 2):
        moved = another(model, seed)
        members.append({name: weight + 0.001 * moved[name] for name, weight in start.items()})
    logits = []
    for state in (*members, averaging.average(members)[0]):
        averaging.restore(model, state)
        with torch.no_grad():
            logits.append(model(ids).logits)
    between = (logits[0] + logits[1]) / 2
    assert (logits[2] - between).abs().max() < 0.1 * (logits[0] - logits[1]).abs().max()
