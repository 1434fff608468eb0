"""Softmax attention over kept blocks, causal token by token."""

from __future__ import annotations

import math
from typing import Any

import torch

from prism_cuda.bits import WORD_BITS, unpack
from prism_cuda.reference.bands import accumulate_dtype
from prism_cuda.reference.batch import Sequences


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
    *,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    window_left: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    **sequences: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the kept (query block, key block) pairs, causal token by token.

    Args:
        q: (B, Hq, q_len, D). k, v: (B, Hkv, k_len, D). Or all ragged, see
            :class:`~.batch.Sequences`.
        bits, counts: a block mask as the selections return it. Rows whose count is 0 are skipped.
        scale: softmax scale, D ** -0.5 if None.
        sinks: (Hq,) logits that join the softmax denominators of their heads, without a value.
        softcap: scaled scores become softcap * tanh(score / softcap).
        window_left: a row sees its own position and so many keys before it only.
        k_scale, v_scale: (Hkv,), what the keys and values of a head are multiplied by.

    Returns:
        out like q, and lse (B, Hq, q_len), of a ragged batch (Hq, total_q): the natural logarithm
        of the softmax denominator, sink included. A row that sees nothing gets out 0, and as lse
        its sink or -inf; so do rows of q that belong to no sequence, without a sink.
    """
    sizes = (q_block_size, k_block_size)

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bits: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _attend_dense(
            q, k, v, bits, counts, q.shape[-1] ** -0.5 if scale is None else scale, causal, *sizes,
            sinks, softcap, window_left, k_scale, v_scale,
        )  # fmt: skip

    where = Sequences(**sequences)
    if not where.is_ragged():
        return attend(q, k, v, bits, counts)
    out = torch.zeros_like(q)
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=accumulate_dtype(q.dtype))
    for b in range(where.count()):
        rows = where.rows(b, q.shape[0])
        keys, values = (where.keys(x, b) for x in (k, v))
        q_blocks, k_blocks = where.blocks(rows.stop - rows.start, keys.shape[2], sizes)
        words = -(-k_blocks // WORD_BITS)
        own_bits, own_counts = bits[b, :, :q_blocks, :words], counts[b, :, :q_blocks]
        queries = q[rows].transpose(0, 1)[None]
        own_out, own_lse = attend(queries, keys, values, own_bits[None], own_counts[None])
        out[rows] = own_out[0].transpose(0, 1)
        lse[:, rows] = own_lse[0]
    return out, lse


def _attend_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bits: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    causal: bool,
    q_block_size: int,
    k_block_size: int,
    sinks: torch.Tensor | None,
    softcap: float | None,
    window_left: int | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, q_heads, q_len, _ = q.shape
    kv_heads, k_len = k.shape[1], k.shape[2]
    group = q_heads // kv_heads
    dtype = accumulate_dtype(q.dtype)
    kept = unpack(bits, -(-k_len // k_block_size))
    token = torch.arange(k_len, device=q.device)
    k, v = k.to(dtype), v.to(dtype)
    k_scales = [1.0] * kv_heads if k_scale is None else k_scale.tolist()
    v_scales = [1.0] * kv_heads if v_scale is None else v_scale.tolist()

    out = torch.empty_like(q)
    lse = torch.empty(batch, q_heads, q_len, dtype=dtype, device=q.device)
    for b in range(batch):
        for h in range(q_heads):
            g = h // group
            k_head, v_head = k[b, g], v[b, g]
            row_counts = counts[b, h].tolist()
            for i, start in enumerate(range(0, q_len, q_block_size)):
                rows = slice(start, min(start + q_block_size, q_len))
                first = start + k_len - q_len
                kept_tokens = kept[b, h, i].repeat_interleave(k_block_size)[:k_len]
                columns = token[kept_tokens]
                if causal:  # nobody sees what comes after the last row
                    columns = columns[columns < first + rows.stop - start]
                if row_counts[i] == 0 or not len(columns):
                    out[b, h, rows] = 0
                    lse[b, h, rows] = -math.inf if sinks is None else sinks[h]
                    continue
                block_out, block_lse = _attend(
                    q[b, h, rows].to(dtype) * (scale * k_scales[g]),
                    k_head.index_select(0, columns),
                    v_head.index_select(0, columns),
                    columns,
                    first,
                    causal,
                    softcap,
                    window_left,
                )
                if sinks is not None:
                    block_out, block_lse = _add_sink(block_out, block_lse, sinks[h].to(dtype))
                out[b, h, rows] = (block_out * v_scales[g]).to(q.dtype)
                lse[b, h, rows] = block_lse
    return out, lse


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    columns: torch.Tensor,
    first_position: int,
    causal: bool,
    softcap: float | None,
    window_left: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query block, q (M, D) already scaled, to the gathered keys (N, D).

    columns (N,) are the keys' positions, ascending; first_position is that of q's first row.
    """
    scores = q @ k.T
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    position = first_position + torch.arange(q.shape[0], device=q.device)
    if causal:
        # Keys up to the block's first position are visible to all its rows.
        free = int(torch.searchsorted(columns, first_position, right=True))
        scores[:, free:].masked_fill_(columns[free:] > position[:, None], -math.inf)
    if window_left is not None:
        scores.masked_fill_(columns < position[:, None] - window_left, -math.inf)
    highest = scores.amax(-1, keepdim=True)
    shift = torch.where(highest == -math.inf, 0, highest)
    weights = scores.sub_(shift).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.where(total == 0, 0, (weights @ v) / total)
    return out, (total.log() + shift).squeeze(-1)


def _add_sink(
    out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (M, D), (M,) with one more logit in the denominator, which has no value."""
    total = torch.logaddexp(lse, sink)
    share = torch.where(lse == -math.inf, 0, (lse - total).exp())
    return out * share[:, None], total
