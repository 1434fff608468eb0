"""The shape of the package: one direction of dependency, no circles."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import prism_cuda

ROOT = Path(prism_cuda.__file__).parent

# From the ground up: a room imports from rooms before it, and within itself.
ROOMS = (
    ("bits", "bands", "remember", "options", "batch", "tables"),
    ("reference",),
    ("config",),
    ("cpu",),
    ("ops",),
    ("block_mask", "heads"),
    ("recording",),
    ("estimators",),
    ("plan",),
    ("sdpa", "run"),
    ("api", "chunked"),
    ("integrations",),
    ("demo_model", "distributed"),
    ("demo", "doctor", "tune"),
    ("cli",),
    ("__main__",),
)


def modules() -> dict[str, Path]:
    """Every module below prism_cuda by its name within it; packages by their folder's."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of prism_cuda that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] != "prism_cuda":
                continue
            inner = name.removeprefix("prism_cuda").lstrip(".")
            while inner and inner not in known:  # a name within a module
                inner = inner.rpartition(".")[0]
            yield inner


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imports(path, known)) - {name} for name, path in known.items()}


def test_no_circles() -> None:
    tuple(graphlib.TopologicalSorter(graph()).static_order())  # raises CycleError


def test_rooms_import_from_the_rooms_below() -> None:
    rank = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    for name, imported in graph().items():
        room = name.split(".")[0]
        if not room:  # the package itself, which imports what is public
            continue
        assert room in rank, f"{name} belongs to no room"
        for other in imported:
            if other:
                assert rank[other.split(".")[0]] <= rank[room], f"{name} imports {other}"


def test_nothing_asks_what_kind_of_estimator_it_has() -> None:
    classes = {"Estimator", "Grid", "TwoBands", "ByFunction", "KeyState"}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                names = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not names & classes, f"{path}:{node.lineno}"


def test_files_are_short() -> None:
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 600, path
