"""Loads the ops library and completes its registration from Python.

``_C.abi3.so`` holds the schemas, the argument checks and the CUDA kernels of ``torch.ops.prism``.
Its CPU kernels check their arguments and call the namespace ``prism_reference`` defined here, whose
implementation is :mod:`prism_cuda.reference`. Fake kernels and the refusal to differentiate live
here as well.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
        torch.library.register_autograd(f"prism::{name}", _refuse_backward(name))


def _register_reference() -> torch.library.Library:
    library = torch.library.Library("prism_reference", "DEF")
    for name in ("block_pool", "select_blocks", "sparse_attention"):
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


def _check_devices(op: str, **tensors: torch.Tensor) -> None:
    """Refuse tensors of several devices, one of which is meta: torch sends them here."""
    (first_name, first), *others = tensors.items()
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


def _fake_block_pool(x: torch.Tensor, block_size: int) -> torch.Tensor:
    _check_block_sizes("block_pool", block_size=block_size)
    batch, heads, length, head_dim = x.shape
    blocks = (length + block_size - 1) // block_size
    return x.new_empty((batch, heads, blocks, head_dim), dtype=torch.float32)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices("estimate_blocks", q=q, k=k)
    _check_block_sizes("estimate_blocks", q_block_size=q_block_size, k_block_size=k_block_size)
    batch, q_heads, q_len, _ = q.shape
    q_blocks = (q_len + q_block_size - 1) // q_block_size
    k_blocks = (k.shape[2] + k_block_size - 1) // k_block_size
    words = (k_blocks + WORD_BITS - 1) // WORD_BITS
    return (
        q.new_empty((batch, q_heads, q_blocks, words), dtype=torch.int32),
        q.new_empty((batch, q_heads, q_blocks), dtype=torch.int32),
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
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices("sparse_attention", q=q, k=k, v=v, bits=bits, counts=counts)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_devices("prefill", q=q, k=k, v=v)
    _check_block_sizes("prefill", q_block_size=q_block_size, k_block_size=k_block_size)
    return (
        *_fake_sparse_attention(q, k, v, q, q),
        *_fake_estimate_blocks(
            q, k, high_band, low_band, top_p, q_block_size=q_block_size, k_block_size=k_block_size
        ),
    )


_FAKE_KERNELS: dict[str, Callable] = {
    "block_pool": _fake_block_pool,
    "select_blocks": _fake_select_blocks,
    "estimate_blocks": _fake_estimate_blocks,
    "sparse_attention": _fake_sparse_attention,
    "prefill": _fake_prefill,
}

# torch.ops.prism must be there after `import prism_cuda`; the reference, the bands and the config
# also work where the library has not been built.
if LIBRARY.exists():
    load()
