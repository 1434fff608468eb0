"""Which dimensions of a head form the high and the low frequency band.

Pooling a block of B tokens multiplies the RoPE pair that turns by theta_j radians per token with
the normalized Dirichlet kernel (Prism: Spectral-Aware Block-Sparse Attention, arXiv 2602.08426)

    lambda_j(B) = | sin(B * theta_j / 2) / (B * sin(theta_j / 2)) |.

It is near 1 where the pair hardly turns inside a block, and first reaches 0 where the pair makes
one full turn, B * theta_j = 2 * pi. Pairs that turn faster carry only ripple into the block means.

* The **low band** is what survives: it begins after the first cancellation.
* The **high band** covers the cancelled pairs and the transition, where local structure is
  attenuated but present: it ends where lambda_j is back above ``RECOVERED``.

Both limits are rounded up to whole quarters of the rotary dimensions (32 at head_dim 128), and the
bands overlap in the transition zone by at least one quarter. This gives the published 64 / 96 for
Llama-3.1 and Qwen3 at B = 128.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Layout = Literal["half", "interleaved"]
LAYOUTS: tuple[Layout, ...] = ("half", "interleaved")

# A pair attenuated by less than 5 % takes part in the low band at full strength.
RECOVERED = 0.95

MAX_RANGES = 8  # of a band, as the ops take them


@dataclass(frozen=True)
class Bands:
    """Dimensions of the two bands as the ops take them.

    Attributes:
        high_ranges, low_ranges: flattened half-open dimension ranges (start0, end0, start1, ...),
            sorted and disjoint. An empty band takes no part in the selection.
    """

    high_ranges: tuple[int, ...]
    low_ranges: tuple[int, ...]

    @property
    def high(self) -> int:
        """Number of dimensions in the high band."""
        return _width(self.high_ranges)

    @property
    def low(self) -> int:
        """Number of dimensions in the low band."""
        return _width(self.low_ranges)

    @property
    def ranges(self) -> tuple[list[int], list[int]]:
        """The ops' arguments (high_band, low_band)."""
        return list(self.high_ranges), list(self.low_ranges)


def attenuation(inv_freq: float, block_size: int) -> float:
    """lambda_j(B): the factor, in [0, 1], by which pooling shrinks a RoPE pair.

    Args:
        inv_freq: the pair's frequency theta_j, radians per token.
        block_size: tokens pooled together, B.
    """
    sine = math.sin(inv_freq / 2)
    return abs(math.sin(block_size * inv_freq / 2) / (block_size * sine)) if sine else 1.0


def split(
    freq: float | Sequence[float] | torch.Tensor,
    head_dim: int,
    block_size: int = 128,
    layout: Layout = "half",
) -> Bands:
    """Split a head into bands by the attenuation that pooling causes.

    Args:
        freq: the RoPE base theta, or the model's actual inverse frequencies, one per pair, in
            radians per token. Fewer than head_dim / 2 of them mean partial rotary embedding: the
            dimensions after the rotary ones never cancel and belong to the low band.
        head_dim: dimensions of a head.
        block_size: tokens pooled together.
        layout: "half" rotates dimensions (j, j + rotary / 2) together (Llama, Qwen), "interleaved"
            (2j, 2j + 1) (GPT-J).

    Raises:
        ValueError: for a base not above 1, too many frequencies or an unknown layout.
    """
    if isinstance(freq, (int, float)):
        if not freq > 1:
            raise ValueError(f"bands.split: theta is {freq}; expected a number above 1")
        inv_freq = [freq ** (-dim / head_dim) for dim in range(0, head_dim, 2)]
    else:
        inv_freq = freq.tolist() if isinstance(freq, torch.Tensor) else list(freq)
    pairs = len(inv_freq)
    if 2 * pairs > head_dim:
        raise ValueError(
            f"bands.split: inv_freq has {pairs} frequencies; expected at most "
            f"{head_dim // 2}, one per pair of head_dim {head_dim}"
        )

    cancelled = _count_through_last([block_size * theta >= 2 * math.pi for theta in inv_freq])
    attenuated = _count_through_last(
        [attenuation(theta, block_size) < RECOVERED for theta in inv_freq]
    )
    quarter = max(pairs // 4, 1)
    low_start = min(_round_up(cancelled, quarter), pairs)
    if low_start == pairs and 2 * pairs == head_dim:
        low_start = pairs - quarter  # the slowest quarter is the best that is left
    overlap = quarter if cancelled else 0
    high_pairs = min(max(_round_up(attenuated, quarter), low_start + overlap), pairs)
    return from_pairs(high_pairs, pairs - low_start, pairs, head_dim, layout)


def from_dims(high: int, low: int, head_dim: int, layout: Layout = "half") -> Bands:
    """Bands of the ``high`` fastest and ``low`` slowest dimensions of a fully rotary head.

    Raises:
        ValueError: unless both are even, in [0, head_dim], and not both 0.
    """
    for name, dims in (("high", high), ("low", low)):
        if dims % 2 or not 0 <= dims <= head_dim:
            raise ValueError(f"bands: {name} is {dims}; expected an even number in [0, {head_dim}]")
    if high == low == 0:
        raise ValueError("bands: high and low are both 0; at least one band needs dimensions")
    return from_pairs(high // 2, low // 2, head_dim // 2, head_dim, layout)


def checked(bands: Bands, head_dim: int) -> Bands:
    """``bands``, if the ops take them for heads of ``head_dim`` dimensions.

    Raises:
        ValueError: unless the ranges of each band are sorted, disjoint, not empty, within the head
            and at most MAX_RANGES, and one band has any.
    """
    for name, ranges in (("high_ranges", bands.high_ranges), ("low_ranges", bands.low_ranges)):
        starts, ends = ranges[::2], ranges[1::2]
        right = len(starts) == len(ends) <= MAX_RANGES
        previous = 0
        for start, end in zip(starts, ends, strict=False):
            right = right and previous <= start < end <= head_dim
            previous = end
        if not right:
            raise ValueError(
                f"bands: {name} is {ranges}; expected at most {MAX_RANGES} sorted, disjoint, "
                f"non-empty ranges within [0, {head_dim})"
            )
    if not bands.high_ranges and not bands.low_ranges:
        raise ValueError(
            "bands: high_ranges and low_ranges are both empty; at least one band needs dimensions"
        )
    return bands


def from_pairs(
    high_pairs: int, low_pairs: int, pairs: int, head_dim: int, layout: Layout = "half"
) -> Bands:
    """Bands of the first ``high_pairs`` and last ``low_pairs`` of a head's ``pairs`` RoPE pairs.

    Dimensions from 2 * pairs on are not rotated and join the low band.
    """
    return Bands(
        _pair_ranges(0, high_pairs, pairs, head_dim, layout, unrotated=False),
        _pair_ranges(pairs - low_pairs, pairs, pairs, head_dim, layout, unrotated=True),
    )


def _pair_ranges(
    start: int, end: int, pairs: int, head_dim: int, layout: Layout, unrotated: bool
) -> tuple[int, ...]:
    if layout == "half":
        ranges = [(start, end), (pairs + start, pairs + end)]
    elif layout == "interleaved":
        ranges = [(2 * start, 2 * end)]
    else:
        raise ValueError(f"bands: layout is {layout!r}; expected one of {LAYOUTS}")
    if unrotated:
        ranges.append((2 * pairs, head_dim))
    merged: list[int] = []
    for range_start, range_end in ranges:
        if range_start == range_end:
            continue
        if merged and merged[-1] == range_start:
            merged[-1] = range_end
        else:
            merged += [range_start, range_end]
    return tuple(merged)


def _width(ranges: tuple[int, ...]) -> int:
    return sum(ranges[1::2]) - sum(ranges[::2])


def _count_through_last(flags: list[bool]) -> int:
    """Number of elements up to and including the last True one."""
    count = 0
    for index, flag in enumerate(flags):
        if flag:
            count = index + 1
    return count


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
