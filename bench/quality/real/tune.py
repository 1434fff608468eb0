#!/usr/bin/env python3
"""One knob per head and layer of a model, from what each knob costs and spoils on other texts.

For every head: its density, and the square of the error that it adds to the residual stream,
relative to the stream, of every knob. Knobs are chosen so that the sum of the errors is least for a
mean density. Errors are averaged over all rows and, as much again, over the rows that predict
answers of tasks.

    python bench/quality/real/tune.py --model FOLDER --texts FOLDER --method grid --out FILE.json
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import texts
import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import package  # noqa: E402, F401

from prism_cuda.tune.choice import choose  # noqa: E402
from prism_cuda.tune.fit import row_weights  # noqa: E402
from prism_cuda.tune.tasks import TASKS, Encoder, Sample, make  # noqa: E402

TOP_P = (0.3, 0.5, 0.65, 0.8, 0.88, 0.92, 0.95, 0.97, 0.985, 0.995)
THRESHOLDS = (0.2, 0.1, 0.06, 0.04, 0.025, 0.015, 0.01, 0.006, 0.003, 0.001)
DENSITIES = (0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3, 0.4)


@functools.cache
def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def knobs(file: Path, density: float) -> dict[int, list[float]]:
    """By layer the knob of every head, for a mean density on the texts that they were fitted to.

    Raises:
        KeyError: if the file has no such density.
    """
    return {int(layer): row for layer, row in _read(file)["knobs"][f"{density:g}"].items()}


class Fit:
    """Measures every knob of every head in one dense forward pass after another."""

    def __init__(self, model: Any, method: Any, settings: tuple[float, ...]) -> None:
        self.layers = model.base_model.layers
        self.method, self.settings = method, settings
        self.density: dict[int, torch.Tensor] = {}
        self.error: dict[int, torch.Tensor] = {}
        self.passes = 0
        self.norms: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(functools.partial(self._note, index), with_kwargs=True)

    def _note(self, index: int, layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.norms[index] = hidden[0].float().square().sum(-1)

    def attend(self, rows: torch.Tensor, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """Dense attention; ``rows`` (length,) weighs the rows' errors."""
        from attend_kept import attend
        from selection import density

        out = attend(q, k, v, None, scale)
        weight = self.layers[layer].self_attn.o_proj.weight
        by_head = weight.unflatten(1, (q.shape[0], -1)).permute(1, 2, 0)
        errors, densities = [], []
        for setting in self.settings:
            mask = self.method.mask(q, k, setting)
            spoilt = (attend(q, k, v, mask, scale) - out) @ by_head
            relative = spoilt.float().square().sum(-1) / self.norms[layer]
            errors.append((relative * rows).sum(-1))
            densities.append(density(mask))
        for sums, new in ((self.error, errors), (self.density, densities)):
            stacked = torch.stack(new, -1).double().cpu()
            sums[layer] = sums.get(layer, 0) + stacked
        return out


def fit(
    runner: Any, method: Any, samples: list[Any], settings: tuple[float, ...], minutes: float
) -> Fit:
    """Of as many of the samples as the minutes allow, of one at least."""
    found = Fit(runner.model, method, settings)
    start = time.monotonic()
    for sample in samples:
        spent = time.monotonic() - start
        if found.passes and spent + spent / found.passes > 60 * minutes:
            print(f"out of time after {found.passes} passes", flush=True)
            break
        rows = row_weights(sample).to(runner.device)

        def work(layer, query, key, value, scale, window, rows=rows):
            if window is not None:
                raise NotImplementedError("tune: layers with a window")
            return found.attend(rows, layer, query[0], key[0], value[0], scale)[None]

        with torch.inference_mode():
            runner._forward(work, sample.ids[None])
        found.passes += 1
    return found


def main() -> None:
    import attend_kept as attention
    import scoring
    import selection

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--method", choices=selection.METHODS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=60, help="at most, about")
    parser.add_argument("--instances", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"--out: {args.out} exists; expected another name")
    start = time.monotonic()
    torch.set_float32_matmul_precision("high")
    model, tokenizer = scoring.load(args.model, torch.device(args.device))
    runner, encode = scoring.Runner(model), Encoder(tokenizer)
    config = model.config.get_text_config()
    attention.check(runner.device, config.num_attention_heads, config.num_key_value_heads, 64)
    tokens = texts.tokenize(tokenizer, texts.read(args.texts, "tune"))
    rng = np.random.default_rng(77)
    samples = []
    for i, (_, window) in enumerate(texts.windows(tokens, args.length, args.passes, rng)):
        task = list(TASKS)[i % (len(TASKS) + 1) - 1] if i % (len(TASKS) + 1) else None
        made = make(task, rng, encode, window, args.instances) if task else Sample(window)
        samples.append(made)
    method = selection.METHODS[args.method]
    settings = THRESHOLDS if method.rule is selection.above else TOP_P
    found = fit(runner, method, samples, settings, args.minutes)
    layers = sorted(found.error)
    density, error = (
        torch.cat([sums[layer] for layer in layers]).numpy() / found.passes
        for sums in (found.density, found.error)
    )
    heads = config.num_attention_heads
    result: dict[str, Any] = {"method": args.method, "length": args.length, "knobs": {}}
    for target in DENSITIES:
        chosen = choose(density, error, target)
        row = np.arange(len(chosen))
        values = np.array(settings)[chosen].reshape(-1, heads).tolist()
        result["knobs"][f"{target:g}"] = dict(zip(layers, values, strict=True))
        same = np.abs(density.mean(0) - target).argmin()
        print(
            f"density {density[row, chosen].mean():.3f}: error {error[row, chosen].sum():.5f}; "
            f"one knob {settings[same]} for all: {density[:, same].mean():.3f}, "
            f"{error[:, same].sum():.5f}"
        )
    args.out.write_text(json.dumps(result) + "\n")
    print(f"{args.out}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
