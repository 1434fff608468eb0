"""How the ops behave under opcheck, fake tensors, compile, export and autograd."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import inputs, oracle
from helpers.build import attention_inputs
from helpers.cases import AttentionCase
from helpers.compare import assert_same
from helpers.ragged import RaggedCase, ragged_inputs
from torch._dynamo.testing import CompileCounterWithBackend

from prism_cuda import ops

HIGH, LOW = oracle.half_split_bands(64, 32, 48)
# Calls by the op's name and what is special of them; those of MUTATING write to their arguments.
CALLS = (
    "block_pool",
    "select_bands",
    "select_bands pooled",
    "select_bands paged",
    "select_grid",
    "select_grid pooled",
    "select_grid paged",
    "sparse_attention",
    "sparse_attention paged",
    "prefill bands",
    "prefill grid",
    "prefill all",
    "prefill paged",
)
MUTATING = {"append_means_": ["means", "sums"], "pool_cells_": ["cells", "factors"]}
DIFFERENTIABLE = ("block_pool", "sparse_attention", "sparse_attention paged", "prefill grid")


def qkv(device: str, length: int = 200, layout: str = "length_first") -> list[torch.Tensor]:
    return [
        inputs.tensor((1, heads, length, 64), torch.bfloat16, device, seed=i, layout=layout)
        for i, heads in enumerate((4, 2, 2))
    ]


def sample(name: str, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a small call, those without a default by position."""
    op_name, _, kind = name.partition(" ")
    q, k, v = qkv(device)
    if op_name == "block_pool":
        return (q, 64), {}
    if op_name == "append_means_":
        means, sums = (torch.zeros(1, 4, rows, 64, device=device) for rows in (6, 16))
        return (q, means, sums, 100, 64), {}
    cells = torch.ones(1, 2, 16, 128, dtype=torch.half, device=device)
    factors = torch.ones(1, 2, 16, device=device)
    if op_name == "pool_cells_":
        return (k, cells, factors, 48), {}
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "top_p": [0.9]}
    arguments |= {"q_block_size": 64, "k_block_size": 64}
    arguments |= {"estimator": "grid" if kind == "paged" else kind}
    by_bands = op_name == "select_bands" or kind == "bands"
    bands = (HIGH, LOW) if by_bands else ([], [])
    arguments |= dict(zip(("high_band", "low_band"), bands, strict=True))
    if op_name == "sparse_attention":
        attention = attention_inputs(
            AttentionCase("sample", 200, 300, q_heads=4, layout="packed_qkv"),
            torch.bfloat16,
            device,
        )
        tensors = zip(("q", "k", "v", "bits", "counts"), attention.op_arguments(), strict=True)
        arguments |= dict(tensors) | attention.settings
    if kind == "pooled":
        means = torch.ones(1, 2, 5, 64, device=device)
        pooled = {"k_means": means} if by_bands else {"k_cells": cells, "k_factors": factors}
        arguments |= {"k": None, "k_len": 200} | pooled
    if kind == "paged":
        arguments |= ragged_inputs(
            RaggedCase("sample", lengths=((70, 200), (0, 3), (130, 130)), page_size=16, sinks=True),
            torch.bfloat16,
            device,
        ).op_arguments()
    schema = [argument for argument in op(name)._schema.arguments if argument.name in arguments]
    positional = [a.name for a in schema if not a.has_default_value()]
    keywords = [a.name for a in schema if a.has_default_value()]
    return tuple(arguments[a] for a in positional), {a: arguments[a] for a in keywords}


def op(name: str) -> Any:
    return getattr(torch.ops.prism, name.split()[0]).default


def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@pytest.mark.parametrize("name", (*CALLS, *MUTATING))
def test_opcheck(name: str, device: str) -> None:
    arguments, options = sample(name, device)
    torch.library.opcheck(op(name), arguments, options)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck_of_inputs_that_require_grad(name: str, device: str) -> None:
    arguments, options = sample(name, device)
    arguments = tuple(
        a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op(name), arguments, options, test_utils=checks)


@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors_give_shape_dtype_and_strides(name: str, device: str) -> None:
    arguments, options = sample(name, device)

    def on_meta(a: Any) -> Any:
        return a.to("meta") if isinstance(a, torch.Tensor) else a

    metas = [on_meta(a) for a in arguments]
    meta_options = {key: on_meta(a) for key, a in options.items()}
    for meta, a in zip(metas, arguments, strict=True):
        assert not isinstance(a, torch.Tensor) or meta.stride() == torch.empty_like(a).stride()
    for fake, real in zip(
        as_tuple(op(name)(*metas, **meta_options)), as_tuple(op(name)(*arguments, **options)),
        strict=True,
    ):  # fmt: skip
        assert fake.device.type == "meta"
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
        assert fake.stride() == real.stride()


@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors_of_zero_length(name: str) -> None:
    q, k = torch.empty(2, 4, 0, 64, device="meta"), torch.empty(2, 2, 0, 64, device="meta")
    bits = torch.empty(2, 4, 0, 0, device="meta", dtype=torch.int32)
    ends = bits.new_empty(3)
    packed = [x[0].transpose(0, 1) for x in (q, k, k)]
    where = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 0, "max_seqlen_k": 0}
    prism = torch.ops.prism
    if name == "sparse_attention paged":
        made = prism.sparse_attention(*packed, bits, bits[..., 0:0], **where)
        assert [x.shape for x in made] == [(0, 4, 64), (4, 0)]
        return
    cells = {"k_cells": k.new_empty(2, 2, 0, 128), "k_factors": k.new_empty(2, 2, 0), "k_len": 0}
    calls: dict[str, Callable[[], Any]] = {
        "block_pool": lambda: prism.block_pool(q, 64),
        "select_bands": lambda: prism.select_bands(q, k, HIGH, LOW, [0.9]),
        "select_bands pooled": lambda: prism.select_bands(
            q, None, HIGH, LOW, [0.9], k_means=k, k_len=0
        ),
        "select_bands paged": lambda: prism.select_bands(*packed[:2], HIGH, LOW, [0.9], **where),
        "select_grid": lambda: prism.select_grid(q, k, [0.9]),
        "select_grid pooled": lambda: prism.select_grid(q, None, [0.9], **cells),
        "select_grid paged": lambda: prism.select_grid(*packed[:2], [0.9], **where),
        "sparse_attention": lambda: prism.sparse_attention(q, k, k, bits, bits[..., 0:0]),
        "prefill bands": lambda: prism.prefill(q, k, k, "bands", HIGH, LOW, [0.9]),
        "prefill grid": lambda: prism.prefill(q, k, k, "grid", [], [], [0.9]),
        "prefill all": lambda: prism.prefill(q, k, k, "all", [], [], [0.9]),
        "prefill paged": lambda: prism.prefill(*packed, "grid", [], [], [0.9], **where)[2:],
    }
    for result in as_tuple(calls[name]()):
        assert result.shape[:3] == (2, 4, 0)


def _prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.ops.prism.prefill(
        q, k, v, "grid", [], [], [0.9], q_block_size=64, k_block_size=64, window_left=k.shape[2]
    )


def _chain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q = q * 1.5
    sizes = {"q_block_size": 64, "k_block_size": 64}
    bits, counts = torch.ops.prism.select_bands(
        q, None, HIGH, LOW, [0.9], k_means=torch.ops.prism.block_pool(k, 64), k_len=k.shape[2],
        **sizes,
    )  # fmt: skip
    out, lse = torch.ops.prism.sparse_attention(q, k, v, bits, counts, **sizes)
    return out, lse, bits, counts


def _packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Two sequences of about half the tokens each."""
    length = q.shape[2]
    half = (length + 1) // 2
    ends = (torch.arange(3, dtype=torch.int32, device=q.device) * half).clamp_max(length)
    return torch.ops.prism.prefill(
        *(x[0].transpose(0, 1) for x in (q, k, v)), "grid", [], [], [0.9], q_block_size=64,
        k_block_size=64, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=length,
        max_seqlen_k=length, dense_below=half // 2,
    )  # fmt: skip


@pytest.mark.parametrize("function", [_prefill, _chain, _packed])
def test_compiled_once_for_all_lengths_equals_eager(
    function: Callable[..., Any], device: str
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):  # whose error names the guard
        for length in (200, 333, 128, 70):
            tensors = qkv(device, length)
            assert_same(compiled(*tensors), function(*tensors))
    assert counter.frame_count == 1


def test_inductor_equals_eager(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_prefill, fullgraph=True)
    tensors = qkv(device)
    assert_same(compiled(*tensors), _prefill(*tensors))


def test_exported_program_equals_eager_at_another_length(device: str) -> None:
    class Attention(torch.nn.Module):
        def forward(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            return _chain(q, k, v)

    program = torch.export.export(
        Attention(), tuple(qkv(device, 200)), dynamic_shapes=[{2: torch.export.Dim.AUTO}] * 3
    )
    tensors = qkv(device, 333)
    assert_same(program.module()(*tensors), _chain(*tensors))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    chained = ("block_pool", "select_bands", "sparse_attention")
    assert {f"prism.{name}.default" for name in chained} <= called


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_backward_says_that_there_is_none(name: str, device: str) -> None:
    arguments, options = sample(name, device)
    first = arguments[0].detach().clone().requires_grad_()
    out = as_tuple(op(name)(first, *arguments[1:], **options))[0]
    assert out.requires_grad
    with pytest.raises(RuntimeError, match=f"{name.split()[0]} is for inference only"):
        out.sum().backward()


@pytest.mark.parametrize("around", [False, True], ids=["op", "call"])
@pytest.mark.parametrize("name", ["block_pool", "select_grid", "select_bands", "prefill grid"])
def test_every_other_derivative_is_refused_at_once(name: str, around: bool, device: str) -> None:
    arguments, options = sample(name, device)

    def first(x: torch.Tensor) -> torch.Tensor:
        values = (x, *arguments[1:])
        made = ops.call(op(name), *values, **options) if around else op(name)(*values, **options)
        return as_tuple(made)[0].float().sum()

    x = arguments[0].detach()
    refusal = f"prism::{name.split()[0]} is for inference only"
    derivatives: tuple[Callable[[], Any], ...] = (
        lambda: torch.func.jvp(first, (x,), (x,)),
        lambda: torch.func.grad(first)(x),
        lambda: torch.func.vjp(first, x),
    )
    for derive in derivatives:
        with pytest.raises(RuntimeError, match=refusal):
            derive()
    with torch.autograd.forward_ad.dual_level():
        first(x)  # has no tangent
        with pytest.raises(RuntimeError, match=refusal):
            first(torch.autograd.forward_ad.make_dual(x, x))
    # What does not depend on the variable is a constant.
    slope = torch.func.grad(lambda y: y * first(x))(torch.ones((), device=device))
    assert torch.equal(slope, first(x))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
def test_failures_of_the_reference_come_out_as_they_are(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error("within the reference")

    for name in ("prefill grid", "select_bands", "block_pool"):
        arguments, options = sample(name, "cpu")
        for run in (op(name), functools.partial(ops.call, op(name))):
            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.functional, "pad", fail)
                with pytest.raises(error, match="within the reference") as caught:
                    run(*arguments, **options)
            assert any("reference" in str(entry.path) for entry in caught.traceback)


@pytest.mark.parametrize(
    "name", ["select_bands", "select_grid", "sparse_attention", "prefill grid"]
)
def test_fake_tensors_refuse_block_sizes_as_the_op_does(name: str) -> None:
    arguments, options = sample(name, "cpu")
    options |= {"q_block_size": 64, "k_block_size": 128}
    metas = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    for given in (arguments, metas):
        with pytest.raises(RuntimeError, match=r"\(q_block_size, k_block_size\) is \(64, 128\)"):
            op(name)(*given, **options)


def test_masks_do_not_require_grad(device: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(device))
    *_, bits, counts = _prefill(q, k, v)
    assert not bits.requires_grad
    assert not counts.requires_grad


def test_inference_mode_equals_grad_mode(device: str) -> None:
    tensors = qkv(device)
    with torch.inference_mode():
        quiet = _prefill(*tensors)
    assert_same(quiet, _prefill(*tensors))


@pytest.mark.parametrize("name", CALLS)
def test_no_op_claims_to_mutate_or_alias(name: str) -> None:
    schema = op(name)._schema
    assert not schema.is_mutable
    assert all(value.alias_info is None for value in (*schema.arguments, *schema.returns))


@pytest.mark.parametrize("name", MUTATING)
def test_an_op_in_place_says_what_it_writes(name: str) -> None:
    schema = op(name)._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == MUTATING[name]
    assert not schema.returns


def test_compiled_append_equals_eager(device: str) -> None:
    def append(x: torch.Tensor, means: torch.Tensor, sums: torch.Tensor, start: int) -> None:
        torch.ops.prism.append_means_(x, means, sums, start, 64)

    torch._dynamo.reset()
    compiled = torch.compile(append, fullgraph=True, backend="aot_eager", dynamic=True)
    states = [[torch.zeros(1, 4, rows, 64, device=device) for rows in (8, 16)] for _ in range(2)]
    for start, length in ((0, 100), (100, 30), (130, 170)):
        x = qkv(device, length)[0]
        for run, (means, sums) in zip((append, compiled), states, strict=True):
            run(x, means, sums, start)
    assert_same(tuple(states[1]), tuple(states[0]))


def test_attention_kernel_names_a_kernel_or_the_reason() -> None:
    def named(sm: int, dtype: torch.dtype, *shape: int) -> str:
        return torch.ops.prism.attention_kernel(sm, dtype, *shape)

    for sm in (80, 86, 89, 90, 100, 120):
        for blocks in ((128, 128), (64, 64), (128, 64)):
            assert named(sm, torch.bfloat16, 128, *blocks).startswith("sm")
            assert named(sm, torch.float16, 64, *blocks).startswith("sm")
    for wrong in (
        (75, torch.bfloat16, 128, 128, 128),
        (80, torch.float32, 128, 128, 128),
        (80, torch.bfloat16, 100, 128, 128),
        (80, torch.bfloat16, 128, 64, 128),
    ):
        assert named(*wrong).startswith("unsupported: ")


def test_build_config_names_version_and_targets() -> None:
    config = json.loads(torch.ops.prism.build_config())
    assert {"version", "cuda", "archs", "git", "torch_target", "cutlass"} <= config.keys()
    assert isinstance(config["archs"], list)
    assert (config["cuda"] is None) == (config["archs"] == [])
