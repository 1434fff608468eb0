"""Which calls are accepted, and which way each of them goes: sparse or dense, and why."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Literal

import torch

from prism_cuda import estimators, ops
from prism_cuda.batch import Batch
from prism_cuda.config import MAX_HEAD_DIM, PrismConfig
from prism_cuda.estimators import MAX_ATTENTION_HEAD_DIM, MAX_RULE_HEADS
from prism_cuda.options import PLAIN, ScoreOptions
from prism_cuda.recording import Path
from prism_cuda.remember import remembered

CUDA_DTYPES = (torch.bfloat16, torch.float16)
CPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn

# The kernels multiply a scale by log2(e), to a normal number of float32.
LEAST_SCALE = torch.finfo(torch.float32).tiny * math.log(2)
LARGEST_SCALE = torch.finfo(torch.float32).max * math.log(2)

# Ops take integers of 64 bits.
LARGEST_WINDOW = (1 << 63) - 1

SPARSE = "block-sparse"
WINDOW = "sliding window: every block in it"

# What the lengths of a call decide. Nothing else of a plan depends on them.
Size = Literal["one query", "few queries", "few keys", "windowed", "long"]


@dataclass(frozen=True)
class Plan:
    """Which way a call goes.

    Attributes:
        path: "prism" (block-sparse) or "dense" (every block that the rows see).
        kernel: the attention kernel: "sdpa" for torch's scaled_dot_product_attention, "sm80", ...,
            "cpu" for the reference, or "unsupported: ..." where none serves the call.
        reason: why, in one phrase.
        estimator: what the blocks are chosen by, "grid", "bands" or a registered name; None where
            nothing is chosen.
    """

    path: Path
    kernel: str
    reason: str
    estimator: str | None = None


def plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: PrismConfig,
    options: ScoreOptions = PLAIN,
    *,
    batch: Batch | None = None,
    needs_lse: bool = False,
) -> Plan:
    """The plan of a call with these tensors, of the dtype that attention computes in.

    Args:
        batch: of a ragged batch, which the host plans by the bounds of its lengths. Torch's
            attention serves none.
        needs_lse: whether the call has to return lse, which torch's attention does not.

    Raises:
        ImportError: if the ops library is not built.
    """
    if batch is None:
        q_len, k_len = q.shape[2], k.shape[2]
    else:
        q_len, k_len = batch.max_seqlen_q, batch.max_seqlen_k
    windowed = False
    if options.window_left is not None and options.windowed(k_len):
        windowed = True  # by a branch: compilers would keep the comparison as a symbol
    return _decide(
        config,
        size_of(q_len, k_len, config, windowed),
        windowed,
        windowed or options.softcap is not None,
        needs_lse or options.sinks is not None,
        q.shape[-1],
        v.shape[-1],
        q.dtype,
        q.device,
        batch is not None,
        k.dtype is FP8,
    )


def plan_of_shape(
    q_len: int,
    k_len: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    config: PrismConfig,
    options: ScoreOptions,
    sinks: bool,
) -> Plan:
    """The plan of a call before there are tensors, of heads in any number."""
    windowed = False
    if options.windowed(k_len):
        windowed = True
    return _decide(
        config,
        size_of(q_len, k_len, config, windowed),
        windowed,
        windowed or options.softcap is not None,
        sinks,
        head_dim,
        head_dim,
        dtype,
        device,
        False,
        False,
    )


def dense(plan: Plan, reason: str, kernel: str | None = None) -> Plan:
    """The same call with every block that the rows see, by another kernel if one is given."""
    return Plan("dense", plan.kernel if kernel is None else kernel, reason)


def size_of(q_len: int, k_len: int, config: PrismConfig, windowed: bool) -> Size:
    if q_len == 1:
        return "one query"
    block_size = config.block_size
    if q_len < (block_size if isinstance(block_size, int) else block_size[0]):
        return "few queries"
    if k_len < config.dense_below:
        return "few keys"
    return "windowed" if windowed else "long"


def why_dense(size: Size, config: PrismConfig) -> str | None:
    """Why a call of this size keeps every block; None: its blocks are chosen, or a window's kept.

    Lengths are not told: a compiled graph would be made for them alone.
    """
    if size == "one query":
        return "decode: one query token"
    if size == "few queries":
        return f"q_len is less than one block of {config.block_sizes[0]}"
    if size == "few keys":
        # A compiler may hold it for a symbol, of which no text can be made.
        return f"k_len is below dense_below {operator.index(config.dense_below)}"
    return None


def why_not_estimated(head_dim: int, config: PrismConfig) -> str | None:
    """Why config's estimator has no kernels for this head size, or None if it has."""
    largest = MAX_HEAD_DIM[config.estimator]
    if head_dim % 8 == 0 and 0 < head_dim <= largest:
        return None
    return (
        f"head_dim {head_dim} is not a multiple of 8 up to {largest}, as estimator "
        f"{config.estimator!r} needs"
    )


@remembered
def _decide(
    config: PrismConfig,
    size: Size,
    windowed: bool,
    changed: bool,
    beyond_torch: bool,
    head_dim: int,
    v_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    ragged: bool,
    fp8_keys: bool,
) -> Plan:
    """Every rule there is. Lengths are no arguments, so that graphs are not made for each.

    Args:
        changed: whether a cap or a window changes scores, for which kernels differ.
        beyond_torch: whether anything else is asked for that torch's attention does not do.
    """
    by_torch = not (changed or beyond_torch or ragged)
    estimator = config.estimator_of(head_dim, fp8_keys)
    reason = None
    if v_dim != head_dim:
        reason = f"v has head_dim {v_dim}, q has {head_dim}"
    if reason is None:
        reason = why_dense(size, config)
    if reason is None and size == "long":
        reason = why_not_estimated(head_dim, config)
    if reason is not None and by_torch:  # no need of a kernel, and a decode step is frequent
        return Plan("dense", "sdpa", reason)
    if v_dim != head_dim and not ragged:
        kernel = f"unsupported: {reason}"
    else:
        # A compiler has to make a constant of the head size, which it may hold for a symbol.
        kernel = attention_kernel(
            operator.index(head_dim), dtype, device, config.block_sizes, fp8_keys, changed
        )
    if reason is None and kernel.startswith("unsupported") and not ragged:
        reason = kernel
    if reason is not None:
        # Where torch's attention does not do, the block-sparse kernel computes every block.
        return Plan("dense", "sdpa" if by_torch else kernel, reason)
    if windowed:
        return Plan("prism", kernel, WINDOW)
    return Plan("prism", kernel, SPARSE, estimator)


@torch.compiler.assume_constant_result
def attention_kernel(
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    block_sizes: tuple[int, int],
    fp8_keys: bool = False,
    changed_scores: bool = False,
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
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        missing = "this machine has no CUDA device" if built else "this torch has no CUDA"
        return f"unsupported: {missing}"
    ops.load()
    major, minor = torch.cuda.get_device_capability(device)
    return torch.ops.prism.attention_kernel(
        10 * major + minor, dtype, head_dim, *block_sizes, fp8_keys, changed_scores
    )


def check(
    function: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    options: ScoreOptions = PLAIN,
    causal: bool = True,
) -> None:
    """Refuse tensors (B, H, L, D) that do not fit each other, whichever way the call would go.

    Raises:
        ValueError: if k or v is float8, whose scales there is no place for.
        RuntimeError: as the ops do, naming the argument, what it is and what is allowed.
    """
    # What every right call passes, at once: this is a good part of a call's time on the host.
    try:
        batch, q_heads, _, head_dim = q.shape
        k_batch, kv_heads, k_len, k_dim = k.shape
        v_batch, v_heads, v_len, _ = v.shape
        right = (
            q.dtype is k.dtype is v.dtype is not FP8
            and batch == k_batch == v_batch
            and kv_heads == v_heads
            and k_len == v_len
            and head_dim == k_dim
            and kv_heads != 0
            and q_heads % kv_heads == 0
            and q.stride(3) == k.stride(3) == v.stride(3) == 1
            and q.device == k.device == v.device
        )
    except ValueError:  # other numbers of dimensions
        right = False
    if not right:
        _explain(function, q, k, v)
    if scale is not None and not LEAST_SCALE <= scale <= LARGEST_SCALE:
        _refuse(
            function,
            f"scale is {scale}",
            "None, or a finite number above 0, neither under nor over float32's range",
        )
    if not isinstance(causal, bool):
        _refuse(function, f"causal is {causal!r}", "True or False")
    window_left = options.window_left
    if window_left is None:
        return
    if isinstance(window_left, (float, str)) or not 0 <= window_left <= LARGEST_WINDOW:
        _refuse(
            function,
            f"window_left is {window_left!r}",
            "None, or 0 and more keys, less than 2 ** 63",
        )


def _explain(function: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Refuse by the first thing that is wrong, if anything is."""
    tensors = (("q", q), ("k", k), ("v", v))
    for name, x in tensors:
        if x.dim() != 4:
            _refuse(
                function,
                f"{name} has shape {tuple(x.shape)}",
                "4 dimensions: (batch, heads, length, head_dim)",
            )
    for name, x in tensors:
        if x.dtype == FP8:
            raise ValueError(
                f"{function}: {name} has dtype {x.dtype}; expected 16 bits or more "
                "(prefill_varlen takes fp8 keys)"
            )
        if x.dtype != q.dtype:
            _refuse(function, f"{name} has dtype {x.dtype}", f"q's, {q.dtype}")
        if x.device != q.device:
            _refuse(function, f"{name} is on {x.device} but q is on {q.device}", "the same device")
    if k.shape[0] != q.shape[0]:
        _refuse(function, f"k has batch size {k.shape[0]}", f"q's, {q.shape[0]}")
    if k.shape[3] != q.shape[3]:
        _refuse(function, f"k has head_dim {k.shape[3]}", f"q's, {q.shape[3]}")
    if v.shape[:3] != k.shape[:3]:
        _refuse(
            function,
            f"v has shape {tuple(v.shape)}",
            f"k's, {tuple(k.shape)}, of which only head_dim may differ",
        )
    q_heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or q_heads % kv_heads:
        _refuse(function, f"q has {q_heads} heads and k has {kv_heads}", "a multiple of k's heads")
    for name, x in tensors:
        if x.stride(3) != 1 and x.numel():
            _refuse(
                function,
                f"{name} has last stride {x.stride(3)}",
                "1 (head_dim elements adjacent)",
            )


def _refuse(function: str, found: str, expected: str) -> None:
    raise RuntimeError(f"{function}: {found}; expected {expected}")


@remembered
def check_settings(
    config: PrismConfig, q_heads: int, head_dim: int, fp8_keys: bool, ragged: bool = False
) -> None:
    """Refuse settings that do not fit the heads, even for a call that makes no use of them.

    Raises:
        ValueError: naming the setting.
    """
    estimated = why_not_estimated(head_dim, config) is None
    name = config.estimator_of(head_dim, fp8_keys) if estimated else None
    if name == "grid" and fp8_keys:
        raise ValueError(
            "PrismConfig: estimator is 'grid'; expected 'bands' or 'auto' for float8 keys"
        )
    if ragged and name is not None and not estimators.get(name).ragged:
        raise ValueError(
            f"PrismConfig: estimator is {name!r}, which chooses blocks of (B, H, L, D) tensors "
            "only; expected 'auto', 'grid' or 'bands' for a ragged batch"
        )
    estimators.op_arguments(name, config, head_dim, q_heads)
    many = name in ("grid", "bands") and q_heads > MAX_RULE_HEADS
    if many and isinstance(config.top_p_of_heads(q_heads), tuple):
        raise ValueError(
            f"PrismConfig: top_p differs between {q_heads} query heads; expected one for all "
            f"of more than {MAX_RULE_HEADS}"
        )


def computed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v in the dtype that attention computes in: under autocast its own.

    As before torch's attention; float64 and integers are left alone, and float8 keys, which have
    scales.
    """
    # Torch knows no autocast of meta tensors, and raises.
    if q.is_meta or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    kept = (torch.float64, FP8)
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype not in kept else x for x in (q, k, v)
    )
