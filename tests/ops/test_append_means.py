"""prism::append_means_: bit for bit block_pool over all tokens, however they were cut."""

from __future__ import annotations

import pytest
import torch
from helpers import inputs, oracle
from helpers.compare import check_means
from helpers.right_calls import sum_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import prism_cuda  # noqa: F401  registers the ops

# Chunks of tokens: block after block, single tokens, cuts on and next to blocks' ends, many blocks.
CUTS = {
    "whole": (333,),
    "blocks": (128, 128, 77),
    "one_by_one": (1,) * 70,
    "within_a_block": (3, 5, 7, 11),
    "around_an_end": (63, 1, 1, 62, 2, 126, 129),
    "across_many": (100, 900, 3, 700),
    "empty_chunks": (0, 64, 0, 100, 0),
}


class Appended:
    """State of a growing sequence, its memory poisoned first; `spare` blocks too many."""

    def __init__(self, x: torch.Tensor, block_size: int, spare: int = 2) -> None:
        batch, heads, length, head_dim = x.shape
        blocks = oracle.ceil_div(length, block_size) + spare
        self.means = torch.full(
            (batch, heads, blocks, head_dim), torch.nan, dtype=torch.float32, device=x.device
        )
        self.sums = torch.full(
            (batch, heads, sum_rows(head_dim), head_dim),
            torch.nan,
            dtype=torch.float32,
            device=x.device,
        )
        self.block_size = block_size
        self.length = 0

    def append(self, x: torch.Tensor) -> torch.Tensor:
        """The means of all blocks so far."""
        torch.ops.prism.append_means_(x, self.means, self.sums, self.length, self.block_size)
        self.length += x.shape[2]
        return self.means[:, :, : oracle.ceil_div(self.length, self.block_size)]


def one_shot(x: torch.Tensor, block_size: int) -> torch.Tensor:
    whole = Appended(x, block_size)
    return whole.append(x)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 192, 256])
def test_equals_pooling_all_tokens_so_far(
    device: str, head_dim: int, block_size: int, cuts: tuple[int, ...]
) -> None:
    x = inputs.tensor((2, 3, sum(cuts), head_dim), torch.bfloat16, device, seed=1)
    state = Appended(x, block_size)
    for end, size in zip(torch.tensor(cuts).cumsum(0).tolist(), cuts, strict=True):
        means = state.append(x[:, :, end - size : end])
        so_far = x[:, :, :end]
        assert torch.equal(means, one_shot(so_far, block_size))
        if device == "cuda":  # the CPU's block_pool adds in an order of torch's own
            assert torch.equal(means, torch.ops.prism.block_pool(so_far, block_size))
        check_means(
            means,
            oracle.block_means(so_far, block_size),
            oracle.block_means(so_far.double().abs(), block_size),
        )
    blocks = means.shape[2]
    assert state.means[:, :, blocks:].isnan().all(), "wrote beyond the last block"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_layouts_and_dtypes_give_the_same_means(
    device: str, head_dim: int, layout: str, dtype: torch.dtype
) -> None:
    x = inputs.tensor((2, 3, 300, head_dim), dtype, device, seed=2)
    state = Appended(x, 64)
    for chunk in inputs.lay_out(x, layout, device).split((70, 130, 100), dim=2):
        means = state.append(chunk)
    assert torch.equal(means, one_shot(x, 64))


@pytest.mark.sanitizer
@pytest.mark.parametrize("head_dim", [96, 128, 256])
def test_cuda_equals_cpu(cuda: str, head_dim: int) -> None:
    x = inputs.tensor((1, 2, 500, head_dim), torch.bfloat16, "cpu", seed=3)
    state, want = Appended(x.to(cuda), 128), Appended(x, 128)
    for chunk in x.split((130, 1, 200, 169), dim=2):
        assert torch.equal(state.append(chunk.to(cuda)).cpu(), want.append(chunk))


def test_nan_stays_in_its_block_and_dimension(device: str) -> None:
    x = inputs.tensor((1, 2, 300, 64), torch.bfloat16, device, seed=4)
    x[0, 1, 130, 5] = torch.nan
    state = Appended(x, 64)
    for chunk in x.split(90, dim=2):
        means = state.append(chunk)
    assert means.isnan().nonzero().tolist() == [[0, 1, 2, 5]]


def test_float32_on_cpu() -> None:
    x = inputs.tensor((1, 2, 200, 64), torch.float32, "cpu", seed=5)
    state = Appended(x, 64)
    for chunk in x.split(70, dim=2):
        means = state.append(chunk)
    assert torch.equal(means, one_shot(x, 64))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 300), min_size=1, max_size=6), block=st.sampled_from([64, 128]))
def test_any_cuts_equal_one_shot(cuts: list[int], block: int) -> None:
    x = inputs.tensor((1, 2, sum(cuts), 64), torch.bfloat16, "cpu", seed=6)
    state = Appended(x, block)
    for chunk in x.split(cuts, dim=2):
        means = state.append(chunk)
    assert torch.equal(means, one_shot(x, block))


def test_graph_replay_appends_the_same_chunk_again(cuda: str) -> None:
    """Nothing is read back by the host, and a chunk can be put in its place twice."""
    x = inputs.tensor((1, 4, 700, 128), torch.bfloat16, cuda, seed=7)
    state = Appended(x, 128)
    state.append(x[:, :, :500])
    chunk = x[:, :, 512:].contiguous()
    state.append(x[:, :, 500:512])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.prism.append_means_(chunk, state.means, state.sums, 512, 128)
    for _ in range(2):
        graph.replay()
    assert torch.equal(state.means[:, :, :6], torch.ops.prism.block_pool(x, 128))
