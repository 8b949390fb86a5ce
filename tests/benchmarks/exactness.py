"""Loss and LoRA gradients of every lever against a naive full forward of one row at a time.

    python -m tests.benchmarks.exactness    # prints; on a CUDA GPU also writes results/benchmarks/exactness.json

A small Llama with random weights, so that nothing is downloaded but its tokenizer. On a CPU all is fp32, and what
differs is the order of sums. On a GPU it is what training runs, unsloth in 4 bit with bf16 activations: there the
difference of padded rows, which share nothing, is that of bf16 alone.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hatespeech import packing, runs, task, tokens
from hatespeech.training import gpu, recording, tuning
from tests.benchmarks.training import BASE, ROOT

LENGTHS = (3, 200, 12, 12, 40, 1, 90, 7)
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def random_base(tokenizer, directory: str, **shape: int) -> str:
    """A Llama with random weights and this tokenizer, in the directory."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.05, **shape)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.save_pretrained(directory)
    return directory


def random_lora(model) -> None:
    """A LoRA away from its start, where B is 0 and A has no gradient."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def naive(classifier, prompt: list[int]):
    """(3,) label log-probabilities of one row, by the model's own forward over all its positions."""
    ids = torch.tensor([prompt], device=next(classifier.model.parameters()).device)
    with torch.autocast("cuda", tuning.half_precision(), enabled=ids.is_cuda):
        logits = classifier.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[0, -1].float().log_softmax(-1)[list(classifier.label_ids)]


def levers(classifier, prompts: list[list[int]], targets: np.ndarray) -> dict[str, Callable[[], float]]:
    """By name: adds to the LoRA's gradients and returns the loss, summed over all rows. targets: (n, 4)."""

    def backward(rows, logprobs) -> float:
        goals = torch.tensor(targets[rows], device=logprobs.device)
        loss = -(goals * tuning.event_logprobs(logprobs)).sum()
        loss.backward()
        return loss.item()

    def computed(bins: Iterable[packing.Bins]) -> float:
        return sum(backward(piece.rows, tuning.label_logprobs(classifier, piece)) for piece in bins)

    def checkpointed() -> float:
        classifier.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = computed([packing.pack(prompts, 512)])
        classifier.model.gradient_checkpointing_disable()
        return loss

    def graphed() -> float:
        def one_pass(tensors: dict):
            goals = tensors.pop("goals")
            loss = -(goals * tuning.event_logprobs(tuning.forward(classifier, **tensors))).sum()
            loss.backward()
            return loss.detach()

        piece, graphs = packing.pack(prompts, 512), gpu.Graphs(one_pass)
        arrays = tuning.inputs_of(classifier, piece) | {"goals": targets[piece.rows]}
        for _ in range(2):  # computed as usual, then captured
            graphs(arrays)
        for parameter in classifier.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        return graphs(arrays).item()

    def one_at_a_time() -> float:
        """The definition, word for word: a partial label's loss is -log of the sum of both probabilities."""
        total = 0.0
        for row, prompt in enumerate(prompts):
            logprobs, goals = naive(classifier, prompt), targets[row].tolist()
            neither = torch.log(logprobs[1].exp() + logprobs[2].exp())
            loss = -sum(goal * each for goal, each in zip(goals, [*logprobs, neither], strict=True))
            loss.backward()
            total += loss.item()
        return total

    found = {
        "one row at a time": one_at_a_time,
        "padded rows": lambda: computed([packing.pad(prompts)]),
        "packed, one bin": lambda: computed([packing.pack(prompts, 2048)]),
        "packed, several bins": lambda: computed([packing.pack(prompts, 200)]),
        "packed, a bin at a time": lambda: computed(
            packing.pieces(prompts, 200, bin_tokens=200, unit=packing.BLOCK, share=True)
        ),
        "packed, activations computed twice": checkpointed,
    }
    return found | ({"packed, as a CUDA graph": graphed} if torch.cuda.is_available() else {})


def measure(tokenizer) -> pd.DataFrame:
    """A row a lever: relative difference of loss and gradient (norms), and the gradients' cosine."""
    with tempfile.TemporaryDirectory() as directory:
        base = random_base(tokenizer, directory, **SHAPE)
        tuning.check_base(base)
        classifier = tuning.load(base, tokenizer, rank=8, alpha=16, seed=0)
    random_lora(classifier.model)
    classifier.model.train()
    words = np.random.default_rng(0).choice(["a", "the", "😀", " no", "\n", "<s>", "words"], sum(LENGTHS))
    texts = [" ".join(part) for part in np.split(words, np.cumsum(LENGTHS)[:-1])]
    prompts = tokens.encode(tokenizer, texts)
    rng = np.random.default_rng(1)
    targets = np.zeros((len(prompts), 4), dtype=np.float32)
    targets[:, :3] = rng.dirichlet(np.ones(len(task.LABELS)), len(prompts))
    targets[::3] = [0, 0, 0, 1]  # of every third only is known that it is not Hate
    targets[1::4] *= 0.5  # a row that counts half
    weights = [parameter for parameter in classifier.model.parameters() if parameter.requires_grad]
    rows = []
    for name, lever in levers(classifier, prompts, targets).items():
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        loss, gradient = lever(), torch.cat([weight.grad.flatten().double().cpu() for weight in weights])
        if not rows:
            true_loss, true_gradient = loss, gradient
        rows.append(
            {
                "lever": name,
                "loss_difference": abs(loss - true_loss) / true_loss,
                "gradient_difference": ((gradient - true_gradient).norm() / true_gradient.norm()).item(),
                "gradient_cosine": torch.cosine_similarity(gradient, true_gradient, dim=0).item(),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default=str(BASE), help="a hub id, directory or .gguf file")
    tokenizer = tokens.load_tokenizer(parser.parse_args().tokenizer)
    table = measure(tokenizer)
    print(table.to_string())
    if torch.cuda.is_available():
        result = {"command": "python -m tests.benchmarks.exactness", "commit": recording.commit()}
        result |= {"hardware": tuning.hardware(), "versions": recording.versions(), "rows": table.to_dict("records")}
        runs.write_json(ROOT / "results" / "benchmarks" / "exactness.json", result)


if __name__ == "__main__":
    main()
