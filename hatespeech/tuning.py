"""Base model + LoRA + the training loop. The only module that knows torch and unsloth.

One forward pass decides: the label is the first token after the prompt, so loss and prediction need the logits of that
one position. Rows are padded on the right, where a causal model never looks back at the padding, so no mask is needed.
"""

import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hatespeech import UserError, task

# A CPU trains bases up to this size in reasonable time (SmolLM2-135M: about 2 rows/s a core).
MAX_CPU_PARAMETERS = 1_000_000_000


@dataclass
class Classifier:
    """A causal language model with LoRA, read at the label position.

    label_ids: the first token of each of task.COMPLETIONS, all different.
    """

    model: object
    tokenizer: object
    label_ids: tuple[int, ...]

    @property
    def label_tokens(self) -> list[str]:
        """The label tokens as an inference engine spells them: ` Hate`, ` Neutral`, ` Supp` ..."""
        tokens = self.tokenizer.convert_ids_to_tokens(list(self.label_ids))
        return [token.replace("\u0120", " ").replace("\u2581", " ") for token in tokens]  # BPE's, sentencepiece's space


def load_tokenizer(base: str):
    """The base's tokenizer. Raises UserError where it can't be had or can't tell the labels by their first token."""
    with _explained(base):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(**_location(base))


def check_base(base: str) -> None:
    """Refuse, before anything is downloaded or computed, a base that this machine can't train. Call it first."""
    with _explained(base):
        import torch

        if torch.cuda.is_available():
            os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
            import unsloth  # noqa: F401  before transformers, which it patches
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(**_location(base))
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


def load(base: str, tokenizer, *, rank: int, alpha: int, seed: int) -> Classifier:
    """The base with a fresh LoRA on every linear layer: 4 bit through unsloth on CUDA, else fp32 through PEFT.

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
    with _explained(base):
        if torch.cuda.is_available():
            from unsloth import FastLanguageModel

            with _as_directory(base, tokenizer) as directory:
                model, _ = FastLanguageModel.from_pretrained(
                    directory, max_seq_length=task.CONTEXT_TOKENS, load_in_4bit=True
                )
            model = FastLanguageModel.get_peft_model(model, **lora, use_gradient_checkpointing=False, random_state=seed)
        else:
            from peft import LoraConfig, get_peft_model
            from transformers import AutoModelForCausalLM

            print("no CUDA GPU: training in fp32 on the CPU through transformers + PEFT, which is slow")
            model = AutoModelForCausalLM.from_pretrained(**_location(base), dtype=torch.float32)
            model = get_peft_model(model, LoraConfig(**lora, task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = base
    return Classifier(model, tokenizer, label_ids(tokenizer))


def label_ids(tokenizer) -> tuple[int, ...]:
    """The first token of each completion, as the tokenizer puts it behind a prompt.

    Raises UserError where two labels share it, where it fuses with the prompt, or where a text could smuggle in one of
    the tokenizer's control tokens in spite of task.spell_out.
    """
    prompt = tokenizer(task.prompt("A text.")).input_ids
    ids = []
    for completion in task.COMPLETIONS:
        joined = tokenizer(task.prompt("A text.") + completion).input_ids
        if joined[: len(prompt)] != prompt:
            raise UserError(f"this tokenizer fuses the prompt's end with{completion!r}: choose another base")
        ids.append(joined[len(prompt)])
    if len(set(ids)) < len(ids):
        raise UserError(f"this tokenizer starts two of {task.LABELS} with the same token: choose another base")
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    obeyed = [token for token in control if token in task.spell_out(token)]
    if obeyed:
        raise UserError(f"a text could smuggle in the control tokens {obeyed}: task.spell_out must know them")
    return tuple(ids)


def encode(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Prompt token ids, as Ollama evaluates them (BOS where the model has one)."""
    return tokenizer([task.prompt(text) for text in texts]).input_ids


def label_logprobs(classifier: Classifier, prompts: Sequence[list[int]]):
    """(n, 3) tensor: natural log-probabilities of the three labels among the whole vocabulary."""
    import torch

    causal = classifier.model.get_base_model()
    device = next(causal.parameters()).device
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
    with torch.autocast("cuda", _cuda_dtype()) if device.type == "cuda" else nullcontext():
        hidden = causal.get_decoder()(input_ids=ids, use_cache=False)[0]
        logits = causal.get_output_embeddings()(hidden[torch.arange(len(prompts), device=device), ends])
    return logits.float().log_softmax(-1)[:, list(classifier.label_ids)]


def fit(
    classifier: Classifier,
    prompts: Sequence[list[int]],
    targets: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> dict[str, float]:
    """Train the LoRA on class probabilities; return seconds, rows/s, peak memory (GB) and the loss of the last tenth.

    targets: (n, 3), rows sum to 1. The loss is the cross-entropy over the whole vocabulary at the label position.
    AdamW, linear warm-up over 5 % of the steps, then a cosine to 0. A batch that does not fit the GPU's memory is
    taken in halves: same gradients, said once. Raises UserError where not even one row fits.
    """
    import torch
    from tqdm.auto import tqdm
    from transformers import get_cosine_schedule_with_warmup

    cuda = torch.cuda.is_available()
    weights = [parameter for parameter in classifier.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0, fused=cuda)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.05 * steps), steps)
    scaler = torch.amp.GradScaler("cuda", enabled=cuda and _cuda_dtype() == torch.float16)
    batches = _batches([len(prompt) for prompt in prompts], batch_size, seed)
    goals = torch.tensor(targets, dtype=torch.float32, device="cuda" if cuda else "cpu")

    def backward(batch: np.ndarray) -> float:
        loss = -(goals[batch] * label_logprobs(classifier, [prompts[i] for i in batch])).sum() / len(rows)
        scaler.scale(loss).backward()
        return loss.item()

    classifier.model.train()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    piece, losses, n_rows, started = batch_size, [], 0, time.monotonic()
    progress = tqdm(range(steps), desc="training", unit="step", mininterval=1.0)
    for _ in progress:
        rows = next(batches)
        while True:
            try:
                loss = sum(backward(rows[i : i + piece]) for i in range(0, len(rows), piece))
                break
            except torch.cuda.OutOfMemoryError:
                optimizer.zero_grad()
                torch.cuda.empty_cache()
                if piece == 1:
                    raise UserError("the GPU's memory can't hold one row: choose a smaller base with --model") from None
                piece = (piece + 1) // 2
                progress.write(f"a batch of {batch_size} rows is too large for the GPU's memory: {piece} at a time")
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss)
        n_rows += len(rows)
        progress.set_postfix(
            loss=f"{np.mean(losses[-20:]):.3f}", rows_per_s=f"{n_rows / (time.monotonic() - started):.0f}"
        )
    seconds = time.monotonic() - started
    return {
        "steps": steps,
        "rows": n_rows,
        "seconds": round(seconds, 1),
        "rows_per_s": round(n_rows / seconds, 1),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
        "last_loss": round(float(np.mean(losses[-max(1, steps // 10) :])), 4),
    }


def predict(classifier: Classifier, prompts: Sequence[list[int]], batch_size: int = 64) -> np.ndarray:
    """(n, 3) log-probabilities of the labels among the whole vocabulary, in the prompts' order."""
    import torch
    from tqdm.auto import tqdm

    classifier.model.eval()
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    logprobs = np.empty((len(prompts), len(task.LABELS)))
    with torch.no_grad():
        for start in tqdm(range(0, len(order), batch_size), desc="predicting", unit="batch", mininterval=1.0):
            rows = order[start : start + batch_size]
            logprobs[rows] = label_logprobs(classifier, [prompts[i] for i in rows]).cpu().numpy()
    return logprobs


def hardware() -> str:
    """The accelerator or processor that trains, in words."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def _batches(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers, without end: shuffled, then sorted by length within 16 batches, so that little is padding."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    while True:
        order, batches = rng.permutation(len(lengths)), []
        for start in range(0, len(order), 16 * batch_size):
            bucket = order[start : start + 16 * batch_size]
            bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
            batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
        yield from (batches[i] for i in rng.permutation(len(batches)))


def _cuda_dtype():
    import torch

    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _location(base: str) -> dict[str, str]:
    """from_pretrained's arguments for a hub id, a directory or a .gguf file."""
    if not base.endswith(".gguf"):
        return {"pretrained_model_name_or_path": base}
    path = Path(base)
    if not path.is_file():
        raise UserError(f"{base}: no such file")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


@contextmanager
def _as_directory(base: str, tokenizer) -> Iterator[str]:
    """A .gguf file dequantised to a directory of bf16 weights, which is what unsloth can load; others as they are."""
    if not base.endswith(".gguf"):
        yield base
        return
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(**_location(base), dtype=torch.bfloat16)
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


@contextmanager
def _explained(base: str) -> Iterator[None]:
    """Turn what goes wrong while a base is fetched and loaded into one sentence and a remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{base}: neither a local model nor to be had from the Hugging Face hub ({type(error).__name__}). "
            "Check the name and the network, or give a directory or a .gguf file: --model PATH"
        ) from error
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install '.[train]' (or environment.yml)") from error
