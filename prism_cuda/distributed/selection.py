"""Selection for a rank's queries among the keys of all ranks, as one process would select."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from prism_cuda import ops
from prism_cuda.bits import WORD_BITS, every_block
from prism_cuda.config import PrismConfig
from prism_cuda.distributed.exchange import Exchange
from prism_cuda.distributed.shards import Range, Shards, Stretch
from prism_cuda.estimators.bands import Ranges, ranges_of_heads
from prism_cuda.estimators.base import rules_of
from prism_cuda.heads import Selection, each_choice, take
from prism_cuda.reference import CELL_TOKENS, estimation_width

# Bits and counts of one of the rank's stretches, which has a range within the rank's tensors, among
# the keys up to its end.
Select = Callable[[Stretch, Range], Selection]

ESTIMATORS = ("grid", "bands")


def select_every(
    shards: Shards,
    q: torch.Tensor,
    config: PrismConfig,
    window_left: int | None,
) -> Select:
    """Every block that some row sees."""
    sizes = config.block_sizes
    batch, heads, device = q.shape[0], q.shape[1], q.device

    def select(own: Stretch, _: Range) -> Selection:
        q_blocks = -(-own.length // sizes[0])
        words = -(-own.end // (sizes[1] * WORD_BITS))
        bits, counts = every_block(
            own.length, own.end, q_blocks, words, sizes, True, window_left, device
        )
        return (
            bits.expand(batch, heads, -1, -1).contiguous(),
            counts.expand(batch, heads, -1).contiguous(),
        )

    return select


def select_by_grid(
    exchange: Exchange,
    shards: Shards,
    q: torch.Tensor,
    k: torch.Tensor,
    config: PrismConfig,
    scale: float | None,
) -> Select:
    """Cells of keys are gathered, an eighth of K; a query block's choice needs no other queries."""
    ops.load()
    cells, factors = _gather_cells(exchange, shards, k)
    rules = rules_of(config, "grid", q.shape[1])

    def select(own: Stretch, at: Range) -> Selection:
        return ops.call(
            torch.ops.prism.select_grid.default,
            q[:, :, slice(*at)],
            None,
            *rules,
            scale,
            True,
            *config.block_sizes,
            k_cells=cells,
            k_factors=factors,
            k_len=own.end,
        )

    return select


def _gather_cells(
    exchange: Exchange, shards: Shards, k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells and factors of all keys. Stretches begin at whole cells, so a cell is on one rank."""
    batch, heads, tokens, head_dim = k.shape
    width = 2 * estimation_width(head_dim)
    units = shards.in_units(CELL_TOKENS)
    own = -(-tokens // CELL_TOKENS)
    cells = k.new_empty((batch, heads, own, width), dtype=torch.half)
    factors = k.new_empty((batch, heads, own), dtype=torch.float32)
    if tokens:
        torch.ops.prism.pool_cells_(k, cells, factors, 0)
    packed = torch.cat([x.flatten().view(torch.uint8) for x in (cells, factors)])
    counts = [batch * heads * units.tokens(rank) for rank in range(shards.ranks)]
    sizes = [count * (2 * width + 4) for count in counts]
    parts = exchange.all_gather("pooled", packed, sizes)
    of_cells, of_factors = [], []
    for part, count in zip(parts, counts, strict=True):
        vectors, numbers = part.split([2 * width * count, 4 * count])
        of_cells.append(vectors.view(torch.half).view(batch, heads, -1, width))
        of_factors.append(numbers.view(torch.float32).view(batch, heads, -1))
    return units.join(of_cells), units.join(of_factors)


def select_by_bands(
    exchange: Exchange,
    shards: Shards,
    q: torch.Tensor,
    k: torch.Tensor,
    config: PrismConfig,
) -> Select:
    """Means of keys are gathered, and queries exchanged so that every rank selects for some heads.

    The temperature of a head comes from all of its queries. A rank that has them all makes one
    process's mask, bit by bit, and sends every rank its rows.
    """
    ops.load()
    batch, q_heads, _, head_dim = q.shape
    q_block_size, k_block_size = config.block_sizes
    means = _gather_means(exchange, shards, k, k_block_size)
    heads = [
        range(rank * q_heads // shards.ranks, (rank + 1) * q_heads // shards.ranks)
        for rank in range(shards.ranks)
    ]
    mine = heads[exchange.rank]
    tokens = [shards.tokens(rank) for rank in range(shards.ranks)]
    received = exchange.all_to_all(
        "queries",
        [q[:, own.start : own.stop].flatten() for own in heads],
        [batch * len(mine) * n * head_dim for n in tokens],
    )
    whole = shards.join(
        [part.view(batch, len(mine), n, head_dim) for part, n in zip(received, tokens, strict=True)]
    )
    words = -(-shards.length // (k_block_size * WORD_BITS))
    if len(mine):
        bits, counts = _select_heads(whole, means, shards.length, config, mine, q_heads)
        rows = torch.cat([bits, counts[..., None]], -1)
    else:
        rows = q.new_empty((batch, 0, -(-shards.length // q_block_size), words + 1)).int()
    blocks = shards.in_units(q_block_size)
    sent = [blocks.take(rows, rank).flatten() for rank in range(shards.ranks)]
    own_blocks = blocks.tokens(exchange.rank)
    sizes = [batch * len(own) * own_blocks * (words + 1) for own in heads]
    parts = exchange.all_to_all("masks", sent, sizes)
    mask = torch.cat(
        [
            part.view(batch, len(own), own_blocks, words + 1)
            for part, own in zip(parts, heads, strict=True)
        ],
        1,
    )

    def select(own: Stretch, at: Range) -> Selection:
        rows = slice(at[0] // q_block_size, -(-at[1] // q_block_size))
        seen = -(-own.end // (k_block_size * WORD_BITS))
        return mask[:, :, rows, :seen].contiguous(), mask[:, :, rows, words].contiguous()

    return select


def _gather_means(
    exchange: Exchange, shards: Shards, k: torch.Tensor, block_size: int
) -> torch.Tensor:
    batch, heads, _, head_dim = k.shape
    units = shards.in_units(block_size)
    own = ops.call(torch.ops.prism.block_pool.default, k, block_size)
    counts = [units.tokens(rank) for rank in range(shards.ranks)]
    sizes = [4 * batch * heads * count * head_dim for count in counts]
    parts = exchange.all_gather("pooled", own.flatten().view(torch.uint8), sizes)
    return units.join([part.view(torch.float32).view(batch, heads, -1, head_dim) for part in parts])


def _select_heads(
    q: torch.Tensor,
    means: torch.Tensor,
    length: int,
    config: PrismConfig,
    heads: Sequence[int],
    q_heads: int,
) -> Selection:
    """The selection of some query heads, whose queries are given whole.

    Args:
        means: of all key heads.
        q_heads: in all, which config's settings of heads are for.
    """
    group = q_heads // means.shape[1]
    ranges = ranges_of_heads(config, q.shape[3], q_heads)
    rules = rules_of(config, "bands", q_heads)
    of_heads = [ranges[head if len(ranges) > 1 else 0] for head in heads]
    # A key head for every query head, where whole groups are not together.
    whole = heads[0] % group == 0 and len(heads) % group == 0
    own_means = take(means, [head // group for head in (heads[::group] if whole else heads)])

    def select(some: Sequence[int], kv_heads: Sequence[int], bands: Ranges) -> Selection:
        keywords: dict[str, Any] = {"k_means": take(own_means, kv_heads), "k_len": length}
        high, low = (list(band) for band in bands)
        return ops.call(
            torch.ops.prism.select_bands.default,
            take(q, some),
            None,
            high,
            low,
            *rules.of([heads[i] for i in some]),
            True,
            *config.block_sizes,
            **keywords,
        )

    return each_choice(select, of_heads, own_means.shape[1])
