"""Processes that are ranks of gloo groups, started once for all tests."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MOST = 4
PATIENCE = 120  # seconds that a rank waits for the others, on a machine that may be busy


def _serve(rank: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=MOST,
        timeout=timedelta(seconds=PATIENCE),
    )
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in range(1, MOST)}
    groups[MOST] = dist.group.WORLD
    pipe.send(None)
    while True:
        task = pipe.recv()
        if task is None:
            break
        ranks, function, args = task
        try:
            pipe.send((True, function(groups[ranks], *args)))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


class Ranks:
    """Runs functions of a module on the first so many ranks."""

    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(MOST):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, str(folder / "store"), there), daemon=True
            )
            process.start()
            self._pipes.append(here)
            self._processes.append(process)
        for pipe in self._pipes:
            assert pipe.poll(120), "a rank did not start"
            pipe.recv()

    def try_run(
        self, ranks: int, function: Callable[..., Any], *args: Any
    ) -> list[tuple[bool, Any]]:
        """(True, result) or (False, what was raised) of function(group, *args) on each rank."""
        for pipe in self._pipes[:ranks]:
            pipe.send((ranks, function, args))
        for rank, pipe in enumerate(self._pipes[:ranks]):
            assert pipe.poll(3 * PATIENCE), f"rank {rank} does not answer"
        return [pipe.recv() for pipe in self._pipes[:ranks]]

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        results = self.try_run(ranks, function, *args)
        for rank, (fine, result) in enumerate(results):
            assert fine, f"rank {rank}: {result}"
        return [result for _, result in results]

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()
