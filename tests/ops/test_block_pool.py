"""prism::block_pool against float64 block means."""

from __future__ import annotations

import pytest
import torch
from helpers import inputs, oracle
from helpers.build import pool_input
from helpers.cases import POOL_GROUPS, PoolCase
from helpers.compare import assert_repeats, check_means
from helpers.params import case_params, device_dtype_params, needs_cuda
from helpers.poison import poisoned_allocations

import prism_cuda  # noqa: F401  registers the ops

SANITIZER_CASES = (
    "regular-b64_d64",
    "regular-b128_d128",
    "ragged-one_over",
    "ragged-odd",
    "strided-odd_stride_d128",
    "strided-packed_qkv_d64",
    "head_dims-d96",
    "head_dims-b128_odd_stride_d200",
    "head_dims-b128_packed_qkv_d256",
    "tiny-length_1",
)


def run(x: torch.Tensor, block_size: int) -> torch.Tensor:
    with poisoned_allocations():
        return torch.ops.prism.block_pool(x, block_size)


def check(x: torch.Tensor, block_size: int) -> None:
    means = run(x, block_size)
    assert means.dtype == torch.float32
    assert means.is_contiguous()
    check_means(
        means, oracle.block_means(x, block_size), oracle.block_means(x.double().abs(), block_size)
    )


@pytest.mark.parametrize("case", case_params(POOL_GROUPS, SANITIZER_CASES))
@pytest.mark.parametrize(("on", "dtype"), device_dtype_params())
def test_means_match_float64(case: PoolCase, on: str, dtype: torch.dtype) -> None:
    if on == "cuda":
        needs_cuda()
    check(pool_input(case, dtype, on), case.block_size)


def test_float16_on_cpu_matches_float64() -> None:
    check(inputs.tensor((1, 2, 200, 64), torch.float16, "cpu", seed=5), 64)


def test_heads_of_stride_zero_are_read_in_place(device: str) -> None:
    x = inputs.tensor((2, 1, 130, 64), torch.bfloat16, device, seed=6).expand(2, 4, 130, 64)
    check(x, 64)


def test_nan_stays_in_its_block_and_dimension(device: str) -> None:
    x = inputs.tensor((1, 2, 300, 64), torch.bfloat16, device, seed=7)
    x[0, 1, 130, 5] = torch.nan
    x[0, 0, 299, 63] = torch.inf
    means = run(x, 128)
    unusual = ~torch.isfinite(means)
    assert unusual.nonzero().tolist() == [[0, 0, 2, 63], [0, 1, 1, 5]]
    assert means[0, 0, 2, 63] == torch.inf


def test_repeats_are_bit_identical(device: str) -> None:
    x = inputs.tensor((2, 3, 333, 128), torch.bfloat16, device, seed=8, layout="length_first")
    assert_repeats(lambda: run(x, 128))


def test_layouts_are_bit_identical(device: str) -> None:
    x = inputs.tensor((2, 3, 333, 64), torch.bfloat16, device, seed=9)
    expected = run(x, 64)
    for layout in inputs.LAYOUTS:
        assert torch.equal(run(inputs.lay_out(x, layout, device), 64), expected), layout


@pytest.mark.parametrize("head_dim", [96, 256])
def test_layouts_of_other_head_dims_are_bit_identical(device: str, head_dim: int) -> None:
    x = inputs.tensor((2, 3, 333, head_dim), torch.bfloat16, device, seed=10)
    expected = run(x, 64)
    for layout in inputs.LAYOUTS:
        assert torch.equal(run(inputs.lay_out(x, layout, device), 64), expected), layout


@pytest.mark.parametrize("block_size", [64, 128])
def test_long_input_matches_float64(cuda: str, block_size: int) -> None:
    x = torch.randn(2, 8192 + 77, 4, 128, device=cuda, dtype=torch.bfloat16).transpose(1, 2)
    check(x, block_size)


@pytest.mark.parametrize("length_first", [True, False])
def test_offsets_beyond_32_bits(cuda: str, length_first: bool) -> None:
    length, heads, dim = (1 << 20) + 3, 32, 128
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    shape = (1, length, heads, dim) if length_first else (1, heads, length, dim)
    x = torch.empty(shape, device=cuda, dtype=torch.bfloat16).normal_()
    x = x.transpose(1, 2) if length_first else x
    assert x.stride(1) * (heads - 1) + x.stride(2) * (length - 1) > 1 << 31
    means = run(x, 128)
    for part in (slice(0, 512), slice(length // 2 // 128 * 128, length // 2 // 128 * 128 + 512)):
        blocks = slice(part.start // 128, part.stop // 128)
        rows = x[:, :, part]
        check_means(
            means[:, :, blocks],
            oracle.block_means(rows, 128),
            oracle.block_means(rows.double().abs(), 128),
        )
    rows = x[:, :, length // 128 * 128 - 256 :]
    check_means(
        means[:, :, -3:],
        oracle.block_means(rows, 128),
        oracle.block_means(rows.double().abs(), 128),
    )
