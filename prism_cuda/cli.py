"""Command line: ``python -m prism_cuda info`` and ``python -m prism_cuda demo``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import prism_cuda
from prism_cuda import _ops
from prism_cuda.config import ESTIMATORS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ImportError, FileNotFoundError, RuntimeError, ValueError) as error:
        print(f"prism_cuda {args.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m prism_cuda", description=prism_cuda.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="versions, compiled archs, device, kernels dispatched")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="one real model with dense attention and with prism")
    models = "smollm2 (downloaded once, the default), testbed, or a Hugging Face model folder"
    demo.add_argument("--model", help=models)
    demo.add_argument("--tokens", type=int, help="tokens to prefill (8192; 4096 on a CPU)")
    demo.add_argument("--top-p", type=float, default=prism_cuda.PrismConfig.top_p)
    demo.add_argument("--estimator", choices=ESTIMATORS, default=prism_cuda.PrismConfig.estimator)
    demo.add_argument("--layer", type=int, help="layer whose masks are drawn (the middle one)")
    demo.add_argument("--output", type=Path, default=Path("block_masks.png"))
    demo.set_defaults(run=_demo)
    return parser


def _demo(args: argparse.Namespace) -> int:
    from prism_cuda import demo

    config = prism_cuda.PrismConfig(estimator=args.estimator, top_p=args.top_p)
    demo.run(demo.model_folder(args.model), args.tokens, config, args.layer, args.output)
    return 0


def _info(args: argparse.Namespace) -> int:
    rows: list[tuple[str, ...]] = [
        ("prism_cuda", prism_cuda.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("transformers", _installed("transformers")),
    ]
    if _ops.is_loaded():
        rows += [(f"build: {key}", _show(value)) for key, value in _build_config().items()]
    else:
        rows.append(("ops library", f"not built ({_ops.LIBRARY.name} missing: `make build`)"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows.append(("device", _device_name(device)))
    print_table("prism_cuda", ("what", "value"), rows)
    if _ops.is_loaded():
        print_table(
            f"prefill on {device.type}",
            ("q_len", "k_len", "head_dim", "dtype", "runs", "reason"),
            _dispatch_rows(device),
        )
    return 0


def _dispatch_rows(device: torch.device) -> list[tuple[str, ...]]:
    shapes = [
        (1, 32768, 128, torch.bfloat16),
        (2048, 2048, 128, torch.bfloat16),
        (32768, 32768, 128, torch.bfloat16),
        (4096, 32768, 128, torch.bfloat16),
        (32768, 32768, 64, torch.float16),
        (32768, 32768, 96, torch.bfloat16),
        (32768, 32768, 128, torch.float32),
    ]
    rows: list[tuple[str, ...]] = []
    for q_len, k_len, head_dim, dtype in shapes:
        choice = prism_cuda.dispatch(q_len, k_len, head_dim, dtype, device)
        by = choice.kernel if choice.estimator is None else f"{choice.kernel}, {choice.estimator}"
        runs = f"{choice.path} ({by})"
        dtype_name = str(dtype).removeprefix("torch.")
        rows.append((str(q_len), str(k_len), str(head_dim), dtype_name, runs, choice.reason))
    return rows


def _build_config() -> dict[str, object]:
    return json.loads(torch.ops.prism.build_config())


def _show(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu (the reference runs; kernels need a GPU of compute capability 8.0 or later)"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, with rich where it is installed and the output is a terminal."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(*header, title=title, title_justify="left")
            for row in rows:
                table.add_row(*row)
            Console().print(table)
            return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}")
    for row in [header, *rows]:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  " + "  ".join(cells).rstrip())
