"""How the ops behave under opcheck, fake tensors, compile, export and autograd."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import inputs, oracle
from helpers.build import attention_inputs, select_inputs
from helpers.cases import AttentionCase, SelectCase
from helpers.ragged import RaggedCase, ragged_inputs
from torch._dynamo.testing import CompileCounterWithBackend

import prism_cuda  # noqa: F401  registers the ops

HIGH, LOW = oracle.half_split_bands(64, 32, 48)
OPS = (
    "block_pool",
    "select_blocks",
    "estimate_blocks",
    "estimate_blocks_varlen",
    "estimate_grid",
    "estimate_grid_varlen",
    "select_grid",
    "sparse_attention",
    "sparse_attention_varlen",
    "prefill",
)
MUTATING = {"pool_append_": ["means", "sums"], "pool_cells_": ["cells", "factors"]}
DIFFERENTIABLE = ("block_pool", "sparse_attention", "sparse_attention_varlen", "prefill")


def qkv(device: str, length: int = 200, layout: str = "length_first") -> list[torch.Tensor]:
    return [
        inputs.tensor((1, heads, length, 64), torch.bfloat16, device, seed=i, layout=layout)
        for i, heads in enumerate((4, 2, 2))
    ]


def sample(name: str, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a small call of the op."""
    if name == "block_pool":
        return (qkv(device)[0], 64), {}
    if name == "pool_append_":
        means, sums = (torch.zeros(1, 4, rows, 64, device=device) for rows in (6, 16))
        return (qkv(device)[0], means, sums, 100, 64), {}
    if name == "select_blocks":
        case = select_inputs(SelectCase("sample", 200, 300, q_heads=4), device)
        return case.op_arguments(), case.settings
    if name == "sparse_attention":
        attention = attention_inputs(
            AttentionCase("sample", 200, 300, q_heads=4, layout="packed_qkv"),
            torch.bfloat16,
            device,
        )
        return attention.op_arguments(), attention.settings
    if name in ("pool_cells_", "select_grid"):
        cells = torch.ones(1, 2, 16, 128, dtype=torch.half, device=device)
        factors = torch.ones(1, 2, 16, device=device)
        if name == "pool_cells_":
            return (qkv(device)[1], cells, factors, 48), {}
        return (qkv(device)[0], cells, factors, 200, 0.9), {}
    if name == "estimate_grid":
        return (*qkv(device)[:2], 0.9), {"q_block_size": 64, "k_block_size": 64}
    if name in ("sparse_attention_varlen", "estimate_blocks_varlen", "estimate_grid_varlen"):
        ragged = ragged_inputs(
            RaggedCase("sample", lengths=((70, 200), (0, 3), (130, 130)), page_size=16, sinks=True),
            torch.bfloat16,
            device,
        ).op_arguments()
        if name == "estimate_blocks_varlen":
            ragged |= {"high_band": HIGH, "low_band": LOW, "top_p": 0.9}
        if name == "estimate_grid_varlen":
            ragged["top_p"] = 0.9
        schema = [a.name for a in op(name)._schema.arguments if a.name in ragged]
        first = 9 if name == "estimate_grid_varlen" else 11  # those without a default
        return tuple(ragged[a] for a in schema[:first]), {a: ragged[a] for a in schema[first:]}
    tensors = qkv(device)[:2] if name == "estimate_blocks" else qkv(device)
    return (*tensors, HIGH, LOW, 0.9), {"q_block_size": 64, "k_block_size": 64}


def op(name: str) -> Any:
    return getattr(torch.ops.prism, name).default


def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def assert_same(got: Any, want: Any) -> None:
    for a, b in zip(as_tuple(got), as_tuple(want), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", (*OPS, *MUTATING))
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


@pytest.mark.parametrize("name", OPS)
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


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors_of_zero_length(name: str) -> None:
    q, k = torch.empty(2, 4, 0, 64, device="meta"), torch.empty(2, 2, 0, 64, device="meta")
    bits = torch.empty(2, 4, 0, 0, device="meta", dtype=torch.int32)
    ends = bits.new_empty(3)
    if name == "sparse_attention_varlen":
        packed = torch.ops.prism.sparse_attention_varlen(
            q[0].transpose(0, 1), k[0].transpose(0, 1), k[0].transpose(0, 1), bits, bits[..., 0:0],
            ends, ends, None, None, 0, 0,
        )  # fmt: skip
        assert [x.shape for x in packed] == [(0, 4, 64), (4, 0)]
        return
    calls: dict[str, Callable[[], Any]] = {
        "block_pool": lambda: torch.ops.prism.block_pool(q, 64),
        "select_blocks": lambda: torch.ops.prism.select_blocks(q, k, 0, 0, HIGH, LOW, 0.9),
        "estimate_blocks": lambda: torch.ops.prism.estimate_blocks(q, k, HIGH, LOW, 0.9),
        "estimate_blocks_varlen": lambda: torch.ops.prism.estimate_blocks_varlen(
            q[0].transpose(0, 1), k[0].transpose(0, 1), ends, ends, None, None, 0, 0, HIGH, LOW, 0.9
        ),
        "estimate_grid": lambda: torch.ops.prism.estimate_grid(q, k, 0.9),
        "estimate_grid_varlen": lambda: torch.ops.prism.estimate_grid_varlen(
            q[0].transpose(0, 1), k[0].transpose(0, 1), ends, ends, None, None, 0, 0, 0.9
        ),
        "select_grid": lambda: torch.ops.prism.select_grid(
            q, k.new_empty(2, 2, 0, 128, dtype=torch.half), k.new_empty(2, 2, 0), 0, 0.9
        ),
        "sparse_attention": lambda: torch.ops.prism.sparse_attention(q, k, k, bits, bits[..., 0:0]),
        "prefill": lambda: torch.ops.prism.prefill(q, k, k, HIGH, LOW, 0.9),
    }
    for result in as_tuple(calls[name]()):
        assert result.shape[:3] == (2, 4, 0)


def _prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.ops.prism.prefill(q, k, v, HIGH, LOW, 0.9, q_block_size=64, k_block_size=64)


def _chain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q = q * 1.5
    bits, counts = torch.ops.prism.select_blocks(
        torch.ops.prism.block_pool(q, 64), torch.ops.prism.block_pool(k, 64),
        q.shape[2], k.shape[2], HIGH, LOW, 0.9, q_block_size=64, k_block_size=64,
    )  # fmt: skip
    out, lse = torch.ops.prism.sparse_attention(
        q, k, v, bits, counts, q_block_size=64, k_block_size=64
    )
    return out, lse, bits, counts


@pytest.mark.parametrize("function", [_prefill, _chain], ids=["prefill", "chain"])
def test_compiled_once_for_all_lengths_equals_eager(
    function: Callable[..., Any], device: str
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
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
    chained = ("block_pool", "select_blocks", "sparse_attention")
    assert {f"prism.{name}.default" for name in chained} <= called


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_backward_says_that_there_is_none(name: str, device: str) -> None:
    arguments, options = sample(name, device)
    first = arguments[0].detach().clone().requires_grad_()
    out = as_tuple(op(name)(first, *arguments[1:], **options))[0]
    assert out.requires_grad
    with pytest.raises((RuntimeError, NotImplementedError), match=f"(?i){name}.*(backward|infer)"):
        out.sum().backward()


def test_masks_do_not_require_grad(device: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(device))
    *_, bits, counts = torch.ops.prism.prefill(
        q, k, v, HIGH, LOW, 0.9, q_block_size=64, k_block_size=64
    )
    assert not bits.requires_grad
    assert not counts.requires_grad


def test_inference_mode_equals_grad_mode(device: str) -> None:
    tensors = qkv(device)
    with torch.inference_mode():
        quiet = _prefill(*tensors)
    assert_same(quiet, _prefill(*tensors))


@pytest.mark.parametrize("name", OPS)
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
        torch.ops.prism.pool_append_(x, means, sums, start, 64)

    torch._dynamo.reset()
    compiled = torch.compile(append, fullgraph=True, backend="aot_eager", dynamic=True)
    states = [[torch.zeros(1, 4, rows, 64, device=device) for rows in (8, 16)] for _ in range(2)]
    for start, length in ((0, 100), (100, 30), (130, 170)):
        x = qkv(device, length)[0]
        append(x, *states[0], start)
        compiled(x, *states[1], start)
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
