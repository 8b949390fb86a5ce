"""Texts a second of scoring.py, side by side with what a user would write: transformers, batch after batch.

    python -m tests.benchmarks.bulk            # a CUDA GPU, 3 minutes; writes results/benchmarks/bulk.json
    python -m tests.benchmarks.bulk --quick    # a CPU, a tiny model, prints only

Models have random weights of the named shapes, in float16; TFLOP/s are those of the texts' own tokens. Texts are silver
comments, each made unlike the others by a number behind it; encoding and copying them is in the time, compiling is not.
"""

import argparse
import json
import platform
import sys
import time

import pandas as pd
import torch
import transformers

import train
from hatespeech import export, packing, scoring, task, tuning
from tests.benchmarks.training import BASE, ROOT, SHAPES, SILVER, linear_weights

BATCH = 64


def random_model(workload: str, tokenizer):
    kind = "Llama" if workload.startswith("SmolLM2") else "Mistral"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), max_position_embeddings=8192, **SHAPES[workload]
    )
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16 if cuda else torch.float32)
    with torch.device("cuda" if cuda else "cpu"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def batch_after_batch(model, tokenizer, texts: list[str]) -> None:
    """Left-padded batches as they come, logits of the last position alone."""
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    found = []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            prompts = [task.prompt(text) for text in texts[start : start + BATCH]]
            batch = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
            found.append(model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1))
    torch.cat(found).cpu()


def measure(workload: str, tokenizer, texts: list[str]) -> list[dict]:
    """A row for each way, both with one model, the texts' own tokens in TFLOP/s."""
    model, rows = random_model(workload, tokenizer), []
    ways = {f"transformers, batches of {BATCH}": lambda some: batch_after_batch(model, tokenizer, some)}
    few = len(texts) // 8
    for way in [*ways, "ours"]:
        if way == "ours":  # changes the model's attention
            scorer = scoring.Scorer(model, tokenizer)
            ways[way] = scorer.label_probabilities
        some = texts if way == "ours" else texts[:few]
        for _ in range(2):  # compiles
            ways[way](some[:few])
        started = time.monotonic()
        ways[way](some)
        seconds = time.monotonic() - started
        rows.append({"workload": workload, "way": way, "texts": len(some), "texts_per_s": len(some) / seconds})
    prompts = tuning.encode(tokenizer, texts[:2048])
    tokens = sum(map(len, prompts)) / len(prompts)
    own = tokens - packing.shared_tokens(prompts)
    for row in rows:
        row |= {"tokens_a_text": tokens, "tflops": 2 * linear_weights(workload) * own * row["texts_per_s"] / 1e12}
        if torch.cuda.is_available():
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model on a CPU; nothing is stored")
    parser.add_argument("--tokenizer", default=str(BASE), help="a hub id, directory or .gguf file")
    arguments = parser.parse_args()
    if not arguments.quick and not torch.cuda.is_available():
        sys.exit("benchmark: there is no CUDA GPU; --quick needs none")
    tokenizer = tuning.load_tokenizer(arguments.tokenizer)
    silver = pd.read_csv(SILVER)["text"].tolist()
    texts = [f"{text} {copy}" for copy in range(6) for text in silver]
    sizes = {"tiny": 128} if arguments.quick else {"SmolLM2-135M": len(texts), "Mistral-7B": 16_384}
    rows = []
    for workload, n_texts in sizes.items():
        for row in measure(workload, tokenizer, texts[:n_texts]):
            rows.append({name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in row.items()})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.quick:
        return
    result = {
        "command": "python -m tests.benchmarks.bulk",
        "commit": train.commit(),
        "hardware": tuning.hardware(),
        "versions": {name: module.__version__ for name, module in (("torch", torch), ("transformers", transformers))},
        "rows": rows,
    }
    result["versions"]["python"] = platform.python_version()
    export.write_json(ROOT / "results" / "benchmarks" / "bulk.json", result)


if __name__ == "__main__":
    main()
