"""Rows a second of fine-tuning, by the recipes people use and by ours, in one run on one card.

    python -m tests.benchmarks.training            # a CUDA GPU, 15 minutes; writes results/benchmarks/training.json
    python -m tests.benchmarks.training --quick    # a CPU, a tiny model, prints only

Bases have random weights of the named shape, stored in 4 bit, and SmolLM2's tokenizer: no download. Rows are comments
of tests/data/train.parquet in the prompt. Each recipe has a process of its own, some steps of warm-up, then `seconds`.
`tflops` counts 4 operations a weight of a linear layer and a token that is no padding (forward, and backward to the
activations: the base is frozen); activations computed twice and an instruction computed for every row are not useful
work, so they show in rows/s. `matmul_share` is its share of what a plain bf16 matrix product of such size reaches here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

import train
from hatespeech import packing, runs, task, tokens
from hatespeech.training import data, loop, recording, tuning

ROOT = Path(train.__file__).parent
BASE = ROOT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = ROOT / "tests" / "data" / "train.parquet"

SHAPES = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "Mistral-7B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
RANK, ALPHA, LEARNING_RATE, WARM_UP_STEPS = 16, 32, 2e-4, 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL_CARD_GB = 22


def random_model(workload: str, tokenizer, dtype):
    """A model of the named shape and random weights, on the GPU where there is one."""
    import torch
    import transformers

    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    kind = "Llama" if workload.startswith("SmolLM2") else "Mistral"
    config_class = getattr(transformers, f"{kind}Config")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = config_class(vocab_size=len(tokenizer), max_position_embeddings=8192, **ids, **SHAPES[workload])
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    torch.set_default_dtype(usual)
    return model


def make_base(workload: str, tokenizer_source: str, folder: Path) -> None:
    """A base of random weights: 4 bit where there is a GPU."""
    import torch
    import transformers

    tokenizer = tokens.load_tokenizer(tokenizer_source)
    model = random_model(workload, tokenizer, torch.bfloat16)
    with tempfile.TemporaryDirectory() as whole:
        if torch.cuda.is_available():
            model.save_pretrained(whole)
            del model
            torch.cuda.empty_cache()
            quantized = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
            model = transformers.AutoModelForCausalLM.from_pretrained(
                whole, dtype=torch.bfloat16, quantization_config=quantized, device_map={"": 0}
            )
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_rows(tokenizer) -> pd.DataFrame:
    rows = pd.read_parquet(ROWS).dropna(subset="hate_speech_score").sample(4096, random_state=0, ignore_index=True)
    completions = [task.COMPLETIONS[task.LABELS.index(task.label_of(score))] for score in rows["hate_speech_score"]]
    prompts = [task.prompt(text) for text in rows["text"]]
    frame = pd.DataFrame({"prompt": prompts, "completion": completions, "score": rows["hate_speech_score"]})
    frame = frame.assign(label=rows["label"], kind="score")
    return frame.assign(tokens=[len(ids) for ids in tokenizer(prompts).input_ids])


def with_sft_trainer(base: Path, rows: pd.DataFrame, seconds: float, *, unsloth: bool, notebook: bool) -> dict:
    """TRL's SFTTrainer; notebook: the settings that unsloth's notebooks have, else the best found for these rows."""
    import torch

    if unsloth:
        from unsloth import FastLanguageModel
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    lora = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": TARGETS}
    if unsloth:
        model, tokenizer = FastLanguageModel.from_pretrained(str(base), max_seq_length=2048, load_in_4bit=True)
        checkpointing = "unsloth" if notebook else False
        model = FastLanguageModel.get_peft_model(model, **lora, use_gradient_checkpointing=checkpointing)
    else:
        dtype = torch.bfloat16 if cuda else torch.float32
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map={"": 0} if cuda else None)
        tokenizer = AutoTokenizer.from_pretrained(base)
    if notebook:
        text = rows["prompt"] + rows["completion"] + tokenizer.eos_token
        dataset = datasets.Dataset.from_dict({"text": text.tolist()})
    else:
        dataset = datasets.Dataset.from_pandas(rows[["prompt", "completion"]])

    class Timer(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if cuda:
                torch.cuda.synchronize()
            if state.global_step == WARM_UP_STEPS:
                self.started = time.monotonic()
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
            elif state.global_step > WARM_UP_STEPS:
                self.seconds = time.monotonic() - self.started
                control.should_training_stop = self.seconds > seconds

    batch_size = 2 if notebook else 128 if unsloth else 64
    if not cuda:
        batch_size = 8
    while True:
        timer = Timer()
        with tempfile.TemporaryDirectory() as output:
            arguments = {
                "output_dir": output,
                "per_device_train_batch_size": batch_size,
                "gradient_accumulation_steps": 4 if notebook else 1,
                "learning_rate": LEARNING_RATE,
                "optim": "adamw_8bit" if notebook else "adamw_torch",
                "max_length": 2048,
                "num_train_epochs": 1000,
                "bf16": cuda,
                "use_cpu": not cuda,
                "logging_steps": 50,
                "save_strategy": "no",
                "report_to": "none",
                "gradient_checkpointing": notebook,
                "dataset_num_proc": 1,
            }
            if not notebook:
                arguments |= {"padding_free": False, "train_sampling_strategy": "group_by_length"}
            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(**arguments),
                train_dataset=dataset,
                processing_class=tokenizer,
                callbacks=[timer],
                **({} if unsloth else {"peft_config": LoraConfig(**lora, task_type="CAUSAL_LM")}),
            )
            try:
                trainer.train()
            except torch.cuda.OutOfMemoryError:
                batch_size //= 2
                model = model if unsloth else trainer.model.unload()
                del trainer
                torch.cuda.empty_cache()
                continue
        n_rows = (trainer.state.global_step - WARM_UP_STEPS) * batch_size * arguments["gradient_accumulation_steps"]
        peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
        tokens = n_rows * float(rows["tokens"].mean())
        result = {"batch": f"{batch_size} x {arguments['gradient_accumulation_steps']}", "peak_memory_gb": peak}
        return result | {"rows_per_s": n_rows / timer.seconds, "useful_tokens_per_s": tokens / timer.seconds}


def with_ours(base: Path, rows: pd.DataFrame, seconds: float, *, share: bool = True, small_card: bool = False) -> dict:
    """loop.py, as `python -m train` calls it. small_card: all but 22 GB of the GPU's memory are taken."""
    import torch

    tokenizer = tokens.load_tokenizer(str(base))
    cuda, taken_gb, ballast = torch.cuda.is_available(), 0.0, None
    if small_card:
        ballast = torch.empty(torch.cuda.mem_get_info()[0] - int(SMALL_CARD_GB * 1e9), dtype=torch.uint8, device="cuda")
        taken_gb = ballast.numel() / 1e9
    classifier = tuning.load(str(base), tokenizer, rank=RANK, alpha=ALPHA, seed=0)
    classifier.share_prefix = share
    prompts = tokenizer(rows["prompt"].tolist()).input_ids
    targets = data.targets(rows, 0.5)
    batch_size = 256 if cuda else 8

    def fit(steps: int) -> dict:
        settings = {"batch_size": batch_size, "learning_rate": LEARNING_RATE, "seed": 0}
        return loop.fit(classifier, prompts, targets, steps=steps, **settings)

    # Every fit compiles or captures the shapes that come first. Two of the same beginning: their difference is without.
    beginning = 24 if base.joinpath("model.safetensors").stat().st_size < 1e9 else 6
    fit(WARM_UP_STEPS)
    first = fit(beginning)
    done = fit(beginning + max(beginning, round(first["rows_per_s"] * seconds / batch_size)))
    rows_per_s = (done["rows"] - first["rows"]) / (done["seconds"] - first["seconds"])
    batch = tuning.pieces(classifier, prompts[:batch_size])
    useful = sum(int((piece.segments != packing.PADDING).sum()) for piece in batch) / batch_size
    result = {"batch": str(batch_size), "rows_per_s": rows_per_s, "tokens_at_once": done["tokens_at_once"]}
    result |= {"rows_per_s_with_warm_up": done["rows_per_s"], "useful_tokens_per_s": rows_per_s * useful}
    result |= {"peak_memory_gb": done["peak_memory_gb"] - taken_gb if cuda else None}
    if cuda and share and not small_card:
        result["profile"] = profile(lambda: fit(2 * beginning))
    return result


def profile(run) -> dict[str, float]:
    """Shares of the wall time, in the second half of the run, by what the GPU does in it."""
    import torch

    kinds = {"matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitK"), "dequantising": ("equantize",)}
    kinds |= {"attention": ("flex", "flash", "fmha", "attention", "triton_tem")}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    begin, end = min(k.time_range.start for k in kernels), max(k.time_range.end for k in kernels)
    begin += (end - begin) / 2
    shares = dict.fromkeys([*kinds, "other kernels"], 0.0)
    for kernel in (kernel for kernel in kernels if kernel.time_range.start >= begin):
        names = [kind for kind, words in kinds.items() if any(word in kernel.name for word in words)]
        shares[names[0] if names else "other kernels"] += kernel.time_range.elapsed_us() / (end - begin)
    return {name: round(share, 3) for name, share in shares.items()} | {
        "idle": round(1 - sum(shares.values()), 3),
    }


RECIPES = {
    "unsloth notebook": lambda *args: with_sft_trainer(*args, unsloth=True, notebook=True),
    "TRL + PEFT + bitsandbytes": lambda *args: with_sft_trainer(*args, unsloth=False, notebook=False),
    "unsloth + SFTTrainer, tuned": lambda *args: with_sft_trainer(*args, unsloth=True, notebook=False),
    "ours, padded, nothing shared": lambda *args: with_ours(*args, share=False),
    "ours": with_ours,
    f"ours, in {SMALL_CARD_GB} GB": lambda *args: with_ours(*args, small_card=True),
}


def matmul_tflops() -> float:
    """What a bf16 matrix product of an MLP's size reaches on this GPU, TFLOP/s."""
    import torch

    a, b = (torch.randn(*shape, dtype=torch.bfloat16, device="cuda") for shape in ((8192, 4096), (4096, 14336)))
    for _ in range(2):  # the first is the warm-up
        torch.cuda.synchronize()
        started = time.monotonic()
        for _ in range(100):
            a @ b
        torch.cuda.synchronize()
    return 2 * 100 * a.numel() * b.shape[1] / (time.monotonic() - started) / 1e12


def linear_weights(workload: str) -> int:
    """Weights of the linear layers, without embeddings and head."""
    shape = SHAPES[workload]
    hidden, kv = shape["hidden_size"], shape["num_key_value_heads"] / shape["num_attention_heads"]
    return int(shape["num_hidden_layers"] * hidden * (hidden * (2 + 2 * kv) + 3 * shape["intermediate_size"]))


def one(recipe: str, workload: str, base: Path, seconds: float) -> dict:
    """This process's one measurement."""
    if not recipe.startswith("TRL"):
        tuning.check_base(str(base))  # unsloth before transformers, which it patches
    rows = load_rows(tokens.load_tokenizer(str(base)))
    measured = RECIPES[recipe](base, rows, seconds)
    tokens_per_s = measured["rows_per_s"] * float(rows["tokens"].mean())
    measured["tflops"] = 4 * linear_weights(workload) * measured.pop("useful_tokens_per_s") / 1e12
    return {"workload": workload, "recipe": recipe, "tokens_per_s": tokens_per_s} | measured


def in_own_process(arguments: list[str]) -> dict:
    import torch

    # TRL's loss is a Triton kernel; without a GPU it is interpreted.
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.training", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if done.returncode == 0 and lines else {"error": f"exit status {done.returncode}"}


def _rounded(value):
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model on a CPU; nothing is stored")
    parser.add_argument("--tokenizer", default=str(BASE), help="a hub id, directory or .gguf file")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured time of each recipe")
    parser.add_argument("--only", nargs=3, metavar=("RECIPE", "WORKLOAD", "BASE"), help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, metavar=("WORKLOAD", "BASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_base(arguments.make[0], arguments.tokenizer, Path(arguments.make[1]))
        return print(json.dumps({"matmul_tflops": None if arguments.quick else matmul_tflops()}))
    if arguments.only:
        recipe, workload, base = arguments.only
        return print(json.dumps(one(recipe, workload, Path(base), arguments.seconds)))
    workloads = ["tiny"] if arguments.quick else ["SmolLM2-135M", "Mistral-7B"]
    quick = ["--quick", "--seconds", "2"] if arguments.quick else ["--seconds", str(arguments.seconds)]
    result = {
        "command": "python -m tests.benchmarks.training",
        "commit": recording.commit(),
        "hardware": tuning.hardware(),
        "versions": recording.versions(),
        "seconds": arguments.seconds,
        "rows": [],
    }
    for workload in workloads:
        with tempfile.TemporaryDirectory() as base:
            result |= in_own_process([*quick, "--tokenizer", arguments.tokenizer, "--make", workload, base])
            for recipe in RECIPES:
                needs_gpu = "unsloth" in recipe or "GB" in recipe
                if (arguments.quick and needs_gpu) or (workload == "SmolLM2-135M" and "GB" in recipe):
                    continue
                print(f"measuring {workload}: {recipe}", file=sys.stderr, flush=True)
                row = {"workload": workload, "recipe": recipe}
                row |= in_own_process([*quick, "--only", recipe, workload, base])
                if result["matmul_tflops"] and "tflops" in row:
                    row["matmul_share"] = row["tflops"] / result["matmul_tflops"]
                result["rows"].append({name: _rounded(value) for name, value in row.items()})
                if not arguments.quick:
                    runs.write_json(ROOT / "results" / "benchmarks" / "training.json", result)
    table = pd.DataFrame(result["rows"]).drop(columns="profile", errors="ignore").replace({np.nan: None})
    print(table.to_string(index=False, float_format="{:.3g}".format))
    failed = [row["recipe"] for row in result["rows"] if "error" in row]
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
