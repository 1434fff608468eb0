"""Attention under a mask, exact masses, the pooled tail and area density, on small random calls."""

from __future__ import annotations

import pytest
import torch
from attend import (
    Blocks,
    attend,
    block_mass,
    block_peaks,
    dense,
    density,
    merge,
    pooled_tail,
)

LENGTH = 300  # ragged for every block size


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(1, 4, LENGTH, 64),
        torch.randn(1, 2, LENGTH, 64),
        torch.randn(1, 2, LENGTH, 64),
    )


def weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Causal attention weights in float64: (1, 4, L, L)."""
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT / q.shape[-1] ** 0.5
    position = torch.arange(q.shape[2])
    return scores.masked_fill(position > position[:, None], -torch.inf).softmax(-1)


def random_mask(blocks: Blocks) -> torch.Tensor:
    kept = torch.rand(1, 4, blocks.q_blocks, blocks.k_blocks) < 0.5
    return (kept | blocks.forced()) & blocks.visible()


@pytest.mark.parametrize("sizes", [(128, 128), (128, 64), (64, 64)])
def test_block_mass_is_exact(qkv, sizes) -> None:
    q, k, _ = qkv
    blocks = Blocks(*sizes, LENGTH)
    exact = weights(q, k)
    mass = block_mass(q, k, blocks)
    for i in range(blocks.q_blocks):
        for j in range(blocks.k_blocks):
            rows = slice(i * blocks.q, (i + 1) * blocks.q)
            columns = slice(j * blocks.k, (j + 1) * blocks.k)
            expected = exact[0, :, rows, columns].sum(-1).mean(-1)
            torch.testing.assert_close(mass[0, :, i, j].double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))
    some = block_mass(q, k, blocks, [1])
    assert (some[:, :, 1] == mass[:, :, 1]).all() and some[:, :, [0, 2]].eq(0).all()


@pytest.mark.parametrize("sizes", [(128, 128), (128, 64), (64, 64), (256, 256)])
def test_density_counts_visible_token_pairs(sizes) -> None:
    blocks = Blocks(*sizes, LENGTH)
    mask = random_mask(blocks)
    tokens = mask.repeat_interleave(blocks.q, 2).repeat_interleave(blocks.k, 3)
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    expected = (tokens[:, :, :LENGTH, :LENGTH] & causal).sum((-1, -2)) / causal.sum()
    torch.testing.assert_close(density(mask, blocks).float(), expected)
    assert density(blocks.visible().expand_as(mask), blocks).eq(1).all()


def test_densities_of_the_same_tokens_agree() -> None:
    coarse, fine = Blocks(128, 128, 1024), Blocks(64, 64, 1024)
    mask = random_mask(coarse)
    cut = mask.repeat_interleave(2, 2).repeat_interleave(2, 3) & fine.visible()
    torch.testing.assert_close(density(mask, coarse), density(cut, fine))


def test_merging_the_kept_and_dropped_halves_is_dense(qkv) -> None:
    q, k, v = qkv
    blocks = Blocks(128, 64, LENGTH)
    mask = random_mask(blocks)
    dropped = blocks.visible() & ~mask
    merged, lse = merge(attend(q, k, v, mask, blocks), attend(q, k, v, dropped, blocks))
    expected, expected_lse = dense(q, k, v)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse)


def test_pooled_tail_is_exact_where_blocks_are_constant(qkv) -> None:
    q, k, v = qkv
    blocks = Blocks(128, 64, LENGTH)
    k, v = (x[:, :, ::64].repeat_interleave(64, 2)[:, :, :LENGTH] for x in (k, v))
    mask = random_mask(blocks)
    tail = pooled_tail(q, k, v, mask, blocks, second_order=True)
    merged, _ = merge(attend(q, k, v, mask, blocks), tail)
    torch.testing.assert_close(merged, dense(q, k, v)[0], rtol=1e-3, atol=1e-4)
    nothing = pooled_tail(q, k, v, blocks.visible().expand_as(mask), blocks)
    assert nothing[0].eq(0).all() and nothing[1].isneginf().all()


def test_block_peaks_are_weights_relative_to_the_largest(qkv) -> None:
    q, k, _ = qkv
    blocks = Blocks(128, 64, LENGTH)
    mask = random_mask(blocks)
    tokens = mask.repeat_interleave(128, 2).repeat_interleave(64, 3)[:, :, :LENGTH, :LENGTH]
    kept = weights(q, k) * tokens
    relative = kept / kept.amax(-1, keepdim=True)
    peaks = block_peaks(q, k, mask, blocks)
    for i, j in ((0, 0), (1, 2), (2, 3), (2, 4)):
        expected = relative[0, :, i * 128 : (i + 1) * 128, j * 64 : (j + 1) * 64].amax((-1, -2))
        torch.testing.assert_close(peaks[0, :, i, j].double(), expected, rtol=1e-3, atol=1e-6)
