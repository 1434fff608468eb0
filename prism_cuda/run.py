"""Runs a plan: select, attend, record. Once, for tensors, ragged batches and models' layers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from prism_cuda import estimators, ops, recording, sdpa
from prism_cuda.batch import Batch
from prism_cuda.bits import WORD_BITS, every_block
from prism_cuda.block_mask import BlockMask
from prism_cuda.config import PrismConfig
from prism_cuda.heads import Selection
from prism_cuda.options import PLAIN, ScoreOptions
from prism_cuda.plan import SPARSE, WINDOW, Plan, size_of, why_dense
from prism_cuda.recording import CallRecord, Recording

# out, lse, bits, counts; only out where torch attends.
Result = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Source:
    """What chooses blocks from state of its own, in two stages that can be timed.

    Attributes:
        pool: brings the state up to date; select takes what it returns.
    """

    pool: Callable[[], object]
    select: Callable[[object], Selection]


def run(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: PrismConfig,
    options: ScoreOptions = PLAIN,
    *,
    scale: float | None = None,
    causal: bool = True,
    layer_idx: int | None = None,
    batch: Batch | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    dropout: float = 0.0,
    source: Source | None = None,
) -> Result:
    """Attention as planned, recorded if anyone is recording.

    Args:
        config: the plan's. Of a model's layer, with the layer's own bands.
        batch: of a ragged batch, else None.
        k_scale, v_scale: of float8 keys and values.
        dropout: for dense attention by torch alone.
        source: what chooses the blocks instead of the plan's estimator.

    Raises:
        ImportError: if the ops library is not built.
        RuntimeError: if the tensors do not fit each other, or no kernel serves the call.
    """
    if recording.active:
        recordings = recording.listening()
        if recordings:
            return _recorded(
                recordings, layer_idx, plan, q, k, v, config, options, scale, causal, batch,
                k_scale, v_scale, dropout, source,
            )  # fmt: skip
    return _attend(
        plan, q, k, v, config, options, scale, causal, batch, k_scale, v_scale, dropout, source
    )


def _attend(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: PrismConfig,
    options: ScoreOptions,
    scale: float | None,
    causal: bool,
    batch: Batch | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    dropout: float,
    source: Source | None,
) -> Result:
    """In one op, wherever one does it all."""
    if plan.kernel == "sdpa":
        return sdpa.attend(q, k, v, scale, causal, dropout), None, None, None
    if batch is None and plan.kernel.startswith("unsupported"):
        raise RuntimeError(
            f"prism: sinks, softcap, window_left and lse need one of prism's kernels; {plan.kernel}"
        )
    ops.load()
    arguments = None
    if source is None:
        arguments = estimators.op_arguments(plan.estimator, config, q.shape[-1], q.shape[1])
    if arguments is None:
        stages = _Stages(
            plan, q, k, v, config, options, scale, causal, batch, k_scale, v_scale, source
        )
        bits, counts = stages.select(stages.pool() if source is not None else None)
        return *stages.attend(bits, counts), bits, counts
    if options is PLAIN and batch is None:
        return ops.call(
            torch.ops.prism.prefill.default, q, k, v, *arguments, scale, causal, *config.block_sizes
        )
    keywords = options.keywords()
    if batch is not None:
        keywords |= _fp8_keywords(k_scale, v_scale) | batch.keywords()
        if plan.estimator is not None:
            keywords["dense_below"] = max(config.dense_below, 1)
    return ops.call(
        torch.ops.prism.prefill.default,
        q,
        k,
        v,
        *arguments,
        scale,
        causal,
        *config.block_sizes,
        **keywords,
    )


@dataclass
class _Stages:
    """The same in ops of their own, for what no single op does and to time each."""

    plan: Plan
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    config: PrismConfig
    options: ScoreOptions
    scale: float | None
    causal: bool
    batch: Batch | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    source: Source | None

    def pool(self) -> object:
        if self.source is not None:
            return self.source.pool()
        if self.plan.estimator is None or self.batch is not None:
            return None
        return estimators.get(self.plan.estimator).pool_keys(self.k, self.config)

    def select(self, pooled: Any) -> Selection:
        if self.source is not None:
            return self.source.select(pooled)
        if self.plan.estimator is None:
            return self._every_block()
        return estimators.get(self.plan.estimator).select(
            self.q,
            self.k,
            self.config,
            scale=self.scale,
            causal=self.causal,
            pooled=pooled,
            batch=self.batch,
            k_scale=self.k_scale,
        )

    def attend(self, bits: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keywords = self.options.keywords() | _fp8_keywords(self.k_scale, self.v_scale)
        if self.batch is not None:
            keywords |= self.batch.keywords()
        return ops.call(
            torch.ops.prism.sparse_attention.default,
            self.q,
            self.k,
            self.v,
            bits,
            counts,
            self.scale,
            self.causal,
            *self.config.block_sizes,
            **keywords,
        )

    def _every_block(self) -> Selection:
        q_heads, device = self.q.shape[1], self.q.device
        sizes, window = self.config.block_sizes, self.options.window_left
        if self.batch is None:
            lengths: tuple[Any, Any] = self.q.shape[2], self.k.shape[2]
            longest = lengths
        else:
            lengths = self.batch.device_lengths()
            longest = self.batch.max_seqlen_q, self.batch.max_seqlen_k
        q_blocks = -(-longest[0] // sizes[0])
        words = -(-longest[1] // (sizes[1] * WORD_BITS))
        bits, counts = every_block(*lengths, q_blocks, words, sizes, self.causal, window, device)
        if self.batch is None:
            batch = self.q.shape[0]
        else:
            batch, bits, counts = len(bits), bits[:, None], counts[:, None]
        return (
            bits.expand(batch, q_heads, -1, -1).contiguous(),
            counts.expand(batch, q_heads, -1).contiguous(),
        )


def _fp8_keywords(k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> dict[str, object]:
    given = {"k_scale": k_scale, "v_scale": v_scale}
    return {name: scale for name, scale in given.items() if scale is not None}


def _recorded(
    recordings: list[Recording],
    layer_idx: int | None,
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: PrismConfig,
    options: ScoreOptions,
    scale: float | None,
    causal: bool,
    batch: Batch | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    dropout: float,
    source: Source | None,
) -> Result:
    timer = _Timer(q.device)
    call = (plan, q, k, v, config, options, scale, causal, batch, k_scale, v_scale)
    if not any(recording.times for recording in recordings):
        result = _attend(*call, dropout, source)
    elif plan.kernel == "sdpa" or plan.kernel.startswith("unsupported"):
        result = timer.run("attend", lambda: _attend(*call, dropout, source))
    else:
        ops.load()
        stages = _Stages(*call, source)
        pooled = timer.run("pool", stages.pool)
        if pooled is None and source is None:
            del timer.times["pool"]  # nothing was
        bits, counts = timer.run("select", lambda: stages.select(pooled))
        out, lse = timer.run("attend", lambda: stages.attend(bits, counts))
        result = out, lse, bits, counts
    record = CallRecord(
        layer_idx, plan.path, plan.reason, q.shape[-2], k.shape[-2], 1.0, None, timer.times,
        plan.estimator,
    )  # fmt: skip
    if batch is not None:
        _note_sequences(recordings, record, result, batch, config, options, causal)
        return result
    if plan.path == "prism":
        record.mask = mask_of(result, record.q_len, record.k_len, config, causal)
        record.density = record.mask.density()
    recording.note(recordings, record)
    return result


def _note_sequences(
    recordings: list[Recording],
    record: CallRecord,
    result: Result,
    batch: Batch,
    config: PrismConfig,
    options: ScoreOptions,
    causal: bool,
) -> None:
    """One record per sequence with queries and keys, in order; times go to the first.

    Args:
        record: what the plan says of the whole batch.
    """
    _, _, bits, counts = result
    assert bits is not None and counts is not None
    q_block_size, k_block_size = config.block_sizes
    windowed = options.windowed(batch.max_seqlen_k)
    planned_dense = record.reason if record.path == "dense" else None
    times = record.times
    for b, (q_len, k_len) in enumerate(zip(*batch.lengths(), strict=True)):
        if q_len == 0 or k_len == 0:
            continue
        reason = why_dense(size_of(q_len, k_len, config, windowed), config) or planned_dense
        own = CallRecord(layer_idx=record.layer_idx, path="dense", reason=reason or "", q_len=q_len,
                         k_len=k_len, density=1.0, times=times)  # fmt: skip
        if reason is None:
            q_blocks = -(-q_len // q_block_size)
            words = -(-k_len // (k_block_size * WORD_BITS))
            own.mask = BlockMask(
                bits[b : b + 1, :, :q_blocks, :words].contiguous(),
                counts[b : b + 1, :, :q_blocks].contiguous(),
                q_len,
                k_len,
                q_block_size,
                k_block_size,
                causal,
            )
            own.path, own.reason = "prism", WINDOW if windowed else SPARSE
            own.density, own.estimator = own.mask.density(), record.estimator
        recording.note(recordings, own)
        times = {}


def mask_of(result: Result, q_len: int, k_len: int, config: PrismConfig, causal: bool) -> BlockMask:
    """The blocks that a call of (B, H, L, D) tensors computed, unless torch did."""
    _, _, bits, counts = result
    assert bits is not None and counts is not None
    return BlockMask(bits, counts, q_len, k_len, *config.block_sizes, causal)


def note_dense(reason: str, q: torch.Tensor, k: torch.Tensor, layer_idx: int | None = None) -> None:
    """Record a dense call that was run elsewhere, if anyone is recording."""
    if recording.active:
        record = CallRecord(layer_idx, "dense", reason, q.shape[2], k.shape[2], 1.0)
        recording.note(recording.listening(), record)


class _Timer:
    """Seconds that stages take on their device, each run alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: dict[str, float] = {}

    def run(self, name: str, stage: Callable[[], _Value]) -> _Value:
        if self._device.type != "cuda":
            start = time.perf_counter()
            result = stage()
            self.times[name] = time.perf_counter() - start
            return result
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self._device):
            begin.record()
            result = stage()
            end.record()
            end.synchronize()
        self.times[name] = begin.elapsed_time(end) / 1e3
        return result
