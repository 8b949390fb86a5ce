"""Prompts laid end to end behind one copy of what they all begin with: no token is computed twice, or for nothing.

The instruction is 40 % of a prompt and the same in each. A bin holds it once, then the rest of many prompts; a token
attends to the instruction and to what precedes it in its own prompt, at the positions it would have alone. Loss and
gradients are those of one prompt at a time, the instruction's keys and values included (tests/test_packing.py).
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

# FlexAttention's block, and so the unit of a bin's length.
BLOCK = 128
SHARED, PADDING = 0, -1

# A bin's length and what it is a multiple of. On a GPU few shapes should come (CUDA graphs); on a CPU, without
# FlexAttention, attention costs the square of the length.
BIN_TOKENS = {"cuda": {"bin_tokens": 2048, "unit": 256}, "cpu": {"bin_tokens": 512, "unit": 1}}


@dataclass(frozen=True)
class Bins:
    """b bins of T tokens; n prompts in them.

    ids, positions, segments: (b, T). A segment is SHARED, PADDING, or the number, from 1, of a prompt in its bin.
    rows: (n,) which of the given prompts each is. bins, ends: (n,) its bin, and the place of its last token there.
    masked: False where each prompt is alone and whole in its bin, so that causal attention needs no mask.
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    rows: np.ndarray
    bins: np.ndarray
    ends: np.ndarray
    masked: bool

    def __getitem__(self, some: slice) -> "Bins":
        chosen = np.arange(len(self.ids))[some]
        here = np.isin(self.bins, chosen)
        shared = (self.ids[some], self.positions[some], self.segments[some])
        return Bins(*shared, self.rows[here], self.bins[here] - chosen[0], self.ends[here], self.masked)


def shared_tokens(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with alike; a last one remains of each, to be the label's."""
    # What the first and the last in order share, all share.
    differ = [a != b for a, b in zip(min(prompts), max(prompts), strict=False)]
    return min(differ.index(True) if any(differ) else len(differ), *(len(prompt) - 1 for prompt in prompts))


def pack(prompts: Sequence[list[int]], bin_tokens: int, unit: int = BLOCK) -> Bins:
    """Bins of at most about bin_tokens, evenly filled: each prompt, longest first, goes to the emptiest.

    Their length is the longest's, rounded up to a multiple of `unit`, so that few different shapes come.
    """
    shared = shared_tokens(prompts)
    own = np.array([len(prompt) - shared for prompt in prompts])
    n_bins = max(1, int(np.ceil(own.sum() / max(1.0, 0.99 * (bin_tokens - shared)))))  # evenly, but not to the token
    heap = [(shared, 0, number) for number in range(n_bins)]
    starts, bins, segments = (np.empty(len(prompts), dtype=np.int64) for _ in range(3))
    for row in np.argsort(-own, kind="stable"):
        filled, n_rows, number = heapq.heappop(heap)
        starts[row], bins[row], segments[row] = filled, number, n_rows + 1
        heapq.heappush(heap, (filled + int(own[row]), n_rows + 1, number))
    length = -(-max(filled for filled, _, _ in heap) // unit) * unit
    ids, positions = np.zeros((n_bins, length), dtype=np.int64), np.zeros((n_bins, length), dtype=np.int64)
    segment = np.full((n_bins, length), PADDING, dtype=np.int32)
    ids[:, :shared], positions[:, :shared], segment[:, :shared] = prompts[0][:shared], np.arange(shared), SHARED
    within = np.arange(own.sum()) - np.repeat(own.cumsum() - own, own)
    places = np.repeat(bins * length + starts, own) + within
    tokens = chain.from_iterable(prompt[shared:] for prompt in prompts)
    ids.ravel()[places] = np.fromiter(tokens, np.int64, len(within))
    positions.ravel()[places] = shared + within
    segment.ravel()[places] = np.repeat(segments, own)
    return Bins(ids, positions, segment, np.arange(len(prompts)), bins, starts + own - 1, masked=True)


def pad(prompts: Sequence[list[int]]) -> Bins:
    """A bin a prompt, padded on the right, where a causal model never looks back at the padding."""
    lengths = np.array([len(prompt) for prompt in prompts])
    shape = (len(prompts), int(lengths.max()))
    inside = np.arange(shape[1]) < lengths[:, None]
    ids = np.zeros(shape, dtype=np.int64)
    ids[inside] = np.concatenate(prompts)
    positions = np.broadcast_to(np.arange(shape[1]), shape)
    rows = np.arange(len(prompts))
    return Bins(ids, positions, np.where(inside, 1, PADDING), rows, rows, lengths - 1, masked=False)


def pieces(prompts: Sequence[list[int]], tokens: int, *, bin_tokens: int, unit: int, share: bool) -> Iterator[Bins]:
    """All the prompts, at most about `tokens` tokens at a time (a bin at least). share: pack, else pad."""
    if share:
        packed = pack(prompts, min(bin_tokens, tokens), unit)
        n_bins, length = packed.ids.shape
        n_pieces = -(-n_bins // max(1, tokens // length))
        step = -(-n_bins // n_pieces)
        yield from (packed[start : start + step] for start in range(0, n_bins, step))
        return
    order = np.argsort([-len(prompt) for prompt in prompts], kind="stable")
    while len(order):
        step = max(1, tokens // len(prompts[order[0]]))
        yield replace(pad([prompts[row] for row in order[:step]]), rows=order[:step])
        order = order[step:]


def dense_mask(segments):
    """(b, 1, T, T) booleans, true where a query (third axis) may see a key. segments: (b, T) tensor."""
    import torch

    keys, queries = segments[:, None, None, :], segments[:, None, :, None]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    return causal & ((keys == SHARED) | (keys == queries))


def blocks(segments: np.ndarray, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of keys a block of queries needs: those of the shared tokens and from its first prompt's start on.

    segments: (b, T). Returns how many, (b, 1, T / block), and their numbers, needed ones first, (b, 1, T / block,
    T / block).
    """
    length = segments.shape[1]
    starts = np.maximum.accumulate(np.where(np.diff(segments, axis=1, prepend=-2), np.arange(length), 0), axis=1)
    first = starts[:, ::block, None] // block
    shared = -(-(segments == SHARED).sum(axis=1)[:, None, None] // block)
    query, key = np.ogrid[: length // block, : length // block]
    needed = (key <= query) & ((key >= first) | (key < shared))
    order = np.argsort(~needed, axis=2, kind="stable")
    return needed.sum(axis=2, dtype=np.int32)[:, None], order.astype(np.int32)[:, None]


def block_mask(segments, counts, order, block: int = BLOCK):
    """dense_mask for FlexAttention, which skips what no query needs. segments: (b, T) tensor; the others of blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    def keep(b, h, q, k):
        return (k <= q) & ((segments[b, k] == SHARED) | (segments[b, k] == segments[b, q]))

    lengths = (segments.shape[1], segments.shape[1])
    return BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=block, mask_mod=keep, seq_lengths=lengths)


def to_device(array: np.ndarray, device):
    """A tensor of it; on CUDA copied from pinned memory, since a copy from pageable memory waits for the GPU."""
    import torch

    tensor = torch.from_numpy(np.require(array, requirements="CW"))
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor


def all_to_device(arrays: dict[str, np.ndarray], device) -> dict:
    return {name: to_device(array, device) for name, array in arrays.items()}
