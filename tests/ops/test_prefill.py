"""prism::prefill: the chain of the three ops in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import inputs, oracle
from helpers.build import select_bands, select_settings, structured_batch
from helpers.cases import SELECT_GROUPS, SelectCase
from helpers.compare import check_attention, check_selection
from helpers.params import case_params
from helpers.poison import poisoned_allocations

import prism_cuda  # noqa: F401  registers the ops

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

SANITIZER_CASES = (
    "regular-b64_d64",
    "ragged-one_short",
    "prefix-offset_100_b128_64",
    "tiny-two_tokens",
)
GROUPS = {name: SELECT_GROUPS[name] for name in SELECT_GROUPS if name != "settings"}


def qkv(case: SelectCase, device: str, layout: str = "contiguous") -> tuple[torch.Tensor, ...]:
    q, k = structured_batch(case, device)
    v = inputs.tensor(tuple(k.shape), torch.float32, device, seed=11)  # type: ignore[arg-type]
    return tuple(inputs.lay_out(x.bfloat16(), layout, device) for x in (q, k, v))


def run(tensors: tuple[torch.Tensor, ...], case: SelectCase, **changes: Any) -> Outputs:
    settings = select_settings(case) | changes
    with poisoned_allocations():
        return torch.ops.prism.prefill(*tensors, *select_bands(case), case.top_p, **settings)


def chain(tensors: tuple[torch.Tensor, ...], case: SelectCase) -> Outputs:
    q, k, v = tensors
    settings = select_settings(case)
    bits, counts = torch.ops.prism.select_blocks(
        torch.ops.prism.block_pool(q, case.blocks[0]),
        torch.ops.prism.block_pool(k, case.blocks[1]),
        case.q_len, case.k_len, *select_bands(case), case.top_p, **settings,
    )  # fmt: skip
    out, lse = torch.ops.prism.sparse_attention(
        q, k, v, bits, counts, None, case.causal, *case.blocks
    )
    return out, lse, bits, counts


@pytest.mark.parametrize("case", case_params(GROUPS, SANITIZER_CASES))
def test_equals_the_chain_of_ops(case: SelectCase, device: str) -> None:
    tensors = qkv(case, device)
    for got, want in zip(run(tensors, case), chain(tensors, case), strict=True):
        assert got.stride() == want.stride()
        assert torch.equal(got, want)


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_matches_float64_in_every_layout(device: str, layout: str) -> None:
    case = SelectCase("layout", 900, 1000, batch=2, q_heads=4)
    q, k, v = qkv(case, device, layout)
    out, lse, bits, counts = run((q, k, v), case)
    assert out.stride() == torch.empty_like(q).stride()
    assert out.dtype == q.dtype
    assert lse.is_contiguous()

    keep = oracle.unpack_bits(bits, oracle.ceil_div(case.k_len, case.blocks[1]))
    assert torch.equal(keep.sum(-1).int(), counts)
    settings = select_settings(case)
    check_selection(
        keep,
        oracle.select(
            oracle.block_means(q, case.blocks[0]), oracle.block_means(k, case.blocks[1]),
            case.q_len, case.k_len, *select_bands(case), case.top_p, **settings,
        ),
    )  # fmt: skip
    options = {name: settings[name] for name in ("causal", "q_block_size", "k_block_size")}
    check_attention(
        out,
        lse,
        oracle.attention(q, k, v, keep, **options),
        oracle.low_precision_attention(q, k, v, keep, **options),
    )


@pytest.mark.parametrize("causal", [True, False])
def test_p_1_equals_dense_attention(device: str, causal: bool) -> None:
    case = SelectCase("dense", 300, 401, q_heads=4, top_p=1.0, causal=causal)
    q, k, v = qkv(case, device)
    out, lse, _, _ = run((q, k, v), case)
    everything = torch.ones(1, 4, 5, 7, dtype=torch.bool, device=device)
    options = {"q_block_size": 64, "k_block_size": 64, "causal": causal}
    check_attention(
        out,
        lse,
        oracle.attention(q, k, v, everything, **options),
        oracle.low_precision_attention(q, k, v, everything, **options),
    )


def test_scale_reaches_the_attention_but_not_the_selection(device: str) -> None:
    case = SelectCase("scale", 700, 700)
    tensors = qkv(case, device)
    out, _, bits, _ = run(tensors, case)
    scaled_out, _, scaled_bits, _ = run(tensors, case, scale=0.5)
    assert torch.equal(bits, scaled_bits)
    assert not torch.equal(out, scaled_out)


def test_defaults_are_those_of_the_interface(device: str) -> None:
    case = SelectCase("defaults", 700, 700, head_dim=128, blocks=(128, 128), high=64, low=96)
    tensors = qkv(case, device)
    bare = torch.ops.prism.prefill(*tensors, *select_bands(case), case.top_p)
    for got, want in zip(bare, run(tensors, case, scale=128**-0.5), strict=True):
        assert torch.equal(got, want)


def test_repeats_are_bit_identical(device: str) -> None:
    case = SelectCase("repeat", 1200, 1300, q_heads=4)
    tensors = qkv(case, device)
    first = run(tensors, case)
    for _ in range(3):
        for got, want in zip(run(tensors, case), first, strict=True):
            assert torch.equal(got, want)


def test_inputs_are_left_unchanged(device: str) -> None:
    case = SelectCase("inputs", 500, 600)
    tensors = qkv(case, device)
    before = [x.clone() for x in tensors]
    run(tensors, case)
    assert all(torch.equal(x, was) for x, was in zip(tensors, before, strict=True))


def test_graph_replay_equals_eager_on_new_inputs(cuda: str) -> None:
    case = SelectCase("graph", 1500, 1600, q_heads=4, head_dim=128, blocks=(128, 128))
    static = qkv(case, cuda)
    arguments = (*static, *select_bands(case), case.top_p)
    options = select_settings(case)
    torch.ops.prism.prefill(*arguments, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.prism.prefill(*arguments, **options)
    for seed in (21, 22):
        for i, x in enumerate(static):
            x.copy_(inputs.tensor(tuple(x.shape), torch.bfloat16, cuda, seed=seed + i))  # type: ignore[arg-type]
        graph.replay()
        eager = torch.ops.prism.prefill(*arguments, **options)
        for got, want in zip(captured, eager, strict=True):
            assert torch.equal(got, want)


def test_other_stream_is_used(cuda: str) -> None:
    case = SelectCase("stream", 1500, 1600, head_dim=128, blocks=(128, 128))
    tensors = qkv(case, cuda)
    want = run(tensors, case)
    side = torch.cuda.Stream()
    late = [torch.zeros_like(x) for x in tensors]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # the copies below finish after the default stream is idle
        for x, y in zip(late, tensors, strict=True):
            x.copy_(y)
        got = torch.ops.prism.prefill(
            *late, *select_bands(case), case.top_p, **select_settings(case)
        )
    side.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_long_input_matches_float64(cuda: str) -> None:
    case = SelectCase("long", 8192, 8192, q_heads=4, head_dim=128, blocks=(128, 128), high=64,
                      low=96, top_p=0.9)  # fmt: skip
    q, k, v = qkv(case, cuda, "length_first")
    out, lse, bits, _ = run((q, k, v), case)
    keep = oracle.unpack_bits(bits, 64)
    check_selection(
        keep,
        oracle.select(
            oracle.block_means(q, 128), oracle.block_means(k, 128),
            case.q_len, case.k_len, *select_bands(case), case.top_p, **select_settings(case),
        ),
    )  # fmt: skip
    options = {"q_block_size": 128, "k_block_size": 128, "causal": True}
    check_attention(
        out,
        lse,
        oracle.attention(q, k, v, keep, **options),
        oracle.low_precision_attention(q, k, v, keep, **options),
    )
