"""Ways to choose the key blocks of every query block, in PyTorch, for one sequence.

q is (heads, length, head_dim) and k (kv_heads, length, head_dim), after RoPE; the length is a
multiple of 128. Blocks are 128 queries by 64 keys. A score maps q and k to probabilities
(heads, query blocks, key blocks) that sum to 1 in a row; a rule turns them into a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from attend_kept import K_BLOCK, Q_BLOCK

Score = Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]
Rule = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def visible_blocks(length: int, device: torch.device) -> torch.Tensor:
    first = torch.arange(0, length, K_BLOCK, device=device)
    last = torch.arange(Q_BLOCK - 1, length, Q_BLOCK, device=device)
    return first <= last[:, None]


def forced_blocks(length: int, device: torch.device) -> torch.Tensor:
    """The sink block and the query block's own tokens."""
    block = torch.arange(length // K_BLOCK, device=device)
    own = torch.arange(length // Q_BLOCK, device=device)[:, None] * (Q_BLOCK // K_BLOCK)
    forced = (block >= own) & (block < own + Q_BLOCK // K_BLOCK)
    forced[:, 0] = True
    return forced


def density(mask: torch.Tensor) -> torch.Tensor:
    """Kept token pairs over all causal ones, of every head."""
    blocks, own = mask.shape[1], Q_BLOCK // K_BLOCK
    area = torch.zeros(mask.shape[1:], dtype=torch.float64, device=mask.device)
    block = torch.arange(mask.shape[2], device=mask.device)
    row = torch.arange(blocks, device=mask.device)[:, None] * own
    area[block < row] = Q_BLOCK * K_BLOCK
    for i in range(own):
        pairs = sum(min(max(r + 1 - i * K_BLOCK, 0), K_BLOCK) for r in range(Q_BLOCK))
        area[block == row + i] = pairs
    return (mask * area).sum((-1, -2)) / area.sum()


# Rules.


def top_p(probs: torch.Tensor, visible: torch.Tensor, p: float, divisor: float = 0) -> torch.Tensor:
    """The most probable blocks until they hold p, and those of at least (1 - p) / divisor."""
    ordered, order = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, order, before < p)
    if divisor:
        kept |= probs >= (1 - p) / divisor
    return kept & visible


def above(probs: torch.Tensor, visible: torch.Tensor, threshold: float) -> torch.Tensor:
    return (probs >= threshold) & visible


either = partial(top_p, divisor=10)


# Scores.


def _cells(x: torch.Tensor, size: int) -> torch.Tensor:
    return x.float().unflatten(1, (-1, size))


def _to_one(mass: torch.Tensor) -> torch.Tensor:
    return mass / mass.sum(-1, keepdim=True).clamp_min(1e-20)


def _shares(logits: torch.Tensor, last: torch.Tensor, k_size: int) -> torch.Tensor:
    """Softmax over the key cells that begin at or before each query cell's last token, by block.

    logits (H, query cells, key cells), last (query cells,).
    """
    start = torch.arange(logits.shape[-1], device=logits.device) * k_size
    probs = logits.masked_fill_(start > last[:, None], -math.inf).softmax(-1)
    return probs.unflatten(-1, (-1, K_BLOCK // k_size)).sum(-1)


def _largest(shares: torch.Tensor, cells: int) -> torch.Tensor:
    """The largest share that any of a block's query cells gives each key block."""
    return shares.unflatten(1, (-1, cells)).amax(2)


def _each_group(
    q: torch.Tensor,
    k: torch.Tensor,
    work: Callable[..., torch.Tensor],
    together: bool = False,
    to_one: bool = True,
) -> torch.Tensor:
    """``work`` for the query heads (group, length, dim) and keys (length, dim) of each kv head.

    Args:
        together: every head gets the largest that any head of its group has.
        to_one: rows are scaled to sum to 1.
    """
    found = []
    for group, keys in zip(q.unflatten(0, (k.shape[0], -1)), k, strict=True):
        mass = work(group, keys)
        found.append(mass.amax(0, keepdim=True).expand_as(mass) if together else mass)
    mass = torch.cat(found)
    return _to_one(mass) if to_one else mass


def kmeans(x: torch.Tensor, clusters: int, steps: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm within blocks (..., tokens, dim), from the means of consecutive tokens.

    Returns centroids (..., clusters, dim) and one-hot assignments (..., tokens, clusters).
    """
    centers = x.unflatten(-2, (clusters, -1)).mean(-2)
    for _ in range(steps):
        scores = 2 * x @ centers.mT - centers.square().sum(-1).unsqueeze(-2)
        chosen = torch.nn.functional.one_hot(scores.argmax(-1), clusters).to(x.dtype)
        counts = chosen.sum(-2).unsqueeze(-1)
        centers = torch.where(counts > 0, chosen.mT @ x / counts.clamp_min(1), centers)
    return centers, chosen


def peaks(
    q: torch.Tensor,
    k: torch.Tensor,
    q_cells: int = 8,
    k_cells: int = 4,
    spread: float = 1.0,
    q_clusters: bool = False,
    k_clusters: bool = False,
    rows: bool = False,
    steps: int = 2,
    variance: float = 0.0,
    typical: bool = False,
    outliers: int = 0,
    together: bool = False,
    to_one: bool = True,
) -> list[torch.Tensor]:
    """The largest share of any query cell of the block; shares from means of cells.

    Args:
        q_cells, k_cells: cells of a block of queries, of keys.
        spread: weight of sum |q_d| std(k_d). variance: of sum q_d^2 var(k_d) / 2.
        typical: the spread is weighted by the root mean square of the queries, not by their mean.
        outliers: keys of a block that are cells of their own, those farthest from its mean as
            queries weight dimensions; for one cell of keys otherwise.
        q_clusters, k_clusters: cells are similar tokens of a block, not consecutive ones.
        rows: a cell of queries is represented by its middle query.
        together: one selection for the query heads of a kv head, from their largest shares.
        to_one: rows are scaled to sum to 1.
    """
    scale = q.shape[-1] ** -0.5
    length = q.shape[1]
    k_size = K_BLOCK // k_cells

    def work(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        last = torch.arange(length // Q_BLOCK * q_cells, device=q.device)
        if q_clusters:
            means, chosen = kmeans(_cells(queries, Q_BLOCK), q_cells, steps)
            empty = (chosen.sum(-2) == 0).flatten(1, 2)
            means = means.flatten(1, 2)
            last = (last // q_cells + 1) * Q_BLOCK - 1
        else:
            cells = _cells(queries, Q_BLOCK // q_cells)
            if typical:
                weights = cells.square().mean(2).sqrt()
            means = cells[:, :, cells.shape[2] // 2] if rows else cells.mean(2)
            last = (last + 1) * (Q_BLOCK // q_cells) - 1
        if not typical:
            weights = means.abs()
        bias = None
        if outliers:
            blocks = _cells(keys[None], K_BLOCK)[0]
            weight = queries.float().square().mean((0, 1))
            distance = ((blocks - blocks.mean(1, keepdim=True)).square() * weight).sum(-1)
            far = distance.topk(outliers, -1).indices
            alone = blocks.gather(1, far[..., None].expand(-1, -1, blocks.shape[-1]))
            rest = torch.ones_like(distance).scatter_(1, far, 0)[..., None]
            k_means = (blocks * rest).sum(1) / (K_BLOCK - outliers)
            square = ((blocks - k_means[:, None]).square() * rest).sum(1)
            deviation = (square / (K_BLOCK - outliers)).sqrt()
        elif k_clusters:
            blocks = _cells(keys[None], K_BLOCK)[0]
            k_means, chosen_keys = kmeans(blocks, k_cells, steps)
            counts = chosen_keys.sum(-2).unsqueeze(-1)
            square = chosen_keys.mT @ blocks.square() / counts.clamp_min(1)
            deviation = (square - k_means.square()).clamp_min(0).sqrt().flatten(0, 1)
            k_means = k_means.flatten(0, 1)
            bias = counts.clamp_min(1e-9).log().flatten()
        else:
            cells = _cells(keys[None], k_size)[0]
            k_means = cells.mean(1)
            deviation = (cells - k_means[:, None]).square().mean(1).sqrt()
        logits = (means * scale) @ k_means.T
        if spread:
            logits += (weights * (spread * scale)) @ deviation.T
        if variance:
            logits += ((means * scale).square() * (0.5 * variance)) @ deviation.square().T
        if bias is not None:
            logits += bias
        if outliers:
            logits += math.log(K_BLOCK - outliers)
            single = ((means * scale) @ alone.flatten(0, 1).T).unflatten(-1, (-1, outliers))
            logits = torch.logaddexp(logits, single.logsumexp(-1))
        shares = _shares(logits, last, k_size)
        if q_clusters:
            shares = shares.masked_fill_(empty[..., None], 0)
        return _largest(shares, q_cells)

    return [_each_group(q, k, work, together, to_one)]


def antidiagonal(
    q: torch.Tensor, k: torch.Tensor, stride: int = 8, largest: bool = False
) -> list[torch.Tensor]:
    """XAttention: the summed antidiagonal of every stride x stride tile stands for the tile."""
    scale = q.shape[-1] ** -0.5 / stride
    q_cells = Q_BLOCK // stride

    def work(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        turned = queries.unflatten(1, (-1, stride)).flip(2).flatten(2)
        logits = (turned @ keys.unflatten(0, (-1, stride)).flatten(1).T).float() * scale
        last = torch.arange(logits.shape[1], device=q.device) * stride + stride - 1
        shares = _shares(logits, last, stride)
        if largest:
            return _largest(shares, q_cells)
        return _to_one(shares.unflatten(1, (-1, q_cells)).sum(2))

    return [_each_group(q, k, work)]


def whole_blocks(score: Score, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    """The scores of 128 x 128 blocks."""
    return [view.unflatten(-1, (-1, Q_BLOCK // K_BLOCK)).sum(-1) for view in score(q, k)]


def true_shares(
    q: torch.Tensor,
    k: torch.Tensor,
    cell: int = 16,
    together: bool = False,
    to_one: bool = True,
    chunk: int = 512,
) -> list[torch.Tensor]:
    """The largest mean attention that any ``cell`` consecutive queries give each key block."""
    scale = q.shape[-1] ** -0.5
    length = q.shape[1]
    start = torch.arange(length, device=q.device)

    def work(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        shares = queries.new_zeros(
            queries.shape[0], length // cell, length // K_BLOCK, dtype=torch.float32
        )
        for first in range(0, length, chunk):
            stop = min(first + chunk, length)
            logits = (queries[:, first:stop] @ keys[:stop].T).float() * scale
            hidden = start[:stop] > start[first:stop, None]
            probs = logits.masked_fill_(hidden, -math.inf).softmax(-1)
            blocks = probs.unflatten(-1, (-1, K_BLOCK)).sum(-1)
            means = blocks.unflatten(1, (-1, cell)).mean(2)
            shares[:, first // cell : stop // cell, : stop // K_BLOCK] = means
        return _largest(shares, Q_BLOCK // cell)

    return [_each_group(q, k, work, together, to_one)]


def bands(
    q: torch.Tensor, k: torch.Tensor, dims: tuple[int, int] = (64, 96), size: int = 128
) -> list[torch.Tensor]:
    """Prism as published: calibrated softmax of the pooled high and low bands, each (H, N, N)."""
    dim, group = q.shape[-1], q.shape[0] // k.shape[0]
    high, low = (d * dim // 128 for d in dims)
    pair = torch.arange(dim, device=q.device) % (dim // 2)
    q_means = _cells(q, size).mean(2)
    k_means = _cells(k, size).mean(2).repeat_interleave(group, 0)
    blocks = q_means.shape[1]
    hidden = torch.ones(blocks, blocks, dtype=torch.bool, device=q.device).triu(1)
    views = []
    for band in (pair < high // 2, pair >= dim // 2 - low // 2):
        width = int(band.sum())
        energies = [
            means[..., band].square().mean((-1, -2)).sqrt()
            / means.square().mean((-1, -2)).sqrt().clamp_min(1e-6)
            for means in (q_means, k_means)
        ]
        temperature = (width / dim) ** 0.5 * energies[0] * energies[1]
        logits = q_means[..., band] @ k_means[..., band].mT
        logits /= width**0.5 * temperature.clamp_min(1e-6)[:, None, None]
        views.append(logits.masked_fill_(hidden, -math.inf).softmax(-1))
    return views


@dataclass(frozen=True)
class Method:
    """A score, whose views are selected from one by one, and a rule.

    Attributes:
        cost: multiply-adds of scoring over those of the 16 x 16 grid with spread.
    """

    about: str
    score: Score | None
    rule: Rule = either
    cost: float = 1.0

    def mask(self, q: torch.Tensor, k: torch.Tensor, knob: Any) -> torch.Tensor | None:
        """Bool (heads, query blocks, key blocks); None if dense.

        Args:
            knob: a number, or a tensor (heads, 1, 1).
        """
        if self.score is None:
            return None
        visible = visible_blocks(q.shape[1], q.device)
        kept = forced_blocks(q.shape[1], q.device)
        for view in self.score(q, k):
            repeat = visible.shape[1] // view.shape[-1]
            seen = visible[:, ::repeat]
            kept = kept | self.rule(view, seen, knob).repeat_interleave(repeat, -1)
        return kept & visible


def _peaks(about: str, cost: float, rule: Rule = either, **options: Any) -> Method:
    return Method(about, partial(peaks, **options), rule, cost)


def _raw(about: str, cost: float, **options: Any) -> Method:
    return _peaks(about, cost, above, to_one=False, **options)


METHODS: dict[str, Method] = {
    "dense": Method("every block", None, cost=0),
    "grid": _peaks("the default of the package: 16 x 16 cells, spread of the keys", 1),
    "grid_raw": _raw("grid, every block of at least this largest share", 1),
    "grid_typical": _peaks(
        "grid, 0.7 of the spread by typical queries", 1, spread=0.7, typical=True
    ),
    "typical_raw": _raw("grid_typical by largest share", 1, spread=0.7, typical=True),
    "typical_8_16": _peaks(
        "grid_typical, cells of 8 queries", 2, spread=0.7, typical=True, q_cells=16
    ),
    "typical_8_8": _peaks(
        "grid_typical, cells of 8 by 8", 4, spread=0.4, typical=True, q_cells=16, k_cells=8
    ),
    "outliers": _peaks("16 queries; of 64 keys a mean and 6 outliers", 1, k_cells=1, outliers=6),
    "outliers_8": _peaks("outliers, 8 queries", 2, q_cells=16, k_cells=1, outliers=6),
    "outliers_8_raw": _raw(
        "outliers, 8 typical queries, largest share",
        2,
        spread=0.7,
        typical=True,
        q_cells=16,
        k_cells=1,
        outliers=6,
    ),
    "t8_16_raw": _raw("typical_8_16 by largest share", 2, spread=0.6, typical=True, q_cells=16),
    "t4_16_raw": _raw(
        "cells of 4 typical queries by 16 keys, largest share",
        4,
        spread=0.4,
        typical=True,
        q_cells=32,
    ),
    "t4_64_raw": _raw(
        "cells of 4 typical queries by 64 keys, largest share",
        1,
        spread=0.7,
        typical=True,
        q_cells=32,
        k_cells=1,
    ),
    "t4_64": _peaks(
        "cells of 4 typical queries by 64 keys",
        1,
        spread=0.7,
        typical=True,
        q_cells=32,
        k_cells=1,
    ),
    "t4_32_raw": _raw(
        "cells of 4 typical queries by 32 keys, largest share",
        2,
        spread=0.7,
        typical=True,
        q_cells=32,
        k_cells=2,
    ),
    "rows4_64_raw": _raw(
        "the third query of 4, 64 keys, largest share",
        1,
        rows=True,
        q_cells=32,
        k_cells=1,
    ),
    "t2_64_raw": _raw(
        "cells of 2 typical queries by 64 keys, largest share",
        2,
        spread=0.7,
        typical=True,
        q_cells=64,
        k_cells=1,
    ),
    "together": _peaks("grid, one selection for a kv head", 1, together=True),
    "together_8_16": _peaks("together, 8 queries", 2, q_cells=16, together=True),
    "g8_16": _peaks("cells of 8 queries by 16 keys", 2, q_cells=16),
    "g8_16_raw": _raw("g8_16 by largest share", 2, q_cells=16),
    "g8_32": _peaks("cells of 8 queries by 32 keys", 1, q_cells=16, k_cells=2),
    "g4_64": _peaks("cells of 4 queries by 64 keys", 1, q_cells=32, k_cells=1),
    "g4_16": _peaks("cells of 4 queries by 16 keys", 4, q_cells=32, spread=0.5),
    "g8_8": _peaks("cells of 8 by 8", 4, q_cells=16, k_cells=8, spread=0.5),
    "g8_8_raw": _raw("g8_8 by largest share", 4, q_cells=16, k_cells=8, spread=0.5),
    "g4_4": _peaks("cells of 4 by 4", 16, q_cells=32, k_cells=16, spread=0.3),
    "g4_4_raw": _raw("g4_4 by largest share", 16, q_cells=32, k_cells=16, spread=0.3),
    "cq8": _peaks("8 clusters of queries, 16 keys", 1, q_clusters=True),
    "ck4": _peaks("16 queries, 4 clusters of keys", 1, k_clusters=True),
    "cq8_ck4": _peaks("8 clusters of queries, 4 of keys", 1, q_clusters=True, k_clusters=True),
    "cq16_ck4": _peaks(
        "16 clusters of queries, 4 of keys", 2, q_cells=16, q_clusters=True, k_clusters=True
    ),
    "rows16": _peaks("the middle query of 16, 16 keys", 1, rows=True),
    "rows8": _peaks("the middle query of 8, 16 keys", 2, rows=True, q_cells=16),
    "xattention": Method(
        "antidiagonals, stride 8, 128 x 128 blocks",
        partial(whole_blocks, antidiagonal),
        top_p,
        16,
    ),
    "antidiagonal": Method(
        "antidiagonals, largest share", partial(antidiagonal, largest=True), either, 16
    ),
    "prism": Method("published bands 64/96, 128 x 128 blocks", bands, top_p, 1 / 64),
    "true": Method("largest true share of any 16 queries", true_shares, either, float("nan")),
    "true_raw": Method(
        "true, every block of at least this", partial(true_shares, to_one=False), above
    ),
    "true_1": Method(
        "largest true share of any query", partial(true_shares, cell=1), either, float("nan")
    ),
}
