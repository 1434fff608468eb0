"""Losses against dense attention, with bounds: sequences are clusters, compared in pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

# Of the distribution of a loss under resampled clusters.
LEVEL = 0.95
RESAMPLES = 2000


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def perplexity_rise(ours: np.ndarray, dense: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Relative rise in %, from the mean nats of the same windows under both."""
    rng = np.random.default_rng(seed)
    difference = ours - dense
    draws = rng.integers(0, len(difference), (RESAMPLES, len(difference)))
    low, high = _interval(difference[draws].mean(1))
    percent = [100 * float(np.expm1(x)) for x in (difference.mean(), low, high)]
    return {"rise": percent[0], "low": percent[1], "high": percent[2], "windows": len(difference)}


def accuracy_loss(
    ours: dict[str, np.ndarray], dense: dict[str, np.ndarray], seed: int = 0
) -> dict[str, Any]:
    """Points lost, the mean over tasks, and by task.

    Args:
        ours, dense: by task (sequences, 2): of each sequence how many were right, of how many.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES)
    by_task = {}
    for task, right in ours.items():
        difference, size = dense[task][:, 0] - right[:, 0], right[:, 1]
        draws = rng.integers(0, len(size), (RESAMPLES, len(size)))
        resampled = 100 * difference[draws].sum(1) / size[draws].sum(1)
        total += resampled / len(ours)
        low, high = _interval(resampled)
        by_task[task] = {
            "dense": 100 * float(dense[task][:, 0].sum() / size.sum()),
            "loss": 100 * float(difference.sum() / size.sum()),
            "low": low,
            "high": high,
            "answers": int(size.sum()),
            "sequences": len(size),
        }
    low, high = _interval(total)
    mean = float(np.mean([row["loss"] for row in by_task.values()])) if by_task else float("nan")
    return {"loss": mean, "low": low, "high": high, "tasks": by_task}
