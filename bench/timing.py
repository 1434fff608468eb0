"""Timing on the GPU: eager calls and CUDA-graph replay, with rotating inputs and a cold L2."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, median
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


@dataclass
class Timing:
    """Of one job."""

    rounds: list[float] = field(default_factory=list)  # median milliseconds in each round
    spans: list[tuple[float, float]] = field(default_factory=list)  # their time.monotonic()


def latin_square(size: int) -> list[list[int]]:
    """Orders of `size` jobs in as many rounds: each job comes once at every place.

    For an even size each also comes once behind every other; for an odd one twice behind half of
    them (Williams).
    """
    zigzag = [i // 2 if i % 2 == 0 else size - 1 - i // 2 for i in range(size)]
    return [[(place + shift) % size for place in zigzag] for shift in range(size)]


def measure_alternating(
    jobs: Sequence[Callable[[], object]], *, rounds: int | None = None, budget_ms: float = 100.0
) -> list[Timing]:
    """Times the jobs in turns, so that all of them meet the same clocks and predecessors.

    A round runs them one after the other, in the orders of a Latin square: as many rounds as jobs,
    and three at least, unless `rounds` says otherwise. A job gets `budget_ms` over all rounds, and
    one repetition in each at least. One repetition is what `measure` times: a call on an idle GPU
    with a cold L2.
    """
    orders = latin_square(len(jobs))
    rounds = max(3, len(jobs)) if rounds is None else rounds
    timings = [Timing() for _ in jobs]
    for i in range(rounds if jobs else 0):
        for j in orders[i % len(orders)]:
            start = time.monotonic()
            times: list[float] = []
            while not times or (sum(times) < budget_ms / rounds and len(times) < 100):
                times.append(_elapsed_ms(jobs[j]))
            timings[j].rounds.append(median(times))
            timings[j].spans.append((start, time.monotonic()))
    return timings


class GpuLog:
    """Clock and power of the first GPU, sampled by nvidia-smi while the context lasts."""

    COLUMNS = ("clock_mhz", "power_w")

    def __init__(self) -> None:
        self._samples: list[tuple[float, float, float]] = []  # time.monotonic(), MHz, W
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> GpuLog:
        query = "--query-gpu=clocks.sm,power.draw.instant"
        command = ["nvidia-smi", "-i", "0", query, "--format=csv,noheader,nounits", "-lms", "20"]
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except OSError:
            return self  # no log without nvidia-smi
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            now = time.monotonic()
            with contextlib.suppress(ValueError):
                clock, power = (float(word) for word in line.split(","))
                self._samples.append((now, clock, power))

    def during(self, spans: Sequence[tuple[float, float]]) -> dict[str, float]:
        """Means over the spans; nothing if no sample lies within them."""
        inside = [
            sample[1:] for sample in self._samples if any(a <= sample[0] <= b for a, b in spans)
        ]
        if not inside:
            return {}
        return dict(zip(self.COLUMNS, map(fmean, zip(*inside, strict=True)), strict=True))


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
