"""prism::sparse_attention against dense float64 attention under the expanded mask.

The cases of all layouts; what only ragged batches can show is in test_ragged_attention.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import inputs, oracle
from helpers.attention import check, inputs_of
from helpers.build import attention_inputs
from helpers.cases import ATTENTION_GROUPS, B128, B128_64, AttentionCase
from helpers.compare import assert_repeats, assert_same, check_attention, check_elements
from helpers.params import case_params, device_dtype_params, needs_cuda
from helpers.ragged import RAGGED_GROUPS
from hypothesis import given, settings
from hypothesis import strategies as st

import prism_cuda  # noqa: F401  registers the ops

SANITIZER_CASES = (
    "regular-b64_d64",
    "regular-b128_d128",
    "regular-b128_64_d128",
    "regular-full_attention",
    "ragged-one_over",
    "ragged-odd_d128",
    "strided-odd_stride_d128",
    "strided-packed_qkv",
    "gqa-ratio_3",
    "empty-alternating_rows",
    "prefix-offset_63_d128",
    "prefix-decode",
    "q_longer-by_37",
    "tiny-one_token",
    "head_dim_256-b128_64",
    "head_dim_256-b64",
    "many_tiles-every_other_empty",
    "many_tiles-rising_d128",
    "scores-softcap_1_d128",
    "scores-softcap_d256",
    "windows-0_d128_b128",
    "windows-64_d256_b128",
    "windows-127_d64_b128",
    "windows-300_d128_b128",
    "windows-sparse_b64_d64",
    "windows-softcap",
    "packed-b128_64_d128",
    "packed-b64_d128",
    "packed-unused_rows",
    "packed-odd_stride",
    "packed-empty_rows",
    "paged-page_1",
    "paged-page_16_d128",
    "paged-page_256_d256",
    "paged-shared_prefix",
    "packed-window_0_d256",
    "paged-window_page_16_d128",
)
GROUPS: dict[str, tuple[Any, ...]] = ATTENTION_GROUPS | RAGGED_GROUPS


@pytest.mark.parametrize("case", case_params(GROUPS, SANITIZER_CASES))
@pytest.mark.parametrize(("on", "dtype"), device_dtype_params())
def test_matches_float64(case: Any, on: str, dtype: torch.dtype) -> None:
    if on == "cuda":
        needs_cuda()
    check(inputs_of(case, dtype, on))


def test_float16_on_cpu_matches_float64() -> None:
    check(attention_inputs(AttentionCase("float16", 200, 200), torch.float16, "cpu"))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("blocks", [B128, B128_64])
def test_all_true_mask_equals_dense_attention(
    device: str, causal: bool, blocks: tuple[int, int]
) -> None:
    q_len, k_len, head_dim = 300, 377, 128
    case = attention_inputs(
        AttentionCase("dense", q_len, k_len, q_heads=4, head_dim=head_dim, blocks=blocks,
                      causal=causal, mask="full"),
        torch.bfloat16,
        device,
    )  # fmt: skip
    out, _ = case.run()
    seen = torch.ones(q_len, k_len, dtype=torch.bool, device=device)
    dense = torch.nn.functional.scaled_dot_product_attention(
        case.q.double(),
        case.k.double().repeat_interleave(2, dim=1),
        case.v.double().repeat_interleave(2, dim=1),
        attn_mask=seen.tril(k_len - q_len) if causal else seen,
    )
    bound = 1.5 * 2.0**-8 * case.v.abs().amax().item()
    check_elements("out", out, dense, bound)


def test_rows_that_see_nothing_are_zero_and_minus_infinity(device: str) -> None:
    case = attention_inputs(
        AttentionCase("blind", 300, 200, mask="one_row_empty", blocks=(64, 64)),
        torch.bfloat16,
        device,
    )
    out, lse = case.run()
    blind = torch.zeros(300, dtype=torch.bool)
    blind[:100] = True  # before the first key
    blind[128:192] = True  # the query block without key blocks
    assert torch.equal(lse[0, 0].cpu() == -math.inf, blind)
    assert (out[:, :, blind.to(device)] == 0).all()
    assert torch.isfinite(out).all()


def test_blocks_after_the_diagonal_change_nothing(device: str) -> None:
    case = attention_inputs(AttentionCase("full", 300, 337, mask="full"), torch.bfloat16, device)
    visible = attention_inputs(
        AttentionCase("visible", 300, 337, mask="visible"), torch.bfloat16, device
    )
    assert not torch.equal(case.counts, visible.counts)
    assert_same(case.run(), visible.run())


def test_unkept_blocks_are_never_read_into_the_result(device: str) -> None:
    case = attention_inputs(
        AttentionCase("nan", 256, 256, mask="alternating_empty"), torch.bfloat16, device
    )
    case.mask[..., 1] = False
    case.bits, case.counts = oracle.pack_bits(case.mask)
    expected = case.run()
    case.k[:, :, 64:128] = torch.nan
    case.v[:, :, 64:128] = torch.nan
    assert_same(case.run(), expected)


def test_keys_beyond_a_ragged_end_are_never_read_into_the_result(device: str) -> None:
    case = attention_inputs(
        AttentionCase("ragged", 150, 150, mask="full", causal=False), torch.bfloat16, device
    )
    expected = case.run()
    for name in ("k", "v"):
        x = getattr(case, name)
        longer = torch.full((1, 2, 256, 64), torch.nan, dtype=x.dtype, device=device)
        longer[:, :, :150] = x
        setattr(case, name, longer[:, :, :150])
    assert_same(case.run(), expected)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("blocks", [B128, B128_64])
def test_key_blocks_before_the_window_are_never_read(
    cuda: str, blocks: tuple[int, int], head_dim: int
) -> None:
    case = attention_inputs(
        AttentionCase("nan", 100, 700, mask="full", blocks=blocks, head_dim=head_dim,
                      window_left=150),
        torch.bfloat16,
        cuda,
    )  # fmt: skip
    expected = case.run()
    case.k[:, :, :384] = torch.nan  # the first row sits at 600
    case.v[:, :, :384] = torch.nan
    assert_same(case.run(), expected)


def test_nan_value_reaches_every_row_that_sees_it_and_no_other_query_block(device: str) -> None:
    case = attention_inputs(
        AttentionCase("nan", 200, 200, mask="visible", blocks=B128), torch.bfloat16, device
    )
    case.v[0, 1, 150, 7] = torch.nan
    out, lse = case.run()
    unusual = torch.isnan(out)
    assert unusual[0, 1, 150:, 7].all()
    unusual[0, 1, 128:, 7] = False  # masked keys of a kept block may weigh in as 0 * NaN
    assert not unusual.any()
    assert torch.isfinite(lse).all()


def test_layouts_are_bit_identical(device: str) -> None:
    case = attention_inputs(
        AttentionCase("layouts", 150, 187, batch=2, q_heads=4), torch.bfloat16, device
    )
    expected = case.run()
    q, k, v = case.q, case.k, case.v
    for layout in inputs.LAYOUTS:
        case.q, case.k, case.v = (inputs.lay_out(x, layout, device) for x in (q, k, v))
        for got, want in zip(case.run(), expected, strict=True):
            assert torch.equal(got, want), layout


def test_kv_heads_of_stride_zero_are_read_in_place(device: str) -> None:
    case = attention_inputs(
        AttentionCase("expanded", 150, 150, q_heads=4, kv_heads=1), torch.bfloat16, device
    )
    case.k, case.v = (x.expand(1, 4, 150, 64) for x in (case.k, case.v))
    check(case)


def test_overlapping_queries_get_an_output_of_their_own(device: str) -> None:
    # Rows of q that share memory: an output of q's strides could not hold one row each.
    case = attention_inputs(AttentionCase("overlap", 200, 200), torch.bfloat16, device)
    heads, length, head_dim = case.q.shape[1:]
    case.q = case.q.as_strided(case.q.shape, (heads * 512, 512, 1, 1))
    assert length + head_dim <= 512
    out, _ = case.run()
    assert out.is_contiguous()
    expected, _ = replace(case, q=case.q.contiguous()).run()
    assert torch.equal(out, expected)


def test_environment_picks_the_portable_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel() -> str:
        return torch.ops.prism.attention_kernel(90, torch.bfloat16, 128)

    if kernel() != "sm90":
        pytest.skip("built without sm_90a")
    monkeypatch.setenv("PRISM_PORTABLE_ATTENTION", "1")
    assert kernel() == "sm80"


def test_repeats_are_bit_identical(device: str) -> None:
    case = attention_inputs(
        AttentionCase("repeat", 500, 500, q_heads=4, blocks=B128, head_dim=128),
        torch.bfloat16,
        device,
    )
    assert_repeats(case.run)


LENGTHS = st.integers(0, 200)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    q_len=LENGTHS,
    k_len=LENGTHS,
    kv_heads=st.integers(1, 2),
    ratio=st.integers(1, 3),
    head_dim=st.sampled_from([64, 128, 256]),
    blocks=st.sampled_from([(64, 64), (128, 64), (128, 128)]),
    causal=st.booleans(),
    layout=st.sampled_from(inputs.LAYOUTS),
    mask=st.sampled_from(["full", "random", "last_only", "alternating_empty"]),
    window_left=st.none() | st.integers(0, 210),
    softcap=st.sampled_from([None, 1.0, 50.0]),
)
@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_any_shape_matches_float64(
    on: str,
    q_len: int,
    k_len: int,
    kv_heads: int,
    ratio: int,
    head_dim: int,
    blocks: tuple[int, int],
    causal: bool,
    layout: str,
    mask: str,
    window_left: int | None,
    softcap: float | None,
) -> None:
    if on == "cuda":
        needs_cuda()
    case = AttentionCase(
        "drawn", q_len, k_len, q_heads=kv_heads * ratio, kv_heads=kv_heads, head_dim=head_dim,
        blocks=blocks, causal=causal, layout=layout, mask=mask, window_left=window_left,
        softcap=softcap,
    )  # fmt: skip
    check(attention_inputs(case, torch.bfloat16, on))


@pytest.mark.parametrize(
    ("length", "head_dim", "blocks"),
    [
        (8192, 128, (128, 128)),
        (8192, 64, (64, 64)),
        (8192 - 77, 128, (128, 64)),
        (8192, 64, (128, 128)),
        (8192, 256, (128, 128)),
        (8192 - 77, 256, (128, 64)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_input_matches_float64(
    cuda: str, dtype: torch.dtype, length: int, head_dim: int, blocks: tuple[int, int]
) -> None:
    check(
        attention_inputs(
            AttentionCase("long", length, length, q_heads=4, kv_heads=2, head_dim=head_dim,
                          blocks=blocks, layout="length_first"),
            dtype,
            cuda,
        )
    )  # fmt: skip


@pytest.mark.parametrize("length_first", [True, False])
def test_offsets_beyond_32_bits(cuda: str, length_first: bool) -> None:
    length, heads, dim, block = (1 << 20) - 128, 32, 128, 128
    if torch.cuda.mem_get_info()[0] < 44 << 30:
        pytest.skip("needs 44 GiB of free GPU memory")
    shape = (1, length, heads, dim) if length_first else (1, heads, length, dim)

    def draw() -> torch.Tensor:
        x = torch.empty(shape, device=cuda, dtype=torch.bfloat16).normal_()
        return x.transpose(1, 2) if length_first else x

    q, k, v = draw(), draw(), draw()
    assert q.stride(1) * (heads - 1) + q.stride(2) * (length - 1) > 1 << 31
    blocks = length // block
    rows = torch.arange(blocks, device=cuda)
    diagonal = torch.ones_like(rows) << (rows % 32)
    bits = torch.zeros(1, heads, blocks, oracle.ceil_div(blocks, 32), device=cuda).long()
    bits[:, :, rows, rows // 32] = diagonal
    bits[..., 0] |= 1
    bits = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int()
    counts = torch.where(rows == 0, 1, 2).int().expand(1, heads, blocks).contiguous()
    sizes = (None, True, block, block)  # scale, causal, blocks
    out, lse = torch.ops.prism.sparse_attention(q, k, v, bits, counts, *sizes)
    for head in (0, heads - 1):
        for row in (1, blocks // 2, blocks - 1):
            of_row = slice(row * block, (row + 1) * block)
            part = [x[:, head : head + 1] for x in (q, k, v)]
            keys, vals = (torch.cat([x[:, :, :block], x[:, :, of_row]], 2) for x in part[1:])
            mask = torch.ones(1, 1, 1, 2, dtype=torch.bool, device=cuda)
            arguments = (part[0][:, :, of_row], keys, vals, mask)
            options: dict[str, Any] = {"q_block_size": block, "k_block_size": block, "causal": True}
            check_attention(
                out[:, head : head + 1, of_row],
                lse[:, head : head + 1, of_row],
                *oracle.attention_and_plain(*arguments, **options),
            )
