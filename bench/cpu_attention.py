#!/usr/bin/env python3
"""Sparse attention on a CPU: the package's path and the reference against torch's dense attention.

    PYTHONPATH=. python bench/cpu_attention.py --out bench/results/cpu/attention.json

Random masks of a given density; the least time of some runs in turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from prism_cuda import cpu, reference
from prism_cuda.reference.blocks import pack

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64  # SmolLM2-135M's
SIZES = (128, 64)


def mask(length: int, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    visible = reference.visible_blocks(length, length, True, *SIZES)
    forced = reference.recent_blocks(length, length, 1, *SIZES)
    forced[:, 0] = True
    chance = (density * visible.sum() - forced.sum()) / (visible.sum() - forced.sum())
    generator = torch.Generator().manual_seed(length)
    kept = torch.rand(1, HEADS, *visible.shape, generator=generator) < chance
    return pack((kept | forced) & visible)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(length: int, density: float, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, length, HEAD_DIM)
    k, v = torch.randn(2, 1, KV_HEADS, length, HEAD_DIM)
    bits, counts = mask(length, density)
    dense = torch.nn.functional.scaled_dot_product_attention
    ways: dict[str, Callable[[], object]] = {
        "sdpa": lambda: dense(q, k, v, is_causal=True, enable_gqa=True),
        "cpu": lambda: cpu.sparse_attention(q, k, v, bits, counts),
        "reference": lambda: reference.sparse_attention(q, k, v, bits, counts),
        "select_grid": lambda: reference.select_grid(q, k, [0.95], [0.005]),
    }
    times = {name: [seconds(work)] for name, work in ways.items()}
    for _ in range(repeats):
        for name, work in ways.items():
            times[name].append(seconds(work))
    return {name: round(min(of[1:]), 4) for name, of in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for length in args.lengths:
        for density in args.densities:
            row = {"length": length, "density": density}
            rows.append(row | measure(length, density, args.repeats))
            print(rows[-1], flush=True)
    about = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "heads": [HEADS, KV_HEADS, HEAD_DIM],
        "unit": "s",
    }
    args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
