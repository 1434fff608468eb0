"""float8 e4m3 keys and values with scales per head, in every op that takes them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import call, fp8, inputs, oracle
from helpers.attention import check, inputs_of
from helpers.build import AttentionInputs, attention_inputs, pool_input
from helpers.cases import B64, B128, B128_64, AttentionCase, PoolCase
from helpers.compare import assert_repeats, assert_same, check_elements
from helpers.params import case_params, device_dtype_params, needs_cuda
from helpers.poison import poisoned_allocations
from helpers.ragged import RaggedCase, ragged_inputs, selected_alone

import prism_cuda

# On Hopper, 128-token query blocks up to head_dim 128 run on its own kernel where the memory
# layout, softcap and window allow it; the others on the portable one.
GROUPS: dict[str, tuple[Any, ...]] = {
    "batched": (
        AttentionCase("b64_d64", 256, 256, q_heads=4),
        AttentionCase("b64_d128", 256, 256, head_dim=128),
        AttentionCase("b128_d64", 256, 300, q_heads=4, blocks=B128),
        AttentionCase("b128_d128", 300, 300, q_heads=4, head_dim=128, blocks=B128),
        AttentionCase("b128_64_d64", 300, 700, q_heads=4, blocks=B128_64),
        AttentionCase("b128_64_d128", 300, 700, q_heads=4, head_dim=128, blocks=B128_64),
        AttentionCase("d256", 200, 300, head_dim=256, blocks=B128),
        AttentionCase("d192", 130, 200, head_dim=192, blocks=B128),
        AttentionCase("d96", 200, 300, head_dim=96, blocks=B128),
        AttentionCase("d32", 200, 300, head_dim=32, blocks=B128_64),
        AttentionCase("d72", 130, 200, head_dim=72, blocks=B128),
        AttentionCase("full", 256, 257, head_dim=128, blocks=B128, mask="full", causal=False),
        AttentionCase("one_token", 1, 1, head_dim=128, blocks=B128, mask="full"),
        AttentionCase("q_longer", 300, 170, head_dim=128, blocks=B128),
        AttentionCase("no_key", 130, 0, head_dim=128, blocks=B128),
        AttentionCase("gqa_4", 200, 200, batch=2, q_heads=8, head_dim=128, blocks=B128),
        AttentionCase("empty_rows", 700, 700, head_dim=128, blocks=B128, mask="alternating_empty"),
        AttentionCase("first_only", 700, 700, head_dim=128, blocks=B128_64, mask="first_only"),
        AttentionCase("large_logits", 300, 300, head_dim=64, blocks=B128, values="large_logits"),
        AttentionCase("length_first", 300, 300, head_dim=128, blocks=B128, layout="length_first"),
        AttentionCase("packed_qkv", 300, 300, head_dim=128, blocks=B128, layout="packed_qkv"),
        AttentionCase("odd_stride", 150, 187, head_dim=128, blocks=B128, layout="odd_stride"),
        AttentionCase("offset", 150, 187, head_dim=64, layout="offset"),
        AttentionCase("window", 300, 300, head_dim=128, blocks=B128, window_left=70),
        AttentionCase("softcap", 300, 300, head_dim=128, blocks=B128, softcap=3.0),
    ),
    "packed": (
        RaggedCase("b128_d64"),
        RaggedCase("b128_d128", head_dim=128),
        RaggedCase("b128_64_d128", head_dim=128, blocks=B128_64),
        RaggedCase("b64_d128", head_dim=128, blocks=B64),
        RaggedCase("b128_d256", head_dim=256, q_heads=2),
        RaggedCase("bidirectional", causal=False, head_dim=128, mask="full"),
        RaggedCase("unused_rows", unused=37, head_dim=128),
        RaggedCase("odd_stride", odd_stride=True),
        RaggedCase("sinks", sinks=True, head_dim=128),
        RaggedCase("window_softcap", window_left=50, softcap=5.0, sinks=True),
        RaggedCase("one_kv_head", q_heads=5, kv_heads=1, head_dim=128),
        RaggedCase("empty_rows", mask="alternating_empty", head_dim=128, sinks=True),
        RaggedCase("many_sequences", ((3, 40), (0, 9), (17, 17), (1, 1)) * 40, head_dim=128),
    ),
    "paged": (
        *(RaggedCase(f"page_{n}", page_size=n, head_dim=128) for n in (1, 2, 4, 8, 16, 32, 64)),
        RaggedCase("page_128", page_size=128, head_dim=128, mask="full"),
        RaggedCase("page_256", page_size=256, head_dim=128, blocks=B128_64),
        RaggedCase("page_8_d64", page_size=8),
        RaggedCase("page_64_d64", page_size=64, blocks=B128_64),
        RaggedCase("page_16_d256", page_size=16, head_dim=256, q_heads=2),
        RaggedCase("page_16_b64", page_size=16, blocks=B64, head_dim=128),
        RaggedCase("page_32_d96", page_size=32, head_dim=96, q_heads=2),
        RaggedCase("shared_prefix", page_size=16, shared=True, head_dim=128),
        RaggedCase("heads_first", page_size=32, heads_first=True, head_dim=128),
        RaggedCase("slack", page_size=64, slack=(300, 900), head_dim=128),
        RaggedCase("sinks", page_size=64, sinks=True, head_dim=128),
        RaggedCase("window_softcap", page_size=64, window_left=50, softcap=5.0, head_dim=128),
    ),
}
SANITIZER_CASES = (
    "batched-b64_d64",
    "batched-b128_d64",
    "batched-b128_d128",
    "batched-b128_64_d128",
    "batched-d256",
    "batched-d72",
    "batched-one_token",
    "batched-odd_stride",
    "batched-empty_rows",
    "packed-b128_d128",
    "packed-unused_rows",
    "packed-empty_rows",
    "paged-page_1",
    "paged-page_8",
    "paged-page_64",
    "paged-page_64_d64",
    "paged-shared_prefix",
)


def make(case: AttentionCase, dtype: torch.dtype, device: str) -> AttentionInputs:
    return attention_inputs(case, dtype, device, kv_dtype=fp8.FP8)


def run(case: AttentionInputs, scales: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return replace(case, scales=scales).run()


@pytest.mark.parametrize("case", case_params(GROUPS, SANITIZER_CASES))
@pytest.mark.parametrize(("on", "dtype"), device_dtype_params())
def test_matches_float64(case: Any, on: str, dtype: torch.dtype) -> None:
    if on == "cuda":
        needs_cuda()
    check(inputs_of(case, dtype, on, fp8.FP8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "blocks"), [(128, B128), (64, B128_64), (128, B64)])
def test_growing_maxima_match_float64(
    device: str, head_dim: int, blocks: tuple[int, int], dtype: torch.dtype
) -> None:
    case = AttentionCase(
        "rising", 300, 900, head_dim=head_dim, blocks=blocks, values="rising", mask="full"
    )
    check(make(case, dtype, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_portable_kernel_matches_float64(
    cuda: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRISM_PORTABLE_ATTENTION", "1")
    for head_dim in (64, 96, 128):
        for blocks in (B128, B128_64):
            case = AttentionCase("portable", 300, 700, q_heads=4, head_dim=head_dim, blocks=blocks)
            check(make(case, dtype, cuda))
    for page_size in (1, 64):
        paged = RaggedCase("portable", page_size=page_size, head_dim=128)
        check(ragged_inputs(paged, dtype, cuda, kv_dtype=fp8.FP8))


@pytest.mark.parametrize("columns", [8, 40, 72, 120, 200])
def test_rows_that_end_within_16_bytes(device: str, columns: int) -> None:
    """Rows of 16-byte strides whose last 8 bytes belong to nobody."""
    shape = AttentionCase("part", 150, 300, q_heads=4, head_dim=256, blocks=B128)
    case = make(shape, torch.bfloat16, device)
    case.q, case.k, case.v = (x[..., :columns] for x in (case.q, case.k, case.v))
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("blocks", [B64, B128])
def test_every_code_is_exact(
    device: str, head_dim: int, blocks: tuple[int, int], dtype: torch.dtype
) -> None:
    """Sequences of one key return its value, and its scores with unit queries as lse."""
    count = 256
    codes = fp8.all_codes(count, head_dim).to(device)
    q = torch.zeros(count, 2, head_dim)
    q[:, 0, 5] = 1.0  # meets every code
    q[torch.arange(count), 1, torch.arange(count) % head_dim] = 1.0  # in every column
    q = q.to(dtype).to(device)
    ends = torch.arange(count + 1, dtype=torch.int32, device=device)
    ones = torch.ones(count, 2, 1, 1, dtype=torch.int32, device=device)
    out, lse = torch.ops.prism.sparse_attention(
        q, codes[:, None], codes[:, None], ones, ones[..., 0], cu_seqlens_q=ends,
        cu_seqlens_k=ends, max_seqlen_q=1, max_seqlen_k=1, scale=1.0,
        q_block_size=blocks[0], k_block_size=blocks[1],
    )  # fmt: skip
    assert torch.equal(out.float(), codes.float()[:, None].expand(-1, 2, -1))
    scores = (q.double() * codes.double()[:, None]).sum(-1).T
    assert len(scores[0].unique()) == 253  # but NaN and one of the zeros
    check_elements("lse", lse, scores, scores.abs() * 2.0**-21 + 2.0**-20)  # codes differ by 2^-9


def test_scales_of_powers_of_two_change_no_bit(device: str) -> None:
    for head_dim, blocks in ((64, B64), (128, B128)):
        shape = AttentionCase("powers", 300, 300, q_heads=4, head_dim=head_dim, blocks=blocks)
        case = make(shape, torch.bfloat16, device)
        out, lse = run(case, {})
        ones = {name: torch.ones(2, device=device) for name in ("k_scale", "v_scale")}
        case.settings["scale"] = head_dim**-0.5
        assert_same(run(case, ones), (out, lse))
        factors = torch.tensor([2.0**40, 2.0**-40], device=device)
        tiny = torch.full((2,), 2.0**-30, device=device)
        case.settings["scale"] = head_dim**-0.5 * 2.0**30
        scaled, scaled_lse = run(case, {"k_scale": tiny, "v_scale": factors})
        of_heads = factors.repeat_interleave(2)[:, None, None].double()
        assert torch.equal(scaled.double(), out.double() * of_heads)
        assert torch.equal(scaled_lse, lse)


def test_one_scale_is_enough(device: str) -> None:
    case = make(AttentionCase("one", 150, 150, q_heads=4, blocks=B128), torch.bfloat16, device)
    for name, scale in fp8.scales(2, device).items():
        check(replace(case, scales={name: scale}))


def test_unkept_blocks_and_slots_past_the_end_change_nothing(device: str) -> None:
    case = make(
        AttentionCase("unkept", 256, 250, head_dim=128, blocks=B128, mask="first_only"),
        torch.bfloat16,
        device,
    )
    want = run(case, {})
    longer = []
    for x in (case.k, case.v):
        y = torch.full((1, 2, 384, 128), 448.0, device=device).to(fp8.FP8)
        y[:, :, :128] = x[:, :, :128]
        longer.append(y[:, :, :250])
    case.k, case.v = longer
    assert_same(run(case, {}), want)


def test_repeats_are_bit_identical(device: str) -> None:
    case = make(
        AttentionCase("repeat", 900, 900, q_heads=4, head_dim=128, blocks=B128),
        torch.bfloat16,
        device,
    )
    assert_repeats(lambda: run(case, {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "blocks"), [(128, B128), (128, B128_64), (64, B128)])
def test_long_input_matches_float64(
    cuda: str, dtype: torch.dtype, head_dim: int, blocks: tuple[int, int]
) -> None:
    case = AttentionCase(
        "long", 8192 - 77, 8192, q_heads=4, head_dim=head_dim, blocks=blocks, layout="length_first"
    )
    check(make(case, dtype, cuda))


# Selection: codes are exact in bfloat16, so everything has to be equal bit by bit to the same of
# 16-bit keys, but for the scale of the means.


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("layout", ["contiguous", "length_first", "odd_stride"])
def test_block_pool(device: str, head_dim: int, block_size: int, layout: str) -> None:
    case = PoolCase("fp8", 300, heads=3, head_dim=head_dim, layout=layout)
    x = pool_input(case, fp8.FP8, device)
    scale = torch.tensor([0.3, 2.0, 1e-3], device=device)
    want = torch.ops.prism.block_pool(x.bfloat16(), block_size)
    with poisoned_allocations():
        assert torch.equal(torch.ops.prism.block_pool(x, block_size), want)
        scaled = torch.ops.prism.block_pool(x, block_size, scale)
    assert torch.equal(scaled, want * scale[:, None, None])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_append_means(device: str, head_dim: int) -> None:
    x = pool_input(PoolCase("fp8", 300, heads=3, head_dim=head_dim), fp8.FP8, device)
    scale = torch.tensor([0.3, 2.0, 1e-3], device=device)
    means = torch.full((x.shape[0], 3, 5, head_dim), math.nan, device=device)
    sums = torch.full((x.shape[0], 3, 1024 // head_dim, head_dim), math.nan, device=device)
    for start, end in ((0, 70), (70, 71), (71, 256), (256, 300)):
        torch.ops.prism.append_means_(x[:, :, start:end], means, sums, start, 64, scale)
        so_far = torch.ops.prism.block_pool(x[:, :, :end], 64, scale)
        assert torch.equal(means[:, :, : so_far.shape[2]], so_far)


def bands_and_rules(head_dim: int) -> dict[str, Any]:
    high, low = oracle.half_split_bands(head_dim, head_dim // 2, 3 * head_dim // 4)
    return {"high_band": high, "low_band": low, "top_p": 0.8}


def structured(head_dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = inputs.structured_qk(4, 2, 700, 1100, head_dim, device, 3)
    return q.bfloat16(), k.to(fp8.FP8), torch.tensor([0.1, 0.3], device=device)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("blocks", [B64, B128, B128_64])
def test_select_bands(device: str, head_dim: int, blocks: tuple[int, int]) -> None:
    q, k, k_scale = structured(head_dim, device)
    common = bands_and_rules(head_dim) | dict(
        zip(("q_block_size", "k_block_size"), blocks, strict=True)
    )
    with poisoned_allocations():
        bits, counts = call.select_bands(q, k, **common, k_scale=k_scale)
    means = torch.ops.prism.block_pool(k, blocks[1], k_scale)
    want_bits, want_counts = call.select_bands(q, None, **common, k_means=means, k_len=1100)
    assert torch.equal(counts, want_counts)
    assert torch.equal(bits, want_bits)
    unscaled = call.select_bands(q, k, **common)
    assert not torch.equal(unscaled[0], bits)
    of_bf16 = call.select_bands(q, k.bfloat16(), **common)
    assert torch.equal(unscaled[0], of_bf16[0])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [None, 1, 16, 64])
def test_select_bands_of_a_ragged_batch(device: str, head_dim: int, page_size: int | None) -> None:
    lengths = ((129, 200), (5, 0), (33, 300), (129, 4200), (333, 1000))
    case = RaggedCase("fp8", lengths, head_dim=head_dim, page_size=page_size, blocks=B64)
    made = ragged_inputs(case, torch.bfloat16, device, kv_dtype=fp8.FP8)
    rules = bands_and_rules(head_dim)
    rules |= {"q_block_size": 64, "k_block_size": 64, "k_scale": made.scales["k_scale"]}
    with poisoned_allocations():
        got = call.select_bands(made.q, made.k, **made.where(), **rules)
    for a, b in zip(got, selected_alone(call.select_bands, made, rules), strict=True):
        assert torch.equal(a.cpu(), b)


def test_prefill_is_selection_and_attention(device: str) -> None:
    q, k, k_scale = structured(128, device)
    v = inputs.tensor((1, 2, 1100, 128), fp8.FP8, device, seed=5)
    scales: dict[str, Any] = {
        "k_scale": k_scale,
        "v_scale": torch.tensor([0.5, 3.0], device=device),
    }
    rules = bands_and_rules(128)
    got = call.prefill(q, k, v, "bands", **rules, **scales)
    mask = call.select_bands(q, k, **rules, k_scale=k_scale)
    want = torch.ops.prism.sparse_attention(q, k, v, *mask, **scales)
    assert_same(got, (*want, *mask))


@pytest.mark.parametrize("page_size", [None, 16])
def test_prefill_varlen_is_estimation_and_attention(device: str, page_size: int | None) -> None:
    lengths = ((200, 700), (0, 5), (129, 1000))
    case = RaggedCase("fp8", lengths, head_dim=128, page_size=page_size)
    made = ragged_inputs(case, torch.bfloat16, device, kv_dtype=fp8.FP8)
    config = prism_cuda.PrismConfig(top_p=0.9, dense_below=0, rope_theta=1e6, rope_layout="half")
    where = {name: x for name, x in made.tensors.items() if name != "sinks"}
    out, lse, bits, counts = prism_cuda.prefill_varlen(
        made.q, made.k, made.v, **where, **made.scales, config=config, return_lse=True,
        return_mask=True,
    )  # fmt: skip
    want = prism_cuda.sparse_attention_varlen(
        made.q, made.k, made.v, bits, counts, **where, **made.scales,
        block_size=config.block_sizes, return_lse=True,
    )  # fmt: skip
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])
    unscaled = prism_cuda.prefill_varlen(made.q, made.k, made.v, **where, config=config)
    assert not torch.equal(unscaled, out)


@pytest.mark.parametrize("page_size", [None, 16])
def test_the_grid_refuses_fp8_keys(device: str, page_size: int | None) -> None:
    case = RaggedCase("fp8", ((200, 700),), head_dim=128, page_size=page_size)
    made = ragged_inputs(case, torch.bfloat16, device, kv_dtype=fp8.FP8)
    with pytest.raises(RuntimeError, match="prism::prefill: k has dtype Float8_e4m3fn.*'grid'"):
        call.prefill(made.q, made.k, made.v, "grid", 0.9, **made.where())
    with pytest.raises(RuntimeError, match="prism::select_grid: k has dtype Float8_e4m3fn"):
        call.select_grid(made.q, made.k, 0.9, **made.where())


def test_ops_are_registered_for_fp8(device: str) -> None:
    case = make(AttentionCase("sample", 130, 200, q_heads=4), torch.bfloat16, device)
    torch.library.opcheck(
        torch.ops.prism.sparse_attention.default,
        case.op_arguments(),
        case.settings | fp8.scales(2, device),
        test_utils="test_faketensor",  # the other compares fp8 arguments, which torch cannot
    )


def test_dispatch_by_head_dim() -> None:
    def kernel(head_dim: int, **options: bool) -> str:
        return torch.ops.prism.attention_kernel(90, torch.bfloat16, head_dim, fp8=True, **options)

    if torch.ops.prism.attention_kernel(90, torch.bfloat16, 128) != "sm90":
        pytest.skip("built without sm_90a")
    assert [kernel(d) for d in (64, 96, 128, 192, 256)] == ["sm90"] * 3 + ["sm80"] * 2
    assert kernel(128, score_options=True) == "sm80"
