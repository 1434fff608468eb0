"""Rules that turn block probabilities into a mask. Sink and diagonal are added by the method."""

from __future__ import annotations

import torch


def top_p(probs: torch.Tensor, visible: torch.Tensor, p: float) -> torch.Tensor:
    """The most probable blocks of a row until they hold p of it; all at p = 1."""
    if p >= 1:
        return visible.expand(probs.shape).clone()
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.double().cumsum(-1) - ordered.double()
    kept = torch.zeros_like(probs, dtype=torch.bool)
    return kept.scatter_(-1, order, before < p) & visible


def above(probs: torch.Tensor, visible: torch.Tensor, threshold: float) -> torch.Tensor:
    """Blocks of at least this probability; all at 0."""
    return (probs >= threshold) & visible


def either(
    probs: torch.Tensor, visible: torch.Tensor, p: float, divisor: float = 10
) -> torch.Tensor:
    """top_p, and every block of at least (1 - p) / divisor: what is dropped is neither much nor a
    peak.

    Top-p alone drops peaks of concentrated rows, a threshold alone all of the diffuse ones.
    """
    return top_p(probs, visible, p) | above(probs, visible, (1 - p) / divisor)


def relative(probs: torch.Tensor, visible: torch.Tensor, threshold: float) -> torch.Tensor:
    """Blocks of at least this share of their row's largest; all at 0."""
    return (probs >= threshold * probs.amax(-1, keepdim=True)) & visible


def share(probs: torch.Tensor, visible: torch.Tensor, density: float) -> torch.Tensor:
    """The same share of every row's visible blocks, rounded up."""
    count = (visible.sum(-1) * density).ceil().long().clamp_min(1)
    ranked = probs.masked_fill(~visible, -1).argsort(dim=-1, descending=True, stable=True)
    rank = ranked.argsort(-1)
    return (rank < count[:, None]) & visible
