#!/usr/bin/env python3
"""Train the stronger testbed: five times the shipped one's size, and taught to retrieve.

Text, optimizers and schedule are those of train_testbed.py. On top, a share of the sequences
carries the tasks of tasks.py (needles, dictionaries, variable tracking): many instances each, only
their answers trained on. The evaluation draws its instances from the same distribution, with other
random numbers, in held-out text.

    python bench/quality/train_longrange.py --minutes 4 --total-minutes 4.8 --out build/longrange
    python bench/quality/train_longrange.py --smoke --out /tmp/longrange     # CPU, under a minute
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
from corpus import TextLimits
from train_testbed import SMOKE, Phase, Recipe, Sampler, run
from transformers import PreTrainedTokenizerFast

from prism_cuda.tune import tasks

RECIPE = Recipe(
    phases=(
        Phase(2048, 0.30, 65536),
        Phase(8192, 0.25, 131072),
        Phase(16384, 0.25, 131072),
        Phase(32768, 0.20, 131072),
    ),
    hidden=640,
    intermediate=2048,
    layers=6,
    heads=8,
    kv_heads=2,
    text=TextLimits(vocab=8192),
    eval_options=dict(
        contexts=(1024, 4096, 8192, 16384, 32256),
        distances=(4096, 15360, 30720),
        max_windows=48,
        n_samples=32,
    ),
)

# Of all sequences, those that carry a task.
TASK_SHARE = 0.4

# Tokens per instance, so that every statement and question fits into its share of the text.
INSTANCE_TOKENS = 256


class LongRangeSampler(Sampler):
    """Sequences with a task, with copies (as in the base class), or as they are."""

    def __init__(self, encode: tasks.Encoder, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.encode = encode

    def plant(self, row: np.ndarray, label: np.ndarray) -> None:
        if self.rng.random() >= TASK_SHARE:
            super().plant(row, label)
            return
        task = list(tasks.TASKS)[self.rng.integers(len(tasks.TASKS))]
        most = max(len(row) // INSTANCE_TOKENS, 1)
        instances = int(self.rng.integers(most // 2, most + 1)) or 1
        ask_from = self.rng.uniform(0.5, 0.75)
        try:
            sample = tasks.make(task, self.rng, self.encode, row, instances, ask_from)
        except ValueError:  # too short for a long question
            return
        row[:] = label[:] = sample.ids
        for span in sample.noise:
            label[span] = -100


def make_sampler(tokens: np.ndarray, recipe: Recipe, args: argparse.Namespace) -> LongRangeSampler:
    encode = tasks.Encoder(PreTrainedTokenizerFast.from_pretrained(args.out))
    rng = np.random.default_rng(args.seed)
    return LongRangeSampler(encode, tokens, recipe.text.vocab, args.copy_share, rng)


if __name__ == "__main__":
    run(RECIPE, dataclasses.replace(SMOKE, heads=2, kv_heads=1), make_sampler, __doc__)
