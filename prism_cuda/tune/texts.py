"""Text to tune and to judge on: files given, or the standard library's sources."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prism_cuda.tune.tasks import Encoder, Sample, make

# Retrieval, built into the text: one line of many, and one pair of a long dictionary.
TASKS = ("niah_multikey", "kv")
INSTANCES = 16  # questions a sequence, about

# Of every text: its beginning to tune on, the rest to judge on.
TUNED_ON = 0.4


def tokens(tokenizer: Any, paths: Sequence[Path], wanted: int) -> np.ndarray:
    """The tokens of the files, or of as much of the standard library as ``wanted`` takes.

    Raises:
        ValueError: if they are fewer than ``wanted``.
    """
    found: list[int] = []
    files = paths or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        found += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not paths and len(found) >= wanted:
            break
    if len(found) < wanted:
        source = ", ".join(map(str, paths)) or "the standard library"
        raise ValueError(
            f"--text: {source} has {len(found)} tokens; expected {wanted} for so many windows of "
            "such a length: give more text, or lower --lengths or --windows"
        )
    return np.array(found, dtype=np.int64)


def needed(lengths: Sequence[int], windows: int, passes: int) -> int:
    """Tokens for windows that do not overlap, in both parts."""
    longest = max(lengths)
    return int(max(passes * longest / TUNED_ON, windows * longest / (1 - TUNED_ON))) + 2 * longest


def samples(
    ids: np.ndarray, tokenizer: Any, length: int, count: int, seed: int, tune: bool
) -> list[tuple[str, Sample]]:
    """``count`` windows of one part of the text, and of each the same with every task in it."""
    split = int(TUNED_ON * len(ids))
    part = ids[:split] if tune else ids[split:]
    encode = Encoder(tokenizer)
    found = []
    # Evenly over the part, so that fewer windows still see all of the text.
    starts = np.linspace(0, len(part) - length, count).astype(int)
    for index, start in enumerate(starts):
        window = part[start : start + length]
        found.append(("text", Sample(window)))
        for task in TASKS:
            rng = np.random.default_rng((seed, index, TASKS.index(task), int(tune)))
            room = max(min(INSTANCES, length // 256), 1)
            found.append((task, make(task, rng, encode, window, room)))
    return found
