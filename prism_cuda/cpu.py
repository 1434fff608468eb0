"""Sparse attention for CPUs where the reference would be slow: the same result, in few large calls.

The reference attends one query block of one head at a time. Here all query blocks, of any head,
that keep equally many blocks before their own tokens are one call of torch's fused attention, and
so are all diagonals; their softmax denominators join the two. :mod:`prism_cuda.reference` stays the
specification, and computes what this does not: other than causal masks, masks that leave a query
block's own tokens out, sinks, softcaps, windows, scales, and ragged batches.
"""

from __future__ import annotations

from typing import Any

import torch

from prism_cuda import reference
from prism_cuda.bits import unpack
from prism_cuda.reference.bands import accumulate_dtype

# Fewer keys are attended to by the reference: there is little to win.
MIN_KEYS = 1024

# Gathered keys and values of one call: more of them would not stay in a cache.
GATHERED_BYTES = 16 << 20

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bits: torch.Tensor,
    counts: torch.Tensor,
    scale: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 64,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`prism_cuda.reference.sparse_attention`, to rounding in the accumulator's type."""
    sizes = (q_block_size, k_block_size)
    plain = causal and all(value is None for value in others.values())
    if plain and _is_long_and_aligned(q, k, sizes) and counts.all():
        before = _blocks_before(q, k, bits, sizes)
        if before is not None:
            return _attend(q, k, v, before, scale, sizes)
    return reference.sparse_attention(q, k, v, bits, counts, scale, causal, *sizes, **others)


def _is_long_and_aligned(q: torch.Tensor, k: torch.Tensor, sizes: tuple[int, int]) -> bool:
    """Whether it is worth it, and every query block's own tokens begin where a key block does."""
    if q.numel() == 0 or k.shape[2] < max(MIN_KEYS, q.shape[2]):
        return False
    return (k.shape[2] - q.shape[2]) % sizes[1] == 0


def _blocks_before(
    q: torch.Tensor, k: torch.Tensor, bits: torch.Tensor, sizes: tuple[int, int]
) -> torch.Tensor | None:
    """Bool (B, H, Nq, Nk): kept blocks before the query block's own; None if those are not kept."""
    q_len, k_len = q.shape[2], k.shape[2]
    kept = unpack(bits, -(-k_len // sizes[1]))
    first = torch.arange(k_len - q_len, k_len, sizes[0])[:, None]
    start = torch.arange(0, k_len, sizes[1])
    own = (start >= first) & (start < first + sizes[0])
    return kept & (start < first) if (kept | ~own).all() else None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    before: torch.Tensor,
    scale: float | None,
    sizes: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, q_len, head_dim = q.shape
    dtype = accumulate_dtype(q.dtype)
    q_size, k_size = sizes
    # Whole blocks: what is appended stands behind all rows, and its own rows are dropped.
    padding = (0, 0, 0, -q_len % q_size)
    q_blocks, keys, values = (
        torch.nn.functional.pad(x.to(dtype), padding).contiguous() for x in (q, k, v)
    )
    groups = heads // k.shape[1]
    own_keys, own_values = (
        x[:, :, -q_blocks.shape[2] :].repeat_interleave(groups, 1).reshape(-1, 1, q_size, head_dim)
        for x in (keys, values)
    )
    rows = q_blocks.reshape(-1, 1, q_size, head_dim)
    out, lse = _fused(rows, own_keys, own_values, 0.0, True, scale=scale)

    keys, values = (x.reshape(-1, k_size, head_dim) for x in (keys, values))
    of_head = keys.shape[0] // (batch * k.shape[1])  # key blocks
    kept = before.flatten(0, 2)
    counts = kept.sum(-1)
    for count in counts[counts > 0].unique().tolist():
        same = (counts == count).nonzero()[:, 0]
        blocks = kept[same].nonzero()[:, 1].view(-1, count)
        head = same // before.shape[2] // groups  # of the keys, all sequences' heads in a row
        blocks = blocks + head[:, None] * of_head
        step = max(GATHERED_BYTES // (count * k_size * head_dim * 2 * keys.element_size()), 1)
        for part, indices in zip(same.split(step), blocks.split(step), strict=True):
            gathered = (
                x.index_select(0, indices.flatten()).view(len(part), 1, -1, head_dim)
                for x in (keys, values)
            )
            far_out, far_lse = _fused(rows[part], *gathered, scale=scale)
            total = torch.logaddexp(lse[part], far_lse)
            out[part] = torch.lerp(out[part], far_out, (far_lse - total).exp().unsqueeze(-1))
            lse[part] = total

    out = out.view(batch, heads, -1, head_dim)[:, :, :q_len].to(q.dtype)
    return out, lse.view(batch, heads, -1)[:, :, :q_len].contiguous()
