"""prism::select_grid against float64; only near ties at the threshold may differ."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import call, inputs, oracle
from helpers.build import select_settings, structured_batch
from helpers.cases import B64, B128, B128_64, SELECT_GROUPS, SelectCase
from helpers.compare import assert_repeats, assert_replay_follows, check_selection
from helpers.params import case_params, needs_cuda
from helpers.poison import poisoned_allocations
from hypothesis import given, settings
from hypothesis import strategies as st

import prism_cuda  # noqa: F401  registers the ops

Pair = tuple[torch.Tensor, torch.Tensor]

SANITIZER_CASES = (
    "regular-b128_d128",
    "regular-past_one_word",
    "ragged-b128_64_odd",
    "gqa-ratio_3",
    "head_dims-d96_gqa",
    "q_longer-by_37",
    "tiny-one_token",
    "settings-p_1",
)


def qk(case: SelectCase, device: str, layout: str = "contiguous", seed: int = 0) -> Pair:
    q, k = structured_batch(case, device, seed)
    return inputs.lay_out(q.bfloat16(), layout, device), inputs.lay_out(
        k.bfloat16(), layout, device
    )


def exact_qk(case: SelectCase, device: str, seed: int = 0) -> Pair:
    """Small integers whose cells' means and standard deviations are integers too.

    A cell's queries are equal and its keys lie as far above their mean as below.
    """
    rng = inputs.generator(seed)

    def integers(high: int, heads: int, length: int) -> torch.Tensor:
        shape = (case.batch, heads, oracle.ceil_div(length, oracle.CELL), case.head_dim)
        x = torch.randint(-high, high + 1, shape, generator=rng)
        return x.repeat_interleave(oracle.CELL, 2)[:, :, :length]

    q = integers(2, case.q_heads, case.q_len)
    k = integers(3, case.kv_heads, case.k_len)
    spread = integers(3, case.kv_heads, case.k_len)
    sign = torch.tensor([1, -1]).repeat(oracle.ceil_div(case.k_len, 2))[: case.k_len, None]
    return q.bfloat16().to(device), (k + sign * spread).bfloat16().to(device)


def kept(pair: Pair, top_p: call.Number, **options: Any) -> torch.Tensor:
    """The op's mask as (B, Hq, Nq, Nk) bool, its storage checked."""
    with poisoned_allocations():
        bits, counts = call.select_grid(*pair, top_p, **options)
    q, k = pair
    q_blocks = oracle.ceil_div(q.shape[2], options["q_block_size"])
    k_blocks = oracle.ceil_div(k.shape[2], options["k_block_size"])
    assert bits.dtype == counts.dtype == torch.int32
    assert bits.is_contiguous()
    assert counts.is_contiguous()
    assert bits.shape == (*q.shape[:2], q_blocks, oracle.ceil_div(k_blocks, 32))
    assert counts.shape == (*q.shape[:2], q_blocks)
    every_bit = oracle.unpack_bits(bits, 32 * bits.shape[-1])
    assert not every_bit[..., k_blocks:].any(), "bits set beyond the last key block"
    assert torch.equal(every_bit.sum(-1).int(), counts)
    return every_bit[..., :k_blocks]


def options_of(blocks: tuple[int, int], **changes: Any) -> dict[str, Any]:
    return {"q_block_size": blocks[0], "k_block_size": blocks[1]} | changes


def check(pair: Pair, top_p: float, rounding: float = 2.0**-11, **options: Any) -> torch.Tensor:
    keep = kept(pair, top_p, **options)
    # The CPU computes in float32 throughout.
    rounding = rounding if pair[0].is_cuda else 0.0
    check_selection(keep, oracle.select_grid(*pair, top_p, rounding=rounding, **options))
    return keep


GROUPS = {
    name: tuple(case for case in cases if case.head_dim <= 128)
    for name, cases in SELECT_GROUPS.items()
}


@pytest.mark.parametrize("case", case_params(GROUPS, SANITIZER_CASES))
def test_matches_float64_but_for_near_ties(case: SelectCase, device: str) -> None:
    check(qk(case, device), case.top_p, **select_settings(case))


EXACT = {
    "exact": (
        SelectCase("b64_d64", 1280, 1280, q_heads=4),
        SelectCase("b128_d128", 2560, 2560, head_dim=128, blocks=B128),
        SelectCase("b128_64_d128", 1300, 1706, head_dim=128, blocks=B128_64, q_heads=6),
        SelectCase("b64_d56", 700, 700, head_dim=56, q_heads=4),
        SelectCase("b128_64_d96", 1300, 1706, head_dim=96, blocks=B128_64, q_heads=4),
        SelectCase("b128_d64", 700, 2090, blocks=B128, q_heads=3, kv_heads=1, keep_above=0.03),
        SelectCase("bidirectional", 640, 1200, blocks=B128_64, causal=False),
        SelectCase("q_longer", 900, 600, batch=2),
    )
}


@pytest.mark.parametrize("case", case_params(EXACT))
def test_exact_statistics_leave_only_float32_near_ties(case: SelectCase, device: str) -> None:
    options = select_settings(case) | {"scale": 1 / 16}
    pair = exact_qk(case, device)
    check(pair, case.top_p, rounding=0.0, **options)
    want = oracle.select_grid(*pair, case.top_p, rounding=0.0, **options)
    assert int(want.near_tie.sum()) <= 8


@pytest.mark.parametrize("group", ["regular", "ragged", "gqa", "head_dims"])
def test_cases_keep_some_and_drop_some(group: str) -> None:
    for case in GROUPS[group]:
        want = oracle.select_grid(*qk(case, "cpu"), case.top_p, **select_settings(case))
        assert 0.05 < want.keep[..., want.visible].double().mean() < 0.95, case.name
        assert want.near_tie.double().mean() < 0.04, case.name


def test_equals_the_softmax_s_blocks_where_cells_are_constant(device: str) -> None:
    """Where a cell's tokens are equal its shares are exact, but for the diagonal's causality."""
    q, k = exact_qk(SelectCase("constant", 512, 512), device)
    k = k[:, :, ::16].repeat_interleave(16, 2)
    probs = torch.softmax(q.double() @ k.double().mT / 8, -1)
    peaks = probs.unflatten(3, (8, 64)).sum(-1).unflatten(2, (8, 64)).amax(3)
    masses = peaks / peaks.sum(-1, keepdim=True)
    least = float(masses.flatten().median())
    keep = kept((q, k), 0.0, **options_of(B64, keep_above=least, keep_sink=0, keep_recent=0,
                                          causal=False))  # fmt: skip
    sure = (masses - least).abs() > 1e-5 * least
    assert torch.equal(keep & sure, (masses >= least) & sure)


def test_one_cell_that_needs_a_block_is_not_outvoted(device: str) -> None:
    """Seven of eight cells look at blocks 0 to 7 alike, the last one at block 9."""
    q = torch.zeros((1, 1, 128, 64), dtype=torch.bfloat16, device=device)
    k = torch.zeros((1, 1, 640, 64), dtype=torch.bfloat16, device=device)
    q[:, :, :112, 0], q[:, :, 112:, 1] = 16.0, 16.0
    k[:, :, :512, 0], k[:, :, 576:, 1] = 8.0, 8.0
    options = options_of(B128_64, causal=False, keep_sink=0, keep_recent=0)
    # Of a total of 2, block 9 holds 1 and each of the others 1/8; 1/8 would be its mean share.
    first = kept((q, k), 0.3, **options)
    assert first[0, 0, 0].nonzero().flatten().tolist() == [9]
    above = kept((q, k), 0.0, **options, keep_above=0.1)
    assert above[0, 0, 0].nonzero().flatten().tolist() == [9]
    most = kept((q, k), 0.5 + 0.9 / 16, **options)
    assert most[0, 0, 0].nonzero().flatten().tolist() == [0, 9]


def test_keys_of_equal_mean_are_told_apart_by_their_spread(device: str) -> None:
    q = torch.full((1, 1, 64, 64), 2.0, dtype=torch.bfloat16, device=device)
    k = torch.zeros((1, 1, 640, 64), dtype=torch.bfloat16, device=device)
    k[:, :, 384:448:2], k[:, :, 385:448:2] = 1.0, -1.0
    keep = kept((q, k), 1e-3, **options_of(B64, causal=False, keep_sink=0, keep_recent=0))
    assert keep[0, 0, 0].nonzero().flatten().tolist() == [6]


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_every_layout_is_bit_identical(device: str, layout: str, head_dim: int) -> None:
    case = SelectCase("layout", 900, 1000, batch=2, q_heads=4, head_dim=head_dim)
    options = select_settings(case)
    want = kept(qk(case, device), case.top_p, **options)
    assert torch.equal(kept(qk(case, device, layout), case.top_p, **options), want)


def test_wider_heads_are_refused(device: str) -> None:
    q = torch.ones(1, 2, 100, 136, dtype=torch.bfloat16, device=device)
    allowed = "q has head_dim 136.*; allowed on the grid: multiples of 8 up to 128"
    with pytest.raises(RuntimeError, match=f"prism::select_grid: {allowed}"):
        call.select_grid(q, q, 0.9)


def test_float16_matches_float64(device: str) -> None:
    case = SelectCase("half", 1280, 1300, q_heads=4, blocks=B128_64)
    q, k = structured_batch(case, device)
    check((q.half(), k.half()), case.top_p, **select_settings(case))


def test_float32_on_the_cpu_matches_float64() -> None:
    case = SelectCase("float", 1280, 1300, q_heads=4)
    check(structured_batch(case, "cpu"), case.top_p, **select_settings(case))


def test_own_scale_matches_float64(device: str) -> None:
    case = SelectCase("scale", 1280, 1280)
    for scale in (0.02, 0.5):
        check(qk(case, device), case.top_p, **select_settings(case), scale=scale)


def test_opposite_scales_of_queries_and_keys_change_nothing(device: str) -> None:
    case = SelectCase("magnitude", 1280, 1280, q_heads=4)
    q, k = qk(case, device)
    want = kept((q, k), case.top_p, **select_settings(case))
    for exponent in (-10, -5, 5, 10):
        pair = (q * 2.0**exponent, k * 2.0**-exponent)
        assert torch.equal(kept(pair, case.top_p, **select_settings(case)), want), exponent


def test_outliers_match_float64(device: str) -> None:
    """A channel far outside float16 once squared, a large block, and a bias of all keys."""
    case = SelectCase("outlier", 1280, 1280)
    q, k = qk(case, device)
    k[:, :, :, 5] += 300.0
    k[0, 1, 200:260] *= 20.0
    k[0, 0, 700:, 9] = 3000.0 * torch.arange(580, device=device).cos()
    q[..., 9] *= 1e-3
    check((q, k), case.top_p, **select_settings(case))


@pytest.mark.parametrize("kind", ["constant", "zero", "denormal"])
def test_flat_rows_keep_the_lower_blocks(device: str, kind: str) -> None:
    q, k = (
        inputs.tensor((1, 2, 4480, 64), torch.bfloat16, device, seed=i, kind=kind) for i in (0, 1)
    )
    top_p = 0.503  # no n <= 70 has a multiple of 1/n here
    keep = kept((q, k), top_p, **options_of(B64, keep_sink=0, keep_recent=0, causal=False))
    count = math.ceil(top_p * 70)
    want = (torch.arange(70, device=device) < count).expand_as(keep)
    assert torch.equal(keep, want)


def test_of_two_equal_key_blocks_the_lower_goes_first(device: str) -> None:
    case = SelectCase("pairs", 2560, 2560, causal=False, keep_sink=0, keep_recent=0)
    q, k = qk(case, device)
    blocks = k.unflatten(2, (-1, 64))
    blocks[:, :, 20:] = blocks[:, :, :20].clone()
    keep = kept((q, k), case.top_p, **select_settings(case))
    lower, upper = keep[..., :20], keep[..., 20:]
    assert not (upper & ~lower).any()
    assert (lower & ~upper).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_undefined_masses_keep_every_visible_block(device: str, which: int, value: float) -> None:
    case = SelectCase("nan", 1280, 1280, q_heads=4, kv_heads=2)
    pair = qk(case, device)
    pair[which][0, 0, 700, 3] = value
    keep = check(pair, case.top_p, **select_settings(case))
    want = oracle.select_grid(*pair, case.top_p, **select_settings(case))
    row = 700 // 64
    heads = [0] if which == 0 else [0, 1]
    assert torch.equal(keep[0, heads, row], want.visible[row].expand(len(heads), -1))
    assert not torch.equal(keep[0, 3], want.visible)
    assert not torch.equal(keep[0, 0, row - 1], want.visible[row - 1])


@pytest.mark.parametrize("blocks", [B64, B128, B128_64])
def test_long_rows_match_float64(cuda: str, blocks: tuple[int, int]) -> None:
    """More key blocks than masses fit beside the scores, and the longest row there may be."""
    for k_blocks, head_dim in ((2500, 64), (5000, 128), (16384, 64)):
        k_len = k_blocks * blocks[1] - 11
        q = inputs.tensor((1, 2, 300, head_dim), torch.bfloat16, cuda, seed=1)
        k = inputs.tensor((1, 1, k_len, head_dim), torch.bfloat16, cuda, seed=2)
        k += (
            2
            * inputs.tensor((1, 1, k_blocks, head_dim), torch.bfloat16, cuda, seed=3)[
                :, :, torch.arange(k_len, device=cuda) // blocks[1]
            ]
        )
        check((q, k), 0.8, **options_of(blocks, keep_above=1e-3))


def test_too_many_key_blocks_are_refused(cuda: str) -> None:
    q = torch.ones(1, 1, 1, 64, dtype=torch.bfloat16, device=cuda)
    k = q.expand(1, 1, 64 * 16384 + 1, 64)
    with pytest.raises(RuntimeError, match="select_grid: k has 16385 blocks.*16384"):
        call.select_grid(q, k, 0.9, q_block_size=64, k_block_size=64)


def test_heads_do_not_influence_each_other(device: str) -> None:
    case = SelectCase("heads", 1280, 1280, batch=2, q_heads=4)
    q, k = qk(case, device)
    together = kept((q, k), case.top_p, **select_settings(case))
    alone = kept((q[1:, 2:3], k[1:, 1:]), case.top_p, **select_settings(case))
    assert torch.equal(alone, together[1:, 2:3])


def test_repeats_are_bit_identical(device: str) -> None:
    case = SelectCase("repeat", 2000, 2100, q_heads=4)
    pair = qk(case, device)
    assert_repeats(lambda: kept(pair, case.top_p, **select_settings(case)))


@pytest.mark.parametrize("blocks", [B64, B128, B128_64])
def test_more_rows_than_ctas_match_the_reference(cuda: str, blocks: tuple[int, int]) -> None:
    """Every CTA takes several tiles, in both directions, and scoring waits for pooling."""
    length, q_heads, kv_heads = 8192, 48, 6
    options = options_of(blocks, keep_above=0.01)
    generator = torch.Generator(cuda).manual_seed(5)

    def drifting(heads: int) -> torch.Tensor:
        shape = (1, heads, length, 128)
        noise = torch.randn(shape, device=cuda, generator=generator)
        drift = torch.randn((1, heads, length // 64, 128), device=cuda, generator=generator)
        return (noise + drift.repeat_interleave(64, 2)).bfloat16()

    pairs = [(drifting(q_heads), drifting(kv_heads)) for _ in range(2)]
    for q, k in pairs * 2:
        # No poison here: what the call before left in memory must not be taken for the result.
        bits, counts = call.select_grid(q, k, 0.9, **options)
        keep = oracle.unpack_bits(bits, length // blocks[1])
        assert torch.equal(keep.sum(-1).int(), counts)
        for head in (0, 23, 47):
            pair = (q[:, head : head + 1], k[:, head // 8 : head // 8 + 1])
            check_selection(keep[:, head : head + 1], oracle.select_grid(*pair, 0.9, **options))


def test_graph_replay_equals_eager_on_new_inputs(cuda: str) -> None:
    case = SelectCase("graph", 5000, 5100, q_heads=4, head_dim=128, blocks=B128)

    def select(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return call.select_grid(q, k, case.top_p, **select_settings(case))

    assert_replay_follows(select, qk(case, cuda), (qk(case, cuda, seed=seed) for seed in (21, 22)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    q_len=st.integers(1, 600),
    k_len=st.integers(1, 900),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (7, 1)]),
    blocks=st.sampled_from([B64, B128, B128_64]),
    head_dim=st.sampled_from([40, 64, 96, 128]),
    causal=st.booleans(),
    top_p=st.floats(0, 1),
    keep_above=st.none() | st.floats(1e-3, 1),
)
@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_any_shape_matches_float64(
    on: str,
    q_len: int,
    k_len: int,
    heads: tuple[int, int],
    blocks: tuple[int, int],
    head_dim: int,
    causal: bool,
    top_p: float,
    keep_above: float | None,
) -> None:
    if on == "cuda":
        needs_cuda()
    case = SelectCase("any", q_len, k_len, 1, *heads, head_dim)
    check(qk(case, on), top_p, **options_of(blocks, causal=causal, keep_above=keep_above))


def test_heads_with_rules_of_their_own(device: str) -> None:
    """In one call what each head keeps with its rules alone."""
    case = SelectCase("per_head", 640, 1280, q_heads=4)
    pair, rules = qk(case, device), select_settings(case)
    top_p, above = [0.2, 1.0, 0.9, 0.0], [0.3, 0.5, 0.01, 0.02]
    together = kept(pair, top_p, **rules | {"keep_above": above})
    for head in range(4):
        alone = kept(pair, top_p[head], **rules | {"keep_above": above[head]})
        assert torch.equal(together[:, head], alone[:, head])
    assert len({int(x) for x in together.sum((0, 2, 3))}) == 4
