"""What runs and records block-sparse attention of a ragged batch, without reading its lengths."""

from __future__ import annotations

from collections.abc import Sequence as IntSequence
from dataclasses import dataclass

import torch

from prism_cuda import _bits, _ops, functional, recording, selection
from prism_cuda._every_block import every_block
from prism_cuda.block_mask import BlockMask
from prism_cuda.config import PrismConfig
from prism_cuda.functional import PLAIN, Scores
from prism_cuda.per_head import (
    Chooser,
    Selection,
    Setting,
    each_setting,
    estimator_of,
    settings_of_heads,
    take,
)

Run = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # out, lse, bits, counts


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a batch lie, as the ops take it (:func:`sparse_attention_varlen`)."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor | None
    seqused_k: torch.Tensor | None
    block_table: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int

    def arguments(self) -> tuple:
        return (
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.seqused_k,
            self.block_table,
            self.max_seqlen_q,
            self.max_seqlen_k,
        )

    def lengths(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of every sequence, int32 (B,) on the device."""
        q_lens = self.cu_seqlens_q.diff()
        if self.cu_seqlens_k is None:
            assert self.seqused_k is not None  # an op has refused anything else
            return q_lens, self.seqused_k
        k_lens = self.cu_seqlens_k.diff()
        if self.seqused_k is not None:
            k_lens = torch.minimum(k_lens, self.seqused_k)
        return q_lens, k_lens


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    where: Sequences,
    chooser: Chooser | None,
    config: PrismConfig,
    scale: float | None,
    causal: bool,
    scores: Scores = PLAIN,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    exact_mask: bool = False,
    dense: str | None = None,
    layer_idx: int | None = None,
) -> Run:
    """Block-sparse attention of a ragged batch, recorded by sequence: (out, lse, bits, counts).

    Args:
        chooser: what blocks are chosen by; None to keep every block that the rows see: for a
            window, for ``dense``, for a head size that is not estimated, and where :func:`selects`
            says so.
        exact_mask: make bits and counts those of the kept blocks alone. Otherwise bits of blocks
            that attention does not look at may be set, which takes fewer launches.
        dense: why every sequence keeps every block; None to select.
    """
    _ops.load()
    recorder = recording.active()
    times: dict[str, float] = {}
    chooser = None if dense else chooser

    def select() -> Selection:
        return _select(q, k, where, chooser, config, scale, causal, k_scale)

    def attend() -> tuple[torch.Tensor, torch.Tensor]:
        return _ops.call(
            torch.ops.prism.sparse_attention_varlen,
            q,
            k,
            v,
            bits,
            counts,
            *where.arguments(),
            scale,
            causal,
            *config.block_sizes,
            scores.sinks,
            scores.softcap,
            scores.window_left,
            k_scale,
            v_scale,
        )

    if recorder is not None and recorder.times:
        (bits, counts), times["select"] = functional.timed(select, q.device)
        (out, lse), times["attend"] = functional.timed(attend, q.device)
    else:
        bits, counts = select()
        out, lse = attend()
    if exact_mask or recorder is not None:
        short = None if chooser is None else _short(where, config)
        bits, counts = _exact(bits, counts, where, short, config, causal, scores.window_left)
    if recorder is not None:
        _record(
            recorder, bits, counts, where, q.shape[-1], chooser, config, causal, scores, dense,
            layer_idx, times,
        )  # fmt: skip
    return out, lse, bits, counts


def selects(where: Sequences, config: PrismConfig, scores: Scores) -> bool:
    """Whether blocks may be selected in some sequence, as far as the bounds of its length tell."""
    long = where.max_seqlen_q >= config.block_sizes[0] and where.max_seqlen_k >= config.dense_below
    return long and not scores.windowed(where.max_seqlen_k)


def _short(where: Sequences, config: PrismConfig) -> torch.Tensor:
    """Bool (B,), on the device: the sequences that keep every block."""
    q_lens, k_lens = where.lengths()
    return (q_lens < config.block_sizes[0]) | (k_lens < config.dense_below)


def _select(
    q: torch.Tensor,
    k: torch.Tensor,
    where: Sequences,
    chooser: Chooser | None,
    config: PrismConfig,
    scale: float | None,
    causal: bool,
    k_scale: torch.Tensor | None,
) -> Selection:
    """Bits and counts for attention, which looks at no block that its rows do not see.

    So every bit may be set where all blocks are kept: without a chooser, and in short sequences.
    """
    words = -(-where.max_seqlen_k // (config.block_sizes[1] * _bits.WORD_BITS))
    if chooser is None:
        q_blocks = -(-where.max_seqlen_q // config.block_sizes[0])
        rows = (where.cu_seqlens_q.shape[0] - 1, q.shape[1], q_blocks)
        return (
            q.new_full((*rows, words), -1, dtype=torch.int32),
            q.new_full(rows, words * _bits.WORD_BITS, dtype=torch.int32),
        )
    bits, counts = _estimate(q, k, where, chooser, config, scale, causal, k_scale)
    short = _short(where, config)[:, None, None]
    return (
        bits.masked_fill_(short[..., None], -1),
        counts.masked_fill_(short, words * _bits.WORD_BITS),
    )


def _exact(
    bits: torch.Tensor,
    counts: torch.Tensor,
    where: Sequences,
    short: torch.Tensor | None,
    config: PrismConfig,
    causal: bool,
    window_left: int | None,
) -> Selection:
    """The same without bits of blocks that no row sees, in ``short`` sequences; None: in all."""
    q_lens, k_lens = where.lengths()
    q_blocks, words = bits.shape[2:]
    every_bits, every_counts = every_block(
        q_lens, k_lens, q_blocks, words, config.block_sizes, causal, window_left, bits.device
    )
    every_bits, every_counts = every_bits[:, None], every_counts[:, None]  # as for every head
    if short is None:
        return every_bits.expand_as(bits).contiguous(), every_counts.expand_as(counts).contiguous()
    short = short[:, None, None]
    return (
        torch.where(short[..., None], every_bits, bits),
        torch.where(short, every_counts, counts),
    )


def _estimate(
    q: torch.Tensor,
    k: torch.Tensor,
    where: Sequences,
    chooser: Chooser,
    config: PrismConfig,
    scale: float | None,
    causal: bool,
    k_scale: torch.Tensor | None,
) -> Selection:
    """Bits and counts by one estimation for every distinct setting among q's heads.

    Heads are taken as views, never as copies: k may be a whole pool of pages.
    """
    q_heads, kv_heads = q.shape[1], k.shape[-2]

    def select(heads: IntSequence[int], kv: IntSequence[int], setting: Setting) -> Selection:
        # From the first to the last key head that is read: some may be estimated in vain.
        first, end = kv[0], kv[-1] + 1
        group = q_heads // kv_heads
        inputs = (q[:, first * group : end * group], k[..., first:end, :], *where.arguments())
        rules = selection.arguments(setting, config)
        sizes = (causal, *config.block_sizes)
        if isinstance(chooser, str):
            op = torch.ops.prism.estimate_grid_varlen
            bits, counts = _ops.call(op, *inputs, *rules, scale, *sizes)
        else:
            op = torch.ops.prism.estimate_blocks_varlen
            scales = None if k_scale is None else k_scale[first:end]
            bits, counts = _ops.call(op, *inputs, *rules, *sizes, scales)
        wanted = [head - first * group for head in heads]
        return take(bits, wanted), take(counts, wanted)

    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(
            f"prefill_varlen: q has {q_heads} heads and k has {kv_heads}; expected a multiple of "
            "k's"
        )
    settings = settings_of_heads(q_heads, chooser, config)
    return each_setting(select, settings, q_heads, kv_heads)


def _record(
    recorder: recording.Recording,
    bits: torch.Tensor,
    counts: torch.Tensor,
    where: Sequences,
    head_dim: int,
    chooser: Chooser | None,
    config: PrismConfig,
    causal: bool,
    scores: Scores,
    dense: str | None,
    layer_idx: int | None,
    times: dict[str, float],
) -> None:
    """One record per sequence with queries and keys, in order; times go to the first."""
    q_block_size, k_block_size = config.block_sizes
    for b, (q_len, k_len) in enumerate(zip(*(x.tolist() for x in where.lengths()), strict=True)):
        if q_len == 0 or k_len == 0:
            continue
        windowed = scores.windowed(where.max_seqlen_k)
        reason = functional.why_dense(q_len, k_len, head_dim, config, windowed) or dense
        q_blocks = -(-q_len // q_block_size)
        words = -(-k_len // (k_block_size * _bits.WORD_BITS))
        mask = BlockMask(
            bits[b : b + 1, :, :q_blocks, :words].contiguous(),
            counts[b : b + 1, :, :q_blocks].contiguous(),
            q_len,
            k_len,
            q_block_size,
            k_block_size,
            causal,
        )
        sparse_reason = functional.WINDOW_REASON if windowed else "block-sparse"
        recorder.calls.append(
            recording.CallRecord(
                layer_idx,
                "dense" if reason else "prism",
                reason or sparse_reason,
                q_len,
                k_len,
                1.0 if reason else mask.density(),
                mask if recorder.masks and not reason else None,
                times,
                None if reason or chooser is None else estimator_of(chooser),
            )
        )
        times = {}
