"""Training on one GPU and on two of one host: the same adapter, and how many more rows a second.

    python -m tests.benchmarks.several_gpus            # two CUDA GPUs, 7 minutes; writes several_gpus.json
    python -m tests.benchmarks.several_gpus --quick    # two processes on a CPU, a tiny model; prints only

Both train on the same batches of 256 rows, which two GPUs share. The adapters are of the real SmolLM2-135M after 40
steps; the speed is that of the Mistral-7B shape with random weights in 4 bit, without what the first steps compile.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hatespeech import runs, tokens
from hatespeech.training import averaging, data, loop, processes, recording, tuning
from tests.benchmarks.training import ALPHA, BASE, LEARNING_RATE, RANK, ROOT, load_rows

STEPS = 40


def worker(base: str, output: Path, speed: bool, batch_size: int) -> None:
    """One process of torchrun: train, and write the adapter and the speed, from process 0."""
    with processes.joined() as rank:
        tuning.check_base(base)
        tokenizer = tokens.load_tokenizer(base)
        rows = load_rows(tokenizer)
        classifier = tuning.load(base, tokenizer, rank=RANK, alpha=ALPHA, seed=0)
        prompts, goals = tokenizer(rows["prompt"].tolist()).input_ids, data.targets(rows, 0.5)
        schedule = {"batch_size": batch_size, "learning_rate": LEARNING_RATE, "seed": 0}
        if not speed:
            done = loop.fit(classifier, prompts, goals, steps=STEPS if batch_size > 64 else 6, **schedule)
            found = {"rows_per_s": done["rows_per_s"]}
        else:
            # Every fit compiles or captures the shapes that come first; the difference of two is without.
            loop.fit(classifier, prompts, goals, steps=2, **schedule)
            first = loop.fit(classifier, prompts, goals, steps=5, **schedule)
            done = loop.fit(classifier, prompts, goals, steps=21, **schedule)
            found = {"rows_per_s": (done["rows"] - first["rows"]) / (done["seconds"] - first["seconds"])}
        found |= {"processes": done["processes"], "last_loss": done["last_loss"]}
        if rank == 0:
            state = {name: weight.cpu() for name, weight in averaging.state(classifier.model).items()}
            torch.save(state, output / "adapter.pt")
            runs.write_json(output / "found.json", found | {"peak_memory_gb": done["peak_memory_gb"]})


def run(base: str, processes: int, speed: bool, batch_size: int) -> tuple[dict, dict]:
    """What the processes reached, and their adapter."""
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*start, "-m", "tests.benchmarks.several_gpus", "--worker", base, folder, str(batch_size)]
        subprocess.run(command + (["--speed"] if speed else []), cwd=ROOT, check=True, env=os.environ)
        return json.loads(Path(folder, "found.json").read_text()), torch.load(Path(folder, "adapter.pt"))


def difference(one: dict, two: dict) -> float:
    """The norm of what two adapters differ by, relative to the first's."""
    first, second = (torch.cat([weight.flatten().double() for weight in each.values()]) for each in (one, two))
    return ((first - second).norm() / first.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two processes on a CPU; nothing is stored")
    parser.add_argument("--base", default=str(BASE), help="for the adapters: a hub id, directory or .gguf file")
    parser.add_argument("--worker", nargs=3, metavar=("BASE", "OUTPUT", "BATCH"), help=argparse.SUPPRESS)
    parser.add_argument("--speed", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        base, output, batch_size = arguments.worker
        return worker(base, Path(output), arguments.speed, int(batch_size))
    path = ROOT / "results" / "benchmarks" / "several_gpus.json"
    result = {"command": "python -m tests.benchmarks.several_gpus", "commit": recording.commit()}
    result |= {"versions": recording.versions(), "hardware": f"{torch.cuda.device_count()} x {tuning.hardware()}"}
    batch_size = 16 if arguments.quick else 256
    with tempfile.TemporaryDirectory() as made:
        base = f"{made}/tiny" if arguments.quick else arguments.base
        make = [sys.executable, "-m", "tests.benchmarks.training", "--tokenizer", arguments.base]
        if arguments.quick:
            subprocess.run([*make, "--quick", "--make", "tiny", base], cwd=ROOT, check=True)
        (one, adapter), (two, other) = (run(base, n, False, batch_size) for n in (1, 2))
        result["SmolLM2-135M"] = {"one": one, "two": two, "adapters_differ_by": difference(adapter, other)}
        print(json.dumps(result, indent=2), flush=True)
        if arguments.quick:
            return
        runs.write_json(path, result)
        subprocess.run([*make, "--quick", "--make", "Mistral-7B", f"{made}/7b"], cwd=ROOT, check=True)
        (one, _), (two, _) = (run(f"{made}/7b", n, True, batch_size) for n in (1, 2))
        result["Mistral-7B shape"] = {"one": one, "two": two, "speed_up": two["rows_per_s"] / one["rows_per_s"]}
        print(json.dumps(result, indent=2))
        runs.write_json(path, result)


if __name__ == "__main__":
    main()
