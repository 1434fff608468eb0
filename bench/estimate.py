"""Times block estimation, whole and by stage, beside the official estimator and the reference.

    python bench/estimate.py --official PATH_TO_PRISM_CHECKOUT --json estimate.json
    python bench/estimate.py --lengths 8192 131072 --blocks 128 --stages estimate select

`estimate` is the whole chain from q and k to the mask, `pool` the same with top_p 1, where nothing
is scored: pooling and writing the mask. `pool q`, `pool k` and `select` are the ops on their own;
`select` starts from means; `append 2K` and `append 8K` bring the means of K up to date with that
many tokens at the end of L, as a chunked prefill does. `prism_grid` is the grid estimator, which
takes head_dim up to 128. GB/s counts what a stage has to read: q and k, the new tokens, or the
means. MB is the memory one call takes at its peak beyond its inputs, its results included. Ours are
CUDA-graph replays that take inputs in turn, so that none are left in L2 (appended chunks are: they
are small); the official estimator reads the sizes of its masks back and cannot be captured: eager
calls, with K repeated for each query head (`repeat kv`) beforehand, as it needs it.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from masks import default_bands
from record import print_table, write_json
from timing import measure
from torch import Tensor

from prism_cuda import reference  # registers the ops too
from prism_cuda.config import MAX_HEAD_DIM
from prism_cuda.estimators.bands import running_sums

COLUMNS = ["L", "B", "stage", "impl", "mode", "ms", "MB", "GB/s", "kept_density", "error"]
LENGTHS = [8192, 32768, 131072, 524288, 1048576]
APPENDED = {"append 2K": 2048, "append 8K": 8192}  # tokens
STAGES = ("estimate", "pool", "select", "pool q", "pool k", *APPENDED)
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
REFERENCE_UP_TO = 131072
OFFICIAL_UP_TO = 131072
L2_MULTIPLE = 2


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    k_means: Tensor | None = None
    sums: Tensor | None = None  # what pool_append_ keeps of an unfinished block


Call = Callable[[Inputs], Any]


def stage_calls(block: int, length: int, head_dim: int, top_p: float) -> dict[str, Call]:
    ops = torch.ops.prism
    bands = default_bands(head_dim)
    sizes = {"q_block_size": block, "k_block_size": block}

    def append(tokens: int) -> Call:
        start = max(length - tokens, 0)
        return lambda x: ops.append_means_(x.k[:, :, start:], x.k_means, x.sums, start, block)

    return {
        "estimate": lambda x: ops.select_bands(x.q, x.k, *bands, [top_p], **sizes),
        "pool": lambda x: ops.select_bands(x.q, x.k, *bands, [1.0], **sizes),
        "select": lambda x: ops.select_bands(
            x.q, None, *bands, [top_p], k_means=x.k_means, k_len=length, **sizes
        ),
        "pool q": lambda x: ops.block_pool(x.q, block),
        "pool k": lambda x: ops.block_pool(x.k, block),
        **{stage: append(tokens) for stage, tokens in APPENDED.items()},
    }


def grid_calls(block: int, top_p: float) -> dict[str, Call]:
    """The grid estimator, whose query blocks are of 128 tokens."""
    grid = torch.ops.prism.select_grid
    keep_above = [(1 - top_p) / 10] if top_p < 1 else None
    rules = {"keep_above": keep_above, "q_block_size": 128, "k_block_size": block}
    return {
        "estimate": lambda x: grid(x.q, x.k, [top_p], **rules),
        "pool": lambda x: grid(x.q, x.k, [1.0], **rules),
    }


def reference_call(block: int, head_dim: int, top_p: float) -> Call:
    def call(x: Inputs) -> Any:
        return reference.select_bands(
            x.q, x.k, *default_bands(head_dim), [top_p], q_block_size=block, k_block_size=block
        )

    return call


def bytes_read(stage: str, x: Inputs) -> int:
    if stage in APPENDED:
        return x.k[:, :, -APPENDED[stage] :].nbytes
    tensors = {
        "select": (x.q, x.k_means),
        "pool q": (x.q,),
        "pool k": (x.k,),
    }.get(stage, (x.q, x.k))
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def load_official(checkout: Path) -> types.ModuleType:
    """prism/prism.py of a checkout of xinghaow99/prism, without the model patches it imports."""
    root = checkout / "prism"
    if not (root / "prism.py").exists():
        raise FileNotFoundError(f"--official: no {root / 'prism.py'}")
    name = "official_prism"
    for package, path in ((name, root), (f"{name}.utils", root / "utils"),
                          (f"{name}.kernels", root / "kernels")):  # fmt: skip
        module = types.ModuleType(package)
        module.__path__ = [str(path)]
        sys.modules[package] = module
    patch = types.ModuleType(f"{name}.utils.patch")
    patch.__dict__.update(_SUPPORTED_MODELS={}, apply_patch=None, get_rotary_fn=None)
    sys.modules[patch.__name__] = patch
    spec = importlib.util.spec_from_file_location(f"{name}.prism", root / "prism.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def draw(options: argparse.Namespace, length: int, seed: int) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(heads: int) -> Tensor:
        shape = (1, heads, length, options.head_dim)
        x = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        # A mean that changes from block to block: plain noise pools to nothing.
        x.normal_(generator=generator)
        drift = torch.randn(
            1, heads, math.ceil(length / 64), options.head_dim, device="cuda", generator=generator
        )
        x.add_(drift.bfloat16().repeat_interleave(64, dim=2)[:, :, :length])
        return x

    return Inputs(normal(options.heads), normal(options.kv_heads))


def input_sets(size: int) -> int:
    """As many as it takes for one round to push the first out of L2; large inputs do so alone."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(8, math.ceil(L2_MULTIPLE * l2 / max(size, 1))))


def extra_mb(call: Call, x: Inputs) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(x)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def time_call(
    call: Call, inputs: list[Inputs], mode: str, read: int, budget_ms: float
) -> dict[str, Any]:
    """The figures of one row, or the error in their place."""
    try:
        memory = extra_mb(call, inputs[0])
        ms = measure(call, inputs, mode, warmup=1, budget_ms=budget_ms)
    except (RuntimeError, NotImplementedError) as error:  # out of memory is a RuntimeError too
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return {"error": (str(error).splitlines() or [type(error).__name__])[0][:80]}
    return {"ms": ms, "MB": memory, "GB/s": read / ms / 1e6}


def density(call: Call, x: Inputs) -> float:
    _, counts = call(x)
    blocks = counts.shape[-1]
    return float(counts.sum(dtype=torch.int64)) / (
        counts[..., 0].numel() * blocks * (blocks + 1) / 2
    )


def official_rows(
    module: types.ModuleType, inputs: list[Inputs], block: int, top_p: float, budget_ms: float
) -> list[tuple[str, dict[str, Any]]]:
    groups = inputs[0].q.shape[1] // inputs[0].k.shape[1]
    read = bytes_read("estimate", inputs[0])
    repeat = time_call(
        lambda x: module.repeat_kv(x.k, groups), inputs[:1], "eager", inputs[0].k.nbytes, budget_ms
    )
    repeated = [Inputs(x.q, module.repeat_kv(x.k, groups)) for x in inputs[:2]]
    settings = {
        "block_size": block, "low_freq_threshold": top_p, "high_freq_threshold": top_p,
        "low_freq_dim": inputs[0].q.shape[3] * 3 // 4, "high_freq_dim": inputs[0].q.shape[3] // 2,
    }  # fmt: skip
    whole = time_call(
        lambda x: module.prism_block_estimate(x.q, x.k, **settings), repeated, "eager", read,
        budget_ms,
    )  # fmt: skip
    return [("repeat kv", repeat), ("estimate", whole)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--blocks", type=int, nargs="+", default=[128, 64], choices=(64, 128))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128, choices=HEAD_DIMS)
    parser.add_argument("--budget-ms", type=float, default=150, help="replays of one row, together")
    parser.add_argument("--no-reference", action="store_true")
    parser.add_argument("--official", type=Path, help="checkout of github.com/xinghaow99/prism")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    module = load_official(options.official) if options.official else None

    rows: list[dict[str, Any]] = []

    def add(
        length: int, block: int | str, stage: str, impl: str, mode: str, row: dict[str, Any]
    ) -> None:
        rows.append({"L": length, "B": block, "stage": stage, "impl": impl, "mode": mode} | row)
        print_table([rows[-1]], COLUMNS)

    for length in options.lengths:
        torch.cuda.empty_cache()
        try:
            first = draw(options, length, 0)
            sets = input_sets(bytes_read("estimate", first))
            inputs = [first] + [draw(options, length, seed) for seed in range(1, sets)]
        except torch.cuda.OutOfMemoryError as error:
            add(length, 0, "draw", "ours", "-", {"error": str(error).splitlines()[0][:80]})
            continue
        for block in options.blocks:
            for x in inputs:
                x.k_means = torch.ops.prism.block_pool(x.k, block)
                shape = (1, options.kv_heads, running_sums(options.head_dim), options.head_dim)
                x.sums = torch.zeros(shape, device="cuda")
            calls = stage_calls(block, length, options.head_dim, options.top_p)
            kept = {"kept_density": density(calls["estimate"], first), "top_p": options.top_p}
            for stage in options.stages:
                row = time_call(
                    calls[stage], inputs, "graph", bytes_read(stage, first), options.budget_ms
                )
                add(length, block, stage, "ours", "graph", row | kept)
            for stage, call in grid_calls(block, options.top_p).items():
                if stage in options.stages and options.head_dim <= MAX_HEAD_DIM["grid"]:
                    row = time_call(
                        call, inputs, "graph", bytes_read(stage, first), options.budget_ms
                    )
                    add(length, f"128x{block}", stage, "prism_grid", "graph", row)
            if not options.no_reference and length <= REFERENCE_UP_TO:
                call = reference_call(block, options.head_dim, options.top_p)
                row = time_call(call, inputs[:1], "eager", bytes_read("estimate", first), 20)
                add(length, block, "estimate", "reference", "eager", row)
            if module is not None and length <= OFFICIAL_UP_TO:
                for stage, row in official_rows(
                    module, inputs, block, options.top_p, options.budget_ms
                ):
                    add(length, block, stage, "official", "eager", row)
    print()
    print_table(rows, COLUMNS)
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
