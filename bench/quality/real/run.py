#!/usr/bin/env python3
"""Real models: density, rise of perplexity and loss of accuracy of ways to choose blocks.

Every sequence is run under dense attention and every setting before the next one begins, so that a
run cut short by --minutes still compares in pairs. Results are written after every sequence; the
same command goes on where it stopped.

    python bench/quality/real/run.py --model FOLDER --texts FOLDER --lengths 8192 32768 \
      --minutes 2 3 --settings grid:0.95 xattention:0.95 true:0.8 --out OUT.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attend_kept as attention
import numpy as np
import scoring
import texts
import torch
import transformers
import tune
from scoring import Runner, counts
from selection import METHODS, Q_BLOCK

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import package  # noqa: E402, F401

from prism_cuda.tune import bounds  # noqa: E402
from prism_cuda.tune.tasks import TASKS, Encoder, Sample, make  # noqa: E402

DENSE = "dense:1"
WINDOW = "window"
# A task counts where dense attention gets more than this share of its answers right.
MASTERED = 0.5


class Results:
    """The JSON file: settings of the run, and a row per (length, kind, index, setting)."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"settings": settings, "rows": {}}
        if path.exists():
            found = json.loads(path.read_text())
            old = found["settings"]
            differing = [key for key in {*old, *settings} if old.get(key) != settings.get(key)]
            if differing:
                changes = {key: (old.get(key), settings.get(key)) for key in differing}
                raise SystemExit(
                    f"--out: {path} is of another run, (there, now): {changes}; expected the same "
                    "settings, or another file"
                )
            self.data = found

    def __contains__(self, key: str) -> bool:
        return key in self.data["rows"]

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.data["rows"][key] = row

    def write(self) -> None:
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.data, separators=(",", ":")) + "\n")
        beside.replace(self.path)


def parse_setting(text: str) -> tuple[str, float]:
    """METHOD:KNOB, or METHOD@FILE:DENSITY for knobs per head that tune.py wrote to FILE."""
    name, _, knob = text.rpartition(":")
    method, _, file = name.partition("@")
    if method not in METHODS:
        raise argparse.ArgumentTypeError(f"unknown method {method!r}; expected one of {[*METHODS]}")
    try:
        return name, float(knob)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected METHOD:KNOB") from None


def present(settings: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Those whose file of knobs exists: a failed fit costs its own settings alone."""
    found = []
    for setting in settings:
        file = setting[0].partition("@")[2]
        if file and not Path(file).exists():
            print(f"left out: {show(setting)}, there is no file {file}", flush=True)
        else:
            found.append(setting)
    return found


def show(setting: tuple[str, float]) -> str:
    method, _, file = setting[0].partition("@")
    return f"{method}{'@tuned' if file else ''}:{setting[1]:g}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a transformers model")
    parser.add_argument("--texts", type=Path, required=True, help="folder of the prose")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192], metavar="TOKENS")
    parser.add_argument("--minutes", type=float, nargs="+", default=[60], help="of every length")
    parser.add_argument(
        "--settings", type=parse_setting, nargs="+", default=[("grid", 0.95)], metavar="METHOD:KNOB"
    )
    parser.add_argument(
        "--role", choices=texts.PROSE, default="screen", help="whose texts and tasks"
    )
    parser.add_argument("--windows", type=int, default=12, help="of perplexity, at most")
    parser.add_argument("--samples", type=int, default=32, help="sequences a task, at most")
    parser.add_argument("--instances", type=int, default=32, help="questions a sequence, about")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--no-greedy", action="store_true", help="score strictly alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if bad := [length for length in args.lengths if length < 1 or length % Q_BLOCK]:
        parser.error(f"--lengths: {bad}; expected multiples of {Q_BLOCK}")
    if len(args.minutes) not in (1, len(args.lengths)):
        parser.error(f"--minutes: {len(args.minutes)} values; expected 1 or one per length")
    return args


def pieces(
    args: argparse.Namespace, length: int, tokens: dict[str, np.ndarray], encode: Encoder
) -> Iterator[tuple[str, int, str, Sample]]:
    """(kind, index, text, sequence): windows and tasks in turn, a function of the arguments."""
    seed = (args.seed, length, list(texts.PROSE).index(args.role))
    found = texts.windows(tokens, length, args.windows, np.random.default_rng(seed))
    names = list(tokens)
    for index in range(max(args.windows, args.samples)):
        if (window := next(found, None)) is not None:
            yield WINDOW, index, window[0], Sample(window[1])
        if index >= args.samples:
            continue
        for number, task in enumerate(args.tasks):
            rng = np.random.default_rng((*seed, list(TASKS).index(task), index))
            name = names[(index + number) % len(names)]
            start = int(rng.integers(0, len(tokens[name]) - length))
            filler = tokens[name][start : start + length]
            yield task, index, name, make(task, rng, encode, filler, args.instances)


def measure(
    runner: Runner, sample: Sample, kind: str, setting: tuple[str, float], greedy: bool
) -> dict[str, Any]:
    begin = time.perf_counter()
    greedy = greedy and kind != WINDOW
    method, _, file = setting[0].partition("@")
    knob = tune.knobs(Path(file), setting[1]) if file else setting[1]
    done = runner.prefill(sample.ids, METHODS[method], knob, greedy)
    row: dict[str, Any] = {}
    if kind == WINDOW:
        row["nats"] = float(runner.nats(sample.ids, done.hidden).mean())
        row["layers"] = {
            layer: [round(x, 4) for x in heads.tolist()] for layer, heads in done.densities.items()
        }
    else:
        row["strict"] = counts(runner.strict(sample, done))
        if greedy:
            row["greedy"] = counts(runner.greedy(sample, done))
    densities = [float(heads.mean()) for heads in done.densities.values()]
    row["density"] = round(float(np.mean(densities)), 5) if densities else 1.0
    row["seconds"] = round(time.perf_counter() - begin, 3)
    return row


def summarize(data: dict[str, Any], length: int) -> list[dict[str, Any]]:
    """One row per setting: density, perplexity_rise and accuracy_loss against dense."""
    rows: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for key, row in data["rows"].items():
        row_length, kind, index, setting = key.split("/")
        if int(row_length) == length:
            rows.setdefault(setting, {})[kind, int(index)] = row
    dense = rows.pop(DENSE, {})
    found = []
    for setting, ours in rows.items():
        both = sorted(set(ours) & set(dense))
        entry: dict[str, Any] = {
            "length": length,
            "setting": setting,
            "density": float(np.mean([ours[key]["density"] for key in both])),
            "seconds": float(np.median([ours[key]["seconds"] for key in both])),
        }
        windows = [key for key in both if key[0] == WINDOW]
        if windows:
            pair = (np.array([side[key]["nats"] for key in windows]) for side in (ours, dense))
            entry["perplexity"] = bounds.perplexity_rise(*pair)
            entry["dense_nats"] = float(np.mean([dense[key]["nats"] for key in windows]))
        kinds = sorted({kind for kind, _ in both} - {WINDOW})
        for name, way, columns in (
            ("strict tokens", "strict", [0, 1]),
            ("strict answers", "strict", [2, 3]),
            ("greedy answers", "greedy", [2, 3]),
        ):
            sides: list[dict[str, np.ndarray]] = [{}, {}]
            for kind in kinds:
                keys = [key for key in both if key[0] == kind and way in ours[key]]
                if not keys:
                    continue
                for side, of in zip(sides, (ours, dense), strict=True):
                    side[kind] = np.array([of[key][way] for key in keys])[:, columns]
            right = {kind: side[:, 0].sum() / side[:, 1].sum() for kind, side in sides[1].items()}
            mastered = [kind for kind in sides[0] if right[kind] > MASTERED]
            entry[name] = bounds.accuracy_loss(
                {kind: sides[0][kind] for kind in mastered},
                {kind: sides[1][kind] for kind in mastered},
            )
            entry[name]["all"] = bounds.accuracy_loss(*sides)
        found.append(entry)
    return found


def print_summary(data: dict[str, Any]) -> None:
    names = ("strict tokens", "strict answers", "greedy answers")
    lengths = sorted({int(key.split("/")[0]) for key in data["rows"]})
    for length in lengths:
        print(f"\n{length} tokens: density; rise of perplexity in % and points lost [95 % bounds]")
        print(
            f"{'setting':<24}{'density':>8}  {'perplexity':<24}"
            + "".join(f"{n:<24}" for n in names)
        )
        entries = summarize(data, length)
        for entry in entries:
            cells = [entry.get("perplexity", {})] + [entry[name] for name in names]
            text = [
                f"{c.get('rise', c.get('loss', 0)):+6.2f} [{c['low']:+.2f} {c['high']:+.2f}]"
                if c and c.get("tasks", True)
                else "-"
                for c in cells
            ]
            line = "".join(f"{cell:<24}" for cell in text)
            print(
                f"{entry['setting']:<24}{entry['density']:>8.3f}  {line}{entry['seconds']:6.2f} s"
            )
        for name in names[:1] + names[2:] if entries else ():
            print(f" {name}, by task: dense accuracy; points lost by setting; answers")
            tasks = entries[0][name]["all"]["tasks"]
            for task in tasks:
                rows = [entry[name]["all"]["tasks"][task] for entry in entries]
                losses = " ".join(f"{row['loss']:+6.1f}" for row in rows)
                print(f"  {task:<18}{rows[0]['dense']:6.1f}  {losses}  {rows[0]['answers']}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    model, tokenizer = scoring.load(args.model, device)
    limit = model.config.get_text_config().max_position_embeddings
    if bad := [length for length in args.lengths if length > limit]:
        raise SystemExit(f"--lengths: {bad}; expected at most the model's {limit} positions")
    settings = {
        "model": args.model.name,
        "role": args.role,
        "seed": args.seed,
        "instances": args.instances,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = Results(args.out, settings)
    tokens = texts.tokenize(tokenizer, texts.read(args.texts, args.role))
    print({name: len(ids) for name, ids in tokens.items()}, settings, flush=True)
    runner, encode = Runner(model), Encoder(tokenizer)
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention.check(device, heads, config.num_key_value_heads, dim)
    chosen = list(dict.fromkeys([("dense", 1.0), *present(args.settings)]))
    minutes = args.minutes * (len(args.lengths) if len(args.minutes) == 1 else 1)
    for length, limit_minutes in zip(args.lengths, minutes, strict=True):
        deadline = time.monotonic() + 60 * limit_minutes
        longest = 0.0
        for kind, index, name, sample in pieces(args, length, tokens, encode):
            begin = time.monotonic()
            if begin + longest > deadline:
                print(f"{length}: out of time at {kind} {index}", flush=True)
                break
            for setting in list(chosen):
                key = f"{length}/{kind}/{index}/{show(setting)}"
                if key in results:
                    continue
                try:
                    row = measure(runner, sample, kind, setting, not args.no_greedy)
                except Exception:
                    if setting[0] == "dense":
                        raise
                    # A failing setting must not cost the others their figures.
                    print(f"given up: {show(setting)} at {key}", flush=True)
                    traceback.print_exc()
                    chosen.remove(setting)
                    continue
                results.add(key, row | {"text": name})
            if index:  # the first ones also compile kernels
                longest = max(longest, time.monotonic() - begin)
            results.write()
    print_summary(results.data)
    summary = [row for length in args.lengths for row in summarize(results.data, length)]
    args.out.with_suffix(".summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
