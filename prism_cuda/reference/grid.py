"""Selection by the masses of a grid of 16 queries by 16 keys over the full width of the heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from prism_cuda.reference.bands import block_pool
from prism_cuda.reference.batch import Sequences, select_each
from prism_cuda.reference.blocks import Mask, Rules, select, top_p_blocks, visible_blocks

CELL_TOKENS = 16  # of a cell of the grid, on both sides


def estimation_width(head_dim: int) -> int:
    """Dimensions that the kernels of estimation pad a head to."""
    return next(width for width in (64, 128, 256) if head_dim <= width)


def cell_statistics(k: torch.Tensor) -> torch.Tensor:
    """Mean and spread of each dimension in every cell of keys: (B, H, ceil(L / 16), 2 D).

    The spread is the standard deviation.
    """
    means = block_pool(k, CELL_TOKENS)
    # Around the mean: less of it cancels than in the mean square minus the squared mean.
    own_mean = means.repeat_interleave(CELL_TOKENS, 2)[:, :, : k.shape[2]]
    variance = block_pool((k.to(means.dtype) - own_mean).square(), CELL_TOKENS)
    return torch.cat([means, variance.sqrt()], -1)


def grid_masses(
    q: torch.Tensor,
    k_vectors: torch.Tensor,
    k_len: int,
    scale: float,
    causal: bool,
    q_block_size: int,
    k_block_size: int,
) -> torch.Tensor:
    """How much some queries of every query block need each key block, estimated on a grid.

    A cell of the grid is 16 queries by 16 keys. Its logit is that of the mean query and the mean
    key, plus sum_d |q_d| std(k_d), q the mean query and std the keys' standard deviation in the
    cell: about what the best key scores above the mean key. A softmax over the visible cells of
    each 16 queries, summed to key blocks, gives the shares of the key blocks; a block's mass is
    the largest share that any 16 queries of the query block give it, scaled to sum to 1, so that
    queries that need one block are not outvoted by their neighbours.

    Args:
        q: (B, Hq, q_len, D). k_vectors: :func:`cell_statistics` of k_len keys. scale: of the
            softmax.

    Returns:
        (B, Hq, Nq, Nk), rows summing to 1; 0 where nothing is visible, NaN where undefined.
    """
    kv_heads, q_len = k_vectors.shape[1], q.shape[2]
    q_means = block_pool(q, CELL_TOKENS)
    q_vectors = torch.cat([q_means, q_means.abs()], -1)
    grouped = q_vectors.unflatten(1, (kv_heads, q.shape[1] // kv_heads)) * scale
    logits = (grouped @ k_vectors.unsqueeze(2).mT).flatten(1, 2)
    visible = visible_blocks(q_len, k_len, causal, CELL_TOKENS, CELL_TOKENS, q.device)
    seeing = visible.any(-1, keepdim=True)
    probs = logits.masked_fill(~visible, -math.inf).softmax(-1).masked_fill(~seeing, 0)
    q_blocks, k_blocks = -(-q_len // q_block_size), -(-k_len // k_block_size)
    q_cells, k_cells = q_block_size // CELL_TOKENS, k_block_size // CELL_TOKENS
    pad_q = q_blocks * q_cells - probs.shape[2]
    pad_k = k_blocks * k_cells - probs.shape[3]
    probs = torch.nn.functional.pad(probs, (0, pad_k, 0, pad_q)).unflatten(3, (k_blocks, k_cells))
    masses = probs.sum(-1).unflatten(2, (q_blocks, q_cells)).amax(3)
    total = masses.sum(-1, keepdim=True)
    return masses / torch.where(total == 0, 1, total)


def pool_cells_(x: torch.Tensor, cells: torch.Tensor, factors: torch.Tensor, start: int) -> None:
    """Pool the cells of a growing sequence of keys, in place, from ``start`` on.

    Args:
        x: (B, H, L, D), the tokens from position ``start`` on, a multiple of 16. An unfinished cell
            has to be given again, from its beginning, once it has more tokens.
        cells: float16 (B, H, N, 2 W), W the :func:`estimation_width` of D: mean and spread of every
            cell, zeros behind the D dimensions of each, brought into float16's range by a power of
            two.
        factors: float32 (B, H, N): what a cell is to be multiplied by; NaN where it is not finite.
    """
    if x.numel() == 0:
        return
    vectors = cell_statistics(x).float()
    pad = estimation_width(x.shape[3]) - x.shape[3]
    vectors = torch.nn.functional.pad(vectors.unflatten(3, (2, -1)), (0, pad)).flatten(3)
    largest = vectors.abs().amax(-1, keepdim=True)
    finite = largest.isfinite()
    _, exponent = torch.frexp(largest.clamp_min(2.0**-100))
    inverse = torch.ldexp(torch.ones_like(largest), torch.where(finite, exponent - 14, 0))
    where = slice(start // CELL_TOKENS, start // CELL_TOKENS + vectors.shape[2])
    cells[:, :, where] = torch.where(finite, vectors / inverse, 0).to(cells.dtype)
    factors[:, :, where] = torch.where(finite, inverse, math.nan).squeeze(-1)


def _cells_of(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, head_dim = k.shape
    shape = (batch, heads, -(-length // CELL_TOKENS))
    cells = k.new_zeros((*shape, 2 * estimation_width(head_dim)), dtype=torch.float16)
    factors = k.new_zeros(shape, dtype=torch.float32)
    pool_cells_(k, cells, factors, 0)
    return cells, factors


def select_grid(
    q: torch.Tensor,
    k: torch.Tensor | None,
    top_p: Sequence[float],
    keep_above: Sequence[float] | None = None,
    keep_sink: int = 1,
    keep_recent: int = 1,
    scale: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 64,
    *,
    k_cells: torch.Tensor | None = None,
    k_factors: torch.Tensor | None = None,
    k_len: int | None = None,
    dense_below: int = 0,
    **sequences: Any,
) -> Mask:
    """Choose the key blocks of every query block by their masses on a grid of cells.

    Args:
        q: (B, Hq, q_len, D). k: (B, Hkv, k_len, D); or None, and instead
        k_cells, k_factors, k_len: its cells as :func:`pool_cells_` left them, and its tokens.
        top_p, keep_above: keep the blocks of most mass until they hold top_p of it, and all of at
            least keep_above, see :class:`~.blocks.Rules`.
        scale: of the softmax, D ** -0.5 if None.
        dense_below, sequences: of a ragged batch, see :class:`~.batch.Sequences`.

    Returns:
        bits int32 (B, Hq, Nq, ceil(Nk / 32)) and counts int32 (B, Hq, Nq).
    """
    rules = Rules(top_p, keep_above, keep_sink, keep_recent)
    sizes = (q_block_size, k_block_size)
    softmax_scale = q.shape[-1] ** -0.5 if scale is None else scale

    def select_one(q: torch.Tensor, k_vectors: torch.Tensor, k_len: int) -> Mask:
        def probable(visible: torch.Tensor) -> torch.Tensor:
            masses = grid_masses(q, k_vectors, k_len, softmax_scale, causal, *sizes)
            return top_p_blocks(masses, visible, rules)

        lengths = (q.shape[2], k_len)
        return select(probable, q.shape[:2], lengths, rules, causal, sizes, q.device)

    def from_cells(q: torch.Tensor, cells: torch.Tensor, factors: torch.Tensor, k_len: int) -> Mask:
        vectors = (cells.float() * factors.unsqueeze(-1))[:, :, : -(-k_len // CELL_TOKENS)]
        return select_one(q, vectors.unflatten(3, (2, -1))[..., : q.shape[3]].flatten(3), k_len)

    if k is None:
        assert k_cells is not None and k_factors is not None and k_len is not None
        return from_cells(q, k_cells, k_factors, k_len)

    def pool_and_select(q: torch.Tensor, k: torch.Tensor) -> Mask:
        if k.dtype == torch.float64:
            return select_one(q, cell_statistics(k), k.shape[2])
        # Rounded as pool_cells_ does: keys that were pooled before give the same mask.
        return from_cells(q, *_cells_of(k), k.shape[2])

    return select_each(pool_and_select, q, k, Sequences(**sequences), causal, sizes, dense_below)
