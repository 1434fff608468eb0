"""BlockMask: packing, density, FlexAttention and validation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from prism_cuda import reference
from prism_cuda.block_mask import BlockMask

SHAPES: dict[str, Any] = {
    "square": (256, 256, 64, 64),
    "ragged": (200, 200, 64, 64),
    "prefix": (130, 300, 64, 64),
    "mixed": (300, 345, 128, 64),
    "wide": (100, 128 * 40, 128, 128),
}


def random_mask(q_len, k_len, q_size, k_size, causal=True, batch=2, heads=4):
    dense = torch.rand(batch, heads, -(-q_len // q_size), -(-k_len // k_size)) < 0.5
    sizes = {"q_block_size": q_size, "k_block_size": k_size, "causal": causal}
    return dense, BlockMask.from_dense(dense, q_len, k_len, **sizes)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_round_trip_and_density(shape, causal):
    q_len, k_len, q_size, k_size = shape
    dense, mask = random_mask(*shape, causal)
    visible = reference.visible_blocks(q_len, k_len, causal, q_size, k_size)
    assert torch.equal(mask.to_dense(), dense & visible)
    kept = (dense & visible).sum((-1, -2)) / visible.sum()
    torch.testing.assert_close(mask.density_per_head(), kept.double(), rtol=1e-6, atol=0)
    assert mask.density() == pytest.approx(float(kept.mean()))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_full(shape):
    q_len, k_len, q_size, k_size = shape
    mask = BlockMask.full(1, 2, q_len, k_len, q_block_size=q_size, k_block_size=k_size)
    assert mask.density() == 1.0
    assert torch.equal(mask.to_dense()[0, 1], mask.visible())


def test_density_of_nothing():
    assert BlockMask.full(0, 2, 64, 64).density() == 0.0
    assert BlockMask.full(1, 2, 0, 0).density() == 0.0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", list(SHAPES.values())[:4], ids=list(SHAPES)[:4])
def test_flex_has_the_same_effect(shape, causal):
    q_len, k_len, q_size, k_size = shape
    _, mask = random_mask(*shape, causal)
    q = torch.randn(2, 4, q_len, 64)
    k, v = torch.randn(2, 2, 2, k_len, 64)
    flex = mask.to_flex()
    sizes = (causal, q_size, k_size)
    expected, _ = reference.sparse_attention(q, k, v, mask.bits, mask.counts, None, *sizes)
    actual = flex_attention(q, k, v, block_mask=flex, enable_gqa=True)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)

    # A compiled kernel follows the block lists instead: their union is the mask, and full blocks
    # hold no token pair that mask_mod would reject.
    computed = torch.zeros_like(mask.to_dense())
    for count, index in (
        (flex.kv_num_blocks, flex.kv_indices),
        (flex.full_kv_num_blocks, flex.full_kv_indices),
    ):
        listed = torch.arange(index.shape[-1]) < count[..., None]
        rows = torch.zeros_like(computed).scatter_(-1, index.long(), listed)
        assert not (rows & computed).any()
        computed |= rows
    assert torch.equal(computed, mask.to_dense())
    for b, h, i in torch.cartesian_prod(*map(torch.arange, mask.counts.shape)).tolist():
        for j in flex.full_kv_indices[b, h, i, : flex.full_kv_num_blocks[b, h, i]].tolist():
            assert (j + 1) * k_size <= k_len
            assert not causal or (j + 1) * k_size - 1 <= i * q_size + k_len - q_len


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    _, mask = random_mask(256, 256, 64, 64, heads=5)
    path = tmp_path / "masks.png"
    mask.plot(path, batch=1, title="five heads")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": torch.zeros(1, 2, 4, 1)}, "bits is torch.float32"),
        ({"bits": torch.zeros(1, 2, 5, 1, dtype=torch.int32)}, r"bits has shape \(1, 2, 5, 1\)"),
        ({"counts": torch.zeros(1, 3, 4, dtype=torch.int32)}, r"counts has shape \(1, 3, 4\)"),
        ({"counts": torch.zeros(1, 2, 4, dtype=torch.int64)}, "counts is torch.int64"),
        ({"q_len": -1}, "q_len, k_len are -1"),
        ({"k_block_size": 128}, "expected one of"),
    ],
)
def test_validation(change, message):
    arguments: dict[str, Any] = {
        "bits": torch.zeros(1, 2, 4, 1, dtype=torch.int32),
        "counts": torch.zeros(1, 2, 4, dtype=torch.int32),
        "q_len": 256,
        "k_len": 256,
        "q_block_size": 64,
        "k_block_size": 64,
    }
    BlockMask(**arguments)
    with pytest.raises(ValueError, match=message):
        BlockMask(**(arguments | change))


def test_from_dense_validation():
    with pytest.raises(ValueError, match="torch.bool"):
        BlockMask.from_dense(torch.zeros(1, 2, 4, 4), 512, 512)
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\)"):
        BlockMask.from_dense(torch.zeros(1, 2, 4, 4, dtype=torch.bool), 512, 513)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window_left", [0, 5, 64, 200])
@pytest.mark.parametrize("lengths", [(1, 1), (200, 200), (130, 500), (5, 0), (128, 4099)])
@pytest.mark.parametrize("blocks", [(128, 128), (128, 64), (64, 64)])
def test_a_window_keeps_the_blocks_that_a_row_sees(blocks, lengths, window_left, causal):
    sizes = dict(zip(("q_block_size", "k_block_size"), blocks, strict=True))
    mask = BlockMask.full(2, 3, *lengths, **sizes, causal=causal, window_left=window_left)
    q_len, k_len = lengths
    position = torch.arange(q_len)[:, None] + k_len - q_len
    key = torch.arange(k_len)
    seen = key >= position - window_left
    if causal:
        seen &= key <= position
    rows = (
        [torch.stack([x.any() for x in part.split(blocks[1], 1)]) for part in seen.split(blocks[0])]
        if k_len
        else []
    )
    expected = torch.stack(rows) if rows else torch.zeros(mask.q_blocks, 0, dtype=torch.bool)
    assert torch.equal(mask.to_dense(), expected.expand(2, 3, -1, -1))
    assert torch.equal(mask.counts, mask.to_dense().sum(-1, dtype=torch.int32))
