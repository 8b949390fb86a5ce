import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from hatespeech import packing
from tests.benchmarks import exactness

INSTRUCTION = list(range(100, 132))


@pytest.fixture
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [INSTRUCTION + rng.integers(0, 99, length).tolist() for length in rng.integers(1, 300, 60)]


def alone(bins: packing.Bins, number: int) -> tuple[list[int], list[int]]:
    """Ids and positions of a prompt as its last token sees them."""
    row, end = bins.segments[bins.bins[number]], bins.ends[number]
    seen = ((row == packing.SHARED) | (row == row[end])) & (np.arange(len(row)) <= end)
    ids, positions = bins.ids[bins.bins[number]][seen], bins.positions[bins.bins[number]][seen]
    return ids.tolist(), positions.tolist()


def test_every_prompt_is_whole_in_one_bin(prompts):
    bins = packing.pack(prompts, 1024)
    assert sorted(bins.rows) == list(range(60))
    for number, row in enumerate(bins.rows):
        ids, positions = alone(bins, number)
        assert ids == prompts[row]
        assert positions == list(range(len(ids)))


def test_bins_are_full_and_hold_the_instruction_once(prompts):
    bins = packing.pack(prompts, 1024)
    assert bins.ids.shape[1] <= 1024 + packing.BLOCK
    assert (bins.segments == packing.PADDING).mean() < 0.1
    assert (bins.segments == packing.SHARED).sum(axis=1).tolist() == [len(INSTRUCTION)] * len(bins.ids)


@pytest.mark.parametrize(
    "prompts", [[[1, 2, 3]], [[1, 2, 3]] * 3, [[1, 2], [1, 2, 3], [4]], [list(range(3000)), [0, 7]]]
)
def test_odd_sets_of_prompts(prompts):
    """One alone, all the same, nothing in common, longer than a bin."""
    for share in (True, False):
        found = {}
        for bins in packing.pieces(prompts, 256, bin_tokens=256, unit=1, share=share):
            found |= {int(row): alone(bins, number)[0] for number, row in enumerate(bins.rows)}
        assert [found[row] for row in range(len(prompts))] == prompts


@pytest.mark.parametrize("share", [True, False])
def test_pieces_are_no_larger_than_asked(prompts, share):
    pieces = list(packing.pieces(prompts, 1500, bin_tokens=512, unit=packing.BLOCK, share=share))
    assert sorted(np.concatenate([piece.rows for piece in pieces])) == list(range(60))
    assert len(pieces) > 3
    assert max(piece.ids.size for piece in pieces) <= 1500


def test_flex_attentions_mask_is_the_dense_one_and_skips_no_block_of_it(prompts):
    bins = packing.pack(prompts, 2048)
    segments = torch.from_numpy(bins.segments)
    dense = packing.dense_mask(segments)
    sparse = packing.block_mask(segments, *map(torch.from_numpy, packing.blocks(bins.segments)))
    size = bins.ids.shape[1]
    assert torch.equal(create_mask(sparse.mask_mod, len(bins.ids), 1, size, size, "cpu"), dense)
    n_blocks = size // packing.BLOCK
    in_blocks = dense.view(len(bins.ids), n_blocks, packing.BLOCK, n_blocks, packing.BLOCK).any(4).any(2)
    assert torch.equal(sparse.to_dense()[:, 0].bool(), in_blocks)
    assert in_blocks.float().mean() < 0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="4-bit weights and bf16 differ by more; by hand there")
def test_every_lever_is_exact(tokenizer):
    """Loss and LoRA gradients of a full forward a row, in fp32, to 1e-5; the GPU's are in results/benchmarks."""
    table = exactness.measure(tokenizer).set_index("lever")
    print(table.to_string())
    assert len(table) == 6
    assert table["loss_difference"].max() < 1e-5
    assert table["gradient_difference"].max() < 1e-5
