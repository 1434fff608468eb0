"""Perplexity and task accuracy of a model, and the texts that they are measured on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from prism_cuda.tune.tasks import TASKS, Encoder, Sample, make

# Logits of this many tokens exist at once.
LOGIT_CHUNK = 4096


@dataclass(frozen=True)
class Suite:
    """What one (method, knob) is measured on at one length.

    Attributes:
        length: tokens of every sequence.
        windows: perplexity windows; the last half of each is scored.
        samples: sequences per task.
        instances: questions per sequence, about.
        tasks: names of ``tasks.TASKS``.
    """

    length: int
    windows: int
    samples: int
    instances: int
    tasks: tuple[str, ...] = tuple(TASKS)


@dataclass(frozen=True)
class Texts:
    """The sequences of a suite, the same for every method."""

    windows: list[np.ndarray]
    samples: dict[str, list[Sample]]

    @classmethod
    def build(cls, suite: Suite, held_out: np.ndarray, tokenizer: Any, seed: int = 0) -> Texts:
        """Windows at equal steps of the held-out tokens; tasks woven into other parts of it.

        Raises:
            ValueError: if the held-out text is too short.
        """
        length, room = suite.length, len(held_out) - suite.length
        if room < suite.windows:
            raise ValueError(
                f"evaluate: {len(held_out)} held-out tokens; expected more than the length {length}"
            )
        if suite.windows > 1 and room // suite.windows < length:
            raise ValueError(
                f"evaluate: {suite.windows} windows of {length} tokens overlap in "
                f"{len(held_out)} held-out tokens; expected fewer windows or a longer text"
            )
        starts = np.linspace(0, room, suite.windows + 1).astype(int)[: suite.windows]
        windows = [held_out[start : start + length] for start in starts]
        encode = Encoder(tokenizer)
        samples: dict[str, list[Sample]] = {}
        for index, task in enumerate(suite.tasks):
            rng = np.random.default_rng((seed, index, length))
            samples[task] = []
            for start in rng.integers(0, room, suite.samples):
                filler = held_out[start : start + length]
                samples[task].append(make(task, rng, encode, filler, suite.instances))
        return cls(windows, samples)


@torch.inference_mode()
def hidden_states(model: Any, ids: np.ndarray) -> torch.Tensor:
    """Last hidden states (L, hidden) of one sequence."""
    inputs = torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(model.device)[None]
    return model.base_model(input_ids=inputs, use_cache=False).last_hidden_state[0]


@torch.inference_mode()
def window_nats(model: Any, ids: np.ndarray) -> float:
    """Mean cross entropy in nats of the last half of a window."""
    hidden = hidden_states(model, ids)
    first = len(ids) // 2
    targets = torch.from_numpy(np.asarray(ids[first:], dtype=np.int64)).to(hidden.device)
    total = 0.0
    for part, target in zip(
        hidden[first - 1 : -1].split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK), strict=True
    ):
        logits = model.get_output_embeddings()(part).float()
        total += F.cross_entropy(logits, target, reduction="sum").double().item()
    return total / len(targets)


@torch.inference_mode()
def answer_hits(model: Any, sample: Sample) -> list[np.ndarray]:
    """For every answer of a sample, whether each of its tokens is the most likely one."""
    hidden = hidden_states(model, sample.ids)
    positions = np.concatenate([np.arange(s.start, s.stop) for s in sample.answers])
    rows = hidden[torch.from_numpy(positions - 1).to(hidden.device)]
    predicted = model.get_output_embeddings()(rows).argmax(-1).cpu().numpy()
    hits = predicted == sample.ids[positions]
    ends = np.cumsum([s.stop - s.start for s in sample.answers])[:-1]
    return np.split(hits, ends)


def measure(model: Any, texts: Texts) -> dict[str, Any]:
    """Perplexity, and per task the accuracy by token and by whole answer."""
    nats = [window_nats(model, window) for window in texts.windows]
    tasks = {}
    for task, samples in texts.samples.items():
        answers = [hits for sample in samples for hits in answer_hits(model, sample)]
        tasks[task] = {
            "token_accuracy": float(np.concatenate(answers).mean()),
            "answer_accuracy": float(np.mean([hits.all() for hits in answers])),
            "answers": len(answers),
            "tokens": int(sum(map(len, answers))),
        }
    result: dict[str, Any] = {"tasks": tasks}
    if nats:
        result |= {"nats": nats, "perplexity": math.exp(float(np.mean(nats)))}
    return result
