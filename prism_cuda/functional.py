"""prefill, select_blocks and sparse_attention, and the choice between sparse and dense."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from prism_cuda import _ops, recording
from prism_cuda.block_mask import BlockMask
from prism_cuda.config import MAX_HEAD_DIM, Estimator, PrismConfig
from prism_cuda.per_head import (
    HeadBands,
    Selection,
    Setting,
    each_setting,
    settings_of_heads,
    take,
)

CUDA_DTYPES = (torch.bfloat16, torch.float16)
CPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Dispatch:
    """What :func:`prefill` does with a call.

    Attributes:
        path: "prism" (block-sparse) or "dense" (torch's scaled_dot_product_attention).
        kernel: the attention kernel: "sm80", ..., "cpu" for the reference, "sdpa" for dense.
        reason: why, in one phrase.
        estimator: "grid" or "bands", what the blocks are chosen by; None for dense.
    """

    path: recording.Path
    kernel: str
    reason: str
    estimator: Estimator | None = None


def _dense(reason: str) -> Dispatch:
    return Dispatch("dense", "sdpa", reason)


def dispatch(
    q_len: int,
    k_len: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    config: PrismConfig | None = None,
) -> Dispatch:
    """Say how :func:`prefill` would run a call, without running it."""
    config = config or PrismConfig()
    device = torch.device(device)
    q_block_size, k_block_size = config.block_sizes
    if q_len == 1:
        return _dense("decode: one query token")
    if q_len < q_block_size:
        return _dense(f"q_len {q_len} is less than one block of {q_block_size}")
    if k_len < config.dense_below:
        return _dense(f"k_len {k_len} is below dense_below {config.dense_below}")
    estimator = config.estimator_of(head_dim)
    largest = MAX_HEAD_DIM[config.estimator]
    if head_dim % 8 or not 0 < head_dim <= largest:
        return _dense(
            f"head_dim {head_dim} is not a multiple of 8 up to {largest}, as estimator "
            f"{config.estimator!r} needs"
        )
    if device.type not in ("cuda", "cpu"):
        return _dense(f"no kernel for {device.type} devices")
    dtypes = CUDA_DTYPES if device.type == "cuda" else CPU_DTYPES
    if dtype not in dtypes:
        return _dense(f"{dtype} is not supported on {device.type}")
    if device.type == "cpu":
        return Dispatch("prism", "cpu", "block-sparse", estimator)
    _ops.load()
    major, minor = torch.cuda.get_device_capability(device)
    kernel = torch.ops.prism.attention_kernel(
        10 * major + minor, dtype, head_dim, q_block_size, k_block_size
    )
    if kernel.startswith("unsupported"):
        return _dense(kernel)
    return Dispatch("prism", kernel, "block-sparse", estimator)


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    config: PrismConfig | None = None,
    scale: float | None = None,
    causal: bool = True,
    return_lse: bool = False,
    return_mask: bool = False,
) -> torch.Tensor | tuple:
    """Attention that estimates which blocks matter and computes only those.

    Args:
        q: (B, Hq, q_len, D), already rotated; bf16 or fp16 (float32 too on CPU), D a
            multiple of 8 up to 256 (128 where the config asks for the grid).
        k, v: (B, Hkv, k_len, D) with Hq a multiple of Hkv. Any strides whose last is 1.
        config: settings; what it rules out (short sequences, other dtypes or head sizes) runs as
            dense attention, see :func:`dispatch`.
        scale: softmax scale; D ** -0.5 if None.
        causal: row i sees keys up to i + (k_len - q_len).
        return_lse: also return float32 (B, Hq, q_len), the log of the softmax denominator.
        return_mask: also return the :class:`BlockMask` that was computed.

    Returns:
        out like q, or (out[, lse][, mask]). A row that sees no key gets out 0 and lse -inf.

    Raises:
        ImportError: if the ops library is not built.
        RuntimeError: if the tensors do not fit each other.
    """
    config = config or PrismConfig()
    choice = choose(q, k, v, config)
    if choice.path == "prism":
        bands = _bands(q, config)
        out, lse, mask = run_sparse(q, k, v, bands, config, scale, causal, choice.reason)
    elif return_lse or return_mask:
        mask = _full_mask(q, k, config, causal)
        if return_lse:
            out, lse = sparse_attention(q, k, v, mask, scale=scale, causal=causal, return_lse=True)
            note_dense(choice.reason, q, k)
        else:
            out, lse = run_dense(q, k, v, scale, causal, choice.reason), None
    else:
        return run_dense(q, k, v, scale, causal, choice.reason)
    extras = ([lse] if return_lse else []) + ([mask] if return_mask else [])
    return (out, *extras) if extras else out


def select_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    config: PrismConfig | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> BlockMask:
    """Estimate which key blocks every query block needs; never falls back to dense.

    Args and errors as in :func:`prefill`. Only the grid estimator uses ``scale``.
    """
    config = config or PrismConfig()
    _ops.load()
    return _estimate(q, k, _bands(q, config), config, scale, causal)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    causal: bool | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    window_left: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over the blocks of ``mask`` only.

    Args:
        q, k, v, scale, return_lse: as in :func:`prefill`.
        mask: made for q's and k's lengths, on their device.
        causal: the mask's own setting if None.
        sinks: float32 (Hq,), a logit per head that joins the softmax denominator without a value
            (attention sinks); lse includes it.
        softcap: scaled scores become softcap * tanh(score / softcap).
        window_left: a row sees only so many keys before its own position. It and softcap run on the
            portable kernel, on Hopper too.

    Returns:
        out like q, or (out, lse).

    Raises:
        ImportError: if the ops library is not built.
        ValueError: if the mask was made for other lengths.
        RuntimeError: if the tensors do not fit each other.
    """
    lengths = (q.shape[2], k.shape[2])
    if lengths != (mask.q_len, mask.k_len):
        raise ValueError(
            f"sparse_attention: mask is for (q_len, k_len) {(mask.q_len, mask.k_len)}; "
            f"expected {lengths}, the lengths of q and k"
        )
    _ops.load()
    out, lse = _ops.call(
        torch.ops.prism.sparse_attention,
        q,
        k,
        v,
        mask.bits,
        mask.counts,
        scale,
        mask.causal if causal is None else causal,
        mask.q_block_size,
        mask.k_block_size,
        sinks,
        softcap,
        window_left,
    )
    return (out, lse) if return_lse else out


def run_sparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bands: HeadBands | None,
    config: PrismConfig,
    scale: float | None,
    causal: bool,
    reason: str,
    layer_idx: int | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, BlockMask]:
    """Block-sparse attention, recorded: (out, lse, mask). bands is None for the grid estimator."""
    _ops.load()
    q_len, k_len = q.shape[2], k.shape[2]
    recorder = recording.active()
    times: dict[str, float] = {}
    settings = settings_of_heads(q.shape[1], bands, config)
    if recorder is not None and recorder.times:
        if bands is None:
            mask, times["select"] = timed(
                lambda: _estimate(q, k, bands, config, scale, causal), q.device
            )
        else:
            means, times["pool"] = timed(lambda: _pool(q, k, config), q.device)
            mask, times["select"] = timed(
                lambda: select_from_means(*means, q_len, k_len, bands, config, causal), q.device
            )
        (out, lse), times["attend"] = timed(
            lambda: sparse_attention(q, k, v, mask, scale=scale, sinks=sinks, return_lse=True),
            q.device,
        )
    elif bands is None or sinks is not None or len(settings) > 1:
        mask = _estimate(q, k, bands, config, scale, causal)
        out, lse = sparse_attention(q, k, v, mask, scale=scale, sinks=sinks, return_lse=True)
    else:
        out, lse, bits, counts = _ops.call(
            torch.ops.prism.prefill,
            q,
            k,
            v,
            *selection_arguments(settings[0], config),
            scale,
            causal,
            *config.block_sizes,
        )
        mask = BlockMask(bits, counts, q_len, k_len, *config.block_sizes, causal)
    if recorder is not None:
        kept_mask = mask if recorder.masks else None
        recorder.calls.append(
            recording.CallRecord(
                layer_idx,
                "prism",
                reason,
                q_len,
                k_len,
                mask.density(),
                kept_mask,
                times,
                "grid" if bands is None else "bands",
            )
        )
    return out, lse, mask


def run_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    causal: bool,
    reason: str,
    layer_idx: int | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Dense attention by torch, bottom-right causal, recorded. K and V are never repeated."""
    recorder = recording.active()
    if recorder is not None and recorder.times:
        out, seconds = timed(lambda: _sdpa(q, k, v, scale, causal, dropout), q.device)
        note_dense(reason, q, k, layer_idx, {"attend": seconds})
    else:
        out = _sdpa(q, k, v, scale, causal, dropout)
        note_dense(reason, q, k, layer_idx)
    return out


def note_dense(
    reason: str,
    q: torch.Tensor,
    k: torch.Tensor,
    layer_idx: int | None = None,
    times: dict[str, float] | None = None,
) -> None:
    """Record a dense call, if anyone is recording."""
    recorder = recording.active()
    if recorder is not None:
        recorder.calls.append(
            recording.CallRecord(
                layer_idx, "dense", reason, q.shape[2], k.shape[2], 1.0, times=times or {}
            )
        )


def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: PrismConfig) -> Dispatch:
    if v.shape[-1] != q.shape[-1]:
        return _dense(f"v has head_dim {v.shape[-1]}, q has {q.shape[-1]}")
    return dispatch(q.shape[2], k.shape[2], q.shape[-1], q.dtype, q.device, config)


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    causal: bool,
    dropout: float,
) -> torch.Tensor:
    q_len, k_len = q.shape[2], k.shape[2]
    blind = q_len if k_len == 0 else max(q_len - k_len, 0) if causal else 0
    if blind:
        # Rows before the first key see nothing; SDPA would return NaN for them.
        seeing = _sdpa(q[:, :, blind:], k, v, scale, causal, dropout) if blind < q_len else None
        out = q.new_zeros((*q.shape[:3], v.shape[-1]))
        if seeing is not None:
            out[:, :, blind:] = seeing
        return out
    # A single query, being last, sees every key.
    bias = causal_lower_right(q_len, k_len) if causal and 1 < q_len < k_len else None
    # Branches, because a compiler that knows no lengths makes symbols of the comparisons.
    is_causal = enable_gqa = False
    if causal and bias is None and q_len > 1:
        is_causal = True
    if q.shape[1] != k.shape[1]:
        enable_gqa = True
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=bias,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def _full_mask(q: torch.Tensor, k: torch.Tensor, config: PrismConfig, causal: bool) -> BlockMask:
    q_block_size, k_block_size = config.block_sizes
    return BlockMask.full(
        q.shape[0],
        q.shape[1],
        q.shape[2],
        k.shape[2],
        q_block_size=q_block_size,
        k_block_size=k_block_size,
        causal=causal,
        device=q.device,
    )


def _bands(q: torch.Tensor, config: PrismConfig) -> HeadBands | None:
    head_dim = q.shape[-1]
    return config.resolve_bands(head_dim) if config.estimator_of(head_dim) == "bands" else None


def _estimate(
    q: torch.Tensor,
    k: torch.Tensor,
    bands: HeadBands | None,
    config: PrismConfig,
    scale: float | None,
    causal: bool,
) -> BlockMask:
    """The block mask by bands, or by the grid where there are none."""
    q_len, k_len = q.shape[2], k.shape[2]
    sizes = config.block_sizes
    settings = settings_of_heads(q.shape[1], bands, config)
    if bands is not None and len(settings) > 1:
        # The means are the same for every setting.
        return select_from_means(*_pool(q, k, config), q_len, k_len, bands, config, causal)

    def estimate(heads: Sequence[int], kv_heads: Sequence[int], setting: Setting) -> Selection:
        inputs = (take(q, heads), take(k, kv_heads), *selection_arguments(setting, config))
        if bands is None:
            return torch.ops.prism.estimate_grid(*inputs, scale, causal, *sizes)
        return torch.ops.prism.estimate_blocks(*inputs, causal, *sizes)

    bits, counts = each_setting(estimate, settings, q.shape[1], k.shape[1])
    return BlockMask(bits, counts, q_len, k_len, *sizes, causal)


def _pool(
    q: torch.Tensor, k: torch.Tensor, config: PrismConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    q_block_size, k_block_size = config.block_sizes
    return (
        torch.ops.prism.block_pool(q, q_block_size),
        torch.ops.prism.block_pool(k, k_block_size),
    )


def select_from_means(
    q_means: torch.Tensor,
    k_means: torch.Tensor,
    q_len: int,
    k_len: int,
    bands: HeadBands,
    config: PrismConfig,
    causal: bool,
) -> BlockMask:
    def select(heads: Sequence[int], kv_heads: Sequence[int], setting: Setting) -> Selection:
        return torch.ops.prism.select_blocks(
            take(q_means, heads),
            take(k_means, kv_heads),
            q_len,
            k_len,
            *selection_arguments(setting, config),
            causal,
            *config.block_sizes,
        )

    settings = settings_of_heads(q_means.shape[1], bands, config)
    bits, counts = each_setting(select, settings, q_means.shape[1], k_means.shape[1])
    return BlockMask(bits, counts, q_len, k_len, *config.block_sizes, causal)


def select_from_cells(
    q: torch.Tensor,
    k_cells: torch.Tensor,
    k_factors: torch.Tensor,
    k_len: int,
    config: PrismConfig,
    scale: float | None,
) -> BlockMask:
    """The causal block mask from q and the cells of the first k_len keys."""

    def select(heads: Sequence[int], kv_heads: Sequence[int], setting: Setting) -> Selection:
        return torch.ops.prism.select_grid(
            take(q, heads),
            take(k_cells, kv_heads),
            take(k_factors, kv_heads),
            k_len,
            *selection_arguments(setting, config),
            scale,
            True,
            *config.block_sizes,
        )

    settings = settings_of_heads(q.shape[1], None, config)
    bits, counts = each_setting(select, settings, q.shape[1], k_cells.shape[1])
    return BlockMask(bits, counts, q.shape[2], k_len, *config.block_sizes, True)


def selection_arguments(setting: Setting, config: PrismConfig) -> tuple:
    """What the ops take of a setting: bands if any, and what to keep of the probabilities."""
    ranges, top_p = setting
    rules = (top_p, config.keep_sink, config.keep_recent)
    if ranges is None:
        return *rules, config.threshold(top_p, "grid")
    return list(ranges[0]), list(ranges[1]), *rules, config.threshold(top_p, "bands")


def timed(stage: Callable[[], _Result], device: torch.device) -> tuple[_Result, float]:
    """Run one stage alone; its result and the seconds it took on its device."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = stage()
        return result, time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        begin.record()
        result = stage()
        end.record()
        end.synchronize()
    return result, begin.elapsed_time(end) / 1e3
