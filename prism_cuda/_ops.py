"""Loads the ops library and completes its registration from Python.

``_C.abi3.so`` holds the schemas, the argument checks and the CUDA kernels of ``torch.ops.prism``.
Its CPU kernels check their arguments and call the namespace ``prism_reference`` defined here, whose
implementation is :mod:`prism_cuda.reference`. Fake kernels and the refusal to differentiate live
here as well.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prism_cuda import reference
from prism_cuda._bits import WORD_BITS

LIBRARY = Path(__file__).with_name("_C.abi3.so")

_reference_library: torch.library.Library | None = None


def is_loaded() -> bool:
    """Whether torch.ops.prism is registered in this process."""
    return _reference_library is not None


def load() -> None:
    """Load the ops library and register its Python side; does nothing the second time.

    Raises:
        ImportError: if the library was not built, or this torch cannot load it.
    """
    global _reference_library
    if is_loaded():
        return
    if not LIBRARY.exists():
        raise ImportError(
            f"prism_cuda: the ops library {LIBRARY.name} is missing; build it with `make build` "
            "or `pip install .`"
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise ImportError(
            f"prism_cuda: torch {torch.__version__} cannot load {LIBRARY}; it needs torch >= 2.10"
        ) from error
    _reference_library = _register_reference()
    for name, fake in _FAKE_KERNELS.items():
        torch.library.register_fake(f"prism::{name}", fake)
        if not getattr(torch.ops.prism, name).default._schema.is_mutable:
            torch.library.register_autograd(f"prism::{name}", _refuse_backward(name))


def _register_reference() -> torch.library.Library:
    library = torch.library.Library("prism_reference", "DEF")
    names = (
        "block_pool",
        "pool_append_",
        "select_blocks",
        "estimate_blocks_varlen",
        "estimate_grid",
        "estimate_grid_varlen",
        "pool_cells_",
        "select_grid",
        "sparse_attention",
        "sparse_attention_varlen",
    )
    for name in names:
        schema = str(getattr(torch.ops.prism, name).default._schema)
        library.define(schema.removeprefix("prism::"))
        library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    return library


def _refuse_backward(name: str) -> Callable[..., None]:
    def backward(ctx: object, *grads: object) -> None:
        raise RuntimeError(
            f"prism::{name} is for inference only and has no backward; use dense attention "
            "(for example attn_implementation='sdpa') to train"
        )

    return backward


def _check_devices(op: str, **tensors: torch.Tensor | None) -> None:
    """Refuse tensors of several devices, one of which is meta: torch sends them here."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (first_name, first), *others = given.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise RuntimeError(
                f"prism::{op}: {name} is on {tensor.device} but {first_name} is on "
                f"{first.device}; expected the same device"
            )


def _check_block_sizes(op: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size not in (64, 128):
            raise RuntimeError(f"prism::{op}: {name} is {size}; allowed: 64, 128")


def call(op: Callable, *arguments: object) -> Any:
    """Call an op of torch.ops.prism, around its autograd kernel where nothing requires grad.

    That kernel only refuses the backward, but it is Python: it takes 20 us of the host's time where
    the rest of a call takes 25. Under torch.inference_mode() calls do not come by it anyway.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return op(*arguments)
    if torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in arguments
    ):
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _fake_block_pool(
    x: torch.Tensor, block_size: int, scale: torch.Tensor | None = None
) -> torch.Tensor:
    _check_devices("block_pool", x=x, scale=scale)
    _check_block_sizes("block_pool", block_size=block_size)
    batch, heads, length, head_dim = x.shape
    blocks = (length + block_size - 1) // block_size
    return x.new_empty((batch, heads, blocks, head_dim), dtype=torch.float32)


def _fake_pool_append_(
    x: torch.Tensor,
    means: torch.Tensor,
    sums: torch.Tensor,
    start: int,
    block_size: int,
    scale: torch.Tensor | None = None,
) -> None:
    _check_devices("pool_append_", x=x, means=means, sums=sums, scale=scale)
    _check_block_sizes("pool_append_", block_size=block_size)


def _fake_select_blocks(
    q_means: torch.Tensor,
    k_means: torch.Tensor,
    q_len: int,
    k_len: int,
    high_band: list[int],
    low_band: list[int],
    top_p: float,
    keep_sink: int = 1,
    keep_recent: int = 1,
    keep_above: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices("select_blocks", q_means=q_means, k_means=k_means)
    rows = q_means.shape[:3]
    words = (k_means.shape[2] + WORD_BITS - 1) // WORD_BITS
    return (
        q_means.new_empty((*rows, words), dtype=torch.int32),
        q_means.new_empty(rows, dtype=torch.int32),
    )


def _fake_estimate_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    high_band: list[int],
    low_band: list[int],
    top_p: float,
    keep_sink: int = 1,
    keep_recent: int = 1,
    keep_above: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
    k_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices("estimate_blocks", q=q, k=k, k_scale=k_scale)
    return _fake_estimate("estimate_blocks", q, k, q_block_size, k_block_size)


def _fake_estimate(
    op: str, q: torch.Tensor, k: torch.Tensor, q_block_size: int, k_block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits and counts of any op that estimates from q and k."""
    _check_devices(op, q=q, k=k)
    _check_block_sizes(op, q_block_size=q_block_size, k_block_size=k_block_size)
    batch, q_heads, q_len, _ = q.shape
    q_blocks = (q_len + q_block_size - 1) // q_block_size
    k_blocks = (k.shape[2] + k_block_size - 1) // k_block_size
    words = (k_blocks + WORD_BITS - 1) // WORD_BITS
    return (
        q.new_empty((batch, q_heads, q_blocks, words), dtype=torch.int32),
        q.new_empty((batch, q_heads, q_blocks), dtype=torch.int32),
    )


def _fake_estimate_blocks_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    high_band: list[int],
    low_band: list[int],
    top_p: float,
    keep_sink: int = 1,
    keep_recent: int = 1,
    keep_above: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
    k_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_estimate_varlen(
        "estimate_blocks_varlen", q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table,
        max_seqlen_q, max_seqlen_k, q_block_size, k_block_size, k_scale,
    )  # fmt: skip


def _fake_estimate_varlen(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    q_block_size: int,
    k_block_size: int,
    k_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices(
        op, q=q, k=k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k, block_table=block_table, k_scale=k_scale,
    )  # fmt: skip
    _check_block_sizes(op, q_block_size=q_block_size, k_block_size=k_block_size)
    q_blocks = (max_seqlen_q + q_block_size - 1) // q_block_size
    k_blocks = (max_seqlen_k + k_block_size - 1) // k_block_size
    rows = (cu_seqlens_q.shape[0] - 1, q.shape[1], q_blocks)
    words = (k_blocks + WORD_BITS - 1) // WORD_BITS
    return (
        q.new_empty((*rows, words), dtype=torch.int32),
        q.new_empty(rows, dtype=torch.int32),
    )


def _fake_estimate_grid(
    q: torch.Tensor,
    k: torch.Tensor,
    top_p: float,
    keep_sink: int = 1,
    keep_recent: int = 1,
    keep_above: float | None = None,
    scale: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_estimate("estimate_grid", q, k, q_block_size, k_block_size)


def _fake_estimate_grid_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    top_p: float,
    keep_sink: int = 1,
    keep_recent: int = 1,
    keep_above: float | None = None,
    scale: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_estimate_varlen(
        "estimate_grid_varlen", q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table,
        max_seqlen_q, max_seqlen_k, q_block_size, k_block_size,
    )  # fmt: skip


def _fake_pool_cells_(
    x: torch.Tensor, cells: torch.Tensor, factors: torch.Tensor, start: int
) -> None:
    _check_devices("pool_cells_", x=x, cells=cells, factors=factors)


def _fake_select_grid(
    q: torch.Tensor,
    k_cells: torch.Tensor,
    k_factors: torch.Tensor,
    k_len: int,
    top_p: float,
    keep_sink: int = 1,
    keep_recent: int = 1,
    keep_above: float | None = None,
    scale: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices("select_grid", q=q, k_cells=k_cells, k_factors=k_factors)
    _check_block_sizes("select_grid", q_block_size=q_block_size, k_block_size=k_block_size)
    q_blocks = (q.shape[2] + q_block_size - 1) // q_block_size
    words = ((k_len + k_block_size - 1) // k_block_size + WORD_BITS - 1) // WORD_BITS
    return (
        q.new_empty((*q.shape[:2], q_blocks, words), dtype=torch.int32),
        q.new_empty((*q.shape[:2], q_blocks), dtype=torch.int32),
    )


def _fake_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bits: torch.Tensor,
    counts: torch.Tensor,
    scale: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    window_left: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices(
        "sparse_attention", q=q, k=k, v=v, bits=bits, counts=counts, sinks=sinks, k_scale=k_scale,
        v_scale=v_scale,
    )  # fmt: skip
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_sparse_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bits: torch.Tensor,
    counts: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    window_left: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices(
        "sparse_attention_varlen", q=q, k=k, v=v, bits=bits, counts=counts,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
        block_table=block_table, sinks=sinks, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    total_q, q_heads, _ = q.shape
    return torch.empty_like(q), q.new_empty((q_heads, total_q), dtype=torch.float32)


def _fake_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    high_band: list[int],
    low_band: list[int],
    top_p: float,
    keep_sink: int = 1,
    keep_recent: int = 1,
    keep_above: float | None = None,
    scale: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_devices("prefill", q=q, k=k, v=v, k_scale=k_scale, v_scale=v_scale)
    _check_block_sizes("prefill", q_block_size=q_block_size, k_block_size=k_block_size)
    return (
        *_fake_sparse_attention(q, k, v, q, q),
        *_fake_estimate_blocks(
            q, k, high_band, low_band, top_p, q_block_size=q_block_size, k_block_size=k_block_size
        ),
    )


_FAKE_KERNELS: dict[str, Callable] = {
    "block_pool": _fake_block_pool,
    "pool_append_": _fake_pool_append_,
    "select_blocks": _fake_select_blocks,
    "estimate_blocks": _fake_estimate_blocks,
    "estimate_blocks_varlen": _fake_estimate_blocks_varlen,
    "estimate_grid": _fake_estimate_grid,
    "estimate_grid_varlen": _fake_estimate_grid_varlen,
    "pool_cells_": _fake_pool_cells_,
    "select_grid": _fake_select_grid,
    "sparse_attention": _fake_sparse_attention,
    "sparse_attention_varlen": _fake_sparse_attention_varlen,
    "prefill": _fake_prefill,
}

# torch.ops.prism must be there after `import prism_cuda`; the reference, the bands and the config
# also work where the library has not been built.
if LIBRARY.exists():
    load()
