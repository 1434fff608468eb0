"""The order of the rooms under csrc/kernels, and that introspection sees every kernel."""

from __future__ import annotations

import re
import subprocess
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tools import mutations

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "prism_cuda" / "_C.abi3.so"
KERNELS = ROOT / "csrc" / "kernels"
SOURCES = sorted(path for path in KERNELS.rglob("*") if path.suffix in {".h", ".cuh", ".cu"})
# What a room may include beside itself. "" is the folder itself: parameters and introspection.
ROOMS = {
    "": set(),
    "common": {""},
    "keep": {"", "common"},
    "bands": {"", "common", "keep"},
    "grid": {"", "common", "keep"},
    "attention": {"", "common"},
    "attention/sm80": {"", "common", "attention"},
    "attention/sm90": {"", "common", "attention"},
}
# The one file that reaches into its kernels.
DISPATCHER = KERNELS / "attention" / "sparse_attention.cu"


def included(path: Path) -> list[Path]:
    names = re.findall(r'#include "(kernels/[^"]+)"', path.read_text())
    return [KERNELS.parent / name for name in names]


def room(path: Path) -> str:
    parent = path.parent.relative_to(KERNELS).as_posix().removesuffix("instantiations")
    return parent.rstrip("/").removeprefix(".")


def test_includes_exist_and_have_no_circles():
    graph = {path: included(path) for path in SOURCES}
    missing = [str(name) for names in graph.values() for name in names if not name.is_file()]
    assert not missing
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"include circle: {' -> '.join(path.name for path in error.args[1])}")


def test_no_room_includes_one_above_it():
    arrows = {
        f"{path.relative_to(KERNELS)} includes {target.relative_to(KERNELS)}"
        for path in SOURCES
        if path != DISPATCHER
        for target in included(path)
        if room(target) != room(path) and room(target) not in ROOMS[room(path)]
    }
    assert not arrows


def test_mutations_find_their_places():
    for mutation in (*mutations.CPU, *mutations.GPU):
        assert (ROOT / mutation.file).read_text().count(mutation.old) == 1, mutation.name


def kernel_names() -> set[str]:
    """Names of kernels in the source."""
    text = "\n".join(path.read_text() for path in SOURCES)
    names = re.findall(r"__global__ void\b[^;{]*?(\w+)\(\s*const __grid_constant__", text)
    assert len(names) == text.count("__global__ void")
    return set(names)


def test_introspection_lists_every_kernel():
    introspect = pytest.importorskip("prism_cuda._introspect")  # of builds with CUDA alone
    command = ["nm", "--demangle", "--defined-only", str(LIBRARY)]
    try:
        symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        pytest.skip("needs nm")
    # The host's side of a kernel: a function of its name, without its parts in other sections.
    name = rf"(?:void )?prism::[\w:() ]*(?:{'|'.join(kernel_names())})[<(][^\[\n]*$"
    kernels = set(re.findall(rf" [tTwW] ({name})", symbols, re.MULTILINE))
    if not kernels:
        pytest.skip("the library was stripped")
    listed = [kernel.name for kernel in introspect.list_kernels()]
    if not any(name.startswith("sparse_attention_sm90") for name in listed):
        # Built without code for 9.0: those kernels are empty.
        kernels = {name for name in kernels if "prism::sm90::" not in name}
    assert len(set(listed)) == len(listed) == len(kernels)
