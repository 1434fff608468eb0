"""Selection for query heads that differ in their settings: one for every distinct setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from prism_cuda.bands import Bands
from prism_cuda.config import Estimator, PrismConfig

# One for all query heads, or one for each.
HeadBands = Bands | tuple[Bands, ...]
# What blocks are chosen by.
Chooser = HeadBands | Literal["grid"]
# high_ranges and low_ranges (None: the grid), and top_p. Compilers can hash it, unlike Bands.
Setting = tuple[tuple[tuple[int, ...], tuple[int, ...]] | None, float]
Selection = tuple[torch.Tensor, torch.Tensor]  # bits, counts
Select = Callable[[Sequence[int], Sequence[int], Setting], Selection]


def estimator_of(chooser: Chooser) -> Estimator:
    return "grid" if isinstance(chooser, str) else "bands"


def settings_of_heads(q_heads: int, chooser: Chooser, config: PrismConfig) -> tuple[Setting, ...]:
    """What the query heads select with: one setting if it is the same for all, or one for each.

    Raises:
        ValueError: if bands, top_p or dense_heads do not fit the number of heads.
    """
    top_p = config.top_p_of_heads(q_heads)
    if not isinstance(chooser, tuple) and not isinstance(top_p, tuple):
        return (_setting(chooser, top_p),)
    of_heads = chooser if isinstance(chooser, tuple) else (chooser,) * q_heads
    if len(of_heads) != q_heads:
        raise ValueError(
            f"PrismConfig: bands has {len(of_heads)} entries; expected one for all heads or "
            f"{q_heads}, one per query head"
        )
    values = top_p if isinstance(top_p, tuple) else (top_p,) * q_heads
    settings = tuple(_setting(own, value) for own, value in zip(of_heads, values, strict=True))
    return settings[:1] if len(set(settings)) == 1 else settings


def _setting(chooser: Bands | Literal["grid"], top_p: float) -> Setting:
    if isinstance(chooser, str):
        return None, top_p
    return (chooser.high_ranges, chooser.low_ranges), top_p


def each_setting(
    select: Select, settings: Sequence[Setting], q_heads: int, kv_heads: int
) -> Selection:
    """Bits and counts of all query heads by one ``select`` for every distinct setting.

    Args:
        select: takes query heads, the key heads that they read, as many times as many of them as in
            the whole call or one each, and their setting; returns bits and counts of those query
            heads, (B, heads, ...).
        settings: as :func:`settings_of_heads` gives them.

    Raises:
        ValueError: if the query heads, differing in settings, are no multiple of the key heads.
    """
    if len(settings) == 1:
        return select(range(q_heads), range(kv_heads), settings[0])
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"q has {q_heads} heads and k has {kv_heads}; expected a multiple of k's")
    group = q_heads // kv_heads
    bits: dict[int, torch.Tensor] = {}
    counts: dict[int, torch.Tensor] = {}
    for setting in dict.fromkeys(settings):
        heads = [head for head, own in enumerate(settings) if own == setting]
        # Whole groups share their key heads, as in any call; others get a key head each.
        groups = [heads[i] // group for i in range(0, len(heads), group)]
        whole = heads == [head for kv in groups for head in range(kv * group, (kv + 1) * group)]
        selected = select(heads, groups if whole else [head // group for head in heads], setting)
        for i, head in enumerate(heads):
            bits[head], counts[head] = selected[0][:, i], selected[1][:, i]
    return (
        torch.stack([bits[head] for head in range(q_heads)], 1),
        torch.stack([counts[head] for head in range(q_heads)], 1),
    )


def take(x: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """x[:, heads], a view where they follow one another.

    By slices: an index tensor would have to be copied to the device.
    """
    first, end = heads[0], heads[-1] + 1
    if list(heads) != list(range(first, end)):
        return torch.stack([x[:, head] for head in heads], 1)
    return x if len(heads) == x.shape[1] else x[:, first:end]
