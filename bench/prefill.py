"""Times the stages of a prefill, and dense attention beside them, on structured inputs.

python bench/prefill.py --lengths 8192 32768 131072 --json prefill.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from masks import structured_qkv
from record import print_table, write_json
from timing import MODES, measure
from torch.nn.attention import SDPBackend, sdpa_kernel

import prism_cuda  # noqa: F401  registers the ops

COLUMNS = ["L", "top_p", "kept_density", "stage", "mode", "ms", "speedup_over_cudnn", "error"]


def half_split(head_dim: int, high: int, low: int) -> tuple[list[int], list[int]]:
    """The bands of the rotate-half layout, pair j = dimensions (j, j + head_dim / 2)."""
    half = head_dim // 2
    return (
        [0, high // 2, half, half + high // 2],
        [half - low // 2, half, head_dim - low // 2, head_dim],
    )


def stages(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int, top_p: float
) -> tuple[dict[str, Callable[[], object]], float]:
    """Each stage as a call on the outputs of those before it, and the kept density."""
    ops = torch.ops.prism
    head_dim, length = q.shape[3], q.shape[2]
    bands = half_split(head_dim, head_dim // 2, head_dim * 3 // 4)
    sizes = {"q_block_size": block, "k_block_size": block}
    q_means, k_means = ops.block_pool(q, block), ops.block_pool(k, block)
    bits, counts = ops.select_blocks(q_means, k_means, length, length, *bands, top_p, **sizes)
    blocks = counts.shape[-1]
    density = float(counts.sum()) / (counts.numel() * (blocks + 1) / 2)

    def dense(backend: SDPBackend) -> Callable[[], object]:
        def call() -> object:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                )

        return call

    return {
        "pool q": lambda: ops.block_pool(q, block),
        "pool k": lambda: ops.block_pool(k, block),
        "select": lambda: ops.select_blocks(
            q_means, k_means, length, length, *bands, top_p, **sizes
        ),
        "attend": lambda: ops.sparse_attention(q, k, v, bits, counts, **sizes),
        "prefill": lambda: ops.prefill(q, k, v, *bands, top_p, **sizes),
        "dense fa2": dense(SDPBackend.FLASH_ATTENTION),
        "dense cudnn": dense(SDPBackend.CUDNN_ATTENTION),
    }, density


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--block", type=int, default=128, choices=(64, 128))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128))
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        qkv = structured_qkv(
            options.heads, options.kv_heads, length, options.head_dim, torch.bfloat16, "cuda"
        )
        calls, density = stages(*qkv, options.block, options.top_p)
        for mode in options.modes:
            of_length: list[dict[str, Any]] = []
            for stage, call in calls.items():
                row: dict[str, Any] = {
                    "L": length, "top_p": options.top_p, "block": options.block,
                    "kept_density": density, "stage": stage, "mode": mode, "dtype": "bfloat16",
                    "head_dim": options.head_dim,
                }  # fmt: skip
                try:
                    row["ms"] = measure(lambda _, call=call: call(), [None], mode)
                except RuntimeError as error:  # a backend may not support a shape, or capture
                    torch.cuda.synchronize()
                    row |= {"ms": None, "error": str(error).splitlines()[0][:80]}
                of_length.append(row)
            times = {row["stage"]: row["ms"] for row in of_length}
            if times["prefill"] and times["dense cudnn"]:
                for row in of_length:
                    if row["stage"] == "prefill":
                        row["speedup_over_cudnn"] = times["dense cudnn"] / times["prefill"]
            rows += of_length
    print_table(rows, COLUMNS)
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
