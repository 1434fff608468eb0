#!/usr/bin/env python3
"""What the results say: the density every method needs for a given closeness to dense attention.

PYTHONPATH=. python bench/quality/summary.py OUT/frontier.json     # the tables of a finished run
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prism_cuda.tables import print_table

# Tolerated rise of perplexity, and loss of mean task accuracy.
PERPLEXITY_RISES = (0.01, 0.003, 0.001)
ACCURACY_LOSS = 0.005

# The tasks that a testbed masters: variable tracking and several values are beyond the small ones.
RETRIEVAL = ("copy", "kv", "niah_single", "niah_multikey")

# What the targets compare densities with.
OFFICIAL = "prism"

Curve = list[tuple[float, float]]


def model_curves(data: dict[str, Any], length: int, metric: str) -> dict[str, Curve]:
    """Per method, (density, loss against dense) from sparse to dense.

    Args:
        metric: "perplexity" (relative rise), "accuracy" (mean over tasks of the token accuracy
            lost), "retrieval" (the same over RETRIEVAL) or the name of a task.
    """
    entries = [entry for entry in data["model"].values() if entry["length"] == length]
    dense = next((entry for entry in entries if entry["method"] == "dense"), None)
    curves: dict[str, Curve] = defaultdict(list)
    if dense is None:
        return curves
    for entry in entries:
        loss = _loss(entry, dense, metric)
        if entry is not dense and loss is not None:
            curves[entry["method"]].append((entry["density"], loss))
    return {method: sorted(curve) for method, curve in curves.items()}


def _loss(entry: dict[str, Any], dense: dict[str, Any], metric: str) -> float | None:
    if metric == "perplexity":
        if "nats" not in entry:
            return None
        rises = [ours - theirs for ours, theirs in zip(entry["nats"], dense["nats"], strict=True)]
        return math.expm1(sum(rises) / len(rises))
    groups = {"accuracy": list(dense["tasks"]), "retrieval": RETRIEVAL}
    tasks = groups.get(metric, [metric])
    losses = [
        dense["tasks"][task]["token_accuracy"] - entry["tasks"][task]["token_accuracy"]
        for task in tasks
        if task in entry["tasks"] and task in dense["tasks"]
    ]
    return sum(losses) / len(losses) if losses else None


def head_curves(data: dict[str, Any], length: int, metric: str) -> dict[str, Curve]:
    """Per method, (density, loss) averaged over layers and heads.

    Args:
        metric: "recall" (attention mass missed) or "error" (relative output error).
    """
    curves: dict[str, Curve] = {}
    for key, rows in data["heads"].items():
        row_length, method = key.split("/")
        if int(row_length) != length or method == "dense":
            continue
        by_knob: dict[float, list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            by_knob[row["knob"]] += zip(row["density"], row[metric], strict=True)
        curve = []
        for pairs in by_knob.values():
            density, value = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
            curve.append((density, 1 - value if metric == "recall" else value))
        curves[method] = sorted(curve)
    return curves


def density_needed(curve: Curve, loss: float) -> float | None:
    """Smallest density from which on a curve stays at or under ``loss``; None if it never does.

    Losses shrink by factors: between two settings their logarithm is interpolated, a loss under a
    tenth of ``loss`` (noise may make it negative) counting as that. The dense end is not assumed.
    """
    needed = None
    next_loss = loss
    for density, setting_loss in sorted(curve, reverse=True):
        if setting_loss > loss:
            if needed is None:
                return None
            span = math.log(setting_loss / max(next_loss, loss / 10))
            share = math.log(setting_loss / loss) / span if span > 0 else 1.0
            return density + share * (needed - density)
        needed, next_loss = density, setting_loss
    return needed


def lengths(data: dict[str, Any]) -> list[int]:
    found = {entry["length"] for entry in data["model"].values()}
    return sorted(found | {int(key.split("/")[0]) for key in data["heads"]})


def estimate_times(data: dict[str, Any], length: int) -> dict[str, float]:
    """Milliseconds of estimation per attention call, the median over a method's settings."""
    times: dict[str, list[float]] = defaultdict(list)
    for entry in data["model"].values():
        if entry["length"] == length:
            times[entry["method"]].append(entry["estimate_ms"])
    return {method: sorted(values)[len(values) // 2] for method, values in times.items()}


def print_tables(data: dict[str, Any]) -> None:
    """Densities needed, one table per length and pass."""
    for length in lengths(data):
        perplexity = model_curves(data, length, "perplexity")
        accuracy = model_curves(data, length, "accuracy")
        times = estimate_times(data, length)
        rows = [
            (
                method,
                *(_show(density_needed(perplexity.get(method, []), r)) for r in PERPLEXITY_RISES),
                _show(density_needed(accuracy.get(method, []), ACCURACY_LOSS)),
                f"{times[method]:.2f}",
            )
            for method in sorted(set(perplexity) | set(accuracy))
        ]
        header = [f"ppl +{100 * rise:g} %" for rise in PERPLEXITY_RISES]
        if rows:
            print_table(
                f"{length} tokens: density needed to stay within",
                ("method", *header, "accuracy -0.5", "estimate, ms"),
                rows,
            )
        _print_targets(data, length)
        _print_heads(data, length)


def _print_targets(data: dict[str, Any], length: int) -> None:
    """Densities needed for the tightest bounds, and their share of what official Prism needs."""
    bounds = {
        "perplexity": PERPLEXITY_RISES[-1],
        "accuracy": ACCURACY_LOSS,
        "retrieval": ACCURACY_LOSS,
    }
    curves = {metric: model_curves(data, length, metric) for metric in bounds}
    needed = {
        method: [
            density_needed(curves[metric].get(method, []), bounds[metric]) for metric in bounds
        ]
        for method in curves["accuracy"]
    }
    if OFFICIAL not in needed:
        return
    rows = []
    for method, densities in needed.items():
        pairs = zip(densities, needed[OFFICIAL], strict=True)
        shares = [ours / theirs if ours and theirs else None for ours, theirs in pairs]
        columns = zip(densities, shares, strict=True)
        rows.append((method, *(_show(value) for pair in columns for value in pair)))
    names = (f"ppl +{100 * PERPLEXITY_RISES[-1]:g} %", "accuracy -0.5", "retrieval -0.5")
    header = [text for name in names for text in (name, f"of {OFFICIAL}'s")]
    print_table(f"{length} tokens: densities for the targets", ("method", *header), rows)


def _print_heads(data: dict[str, Any], length: int) -> None:
    levels = {"recall": (0.05, 0.02, 0.01), "error": (0.1, 0.05, 0.02)}
    curves = {metric: head_curves(data, length, metric) for metric in levels}
    rows = [
        (
            method,
            *(
                _show(density_needed(curves[metric][method], level))
                for metric, steps in levels.items()
                for level in steps
            ),
        )
        for method in sorted(curves["recall"])
    ]
    if rows:
        header = [f"mass -{level:g}" for level in levels["recall"]]
        header += [f"error {level:g}" for level in levels["error"]]
        title = f"{length} tokens, all layers and heads: density needed to stay within"
        print_table(title, ("method", *header), rows)


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def ordered(methods: Iterable[str], known: Sequence[str]) -> list[str]:
    """Names in the order of ``known``."""
    return sorted(methods, key=lambda name: known.index(name) if name in known else len(known))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="frontier.json")
    print_tables(json.loads(parser.parse_args().results.read_text()))
