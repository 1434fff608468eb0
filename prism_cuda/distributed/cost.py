"""What context_parallel_prefill costs: bytes, balance, and a time to expect."""

from __future__ import annotations

from dataclasses import dataclass

from prism_cuda.distributed.shards import Shards
from prism_cuda.reference import CELL_TOKENS, estimation_width


@dataclass(frozen=True)
class Work:
    """A layer's call, over all ranks.

    Attributes:
        element_size: bytes of an element of q, k and v.
        density: kept pairs over visible pairs.
        growth: a query at position t keeps a number of keys in proportion to t ** growth. 1: a
            share that does not depend on t; bench/distributed_union.py sees about a half.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    element_size: int = 2
    estimator: str = "grid"
    block_sizes: tuple[int, int] = (128, 64)
    density: float = 0.4
    growth: float = 0.5


@dataclass(frozen=True)
class Machine:
    """Attributes:
    flops: of estimation and attention together, over kept pairs.
    bandwidth: bytes a second that reach a rank by collectives over all ranks.
    latency: seconds that a collective takes at least.
    """

    flops: float
    bandwidth: float
    latency: float = 3e-5


@dataclass(frozen=True)
class Cost:
    """Attributes:
    compute: seconds of the busiest rank for estimation and attention.
    transfer: seconds in which data is on its way.
    exposed: those of them that nothing is computed in.
    balance: work of the busiest rank over the mean.
    memory: bytes of a rank for the keys, values and pooled state of all ranks.
    """

    compute: float
    transfer: float
    exposed: float
    balance: float
    memory: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


def received(shards: Shards, work: Work, rank: int) -> dict[str, int]:
    """Bytes that reach a rank, as :class:`~.exchange.Traffic` counts them; aligned shards."""
    row = work.batch * work.kv_heads
    others = [other for other in range(shards.ranks) if other != rank]
    bytes_ = {"kv": _kv_bytes(work) * sum(shards.tokens(other) for other in others)}
    unit = CELL_TOKENS if work.estimator == "grid" else work.block_sizes[1]
    longest = max(shards.in_units(unit).tokens(other) for other in range(shards.ranks))
    if work.estimator == "grid":
        # Two float16 vectors and a float32 factor a cell.
        size = row * (2 * estimation_width(work.head_dim) * 2 + 4)
        return bytes_ | {"pooled": len(others) * max(1, size * longest)}
    size = row * work.head_dim * 4
    q_block, k_block = work.block_sizes
    heads = [
        (other + 1) * work.q_heads // shards.ranks - other * work.q_heads // shards.ranks
        for other in range(shards.ranks)
    ]
    words = -(-shards.length // (32 * k_block)) + 1  # the count is one more
    query = work.batch * work.head_dim * work.element_size
    elsewhere = sum(shards.tokens(other) for other in others)
    blocks = shards.in_units(q_block).tokens(rank)
    return bytes_ | {
        "pooled": len(others) * max(1, size * longest),
        "queries": heads[rank] * elsewhere * query,
        "masks": work.batch * sum(heads[other] for other in others) * blocks * words * 4,
    }


def _kv_bytes(work: Work) -> int:
    """Of a token."""
    return 2 * work.batch * work.kv_heads * work.head_dim * work.element_size


def share_of_work(shards: Shards, work: Work, rank: int) -> float:
    """The rank's part of all kept pairs."""
    power = 1 + work.growth
    ends = [(own.end**power - own.start**power) for own in shards.of(rank)]
    return sum(ends) / max(1, shards.length) ** power


def expect(shards: Shards, work: Work, machine: Machine, steps: int = 4) -> Cost:
    """The cost of a call, where the group overlaps transfer and attention.

    Pooled state, queries and masks come before anything is attended to. Keys come meanwhile; at
    best what is left of them after the computation is exposed, at worst it is also the last of
    ``steps`` parts, which has to be there before it is attended to.
    """
    ranks = range(shards.ranks)
    pairs = work.density * shards.length**2 / 2
    flops = 4 * work.batch * work.q_heads * work.head_dim * pairs
    shares = [share_of_work(shards, work, rank) for rank in ranks]
    compute = max(shares) * flops / machine.flops
    memory = shards.length * _kv_bytes(work)
    if shards.ranks == 1:
        return Cost(compute, 0.0, 0.0, 1.0, 0.0)
    volumes = [received(shards, work, rank) for rank in ranks]
    before = max(sum(own.values()) - own["kv"] for own in volumes) / machine.bandwidth
    collectives = 1 if work.estimator == "grid" else 3
    before += collectives * machine.latency
    keys = max(own["kv"] for own in volumes) / machine.bandwidth
    keys += len(shards.stretches) * machine.latency
    late = max(0.0, keys - compute * (1 - 1 / steps))
    return Cost(
        compute,
        before + keys,
        before + late,
        max(shares) * shards.ranks,
        memory + sum(volumes[0].values()) - volumes[0]["kv"],
    )
