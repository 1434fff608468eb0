"""Block scores: how much attention each (query block, key block) pair is estimated to hold.

Every function takes a :class:`Call` and returns probabilities (B, Hq, Nq, Nk) that sum to 1 over
the visible blocks of a row, one tensor per view (the two bands of Prism are two views).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from attend import Blocks, block_mass, block_means, grouped_scores

from prism_cuda import bands as band_split
from prism_cuda import reference


@dataclass(frozen=True)
class Call:
    """One attention call of a model.

    Attributes:
        q, k: (B, Hq, L, D) and (B, Hkv, L, D), after RoPE.
        inv_freq: the layer's inverse frequencies, radians per token; None without RoPE.
        layer: index of the layer.
    """

    q: torch.Tensor
    k: torch.Tensor
    inv_freq: tuple[float, ...] | None = None
    layer: int = 0

    @property
    def frequencies(self) -> tuple[float, ...]:
        """inv_freq, or those of base 1e6."""
        if self.inv_freq is not None:
            return self.inv_freq
        dim = self.q.shape[-1]
        return tuple(1e6 ** (-2 * pair / dim) for pair in range(dim // 2))

    def blocks(self, q_size: int, k_size: int) -> Blocks:
        return Blocks(q_size, k_size, self.q.shape[2])


Views = list[torch.Tensor]
Pool = Literal["mean", "peak", "both", "cells"]
Score = Callable[[Call, Blocks], Views]


def _softmax(logits: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(~visible, -math.inf).softmax(-1)


def oracle(call: Call, blocks: Blocks) -> Views:
    """The exact block mass."""
    return [block_mass(call.q, call.k, blocks)]


def noise(call: Call, blocks: Blocks) -> Views:
    """Uniformly random scores."""
    generator = torch.Generator(call.q.device).manual_seed(call.layer)
    shape = (*call.q.shape[:2], blocks.q_blocks, blocks.k_blocks)
    scores = torch.rand(shape, device=call.q.device, generator=generator)
    scores = scores * blocks.visible(call.q.device)
    return [scores / scores.sum(-1, keepdim=True).clamp_min(1e-9)]


def bands(
    call: Call,
    blocks: Blocks,
    dims: tuple[int, int] | None = (64, 96),
    calibrated: bool = True,
    running: bool = False,
    variance: float = 0.0,
) -> Views:
    """Prism's views: softmax of the pooled logits of the high and of the low band.

    Args:
        dims: dimensions of the (high, low) band, for head_dim 128 (scaled to others); None derives
            the bands from the model's inverse frequencies.
        calibrated: divide by Prism's temperature.
        running: energies over the blocks so far only, which makes chunked prefill equal one-shot.
        variance: weight of the second-order term q^2 var(k) / 2 that averaging the keys left out.
    """
    q_means, k_means = block_means(call.q, blocks.q), block_means(call.k, blocks.k)
    dim = call.q.shape[-1]
    if dims is None:
        split = band_split.split(call.frequencies, dim, max(blocks.q, blocks.k))
    else:
        split = band_split.from_dims(dims[0] * dim // 128, dims[1] * dim // 128, dim)
    visible = blocks.visible(call.q.device)
    views = []
    for band in (split.high_ranges, split.low_ranges):
        if not band:
            continue
        index = reference.band_index(band, call.q.device)
        logits = grouped_scores(q_means[..., index], k_means[..., index])
        if variance:
            k_square = block_means(call.k.float().square(), blocks.k) - k_means.square()
            square = q_means[..., index].square() / math.sqrt(len(index))
            logits = logits + 0.5 * variance * grouped_scores(square, k_square[..., index])
        if running:
            logits = logits / _running_temperature(q_means, k_means, index, blocks)
        elif calibrated:
            temperature = reference.band_temperature(q_means, k_means, band)
            logits = logits / temperature.clamp_min(reference.RMS_EPS)[..., None, None]
        views.append(_softmax(logits, visible))
    return views


def _running_temperature(
    q_means: torch.Tensor, k_means: torch.Tensor, index: torch.Tensor, blocks: Blocks
) -> torch.Tensor:
    """Prism's temperature from the energies of the blocks so far: (B, Hq, Nq, 1)."""

    def ratio(means: torch.Tensor) -> torch.Tensor:
        band = means[..., index].square().mean(-1).cumsum(-1)
        return (band / means.square().mean(-1).cumsum(-1).clamp_min(1e-12)).sqrt()

    group = q_means.shape[1] // k_means.shape[1]
    last = blocks.visible(q_means.device).sum(-1) - 1
    k_ratio = ratio(k_means)[..., last].repeat_interleave(group, 1)
    width = math.sqrt(len(index) / q_means.shape[-1])
    return (width * ratio(q_means) * k_ratio)[..., None].clamp_min(reference.RMS_EPS)


def dominant(call: Call, blocks: Blocks, pairs: int = 32) -> Views:
    """One view per head from its ``pairs`` RoPE pairs of most pooled energy (as FASA ranks)."""
    q_means, k_means = block_means(call.q, blocks.q), block_means(call.k, blocks.k)
    group = q_means.shape[1] // k_means.shape[1]

    def energy(means: torch.Tensor) -> torch.Tensor:
        return means.square().mean(2).unflatten(-1, (2, -1)).sum(-2).sqrt()

    share = energy(q_means) * energy(k_means).repeat_interleave(group, 1)
    chosen = share.topk(min(pairs, share.shape[-1]), -1).indices
    used = torch.zeros_like(share).scatter_(-1, chosen, 1.0).repeat(1, 1, 2)[:, :, None]
    logits = grouped_scores(q_means * used, k_means)
    return [_softmax(logits, blocks.visible(call.q.device))]


def bounds(call: Call, blocks: Blocks) -> Views:
    """Upper bound of a mean query's score in a block, from elementwise extrema (as Quest)."""
    q_means = block_means(call.q, blocks.q)
    extrema = []
    for sign in (1, -1):
        fill = -math.inf
        padded = torch.nn.functional.pad(
            sign * call.k.float(), (0, 0, 0, blocks.k_blocks * blocks.k - blocks.length), value=fill
        )
        extrema.append(sign * padded.unflatten(2, (blocks.k_blocks, blocks.k)).amax(3))
    highest, lowest = extrema
    logits = grouped_scores(q_means.clamp_min(0), highest)
    logits = logits + grouped_scores(q_means.clamp_max(0), lowest)
    return [_softmax(logits, blocks.visible(call.q.device))]


def fine(
    call: Call,
    blocks: Blocks,
    q_step: int,
    k_step: int,
    variance: float = 1.0,
    spread: float = 0.0,
    q_variance: float = 0.0,
    undo: float = 0.0,
    pool: Pool = "mean",
    sharpen: float = 1.0,
) -> Views:
    """Block mass from a finer grid: softmax over means of ``k_step`` keys, summed to blocks.

    Each mean of ``q_step`` queries has its own softmax; ``pool`` makes them one score per block.

    Args:
        variance: weight of the second-order term, see :func:`bands`.
        spread: weight of the first-order term sum |q_d| std(k_d), which is what the best key of a
            cell may score above the mean key, where variance is what all keys together do.
        q_variance: weight of the queries' second-order term var(q) k^2 / 2.
        undo: divide each RoPE pair by what pooling left of it, at least this much; 0 leaves it.
        pool: "mean": a block's score is the average share that the mean queries give it. "peak":
            the largest one, scaled to sum to 1, so that a query that needs one key is not outvoted
            by its neighbours. "both": two views, peak and mean. "cells": the shares themselves,
            (B, Hq, Nq, cells, Nk), 0 for cells past the end, and the mean.
        sharpen: power of the shares that the peaks are taken of, each cell's scaled to sum to 1:
            above 1 cells that look at few blocks win over cells that look at many.
    """
    q, k = call.q, call.k
    q_means, k_means = block_means(q, q_step), block_means(k, k_step)
    k_variance = (block_means(k.float().square(), k_step) - k_means.square()).clamp_min(0)
    if undo:
        for means, step in ((q_means, q_step), (k_means, k_step)):
            left = [band_split.attenuation(freq, step) for freq in call.frequencies]
            means /= torch.tensor(left * 2, device=q.device).clamp_min(undo)
    logits = grouped_scores(q_means, k_means)
    scale = q.shape[-1] ** -0.5
    if variance:
        logits += 0.5 * variance * grouped_scores(q_means.square() * scale, k_variance)
    if spread:
        logits += spread * grouped_scores(q_means.abs(), k_variance.sqrt())
    if q_variance:
        square = block_means(q.float().square(), q_step) - q_means.square()
        logits += 0.5 * q_variance * grouped_scores(square * scale, k_means.square())
    sub = Blocks(q_step, k_step, blocks.length)
    return _pooled(_softmax(logits, sub.visible(q.device)), sub, blocks, pool, sharpen)


def rows(call: Call, blocks: Blocks, step: int = 16) -> Views:
    """Block mass from every ``step``-th query's exact attention to every key."""
    sampled = call.q[:, :, step // 2 :: step]
    if sampled.shape[2] * step < blocks.length:  # the ragged end has no middle
        sampled = torch.cat([sampled, call.q[:, :, -1:]], 2)
    sub = Blocks(step, 1, blocks.length)
    probs = _softmax(grouped_scores(sampled, call.k), sub.visible(call.q.device))
    return [_to_blocks(probs, sub, blocks)]


def both(first: Score, second: Score) -> Score:
    """The views of two scores: what either finds is kept."""
    return lambda call, blocks: first(call, blocks) + second(call, blocks)


def _to_blocks(probs: torch.Tensor, sub: Blocks, blocks: Blocks) -> torch.Tensor:
    """Sum a finer grid's probabilities over keys and average them over queries."""
    return _pooled(probs, sub, blocks, "mean")[0]


def _pooled(
    probs: torch.Tensor, sub: Blocks, blocks: Blocks, pool: Pool, sharpen: float = 1.0
) -> Views:
    """Sum a finer grid's probabilities over keys, then pool them over queries, see :func:`fine`."""
    per_q, per_k = blocks.q // sub.q, blocks.k // sub.k
    pad_q = blocks.q_blocks * per_q - sub.q_blocks
    pad_k = blocks.k_blocks * per_k - sub.k_blocks
    padded = torch.nn.functional.pad(probs, (0, pad_k, 0, pad_q))
    shares = padded.unflatten(3, (-1, per_k)).sum(-1).unflatten(2, (-1, per_q))
    mean = _sum_to_one(shares.sum(3))
    if pool == "mean":
        return [mean]
    if pool == "cells":
        return [shares, mean]
    sharp = shares if sharpen == 1 else _sum_to_one(shares**sharpen)
    peak = _sum_to_one(sharp.amax(3))
    return [peak] if pool == "peak" else [peak, mean]


def _sum_to_one(mass: torch.Tensor) -> torch.Tensor:
    return mass / mass.sum(-1, keepdim=True).clamp_min(1e-20)


def antidiagonal(call: Call, blocks: Blocks, stride: int = 8, pool: Pool = "mean") -> Views:
    """XAttention: the summed antidiagonal of every stride x stride tile stands for the tile.

    ``pool`` as in :func:`fine`.
    """
    q, k = call.q, call.k
    length = blocks.length
    pad = -length % stride
    q = torch.nn.functional.pad(q.float(), (0, 0, 0, pad)).unflatten(2, (-1, stride))
    k = torch.nn.functional.pad(k.float(), (0, 0, 0, pad)).unflatten(2, (-1, stride))
    q, k = q.flip(3).flatten(3), k.flatten(3)
    scale = 1 / math.sqrt(stride)  # grouped_scores divides by the root of stride * head_dim
    sub = Blocks(stride, stride, length)
    logits = grouped_scores(q, k) * scale
    return _pooled(_softmax(logits, sub.visible(q.device)), sub, blocks, pool)


def last_queries(call: Call, blocks: Blocks, rows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last queries by key and by distance (MInference): each (B, Hq, L)."""
    length = blocks.length
    rows = min(rows, length)
    scores = grouped_scores(call.q[:, :, -rows:], call.k)
    key = torch.arange(length, device=call.q.device)
    row = torch.arange(length - rows, length, device=call.q.device)[:, None]
    probs = _softmax(scores, key <= row)
    distance = (row - key).clamp_min(0).expand_as(probs)
    slash = torch.zeros_like(probs[:, :, 0]).scatter_add_(-1, distance.flatten(2), probs.flatten(2))
    return probs.mean(2), slash / rows


def shared(score: Score) -> Score:
    """The same scores averaged over the query heads of a key/value head: one selection each."""

    def averaged(call: Call, blocks: Blocks) -> Views:
        group = call.q.shape[1] // call.k.shape[1]
        return [
            view.unflatten(1, (-1, group)).mean(2).repeat_interleave(group, 1)
            for view in score(call, blocks)
        ]

    return averaged
