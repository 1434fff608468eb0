"""prism::pool_cells_, and prism::select_grid from keys pooled as they come."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import call, inputs, oracle
from helpers.build import structured_batch
from helpers.cases import SelectCase
from helpers.compare import check_selection
from helpers.poison import poisoned_allocations

import prism_cuda  # noqa: F401  registers the ops

ROUNDING = 2.0**-11  # of float16
CUTS = {
    "one call": (500,),
    "cells": (160, 16, 320, 4),
    "odd": (100, 1, 60, 2, 333, 4),
}
Cells = tuple[torch.Tensor, torch.Tensor]


def empty_cells(k: torch.Tensor, tokens: int | None = None) -> Cells:
    """Room for the cells of `tokens`, full of NaN."""
    batch, heads, length, head_dim = k.shape
    cells = oracle.ceil_div(length if tokens is None else tokens, oracle.CELL)
    options: dict[str, Any] = {"device": k.device, "fill_value": math.nan}
    return (
        torch.full((batch, heads, cells, 2 * head_dim), dtype=torch.half, **options),
        torch.full((batch, heads, cells), dtype=torch.float32, **options),
    )


def pool(k: torch.Tensor, cuts: tuple[int, ...] | None = None, tokens: int | None = None) -> Cells:
    """The cells of k, given in pieces; an unfinished cell is given again with the next piece."""
    cells = empty_cells(k, tokens)
    start = end = 0
    for size in cuts or (k.shape[2],):
        end += size
        torch.ops.prism.pool_cells_(k[:, :, start:end], *cells, start)
        start = end - end % oracle.CELL
    assert end == k.shape[2]
    return cells


def from_cells(q: torch.Tensor, cells: Cells, k_len: int, top_p: float, **rules: Any) -> Cells:
    return call.select_grid(
        q, None, top_p, k_cells=cells[0], k_factors=cells[1], k_len=k_len, **rules
    )


def statistics(k: torch.Tensor) -> torch.Tensor:
    """Float64 means and standard deviations of k's cells."""
    cells = k.double().split(oracle.CELL, 2)
    means = torch.stack([cell.mean(2) for cell in cells], 2)
    spreads = torch.stack([cell.std(2, unbiased=False) for cell in cells], 2)
    return torch.cat([means, spreads], -1)


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
@pytest.mark.parametrize(
    ("head_dim", "length"),
    [
        (64, 16),
        (64, 1),
        (64, 515),
        pytest.param(128, 100, marks=pytest.mark.sanitizer),
        (128, 1000),
    ],
)
def test_cells_hold_mean_and_spread(device: str, head_dim: int, length: int, layout: str) -> None:
    k = (
        inputs.tensor((2, 3, length, head_dim), torch.bfloat16, device, seed=1, layout=layout) * 5
        + 1
    )
    cells, factors = pool(k)
    want = statistics(k)
    got = cells.double() * factors.double().unsqueeze(-1)
    largest = want.abs().amax(-1, keepdim=True)
    # Half a unit of float16, and float32's errors.
    bound = 1.001 * ROUNDING * want.abs() + 2.0**-20 * largest
    assert ((got - want).abs() <= bound).all()


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e4])
def test_a_power_of_two_carries_any_magnitude(device: str, scale: float) -> None:
    k = inputs.tensor((1, 2, 64, 64), torch.bfloat16, device, seed=1) * scale
    cells, factors = pool(k)
    assert cells.isfinite().all()
    mantissa, _ = torch.frexp(factors)
    assert (mantissa == 0.5).all(), "factors are powers of two"
    want = statistics(k)
    got = cells.double() * factors.double().unsqueeze(-1)
    largest = want.abs().amax(-1, keepdim=True)
    assert ((got - want).abs() <= 1.001 * ROUNDING * want.abs() + 2.0**-20 * largest + 1e-45).all()


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_however_it_is_cut_the_cells_are_the_same(device: str, cuts: tuple[int, ...]) -> None:
    k = inputs.tensor((2, 2, 500, 64), torch.bfloat16, device, seed=1)
    whole, pieces = pool(k), pool(k, cuts)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


@pytest.mark.sanitizer
def test_only_the_given_cells_are_written(device: str) -> None:
    k = inputs.tensor((1, 2, 40, 64), torch.bfloat16, device, seed=1)
    cells, factors = empty_cells(k, 200)
    torch.ops.prism.pool_cells_(k, cells, factors, 48)
    assert cells[:, :, 3:6].isfinite().all()
    assert factors[:, :, 3:6].isfinite().all()
    for untouched in (slice(0, 3), slice(6, None)):
        assert cells[:, :, untouched].isnan().all()
        assert factors[:, :, untouched].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_cell_that_is_not_finite_is_marked(device: str, bad: float) -> None:
    k = inputs.tensor((1, 1, 48, 64), torch.bfloat16, device, seed=1)
    k[0, 0, 20, 3] = bad
    cells, factors = pool(k)
    assert factors.isnan().tolist() == [[[False, True, False]]]
    assert cells[0, 0, 1].eq(0).all()


CASES = [
    pytest.param(
        SelectCase("ragged", 300, 500, batch=2, q_heads=4, kv_heads=2),
        marks=pytest.mark.sanitizer,
        id="ragged",
    ),
    pytest.param(SelectCase("d128", 256, 2100, head_dim=128, blocks=(128, 64)), id="d128"),
    pytest.param(SelectCase("bidirectional", 200, 333, causal=False), id="bidirectional"),
    pytest.param(SelectCase("q_longer", 400, 200, blocks=(128, 128)), id="q_longer"),
]


def rules_of(case: SelectCase, **changes: Any) -> dict[str, Any]:
    blocks = {"q_block_size": case.blocks[0], "k_block_size": case.blocks[1]}
    return blocks | {"causal": case.causal, "keep_above": 0.02} | changes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spare", [0, 77])
def test_selects_what_it_selects_from_k(case: SelectCase, spare: int, device: str) -> None:
    q, k = (x.bfloat16() for x in structured_batch(case, device, 0))
    cells = pool(k, tokens=case.k_len + spare)
    rules = rules_of(case)
    with poisoned_allocations():
        bits, counts = from_cells(q, cells, case.k_len, 0.8, **rules)
    if device == "cuda":
        want = call.select_grid(q, k, 0.8, **rules)
        assert torch.equal(bits, want[0])
        assert torch.equal(counts, want[1])
    else:  # where cells of k are not rounded to float16
        k_blocks = oracle.ceil_div(case.k_len, case.blocks[1])
        keep = oracle.unpack_bits(bits, k_blocks)
        check_selection(keep, oracle.select_grid(q, k, 0.8, rounding=ROUNDING, **rules))
        assert torch.equal(keep.sum(-1).int(), counts)


def test_cells_of_some_heads_need_no_copy(device: str) -> None:
    case = SelectCase("heads", 128, 300, q_heads=4, kv_heads=4)
    q, k = (x.bfloat16() for x in structured_batch(case, device, 0))
    cells, factors = pool(k)
    want = from_cells(q, (cells, factors), 300, 0.7, **rules_of(case))
    for head in range(4):
        some = slice(head, head + 1)
        got = from_cells(q[:, some], (cells[:, some], factors[:, some]), 300, 0.7, **rules_of(case))
        assert torch.equal(got[0], want[0][:, some])
        assert torch.equal(got[1], want[1][:, some])


def test_no_keys_select_nothing(device: str) -> None:
    q = inputs.tensor((1, 2, 100, 64), torch.bfloat16, device, seed=1)
    cells = empty_cells(q, 64)
    bits, counts = from_cells(q, cells, 0, 0.9)
    assert bits.shape == (1, 2, 1, 0)
    assert counts.tolist() == [[[0], [0]]]
