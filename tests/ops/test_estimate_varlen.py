"""prism::estimate_blocks_varlen against estimate_blocks of every sequence by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import B128_64
from helpers.params import case_params, device_dtype_params, needs_cuda
from helpers.ragged import LENGTHS, RaggedCase, ragged_inputs
from helpers.ragged_estimation import BLOCKS

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
        *(RaggedCase(f"d{n}", LONGER, head_dim=n) for n in (56, 80, 96, 192, 256)),
        RaggedCase("d96_odd_stride", LONGER, head_dim=96, odd_stride=True, blocks=B64),
        # The sums behind a temperature are cut elsewhere from 129 blocks on.
        RaggedCase("energy_chunks", ((8192, 8192), (8193, 8193), (1, 1)), 1, 1, blocks=B64),
    ),
    "paged": (
        *(RaggedCase(f"page_{n}", LONGER, page_size=n) for n in (1, 16, 64, 256)),
        RaggedCase("page_8_d128_b64", LONGER, page_size=8, head_dim=128, blocks=B64),
        RaggedCase("page_256_d128", LONGER, page_size=256, head_dim=128),
        RaggedCase("page_16_d96", LONGER, page_size=16, head_dim=96),
        RaggedCase("page_64_d256_b64", LONGER, page_size=64, head_dim=256, blocks=B64),
        RaggedCase("page_4_d192_odd_stride", LONGER, page_size=4, head_dim=192, odd_stride=True),
        RaggedCase("shared_prefix", LONGER, page_size=16, shared=True),
        RaggedCase("heads_first", LONGER, page_size=32, heads_first=True, head_dim=128),
    ),
}
SANITIZER_CASES = (
    "packed-b64_d128",
    "packed-odd_stride",
    "packed-d96",
    "paged-page_1",
    "paged-page_64_d256_b64",
    "paged-heads_first",
)


@pytest.mark.parametrize("case", case_params(CASES, SANITIZER_CASES))
@pytest.mark.parametrize(("on", "dtype"), device_dtype_params())
def test_a_sequence_keeps_what_it_keeps_alone(
    case: RaggedCase, on: str, dtype: torch.dtype
) -> None:
    if on == "cuda":
        needs_cuda()
    BLOCKS.check(ragged_inputs(case, dtype, on))


@pytest.mark.parametrize(
    "rules",
    [
        {"top_p": 1.0},
        {"top_p": 0.0, "keep_above": None, "keep_sink": 0, "keep_recent": 0},
        {"top_p": 0.5, "high_band": []},
        {"top_p": 0.9, "low_band": [], "keep_sink": 3},
    ],
)
@pytest.mark.parametrize("page_size", [None, 16])
def test_rules(device: str, rules: dict[str, Any], page_size: int | None) -> None:
    case = RaggedCase("rules", LONGER, page_size=page_size, slack=(300, 300))
    BLOCKS.check(ragged_inputs(case, torch.bfloat16, device), **rules)


@pytest.mark.parametrize("page_size", [None, 64])
@pytest.mark.parametrize("heads", [1, 16])
def test_more_than_1024_key_blocks(cuda: str, heads: int, page_size: int | None) -> None:
    lengths = ((300, 70001), (64, 64), (0, 0), (129, 3000), (1, 0), (2049, 2100))
    case = RaggedCase("long", lengths, heads, 1, blocks=B64, page_size=page_size)
    inputs = ragged_inputs(case, torch.bfloat16, cuda)
    BLOCKS.check(inputs)
    BLOCKS.check(inputs, top_p=1.0)
