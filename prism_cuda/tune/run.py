"""Measures settings of one model, finds budgets of its heads, and writes both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import prism_cuda
from prism_cuda.config import PrismConfig
from prism_cuda.integrations import register
from prism_cuda.tables import print_table
from prism_cuda.tune import bounds, texts
from prism_cuda.tune.fit import TOP_P, Fit, settings_of
from prism_cuda.tune.model import Model

TUNED, DENSE = "tuned", "dense"
SEED = 0


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        model: folder or name. text: files, or none for the standard library.
        lengths: of sequences; budgets are found at the first.
        top_p: values to measure; like: the one whose error the budgets keep.
        windows, passes: windows a length to judge on, and to tune on.
        by: "head" or "layer". out: the config file.
    """

    model: str
    text: Sequence[Path]
    lengths: Sequence[int]
    top_p: Sequence[float]
    like: float
    windows: int
    passes: int
    by: str
    out: Path
    device: str

    def __post_init__(self) -> None:
        for name, low in (("windows", 1), ("passes", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"--{name} is {getattr(self, name)}; expected at least {low}")
        for length in self.lengths:
            if length < 256:
                raise ValueError(f"--lengths: {length}; expected at least 256")
        for p in self.top_p:
            if not 0 <= p <= 1:
                raise ValueError(f"--top-p: {p}; expected 0 to 1")
        if self.like not in TOP_P:
            raise ValueError(f"--like is {self.like}; expected one of {TOP_P}")


class Progress:
    """OUT.progress.json: what was measured, so that the same command goes on where it stopped."""

    def __init__(self, options: Options) -> None:
        self.path = options.out.with_suffix(".progress.json")
        # Lengths, windows and values of top_p may be added; budgets are of everything else.
        own = {
            "version": prism_cuda.__version__,
            "model": options.model,
            "text": [str(path) for path in options.text],
            "lengths": list(options.lengths),
            "windows": options.windows,
            "passes": options.passes,
            "like": options.like,
            "by": options.by,
            "device": options.device,
        }
        self.data: dict[str, Any] = {"options": own, "fit": None, "rows": {}}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            changed = {
                name: (found["options"].get(name), value)
                for name, value in own.items()
                if found["options"].get(name) != value
            }
            if changed:
                raise ValueError(
                    f"--out: {self.path} is of another run, (there, now): {changes_of(changed)}; "
                    "expected the same options, another --out, or that file removed"
                )
            self.data = found

    def write(self) -> None:
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.data) + "\n")
        beside.replace(self.path)


def changes_of(changed: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {old!r} {new!r}" for name, (old, new) in changed.items())


def run(options: Options) -> None:
    """Tune and judge; prints a table and writes the config file and OUT.report.json.

    Raises:
        ImportError: without transformers.
        ValueError: naming the option that does not fit the model or the text.
    """
    from tqdm import tqdm

    progress = Progress(options)
    device = torch.device(options.device)
    model = Model(options.model, device)
    for length in options.lengths:
        if length > model.limit:
            raise ValueError(f"--lengths: {length}; expected at most the model's {model.limit}")
    wanted = texts.needed(options.lengths, options.windows, options.passes)
    ids = texts.tokens(model.tokenizer, options.text, wanted)
    register(PrismConfig())

    fit = Fit(model, PrismConfig())
    if progress.data["fit"]:
        fit.restore(progress.data["fit"])
    made = texts.samples(ids, model.tokenizer, options.lengths[0], options.passes, SEED, True)
    # A pass for every window; every task has its turn.
    kinds = ["text", *texts.TASKS]
    chosen = [made[i * len(kinds) + i % len(kinds)][1] for i in range(options.passes)]
    for sample in tqdm(chosen[fit.passes :], "tuning", initial=fit.passes, total=len(chosen)):
        fit.run(sample)
        progress.data["fit"] = fit.state()
        progress.write()
    fit.close()
    tuned = settings_of(fit, options.like, options.by)
    PrismConfig(**tuned)  # which checks them
    options.out.write_text(json.dumps(tuned, indent=1) + "\n")

    settings: dict[str, PrismConfig | None] = {DENSE: None}
    settings |= {f"top_p {p:g}": PrismConfig(top_p=p, dense_below=0) for p in options.top_p}
    settings[TUNED] = PrismConfig(**tuned, dense_below=0)
    rows = progress.data["rows"]
    pairs = [
        (f"{length}/{kind}/{index}/{name}", sample, config)
        for length in options.lengths
        for index, (kind, sample) in enumerate(
            texts.samples(ids, model.tokenizer, length, options.windows, SEED, False)
        )
        for name, config in settings.items()
    ]
    left = [pair for pair in pairs if pair[0] not in rows]
    for number, (key, sample, config) in enumerate(
        tqdm(left, "measuring", initial=len(pairs) - len(left), total=len(pairs))
    ):
        if number < len(settings):  # what the first calls set up is not to be timed
            model.measure(sample, config)
        rows[key] = model.measure(sample, config)
        progress.write()
    report = summary(rows, options.lengths, list(settings))
    show(report, options)
    whole = {"options": progress.data["options"], "rows": report}
    options.out.with_suffix(".report.json").write_text(json.dumps(whole, indent=1) + "\n")


def summary(
    rows: dict[str, dict[str, float]], lengths: Sequence[int], names: Sequence[str]
) -> list[dict[str, Any]]:
    """One row per length and setting."""
    found = []
    for length in lengths:
        of: dict[str, dict[tuple[str, int], dict[str, float]]] = {name: {} for name in names}
        for key, row in rows.items():
            size, kind, index, name = key.split("/")
            if int(size) == length and name in of:
                of[name][kind, int(index)] = row
        dense = of[DENSE]
        for name, ours in of.items():
            text = sorted(key for key in ours if key[0] == "text")
            entry: dict[str, Any] = {
                "length": length,
                "setting": name,
                "density": float(np.mean([row["density"] for row in ours.values()])),
                "seconds": float(np.median([row["seconds"] for row in ours.values()])),
                "perplexity": float(np.exp(np.mean([ours[key]["nats"] for key in text]))),
            }
            nats, dense_nats = (
                np.array([side[key]["nats"] for key in text]) for side in (ours, dense)
            )
            entry["rise"] = bounds.perplexity_rise(nats, dense_nats)
            entry["retrieval"] = bounds.accuracy_loss(answers(ours), answers(dense))
            found.append(entry)
    return found


def answers(rows: dict[tuple[str, int], dict[str, float]]) -> dict[str, np.ndarray]:
    """Of every task (sequences, 2): how many answer tokens were right, of how many."""
    return {
        task: np.array(
            [[row["right"], row["of"]] for (kind, _), row in rows.items() if kind == task]
        )
        for task in texts.TASKS
    }


def show(report: list[dict[str, Any]], options: Options) -> None:
    header = (
        "tokens",
        "setting",
        "density",
        "perplexity",
        "rise in %",
        "retrieval lost",
        "seconds",
    )
    table = []
    for row in report:
        rise, loss = (
            f"{part[key]:+.2f} [{part['low']:+.2f} {part['high']:+.2f}]"
            for part, key in ((row["rise"], "rise"), (row["retrieval"], "loss"))
        )
        table.append(
            (str(row["length"]), row["setting"], f"{row['density']:.3f}",
             f"{row['perplexity']:.3f}", rise, loss, f"{row['seconds']:.2f}")
        )  # fmt: skip
    print_table(f"{options.model}: rises and points of accuracy lost, [95 % bounds]", header, table)
    accuracies = ", ".join(
        f"{task} {figures['dense']:.0f} %"
        for task, figures in report[0]["retrieval"]["tasks"].items()
    )
    print(f"\nDense attention answers {accuracies} at {report[0]['length']} tokens.")
    print(
        f"{options.out}: budgets by {options.by}, with the error of top_p {options.like:g} in the"
    )
    print("attention that they were found on. Compare its rows above before using it.")
    print(f'Use it: prism_cuda.register("{options.out}"), PrismConfig.load("{options.out}")')
