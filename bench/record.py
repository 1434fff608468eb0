"""Where a measurement comes from, its table and its JSON file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def _git_hash() -> str | None:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def source_hash() -> str:
    """SHA-256 over the names and contents of csrc."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(ROOT)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def provenance() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "flash_attn_4": _version("flash-attn-4"),
        "build": json.loads(torch.ops.prism.build_config()),
        "git": _git_hash(),
        "csrc_sha256": source_hash(),
        "command": shlex.join(sys.argv),
    }


def print_table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    def show(value: object) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [columns] + [[show(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def write_json(path: str, rows: list[dict[str, Any]], origin: dict[str, Any] | None = None) -> None:
    """`origin` is `provenance()` where the caller has taken it already."""
    content = (origin or provenance()) | {"rows": rows}
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
    print(f"wrote {path}")
