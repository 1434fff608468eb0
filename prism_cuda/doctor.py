"""``python -m prism_cuda doctor``: what this machine has, whether every op is right on it, and for
each problem the sentence that mends it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from prism_cuda import ops, reference
from prism_cuda.integrations import TRANSFORMERS

MINIMUM_TORCH = (2, 10)
MINIMUM_NVCC = (12, 3)
MINIMUM_CAPABILITY = (8, 0)


@dataclass
class Finding:
    what: str
    value: str
    mend: str = ""  # what to do; empty: nothing is wrong


def release(version: str) -> tuple[int, int]:
    """Return (major, minor) of a version such as "2.13.0+cpu"."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def examine() -> Iterator[Finding]:
    """Yield what there is, from the compilers up to the ops."""
    with contextlib.suppress(ImportError):  # said again by _library
        ops.load()
    yield Finding("python", platform.python_version())
    yield from _toolchain()
    yield from _packages()
    yield from _gpu()
    yield from _library()
    if ops.is_loaded():
        yield from self_test()


def _toolchain() -> Iterator[Finding]:
    """Only needed to build, so what is missing is no problem where the library is built."""
    built = ops.is_loaded()
    compiler = shutil.which("c++")
    mend = "" if compiler or built else "install a C++17 compiler (apt install g++)"
    yield Finding("c++", _first_line(compiler, "--version") if compiler else "not found", mend)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    nvcc = nvcc or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        mend = "" if built else "install a CUDA toolkit, or build with PRISM_CPU_ONLY=1"
        yield Finding("nvcc", "not found", mend)
        return
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    old = version < MINIMUM_NVCC
    mend = "point CUDA_HOME at a CUDA toolkit of 12.3 or newer" if old and not built else ""
    yield Finding("nvcc", f"{version[0]}.{version[1]} ({nvcc})", mend)


def _first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


def _packages() -> Iterator[Finding]:
    old = release(torch.__version__) < MINIMUM_TORCH
    mend = f"prism_cuda needs torch >= 2.10, this is {torch.__version__}: upgrade torch"
    yield Finding("torch", torch.__version__, mend if old else "")
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("transformers", "not installed (only models need it)")
        return
    fits = TRANSFORMERS[0] <= release(version) < TRANSFORMERS[1]
    mend = f"prism_cuda needs transformers >= 5.17 and < 6, this is {version}"
    yield Finding("transformers", version, "" if fits else mend)


def _gpu() -> Iterator[Finding]:
    driver = _driver()
    if driver:
        yield Finding("driver", driver)
    if torch.version.cuda is None:
        mend = "this torch has no CUDA: install one that has, from PyPI or download.pytorch.org"
        yield Finding("CUDA of torch", "none", mend if driver else "")
        yield Finding("GPU", "not used" if driver else "none; the reference runs on the CPU")
        return
    yield Finding("CUDA of torch", torch.version.cuda)
    if not torch.cuda.is_available():
        mend = f"torch cannot use the GPU: its CUDA {torch.version.cuda} may want a newer driver"
        yield Finding("GPU", "none that torch can use", mend if driver else "")
        return
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        old = capability < MINIMUM_CAPABILITY
        mend = "kernels need a GPU of compute capability 8.0 or later" if old else ""
        name = f"{torch.cuda.get_device_name(index)}, sm_{capability[0]}{capability[1]}"
        yield Finding(f"GPU {index}", name, mend)


def _driver() -> str:
    """Return the driver's version and what it drives, empty where there is no GPU."""
    command = ("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")
    return _first_line(*command) if shutil.which("nvidia-smi") else ""


def runs_on(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for one of `archs`, such as "80+PTX" or "90a", runs on such a GPU."""
    number = capability[0] * 10 + capability[1]
    for arch in archs:
        match = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", arch)
        if match is None:
            continue
        made_for, only, ptx = int(match[1]), match[2], match[3]
        same_major = made_for // 10 == number // 10 and made_for <= number
        if made_for == number or (not only and (same_major or (ptx and made_for <= number))):
            return True
    return False


def _library() -> Iterator[Finding]:
    if not ops.is_loaded():
        try:
            ops.load()
        except ImportError as error:
            yield Finding("ops library", "not loaded", str(error))
            return
    config = json.loads(torch.ops.prism.build_config())
    yield Finding("ops library", f"{config['version']}, commit {config['git']}")
    archs = config["archs"]
    if config["cuda"] is None:
        mend = "this build has no kernels: build again with a CUDA toolkit (make build)"
        yield Finding("compiled for", "the CPU", mend if torch.cuda.is_available() else "")
        return
    mend = ""
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if not runs_on(archs, capability):
            name = f"{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")
            mend = f'build again with PRISM_CUDA_ARCHS="{name}"'
        elif capability == (9, 0) and "90a" not in archs:
            mend = 'the Hopper kernels are missing: build again with PRISM_CUDA_ARCHS="80+PTX;90a"'
    yield Finding("compiled for", f"{', '.join(archs)} by CUDA {config['cuda']}", mend)


# The self-test: a small call of every op, on this device and by the reference in float32.

BLOCK = 128
TOP_P = [0.9]
BANDS = ([0, 32, 64, 96], [16, 64, 80, 128])  # of rotate-half RoPE with 128 dimensions


def _inputs() -> dict[str, torch.Tensor]:
    """Return q, k, v with a structure that selections find: neighbours look at each other."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base = noise(1, 1, 1024, 128).cumsum(2) / 16
    q, k, v = base + noise(1, 4, 1024, 128), base + noise(1, 2, 1024, 128), noise(1, 2, 1024, 128)
    return {"q": q.bfloat16(), "k": k.bfloat16(), "v": v.bfloat16()}


def _append_means(run: Callable[..., Any], x: dict[str, torch.Tensor]) -> Any:
    means, sums = x["k"].new_zeros((2, 1, 2, 8, 128), dtype=torch.float32)
    run("append_means_", x["k"], means, sums, 0, BLOCK)
    return means


def _pool_cells(run: Callable[..., Any], x: dict[str, torch.Tensor]) -> Any:
    cells = torch.zeros((1, 2, 64, 256), dtype=torch.float16, device=x["k"].device)
    factors = torch.zeros((1, 2, 64), device=x["k"].device)
    run("pool_cells_", x["k"], cells, factors, 0)
    return cells.float() * factors[..., None]


def _attention(run: Callable[..., Any], x: dict[str, torch.Tensor]) -> Any:
    # Every other block: rows of 8 blocks in one word.
    bits = torch.full((1, 4, 8, 1), 0b01010101, dtype=torch.int32, device=x["q"].device)
    visible = torch.arange(8, device=x["q"].device).view(1, 1, 8, 1)
    bits &= (2 << visible).sub(1).to(torch.int32)
    counts = (visible[..., 0] // 2 + 1).to(torch.int32).expand(1, 4, 8).contiguous()
    out, _ = run("sparse_attention", x["q"], x["k"], x["v"], bits, counts, None, True, BLOCK, BLOCK)
    return out


def _prefill(estimator: str, rules: list[float]) -> Callable[..., Any]:
    bands = BANDS if estimator == "bands" else ([], [])

    def call(run: Callable[..., Any], x: dict[str, torch.Tensor]) -> Any:
        return run("prefill", x["q"], x["k"], x["v"], estimator, *bands, rules,
                   q_block_size=BLOCK, k_block_size=BLOCK)[0]  # fmt: skip

    return call


# name: the call, and how far the largest element may be off: bits are compared by the share of
# blocks that differ, as a selection's near-ties may fall either way.
CALLS: dict[str, tuple[Callable[..., Any], float]] = {
    "block_pool": (lambda run, x: run("block_pool", x["k"], BLOCK), 1e-3),
    "append_means_": (_append_means, 1e-3),
    "pool_cells_": (_pool_cells, 3e-2),
    "select_bands": (
        lambda run, x: run("select_bands", x["q"], x["k"], *BANDS, TOP_P,
                           q_block_size=BLOCK, k_block_size=BLOCK)[0],
        0.05,
    ),
    "select_grid": (
        lambda run, x: run("select_grid", x["q"], x["k"], TOP_P,
                           q_block_size=BLOCK, k_block_size=BLOCK)[0],
        0.05,
    ),
    "sparse_attention": (_attention, 3e-2),
    "prefill, all blocks": (_prefill("all", [1.0]), 3e-2),
    "prefill, by the grid": (_prefill("grid", [1.0]), 3e-2),
    "prefill, by bands": (_prefill("bands", [1.0]), 3e-2),
}  # fmt: skip


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the share of bits that differ, or the largest difference of numbers."""
    actual = actual.cpu()
    if actual.dtype == torch.int32:
        shifts = torch.arange(32, dtype=torch.int32)
        bits = (((t[..., None] >> shifts) & 1) for t in (actual, expected))
        ours, theirs = bits
        return float((ours != theirs).sum() / theirs.sum().clamp(min=1))
    worst = (actual.float() - expected.float()).abs().max()
    return float("inf") if worst.isnan() else float(worst)


def self_test() -> Iterator[Finding]:
    """Call every op on this machine's device and compare with the reference."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    inputs = _inputs()
    wide = {name: tensor.float() for name, tensor in inputs.items()}
    here = {name: tensor.to(device) for name, tensor in inputs.items()}

    def by_op(name: str, *args: object, **kwargs: object) -> Any:
        return getattr(torch.ops.prism, name)(*args, **kwargs)

    def by_reference(name: str, *args: object, **kwargs: object) -> Any:
        return getattr(reference, name)(*args, **kwargs)

    for name, (call, allowed) in CALLS.items():
        mend = ""
        try:
            with torch.inference_mode():
                off = difference(call(by_op, here), call(by_reference, wide))
            value = f"off by {off:.2g}, allowed {allowed:.2g}"
            if off > allowed:
                mend = f"{name} is wrong on this {device}: please report this with the table above"
        except (RuntimeError, ImportError) as error:
            value, mend = "failed", f"{name} on this {device}: {str(error).splitlines()[0]}"
        yield Finding(f"test: {name}", value, mend)
    yield Finding("test took", f"{time.perf_counter() - started:.1f} s on {device}")
