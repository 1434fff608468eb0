"""Seeds mistakes in kernels, checks and Python, one at a time: which of them do the tests see?

    python tools/mutations.py cpu                   checks, reference and plan; any build will do
    python tools/mutations.py gpu                   kernels; needs a GPU and the build in place
    python tools/mutations.py gpu NAME ... --jobs 6 --out FILE

Build in place first, in the same environment (PRISM_CPU_ONLY, CUTLASS_PATH, ...). Every mutation
gets a copy of the tree, the build folder included, in which the objects that its file reaches are
compiled anew and the named tests run with -x. Prints JSON: "caught" if a test failed or hung,
"survived" if none did, "broken" if it did not come to that. Exits 1 unless all were caught.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Semaphore

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".git", ".venv", ".hypothesis", "*_cache", "__pycache__", "results", "examples")
LONGEST = 240  # seconds that the tests of a mutation may take
compilers = Semaphore(os.cpu_count() or 1)


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str  # stands once in the file
    new: str
    tests: str  # what pytest is given
    objects: str = ""  # of those that the file reaches, the ones whose path has this; all if empty


CPU = (
    Mutation(
        "plan: dense_below itself is short",
        "prism_cuda/plan.py",
        "if k_len < config.dense_below:",
        "if k_len <= config.dense_below:",
        "tests/test_functional.py -k dispatch",
    ),
    Mutation(
        "plan: any number of heads fits",
        "prism_cuda/plan.py",
        "if kv_heads == 0 or q_heads % kv_heads:",
        "if kv_heads == 0:",
        "tests/test_functional.py",
    ),
    Mutation(
        "options: a window of all keys hides one",
        "prism_cuda/options.py",
        "self.window_left + 1 < k_len",
        "self.window_left < k_len",
        "tests/test_functional.py",
    ),
    Mutation(
        "estimators: short chunks of long sequences are selected",
        "prism_cuda/estimators/base.py",
        '{"dense_below": max(config.dense_below, 1)}',
        '{"dense_below": config.dense_below}',
        "tests/ops/test_prefill_varlen.py tests/test_varlen_functions.py tests/test_recording.py",
    ),
    Mutation(
        "chunked: an append goes on after a cut unit",
        "prism_cuda/chunked.py",
        "self._in_order = length % self._keys.unit == 0",
        "self._in_order = True",
        "tests/test_chunked.py tests/ops/test_chunked_prefill.py",
    ),
    Mutation(
        "bits: the window's first block is lost",
        "prism_cuda/bits.py",
        "(row + offset - window_left) // k_block_size)",
        "(row + offset - window_left + 1) // k_block_size)",
        "tests/test_block_mask.py",
    ),
    Mutation(
        "reference: top_p takes one block more",
        "prism_cuda/reference/blocks.py",
        "sum_before < top_p)",
        "sum_before <= top_p)",
        "tests/test_reference.py tests/ops/test_golden.py tests/ops/test_select_bands.py",
    ),
    Mutation(
        "reference: a block's last token is no longer recent",
        "prism_cuda/reference/blocks.py",
        "last = (first + q_block_size).clamp_max(q_len) - 1",
        "last = (first + q_block_size).clamp_max(q_len) - 2",
        "tests/test_reference.py tests/ops/test_select_bands.py",
    ),
    Mutation(
        "reference: an unfinished block is averaged over a whole one",
        "prism_cuda/reference/bands.py",
        "sizes[-1] = length - (blocks - 1) * block_size",
        "pass",
        "tests/test_reference.py tests/ops/test_block_pool.py",
    ),
    Mutation(
        "reference: a sink has a value",
        "prism_cuda/reference/attention.py",
        "return out * share[:, None], total",
        "return out, total",
        "tests/ops/test_ragged_attention.py -k sinks",
    ),
    Mutation(
        "checks: pages of any power of two",
        "csrc/torch/batch.cpp",
        "page_size >= 1 && page_size <= 256 &&",
        "page_size >= 1 &&",
        "tests/ops/test_errors.py",
    ),
    Mutation(
        "checks: a negative dense_below",
        "csrc/torch/batch.cpp",
        "PRISM_CHECK(dense_below >= 0,",
        "PRISM_CHECK(dense_below >= -1,",
        "tests/ops/test_errors.py",
    ),
    Mutation(
        "checks: sinks of another number of heads",
        "csrc/torch/sparse_attention.cpp",
        '{shape.q_heads}, "(q_heads)")',
        '{scores.sinks->size(0)}, "(q_heads)")',
        "tests/ops/test_errors.py",
    ),
    Mutation(
        "checks: a dense call may have a block table",
        "csrc/torch/batch.cpp",
        'check_none(op, "block_table", sequences.block_table.has_value());',
        "",
        "tests/ops/test_errors.py",
    ),
)

# A file that many objects include is tried in those that the tests of one case run.
SM80 = "sm80/instantiations/bf16_d64."
SM90 = "sm90/instantiations/bf16_d128."
GPU = (
    Mutation(
        "keep: few queries are not short",
        "csrc/kernels/keep/keep_blocks.cu",
        "lengths.q_len < select.q_block_size || lengths.k_len",
        "lengths.k_len",
        "tests/ops/test_ragged_selection.py -k 'short_sequences and cuda'",
    ),
    Mutation(
        "keep: of equal weights one too many",
        "csrc/kernels/keep/top_p.cuh",
        "return {weight, count_ties(static_cast<double>(target) - above_high,",
        "return {weight, 1 + count_ties(static_cast<double>(target) - above_high,",
        "tests/ops/test_select_bands.py -k '(ties or equal) and cuda'",
        "bands/instantiations/select_d64",
    ),
    Mutation(
        "bands: an unfinished block is averaged over a whole one",
        "csrc/kernels/bands/pool_blocks.cuh",
        "const float count = static_cast<float>(rows);",
        "const float count = static_cast<float>(task.block_size);",
        "tests/ops/test_block_pool.py -k cuda",
        "bands/instantiations/pool_bf16_means",
    ),
    Mutation(
        "bands: an append skips a row behind those so far",
        "csrc/kernels/bands/append_means.cu",
        "max(old_rows - group() + kRowGroups - 1, 0) / kRowGroups;",
        "max(old_rows - group() + kRowGroups, 0) / kRowGroups;",
        "tests/ops/test_append_means.py -k cuda",
    ),
    Mutation(
        "grid: an unfinished cell's spread counts what is not there",
        "csrc/kernels/grid/pool_cells.cuh",
        "squares += row < tokens ? difference * difference : 0.f;",
        "squares += difference * difference;",
        "tests/ops/test_grid_cells.py -k 'mean_and_spread and cuda'",
        "grid/instantiations/d64",
    ),
    Mutation(
        "grid: weights up to twice the threshold are not above it",
        "csrc/kernels/grid/mass_row.cuh",
        "sum += x > threshold ? x : 0.f;",
        "sum += x > 2.f * threshold ? x : 0.f;",
        "tests/ops/test_select_grid.py -k 'matches_float64_but and cuda'",
        "grid/instantiations/d64",
    ),
    Mutation(
        "sm80: rows see the key after their own",
        "csrc/kernels/attention/sm80/kernel.cuh",
        "if (key > last_key || key < row_first_key) {",
        "if (key > last_key + 1 || key < row_first_key) {",
        "tests/ops/test_sparse_attention.py -k 'matches_float64 and cuda-bfloat16 and regular'",
        SM80,
    ),
    Mutation(
        "sm90: rows see the key after their own",
        "csrc/kernels/attention/sm90/scheduler.cuh",
        "params.causal ? rows.first_position : sequence.k_len;",
        "params.causal ? rows.first_position + 1 : sequence.k_len;",
        "tests/ops/test_sparse_attention.py -k 'matches_float64 and cuda-bfloat16 and regular'",
        SM90,
    ),
    Mutation(
        "sm90: what a page holds behind its last token is read",
        "csrc/kernels/attention/sm90/loader.cuh",
        "const int filled = min(tile.k_len - (key - slot), ragged.page_size());",
        "const int filled = ragged.page_size();",
        "tests/ops/test_sparse_attention.py -k 'matches_float64 and cuda-bfloat16 and paged'",
        SM90,
    ),
    Mutation(
        "common: seqused_k is not looked at",
        "csrc/kernels/common/batch.cuh",
        "if (ragged.seqused_k != nullptr) {",
        "if (ragged.seqused_k != nullptr && ragged.is_paged()) {",
        "tests/ops/test_sparse_attention.py -k 'matches_float64 and cuda-bfloat16 and unused'",
        SM90,
    ),
)
PARTS = {"cpu": CPU, "gpu": GPU}


def copy_tree(target: Path) -> None:
    """All that building and testing need; times of files are kept, as ninja compares them."""
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)


def compile_commands(file: Path) -> dict[str, str]:
    """Of the objects in the build folder that were made from this file, how each was."""
    commands: dict[str, str] = {}
    for ninja_file in ROOT.glob("build/temp.*/*/build.ninja"):
        folder = ninja_file.parent
        listed = ninja(folder, "deps")
        for paragraph in re.split(r"\n\s*\n", listed):
            head, *headers = paragraph.strip().splitlines() or [""]
            if any((folder / header.strip()).resolve() == file for header in headers):
                target = head.split(": #deps")[0]
                commands[target] = ninja(folder, "commands", target).strip()
    return commands


def ninja(folder: Path, tool: str, *arguments: str) -> str:
    command = ["ninja", "-C", str(folder), "-t", tool, *arguments]
    made = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return "\n".join(line for line in made.splitlines() if not line.startswith("ninja: Entering"))


def rebuild(mutation: Mutation, tree: Path) -> None:
    """Compile in the copy what the mutated file reaches, and link.

    ninja itself would compile everything: it knows objects by their absolute paths.
    """
    commands = compile_commands(ROOT / mutation.file)
    wanted = {target: line for target, line in commands.items() if mutation.objects in target}
    if not wanted:
        raise RuntimeError(f"no object of the build is made from {mutation.file}")

    def compile_one(command: str) -> None:
        with compilers:
            folder = tree / "build"
            run(command.replace(str(ROOT), str(tree)), folder, shell=True)

    with ThreadPoolExecutor(len(wanted)) as pool:
        list(pool.map(compile_one, wanted.values()))
    stub = tree / "build" / "no_ninja" / "ninja"  # setup.py then links what is there
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\necho 1.11\n")
    stub.chmod(0o755)
    path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
    with compilers:
        run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree, PATH=path)


def run(command: str | list[str], folder: Path, shell: bool = False, **environment: str) -> None:
    done = subprocess.run(
        command, cwd=folder, shell=shell, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:])


def try_mutation(mutation: Mutation, scratch: Path) -> dict[str, object]:
    start = time.monotonic()
    row: dict[str, object] = {"name": mutation.name, "file": mutation.file}
    tree = scratch / re.sub(r"\W+", "_", mutation.name)
    try:
        copy_tree(tree)
        file = tree / mutation.file
        text = file.read_text()
        if text.count(mutation.old) != 1:
            raise RuntimeError(f"{mutation.old!r} stands {text.count(mutation.old)} times")
        file.write_text(text.replace(mutation.old, mutation.new))
        if file.suffix != ".py":
            rebuild(mutation, tree)
        row["built_s"] = round(time.monotonic() - start, 1)
        row |= test(mutation, tree)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        row |= {"result": "broken", "why": str(error)}
    shutil.rmtree(tree, ignore_errors=True)
    return row | {"s": round(time.monotonic() - start, 1)}


def test(mutation: Mutation, tree: Path) -> dict[str, str]:
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {mutation.tests}"
    try:
        done = subprocess.run(
            command, cwd=tree, shell=True, timeout=LONGEST, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(tree)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"result": "caught", "by": f"no end within {LONGEST} s"}
    if done.returncode not in (0, 1):
        return {"result": "broken", "why": done.stdout[-2000:]}
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)", done.stdout, re.MULTILINE)
    if failed:
        return {"result": "caught", "by": failed[0]}
    return {"result": "survived", "tests": done.stdout.strip().splitlines()[-1]}


def check_gpu(mutations: Iterable[Mutation]) -> None:
    """Without a GPU the tests of kernels are skipped, and all mutations would survive."""
    import torch

    if not torch.cuda.is_available() and any(mutation in GPU for mutation in mutations):
        raise SystemExit("mutations: the part 'gpu' needs a CUDA device")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("names", nargs="*", help="those whose names have one of these in them")
    parser.add_argument("--jobs", type=int, default=6, help="mutations at a time")
    parser.add_argument("--out", type=Path, help="where to write the JSON, too")
    options = parser.parse_intermixed_args()
    mutations = [
        mutation
        for mutation in PARTS[options.part]
        if not options.names or any(name in mutation.name for name in options.names)
    ]
    check_gpu(mutations)
    with (
        tempfile.TemporaryDirectory(prefix="mutations") as scratch,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        rows = list(pool.map(lambda mutation: try_mutation(mutation, Path(scratch)), mutations))
    text = json.dumps(rows, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    sys.exit(any(row["result"] != "caught" for row in rows))


if __name__ == "__main__":
    main()
