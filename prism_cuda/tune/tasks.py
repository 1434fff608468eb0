"""Synthetic long-context tasks with known answers, for any tokenizer.

Shared by tuning, the evaluation and the training of the stronger testbed.

RULER's retrieval tasks (single, multi-key and multi-value needles, variable tracking), key-value
retrieval from a long dictionary, and copying of random spans. One sequence holds many independent
instances: statements first, questions with their answers later, other text in between. Answers are
teacher-forced, so that one forward pass scores all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Two of them make a key.
WORDS = re.findall(
    r"\w+",
    """
    amber anchor apple arrow autumn badge bamboo basket beacon berry blanket bottle branch
    breeze bridge bronze button cabin candle canyon carpet castle cedar cherry circle cloud
    cobalt coffee copper coral cotton crystal desert diamond dragon eagle echo ember falcon
    feather fern forest fossil galaxy garden ginger glacier granite harbor hazel helmet honey
    island ivory jacket jasmine jungle kettle ladder lagoon lantern lemon linen lizard magnet
    maple marble meadow melon mirror moss mountain needle nickel oak ocean olive orange
    orchid otter paper pepper pine planet pocket prairie quartz rabbit raven ribbon river
    rocket saddle saffron salmon sapphire shadow shell silver spider spruce summit sunset
    temple thunder tiger timber topaz tunnel turtle velvet violet walnut whale willow window
    winter zebra
    """,
)


@dataclass
class Sample:
    """A sequence and what to score in it.

    Attributes:
        ids: int64 (length,).
        answers: token ranges that attention to the statements predicts.
        noise: token ranges that nothing predicts: statements and the start of questions.
    """

    ids: np.ndarray
    answers: list[slice] = field(default_factory=list)
    noise: list[slice] = field(default_factory=list)


class Encoder:
    """Token ids of pieces of text, remembered: the same piece is always the same tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids = self._known.get(text)
        if ids is None:
            ids = list(self.tokenizer.encode(text, add_special_tokens=False))
            if len(self._known) < 100_000:
                self._known[text] = ids
        return ids


@dataclass
class Instance:
    """Statements in order, then one question; each a list of (text, is part of the answer)."""

    statements: list[list[str]]
    question: list[tuple[str, bool]]


def _number(rng: np.random.Generator, digits: int = 7) -> list[str]:
    # Digit by digit, the first with its space: any tokenizer then agrees between copies.
    first, *rest = list(str(rng.integers(10 ** (digits - 1), 10**digits)))
    return [" " + first, *rest]


def _key(rng: np.random.Generator) -> list[str]:
    first, second = rng.choice(len(WORDS), 2, replace=False)
    return [" " + WORDS[first], "-", WORDS[second]]


def _answer(pieces: list[str]) -> list[tuple[str, bool]]:
    return [(piece, True) for piece in pieces]


def _given(*pieces: str) -> list[tuple[str, bool]]:
    return [(piece, False) for piece in pieces]


def needle(rng: np.random.Generator, values: int = 1) -> Instance:
    """A magic number under a key; with several values, all of them in their order."""
    key = _key(rng)
    numbers = [_number(rng) for _ in range(values)]
    phrase = ["# The special magic number for", *key, " is:"]
    statements = [[*phrase, *number, ".\n"] for number in numbers]
    if values == 1:
        return Instance(statements, [*_given(*phrase), *_answer(numbers[0]), (".\n", False)])
    question = _given("# All special magic numbers for", *key, " are:")
    for index, number in enumerate(numbers):
        question += [*_answer(number), ("," if index < values - 1 else ".\n", False)]
    return Instance(statements, question)


def chain(rng: np.random.Generator, hops: int = 4) -> Instance:
    """Variable tracking: a value handed on from name to name; all names are asked for."""
    names = [
        [" " + letters[0], *letters[1:]]
        for letters in rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), (hops, 5))
    ]
    number = _number(rng, 5)
    statements = [["VAR", *names[0], " =", *number, "\n"]]
    for before, after in zip(names, names[1:], strict=False):
        statements.append(["VAR", *after, " = VAR", *before, "\n"])
    question = _given("# All variables assigned the value", *number, ":")
    for index, name in enumerate(names):
        question += [*_answer(name), ("," if index < hops - 1 else ".\n", False)]
    return Instance(statements, question)


def pair(rng: np.random.Generator) -> Instance:
    """One line of a long dictionary."""
    key, value = _key(rng), _key(rng)
    line = ['"', *key, '":', *value]
    return Instance([[*line, '"\n']], [*_given('"', *key, '":'), *_answer(value), ('"\n', False)])


Make = Callable[..., Sample]


def needles(
    rng: np.random.Generator,
    encode: Encoder,
    filler: np.ndarray,
    instances: int,
    make: Callable[[np.random.Generator], Instance] = needle,
    ask: int | None = None,
    ask_from: float = 0.75,
) -> Sample:
    """Statements spread over the first ``ask_from`` of ``filler``, questions over the rest.

    Args:
        instances: how many instances; ``ask`` of them are asked for, the others distract.
    """
    made = [make(rng) for _ in range(instances)]
    asked = made[:ask]
    statements = [
        (index, [(piece, False) for piece in statement])
        for index, instance in enumerate(made)
        for statement in instance.statements
    ]
    order = rng.permutation(len(statements))
    # Statements of one instance keep their order.
    by_instance: dict[int, Iterator[Any]] = {
        index: iter([s for i, s in statements if i == index]) for index in range(instances)
    }
    shuffled = [next(by_instance[statements[i][0]]) for i in order]
    sample = Sample(filler.copy())
    split = int(len(filler) * ask_from)
    _spread(rng, encode, sample, 0, split, shuffled)
    _spread(rng, encode, sample, split, len(filler), [instance.question for instance in asked])
    return sample


def _spread(
    rng: np.random.Generator,
    encode: Encoder,
    sample: Sample,
    start: int,
    stop: int,
    texts: list[list[tuple[str, bool]]],
) -> None:
    """Write each text at a random place of its own equal share of [start, stop)."""
    edges = np.linspace(start, stop, len(texts) + 1).astype(int)
    for text, low, high in zip(texts, edges, edges[1:], strict=False):
        length = sum(len(encode(piece)) for piece, _ in text)
        if length > high - low:
            raise ValueError(
                f"tasks: a text of {length} tokens does not fit into its {high - low}; "
                "expected fewer instances or a longer sequence"
            )
        _write(encode, sample, int(rng.integers(low, high - length + 1)), text)


def _write(encode: Encoder, sample: Sample, at: int, text: list[tuple[str, bool]]) -> int:
    """Write one text at position ``at``; returns the position after it."""
    is_answer = None
    for piece, answer in text:
        ids = encode(piece)
        span = slice(at, at + len(ids))
        sample.ids[span] = ids
        ranges = sample.answers if answer else sample.noise
        if answer is is_answer and ranges and ranges[-1].stop == at:
            ranges[-1] = slice(ranges[-1].start, span.stop)
        else:
            ranges.append(span)
        is_answer, at = answer, span.stop
    return at


def dictionary(
    rng: np.random.Generator,
    encode: Encoder,
    filler: np.ndarray,
    instances: int,
    ask_from: float = 0.75,
) -> Sample:
    """Key-value retrieval: a dictionary fills the first part, ``instances`` questions the rest."""
    sample = Sample(filler.copy())
    split, at, pairs, seen = int(len(filler) * ask_from), 0, [], set()
    while True:
        made = pair(rng)
        key = tuple(made.statements[0][1:4])
        if key in seen:
            continue
        text = [(piece, False) for piece in made.statements[0]]
        if at + sum(len(encode(piece)) for piece, _ in text) > split:
            break
        at = _write(encode, sample, at, text)
        seen.add(key)
        pairs.append(made)
    chosen = rng.choice(len(pairs), min(instances, len(pairs)), replace=False)
    _spread(rng, encode, sample, split, len(filler), [pairs[i].question for i in chosen])
    return sample


def copies(
    rng: np.random.Generator,
    encode: Encoder,
    filler: np.ndarray,
    instances: int,
    span: int = 48,
    cue: int = 4,
    ask_from: float = 0.75,
) -> Sample:
    """Spans of uniformly random tokens that appear again; the first ``cue`` tokens are given."""
    sample = Sample(filler.copy())
    split = int(len(filler) * ask_from)
    span = max(min(span, split // instances, (len(filler) - split) // instances), cue + 1)
    spans = rng.integers(1, len(encode.tokenizer), (instances, span))
    for start, stop in ((0, split), (split, len(filler))):
        order = rng.permutation(instances) if start else np.arange(instances)
        edges = np.linspace(start, stop, instances + 1).astype(int)
        for index, low, high in zip(order, edges, edges[1:], strict=False):
            at = int(rng.integers(low, high - span + 1))
            sample.ids[at : at + span] = spans[index]
            if start:
                sample.noise.append(slice(at, at + cue))
                sample.answers.append(slice(at + cue, at + span))
            else:
                sample.noise.append(slice(at, at + span))
    return sample


def make(
    task: str,
    rng: np.random.Generator,
    encode: Encoder,
    filler: np.ndarray,
    instances: int,
    ask_from: float = 0.75,
) -> Sample:
    """A sample of a task of ``TASKS`` as long as ``filler``, about ``instances`` asked for."""
    return TASKS[task](rng, encode, filler, instances, ask_from=ask_from)


def _single(
    rng: np.random.Generator, encode: Encoder, filler: np.ndarray, n: int, **kw: Any
) -> Sample:
    return needles(rng, encode, filler, n, **kw)


def _multi_key(
    rng: np.random.Generator, encode: Encoder, filler: np.ndarray, n: int, **kw: Any
) -> Sample:
    # As many distractors as the text can hold in half of its length.
    room = max(int(len(filler) * kw["ask_from"]) // 80, n)
    return needles(rng, encode, filler, min(8 * n, room), ask=n, **kw)


def _multi_value(
    rng: np.random.Generator, encode: Encoder, filler: np.ndarray, n: int, **kw: Any
) -> Sample:
    def four(rng: np.random.Generator) -> Instance:
        return needle(rng, values=4)

    return needles(rng, encode, filler, max(n // 2, 1), make=four, **kw)


def _tracking(
    rng: np.random.Generator, encode: Encoder, filler: np.ndarray, n: int, **kw: Any
) -> Sample:
    return needles(rng, encode, filler, max(n // 2, 1), make=chain, **kw)


TASKS: dict[str, Make] = {
    "copy": copies,
    "kv": dictionary,
    "niah_single": _single,
    "niah_multikey": _multi_key,
    "niah_multivalue": _multi_value,
    "variable_tracking": _tracking,
}
