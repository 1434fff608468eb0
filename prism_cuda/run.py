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
    call = _Call(
        plan, q, k, v, config, options, scale, causal, batch, k_scale, v_scale, dropout, source
    )
    if recording.active:
        recordings = recording.listening()
        if recordings:
            return _recorded(recordings, layer_idx, call)
    result = call.whole()
    if plan.estimator is not None and q.device.type == "cpu" and batch is None:
        _warn_if_nearly_all(result, layer_idx, call)
    return result


@dataclass
class _Call:
    """A planned call: as a whole, in one op wherever one does it all, or in stages."""

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
    dropout: float
    source: Source | None

    def whole(self) -> Result:
        plan, config, q = self.plan, self.config, self.q
        if plan.kernel == "sdpa":
            out = sdpa.attend(q, self.k, self.v, self.scale, self.causal, self.dropout)
            return out, None, None, None
        if self.batch is None and plan.kernel.startswith("unsupported"):
            raise RuntimeError(
                "prism: sinks, softcap, window_left and lse need one of prism's kernels; "
                f"{plan.kernel}"
            )
        ops.load()
        arguments = None
        if self.source is None:
            arguments = estimators.op_arguments(plan.estimator, config, q.shape[-1], q.shape[1])
        if arguments is None:
            bits, counts = self.select(None if self.source is None else self.source.pool())
            return *self.attend(bits, counts), bits, counts
        keywords: dict[str, object] = {}
        if self.options is not PLAIN or self.batch is not None:
            keywords = self._attention_keywords()
            if plan.estimator is not None:
                keywords |= estimators.batch_keywords(self.batch, config)
        return ops.call(
            torch.ops.prism.prefill.default,
            q,
            self.k,
            self.v,
            *arguments,
            self.scale,
            self.causal,
            *config.block_sizes,
            **keywords,
        )

    def pool(self) -> object:
        """What :meth:`select` takes, or None where it pools by itself."""
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
            **self._attention_keywords(),
        )

    def _attention_keywords(self) -> dict[str, object]:
        keywords = self.options.keywords()
        scales = {"k_scale": self.k_scale, "v_scale": self.v_scale}
        keywords |= {name: scale for name, scale in scales.items() if scale is not None}
        return keywords if self.batch is None else keywords | self.batch.keywords()

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


def _recorded(recordings: list[Recording], layer_idx: int | None, call: _Call) -> Result:
    plan, q, k = call.plan, call.q, call.k
    timer = _Timer(q.device)
    if not any(recording.times for recording in recordings):
        result = call.whole()
    elif plan.kernel == "sdpa" or plan.kernel.startswith("unsupported"):
        result = timer.run("attend", call.whole)
    else:
        ops.load()
        pooled = timer.run("pool", call.pool)
        if pooled is None and call.source is None:
            del timer.times["pool"]  # nothing was
        bits, counts = timer.run("select", lambda: call.select(pooled))
        out, lse = timer.run("attend", lambda: call.attend(bits, counts))
        result = out, lse, bits, counts
    record = CallRecord(
        layer_idx, plan.path, plan.reason, q.shape[-2], k.shape[-2], 1.0, None, timer.times,
        plan.estimator,
    )  # fmt: skip
    if call.batch is not None:
        _note_sequences(recordings, record, result, call, call.batch)
        return result
    if plan.path == "prism":
        record.mask = mask_of(result, record.q_len, record.k_len, call.config, call.causal)
        record.density = record.mask.density()
    recording.note(recordings, record)
    return result


def _warn_if_nearly_all(result: Result, layer_idx: int | None, call: _Call) -> None:
    """Of a call on the CPU, where counts can be read without waiting for a device."""
    if torch.compiler.is_compiling() or not recording.still_silent():
        return
    q_len, k_len = call.q.shape[2], call.k.shape[2]
    # Not the fake tensors of a trace, which hold no numbers.
    if k_len >= recording.LONG_INPUT and type(result[3]) is torch.Tensor:
        density = mask_of(result, q_len, k_len, call.config, call.causal).density()
        recording.warn_of_density(layer_idx, k_len, density, call.plan.estimator)


def _note_sequences(
    recordings: list[Recording], record: CallRecord, result: Result, call: _Call, batch: Batch
) -> None:
    """One record per sequence with queries and keys, in order; times go to the first.

    Args:
        record: what the plan says of the whole batch.
    """
    _, _, bits, counts = result
    assert bits is not None and counts is not None
    config = call.config
    q_block_size, k_block_size = config.block_sizes
    windowed = call.options.windowed(batch.max_seqlen_k)
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
                call.causal,
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
