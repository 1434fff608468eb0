"""Attention under any block mask, the pooled tail of what a mask drops, and exact block masses.

Tensors are (batch, heads, length, head_dim) with grouped key/value heads; queries are as long as
keys and causal. Masks are bool (batch, q_heads, q_blocks, k_blocks).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from prism_cuda import BlockMask, reference
from prism_cuda.config import BLOCK_SIZES

# Rows of scores that exist at once: bounds memory at 32K tokens.
ROW_CHUNK = 1024


@dataclass(frozen=True)
class Blocks:
    """Block sizes in tokens, and the lengths they divide."""

    q: int
    k: int
    length: int

    @property
    def q_blocks(self) -> int:
        return -(-self.length // self.q)

    @property
    def k_blocks(self) -> int:
        return -(-self.length // self.k)

    def visible(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Bool (Nq, Nk): the blocks that dense attention computes."""
        return reference.visible_blocks(self.length, self.length, True, self.q, self.k, device)

    def forced(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Bool (Nq, Nk): the sink block and the query block's own tokens."""
        kept = reference.recent_blocks(self.length, self.length, 1, self.q, self.k, device)
        kept[:, :1] = True
        return kept


@functools.lru_cache(maxsize=16)
def areas(blocks: Blocks, device: torch.device) -> torch.Tensor:
    """Float64 (Nq, Nk): visible (query, key) token pairs of every block."""
    position = torch.arange(blocks.length, device=device)
    start = torch.arange(0, blocks.length, blocks.k, device=device)
    width = (blocks.length - start).clamp_max(blocks.k)
    pairs = torch.minimum((position[:, None] + 1 - start).clamp_min(0), width)
    padding = (0, 0, 0, blocks.q_blocks * blocks.q - blocks.length)
    padded = torch.nn.functional.pad(pairs, padding)
    return padded.unflatten(0, (blocks.q_blocks, blocks.q)).sum(1).double()


def density(mask: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Computed area of every head, float64 (B, Hq): kept visible token pairs over all of them.

    Masks of different block sizes are comparable by it; 1 is dense.
    """
    area = areas(blocks, mask.device)
    return (mask * area).sum((-1, -2)) / area.sum()


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, blocks: Blocks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention over the kept blocks: out like q, lse float32 (B, Hq, L)."""
    mask, blocks = _supported(mask, blocks)
    packed = BlockMask.from_dense(
        mask, blocks.length, blocks.length, q_block_size=blocks.q, k_block_size=blocks.k
    )
    arguments = (q, k, v, packed.bits, packed.counts, None, True, blocks.q, blocks.k)
    if q.device.type == "cuda":
        return torch.ops.prism.sparse_attention(*arguments)
    return reference.sparse_attention(*arguments)


def _supported(mask: torch.Tensor, blocks: Blocks) -> tuple[torch.Tensor, Blocks]:
    """The same mask in block sizes that the kernels know; larger blocks are cut up."""
    if (blocks.q, blocks.k) in BLOCK_SIZES:
        return mask, blocks
    q, k = min(blocks.q, 128), min(blocks.k, 128)
    if (q, k) not in BLOCK_SIZES or blocks.q % q or blocks.k % k:
        raise ValueError(
            f"attend: blocks of ({blocks.q}, {blocks.k}); expected multiples of {BLOCK_SIZES}"
        )
    finer = Blocks(q, k, blocks.length)
    mask = mask.repeat_interleave(blocks.q // q, 2).repeat_interleave(blocks.k // k, 3)
    mask = mask[:, :, : finer.q_blocks, : finer.k_blocks]
    return mask & finer.visible(mask.device), finer


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense causal attention through the same kernel: out, lse."""
    blocks = Blocks(128, 128, q.shape[2])
    visible = blocks.visible(q.device).expand(*q.shape[:2], -1, -1)
    return attend(q, k, v, visible, blocks)


def block_means(x: torch.Tensor, size: int) -> torch.Tensor:
    """Float32 means of blocks of ``size`` tokens: (B, H, L, D) -> (B, H, ceil(L / size), D)."""
    return reference.block_pool(x, size)


def grouped_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q k^T / sqrt(D) of any two sets of vectors, in float32: (B, Hq, Nq, Nk)."""
    kv_heads = k.shape[1]
    grouped = q.float().unflatten(1, (kv_heads, -1)) * q.shape[-1] ** -0.5
    return (grouped @ k.float().unsqueeze(2).mT).flatten(1, 2)


def pooled_tail(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    blocks: Blocks,
    second_order: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the dropped blocks, each represented by its mean key and mean value.

    A dropped block of n tokens counts as n keys at its mean. ``second_order`` adds the variance of
    the block's scores, q^2 var(k) / 2, which the mean alone leaves out (diagonal covariance).

    Returns:
        out float32 like q, lse float32 (B, Hq, L); -inf where nothing was dropped.
    """
    dropped = blocks.visible(q.device) & ~mask
    k_means, v_means = block_means(k, blocks.k), block_means(v, blocks.k)
    variance = block_means(k.float().square(), blocks.k) - k_means.square()
    group = q.shape[1] // k.shape[1]
    v_means = v_means.repeat_interleave(group, 1)
    size = torch.full((blocks.k_blocks,), float(blocks.k), device=q.device)
    size[-1] = blocks.length - (blocks.k_blocks - 1) * blocks.k
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    step = max(ROW_CHUNK // blocks.q, 1)
    for first in range(0, blocks.q_blocks, step):
        rows = slice(first * blocks.q, (first + step) * blocks.q)
        part = q[:, :, rows]
        scores = grouped_scores(part, k_means) + size.log()
        if second_order:
            square = part.float().square() * q.shape[-1] ** -0.5
            scores += 0.5 * grouped_scores(square, variance)
        kept = dropped[:, :, first : first + step].repeat_interleave(blocks.q, 2)
        scores.masked_fill_(~kept[:, :, : part.shape[2]], -math.inf)
        lse[:, :, rows] = scores.logsumexp(-1)
        out[:, :, rows] = scores.softmax(-1).nan_to_num_(0) @ v_means
    return out, lse


def merge(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint key sets, from (out, lse) of each."""
    lse = torch.logaddexp(first[1].float(), second[1].float())
    parts = (out.float() * (part - lse).exp()[..., None] for out, part in (first, second))
    return sum(parts).to(first[0].dtype), lse


def block_mass(
    q: torch.Tensor, k: torch.Tensor, blocks: Blocks, only: Sequence[int] | None = None
) -> torch.Tensor:
    """Exact attention probability of every block, averaged over its rows: (B, Hq, Nq, Nk).

    Rows of query blocks that are not in ``only`` stay 0, where it is given.
    """
    mass = torch.zeros(*q.shape[:2], blocks.q_blocks, blocks.k_blocks, device=q.device)
    for block, scores in _scores_by_block(q, k, blocks, only):
        mass[:, :, block] = scores.softmax(-1).unflatten(-1, (-1, blocks.k)).sum(-1).mean(2)
    return mass


def _scores_by_block(
    q: torch.Tensor, k: torch.Tensor, blocks: Blocks, only: Sequence[int] | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Exact causal scores of one query block at a time, -inf where invisible: (B, Hq, rows, Lk).

    Lk is the keys' length, padded to whole blocks.
    """
    padded = blocks.k_blocks * blocks.k
    k = torch.nn.functional.pad(k, (0, 0, 0, padded - blocks.length))
    position = torch.arange(padded, device=q.device)
    for block in range(blocks.q_blocks) if only is None else only:
        rows = slice(block * blocks.q, min((block + 1) * blocks.q, blocks.length))
        seen = min(-(-rows.stop // ROW_CHUNK) * ROW_CHUNK, padded)  # few distinct shapes
        scores = grouped_scores(q[:, :, rows], k[:, :, :seen])
        scores.masked_fill_(position[:seen] > position[rows, None], -math.inf)
        yield block, torch.nn.functional.pad(scores, (0, padded - seen), value=-math.inf)


def block_peaks(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, blocks: Blocks
) -> torch.Tensor:
    """Largest weight that any row of a block gives any of its keys, relative to the row's largest.

    Only kept blocks count, in [0, 1]: (B, Hq, Nq, Nk). What exact scores say once they are known.
    """
    peaks = torch.zeros(mask.shape, device=q.device)
    for block, scores in _scores_by_block(q, k, blocks):
        highest = scores.unflatten(-1, (-1, blocks.k)).amax(-1)
        highest.masked_fill_(~mask[:, :, block, None], -math.inf)
        row_highest = highest.amax(-1, keepdim=True)
        peaks[:, :, block] = (highest - row_highest).exp().nan_to_num_(0).amax(2)
    return peaks
