"""Check every architecture of the installed transformers and write docs/models.md.

Every one runs in a process of its own with a time limit, and what is known already is kept in
build/models.jsonl: an interrupted run goes on where it was. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

INTRODUCTION = """\
# Models

`attn_implementation="prism"` with the architectures of transformers {version} that generate text,
as tiny random models (`make test-models` writes this page). With every block kept (`top_p=1`) each
equals eager attention, by both estimators and with the default settings: plain, left-padded, in
chunks, through `generate` with dynamic, static and sliding caches, loaded by `from_pretrained` and
switched by `set_attn_implementation`; or it is refused by name. *Sparse* means that the
block-sparse kernel served layers of the prompt.

Layers that see everything (encoders, images), whose values are narrower than their queries, with
position biases, chunked attention, masks of the model's own or a trained sparse index run dense and
right. Reasons are what `prism_cuda.record()` tells. The sweep whose outcomes are committed is
[models.json](../bench/results/cpu/models.json).
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; all of them if none is given")
    parser.add_argument("--one", help="check one and print its outcome as JSON")
    parser.add_argument("--limit", type=int, default=300, help="seconds for an architecture")
    parser.add_argument("--results", type=Path, default=ROOT / "build/models.jsonl")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(outcome_of(arguments.one)))
        return 0

    from models.architectures import ARCHITECTURES

    known = read(arguments.results)
    arguments.results.parent.mkdir(exist_ok=True)
    for name in arguments.names or ARCHITECTURES:
        if name in known and not arguments.names:
            continue
        known[name] = in_own_process(name, arguments.limit)
        with arguments.results.open("a") as file:
            file.write(json.dumps(known[name]) + "\n")
        print(name, summary(known[name]), flush=True)
    (ROOT / "docs/models.md").write_text(
        page([known[name] for name in ARCHITECTURES if name in known])
    )
    wrong = [name for name, outcome in known.items() if outcome["wrong"]]
    print(f"{len(known)} architectures, {len(wrong)} wrong: {' '.join(wrong)}")
    return 1 if wrong else 0


def read(results: Path) -> dict[str, dict[str, Any]]:
    lines = results.read_text().splitlines() if results.exists() else []
    return {outcome["name"]: outcome for outcome in map(json.loads, lines)}


def outcome_of(name: str) -> dict[str, Any]:
    import torch
    from models.architectures import ARCHITECTURES
    from models.checks import check

    torch.set_num_threads(1)
    architecture = ARCHITECTURES[name]
    outcome = dataclasses.asdict(check(architecture))
    outcome["paths"] = sorted(outcome["paths"])
    return {"name": name, "kind": architecture.kind, "class": architecture.class_name, **outcome}


def in_own_process(name: str, limit: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        return json.loads(run.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, json.JSONDecodeError) as error:
        reason = f"it did not end: {type(error).__name__}"
        return {"name": name, "kind": "", "class": "", "unbuilt": reason, "wrong": {}}


def summary(outcome: dict[str, Any]) -> str:
    if outcome.get("unbuilt"):
        return "not tried"
    if outcome.get("refused"):
        return "refused"
    if outcome["wrong"]:
        return "WRONG"
    return "sparse" if any(path == "prism" for path, _ in outcome["paths"]) else "dense"


def page(outcomes: list[dict[str, Any]]) -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome["name"]):
        groups.setdefault(summary(outcome), []).append(outcome)
    counts = ", ".join(f"{len(group)} {name}" for name, group in sorted(groups.items()))
    parts = [
        INTRODUCTION.format(version=importlib.metadata.version("transformers")),
        f"{counts}.\n",
    ]
    for title, name, reason in (
        ("Sparse", "sparse", reasons),
        ("Dense", "dense", reasons),
        ("Refused", "refused", lambda outcome: outcome["refused"]),
        ("Wrong", "WRONG", lambda outcome: "; ".join(outcome["wrong"].values())),
        (
            "Not tried: no tiny model was made, for the reason given",
            "not tried",
            lambda outcome: outcome["unbuilt"],
        ),
    ):
        if name in groups:
            parts.append(f"## {title}\n\n| model type | class | |\n|---|---|---|")
            parts += [
                f"| {o['name']} | {o.get('class', '')} | {cell(reason(o))} |" for o in groups[name]
            ]
            parts.append("")
    return "\n".join(parts)


def reasons(outcome: dict[str, Any]) -> str:
    told = [f"dense: {reason}" for path, reason in outcome["paths"] if path == "dense"]
    if any(reason.startswith("sliding window") for _, reason in outcome["paths"]):
        told.append("windows")
    if outcome.get("no_bands"):
        told.append("the grid only: for bands, say how it rotates")
    not_by_eager = sorted(outcome["skipped"])
    if not_by_eager:
        told.append(f"not done by eager either: {', '.join(not_by_eager)}")
    return "; ".join(told)


def cell(text: str) -> str:
    return text.replace("|", "\\|")[:200]


if __name__ == "__main__":
    sys.exit(main())
