"""prism::estimate_grid_varlen against estimate_grid of every sequence by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import B128_64
from helpers.params import case_params, device_dtype_params, needs_cuda
from helpers.ragged import LENGTHS, RaggedCase, ragged_inputs
from helpers.ragged_estimation import GRID

import prism_cuda  # noqa: F401  registers the ops

# Chunks that begin inside a block, and rows of more than one mask word.
LONGER = (*LENGTHS, (77, 1500), (129, 4200), (333, 1000))
B64 = (64, 64)

CASES = {
    "packed": (
        RaggedCase("d64"),
        RaggedCase("d128", head_dim=128),
        RaggedCase("d128_longer", LONGER, head_dim=128),
        RaggedCase("b128_64", LONGER, blocks=B128_64),
        RaggedCase("b64_d128", LONGER, head_dim=128, blocks=B64),
        RaggedCase("bidirectional", LONGER, causal=False),
        RaggedCase("unused_rows", LONGER, unused=37),
        RaggedCase("slack", LONGER, slack=(700, 30000)),
        RaggedCase("odd_stride", LONGER, odd_stride=True),
        RaggedCase("one_kv_head", LONGER, q_heads=5, kv_heads=1),
        RaggedCase("many_sequences", ((3, 40), (0, 9), (17, 17)) * 23, q_heads=2),
        # Masses of a row that do not fit shared memory.
        RaggedCase("long_row", ((5, 300), (40, 70000)), 1, 1),
        *(RaggedCase(f"d{n}", LONGER, head_dim=n) for n in (8, 56, 80, 96)),
        RaggedCase("d96_odd_stride", LONGER, head_dim=96, odd_stride=True, blocks=B64),
    ),
    "paged": (
        *(RaggedCase(f"page_{n}", LONGER, page_size=n) for n in (1, 2, 8, 16, 64, 256)),
        RaggedCase("page_8_d128_b64", LONGER, page_size=8, head_dim=128, blocks=B64),
        RaggedCase("page_256_d128", LONGER, page_size=256, head_dim=128),
        RaggedCase("page_16_d96", LONGER, page_size=16, head_dim=96),
        RaggedCase("page_4_d80_odd_stride", LONGER, page_size=4, head_dim=80, odd_stride=True),
        RaggedCase("shared_prefix", LONGER, page_size=16, shared=True),
        RaggedCase("heads_first", LONGER, page_size=32, heads_first=True, head_dim=128),
        RaggedCase("slack", LONGER, page_size=64, slack=(300, 9000), causal=False),
    ),
}
SANITIZER_CASES = (
    "packed-b64_d128",
    "packed-odd_stride",
    "packed-d96",
    "packed-many_sequences",
    "paged-page_1",
    "paged-page_64",
    "paged-heads_first",
)


@pytest.mark.parametrize("case", case_params(CASES, SANITIZER_CASES))
@pytest.mark.parametrize(("on", "dtype"), device_dtype_params())
def test_a_sequence_keeps_what_it_keeps_alone(
    case: RaggedCase, on: str, dtype: torch.dtype
) -> None:
    if on == "cuda":
        needs_cuda()
    GRID.check(ragged_inputs(case, dtype, on))


@pytest.mark.parametrize(
    "rules",
    [
        {"top_p": 1.0},
        {"top_p": 0.0, "keep_above": None, "keep_sink": 0, "keep_recent": 0},
        {"top_p": 0.5, "keep_above": None, "scale": 0.7},
        {"top_p": 0.9, "keep_sink": 3},
    ],
)
@pytest.mark.parametrize("page_size", [None, 16])
def test_rules(device: str, rules: dict[str, Any], page_size: int | None) -> None:
    case = RaggedCase("rules", LONGER, page_size=page_size, slack=(300, 300))
    GRID.check(ragged_inputs(case, torch.bfloat16, device), **rules)


@pytest.mark.parametrize("page_size", [None, 64])
@pytest.mark.parametrize("heads", [1, 16])
def test_more_than_1024_key_blocks(cuda: str, heads: int, page_size: int | None) -> None:
    lengths = ((300, 70001), (64, 64), (0, 0), (129, 3000), (1, 0), (2049, 2100))
    case = RaggedCase("long", lengths, heads, 1, blocks=B64, page_size=page_size)
    inputs = ragged_inputs(case, torch.bfloat16, cuda)
    GRID.check(inputs)
    GRID.check(inputs, top_p=1.0)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_tiles_than_fit_at_a_time(cuda: str, head_dim: int) -> None:
    """Thread blocks go from tiles of one sequence to those of others, more than 32 further."""
    lengths = ((2500, 2500), (1, 1), (0, 5), (700, 2100)) * 20
    case = RaggedCase("tiles", lengths, 8, 2, head_dim=head_dim)
    GRID.check(ragged_inputs(case, torch.bfloat16, cuda))


def test_wide_heads_are_refused(device: str) -> None:
    case = ragged_inputs(RaggedCase("wide", ((5, 9),), head_dim=136), torch.bfloat16, device)
    GRID.refuse(GRID.arguments_of(case), r"\bq has head_dim 136.*grid.*128")
