#!/usr/bin/env python3
"""Does the testbed model use its context? Two measurements, written as JSON.

1. Held-out perplexity by context length, on Python's standard library. The same target tokens are
   scored after 256, 1K, ... tokens of context, so the numbers differ only in what the model sees.
2. In-context copying. A span of uniformly random tokens appears twice, thousands of tokens of
   standard library source apart. Only attention to the first copy can predict the second.

Both functions take any causal LM of transformers, so a patched attention can be compared as well.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

END_OF_FILE = "<|endoftext|>"
CONTEXTS = (256, 1024, 2048, 4096, 8192, 16384, 32256)
DISTANCES = (1024, 2048, 4096, 8192, 15360, 30720)
TARGET_TOKENS = 512

# Not part of the held-out text: repetitive tests, bundled programs, code tables.
HELD_OUT_SKIPS = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings")
    + ("pydoc_data", "__phello__")
)
NOT_SOURCE = frozenset(("__pycache__", "site-packages", "dist-packages"))
DATA_TABLES = frozenset(("entities.py", "_pydoc_topics.py", "topics.py"))


def python_files(root: Path, skip: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Every .py file under `root`, the files of a folder before those of its subfolders."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - NOT_SOURCE - skip)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def as_document(relative_path: Path, text: str) -> str:
    """A source file as the model sees it: a path comment, the text, the end-of-file token."""
    return f"# file: {relative_path.as_posix()}\n{text.strip()}\n{END_OF_FILE}"


def held_out_tokens(tokenizer: Any, stdlib: Path, max_files: int | None = None) -> np.ndarray:
    """Token ids of the standard library's files in folder order, concatenated."""
    files = [path for path in python_files(stdlib, HELD_OUT_SKIPS) if path.name not in DATA_TABLES]
    documents = [
        as_document(path.relative_to(stdlib), path.read_text(encoding="utf-8", errors="ignore"))
        for path in files[:max_files]
    ]
    ids = tokenizer(documents, verbose=False)["input_ids"]
    return np.concatenate([np.array(row, dtype=np.int64) for row in ids])


@torch.inference_mode()
def target_losses(model: Any, ids: np.ndarray, n_targets: int) -> torch.Tensor:
    """Cross entropy in nats of the last `n_targets` tokens of each row: [rows, n_targets]."""
    inputs = torch.from_numpy(ids).to(model.device)
    logits = model(inputs, use_cache=False, logits_to_keep=n_targets + 1).logits[:, :-1]
    targets = inputs[:, -n_targets:]
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets).cpu()


def row_batches(n_rows: int, row_length: int, batch_tokens: int) -> Iterator[slice]:
    """Slices over `n_rows` rows with about `batch_tokens` tokens each."""
    rows = max(1, batch_tokens // row_length)
    return (slice(i, i + rows) for i in range(0, n_rows, rows))


def perplexity_by_context(
    model: Any,
    tokens: np.ndarray,
    contexts: Sequence[int] = CONTEXTS,
    n_targets: int = TARGET_TOKENS,
    max_windows: int = 256,
    batch_tokens: int = 131072,
) -> list[dict[str, float]]:
    """Perplexity of the same targets after each number of context tokens.

    A window is `max(contexts)` tokens of context and `n_targets` targets; with context c the model
    sees only the window's last c + n_targets tokens. Windows end at equal steps of 16K tokens or
    more, so no target is scored twice.
    """
    length = max(contexts) + n_targets
    step = max(16384, (len(tokens) - length) // max_windows + 1)
    ends = np.arange(length, len(tokens) + 1, step)
    if len(ends) == 0:
        raise ValueError(f"the held-out text has {len(tokens)} tokens, one window needs {length}")
    rows = []
    for context in sorted(contexts):
        seen = context + n_targets
        windows = np.stack([tokens[end - seen : end] for end in ends])
        batches = row_batches(len(ends), seen, batch_tokens)
        loss = torch.cat([target_losses(model, windows[b], n_targets) for b in batches])
        row = {
            "context": context,
            "perplexity": math.exp(loss.mean().item()),
            "nats_per_token": loss.mean().item(),
            "windows": len(ends),
            "targets": loss.numel(),
        }
        rows.append(row)
        print(f"  context {context:6d}: perplexity {row['perplexity']:.3f}", flush=True)
    return rows


def copy_accuracy(
    model: Any,
    tokens: np.ndarray,
    distances: Sequence[int] = DISTANCES,
    span: int = 64,
    cue: int = 4,
    n_samples: int = 64,
    batch_tokens: int = 131072,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Greedy accuracy on the second copy of a random span, its first `cue` tokens given.

    distance: tokens from the start of the first copy to the start of the second. 256 tokens of
    filler come before the first copy, and filler fills the gap.
    """
    lead = 256
    rng = np.random.default_rng(seed)
    rows = []
    for distance in distances:
        length = lead + distance + span
        starts = rng.integers(0, len(tokens) - length, n_samples)
        ids = np.stack([tokens[start : start + length] for start in starts])
        spans = rng.integers(1, model.config.vocab_size, (n_samples, span))
        ids[:, lead : lead + span] = spans
        ids[:, -span:] = spans
        batches = row_batches(n_samples, length, batch_tokens)
        hits = torch.cat([_copied(model, ids[b], span - cue) for b in batches])
        row = {
            "distance": distance,
            "accuracy": hits.float().mean().item(),
            "spans_all_right": hits.all(dim=1).float().mean().item(),
            "samples": n_samples,
            "targets": hits.numel(),
        }
        rows.append(row)
        print(f"  distance {distance:6d}: copy accuracy {row['accuracy']:.4f}", flush=True)
    return rows


@torch.inference_mode()
def _copied(model: Any, ids: np.ndarray, n_targets: int) -> torch.Tensor:
    """Whether the most likely token is right, for the last `n_targets`: [rows, n_targets]."""
    inputs = torch.from_numpy(ids).to(model.device)
    logits = model(inputs, use_cache=False, logits_to_keep=n_targets + 1).logits[:, :-1]
    return (logits.argmax(-1) == inputs[:, -n_targets:]).cpu()


def evaluate(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    contexts: Sequence[int] = CONTEXTS,
    distances: Sequence[int] = DISTANCES,
    max_windows: int = 256,
    n_samples: int = 64,
    max_files: int | None = None,
    stdlib: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Load a checkpoint folder as a user would, and measure it."""
    start = time.perf_counter()
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device).eval()
    tokens = held_out_tokens(tokenizer, stdlib, max_files)
    print(f"held out: {len(tokens):,} tokens of Python {platform.python_version()}", flush=True)
    on_gpu = device.type == "cuda"
    return {
        "perplexity": perplexity_by_context(model, tokens, contexts, max_windows=max_windows),
        "copying": copy_accuracy(model, tokens, distances, n_samples=n_samples, seed=seed),
        "copying_chance": 1 / (model.config.vocab_size - 1),
        "held_out_tokens": len(tokens),
        "held_out_python": platform.python_version(),
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="checkpoint folder, e.g. examples/testbed")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, metavar="TOKENS")
    parser.add_argument("--distances", type=int, nargs="+", default=DISTANCES, metavar="TOKENS")
    parser.add_argument("--max-windows", type=int, default=256, help="perplexity windows at most")
    parser.add_argument("--samples", type=int, default=64, help="copied spans per distance")
    parser.add_argument("--stdlib", type=Path, help="held-out source (default: this Python's)")
    parser.add_argument("--seed", type=int, default=0, help="of the copied spans")
    args = parser.parse_args()
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    results = evaluate(
        args.model,
        torch.device(auto if args.device == "auto" else args.device),
        getattr(torch, args.dtype),
        args.contexts,
        args.distances,
        args.max_windows,
        args.samples,
        stdlib=args.stdlib,
        seed=args.seed,
    )
    text = json.dumps(results, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
