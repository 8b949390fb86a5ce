"""What only a CUDA GPU needs: how much its memory holds at once, CUDA graphs, FlexAttention inside unsloth's models."""

import inspect
from collections.abc import Callable

import numpy as np

from hatespeech import UserError, packing

# More tokens at once are no faster, and unsloth's kernels count elements in 32 bits.
MAX_TOKENS_AT_ONCE = 65_536
# What one pass may use of the free memory. A captured CUDA graph keeps its memory, and a pass of another shape needs
# about as much again: so less than a half.
_MEMORY_SHARE = 0.42
# The models of unsloth's whose attention, but for the mask, is what FlexAttention computes.
_FLEX_MODELS = ("llama", "mistral", "qwen2", "qwen3")


def tokens_that_fit(run: Callable[[int], int], model, weights: list, needed: int) -> tuple[int, bool]:
    """How many tokens the free memory takes in one forward and backward pass, by what a small one uses.

    run: makes a pass over about so many tokens and returns how many they were. needed: the longest prompt. Where that
    would not fit, the model's activations are computed again in the backward pass (gradient checkpointing, the second
    value returned).
    Raises UserError where even so it does not.
    """
    import torch

    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trial = 2048
        while trial >= packing.BLOCK:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0] - 8 * sum(weight.numel() for weight in weights)  # AdamW's two moments
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            try:
                n_tokens = run(trial)
                bytes_a_token = (torch.cuda.max_memory_allocated() - held) / n_tokens
            except torch.cuda.OutOfMemoryError:
                trial //= 2
                continue
            finally:
                for weight in weights:
                    weight.grad.zero_()
            fit = min(MAX_TOKENS_AT_ONCE, int(_MEMORY_SHARE * free / bytes_a_token))
            if fit < needed:
                break
            torch.cuda.empty_cache()
            print(
                f"{free / 1e9:.0f} GB of GPU memory are free, {bytes_a_token / 1e6:.2f} MB hold a token: "
                f"{fit:,} tokens at once{', activations computed twice' if checkpointing else ''}"
            )
            return fit, checkpointing
    raise UserError("the GPU's memory can't hold the longest comment: choose a smaller base with --model")


class Graphs:
    """Forward and backward passes as CUDA graphs: launched as a whole, where launching each kernel takes the CPU longer
    than computing it takes the GPU.

    compute(tensors: dict) -> a tensor, whose other effects are to add to tensors that stay where they are (gradients).
    A shape that comes for the first time is computed as usual, for the second time captured, and from then on replayed.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, compute: Callable[[dict], object]):
        self._compute, self._seen, self._captured, self._pool = compute, set(), {}, None

    def __call__(self, arrays: dict[str, np.ndarray]):
        import torch

        shape = tuple((name, array.shape) for name, array in arrays.items())
        if shape not in self._seen:
            self._seen.add(shape)
            return self._compute(packing.all_to_device(arrays, "cuda"))
        if shape not in self._captured:
            inputs = packing.all_to_device(arrays, "cuda")
            torch.cuda.empty_cache()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                output = self._compute(dict(inputs))
            self._pool = graph.pool()  # one memory for all: they run one after the other
            self._captured[shape] = graph, inputs, output
        graph, inputs, output = self._captured[shape]
        for name, array in arrays.items():
            inputs[name].copy_(packing.to_device(array, "cuda"))
        graph.replay()
        return output.clone()


def teach_unsloth_masks(model) -> bool:
    """Let unsloth's attention compute with a BlockMask, which its models hand through as `causal_mask`.

    False where its attention for this kind of model is not known to take one.
    """
    import torch
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    attention = type(model.get_base_model().get_decoder().layers[0].self_attn)
    namespace = inspect.unwrap(attention.forward).__globals__
    if model.config.model_type not in _FLEX_MODELS or "run_attention" not in namespace:
        return False
    dense, flex = namespace["run_attention"], torch.compile(flex_attention, dynamic=True)

    def run_attention(*, config, context, Q, K, V):
        if not isinstance(context.causal_mask, BlockMask):
            return dense(config=config, context=context, Q=Q, K=K, V=V)
        return flex(Q, K, V, block_mask=context.causal_mask, enable_gqa=config.n_groups > 1).transpose(1, 2)

    namespace["run_attention"] = run_attention
    return True
