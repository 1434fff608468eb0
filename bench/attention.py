"""Times block-sparse attention kernels, and dense ones beside them, on the same inputs.

    python bench/attention.py --fa4 DIRECTORY --official CHECKOUT --json attention.json
    python bench/attention.py --suite quick
    python bench/attention.py --suite scores
    python bench/attention.py --lengths 8192 --masks random --impls prism --dry-run

Points (suites.py) are random, structured and full masks, by length, density, dtype, head_dim, key
block size and causality; implementations.py lists the kernels. Figures are CUDA-graph replays with
inputs taken in turn and a flushed L2 (timing.py); eager rows are single calls on an idle GPU, and
`host_us` what they take beyond a replay.

A GPU under its power limit slows down as it warms up, and as long as its last kernel made it. The
points of a group and all their kernels are therefore timed side by side, in as many rounds as there
are of them, ordered as a Latin square; each gets its share of --budget-ms in every round. `ms` is
the median of the rounds' medians, `spread` how far they are apart, `clock_mhz` and `power_w` are
nvidia-smi's means meanwhile. Compare rows of one group; `vs_base` compares prism's TFLOP/s with
those of the group's first point. Of fa4's block-sparse variants the faster one counts, point by
point.

Before any timing, sampled rows of every output are compared with float64, in multiples of the error
of plain PyTorch at the inputs' precision (`error_ratio`). Prism may be off by twice that and has to
repeat itself bit by bit, or the exit status is 1; a peer off by more than eight times is not timed.

TFLOP/s = 4 * head_dim * 128 * key block * kept blocks / time. Full masks count as dense kernels do:
2 * head_dim * length^2 a head where causal, twice that otherwise; a window counts what rows see.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accuracy import Sample, accuracy, sample
from implementations import IMPLS, Call, Inputs, build, fa4_is_installed
from masks import QUERY_BLOCK, visible_mask
from record import print_table, provenance, write_json
from suites import (
    DENSITIES,
    DTYPES,
    MASKS,
    SUITES,
    Group,
    Point,
    build_sparsity,
    flops,
    kept_density,
    suite,
)
from timing import MODES, GpuLog, Timing, capture, measure_alternating

DEVICE = "cuda"
PRISM_ERROR_RATIO = 2.0
PEER_ERROR_RATIO = 8.0
POINT_COLUMNS = [
    *("L", "mask", "density", "kept_density", "dtype", "head_dim", "block", "causal"),
    *("window", "softcap"),
]
Row = dict[str, Any]


class Inaccurate(RuntimeError):
    """A peer computes something else: not worth timing."""


@dataclass
class Job:
    """One kernel at one point, ready to be timed."""

    point: Point
    impl: str
    variant: str
    mode: str
    repetition: Callable[[], object]
    calls: int  # in one repetition
    columns: Row  # of its row, beside the point's and the times
    flops: float


@dataclass
class Bench:
    options: argparse.Namespace
    gpu: GpuLog
    origin: Row | None = None
    rows: list[Row] = field(default_factory=list)
    broken: dict[tuple[object, ...], str] = field(default_factory=dict)
    groups: int = 0  # begun

    def run(self, group: Group) -> None:
        """Adds the rows of a group's points; what fails becomes a row with its error."""
        self.groups += 1
        inputs: dict[tuple[str, int], list[Inputs]] = {}
        jobs: list[Job] = []
        for point in group:
            try:
                key = (point.dtype, point.head_dim)
                if key not in inputs:
                    inputs[key] = self.draw(point, any("fa4" in p.impls for p in group))
                jobs += self.prepare(point, inputs[key])
            except Exception as error:
                self.add_error(point, "prism", error)
        try:
            timings = measure_alternating(
                [job.repetition for job in jobs], budget_ms=self.options.budget_ms
            )
        except Exception as error:
            for job in jobs:
                self.add_error(job.point, job.impl, error)
            return
        self.add_times(jobs, timings)

    def draw(self, point: Point, length_first: bool) -> list[Inputs]:
        options = self.options

        def one(seed: int) -> Inputs:
            generator = torch.Generator(DEVICE).manual_seed(seed)
            q, k, v = (
                torch.randn(
                    (1, heads, point.length, point.head_dim), device=DEVICE,
                    dtype=DTYPES[point.dtype], generator=generator,
                )
                for heads in (options.heads, options.kv_heads, options.kv_heads)
            )  # fmt: skip
            x = Inputs(q, k, v)
            if length_first and point.dtype == "bfloat16":
                q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
                x.length_first = (q, k, v)
            return x

        # One input of more than 32K tokens is several times the L2 cache.
        return [one(seed) for seed in range(2 if point.length <= 32768 else 1)]

    def prepare(self, point: Point, inputs: list[Inputs]) -> list[Job]:
        options = self.options
        sparsity = build_sparsity(point, options.heads, DEVICE)
        visible = visible_mask(
            point.length, k_block=point.block, causal=point.causal, device=DEVICE
        )
        columns: Row = {"kept_density": kept_density(sparsity, visible), "group": self.groups}
        samples = sample(inputs[0], sparsity)
        jobs: list[Job] = []
        for impl in point.impls:
            try:
                calls = build(impl, sparsity, checkout=options.official, fa4_directory=options.fa4)
            except Exception as error:
                self.add_error(point, impl, error)
                continue
            for variant, call in calls.items():
                try:
                    self.skip_broken(point, impl, variant)
                    checked = columns | self.check(point, impl, call, inputs[0], samples)
                    jobs += self.make_jobs(point, impl, variant, call, inputs, checked,
                                           flops(sparsity, point.head_dim))  # fmt: skip
                except Exception as error:  # compilers of peers raise whatever they like
                    self.note_broken(point, impl, variant, error)
                    self.add_error(point, impl, error, variant)
        return jobs

    def skip_broken(self, point: Point, impl: str, variant: str) -> None:
        """Do not pay for the same failing compilation twice."""
        if before := self.broken.get(compilation(point, impl, variant)):
            raise RuntimeError(f"failed before: {before}")

    def note_broken(self, point: Point, impl: str, variant: str, error: Exception) -> None:
        torch.cuda.empty_cache()
        of_this_point = isinstance(error, (Inaccurate, torch.cuda.OutOfMemoryError))
        if impl not in ("prism", "prism_sm80") and not of_this_point:
            self.broken.setdefault(compilation(point, impl, variant), first_line(error))

    def make_jobs(
        self,
        point: Point,
        impl: str,
        variant: str,
        call: Call,
        inputs: list[Inputs],
        columns: Row,
        flops: float,
    ) -> list[Job]:
        for x in inputs[1:]:
            call(x)
        torch.cuda.synchronize()
        jobs = []
        if "graph" in self.options.modes:
            replay = capture(call, inputs)
            jobs.append(Job(point, impl, variant, "graph", replay, len(inputs), columns, flops))
        if "eager" in self.options.modes and impl in point.eager:
            one = in_turn(call, inputs)
            jobs.append(Job(point, impl, variant, "eager", one, 1, columns, flops))
        return jobs

    def check(
        self, point: Point, impl: str, call: Call, x: Inputs, samples: Sequence[Sample]
    ) -> Row:
        torch.full_like(x.q, torch.nan)  # the allocator hands it out again, as the output
        out = call(x)
        result = accuracy(out, samples)
        row: Row = {
            "error_ratio": result.ratio,
            "max_error": result.error,
            "plain_error": result.plain_error,
        }
        if impl == "prism":
            row["correct"] = result.ratio <= PRISM_ERROR_RATIO
            row["bit_identical"] = torch.equal(call(x), out)
            row["kernel"] = torch.ops.prism.attention_kernel(
                compute_capability(), x.q.dtype, point.head_dim, QUERY_BLOCK, point.block
            )
        elif not result.ratio <= PEER_ERROR_RATIO:
            raise Inaccurate(f"is off by {result.ratio:.3g} times plain PyTorch's error")
        return row

    def add_times(self, jobs: list[Job], timings: list[Timing]) -> None:
        best: dict[tuple[Point, str, str], Row] = {}
        for job, timing in zip(jobs, timings, strict=True):
            rounds = timing.rounds
            ms = median(rounds) / job.calls
            row = job.point.columns() | job.columns | {
                "impl": job.impl, "variant": job.variant, "mode": job.mode, "ms": ms,
                "tflops": job.flops / ms / 1e9,
                "spread": (max(rounds) - min(rounds)) / median(rounds),
            } | self.gpu.during(timing.spans)  # fmt: skip
            key = (job.point, job.impl, job.mode)
            if key in best:
                slower, row = sorted((best[key], row), key=lambda r: r["ms"], reverse=True)
                row = row | {f"ms_{slower['variant']}": slower["ms"]}
            best[key] = row
        for (point, impl, mode), row in best.items():
            if mode == "eager" and (point, impl, "graph") in best:
                row["host_us"] = 1e3 * (row["ms"] - best[point, impl, "graph"]["ms"])
            self.rows.append(row)
            print(describe(row), flush=True)

    def add_error(self, point: Point, impl: str, error: Exception, variant: str = "") -> None:
        row = point.columns() | {
            "impl": impl, "variant": variant, "mode": "graph", "ms": None, "tflops": None,
            "group": self.groups, "error": first_line(error),
        }  # fmt: skip
        self.rows.append(row)
        print(describe(row), flush=True)

    def save(self) -> None:
        if self.options.json:
            self.origin = self.origin or provenance()
            write_json(self.options.json, self.rows, self.origin)


def compilation(point: Point, impl: str, variant: str) -> tuple[object, ...]:
    """What a compiled kernel depends on; more than that at times."""
    shape = (point.dtype, point.head_dim, point.block, point.causal, point.window, point.softcap)
    return (impl, variant, *shape)


def compute_capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def in_turn(call: Call, inputs: list[Inputs]) -> Callable[[], object]:
    turn = itertools.cycle(inputs)
    return lambda: call(next(turn))


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def describe(row: Row) -> str:
    """One line for the log."""
    causal = "causal" if row["causal"] else "non-causal"
    options = "".join(f"{name} {row[name]} " for name in ("window", "softcap") if row[name])
    point = (
        f"{row['L']:>7} {row['mask']:<10} {row['density']:<4g} {row['dtype']:<8} "
        f"d{row['head_dim']:<3} B{row['block']:<3} {causal:<10} {options}{row['impl']:<10} "
        f"{row['variant']:<8} {row['mode']:<5}"
    )
    if row.get("error"):
        return f"{point} {row['error']}"
    line = f"{point} {row['ms']:8.4f} ms {row['tflops']:5.0f} TFLOP/s  x{row['error_ratio']:.2f}"
    if row.get("correct") is False or row.get("bit_identical") is False:
        line += "  WRONG" if not row["correct"] else "  NOT REPEATABLE"
    return line


def summary(rows: Sequence[Row]) -> list[Row]:
    """A line for each point: TFLOP/s by implementation, and prism beside fa4 and its group."""
    lines: dict[tuple[object, ...], Row] = {}
    base: dict[int, float] = {}  # by group
    for row in rows:
        if row["mode"] != "graph":
            continue
        key = tuple(row[name] for name in POINT_COLUMNS if name != "kept_density")
        line = lines.setdefault(key, {name: row.get(name) for name in POINT_COLUMNS})
        if not row.get("tflops"):
            continue
        line["kept_density"] = row["kept_density"]
        line[row["impl"]] = round(row["tflops"])
        if row["impl"] == "prism":
            line["ok"] = bool(row["correct"] and row["bit_identical"])
            line["prism_tflops"] = row["tflops"]
            line["vs_base"] = row["tflops"] / base.setdefault(row["group"], row["tflops"])
        if row["impl"] == "fa4":
            line["fa4_tflops"] = row["tflops"]
    for line in lines.values():
        if "prism_tflops" in line and "fa4_tflops" in line:
            line["prism/fa4"] = line["prism_tflops"] / line["fa4_tflops"]
    return list(lines.values())


def print_summary(rows: Sequence[Row]) -> None:
    used = [impl for impl in IMPLS if any(row["impl"] == impl for row in rows)]
    print()
    print_table(summary(rows), [*POINT_COLUMNS, *used, "prism/fa4", "vs_base", "ok"])
    eager = [row for row in rows if row["mode"] == "eager" and row.get("ms")]
    if eager:
        print()
        print_table(eager, ["L", "mask", "density", "impl", "variant", "mode", "ms", "host_us"])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="full", choices=SUITES)
    parser.add_argument("--lengths", type=int, nargs="+", help="default: the suite's")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    for name, values in (("masks", MASKS), ("dtypes", DTYPES), ("impls", IMPLS)):
        parser.add_argument(f"--{name}", nargs="+", choices=values, help="only these")
    for name, sizes in (("head-dims", (64, 128, 256)), ("blocks", (64, 128))):
        parser.add_argument(f"--{name}", type=int, nargs="+", choices=sizes, help="only these")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--budget-ms", type=float, default=100, help="of one kernel at one point")
    parser.add_argument("--seconds", type=float, default=140, help="begin no group after this")
    parser.add_argument("--official", type=Path, help="checkout of github.com/xinghaow99/prism")
    parser.add_argument("--fa4", type=Path, help="where pip put flash-attn-4 (--target)")
    parser.add_argument("--dry-run", action="store_true", help="print the points and stop")
    parser.add_argument("--json", help="file to write, after every group")
    options = parser.parse_args(arguments)
    options.lengths = options.lengths or list(SUITES[options.suite])
    if options.impls and "official" in options.impls and not options.official:
        parser.error("--impls official needs --official PATH")
    if not options.impls:
        missing = {"official": not options.official, "fa4": not (options.fa4 or fa4_is_installed())}
        options.impls = [impl for impl in IMPLS if not missing.get(impl)]
    return options


def selected(options: argparse.Namespace) -> list[Group]:
    """The suite's groups without what the options leave out."""
    groups = []
    for group in suite(options.suite, options.lengths, options.densities):
        points = []
        for point in group:
            impls = tuple(impl for impl in point.impls if impl in options.impls)
            wanted = (
                point.mask in (options.masks or MASKS)
                and point.dtype in (options.dtypes or DTYPES)
                and point.head_dim in (options.head_dims or (point.head_dim,))
                and point.block in (options.blocks or (point.block,))
            )
            if impls and wanted:
                points.append(replace(point, impls=impls))
        if points:
            groups.append(points)
    return groups


@torch.inference_mode()
def main() -> int:
    options = parse()
    groups = selected(options)
    if options.dry_run:
        lines = [p.columns() | {"impls": " ".join(p.impls)} for g in groups for p in g]
        columns = [c for c in POINT_COLUMNS if c != "kept_density"]
        print_table(lines, [*columns, "impls"])
        return 0

    import prism_cuda  # noqa: F401  registers the ops

    start = time.monotonic()
    with GpuLog() as gpu:
        bench = Bench(options, gpu)
        for group in groups:
            if time.monotonic() - start > options.seconds:
                late = TimeoutError(f"left out after {options.seconds} s")
                for point in group:
                    bench.add_error(point, "prism", late)
                continue
            bench.run(group)
            bench.save()
            gc.collect()
            torch.cuda.empty_cache()
    bench.save()
    print_summary(bench.rows)
    print(f"{time.monotonic() - start:.0f} s on {torch.cuda.get_device_name()}")
    prism = [row for row in bench.rows if row["impl"] == "prism" and row.get("ms")]
    return 0 if prism and all(row["correct"] and row["bit_identical"] for row in prism) else 1


if __name__ == "__main__":
    raise SystemExit(main())
