"""A base model with a LoRA, read at the label position. loop.py trains it. The only module that knows unsloth.

One forward pass decides: the label is the first token after the prompt, so loss and prediction need the logits of that
one position. Prompts are packed behind one copy of their common instruction (packing.py), as many at once as the GPU's
memory holds.
"""

import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hatespeech import UserError, packing, task, tokens
from hatespeech.training import gpu

# A CPU trains bases up to this size in reasonable time (SmolLM2-135M: about 3 rows/s a core).
MAX_CPU_PARAMETERS = 1_000_000_000


@dataclass
class Classifier:
    """A causal language model with LoRA, read at the label position.

    label_ids: the first token of each of task.COMPLETIONS, all different.
    share_prefix: whether its attention takes packing's mask; else prompts are padded.
    tokens_at_once: what one forward and backward pass takes; on a GPU training sets it to what the memory holds.
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
                    dtype=half_precision(),
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
    return forward(classifier, **packing.all_to_device(inputs_of(classifier, bins), device))


def inputs_of(classifier: Classifier, bins: packing.Bins) -> dict[str, np.ndarray]:
    """All that forward computes with."""
    arrays = {"ids": bins.ids, "positions": bins.positions, "ends": bins.bins * bins.ids.shape[1] + bins.ends}
    arrays["labels"] = np.array(classifier.label_ids)
    if bins.masked:
        arrays["segments"] = bins.segments
        if next(classifier.model.parameters()).is_cuda:
            arrays["counts"], arrays["order"] = packing.blocks(bins.segments)
    return arrays


def forward(classifier: Classifier, *, ids, positions, ends, labels, segments=None, counts=None, order=None):
    import torch

    causal, mask = classifier.model.get_base_model(), {}
    if counts is not None:
        mask = {"causal_mask": packing.block_mask(segments, counts, order)}
    elif segments is not None:
        mask = {"attention_mask": packing.dense_mask(segments)}
    # A CUDA graph must not depend on casts that were kept from before it.
    autocast = torch.autocast("cuda", half_precision(), cache_enabled=False) if ids.is_cuda else nullcontext()
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


def hardware() -> str:
    """The accelerator or processor that trains, in words."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def half_precision():
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
