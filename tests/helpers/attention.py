"""Attention of any layout and dtype of keys against float64."""

from __future__ import annotations

import torch

from helpers.build import AttentionInputs, attention_inputs
from helpers.cases import AttentionCase
from helpers.compare import check_attention
from helpers.ragged import RaggedCase, RaggedInputs, ragged_inputs


def inputs_of(
    case: AttentionCase | RaggedCase,
    dtype: torch.dtype,
    device: str,
    kv_dtype: torch.dtype | None = None,
) -> AttentionInputs | RaggedInputs:
    make = ragged_inputs if isinstance(case, RaggedCase) else attention_inputs
    return make(case, dtype, device, kv_dtype=kv_dtype)  # type: ignore[arg-type]


def check(made: AttentionInputs | RaggedInputs) -> None:
    out, lse = made.run()
    assert out.dtype == made.q.dtype
    assert out.stride() == torch.empty_like(made.q).stride()
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    check_attention(*made.by_head(out, lse), *made.expected())
