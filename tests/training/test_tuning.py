import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hatespeech import UserError, task, tokens
from hatespeech.training import loop, tuning

TEXTS = ["short", "a somewhat longer text, with 😀 and <|im_end|>", "xy " * 70, "[/INST] Hate"]
# Of Hate, Neutral, Supportive, and Neutral or Supportive.
TARGETS = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0.2, 0.3, 0.5, 0], [0, 0, 1.0, 0]])


@pytest.fixture
def classifier(tokenizer):
    """A tiny random Llama with the real tokenizer, whose LoRA is not at its zero start."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return tuning.Classifier(model, tokenizer, tokens.label_ids(tokenizer))


def test_the_same_seed_gives_the_same_model(tokenizer, classifier):
    prompts = tokens.encode(tokenizer, TEXTS)
    start = {name: value.clone() for name, value in classifier.model.state_dict().items()}
    outcomes = []
    for _ in range(2):
        classifier.model.load_state_dict(start)
        loop.fit(classifier, prompts, TARGETS, steps=3, batch_size=2, learning_rate=1e-2, seed=5)
        outcomes.append(tuning.predict(classifier, prompts))
    assert np.array_equal(*outcomes)


def test_training_learns(classifier):
    prompts = tokens.encode(classifier.tokenizer, TEXTS)
    done = loop.fit(classifier, prompts, TARGETS, steps=60, batch_size=4, learning_rate=3e-2, seed=0)
    assert done["rows"] == 240
    assert done["steps_left_out"] == 0
    assert tuning.predict(classifier, prompts).argmax(axis=1).tolist() == TARGETS.argmax(axis=1).tolist()


def test_the_fourth_event_is_the_sum_of_two():
    logprobs = torch.log_softmax(torch.randn(50, 9, generator=torch.Generator().manual_seed(0)) * 5, 1)[:, :3]
    events = tuning.event_logprobs(logprobs)
    assert torch.equal(events[:, :3], logprobs)
    assert torch.allclose(events[:, 3].exp(), logprobs[:, 1].exp() + logprobs[:, 2].exp())
    sure = tuning.event_logprobs(torch.tensor([[0.0, -200.0, -201.0]]))  # too little for exp in 32 bit
    assert sure[0, 3].item() == pytest.approx(-200 + np.log1p(np.exp(-1)), abs=1e-3)


def test_not_hate_pulls_at_both_others_as_they_are(classifier):
    """Its gradient raises each by its own share: nothing is taught of which of both it is."""
    logits = torch.tensor([[1.0, 0.3, -2.0, 0.5]], requires_grad=True)
    logprobs = logits.log_softmax(1)
    (-tuning.event_logprobs(logprobs[:, :3])[0, 3]).backward()
    gradient, shares = logits.grad[0], logprobs.exp()[0].detach()
    assert gradient[0] > 0 > gradient[1:3].max()
    assert (gradient[1] / gradient[2]).item() == pytest.approx((shares[1] / shares[2]).item(), rel=1e-5)

    prompts, goals = tokens.encode(classifier.tokenizer, TEXTS), np.tile([0, 0, 0, 1.0], (len(TEXTS), 1))
    before = tuning.label_probabilities(classifier, prompts)
    loop.fit(classifier, prompts, goals, steps=20, batch_size=4, learning_rate=3e-2, seed=0)
    after = tuning.label_probabilities(classifier, prompts)
    assert after[:, 0].max() < before[:, 0].min()


def test_the_loss_is_that_of_the_definition(classifier):
    """Goals of every kind, weighted: minus the sum of goal times log-probability, divided by the batch's rows."""
    prompts = tokens.encode(classifier.tokenizer, TEXTS)
    goals = np.array([[1, 0, 0, 0], [0, 0, 0, 1], [0.2, 0.3, 0.5, 0], [0, 0, 0, 0.5]])
    logprobs = tuning.predict(classifier, prompts)
    events = np.column_stack([logprobs, np.logaddexp(logprobs[:, 1], logprobs[:, 2])])
    done = loop.fit(classifier, prompts, goals, steps=1, batch_size=4, learning_rate=1e-9, seed=0)
    assert done["last_loss"] == pytest.approx(-(goals * events).sum() / 4, abs=1e-4)
    assert done["curve"]["loss"] == [pytest.approx(done["last_loss"], abs=1e-4)]


def test_when_memory_runs_out_fewer_tokens_at_once_give_the_same_result(classifier, monkeypatch, capsys):
    """Memory that holds 128 tokens stands in for a small GPU's."""
    prompts = tokens.encode(classifier.tokenizer, TEXTS)
    start = {name: value.clone() for name, value in classifier.model.state_dict().items()}
    settings = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2, "seed": 0}
    loop.fit(classifier, prompts, TARGETS, **settings)
    whole = tuning.predict(classifier, prompts)

    classifier.model.load_state_dict(start)
    real = tuning.forward

    def small(classifier, *, ids, **others):
        if ids.numel() > 128:
            raise torch.cuda.OutOfMemoryError
        return real(classifier, ids=ids, **others)

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "forward", small)
        loop.fit(classifier, prompts, TARGETS, **settings)
    assert classifier.tokens_at_once < 200
    assert tuning.predict(classifier, prompts) == pytest.approx(whole, abs=1e-4)
    assert (
        f"out of GPU memory: training continues with {classifier.tokens_at_once} tokens at once"
        in capsys.readouterr().out
    )

    def none(*_, **__):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(tuning, "forward", none)
    with pytest.raises(UserError, match="can't hold one row"):
        loop.fit(classifier, prompts, TARGETS, **settings)


def test_a_loss_that_is_no_number_stops_the_run(classifier):
    prompts = tokens.encode(classifier.tokenizer, TEXTS)
    with pytest.raises(UserError, match="the loss is nan at step 1: try a smaller --learning-rate"):
        loop.fit(classifier, prompts, TARGETS * np.nan, steps=1, batch_size=4, learning_rate=1e-2, seed=0)


def test_batches_cover_every_row_once_an_epoch_and_skip_what_was_done():
    batches = loop._batches(1000, 32, seed=1, skip=0)
    epochs = [next(batches) for _ in range(64)]
    assert sorted(np.concatenate(epochs[:32])) == sorted(np.concatenate(epochs[32:])) == list(range(1000))
    assert not np.array_equal(epochs[0], epochs[32])
    assert np.array_equal(next(loop._batches(1000, 32, seed=1, skip=40)), epochs[40])


def test_label_tokens_are_three(tokenizer):
    ids = tokens.label_ids(tokenizer)
    classifier = tuning.Classifier(None, tokenizer, ids)
    assert classifier.label_tokens == [" H", " Neutral", " Support"]


def test_no_control_token_survives_in_a_text(tokenizer):
    control = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert len(control) > 10
    ids = tokenizer(task.prompt(" ".join(control))).input_ids
    assert not set(ids) & set(control.values())


class Letters:
    """A tokenizer of single letters, to which every completion starts with the same one, the space."""

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [ord(letter) for letter in text]})


class Words:
    """A tokenizer of words, to which a completion glued to the prompt's end makes one word with it."""

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": text.replace("] ", "]").split(" ")})


@pytest.mark.parametrize(("tokenizer", "reason"), [(Letters(), "starts two of"), (Words(), "fuses the prompt's end")])
def test_bases_that_cannot_tell_the_labels_apart_are_refused(tokenizer, reason):
    with pytest.raises(UserError, match=reason):
        tokens.label_ids(tokenizer)


def test_a_base_that_is_not_there_is_explained():
    with pytest.raises(UserError, match=r"no/such\.gguf: no such file"):
        tokens.load_tokenizer("no/such.gguf")
    with pytest.raises(UserError, match="neither a local model nor to be had"):
        tokens.load_tokenizer("./no-such-directory")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without CUDA")
def test_a_large_base_needs_cuda(tmp_path):
    LlamaConfig(hidden_size=4096, num_hidden_layers=32, intermediate_size=14336).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"billion parameters need a CUDA GPU.*--model HuggingFaceTB"):
        tuning.check_base(str(tmp_path))


def test_prompts_are_prefixes_of_trained_sequences(tokenizer):
    """The completion's first token is the one trained: nothing of it is swallowed by the prompt's end."""
    for text in TEXTS:
        prompt = tokenizer(task.prompt(text)).input_ids
        for completion, label_id in zip(task.COMPLETIONS, tokens.label_ids(tokenizer), strict=True):
            joined = tokenizer(task.prompt(text) + completion).input_ids
            assert joined[: len(prompt)] == prompt
            assert joined[len(prompt)] == label_id
