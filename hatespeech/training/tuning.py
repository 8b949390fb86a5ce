"""Base model + LoRA + the training loop. The only module that knows unsloth.

One forward pass decides: the label is the first token after the prompt, so loss and prediction need the logits of that
one position. Prompts are packed behind one copy of their common instruction (packing.py), as many at once as the GPU's
memory holds. Under torchrun each process takes its share of every batch, and the gradients are summed.
"""

import hashlib
import os
import platform
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hatespeech import UserError, packing, task, tokens
from hatespeech.training import gpu
from hatespeech.training.checkpoint import Checkpoint, stop_asked

# A CPU trains bases up to this size in reasonable time (SmolLM2-135M: about 3 rows/s a core).
MAX_CPU_PARAMETERS = 1_000_000_000


@dataclass
class Classifier:
    """A causal language model with LoRA, read at the label position.

    label_ids: the first token of each of task.COMPLETIONS, all different.
    share_prefix: whether its attention takes packing's mask; else prompts are padded.
    tokens_at_once: what one forward and backward pass takes; on a GPU fit sets it to what the memory holds.
    """

    model: object
    tokenizer: object
    label_ids: tuple[int, ...]
    share_prefix: bool = True
    tokens_at_once: int = 2048

    @property
    def label_tokens(self) -> list[str]:
        """The label tokens as an inference engine spells them: ` Hate`, ` Neutral`, ` Supp` ..."""
        tokens = self.tokenizer.convert_ids_to_tokens(list(self.label_ids))
        return [token.replace("\u0120", " ").replace("\u2581", " ") for token in tokens]  # BPE's, sentencepiece's space


def check_base(base: str) -> None:
    """Refuse, before anything is downloaded or computed, a base that this machine can't train. Call it first."""
    with tokens.explained(base):
        import torch

        if torch.cuda.is_available():
            os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
            import unsloth  # noqa: F401  before transformers, which it patches
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(**tokens.location(base))
    if torch.cuda.is_available():
        return
    quantized = hasattr(config, "quantization_config") and not base.endswith(".gguf")
    with torch.device("meta"):
        config.quantization_config = None
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if quantized or parameters > MAX_CPU_PARAMETERS:
        raise UserError(
            f"{base}: {parameters / 1e9:.1f} billion parameters"
            f"{', stored in 4 bit,' if quantized else ''} need a CUDA GPU, and torch finds none. Train on a machine "
            "with one, or take a small base: --model HuggingFaceTB/SmolLM2-135M-Instruct"
        )


def load(base: str, tokenizer, *, rank: int, alpha: int, seed: int, adapter: Path | None = None) -> Classifier:
    """The base with a LoRA on every linear layer: 4 bit through unsloth on CUDA, else fp32 through PEFT.

    A .gguf base, quantised already, is trained in the 16 bits it is merged and served in. The LoRA is fresh, or that of
    a run's adapter/.
    base: hub id, local directory, or .gguf file. tokenizer: of load_tokenizer.
    """
    import torch

    lora = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }
    torch.manual_seed(seed)
    with tokens.explained(base):
        if torch.cuda.is_available():
            from unsloth import FastLanguageModel

            with _as_directory(base, tokenizer) as directory:
                model, _ = FastLanguageModel.from_pretrained(
                    directory,
                    max_seq_length=task.CONTEXT_TOKENS,
                    load_in_4bit=not base.endswith(".gguf"),
                    dtype=_cuda_dtype(),
                    device_map={"": torch.cuda.current_device()},
                )
            model = FastLanguageModel.get_peft_model(model, **lora, use_gradient_checkpointing=False, random_state=seed)
            attention_takes_masks = gpu.teach_unsloth_masks(model)
        else:
            from peft import LoraConfig, get_peft_model
            from transformers import AutoModelForCausalLM

            print("no CUDA GPU: training in fp32 on the CPU through transformers + PEFT, which is slow")
            model = AutoModelForCausalLM.from_pretrained(**tokens.location(base), dtype=torch.float32)
            model = get_peft_model(model, LoraConfig(**lora, task_type="CAUSAL_LM"))
            attention_takes_masks = True
    if adapter:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    model.peft_config["default"].base_model_name_or_path = base
    # A window that a prompt may outgrow is not in packing's mask.
    share_prefix = (
        attention_takes_masks
        and (getattr(model.config, "sliding_window", None) or task.CONTEXT_TOKENS) >= task.CONTEXT_TOKENS
    )
    if not share_prefix:
        print(f"{model.config.model_type}: its attention takes no mask of ours, so prompts are padded, which is slower")
    return Classifier(model, tokenizer, tokens.label_ids(tokenizer), share_prefix)


def label_logprobs(classifier: Classifier, bins: packing.Bins):
    """(n, 3) tensor, in the order of bins.rows: natural log-probabilities of the labels among the whole vocabulary."""
    device = next(classifier.model.parameters()).device
    return _label_logprobs(classifier, **packing.all_to_device(_inputs(classifier, bins), device))


def _inputs(classifier: Classifier, bins: packing.Bins) -> dict[str, np.ndarray]:
    """All that _label_logprobs computes with."""
    arrays = {"ids": bins.ids, "positions": bins.positions, "ends": bins.bins * bins.ids.shape[1] + bins.ends}
    arrays["labels"] = np.array(classifier.label_ids)
    if bins.masked:
        arrays["segments"] = bins.segments
        if next(classifier.model.parameters()).is_cuda:
            arrays["counts"], arrays["order"] = packing.blocks(bins.segments)
    return arrays


def _label_logprobs(classifier: Classifier, *, ids, positions, ends, labels, segments=None, counts=None, order=None):
    import torch

    causal, mask = classifier.model.get_base_model(), {}
    if counts is not None:
        mask = {"causal_mask": packing.block_mask(segments, counts, order)}
    elif segments is not None:
        mask = {"attention_mask": packing.dense_mask(segments)}
    # A CUDA graph must not depend on casts that were kept from before it.
    autocast = torch.autocast("cuda", _cuda_dtype(), cache_enabled=False) if ids.is_cuda else nullcontext()
    with autocast:
        hidden = causal.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False, **mask)[0]
        logits = causal.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, ends))
    return logits.float().log_softmax(-1).index_select(1, labels)


def event_logprobs(label_logprobs):
    """(n, 3) log-probabilities of Hate, Neutral, Supportive -> (n, 4), with that of Neutral or Supportive behind them.

    The fourth is what a comment teaches of which only is known that it is not Hate: the log of the sum of both.
    """
    import torch

    return torch.cat([label_logprobs, label_logprobs[:, 1:].logsumexp(1, keepdim=True)], dim=1)


def pieces(classifier: Classifier, prompts: Sequence[list[int]]) -> Iterator[packing.Bins]:
    """The prompts as the model takes them: packed where its attention allows, as many at once as its memory allows."""
    device = next(classifier.model.parameters()).device.type
    return packing.pieces(
        prompts, classifier.tokens_at_once, **packing.BIN_TOKENS[device], share=classifier.share_prefix
    )


def fit(
    classifier: Classifier,
    prompts: Sequence[list[int]],
    targets: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 60.0,
) -> dict[str, float]:
    """Train the LoRA on what is known of the classes; return seconds, rows/s, peak memory (GB), the loss's curve.

    targets: (n, 4), data.targets' weights of each prompt's events. The loss is their negative log-probability over the
    whole vocabulary at the label position, its mean over the batch. AdamW, linear warm-up over 5 % of the steps, then a
    cosine to 0.

    checkpoint: a file, written as often as said, at the end, and when SIGINT or SIGTERM asks to stop, which then raises
    KeyboardInterrupt. Where it holds a run of these very arguments, training goes on from it.
    Raises UserError where the GPU's memory can't hold one row, or the loss is no finite number.
    """
    import torch
    from tqdm.auto import tqdm
    from transformers import get_cosine_schedule_with_warmup

    cuda, (rank, world_size) = torch.cuda.is_available(), _rank()
    weights = [parameter for parameter in classifier.model.parameters() if parameter.requires_grad]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0, fused=cuda)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.05 * steps), steps)
    # float16 needs its gradients scaled. With bfloat16 the scaler is there for what else it does: a step whose
    # gradients are no finite numbers, as now and then one's are, is left out.
    scale = 65536.0 if cuda and _cuda_dtype() == torch.float16 else 1.0
    scaler = torch.amp.GradScaler("cuda", init_scale=scale, enabled=cuda)
    lora = classifier.model.peft_config["default"]
    settings = (lora.base_model_name_or_path, lora.r, lora.lora_alpha, steps, batch_size, learning_rate, seed)
    key = _digest(settings, prompts, targets)
    done = Checkpoint(checkpoint, key, weights, [optimizer, schedule, scaler])
    done.resume()
    classifier.model.train()

    def one_pass(tensors: dict) -> torch.Tensor:
        goals = tensors.pop("goals")
        loss = -(goals * event_logprobs(_label_logprobs(classifier, **tensors))).sum()
        scaler.scale(loss).backward()
        return loss.detach()

    def eager(arrays: dict) -> torch.Tensor:
        return one_pass(packing.all_to_device(arrays, weights[0].device))

    compute, rows_a_piece = eager, 0
    if cuda:
        checkpointing = _fit_memory(classifier, prompts, weights)
        torch.cuda.reset_peak_memory_stats()
        if torch.cuda.device_count() > 1:
            print("this process sees several GPUs: no CUDA graphs, which is slower (set CUDA_VISIBLE_DEVICES=0)")
        elif not checkpointing:
            compute, rows_a_piece = gpu.Graphs(one_pass), -(-batch_size // world_size)

    def backward(rows: np.ndarray) -> torch.Tensor:
        mine, total = rows[rank::world_size], torch.zeros((), device=weights[0].device)
        for piece in pieces(classifier, [prompts[row] for row in mine]) if len(mine) else ():
            arrays = _inputs(classifier, piece)
            arrays["goals"] = (targets[mine[piece.rows]] / len(rows)).astype(np.float32)
            spare = max(0, rows_a_piece - len(piece.rows))  # label positions of no weight, so that fewer shapes come
            arrays["ends"] = np.pad(arrays["ends"], (0, spare))
            arrays["goals"] = np.pad(arrays["goals"], ((0, spare), (0, 0)))
            total += compute(arrays)
        return total

    batches = _batches(len(prompts), batch_size, seed, skip=done.step)
    progress = tqdm(total=steps, initial=done.step, desc="training", unit="step", mininterval=1.0, disable=rank > 0)
    started = clock = shown = time.monotonic()
    rows_before = done.rows
    with stop_asked() as stop, progress:
        while done.step < steps and not stop:
            rows = next(batches)
            while True:
                try:
                    loss = backward(rows)
                    break
                except torch.cuda.OutOfMemoryError:
                    optimizer.zero_grad(set_to_none=False)
                    _halve(classifier, sum(len(prompts[row]) for row in rows), progress)
            if world_size > 1:
                loss, asked = _sum_over_processes(weights, loss, bool(stop))
                stop += [signal.SIGTERM] * asked  # all stop after the same step, whichever of them was asked
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad(set_to_none=False)
            done.losses.append(loss)
            done.step, done.rows = done.step + 1, done.rows + len(rows)
            progress.update()
            if time.monotonic() - shown > 1 or done.step == steps or stop:  # reading the loss waits for the GPU
                recent, shown = torch.stack(done.losses[-20:]).nanmean().item(), time.monotonic()
                rate = (done.rows - rows_before) / (shown - started)
                progress.set_postfix(loss=f"{recent:.3f}", rows_per_s=f"{rate:.0f}")
                done.seconds, clock = done.seconds + shown - clock, shown
                if not np.isfinite(recent):
                    raise UserError(f"the loss is {recent} at step {done.step}: try a smaller --learning-rate")
            due = done.step == steps or stop or time.monotonic() - done.saved_at > checkpoint_every_s
            if rank == 0 and due and (failure := done.save()):
                progress.write(failure)
    if done.step < steps:
        raise KeyboardInterrupt
    return {
        "steps": steps,
        "rows": done.rows,
        "seconds": round(done.seconds, 2),
        "rows_per_s": round(done.rows / max(done.seconds, 1e-9), 1),
        "processes": world_size,
        "tokens_at_once": classifier.tokens_at_once,
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
        "steps_left_out": int((~torch.stack(done.losses).isfinite()).sum()),
        "last_loss": round(torch.stack(done.losses[-max(1, steps // 10) :]).nanmean().item(), 4),
        "curve": {
            "rows": np.linspace(0, done.rows, steps + 1)[1:].astype(int),
            "loss": torch.stack(done.losses).tolist(),
        },
    }


def predict(classifier: Classifier, prompts: Sequence[list[int]]) -> np.ndarray:
    """(n, 3) log-probabilities of the labels among the whole vocabulary, in the prompts' order."""
    import torch
    from tqdm.auto import tqdm

    classifier.model.eval()
    logprobs = np.empty((len(prompts), len(task.LABELS)))
    with torch.no_grad(), tqdm(total=len(prompts), desc="predicting", unit="row", mininterval=1.0) as progress:
        for start in range(0, len(prompts), 1024):
            for piece in pieces(classifier, prompts[start : start + 1024]):
                logprobs[start + piece.rows] = label_logprobs(classifier, piece).cpu().numpy()
                progress.update(len(piece.rows))
    return logprobs


def label_probabilities(classifier: Classifier, prompts: Sequence[list[int]]) -> np.ndarray:
    """(n, 3) probabilities among the labels alone, as serving renormalises them."""
    return np.apply_along_axis(task.softmax, 1, predict(classifier, prompts))


@contextmanager
def processes() -> Iterator[int]:
    """Join the other processes, where torchrun started this one; yields the rank. Only process 0 prints. Call it first.

    Each process sees one GPU: where unsloth sees several, it waits for them in every layer.
    """
    (rank, world_size), visible = _rank(), os.environ.get("CUDA_VISIBLE_DEVICES")
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if visible != "":
        os.environ["CUDA_VISIBLE_DEVICES"] = local_rank if visible is None else visible.split(",")[int(local_rank)]
    if world_size == 1:
        yield rank
        return
    import torch
    from torch import distributed

    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        with open(os.devnull, "w") as nowhere, nullcontext() if rank == 0 else redirect_stdout(nowhere):
            yield rank
    finally:
        distributed.destroy_process_group()


def hardware() -> str:
    """The accelerator or processor that trains, in words."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def _batches(n: int, batch_size: int, seed: int, skip: int) -> Iterator[np.ndarray]:
    """Row numbers, shuffled anew in each epoch, without end; the first `skip` batches left out."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(n)
        for start in range(0, n, batch_size):
            if skip:
                skip -= 1
            else:
                yield order[start : start + batch_size]


def _fit_memory(classifier: Classifier, prompts: Sequence[list[int]], weights: list) -> bool:
    """Set tokens_at_once to what the GPU's memory holds; whether activations are then computed twice."""

    def run(tokens: int) -> int:
        classifier.tokens_at_once = tokens
        piece = next(pieces(classifier, prompts[: tokens // 16]))
        label_logprobs(classifier, piece).sum().backward()
        return piece.ids.size

    longest = min(gpu.MAX_TOKENS_AT_ONCE, max(1024, *map(len, prompts)))
    classifier.tokens_at_once, checkpointing = gpu.tokens_that_fit(run, classifier.model, weights, longest)
    return checkpointing


def _halve(classifier: Classifier, in_use: int, progress) -> None:
    """After the GPU ran out of memory, which others may use too: half as many tokens at once."""
    import torch

    if classifier.tokens_at_once <= packing.BLOCK:
        raise UserError("the GPU's memory can't hold one row: choose a smaller base with --model") from None
    torch.cuda.empty_cache()
    classifier.tokens_at_once = max(packing.BLOCK, min(classifier.tokens_at_once, in_use) // 2)
    progress.write(f"out of GPU memory: going on with {classifier.tokens_at_once:,} tokens at once")


def _rank() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _sum_over_processes(weights: list, loss, stop: bool) -> tuple[object, bool]:
    """Sum all processes' gradients, in place; the summed loss, and whether one of them was asked to stop."""
    import torch
    from torch import distributed

    flat = torch.cat([weight.grad.flatten() for weight in weights] + [loss.view(1), loss.new_full((1,), stop)])
    distributed.all_reduce(flat)
    for weight, summed in zip(weights, flat[:-2].split([weight.numel() for weight in weights]), strict=True):
        weight.grad.copy_(summed.view_as(weight))
    return flat[-2].clone(), bool(flat[-1] > 0)


def _digest(*values: object) -> str:
    """sha256 that names a run by its base, settings and data."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()


def _cuda_dtype():
    import torch

    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


@contextmanager
def _as_directory(base: str, tokenizer) -> Iterator[str]:
    """A .gguf file dequantised to a directory of bf16 weights, which is what unsloth can load; others as they are."""
    if not base.endswith(".gguf"):
        yield base
        return
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(**tokens.location(base), dtype=torch.bfloat16)
    # What is left of the GGUF quantiser would make save_pretrained refuse, though the weights are plain by now.
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        yield directory
