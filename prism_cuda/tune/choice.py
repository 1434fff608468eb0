"""One knob for each of many heads, from what every knob costs and spoils there."""

from __future__ import annotations

import numpy as np


def choose(cost: np.ndarray, loss: np.ndarray, limit: float) -> np.ndarray:
    """Index of each head's knob: least total loss at a mean cost of at most ``limit``.

    Args:
        cost, loss: (heads, knobs). Density and error, or the other way round.

    Returns:
        int64 (heads,); every head's cheapest knob where even those cost more.
    """
    low, high = -40.0, 40.0  # of the logarithm of a cost's price in losses
    for _ in range(60):
        price = np.exp((low + high) / 2)
        chosen = (loss + price * cost).argmin(1)
        if cost[np.arange(len(chosen)), chosen].mean() > limit * (1 + 1e-9):
            low = (low + high) / 2
        else:
            high = (low + high) / 2
    return (loss + np.exp(high) * cost).argmin(1)
