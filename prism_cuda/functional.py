"""prefill, select_blocks and sparse_attention, and the choice between sparse and dense."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from prism_cuda import _ops, recording, selection
from prism_cuda.block_mask import BlockMask
from prism_cuda.config import MAX_HEAD_DIM, Estimator, PrismConfig
from prism_cuda.per_head import Chooser, estimator_of, settings_of_heads

MAX_ATTENTION_HEAD_DIM = 256  # multiples of 8
CUDA_DTYPES = (torch.bfloat16, torch.float16)
CPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_Result = TypeVar("_Result")

WINDOW_REASON = "sliding window: every block in it"


@dataclass(frozen=True)
class Scores:
    """What changes attention's scores and denominators.

    Attributes:
        sinks: float32 (Hq,), a logit per head that joins the softmax denominator.
        softcap: scaled scores become softcap * tanh(score / softcap).
        window_left: a row sees only so many keys before its own position.
    """

    sinks: torch.Tensor | None = None
    softcap: float | None = None
    window_left: int | None = None

    def plain(self) -> bool:
        return self.sinks is None and self.softcap is None and self.window_left is None

    def windowed(self, k_len: int) -> bool:
        """Whether the window hides any of the keys."""
        return self.window_left is not None and self.window_left + 1 < k_len

    def served_by_torch(self, k_len: int) -> bool:
        """Whether torch's attention computes them: it knows no sinks, caps and windows."""
        return self.sinks is None and self.softcap is None and not self.windowed(k_len)


PLAIN = Scores()


@dataclass(frozen=True)
class Dispatch:
    """What :func:`prefill` does with a call.

    Attributes:
        path: "prism" (block-sparse) or "dense" (torch's scaled_dot_product_attention).
        kernel: the attention kernel: "sm80", ..., "cpu" for the reference, "sdpa" for dense.
        reason: why, in one phrase.
        estimator: "grid" or "bands", what the blocks are chosen by; None where nothing is chosen.
    """

    path: recording.Path
    kernel: str
    reason: str
    estimator: Estimator | None = None


def dispatch(
    q_len: int,
    k_len: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    config: PrismConfig | None = None,
    *,
    sinks: bool = False,
    softcap: float | None = None,
    window_left: int | None = None,
) -> Dispatch:
    """Say how :func:`prefill` would run a call, without running it.

    Args:
        sinks: whether the call has sinks; softcap, window_left: as :func:`prefill` takes them.
    """
    config = config or PrismConfig()
    device = torch.device(device)
    scores = Scores(softcap=softcap, window_left=window_left)
    windowed = scores.windowed(k_len)
    by_torch = scores.served_by_torch(k_len) and not sinks
    reason = why_dense(q_len, k_len, head_dim, config, windowed)
    if reason is not None and by_torch:  # every decode step comes by here
        return Dispatch("dense", "sdpa", reason)
    kernel = attention_kernel(head_dim, dtype, device, config)
    if reason is None and kernel.startswith("unsupported"):
        reason = kernel
    if reason is not None:
        # Where torch's attention does not do, the block-sparse kernel computes every block.
        return Dispatch("dense", "sdpa" if by_torch else kernel, reason)
    if windowed:
        return Dispatch("prism", kernel, WINDOW_REASON)
    return Dispatch("prism", kernel, "block-sparse", config.estimator_of(head_dim))


def why_dense(
    q_len: int, k_len: int, head_dim: int, config: PrismConfig, windowed: bool
) -> str | None:
    """Why a call of this size keeps every block, or None: blocks are selected, or a window's kept.

    Windows need no estimation: every head_dim that attention takes will do.
    """
    q_block_size = config.block_sizes[0]
    # Not by f-strings, which compilers take lengths as constants for.
    if q_len == 1:
        return "decode: one query token"
    if q_len < q_block_size:
        return "q_len {} is less than one block of {}".format(q_len, q_block_size)  # noqa: UP032
    if k_len < config.dense_below:
        return "k_len {} is below dense_below {}".format(k_len, config.dense_below)  # noqa: UP032
    if not windowed and not is_estimated(head_dim, config):
        return (
            f"head_dim {head_dim} is not a multiple of 8 up to "
            f"{MAX_HEAD_DIM[config.estimator]}, as estimator {config.estimator!r} needs"
        )
    return None


def is_estimated(head_dim: int, config: PrismConfig) -> bool:
    """Whether config's estimator has kernels for this head size."""
    return head_dim % 8 == 0 and 0 < head_dim <= MAX_HEAD_DIM[config.estimator]


def attention_kernel(
    head_dim: int, dtype: torch.dtype, device: torch.device, config: PrismConfig
) -> str:
    """The attention kernel that serves these tensors, "cpu" for the reference; or
    "unsupported: ..."."""
    if device.type not in ("cuda", "cpu"):
        return f"unsupported: no kernel for {device.type} devices"
    dtypes = CUDA_DTYPES if device.type == "cuda" else CPU_DTYPES
    if dtype not in dtypes:
        return f"unsupported: {dtype} is not supported on {device.type}"
    if head_dim % 8 or not 0 < head_dim <= MAX_ATTENTION_HEAD_DIM:
        return f"unsupported: head_dim must be a multiple of 8 up to {MAX_ATTENTION_HEAD_DIM}"
    if device.type == "cpu":
        return "cpu"
    _ops.load()
    major, minor = torch.cuda.get_device_capability(device)
    return torch.ops.prism.attention_kernel(
        10 * major + minor, dtype, head_dim, *config.block_sizes
    )


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    config: PrismConfig | None = None,
    scale: float | None = None,
    causal: bool = True,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    window_left: int | None = None,
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
        sinks: float32 (Hq,), a logit per head that joins the softmax denominator without a value
            (attention sinks); lse includes it. Selection does not look at it.
        softcap: scaled scores become softcap * tanh(score / softcap), in attention; selection
            ranks blocks by scores without the cap.
        window_left: a row sees only so many keys before its own position (a sliding window of
            window_left + 1 tokens). Where that hides any key nothing is estimated: every block in
            the window is kept and the result is exact, at any D that is a multiple of 8 up to 256.
        return_lse: also return float32 (B, Hq, q_len), the log of the softmax denominator.
        return_mask: also return the :class:`BlockMask` that was computed.

    Returns:
        out like q, or (out[, lse][, mask]). A row that sees no key gets out 0 and lse -inf (its
        sink, where there are sinks).

    Raises:
        ImportError: if the ops library is not built.
        RuntimeError: if the tensors do not fit each other, or if lse, sinks, softcap or a window
            are asked of a dtype or head size without a kernel.
        ValueError: if k is float8, which :func:`prefill_varlen` takes.
    """
    config = config or PrismConfig()
    scores = Scores(sinks, softcap, window_left)
    check_not_fp8("prefill", k)
    choice = choose(q, k, v, config, scores)
    out, lse, mask = run(q, k, v, choice, config, scale, causal, scores, needs_lse=return_lse)
    if return_mask and mask is None:
        mask = _full_mask(q, k, config, causal)
    extras = ([lse] if return_lse else []) + ([mask] if return_mask else [])
    return (out, *extras) if extras else out


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    choice: Dispatch,
    config: PrismConfig,
    scale: float | None,
    causal: bool,
    scores: Scores,
    *,
    needs_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, BlockMask | None]:
    """What :func:`choose` chose: (out, lse, mask), without lse and mask where torch attends."""
    if choice.path == "prism":
        chooses = choice.estimator is not None
        chooser = selection.chooser_of(q.shape[-1], config) if chooses else None
        return run_sparse(q, k, v, chooser, config, scale, causal, choice.reason, scores=scores)
    if not needs_lse and choice.kernel == "sdpa":
        return run_dense(q, k, v, scale, causal, choice.reason), None, None
    mask = _full_mask(q, k, config, causal, scores.window_left)
    out, lse = attend(q, k, v, mask, scale, scores)
    note_dense(choice.reason, q, k)
    return out, lse, mask


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
    check_not_fp8("select_blocks", k)
    return selection.estimate(
        q, k, selection.chooser_of(q.shape[-1], config), config, scale, causal
    )


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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over the blocks of ``mask`` only.

    Args:
        q, k, v, scale, return_lse: as in :func:`prefill`, with D any multiple of 8 up to 256; k and
            v may also both be float8_e4m3fn.
        mask: made for q's and k's lengths, on their device.
        causal: the mask's own setting if None.
        sinks: float32 (Hq,), a logit per head that joins the softmax denominator without a value
            (attention sinks); lse includes it.
        softcap: scaled scores become softcap * tanh(score / softcap).
        window_left: a row sees its own position and so many keys before it only. Blocks that no
            row of a query block sees cost nothing, whatever the mask keeps.
        k_scale, v_scale: float32 (Hkv,), contiguous: what fp8 k and v of each head are multiplied
            by, finite and above 0; None: 1. Only for fp8.

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
        k_scale,
        v_scale,
    )
    return (out, lse) if return_lse else out


def run_sparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chooser: Chooser | None,
    config: PrismConfig,
    scale: float | None,
    causal: bool,
    reason: str,
    layer_idx: int | None = None,
    scores: Scores = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor, BlockMask]:
    """Block-sparse attention, recorded: (out, lse, mask).

    chooser is None for a window that hides keys, which keeps its blocks.
    """
    _ops.load()
    q_len, k_len = q.shape[2], k.shape[2]
    recorder = recording.active()
    times: dict[str, float] = {}
    bands = None if isinstance(chooser, str) else chooser
    # Settings that do not fit the heads are refused where a window needs none, too.
    settings = settings_of_heads(q.shape[1], chooser or "grid", config)

    def select() -> BlockMask:
        if chooser is None:
            return _full_mask(q, k, config, causal, scores.window_left)
        return selection.estimate(q, k, chooser, config, scale, causal)

    if recorder is not None and recorder.times:
        if bands is None:
            mask, times["select"] = timed(select, q.device)
        else:
            means, times["pool"] = timed(lambda: selection.pool(q, k, config), q.device)
            mask, times["select"] = timed(
                lambda: selection.select_from_means(*means, q_len, k_len, bands, config, causal),
                q.device,
            )
        (out, lse), times["attend"] = timed(lambda: attend(q, k, v, mask, scale, scores), q.device)
    elif bands is None or not scores.plain() or len(settings) > 1:
        mask = select()
        out, lse = attend(q, k, v, mask, scale, scores)
    else:
        out, lse, bits, counts = _ops.call(
            torch.ops.prism.prefill,
            q,
            k,
            v,
            *selection.arguments(settings[0], config),
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
                None if chooser is None else estimator_of(chooser),
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


def check_not_fp8(function: str, k: torch.Tensor) -> None:
    """Refuse fp8 keys, which dense attention does not take and whose scales there is no place for.

    Raises:
        ValueError: naming k.
    """
    if k.dtype == torch.float8_e4m3fn:
        raise ValueError(
            f"{function}: k has dtype {k.dtype}; expected q's (prefill_varlen takes fp8 keys)"
        )


def choose(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: PrismConfig,
    scores: Scores = PLAIN,
) -> Dispatch:
    """:func:`dispatch` of these tensors."""
    if v.shape[-1] != q.shape[-1]:
        reason = f"v has head_dim {v.shape[-1]}, q has {q.shape[-1]}"
        by_torch = scores.served_by_torch(k.shape[2])
        return Dispatch("dense", "sdpa" if by_torch else f"unsupported: {reason}", reason)
    return dispatch(
        q.shape[2],
        k.shape[2],
        q.shape[-1],
        q.dtype,
        q.device,
        config,
        sinks=scores.sinks is not None,
        softcap=scores.softcap,
        window_left=scores.window_left,
    )


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    scale: float | None,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`sparse_attention` with these scores: (out, lse)."""
    out, lse = sparse_attention(
        q,
        k,
        v,
        mask,
        scale=scale,
        sinks=scores.sinks,
        softcap=scores.softcap,
        window_left=scores.window_left,
        return_lse=True,
    )
    return out, lse


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


def _full_mask(
    q: torch.Tensor,
    k: torch.Tensor,
    config: PrismConfig,
    causal: bool,
    window_left: int | None = None,
) -> BlockMask:
    q_block_size, k_block_size = config.block_sizes
    return BlockMask.full(
        q.shape[0],
        q.shape[1],
        q.shape[2],
        k.shape[2],
        q_block_size=q_block_size,
        k_block_size=k_block_size,
        causal=causal,
        window_left=window_left,
        device=q.device,
    )


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
