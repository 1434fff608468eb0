#!/usr/bin/env python3
"""The quality-density frontier: how good each way of selecting blocks is at each density.

Two passes over one model. "heads" attends densely and measures every method on the same queries,
keys and values: density, attention mass recalled and output error per layer and head. "model" runs
the whole model under each method and knob: perplexity and task accuracy. Results go into one JSON
file after every piece; a second run with the same settings continues where the first stopped.

    python bench/quality/frontier.py --out build/quality                    # examples/testbed, CPU
    python bench/quality/frontier.py --model PATH --lengths 16384 32768 --out OUT
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import package  # noqa: F401

# isort: split
import capture
import numpy as np
import plots
import summary
import torch
import transformers
from eval_testbed import held_out_tokens
from evaluate import Suite, Texts, hidden_states, measure
from methods import METHODS, Method, P
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from prism_cuda.tune.tasks import TASKS

TESTBED = Path(__file__).resolve().parents[2] / "examples" / "testbed"

# Measured in this order, so that a run cut short has what matters most; "core" is these.
CORE = (
    "dense",
    "prism",
    "fine",
    "prism_e_64",
    "fine_tail",
    "mean_pool",
    "xattention",
    "vertical_slash",
    "prism_64",
    "fine_t",
    "fine_p",
    "prism_t_64",
    "grid_32_16",
    "grid_128_64",
    "no_calibration",
    "low_only",
    "oracle_e",
    "oracle_t",
    "oracle_p",
    "random",
)

PASSES = ("heads", "model")

# Share of the time that the model pass may use before the heads pass has to start.
MODEL_SHARE = 0.8


class Results:
    """The JSON file, written after every piece."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"settings": settings, "heads": {}, "model": {}}
        if path.exists():
            found = json.loads(path.read_text())
            if found["settings"] != settings:
                old = found["settings"]
                changes = {
                    key: (old.get(key), settings.get(key))
                    for key in sorted({*old, *settings})
                    if old.get(key) != settings.get(key)
                }
                raise SystemExit(
                    f"--out: {path} is of another run, (there, now): {changes}; expected the same "
                    "settings, or another folder"
                )
            self.data = found

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key[1] in self.data[key[0]]

    def add(self, key: tuple[str, str], value: Any) -> None:
        self.data[key[0]][key[1]] = value
        beside = self.path.with_suffix(".new.json")
        beside.write_text(json.dumps(self.data, separators=(",", ":")) + "\n")
        beside.replace(self.path)


def chosen_methods(names: list[str] | None, top_p: list[float] | None = None) -> list[Method]:
    """The methods of these names ("core" for those of CORE), or all, the core first.

    Args:
        top_p: the settings of every method whose knob is p; None for its own.
    """
    if names is None:
        names = [*CORE, *(name for name in METHODS if name not in CORE)]
    names = [part for name in names for part in (CORE if name == "core" else (name,))]
    unknown = set(names) - set(METHODS)
    if unknown:
        raise SystemExit(f"--methods: unknown {sorted(unknown)}; expected some of {list(METHODS)}")
    # Dense comes first: everything is compared with it.
    methods = [METHODS[name] for name in dict.fromkeys(["dense", *names])]
    if top_p is None:
        return methods
    knobs = tuple(sorted(top_p))
    return [
        dataclasses.replace(method, knobs=knobs) if method.knobs == P else method
        for method in methods
    ]


def model_pieces(
    methods: list[Method], lengths: list[int], main_only: bool
) -> Iterator[tuple[int, Method, float]]:
    for method in methods:
        for length in lengths:
            for knob in (method.main,) if main_only else method.knobs:
                yield length, method, knob


def run_heads(
    model: Any, results: Results, methods: list[Method], length: int, texts: Texts, deadline: float
) -> None:
    """Measure every knob of every method on the attention calls of one text with planted copies."""
    sample = next(iter(texts.samples.values()), None)
    ids = sample[0].ids if sample else texts.windows[0]
    pieces = [method for method in methods if ("heads", f"{length}/{method.name}") not in results]
    for method in tqdm(pieces, desc=f"heads, {length} tokens", unit="method", dynamic_ncols=True):
        if time.monotonic() > deadline:
            return
        comparing = capture.Comparing([(method, knob) for knob in method.knobs])
        with capture.handling(comparing):
            hidden_states(model, ids)
        results.add(("heads", f"{length}/{method.name}"), comparing.table())


def run_model(
    model: Any,
    results: Results,
    methods: list[Method],
    texts: dict[int, Texts],
    main_only: bool,
    deadline: float,
) -> None:
    """Perplexity and accuracy of the whole model under every method and knob."""
    pieces = [
        (length, method, knob)
        for length, method, knob in model_pieces(methods, list(texts), main_only)
        if ("model", f"{length}/{method.name}/{knob}") not in results
    ]
    progress = tqdm(pieces, desc="model", unit="run", dynamic_ncols=True)
    for length, method, knob in progress:
        if time.monotonic() > deadline:
            tqdm.write(f"out of time with {len(pieces) - progress.n} of {len(pieces)} runs to do")
            return
        progress.set_postfix_str(f"{method.name} {knob} at {length}")
        selecting = capture.Selecting(method, knob)
        begin = time.perf_counter()
        with capture.handling(selecting):
            measured = measure(model, texts[length])
        entry = {"length": length, "method": method.name, "knob": knob, **selecting.summary()}
        seconds = {"seconds": round(time.perf_counter() - begin, 2)}
        results.add(("model", f"{length}/{method.name}/{knob}"), entry | measured | seconds)


def load(path: Path, device: torch.device) -> tuple[Any, Any]:
    """Model and tokenizer, attending through capture."""
    capture.register()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=capture.NAME
    )
    return model.to(device).eval(), tokenizer


def held_out(path: Path | None, tokenizer: Any, needed: int) -> np.ndarray:
    """Tokens of a text file, or of this Python's standard library."""
    if path is not None:
        return np.array(tokenizer(path.read_text(), verbose=False)["input_ids"], dtype=np.int64)
    # Enough for the longest sequences at several places.
    files = max(40, needed // 4000)
    return held_out_tokens(tokenizer, Path(sysconfig.get_paths()["stdlib"]), files)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=TESTBED, help="a transformers model")
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON and plots")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096], metavar="TOKENS")
    methods = f"'core' (the main comparison) and any of {', '.join(METHODS)}; default: all"
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=methods)
    parser.add_argument("--top-p", type=float, nargs="+", metavar="P", help=f"default: {P}")
    parser.add_argument("--main-only", action="store_true", help="one knob per method in 'model'")
    parser.add_argument("--passes", nargs="+", default=["heads", "model"], choices=PASSES)
    parser.add_argument("--windows", type=int, default=2, help="perplexity windows per length")
    parser.add_argument("--samples", type=int, default=1, help="sequences per task")
    parser.add_argument("--instances", type=int, default=16, help="questions per sequence, about")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--text", type=Path, help="held-out text (default: standard library)")
    parser.add_argument("--minutes", type=float, default=60, help="stop after this time")
    parser.add_argument("--no-plots", action="store_true", help="write the JSON file alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    start = time.monotonic()
    device = torch.device(args.device)
    # Products of bf16 queries and keys are exact in TF32, which is several times faster.
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(args.model, device)
    longest = max(args.lengths)
    tokens = held_out(args.text, tokenizer, longest * (args.windows + args.samples))
    settings = {
        "model": str(args.model),
        "parameters": sum(param.numel() for param in model.parameters()),
        "windows": args.windows,
        "samples": args.samples,
        "instances": args.instances,
        "tasks": args.tasks,
        "seed": args.seed,
        "lengths": args.lengths,
        "text": hashlib.sha256(tokens.tobytes()).hexdigest()[:16],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "dtype": str(model.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    results = Results(args.out / "frontier.json", settings)
    print(f"{args.model} on {settings['device']}, results in {results.path}", flush=True)
    methods = chosen_methods(args.methods, args.top_p)
    texts = {}
    for length in args.lengths:
        suite = Suite(length, args.windows, args.samples, args.instances, tuple(args.tasks))
        texts[length] = Texts.build(suite, tokens, tokenizer, args.seed)
    if "model" in args.passes:
        share = MODEL_SHARE if "heads" in args.passes else 1
        deadline = start + share * 60 * args.minutes
        run_model(model, results, methods, texts, args.main_only, deadline)
    deadline = start + 60 * args.minutes
    if "heads" in args.passes:
        for length in args.lengths:
            run_heads(model, results, methods, length, texts[length], deadline)
    summary.print_tables(results.data)
    if not args.no_plots:
        plots.draw_all(results.data, args.out)


if __name__ == "__main__":
    sys.exit(main())
