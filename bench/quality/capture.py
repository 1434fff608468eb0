"""Runs a method inside a transformers model, as a registered attention implementation.

Two uses: :class:`Selecting` attends under one method's masks in every layer, so that the model's
answers show the method's quality; :class:`Comparing` attends densely and measures many methods on
the same queries, keys and values.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import attend
import torch
import torch.nn.functional as F
from methods import Method
from scores import Call
from transformers import AttentionInterface, AttentionMaskInterface

from prism_cuda.integrations.rope import inverse_frequencies

NAME = "quality"

_Result = TypeVar("_Result")
Handler = Callable[[Call, torch.Tensor], torch.Tensor]
_handler: Handler | None = None


def register() -> None:
    """Make attn_implementation="quality" available; it needs :func:`handling`."""
    AttentionInterface.register(NAME, _attention)
    # Always causal, never padded: there is no mask to make.
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Send every attention call of the block to ``handler``, which returns (B, Hq, L, D)."""
    global _handler
    before, _handler = _handler, handler
    try:
        yield
    finally:
        _handler = before


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    length = query.shape[2]
    windowed = sliding_window is not None and sliding_window < length
    standard = scaling is None or abs(scaling * query.shape[-1] ** 0.5 - 1) < 1e-6
    if key.shape[2] != length or windowed or not standard or _handler is None:
        raise NotImplementedError(
            f"quality: layer {getattr(module, 'layer_idx', None)} has {length} queries, "
            f"{key.shape[2]} keys, sliding window {sliding_window}, scale {scaling}; expected full "
            "causal attention of one forward pass inside handling()"
        )
    call = Call(query, key, _frequencies(module, query.shape[-1]), getattr(module, "layer_idx", 0))
    return _handler(call, value).transpose(1, 2).contiguous(), None


def _frequencies(module: Any, head_dim: int) -> tuple[float, ...] | None:
    try:
        return tuple(inverse_frequencies(module.config, head_dim).tolist())
    except ValueError:  # no RoPE
        return None


class Selecting:
    """Attends under one method's masks and sums up densities and estimation times."""

    def __init__(self, method: Method, knob: float) -> None:
        self.method, self.knob = method, knob
        self.densities: list[torch.Tensor] = []
        self.stopwatch = Stopwatch()

    def __call__(self, call: Call, value: torch.Tensor) -> torch.Tensor:
        if self.method.score is None and self.method.name == "dense":
            self.densities.append(torch.ones(1, device=value.device))
            return F.scaled_dot_product_attention(
                call.q, call.k, value, is_causal=True, enable_gqa=True
            )
        mask = self.stopwatch.time("mask", lambda: self.method.mask(call, self.knob))
        out, _, area = attend_with(self.method, call, value, mask)
        self.densities.append(area)
        return out

    def summary(self) -> dict[str, float]:
        """Mean density, and milliseconds of estimation per attention call."""
        density = torch.stack([row.mean() for row in self.densities]).mean().item()
        milliseconds = self.stopwatch.milliseconds("mask")
        return {"density": density, "estimate_ms": sum(milliseconds) / max(len(milliseconds), 1)}


def attend_with(
    method: Method, call: Call, value: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse) of attention as the method means it, and the density of every head (B, Hq).

    Where P V of a kept block is skipped, half of the block was computed.
    """
    blocks = method.blocks(call.q.shape[2])
    area = attend.density(mask, blocks)
    if method.skip:
        mask = mask & (attend.block_peaks(call.q, call.k, mask, blocks) >= method.skip)
        area = (area + attend.density(mask, blocks)) / 2
    result = attend.attend(call.q, call.k, value, mask, blocks)
    if method.tail != "none":
        tail = attend.pooled_tail(call.q, call.k, value, mask, blocks, method.tail == "variance")
        result = attend.merge(result, tail)
    return *result, area


class Comparing:
    """Attends densely; measures every (method, knob) on the same call.

    ``rows`` gets one dict per layer, method and knob with, per head: density, recall (mean
    probability mass under the mask), error (relative L2 of the output).
    """

    def __init__(self, settings: Sequence[tuple[Method, float]]) -> None:
        self.settings = settings
        self.rows: list[dict[str, Any]] = []
        self.stopwatch = Stopwatch()

    def __call__(self, call: Call, value: torch.Tensor) -> torch.Tensor:
        dense, lse = attend.dense(call.q, call.k, value)
        norm = dense.float().square().sum((-1, -2))
        for method, knob in self.settings:
            mask = self.stopwatch.time(
                (method.name, knob), lambda m=method, k=knob: m.mask(call, k)
            )
            out, kept_lse, area = attend_with(method, call, value, mask)
            error = (out.float() - dense.float()).square().sum((-1, -2)) / norm
            row = {
                "layer": call.layer,
                "method": method.name,
                "knob": knob,
                "density": area,
                "recall": (kept_lse - lse).exp().clamp_max(1).mean(-1),
                "error": error.sqrt(),
            }
            self.rows.append(row)
        return dense

    def table(self) -> list[dict[str, Any]]:
        """The rows with numbers rounded, and the time of estimation."""
        times = defaultdict(list)
        for key in {(method.name, knob) for method, knob in self.settings}:
            times[key] = self.stopwatch.milliseconds(key)
        table = []
        for row in self.rows:
            lists = {
                name: [round(x, 5) for x in row[name][0].tolist()]
                for name in ("density", "recall", "error")
            }
            milliseconds = times[row["method"], row["knob"]].pop(0)
            table.append({**row, **lists, "estimate_ms": round(milliseconds, 3)})
        return table


class Stopwatch:
    """Times calls on their device without waiting for it in between."""

    def __init__(self) -> None:
        self._marks: dict[Any, list[Any]] = defaultdict(list)

    def time(self, key: Any, work: Callable[[], _Result]) -> _Result:
        if not torch.cuda.is_available():
            start = time.perf_counter()
            result = work()
            self._marks[key].append(1e3 * (time.perf_counter() - start))
            return result
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = work()
        end.record()
        self._marks[key].append((begin, end))
        return result

    def milliseconds(self, key: Any) -> list[float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return [
            mark if isinstance(mark, float) else mark[0].elapsed_time(mark[1])
            for mark in self._marks[key]
        ]
