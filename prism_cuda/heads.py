"""Selection for query heads that differ in their bands: one for every distinct choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Selection = tuple[torch.Tensor, torch.Tensor]  # bits, counts
Choice = TypeVar("Choice")


def each_choice(
    select: Callable[[Sequence[int], Sequence[int], Choice], Selection],
    of_heads: Sequence[Choice],
    kv_heads: int,
) -> Selection:
    """Bits and counts of all query heads by one ``select`` for every distinct choice.

    Args:
        select: takes query heads, the key heads that they read, as many times as many of them as in
            the whole call or one each, and their choice; returns bits and counts of those query
            heads, (B, heads, ...).
        of_heads: the choice of every query head.

    Raises:
        RuntimeError: if the query heads, differing in choices, are no multiple of the key heads.
    """
    q_heads = len(of_heads)
    if kv_heads == 0 or q_heads % kv_heads:
        raise RuntimeError(
            f"prism: q has {q_heads} heads and k has {kv_heads}; expected a multiple of k's heads"
        )
    group = q_heads // kv_heads
    bits: dict[int, torch.Tensor] = {}
    counts: dict[int, torch.Tensor] = {}
    heads_of: dict[Choice, list[int]] = {}
    for head, choice in enumerate(of_heads):
        heads_of.setdefault(choice, []).append(head)
    for choice, heads in heads_of.items():
        # Whole groups share their key heads, as in any call; others get a key head each.
        groups = [heads[i] // group for i in range(0, len(heads), group)]
        whole = heads == [head for kv in groups for head in range(kv * group, (kv + 1) * group)]
        selected = select(heads, groups if whole else [head // group for head in heads], choice)
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
