"""Loads the ops library and completes its registration from Python.

``_C.abi3.so`` holds the schemas, the argument checks and the CUDA kernels of ``torch.ops.prism``.
Registered here are the CPU kernels, which are the checks (``torch.ops.prism_check``) followed by
:mod:`prism_cuda.reference` or, of long inputs, :mod:`prism_cuda.cpu`, the fake kernels, and the
refusal to differentiate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd import forward_ad

from prism_cuda import cpu, reference
from prism_cuda.bits import WORD_BITS

LIBRARY = Path(__file__).with_name("_C.abi3.so")
NAMES = (
    "block_pool",
    "append_means_",
    "pool_cells_",
    "select_bands",
    "select_grid",
    "sparse_attention",
    "prefill",
)

_library: torch.library.Library | None = None


def is_loaded() -> bool:
    """Whether torch.ops.prism is registered in this process."""
    return _library is not None


def load() -> None:
    """Load the ops library and register its Python side; does nothing the second time.

    Raises:
        ImportError: if the library was not built, or this torch cannot load it.
    """
    global _library
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
    _library = torch.library.Library("prism", "IMPL")
    for name in NAMES:
        op = getattr(torch.ops.prism, name).default
        _library.impl(name, _cpu_kernel(name), "CPU")
        torch.library.register_fake(f"prism::{name}", _fake_kernel(op))
        if not op._schema.is_mutable:
            _library.impl(name, _autograd_kernel(op), "Autograd", with_keyset=True)


def call(op: Callable, *args: object, **kwargs: object) -> Any:
    """Call an op of torch.ops.prism, around its autograd kernel where nothing is differentiated.

    That kernel only refuses to, but it is Python: it takes 20 us of the host's time where the rest
    of a call takes 25. Under torch.inference_mode() calls do not come by it anyway.
    """
    # A keyword costs torch half a microsecond, and None is every keyword's default.
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or _is_differentiated((*args, *kwargs.values()))
    ):
        return op(*args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args, **kwargs)


_FASTER: dict[str, Callable[..., Any]] = {
    "sparse_attention": cpu.sparse_attention,
    "prefill": functools.partial(reference.prefill, attend=cpu.sparse_attention),
}


def _cpu_kernel(name: str) -> Callable[..., Any]:
    """In Python, so that what the reference raises, Ctrl-C included, comes out as it is."""
    check = getattr(torch.ops.prism_check, name).default
    compute = _FASTER.get(name) or getattr(reference, name)

    def kernel(*args: object, **kwargs: object) -> Any:
        check(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):  # which the reference's own products would join
            return compute(*args, **kwargs)

    return kernel


# Differentiation


def _has_tangent(x: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def _is_differentiated(values: tuple[object, ...]) -> bool:
    """Whether a call with these arguments is recorded for a backward, or has tangents."""
    backward, forward = torch.is_grad_enabled(), forward_ad._current_level >= 0
    if not backward and not forward:
        return False
    for x in values:
        if x is not None and isinstance(x, torch.Tensor):
            if backward and x.requires_grad:
                return True
            if forward and _has_tangent(x):
                return True
    return False


def _autograd_kernel(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """Lets a forward pass, and refuses its backward; refuses tangents and torch.func's gradients.

    Those are refused at once: nobody asks for them who does not want a derivative.
    """
    refusal = (
        f"{op._schema.name} is for inference only and has no backward or forward derivative; use "
        "dense attention (for example attn_implementation='sdpa') to train"
    )

    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Callable[[], Any], *tensors: torch.Tensor) -> Any:
            return run()

        @staticmethod
        def backward(ctx: Any, *grads: object) -> None:
            raise RuntimeError(refusal)

    def kernel(keyset: torch._C.DispatchKeySet, *args: object, **kwargs: object) -> Any:
        def run() -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                below = keyset & torch._C._after_autograd_keyset
                return op.redispatch(below, *args, **kwargs)

        values = (*args, *kwargs.values())
        if not _is_differentiated(values):
            return run()
        tensors = [x for x in values if isinstance(x, torch.Tensor)]
        tangents = forward_ad._current_level >= 0 and any(map(_has_tangent, tensors))
        if tangents or torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(refusal)
        return NoBackward.apply(run, *tensors)

    return kernel


# Fake kernels: shapes of results, and the refusals that depend on no more than that.


def _check_devices(op: str, arguments: dict[str, object]) -> None:
    """Refuse tensors of several devices, one of which is meta: torch sends them here."""
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise RuntimeError(
                f"{op}: {name} is on {tensor.device} but {first_name} is on {first.device}; "
                "expected the same device"
            )


def _check_block_sizes(op: str, arguments: dict[str, Any]) -> None:
    if "block_size" in arguments and arguments["block_size"] not in (64, 128):
        raise RuntimeError(f"{op}: block_size is {arguments['block_size']}; allowed: 64, 128")
    if "q_block_size" not in arguments:
        return
    pair = (arguments["q_block_size"], arguments["k_block_size"])
    if pair not in ((128, 128), (128, 64), (64, 64)):
        raise RuntimeError(
            f"{op}: (q_block_size, k_block_size) is {pair}; allowed: (128, 128), (128, 64), "
            "(64, 64)"
        )


def _fake_kernel(op: torch._ops.OpOverload) -> Callable[..., Any]:
    name = op._schema.name
    names = [argument.name for argument in op._schema.arguments]
    defaults = {argument.name: argument.default_value for argument in op._schema.arguments}
    results = [result.name for result in op._schema.returns]

    def kernel(*args: object, **kwargs: object) -> Any:
        arguments = defaults | dict(zip(names, args, strict=False)) | kwargs
        _check_devices(name, arguments)
        _check_block_sizes(name, arguments)
        given = SimpleNamespace(**arguments)
        if name == "prism::block_pool":
            return _fake_means(given)
        made = (_fake_attention(given) if "out" in results else ()) + (
            _fake_mask(given) if "bits" in results else ()
        )
        return made or None

    return kernel


def _blocks(length: int, block_size: int) -> int:
    return (length + block_size - 1) // block_size


def _fake_means(given: SimpleNamespace) -> torch.Tensor:
    batch, heads, length, head_dim = given.x.shape
    shape = (batch, heads, _blocks(length, given.block_size), head_dim)
    return given.x.new_empty(shape, dtype=torch.float32)


def _fake_attention(given: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    q = given.q
    rows = q.shape[:3] if given.cu_seqlens_q is None else (q.shape[1], q.shape[0])
    return torch.empty_like(q), q.new_empty(rows, dtype=torch.float32)


def _fake_mask(given: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    q, k = given.q, given.k
    if given.cu_seqlens_q is None:
        batch, q_len, k_len = q.shape[0], q.shape[2], given.k_len if k is None else k.shape[2]
    else:
        batch, q_len, k_len = (
            given.cu_seqlens_q.shape[0] - 1,
            given.max_seqlen_q,
            given.max_seqlen_k,
        )
    rows = (batch, q.shape[1], _blocks(q_len, given.q_block_size))
    words = _blocks(_blocks(k_len, given.k_block_size), WORD_BITS)
    return q.new_empty((*rows, words), dtype=torch.int32), q.new_empty(rows, dtype=torch.int32)


# torch.ops.prism must be there after `import prism_cuda`; the reference, the bands and the config
# also work where the library has not been built.
if LIBRARY.exists():
    load()
