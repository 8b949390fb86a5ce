"""Texts a second of bulk scoring, side by side with what a user would have without it.

    python -m tests.benchmarks.bulk            # on a CUDA GPU or a CPU, 5 minutes; writes results/benchmarks/bulk.json
    python -m tests.benchmarks.bulk --quick    # a CPU, a tiny model, prints only

On a CPU, the shipped model: the service with four clients, scoring.py and `hatespeech bulk` with one worker
and with two. On a GPU, scoring.py, transformers batch after batch and, where it is installed, vLLM: random weights of
the named shapes, in float16, TFLOP/s are those of the texts' own tokens, and a figure is the median of three. Texts are
those of train.parquet, no two alike; encoding and copying them is in the time, starting and compiling is not.
"""

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import requests
import torch

from hatespeech import ollama, packing, runs, task, tokens
from hatespeech.bulk import scoring
from hatespeech.calibration import Calibration
from hatespeech.training import recording, tuning
from tests.benchmarks.training import BASE, ROOT, ROWS, linear_weights, random_model

RUN = ROOT / "results" / "smollm2-135m"

BATCH = 64


def batch_after_batch(model, tokenizer, texts: list[str]) -> None:
    """Left-padded batches as they come, logits of the last position alone."""
    tokenizer.padding_side = "left"
    found = []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            prompts = [task.prompt(text) for text in texts[start : start + BATCH]]
            batch = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
            found.append(model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1))
    torch.cat(found).cpu()


def median_rate(compute: Callable[[list[str]], object], texts: list[str], few: int) -> float:
    """Texts a second, the median of three passes, after two over a few texts, which compile."""
    seconds = []
    for some in (texts[:few], texts[:few], texts, texts, texts):
        started = time.monotonic()
        compute(some)
        seconds.append(time.monotonic() - started)
    print(f"{len(texts)} texts in", *(f"{each:.2f}" for each in seconds[2:]), "s", flush=True)
    return len(texts) / sorted(seconds[2:])[1]


def measure_gpu(workload: str, tokenizer, texts: list[str]) -> list[dict]:
    """A row for each way, all with one model, the texts' own tokens in TFLOP/s. The slower ways get fewer texts."""
    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    model, few = random_model(workload, tokenizer, dtype).eval(), texts[: len(texts) // 8]
    rates = {
        f"transformers, batches of {BATCH}": median_rate(
            lambda some: batch_after_batch(model, tokenizer, some), few, len(few) // 8
        )
    }
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    rates["ours"] = median_rate(scoring.Scorer(model, tokenizer).label_probabilities, texts, len(few))
    rows = [{"workload": workload, "way": way, "texts_per_s": rate} for way, rate in rates.items()]
    prompts = tokens.encode(tokenizer, texts[:2048])
    n_tokens = sum(map(len, prompts)) / len(prompts)
    own = n_tokens - packing.shared_tokens(prompts)
    for row in rows:
        row |= {"tokens_per_text": n_tokens, "tflops": 2 * linear_weights(workload) * own * row["texts_per_s"] / 1e12}
    if torch.cuda.is_available():
        rows[-1]["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return rows


def measure_cpu(texts: list[str]) -> list[dict]:
    """The shipped model; the service and scoring.py take turns with every half of the texts."""
    from hatespeech.bulk import job as bulk
    from tests.benchmarks import serving

    name, rows = runs.model_name(RUN), []
    calibration = Calibration.load(RUN / "calibration.json")
    with tempfile.TemporaryDirectory() as scratch, ollama.private_server(Path(scratch)) as host:
        ollama.create(host, name, RUN)
        process, url, _ = serving.start_app(host, scratch)
        try:
            scorer = scoring.load(RUN, calibration)
            scorer.label_probabilities(texts[:32])

            def service(some: list[str]) -> list[str]:
                with ThreadPoolExecutor(4) as pool:
                    answers = list(pool.map(lambda text: requests.post(f"{url}/infer", data=text.encode()), some))
                return [answer.text.strip() for answer in answers]

            def scored(some: list[str]) -> list[str]:
                return [task.decide(row) for row in calibration.apply(scorer.label_probabilities(some))]

            ways = {"the service, 4 clients": service, "scoring.py, all cores": scored}
            seconds, labels = dict.fromkeys(ways, 0.0), {way: [] for way in ways}
            for half in (texts[::2], texts[1::2]):
                for way, compute in ways.items():
                    started = time.monotonic()
                    labels[way] += compute(half)
                    seconds[way] += time.monotonic() - started
            rows += [{"way": way, "texts": len(texts), "texts_per_s": len(texts) / seconds[way]} for way in ways]
            rows[-1]["labels_as_served"] = sum(map(str.__eq__, *labels.values())) / len(texts)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        pd.DataFrame({"text": texts}).to_parquet(f"{scratch}/in.parquet")
        for workers in (1, 2):
            output = f"{scratch}/{workers}"
            done = bulk.run(f"{scratch}/in.parquet", output, model_dir=str(RUN), workers=workers, rows_per_part=160)
            found = done["scored"]
            rows.append({"way": f"hatespeech.bulk, workers: {workers}", "texts": found["rows"]})
            rows[-1]["texts_per_s"] = found["rows"] / found["seconds"]
    return [{"workload": "SmolLM2-135M"} | row for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model on a CPU; nothing is stored")
    parser.add_argument("--tokenizer", default=str(BASE), help="a hub id, directory or .gguf file")
    arguments = parser.parse_args()
    tokenizer = tokens.load_tokenizer(arguments.tokenizer)
    texts, rows = pd.read_parquet(ROWS)["text"].drop_duplicates().tolist(), []
    cuda = torch.cuda.is_available()
    if cuda or arguments.quick:
        texts = [f"{text} {copy}" for copy in range(3) for text in texts]
        sizes = {"SmolLM2-135M": len(texts), "Mistral-7B": 8_192} if cuda else {"tiny": 128}
        for workload, n_texts in sizes.items():
            rows += measure_gpu(workload, tokenizer, texts[:n_texts])
    else:
        rows = measure_cpu(texts[:640])
    rows = [{name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in row.items()} for row in rows]
    print(pd.DataFrame(rows).to_string(index=False))
    if arguments.quick:
        return
    path = ROOT / "results" / "benchmarks" / "bulk.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored["gpu" if cuda else "cpu"] = {
        "command": "python -m tests.benchmarks.bulk",
        "commit": recording.commit(),
        "hardware": tuning.hardware(),
        "versions": recording.versions(),
        "rows": rows,
    }
    runs.write_json(path, stored)


if __name__ == "__main__":
    main()
