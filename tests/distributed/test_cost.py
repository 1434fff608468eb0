"""The cost model against what real gloo runs count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.ranks import Ranks

from prism_cuda import PrismConfig, distributed
from prism_cuda.distributed import Exchange, context_parallel_prefill
from prism_cuda.distributed.cost import Machine, Work, expect, received, share_of_work

WORK = Work(q_heads=4, kv_heads=2, head_dim=64, element_size=2)
MACHINE = Machine(flops=6e14, bandwidth=3e11)


def counted(group: Any, layout: str, length: int, estimator: str) -> Any:
    exchange = Exchange(group)
    shards = getattr(distributed, layout)(length, exchange.ranks)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn((1, heads, length, 64), generator=generator).bfloat16() for heads in (4, 2, 2)
    )
    own = [shards.take(x, exchange.rank) for x in (q, k, v)]
    config = PrismConfig(estimator=estimator, dense_below=0)
    context_parallel_prefill(*own, exchange, config=config, shards=shards)
    return exchange.traffic


@pytest.mark.usefixtures("needs_library")
@pytest.mark.parametrize("estimator", ["grid", "bands"])
@pytest.mark.parametrize(("layout", "count"), [("contiguous", 2), ("zigzag", 3), ("zigzag", 4)])
def test_bytes_are_those_of_real_runs(
    ranks: Ranks, layout: str, count: int, estimator: str
) -> None:
    length = 1000
    shards = getattr(distributed, layout)(length, count)
    work = replace(WORK, estimator=estimator)
    for rank, traffic in enumerate(ranks.run(count, counted, layout, length, estimator)):
        assert traffic.received == received(shards, work, rank)


def test_work_is_shared_out() -> None:
    for layout in (distributed.contiguous, distributed.zigzag):
        shards = layout(65536, 8)
        assert sum(share_of_work(shards, WORK, rank) for rank in range(8)) == pytest.approx(1)
    even = replace(WORK, growth=1.0)
    assert expect(distributed.zigzag(65536, 8), even, MACHINE).balance == pytest.approx(1)
    assert expect(distributed.contiguous(65536, 8), even, MACHINE).balance == pytest.approx(15 / 8)


def test_time() -> None:
    alone = expect(distributed.zigzag(131072, 1), WORK, MACHINE)
    assert alone.exposed == alone.transfer == 0
    fast = expect(distributed.zigzag(131072, 8), WORK, MACHINE)
    slow = expect(distributed.zigzag(131072, 8), WORK, replace(MACHINE, bandwidth=1e9))
    assert alone.seconds / 8 < fast.seconds < alone.seconds / 6
    assert slow.compute == fast.compute and slow.exposed > fast.compute
    by_bands = expect(distributed.zigzag(131072, 8), replace(WORK, estimator="bands"), MACHINE)
    assert by_bands.exposed > fast.exposed
