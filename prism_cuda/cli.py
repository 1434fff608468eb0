"""Command line: ``python -m prism_cuda`` with ``info``, ``doctor``, ``demo`` or ``tune``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import prism_cuda
from prism_cuda import ops
from prism_cuda.tables import print_table

ESTIMATORS = ("auto", "grid", "bands")


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

    doctor = commands.add_parser("doctor", help="what is wrong on this machine, and what mends it")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser("demo", help="one real model with dense attention and with prism")
    models = "smollm2 (downloaded once, the default), testbed, or a Hugging Face model folder"
    demo.add_argument("--model", help=models)
    demo.add_argument("--tokens", type=int, help="tokens to prefill (8192; 6144 on a CPU)")
    demo.add_argument("--top-p", type=float, default=prism_cuda.PrismConfig.top_p)
    demo.add_argument("--estimator", choices=ESTIMATORS, default=prism_cuda.PrismConfig.estimator)
    demo.add_argument("--layer", type=int, help="layer whose masks are drawn (the middle one)")
    demo.add_argument("--output", type=Path, default=Path("block_masks.png"))
    demo.add_argument("--json", type=Path, help="file for the figures of both passes")
    demo.set_defaults(run=_demo)

    tune = commands.add_parser("tune", help="what settings cost a model; budgets for its heads")
    tune.add_argument("model", help="smollm2, testbed, or a Hugging Face folder or name")
    tune.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE")
    tune.add_argument("--lengths", type=int, nargs="+", default=[8192], metavar="TOKENS")
    tune.add_argument("--top-p", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    tune.add_argument("--like", type=float, default=0.95, help="top_p whose error is to be kept")
    tune.add_argument("--windows", type=int, default=6, help="windows a length to judge on")
    tune.add_argument("--passes", type=int, default=6, help="windows to tune on")
    tune.add_argument("--by", choices=("head", "layer"), default="head", help="what gets a budget")
    tune.add_argument("--out", type=Path, default=Path("prism.json"), help="the config file")
    tune.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    tune.set_defaults(run=_tune)
    return parser


def _tune(args: argparse.Namespace) -> int:
    from prism_cuda.tune import run

    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(run.Options)}
    run.run(run.Options(**values))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from prism_cuda import demo

    config = prism_cuda.PrismConfig(estimator=args.estimator, top_p=args.top_p)
    demo.run(demo.model_folder(args.model), args.tokens, config, args.layer, args.output, args.json)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    """Exit status 0 where nothing is to be mended."""
    from prism_cuda import doctor

    findings = list(doctor.examine())
    if args.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        print_table("prism_cuda doctor", ("what", "found"), [(f.what, f.value) for f in findings])
        problems = [finding for finding in findings if finding.mend]
        for problem in problems:
            print(f"\n{problem.what}: {problem.mend}")
        print("\nall is well" if not problems else f"\n{len(problems)} to mend")
    return 1 if any(finding.mend for finding in findings) else 0


def _info(args: argparse.Namespace) -> int:
    rows: list[tuple[str, ...]] = [
        ("prism_cuda", prism_cuda.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("transformers", _installed("transformers")),
    ]
    if ops.is_loaded():
        rows += [(f"build: {key}", _show(value)) for key, value in _build_config().items()]
    else:
        rows.append(("ops library", f"not built ({ops.LIBRARY.name} missing: `make build`)"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows.append(("device", _device_name(device)))
    print_table("prism_cuda", ("what", "value"), rows)
    if ops.is_loaded():
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
        return "cpu (PyTorch runs; kernels need a GPU of compute capability 8.0 or later)"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
