"""Times whole Prism attention against dense attention on the same inputs, and where it wins.

    python bench/prefill.py --json prefill.json
    python bench/prefill.py --lengths 8192 32768 --densities 0.25 --impls prism cudnn

Two kinds of rows for prism: `structured` is prefill on inputs with topics and an anchor, at the
density that top-p finds there; a number is a fixed density: estimation on the same inputs, then
attention under a random mask of that density. Flex computes the blocks that prism kept, without
estimating them. `prism_grid` is the grid estimator with its default settings on the structured
inputs; the other rows of prism select by bands, with 128-key blocks. Calls that take more than a
second are timed once ("once"), all others replay a CUDA graph. The crossover is the length above
which prism beats the best dense kernel.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from implementations import Inputs, dense, flex, flex_mask
from masks import causal_density, default_bands, pack, random_causal_mask, structured_qkv
from record import print_table, write_json
from timing import measure, measure_once_if_long
from torch import Tensor
from torch.nn.attention import SDPBackend

from prism_cuda.bits import unpack  # registers the ops too

COLUMNS = ["L", "distribution", "kept_density", "impl", "mode", "ms", "speedup", "error"]
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576]
IMPLS = ("prism", "prism_grid", "fa2", "cudnn", "flex", "stages")
# PrismConfig's defaults. With them and its threshold the grid keeps more quality than the bands at
# 0.95, and with 0.9 still no less: docs/quality.md.
GRID_TOP_P = 0.95
GRID_KEYS = 64
BLOCK = 128
DENSE = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
Row = dict[str, Any]


def timed(call: Callable[[], object]) -> Row:
    try:
        ms, mode = measure_once_if_long(call)
    except (RuntimeError, NotImplementedError) as error:  # out of memory, or capture refused
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return {"mode": "-", "error": (str(error).splitlines() or ["?"])[0][:80]}
    return {"mode": mode, "ms": ms}


def crossover(
    lengths: Sequence[int], prism: Sequence[float], best: Sequence[float]
) -> float | None:
    """The length where `prism` falls below `best` for good, log-interpolated; None if never.

    The shortest of `lengths` if it already wins there.
    """
    gain = [math.log(b / p) for p, b in zip(prism, best, strict=True)]
    if not gain or gain[-1] <= 0:
        return None
    i = len(gain) - 1
    while i > 0 and gain[i - 1] > 0:
        i -= 1
    if i == 0:
        return float(lengths[0])
    share = -gain[i - 1] / (gain[i] - gain[i - 1])
    return float(lengths[i - 1] * (lengths[i] / lengths[i - 1]) ** share)


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[Row] = []

    def add(self, length: int, distribution: str, impl: str, row: Row, **more: Any) -> None:
        self.rows.append({"L": length, "distribution": distribution, "impl": impl, **more, **row})
        print_table([self.rows[-1]], COLUMNS)

    def run(self, length: int) -> None:
        options = self.options
        q, k, v = structured_qkv(
            options.heads, options.kv_heads, length, options.head_dim, torch.bfloat16, "cuda"
        )
        x = Inputs(q, k, v)
        if length <= options.longest_dense:
            for impl in [name for name in DENSE if name in options.impls]:
                call = dense(DENSE[impl])
                self.add(length, "dense", impl, timed(lambda call=call: call(x)), kept_density=1.0)
        bands = default_bands(options.head_dim)
        ops = torch.ops.prism
        x.bits, x.counts = ops.select_bands(q, k, *bands, [options.top_p], k_block_size=BLOCK)
        blocks = x.counts.shape[-1]
        visible = x.counts.numel() * (blocks + 1) / 2
        density = float(x.counts.sum(dtype=torch.int64)) / visible
        if "prism" in options.impls:
            row = timed(
                lambda: ops.prefill(q, k, v, "bands", *bands, [options.top_p], k_block_size=BLOCK)
            )
            self.add(length, "structured", "prism", row, kept_density=density)
        if "prism_grid" in options.impls:
            self.add_grid(q, k, v, visible)
        if "stages" in options.impls:
            row = timed(lambda: ops.select_bands(q, k, *bands, [options.top_p], k_block_size=BLOCK))
            self.add(length, "structured", "estimate", row, kept_density=density)
            row = timed(lambda: ops.sparse_attention(q, k, v, x.bits, x.counts, k_block_size=BLOCK))
            self.add(length, "structured", "attend", row, kept_density=density)
        if "flex" in options.impls and length in options.flex_lengths:
            self.add_flex(x, length, "structured", density)
        if length <= options.longest_fixed and "prism" in options.impls:
            for fixed in options.densities:
                self.add_fixed(x, length, fixed, bands)

    def add_grid(self, q: Tensor, k: Tensor, v: Tensor, visible: float) -> None:
        ops = torch.ops.prism

        def whole() -> Tensor:
            rules = ([GRID_TOP_P], [(1 - GRID_TOP_P) / 10])
            return ops.prefill(q, k, v, "grid", [], [], *rules, k_block_size=GRID_KEYS)[3]

        density = float(whole().sum(dtype=torch.int64)) * GRID_KEYS / BLOCK / visible
        self.add(q.shape[2], "structured", "prism_grid", timed(whole), kept_density=density)

    def add_fixed(
        self, x: Inputs, length: int, fixed: float, bands: tuple[list[int], list[int]]
    ) -> None:
        ops = torch.ops.prism
        blocks = math.ceil(length / BLOCK)
        mask = random_causal_mask(self.options.heads, blocks, fixed, "cuda")
        x.bits, x.counts = pack(mask)
        density = causal_density(mask)
        del mask

        def whole() -> object:
            ops.select_bands(x.q, x.k, *bands, [self.options.top_p], k_block_size=BLOCK)
            return ops.sparse_attention(x.q, x.k, x.v, x.bits, x.counts, k_block_size=BLOCK)

        self.add(length, f"{fixed:g}", "prism", timed(whole), kept_density=density)

    def add_flex(self, x: Inputs, length: int, distribution: str, density: float) -> None:
        try:
            mask = unpack(x.bits, math.ceil(length / BLOCK))
            x.flex = flex_mask(mask, length)
            flex(x)  # compiles
            ms = measure(lambda _: flex(x), [None], "graph", warmup=1, budget_ms=200, least=3)
            row: Row = {"mode": "graph", "ms": ms}
        except RuntimeError as error:
            torch.cuda.synchronize()
            row = {"mode": "-", "error": str(error).splitlines()[0][:80]}
        x.flex = None
        self.add(length, distribution, "flex", row, kept_density=density)

    def compare(self) -> list[Row]:
        """Adds each prism row's speedup; returns a crossover for every distribution."""
        best: dict[int, float] = {}
        for row in self.rows:
            if row["impl"] in DENSE and row.get("ms"):
                best[row["L"]] = min(row["ms"], best.get(row["L"], math.inf))
        curves: dict[str, list[tuple[int, float, float]]] = {}
        for row in self.rows:
            if row["impl"] == "prism" and row.get("ms") and row["L"] in best:
                row["speedup"] = best[row["L"]] / row["ms"]
                point = (row["L"], row["ms"], best[row["L"]])
                curves.setdefault(row["distribution"], []).append(point)
        return [
            {"distribution": name, "crossover_length": crossover(*zip(*points, strict=True))}
            for name, points in curves.items()
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--densities", type=float, nargs="*", default=[0.1, 0.25, 0.5])
    parser.add_argument("--impls", nargs="+", default=list(IMPLS), choices=IMPLS)
    parser.add_argument("--flex-lengths", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--longest-dense", type=int, default=262144)
    parser.add_argument("--longest-fixed", type=int, default=262144)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128))
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()

    bench = Bench(options)
    for length in sorted(options.lengths):
        torch.cuda.empty_cache()
        try:
            bench.run(length)
        except torch.cuda.OutOfMemoryError as error:
            bench.add(length, "-", "-", {"error": str(error).splitlines()[0][:80]})
    crossovers = bench.compare()
    print()
    print_table(bench.rows, COLUMNS)
    print_table(crossovers, ["distribution", "crossover_length"])
    for row in bench.rows:
        row |= {"top_p": options.top_p, "dtype": "bfloat16", "head_dim": options.head_dim}
    if options.json:
        write_json(options.json, bench.rows + crossovers)


if __name__ == "__main__":
    main()
