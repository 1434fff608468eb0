"""Ranks that disagree, die or hang."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.ranks import Ranks

from prism_cuda import PrismConfig
from prism_cuda.distributed import Exchange, context_parallel_prefill, contiguous, zigzag

pytestmark = pytest.mark.usefixtures("needs_library")

CONFIG = PrismConfig(block_size=64, estimator="grid", dense_below=0)


def arguments(**changes: Any) -> dict[str, Any]:
    """What is right; a change is of the second rank."""
    given: dict[str, Any] = {
        "heads": (4, 2),
        "head_dim": 64,
        "dtype": torch.float32,
        "batch": 1,
        "tokens": 128,
        "config": CONFIG,
        "keywords": {},
    }
    return given | changes


def call(group: Any, first: dict[str, Any], others: dict[str, Any]) -> Any:
    exchange = Exchange(group)
    given = first if exchange.rank == 0 else others
    shapes = [
        (given["batch"], heads, given["tokens"], given["head_dim"])
        for heads in (*given["heads"], given["heads"][1])
    ]
    q, k, v = (torch.zeros(shape, dtype=given["dtype"]) for shape in shapes)
    return context_parallel_prefill(q, k, v, group, config=given["config"], **given["keywords"])


DIFFERENCES = {
    "heads": ({"heads": (8, 2)}, "query heads is 8 on rank 1 and 4 on rank 0"),
    "kv_heads": ({"heads": (4, 1)}, "key heads is 1 on rank 1 and 2 on rank 0"),
    "head_dim": ({"head_dim": 128}, "head_dim is 128 on rank 1"),
    "dtype": ({"dtype": torch.bfloat16}, "dtype is torch.bfloat16 on rank 1"),
    "batch": ({"batch": 2}, "batch size is 2 on rank 1"),
    "config": ({"config": replace(CONFIG, top_p=0.5)}, "config is {'top_p': 0.5} on rank 1"),
    "scale": ({"keywords": {"scale": 0.5}}, "scale is 0.5 on rank 1 and None on rank 0"),
    "window": ({"keywords": {"window_left": 64}}, "window_left is 64 on rank 1"),
    "shards": ({"keywords": {"shards": contiguous(256, 2)}}, "expected the same on all ranks"),
    "refused": ({"heads": (3, 2)}, "q has 3 heads and k has 2"),
    "length": ({"keywords": {"shards": zigzag(512, 2)}}, "q has 128 tokens; expected 256"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_all_ranks_hear_of_a_difference(ranks: Ranks, name: str) -> None:
    changes, message = DIFFERENCES[name]
    for fine, result in ranks.try_run(2, call, arguments(), arguments(**changes)):
        assert not fine and message in result
    assert len(ranks.run(2, call, arguments(), arguments())) == 2  # nothing is left under way


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keywords": {"steps": 0}}, "steps is 0"),
        ({"keywords": {"check": False}}, "shards is None"),
        ({"keywords": {"shards": contiguous(256, 3)}}, "for 3 ranks"),
    ],
)
def test_what_one_process_can_tell(ranks: Ranks, changes: dict[str, Any], message: str) -> None:
    wrong = arguments(**changes)
    for fine, result in ranks.try_run(2, call, wrong, wrong):
        assert not fine and message in result


def test_groups_that_are_none(ranks: Ranks) -> None:
    for fine, result in ranks.try_run(1, wrong_group):
        assert fine, result


def wrong_group(group: Any) -> None:
    with pytest.raises(ValueError, match="expected a ProcessGroup"):
        Exchange(7)


def rank_with_a_fault(rank: int, store: str, fault: str, when: str, seconds: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=seconds),
    )
    if rank == 1:

        def fail(*args: Any, **kwargs: Any) -> Any:
            if fault == "dies":
                os._exit(3)
            time.sleep(600)

        if when == "before":
            fail()
        Exchange.broadcast = fail  # type: ignore[method-assign]
    start = time.monotonic()
    try:
        call(None, arguments(), arguments())
    except RuntimeError as error:
        right = "rank 0 of 2 did not get" in str(error) and time.monotonic() - start < seconds + 10
        os._exit(0 if right else 1)
    os._exit(2)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["dies", "hangs"])
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_lost_rank_ends_the_others(tmp_path: Path, fault: str, when: str) -> None:
    context = mp.get_context("spawn")
    processes = [
        context.Process(
            target=rank_with_a_fault, args=(rank, str(tmp_path / "store"), fault, when, 6.0)
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    processes[0].join(120)
    processes[1].kill()
    processes[1].join()
    assert processes[0].exitcode == 0
