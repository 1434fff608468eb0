"""Timing on the GPU: eager calls and CUDA-graph replay, with rotating inputs and a cold L2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import TypeVar

import torch

Inputs = TypeVar("Inputs")
MODES = ("eager", "graph")

_flush_buffer: torch.Tensor | None = None


def flush_l2() -> None:
    """Overwrite a buffer of twice the L2 cache."""
    global _flush_buffer
    if _flush_buffer is None:
        size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        _flush_buffer = torch.empty(size, dtype=torch.uint8, device="cuda")
    _flush_buffer.zero_()


def _elapsed_ms(call: Callable[[], object]) -> float:
    """One call on an idle GPU with a cold L2; the host's part of the call counts."""
    flush_l2()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _repetitions(first_ms: float, budget_ms: float, least: int) -> int:
    return int(min(100, max(least, budget_ms / max(first_ms, 1e-3))))


def measure(
    call: Callable[[Inputs], object],
    inputs: Sequence[Inputs],
    mode: str,
    *,
    warmup: int = 3,
    budget_ms: float = 400.0,
    least: int = 5,
) -> float:
    """Median milliseconds of one `call`, taking the inputs in turn.

    eager: each call by itself, host overhead included. graph: one CUDA graph that holds a call on
    every input, replayed; the time of a replay divided by the number of inputs. At least `least`
    times, more where `budget_ms` allows.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; allowed: {MODES}")
    for i in range(max(warmup, len(inputs))):
        call(inputs[i % len(inputs)])
    torch.cuda.synchronize()
    if mode == "eager":
        count = _repetitions(_elapsed_ms(lambda: call(inputs[0])), budget_ms, least)
        return median(_elapsed_ms(partial(call, inputs[i % len(inputs)])) for i in range(count))

    replay = capture(call, inputs)
    count = _repetitions(_elapsed_ms(replay), budget_ms, least)
    return median(_elapsed_ms(replay) for _ in range(count)) / len(inputs)


def capture(call: Callable[[Inputs], object], inputs: Sequence[Inputs]) -> Callable[[], None]:
    """The replay of a CUDA graph with a `call` on every input; it was replayed once already.

    `call` must have run before, so that whatever it compiles or sets up is there. What the graph
    reads (the inputs, and the masks that `call` holds) lives as long as the replay.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in inputs:
            call(one)
    kept = (call, inputs)

    def replay(_kept: object = kept) -> None:
        graph.replay()

    replay()
    return replay


def measure_alternating(
    jobs: Sequence[Callable[[], object]], *, rounds: int = 3, budget_ms: float = 100.0
) -> list[list[float]]:
    """Milliseconds of each job: its median in each of `rounds` rounds.

    A round runs the jobs one after the other, in reversed order every second round, so that all of
    them meet the same clocks. A job gets `budget_ms` over all rounds, and one repetition in each at
    least. One repetition is what `measure` times: a call on an idle GPU with a cold L2.
    """
    medians: list[list[float]] = [[] for _ in jobs]
    for i in range(rounds):
        for j in range(len(jobs)) if i % 2 == 0 else reversed(range(len(jobs))):
            times: list[float] = []
            while not times or (sum(times) < budget_ms / rounds and len(times) < 100):
                times.append(_elapsed_ms(jobs[j]))
            medians[j].append(median(times))
    return medians


def measure_once_if_long(
    call: Callable[[], object], *, long_ms: float = 1000.0, budget_ms: float = 200.0
) -> tuple[float, str]:
    """Milliseconds of a graph replay and "graph", or of the first call and "once" if that is long.

    Whatever the first call would compile has to be compiled already.
    """
    first = _elapsed_ms(call)
    if first > long_ms:
        return first, "once"
    return measure(
        lambda _: call(), [None], "graph", warmup=1, budget_ms=budget_ms, least=3
    ), "graph"
