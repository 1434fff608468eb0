"""prism::select_bands against a float64 sort; only near ties at the threshold may differ.

Keys come as means, which tests can shape, or as k, which has to be the same bit by bit.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import call, inputs, oracle
from helpers.build import (
    SelectInputs,
    select_bands,
    select_inputs,
    select_settings,
    structured_batch,
)
from helpers.cases import B64, B128, B128_64, SELECT_GROUPS, SelectCase
from helpers.compare import assert_repeats, assert_replay_follows, assert_same, check_selection
from helpers.params import case_params, needs_cuda
from helpers.poison import poisoned_allocations
from hypothesis import given, settings
from hypothesis import strategies as st

import prism_cuda  # noqa: F401  registers the ops

SANITIZER_CASES = (
    "regular-b64_d64",
    "regular-b128_d128",
    "regular-past_one_word",
    "regular-bidirectional",
    "ragged-b128_64_odd",
    "gqa-ratio_3",
    "head_dims-d96_gqa",
    "head_dims-d256",
    "prefix-offset_37",
    "q_longer-by_37",
    "tiny-one_token",
    "settings-sink_3_recent_4",
    "settings-p_1",
)


def run(case: SelectInputs) -> tuple[torch.Tensor, torch.Tensor]:
    with poisoned_allocations():
        return case.run()


def kept(case: SelectInputs) -> torch.Tensor:
    """The op's mask as (B, Hq, Nq, Nk) bool, its storage checked."""
    bits, counts = run(case)
    k_blocks = case.k_means.shape[2]
    assert bits.dtype == counts.dtype == torch.int32
    assert bits.is_contiguous()
    assert counts.is_contiguous()
    assert bits.shape == (*case.q_means.shape[:3], oracle.ceil_div(k_blocks, 32))
    assert counts.shape == case.q_means.shape[:3]
    every_bit = oracle.unpack_bits(bits, 32 * bits.shape[-1])
    assert not every_bit[..., k_blocks:].any(), "bits set beyond the last key block"
    assert torch.equal(every_bit.sum(-1).int(), counts)
    return every_bit[..., :k_blocks]


def flat_case(q_blocks: int, device: str, **changes: object) -> SelectInputs:
    """All logits equal: every visible block of a row has the same probability."""
    case = select_inputs(SelectCase("flat", 64 * q_blocks, 64 * q_blocks), device)
    case.q_means = torch.zeros_like(case.q_means)
    case.settings |= {"keep_sink": 0, "keep_recent": 0} | changes
    return case


@pytest.mark.parametrize("case", case_params(SELECT_GROUPS, SANITIZER_CASES))
def test_matches_float64_but_for_near_ties(case: SelectCase, device: str) -> None:
    made = select_inputs(case, device)
    check_selection(kept(made), made.expected())


@pytest.mark.parametrize("group", ["regular", "ragged", "gqa", "head_dims"])
def test_cases_keep_some_and_drop_some(group: str) -> None:
    for case in SELECT_GROUPS[group]:
        want = select_inputs(case, "cpu").expected()
        shown = want.keep[..., want.visible].double().mean()
        assert 0.05 < shown < 0.95, case.name
        assert want.near_tie.double().mean() < 0.003, case.name


def test_ties_keep_the_lower_blocks(device: str) -> None:
    top_p = 0.503  # no n <= 70 has a multiple of 1/n here
    case = flat_case(70, device)
    case.top_p = top_p
    row = torch.arange(70)
    count = torch.ceil(top_p * (row + 1))
    want = row[None, :] < count[:, None]
    assert torch.equal(kept(case).cpu(), want.expand(1, 2, 70, 70))


def test_of_two_equal_key_blocks_the_lower_goes_first(device: str) -> None:
    case = select_inputs(SelectCase("pairs", 2560, 2560, keep_sink=0, keep_recent=0), device)
    case.k_means[:, :, 1::2] = case.k_means[:, :, 0::2]
    case.settings["causal"] = False
    lower, upper = kept(case).unflatten(-1, (-1, 2)).unbind(-1)
    assert not (upper & ~lower).any()
    assert (lower & ~upper).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q_means", "k_means"])
def test_undefined_probabilities_keep_every_visible_block(
    device: str, where: str, value: float
) -> None:
    case = select_inputs(SelectCase("nan", 1280, 1280, q_heads=4, kv_heads=2), device)
    getattr(case, where)[0, 0, 3, 1] = value
    keep, want = kept(case), case.expected()
    hit = [0] if where == "q_means" else [0, 1]
    assert torch.equal(keep[0, hit], want.visible.expand_as(keep[0, hit]))
    assert not torch.equal(keep[0, 3], want.visible)
    check_selection(keep, want)


def test_p_1_keeps_every_visible_block(device: str) -> None:
    case = select_inputs(SelectCase("all", 700, 900, top_p=1.0, keep_sink=0), device)
    case.k_means[0, 0, 2] *= 1e4  # other probabilities underflow to 0
    keep = kept(case)
    assert torch.equal(keep, case.expected().visible.expand_as(keep))


def test_p_0_keeps_only_sink_and_recent(device: str) -> None:
    case = select_inputs(
        SelectCase("none", 700, 900, top_p=0.0, keep_sink=2, keep_recent=2), device
    )
    keep = kept(case)
    assert torch.equal(keep, case.expected().forced.expand_as(keep))


@pytest.mark.parametrize("offset", [0, 1, 30, 64, 100, 128])
@pytest.mark.parametrize("blocks", [B64, B128, B128_64])
def test_own_blocks_are_kept_token_exactly(
    device: str, blocks: tuple[int, int], offset: int
) -> None:
    q_len = 401
    case = select_inputs(
        SelectCase("own", q_len, q_len + offset, top_p=0.0, keep_sink=0, blocks=blocks), device
    )
    keep = kept(case)[0, 0].cpu()
    for row in range(keep.shape[0]):
        first = row * blocks[0] + offset
        last = min((row + 1) * blocks[0], q_len) - 1 + offset
        own = range(first // blocks[1], last // blocks[1] + 1)
        assert keep[row].nonzero().flatten().tolist() == list(own)


def test_calibration_undoes_a_rescaling_of_one_band(device: str) -> None:
    case = select_inputs(SelectCase("scale", 1280, 1280, high=16, low=32), device)
    high, low = set(oracle.band_dims(case.high_band)), set(oracle.band_dims(case.low_band))
    assert not high & low
    before = case.expected()
    case.q_means[..., sorted(high)] *= 0.25
    want = case.expected()
    assert not torch.equal(before.keep, want.keep)
    check_selection(kept(case), want)


@pytest.mark.parametrize("scale", [0.1, 30.0, 1e4])
def test_extreme_magnitudes_match_float64(device: str, scale: float) -> None:
    case = select_inputs(SelectCase("magnitude", 1280, 1280), device)
    case.q_means *= scale
    case.k_means *= scale
    check_selection(kept(case), case.expected())


def test_outlier_block_matches_float64(device: str) -> None:
    case = select_inputs(SelectCase("outlier", 1280, 1280), device)
    case.k_means[0, 1, 4] *= 300.0
    check_selection(kept(case), case.expected())


def test_strided_means_are_bit_identical(device: str) -> None:
    case = select_inputs(SelectCase("strided", 1280, 1280, batch=2, q_heads=4), device)
    want = run(case)
    q_means, k_means = case.q_means, case.k_means
    for layout in inputs.LAYOUTS:
        case.q_means = inputs.lay_out(q_means, layout, device)
        case.k_means = inputs.lay_out(k_means, layout, device)
        for got, was in zip(run(case), want, strict=True):
            assert torch.equal(got, was), layout


def test_repeats_are_bit_identical(device: str) -> None:
    case = select_inputs(SelectCase("repeat", 2000, 2000, q_heads=4), device)
    assert_repeats(lambda: run(case))


def test_heads_do_not_influence_each_other(device: str) -> None:
    case = select_inputs(SelectCase("heads", 1280, 1280, batch=2, q_heads=4), device)
    together = kept(case)
    case.q_means, case.k_means = case.q_means[1:, 2:3], case.k_means[1:, 1:]
    assert torch.equal(kept(case), together[1:, 2:3])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    q_len=st.integers(0, 700),
    k_len=st.integers(0, 3000),
    blocks=st.sampled_from([B64, B128, B128_64]),
    head_dim=st.sampled_from([64, 80, 96, 128, 192, 256]),
    high=st.sampled_from([None, 32, 64]),
    low=st.sampled_from([32, 48, 64]),
    top_p=st.floats(0, 1),
    keep_sink=st.integers(0, 3),
    keep_recent=st.integers(0, 3),
    causal=st.booleans(),
)
@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_any_setting_matches_float64(
    on: str,
    q_len: int,
    k_len: int,
    blocks: tuple[int, int],
    head_dim: int,
    high: int | None,
    low: int,
    top_p: float,
    keep_sink: int,
    keep_recent: int,
    causal: bool,
) -> None:
    if on == "cuda":
        needs_cuda()
    case = SelectCase(
        "drawn", q_len, k_len, kv_heads=1, head_dim=head_dim, blocks=blocks, causal=causal,
        high=high, low=low, top_p=top_p, keep_sink=keep_sink, keep_recent=keep_recent,
    )  # fmt: skip
    made = select_inputs(case, on)
    check_selection(kept(made), made.expected())


# Around the lengths at which another kernel, another number of values a lane or a group of 1, 2, 4
# or 8 warps begins.
ROW_LENGTHS = (1, 2, 7, 8, 9, 31, 32, 33, 64, 65, 127, 128, 129, 255, 256, 257, 512, 513, 768, 769,
               1000, 1023, 1024, 1025, 1500, 1536, 1537, 2047, 2048, 2049, 3072, 3073, 4096, 4097,
               6145, 8192, 8193, 12288, 12289, 16383, 16384)  # fmt: skip


def long_rows(
    device: str,
    k_blocks: int,
    *,
    top_p: float = 0.9,
    head_dim: int = 128,
    q_blocks: int = 40,
    **settings: object,
) -> SelectInputs:
    """40 query blocks (or as many as there are keys) of 4 heads at the end of long rows."""
    generator = torch.Generator(device).manual_seed(3)
    q_blocks = min(q_blocks, k_blocks)
    return SelectInputs(
        torch.randn(1, 4, q_blocks, head_dim, device=device, generator=generator),
        torch.randn(1, 2, k_blocks, head_dim, device=device, generator=generator),
        q_blocks * 128, k_blocks * 128,
        *oracle.half_split_bands(head_dim, head_dim // 2, head_dim * 3 // 4), top_p,
        {"q_block_size": 128, "k_block_size": 128} | settings,
    )  # fmt: skip


@pytest.mark.parametrize("k_blocks", ROW_LENGTHS)
def test_any_row_length_matches_float64(cuda: str, k_blocks: int) -> None:
    case = long_rows(cuda, k_blocks)
    keep, want = kept(case), case.expected()
    if k_blocks > 100:
        assert 0.05 < want.keep[..., want.visible].double().mean() < 0.95
    check_selection(keep, want)


# Enough rows for tiles of 64, and for every CTA to draw one: causal rows of any length among them.
@pytest.mark.parametrize(
    ("k_blocks", "head_dim"),
    [(1100, 128), (1100, 96), (2300, 64), (2300, 128), (2300, 256), (9000, 128)],
)
def test_many_long_rows_match_float64(cuda: str, k_blocks: int, head_dim: int) -> None:
    multiprocessors = torch.cuda.get_device_properties(cuda).multi_processor_count
    q_blocks = min(k_blocks, multiprocessors * 64 // 4 + 3)
    case = long_rows(cuda, k_blocks, head_dim=head_dim, q_blocks=q_blocks)
    check_selection(kept(case), case.expected())


@pytest.mark.parametrize("k_blocks", [1100, 3000])
def test_long_rows_at_p_1_keep_what_they_see(cuda: str, k_blocks: int) -> None:
    case = long_rows(cuda, k_blocks, top_p=1.0, q_blocks=k_blocks // 2)
    keep = kept(case)
    assert torch.equal(keep, case.expected().visible.expand_as(keep))


@pytest.mark.parametrize("k_blocks", [1000, 2048, 5000, 16384])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.99, 0.9999])
def test_long_rows_match_float64_at_any_p(cuda: str, k_blocks: int, top_p: float) -> None:
    case = long_rows(cuda, k_blocks, top_p=top_p, causal=False)
    check_selection(kept(case), case.expected())


@pytest.mark.parametrize("k_blocks", [60, 200, 400, 1000, 3000, 16384])
@pytest.mark.parametrize("top_p", [0.0, 0.3])
def test_probable_blocks_are_kept_whatever_top_p(cuda: str, k_blocks: int, top_p: float) -> None:
    case = long_rows(cuda, k_blocks, top_p=top_p, keep_above=0.5 / k_blocks)
    want = case.expected()
    case.settings["keep_above"] = None
    assert want.keep.sum() > 1.2 * case.expected().keep.sum()
    case.settings["keep_above"] = 0.5 / k_blocks
    check_selection(kept(case), want)


@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("k_blocks", [200, 700, 1024, 3000, 9000])
def test_long_rows_of_other_head_dims_match_float64(
    cuda: str, k_blocks: int, head_dim: int
) -> None:
    case = long_rows(cuda, k_blocks, head_dim=head_dim)
    check_selection(kept(case), case.expected())


@pytest.mark.parametrize("k_blocks", [1024, 2048, 4096, 16384])
def test_long_rows_repeat_bit_identically(cuda: str, k_blocks: int) -> None:
    case = long_rows(cuda, k_blocks)
    assert_repeats(lambda: run(case))


@pytest.mark.parametrize("k_blocks", [1000, 2100, 5000, 16384])
def test_long_flat_rows_keep_the_lower_blocks(cuda: str, k_blocks: int) -> None:
    """All weights tie: the last key block to keep is found by its index."""
    case = long_rows(cuda, k_blocks, top_p=0.50031, keep_sink=0, keep_recent=0)
    case.q_means = torch.zeros_like(case.q_means)
    visible = k_blocks - 39 + torch.arange(40)
    count = torch.ceil(case.top_p * visible.double())
    want = torch.arange(k_blocks)[None, :] < count[:, None]
    assert torch.equal(kept(case).cpu(), want.expand(1, 4, 40, k_blocks))


@pytest.mark.parametrize("k_blocks", [1500, 16384])
def test_an_undefined_key_in_a_long_row_keeps_everything(cuda: str, k_blocks: int) -> None:
    case = long_rows(cuda, k_blocks)
    case.k_means[0, 0, k_blocks // 2, 3] = math.nan
    keep, want = kept(case), case.expected()
    assert torch.equal(keep[0, :2], want.visible.expand_as(keep[0, :2]))
    check_selection(keep, want)


@pytest.mark.parametrize(
    ("high_band", "low_band"),
    [([1, 7, 30, 33, 64, 65, 100, 127], [5, 6]), ([], [3, 61]), ([0, 128], [127, 128])],
)
def test_bands_of_any_dimensions_match_float64(
    device: str, high_band: list[int], low_band: list[int]
) -> None:
    case = select_inputs(SelectCase("bands", 1280, 1280, q_heads=4, head_dim=128), device)
    case.high_band, case.low_band = high_band, low_band
    check_selection(kept(case), case.expected())


# Dimensions that are left out: those of partial rotary embedding, whole slices of 16, and others.
@pytest.mark.parametrize(
    ("head_dim", "high_band", "low_band"),
    [
        (96, [0, 24, 48, 72], [24, 48, 72, 96]),
        (96, [0, 36], [36, 72]),
        (80, [1, 7, 30, 33, 64, 65, 79, 80], [5, 6]),
        (192, [0, 16, 176, 192], [100, 101, 150, 163]),
        (256, [0, 48, 128, 176], [32, 128, 160, 256]),
        (256, [255, 256], [3, 130]),
        (40, [], [8, 39]),
    ],
)
def test_bands_of_other_head_dims_match_float64(
    device: str, head_dim: int, high_band: list[int], low_band: list[int]
) -> None:
    case = select_inputs(SelectCase("bands", 1280, 1280, q_heads=4, head_dim=head_dim), device)
    case.high_band, case.low_band = high_band, low_band
    check_selection(kept(case), case.expected())


@pytest.mark.parametrize("q_heads", [1, 3, 7, 8, 33, 64])
def test_any_group_of_heads_matches_float64(device: str, q_heads: int) -> None:
    case = select_inputs(SelectCase("group", 640, 1317, q_heads=q_heads, kv_heads=1), device)
    check_selection(kept(case), case.expected())


# From k: pooled in the call, bit for bit as block_pool does.

SANITIZER_POOLED = (
    "regular-b128_d128",
    "ragged-b128_64_odd",
    "gqa-ratio_3",
    "head_dims-d80_b128",
    "head_dims-d192_b128_64",
    "q_longer-by_37",
    "tiny-one_token",
)
GROUPS = {name: SELECT_GROUPS[name] for name in SELECT_GROUPS if name != "settings"}
Pair = tuple[torch.Tensor, torch.Tensor]


def qk(case: SelectCase, device: str, layout: str = "contiguous") -> Pair:
    q, k = (inputs.lay_out(x.bfloat16(), layout, device) for x in structured_batch(case, device))
    return q, k


def run_k(pair: Pair, case: SelectCase, **changes: Any) -> Pair:
    settings = select_settings(case) | changes
    with poisoned_allocations():
        return call.select_bands(*pair, *select_bands(case), case.top_p, **settings)


def from_means(pair: Pair, case: SelectCase, spare: int = 0) -> Pair:
    """With `spare` blocks behind the last one."""
    q, k = pair
    means = torch.ops.prism.block_pool(k, case.blocks[1])
    means = torch.nn.functional.pad(means, (0, 0, 0, spare), value=math.nan)
    return call.select_bands(
        q, None, *select_bands(case), case.top_p, k_means=means, k_len=case.k_len,
        **select_settings(case),
    )  # fmt: skip


@pytest.mark.parametrize("case", case_params(GROUPS, SANITIZER_POOLED))
def test_pools_k_as_block_pool_does(case: SelectCase, device: str) -> None:
    pair = qk(case, device)
    assert_same(run_k(pair, case), from_means(pair, case))
    assert_same(run_k(pair, case), from_means(pair, case, spare=3))


# 128 blocks are one chunk of partial energies each; 129 and 300 make chunks of 2 and 3.
@pytest.mark.parametrize("blocks", [127, 128, 129, 300])
@pytest.mark.parametrize(("block_size", "head_dim"), [(64, 128), (128, 128), (64, 96), (64, 256)])
def test_pools_k_alike_at_every_chunk_size(
    cuda: str, blocks: int, block_size: int, head_dim: int
) -> None:
    case = SelectCase(
        "chunks", blocks * block_size - 3, blocks * block_size + 70, q_heads=4, head_dim=head_dim,
        blocks=B64 if block_size == 64 else B128, high=head_dim // 2, low=head_dim * 3 // 4,
    )  # fmt: skip
    pair = qk(case, cuda)
    assert_same(run_k(pair, case), from_means(pair, case))


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_matches_float64_in_every_layout(device: str, head_dim: int, layout: str) -> None:
    case = SelectCase("layout", 900, 1000, batch=2, q_heads=4, head_dim=head_dim)
    q, k = qk(case, device, layout)
    bits, counts = run_k((q, k), case)
    keep = oracle.unpack_bits(bits, oracle.ceil_div(case.k_len, case.blocks[1]))
    assert torch.equal(keep.sum(-1).int(), counts)
    want = oracle.select(
        oracle.block_means(q, case.blocks[0]), oracle.block_means(k, case.blocks[1]),
        case.q_len, case.k_len, *select_bands(case), case.top_p, **select_settings(case),
    )  # fmt: skip
    check_selection(keep, want)


def test_float16_matches_the_from_means(device: str) -> None:
    case = SelectCase("half", 1280, 1300, q_heads=4)
    q, k = structured_batch(case, device)
    pair = (q.half(), k.half())
    assert_same(run_k(pair, case), from_means(pair, case))


def test_repeats_from_k_are_bit_identical(device: str) -> None:
    case = SelectCase("repeat", 2000, 2100, q_heads=4)
    pair = qk(case, device)
    assert_repeats(lambda: run_k(pair, case))


def test_selection_waits_for_pooling(cuda: str) -> None:
    """The selection may start while pooling still runs; it has to see all of its results."""
    case = SelectCase("overlap", 128 * 512, 128 * 512, q_heads=8, head_dim=128, blocks=B128,
                      high=64, low=96)  # fmt: skip
    generator = torch.Generator(cuda).manual_seed(5)
    pairs: list[Any] = [
        tuple(
            torch.randn(1, heads, case.q_len, 128, device=cuda, generator=generator).bfloat16()
            for heads in (8, 2)
        )
        for _ in range(2)
    ]
    want = [from_means(pair, case) for pair in pairs]
    for _ in range(5):
        for (q, k), expected in zip(pairs, want, strict=True):
            # No poison here: what the call before left in memory must not be taken for the result.
            got = call.select_bands(q, k, *select_bands(case), case.top_p, **select_settings(case))
            assert_same(got, expected)


def test_graph_replay_from_k_equals_eager_on_new_inputs(cuda: str) -> None:
    case = SelectCase("graph", 5000, 5100, q_heads=4, head_dim=128, blocks=B128, high=64, low=96)
    static = qk(case, cuda)

    def select(q: torch.Tensor, k: torch.Tensor) -> Pair:
        return call.select_bands(q, k, *select_bands(case), case.top_p, **select_settings(case))

    others = (
        [inputs.tensor(x.shape, x.dtype, cuda, seed=seed + i) for i, x in enumerate(static)]
        for seed in (21, 22)
    )
    assert_replay_follows(select, static, others)


def test_heads_with_rules_of_their_own(device: str) -> None:
    """In one call what each head keeps with its rules alone."""
    case = SelectCase("per_head", 640, 1280, q_heads=4)
    pair, rules = qk(case, device), select_settings(case)
    top_p, above = [0.2, 1.0, 0.9, 0.0], [0.3, 0.5, 0.01, 0.02]
    bands = select_bands(case)
    together = call.select_bands(*pair, *bands, top_p, **rules | {"keep_above": above})
    for head in range(4):
        own = rules | {"keep_above": above[head]}
        alone = call.select_bands(*pair, *bands, top_p[head], **own)
        assert_same([x[:, head] for x in together], [x[:, head] for x in alone])
    assert len({int(x) for x in together[1].sum((0, 2))}) == 4
