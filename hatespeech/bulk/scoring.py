"""Many texts at once: a run's model.gguf, the very weights that Ollama serves, through transformers.

One forward pass decides, as in serving, and the instruction that all prompts begin with is not computed for each. A GPU
takes prompts packed behind one copy (packing.py), its layers compiled; a CPU, without FlexAttention, keeps the
instruction's keys and values, and makes batches of prompts of like length.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hatespeech import UserError, packing, task, tokens
from hatespeech.calibration import Calibration, softmax

# Texts encoded while a GPU computes those before, and what a forward pass takes. On a GPU launching costs a small model
# more than computing, and a large one's activations need memory (7 billion parameters with 65,536 tokens: 21 GB); on a
# CPU the fewer, the less padding.
ENCODED_AT_ONCE = 4_096
TOKENS_AT_ONCE = {"cuda": 131_072, "cpu": 512}
LARGE_MODEL, TOKENS_OF_LARGE = 1_000_000_000, 65_536
# FlexAttention's, here smaller than in training: a prompt has some 45 tokens of its own.
BLOCK = 64
# On a CPU that multiplies bfloat16, which moves a probability by 0.004 to 0.007 on average and by up to 0.05: what
# comes so near to a tie is computed again in float32.
NEAR_TIE = 0.08


def load(run: Path, calibration: Calibration | None) -> "Scorer":
    """The scorer of a run's folder. Raises UserError where it has no model.gguf, or transformers can't read it."""
    import torch

    model, tokenizer = _read(run)
    return Scorer(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, calibration)


def _read(run: Path):
    import torch
    from transformers import AutoModelForCausalLM

    path = weights_path(run)
    tokenizer = tokens.load_tokenizer(str(path))
    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    return AutoModelForCausalLM.from_pretrained(run, gguf_file=path.name, dtype=dtype), tokenizer


def weights_path(run: Path) -> Path:
    path = run / "model.gguf"
    if not path.exists():
        raise UserError(f"{run} has no model.gguf yet: `MODEL_DIR={run} ./bootstrap.sh` makes it")
    return path


def encoder(tokenizer) -> Callable[[Sequence[str]], list[list[int]]]:
    """tokens.encode, without the masks and types that transformers makes beside.

    On a copy: transformers leaves a tokenizer padding after it was once asked to pad.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return lambda texts: [each.ids for each in backend.encode_batch_fast([task.prompt(text) for text in texts])]


class Scorer:
    """Label probabilities of a causal language model.

    model: on the device and in the precision it is to compute with. calibration: to tell what is near a tie.
    """

    def __init__(self, model, tokenizer, calibration: Calibration | None = None):
        import torch

        self._encode, self._calibration = encoder(tokenizer), calibration
        if (getattr(model.config, "sliding_window", None) or task.CONTEXT_TOKENS) < task.CONTEXT_TOKENS:
            raise UserError(f"{model.config.model_type}: its attention's window is shorter than a prompt may be")
        labels = list(tokens.label_ids(tokenizer))
        if next(model.parameters()).is_cuda:
            self._passes = [_Packed(model.eval(), labels)]
            return
        instruction = tokens.encode(tokenizer, ["."])[0]
        models = [model.eval()]
        if any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16")):
            models.insert(0, copy.deepcopy(model).to(torch.bfloat16))
        self._passes = [_Prefixed(each, labels, instruction) for each in models]

    def label_probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(n, 3) probabilities among the labels, not calibrated; NaN where a prompt would be too long."""
        logits = np.full((len(texts), len(task.LABELS)), np.nan, dtype=np.float32)
        self._compute(self._passes[0], texts, np.arange(len(texts)), logits)
        for exact in self._passes[1:]:
            probabilities = softmax(logits)
            calibrated = self._calibration.apply(probabilities) if self._calibration else probabilities
            ranked = np.sort(calibrated, axis=1)
            self._compute(exact, texts, np.flatnonzero(ranked[:, -1] - ranked[:, -2] < NEAR_TIE), logits)
        return softmax(logits)

    def _compute(self, a_pass: "_Packed | _Prefixed", texts: Sequence[str], rows: np.ndarray, logits: np.ndarray):
        """Set these rows of logits. While one piece is computed, the next are prepared."""
        import torch

        def prepare(piece: np.ndarray) -> list[tuple[np.ndarray, dict]]:
            prompts = self._encode([texts[row] for row in piece])
            fit = np.array([number for number, ids in enumerate(prompts) if len(ids) <= task.CONTEXT_TOKENS])
            prepared = a_pass.prepare([prompts[number] for number in fit]) if len(fit) else ()
            return [(piece[fit[found]], arrays) for found, arrays in prepared]

        launched = []
        with torch.inference_mode(), ThreadPoolExecutor(1) as pool:
            for prepared in pool.map(prepare, np.split(rows, range(ENCODED_AT_ONCE, len(rows), ENCODED_AT_ONCE))):
                launched += [(found, a_pass.logits(**arrays)) for found, arrays in prepared]
            for found, computed in launched:  # the GPU is waited for once, when all is launched
                logits[found] = computed.float().cpu().numpy()


class _Packed:
    """Forward passes over prompts packed behind one copy of what they share; the layers, attention too, compiled."""

    def __init__(self, model, labels: list[int]):
        self._decoder, self._head = model.get_decoder(), model.get_output_embeddings().weight[labels].detach()
        self._device = self._head.device
        self._tokens = TOKENS_OF_LARGE if model.num_parameters() > LARGE_MODEL else TOKENS_AT_ONCE["cuda"]
        model.set_attn_implementation("flex_attention")
        for layer in self._decoder.layers:
            layer.compile(dynamic=True)

    def prepare(self, prompts: list[list[int]]) -> Iterator[tuple[np.ndarray, dict]]:
        """Which of the prompts, and what `logits` takes of them, a piece."""
        for bins in packing.pieces(prompts, self._tokens, **packing.BIN_TOKENS["cuda"], share=True):
            counts, order = packing.blocks(bins.segments, BLOCK)
            arrays = {"ids": bins.ids, "positions": bins.positions, "segments": bins.segments}
            arrays |= {"counts": counts, "order": order, "ends": bins.bins * bins.ids.shape[1] + bins.ends}
            yield bins.rows, packing.all_to_device(arrays, self._device)

    def logits(self, *, ids, positions, segments, counts, order, ends):
        import torch

        hidden = self._decoder(
            input_ids=ids,
            position_ids=positions,
            attention_mask=packing.block_mask(segments, counts, order, BLOCK),
            kernel_options={"BLOCK_M": BLOCK, "BLOCK_N": BLOCK},
            use_cache=False,
        )[0]
        return torch.nn.functional.linear(hidden.flatten(0, 1).index_select(0, ends), self._head)


class _Prefixed:
    """Forward passes over prompts of like length behind an instruction whose keys and values are kept.

    instruction: a prompt, whose beginning others share.
    """

    def __init__(self, model, labels: list[int], instruction: list[int]):
        import torch
        from transformers import AttentionInterface

        self._decoder, self._instruction = model.get_decoder(), instruction
        self._head = model.get_output_embeddings().weight[labels].detach()
        with torch.inference_mode():
            kept = self._decoder(input_ids=torch.tensor([instruction]), use_cache=True).past_key_values
        for layer, cached in zip(self._decoder.layers, kept.layers, strict=True):
            layer.self_attn.shared = cached.keys, cached.values
        AttentionInterface.register("shared_instruction", _attend)
        model.set_attn_implementation("shared_instruction")

    def prepare(self, prompts: list[list[int]]) -> Iterator[tuple[np.ndarray, dict]]:
        """Which of the prompts, and what `logits` takes of them, a batch."""
        import torch

        shared = packing.shared_tokens([*prompts, self._instruction])
        order = np.argsort([-len(prompt) for prompt in prompts], kind="stable")
        while len(order):
            rows, order = np.split(order, [max(1, TOKENS_AT_ONCE["cpu"] // (len(prompts[order[0]]) - shared))])
            batch = packing.pad([prompts[row][shared:] for row in rows])
            yield rows, {"ids": torch.from_numpy(batch.ids), "ends": torch.from_numpy(batch.ends), "shared": shared}

    def logits(self, *, ids, ends, shared: int):
        import torch

        length = ids.shape[1]
        unseen = torch.full((length, shared + length), -torch.inf, dtype=self._head.dtype)
        hidden = self._decoder(
            input_ids=ids,
            position_ids=torch.arange(shared, shared + length)[None],
            attention_mask=unseen.triu(shared + 1)[None, None],
            use_cache=False,
        )[0]
        return torch.nn.functional.linear(hidden[torch.arange(len(ids)), ends], self._head)


def _attend(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention to the kept keys and values of the instruction as well; an AttentionInterface of transformers."""
    import torch

    n_shared = attention_mask.shape[-1] - query.shape[2]
    key, value = (
        torch.cat([kept[:, :, :n_shared].expand(len(query), -1, -1, -1), own], dim=2)
        for kept, own in zip(module.shared, (key, value), strict=True)
    )
    # By hand: of so short prompts torch's own takes a CPU twice as long in bfloat16.
    grouped = (*key.shape[:2], -1, key.shape[-1])
    scores = query.reshape(grouped) @ key.transpose(2, 3)
    scores = scores.unflatten(2, (-1, query.shape[2])) * scaling + attention_mask
    attended = scores.softmax(dim=-1).flatten(2, 3) @ value
    return attended.view(query.shape).transpose(1, 2).contiguous(), None
