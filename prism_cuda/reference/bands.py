"""Selection by the block means of two RoPE bands: pooling, calibration, and the union of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from prism_cuda.reference.batch import Sequences, select_each
from prism_cuda.reference.blocks import Mask, Rules, probable_blocks, select

RMS_EPS = 1e-6


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scale_heads(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """x (B, H, N, D) times a scale (H,) of its heads."""
    return x if scale is None else x * scale[:, None, None]


def block_pool(x: torch.Tensor, block_size: int, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of every block of tokens: (B, H, L, D) -> (B, H, ceil(L / block_size), D).

    A ragged last block averages its real tokens only. The means are multiplied by scale (H,).
    """
    length = x.shape[2]
    blocks = -(-length // block_size)
    x = x.to(accumulate_dtype(x.dtype))
    padded = torch.nn.functional.pad(x, (0, 0, 0, blocks * block_size - length))
    sums = padded.unflatten(2, (blocks, block_size)).sum(3)
    sizes = torch.full((blocks, 1), block_size, dtype=sums.dtype, device=x.device)
    if blocks:
        sizes[-1] = length - (blocks - 1) * block_size
    return _scale_heads(sums / sizes, scale)


def append_means_(
    x: torch.Tensor,
    means: torch.Tensor,
    sums: torch.Tensor,
    start: int,
    block_size: int,
    scale: torch.Tensor | None = None,
) -> None:
    """Continue the block means of a growing sequence, in place, reading its new tokens only.

    However the sequence was cut, the means are the same, bit by bit.

    Args:
        x: (B, H, L, D), the tokens from position ``start`` on, which may lie within a block.
        means: float32 (B, H, N, D); blocks 0 to ceil((start + L) / block_size) - 1 are means
            afterwards, the last of them of its tokens so far.
        sums: float32 (B, H, R, D): of the unfinished block, sum r of its tokens r, r + R, ... What
            it holds where ``start`` is a multiple of block_size does not matter.
        scale: (H,), what the means are multiplied by; the sums are not.
    """
    length, residues = x.shape[2], sums.shape[2]
    if x.numel() == 0:
        return
    first, last = start // block_size, (start + length - 1) // block_size
    before = start - first * block_size
    after = (last + 1) * block_size - (start + length)
    steps = (last + 1 - first, block_size // residues, residues)
    padded = torch.nn.functional.pad(x.float(), (0, 0, before, after)).unflatten(2, steps)
    partial = padded.new_zeros((*x.shape[:2], steps[0], residues, x.shape[3]))
    if before:
        partial[:, :, 0] = sums
    for rows in padded.unbind(3):
        partial += rows
    total = torch.zeros_like(partial[:, :, :, 0])
    for part in partial.unbind(3):
        total += part
    sizes = torch.full((steps[0], 1), block_size, dtype=total.dtype, device=x.device)
    sizes[-1] = block_size - after
    means[:, :, first : last + 1] = _scale_heads(total / sizes, scale)
    if after:
        sums.copy_(partial[:, :, -1])


def band_index(band: Sequence[int], device: torch.device) -> torch.Tensor:
    """Dimensions of a band given as flattened half-open ranges [start0, end0, start1, ...]."""
    ranges = zip(band[::2], band[1::2], strict=True)
    dims = [dim for start, end in ranges for dim in range(start, end)]
    return torch.tensor(dims, dtype=torch.int64, device=device)


def _rms(means: torch.Tensor) -> torch.Tensor:
    """Root mean square over blocks and dimensions of each head: (B, H, N, D) -> (B, H)."""
    return means.square().mean((-2, -1)).sqrt()


def band_temperature(
    q_means: torch.Tensor, k_means: torch.Tensor, band: Sequence[int]
) -> torch.Tensor:
    """Temperature tau_z (B, Hq) that restores the energy pooling took from a band.

    tau_z = sqrt(d_z / d) * RMS(Q_z) / RMS(Q) * RMS(K_z) / RMS(K), where Q and K are the pooled
    tensors and z the band's dimensions.
    """
    dims = band_index(band, q_means.device)
    group = q_means.shape[1] // k_means.shape[1]
    q_ratio = _rms(q_means[..., dims]) / _rms(q_means).clamp_min(RMS_EPS)
    k_ratio = _rms(k_means[..., dims]) / _rms(k_means).clamp_min(RMS_EPS)
    width = math.sqrt(len(dims) / q_means.shape[-1])
    return width * q_ratio * k_ratio.repeat_interleave(group, dim=1)


def band_logits(q_means: torch.Tensor, k_means: torch.Tensor, band: Sequence[int]) -> torch.Tensor:
    """Calibrated block scores of one band, before any masking: (B, Hq, Nq, Nk)."""
    dims = band_index(band, q_means.device)
    kv_heads = k_means.shape[1]
    q_band = q_means[..., dims].unflatten(1, (kv_heads, -1))
    k_band = k_means[..., dims].unsqueeze(2)
    scores = (q_band @ k_band.transpose(-1, -2)).flatten(1, 2)
    temperature = band_temperature(q_means, k_means, band).clamp_min(RMS_EPS)
    return scores / (math.sqrt(len(dims)) * temperature[..., None, None])


def select_from_means(
    q_means: torch.Tensor,
    k_means: torch.Tensor,
    q_len: int,
    k_len: int,
    high_band: Sequence[int],
    low_band: Sequence[int],
    rules: Rules,
    causal: bool,
    q_block_size: int,
    k_block_size: int,
) -> Mask:
    """Choose the key blocks of every query block from block means.

    Args:
        q_means, k_means: (B, Hq, Nq, D) and (B, Hkv, Nk, D) from :func:`block_pool`.
        q_len, k_len: tokens behind the means.
        high_band, low_band: flattened half-open dimension ranges; an empty band selects nothing.
            Each band keeps what the rules say by itself.
    """

    def probable(visible: torch.Tensor) -> torch.Tensor:
        kept = visible.new_zeros(*q_means.shape[:2], *visible.shape)
        for band in (high_band, low_band):
            if len(band):
                kept |= probable_blocks(band_logits(q_means, k_means, band), visible, rules)
        return kept

    return select(
        probable, q_means.shape[:2], (q_len, k_len), rules, causal, (q_block_size, k_block_size),
        q_means.device,
    )  # fmt: skip


def select_bands(
    q: torch.Tensor,
    k: torch.Tensor | None,
    high_band: Sequence[int],
    low_band: Sequence[int],
    top_p: Sequence[float],
    keep_above: Sequence[float] | None = None,
    keep_sink: int = 1,
    keep_recent: int = 1,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 64,
    *,
    k_means: torch.Tensor | None = None,
    k_len: int | None = None,
    k_scale: torch.Tensor | None = None,
    dense_below: int = 0,
    **sequences: Any,
) -> Mask:
    """Choose the key blocks of every query block by the means of blocks, in two bands.

    Args:
        q: (B, Hq, q_len, D). k: (B, Hkv, k_len, D); or None, and instead
        k_means, k_len: its means as :func:`block_pool` and :func:`append_means_` give them, float32
            (B, Hkv, Nk or more, D), and the tokens behind them.
        high_band, low_band: as for :func:`select_from_means`.
        top_p, keep_above, keep_sink, keep_recent: see :class:`~.blocks.Rules`.
        k_scale: (Hkv,), what the means of k are multiplied by.
        dense_below, sequences: of a ragged batch, see :class:`~.batch.Sequences`.

    Returns:
        bits int32 (B, Hq, Nq, ceil(Nk / 32)) and counts int32 (B, Hq, Nq).
    """
    rules = Rules(top_p, keep_above, keep_sink, keep_recent)
    sizes = (q_block_size, k_block_size)

    def select_one(q: torch.Tensor, means: torch.Tensor, k_len: int) -> Mask:
        q_means = block_pool(q, q_block_size)
        lengths = (q.shape[2], k_len)
        return select_from_means(
            q_means, means, *lengths, high_band, low_band, rules, causal, *sizes
        )

    if k is None:
        assert k_means is not None and k_len is not None
        return select_one(q, k_means[:, :, : -(-k_len // k_block_size)], k_len)

    def pool_and_select(q: torch.Tensor, k: torch.Tensor) -> Mask:
        return select_one(q, block_pool(k, k_block_size, k_scale), k.shape[2])

    return select_each(pool_and_select, q, k, Sequences(**sequences), causal, sizes, dense_below)
