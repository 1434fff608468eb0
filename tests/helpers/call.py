"""The ops with one number where they take a list, as the oracle has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Number = float | Sequence[float]


def listed(values: Number | None) -> list[float] | None:
    if values is None:
        return None
    return list(values) if isinstance(values, Sequence) else [values]


def select_bands(
    q: Tensor,
    k: Tensor | None,
    high_band: list[int],
    low_band: list[int],
    top_p: Number,
    *,
    keep_above: Number | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    return torch.ops.prism.select_bands(
        q, k, high_band, low_band, listed(top_p), listed(keep_above), **options
    )


def select_grid(
    q: Tensor, k: Tensor | None, top_p: Number, *, keep_above: Number | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    return torch.ops.prism.select_grid(q, k, listed(top_p), listed(keep_above), **options)


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    estimator: str,
    top_p: Number,
    *,
    high_band: Sequence[int] = (),
    low_band: Sequence[int] = (),
    keep_above: Number | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.prism.prefill(
        q, k, v, estimator, list(high_band), list(low_band), listed(top_p), listed(keep_above),
        **options,
    )  # fmt: skip
