"""prism::estimate_blocks: pooling and selection in one call, bit for bit what the ops give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import inputs, oracle
from helpers.build import select_bands, select_settings, structured_batch
from helpers.cases import B64, B128, SELECT_GROUPS, SelectCase
from helpers.compare import check_selection
from helpers.params import case_params
from helpers.poison import poisoned_allocations

import prism_cuda  # noqa: F401  registers the ops

Pair = tuple[torch.Tensor, torch.Tensor]

SANITIZER_CASES = (
    "regular-b128_d128",
    "ragged-b128_64_odd",
    "gqa-ratio_3",
    "head_dims-d80_b128",
    "head_dims-d192_b128_64",
    "q_longer-by_37",
    "tiny-one_token",
)
GROUPS = {name: SELECT_GROUPS[name] for name in SELECT_GROUPS if name != "settings"}


def qk(case: SelectCase, device: str, layout: str = "contiguous") -> Pair:
    q, k = (inputs.lay_out(x.bfloat16(), layout, device) for x in structured_batch(case, device))
    return q, k


def run(pair: Pair, case: SelectCase, **changes: Any) -> Pair:
    settings = select_settings(case) | changes
    with poisoned_allocations():
        return torch.ops.prism.estimate_blocks(*pair, *select_bands(case), case.top_p, **settings)


def chain(pair: Pair, case: SelectCase) -> Pair:
    q, k = pair
    return torch.ops.prism.select_blocks(
        torch.ops.prism.block_pool(q, case.blocks[0]),
        torch.ops.prism.block_pool(k, case.blocks[1]),
        case.q_len, case.k_len, *select_bands(case), case.top_p, **select_settings(case),
    )  # fmt: skip


def assert_same(got: Pair, want: Pair) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", case_params(GROUPS, SANITIZER_CASES))
def test_equals_pooling_then_selecting(case: SelectCase, device: str) -> None:
    pair = qk(case, device)
    assert_same(run(pair, case), chain(pair, case))


# 128 blocks are one chunk of partial energies each; 129 and 300 make chunks of 2 and 3.
@pytest.mark.parametrize("blocks", [127, 128, 129, 300])
@pytest.mark.parametrize(("block_size", "head_dim"), [(64, 128), (128, 128), (64, 96), (64, 256)])
def test_equals_the_chain_at_every_chunk_size(
    cuda: str, blocks: int, block_size: int, head_dim: int
) -> None:
    case = SelectCase(
        "chunks", blocks * block_size - 3, blocks * block_size + 70, q_heads=4, head_dim=head_dim,
        blocks=B64 if block_size == 64 else B128, high=head_dim // 2, low=head_dim * 3 // 4,
    )  # fmt: skip
    pair = qk(case, cuda)
    assert_same(run(pair, case), chain(pair, case))


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_matches_float64_in_every_layout(device: str, head_dim: int, layout: str) -> None:
    case = SelectCase("layout", 900, 1000, batch=2, q_heads=4, head_dim=head_dim)
    q, k = qk(case, device, layout)
    bits, counts = run((q, k), case)
    keep = oracle.unpack_bits(bits, oracle.ceil_div(case.k_len, case.blocks[1]))
    assert torch.equal(keep.sum(-1).int(), counts)
    want = oracle.select(
        oracle.block_means(q, case.blocks[0]), oracle.block_means(k, case.blocks[1]),
        case.q_len, case.k_len, *select_bands(case), case.top_p, **select_settings(case),
    )  # fmt: skip
    check_selection(keep, want)


def test_float16_matches_the_chain(device: str) -> None:
    case = SelectCase("half", 1280, 1300, q_heads=4)
    q, k = structured_batch(case, device)
    pair = (q.half(), k.half())
    assert_same(run(pair, case), chain(pair, case))


def test_repeats_are_bit_identical(device: str) -> None:
    case = SelectCase("repeat", 2000, 2100, q_heads=4)
    pair = qk(case, device)
    first = run(pair, case)
    for _ in range(3):
        assert_same(run(pair, case), first)


def test_selection_waits_for_pooling(cuda: str) -> None:
    """The selection may start while pooling still runs; it has to see all of its results."""
    case = SelectCase("overlap", 128 * 512, 128 * 512, q_heads=8, head_dim=128, blocks=B128,
                      high=64, low=96)  # fmt: skip
    generator = torch.Generator(cuda).manual_seed(5)
    pairs = [
        tuple(
            torch.randn(1, heads, case.q_len, 128, device=cuda, generator=generator).bfloat16()
            for heads in (8, 2)
        )
        for _ in range(2)
    ]
    want = [chain(pair, case) for pair in pairs]  # type: ignore[arg-type]
    for _ in range(5):
        for pair, expected in zip(pairs, want, strict=True):
            # No poison here: what the call before left in memory must not be taken for the result.
            got = torch.ops.prism.estimate_blocks(
                *pair, *select_bands(case), case.top_p, **select_settings(case)
            )
            assert_same(got, expected)


def test_graph_replay_equals_eager_on_new_inputs(cuda: str) -> None:
    case = SelectCase("graph", 5000, 5100, q_heads=4, head_dim=128, blocks=B128, high=64, low=96)
    static = qk(case, cuda)
    arguments = (*static, *select_bands(case), case.top_p)
    options = select_settings(case)
    torch.ops.prism.estimate_blocks(*arguments, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.prism.estimate_blocks(*arguments, **options)
    for seed in (21, 22):
        for i, x in enumerate(static):
            x.copy_(inputs.tensor(tuple(x.shape), torch.bfloat16, cuda, seed=seed + i))  # type: ignore[arg-type]
        graph.replay()
        assert_same(captured, torch.ops.prism.estimate_blocks(*arguments, **options))
