"""Generators: the right answers stand at the stated positions and follow from the statements."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prism_cuda.tune import tasks


@pytest.fixture(scope="module")
def encode() -> tasks.Encoder:
    """One token per byte: decoding is exact."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tasks.Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def text(encode: tasks.Encoder, ids: np.ndarray) -> str:
    symbols = encode.tokenizer.convert_ids_to_tokens(list(ids))
    return "".join(symbols).replace("\u0120", " ").replace("\u010a", "\n")


def sample(task: str, encode: tasks.Encoder, length: int = 8000, n: int = 4) -> tasks.Sample:
    filler = np.full(length, encode("x")[0], dtype=np.int64)
    return tasks.make(task, np.random.default_rng(1), encode, filler, n)


def answers(encode: tasks.Encoder, made: tasks.Sample) -> list[tuple[str, str, str]]:
    """(text before the question, the question so far, the answer) of every answer."""
    rows = []
    for span in made.answers:
        before = text(encode, made.ids[: span.start])
        start = max(before.rfind(mark) for mark in ("x#", 'x"'))
        rows.append((before[:start], before[start + 1 :], text(encode, made.ids[span])))
    return rows


@pytest.mark.parametrize("task", ["niah_single", "niah_multikey"])
def test_needles_hold_the_answer(task, encode) -> None:
    made = sample(task, encode)
    rows = answers(encode, made)
    assert len(rows) == 4
    for before, question, answer in rows:
        assert question.startswith("# The special magic number for")
        assert before.count(question + answer + ".\n") == 1
        assert re.fullmatch(r" \d{7}", answer)
    statements = text(encode, made.ids[:6000]).count("special magic number")
    assert statements == (4 if task == "niah_single" else 32)


def test_multi_value_asks_for_all_in_order(encode) -> None:
    made = sample("niah_multivalue", encode)
    rows = answers(encode, made)
    assert len(rows) == 2 * 4
    for first in range(0, 8, 4):
        before, question, _ = rows[first]
        key = re.search(r"for (\S+) are:", question).group(1)
        stated = re.findall(rf"number for {key} is:( \d{{7}})\.", before)
        assert [answer for _, _, answer in rows[first : first + 4]] == stated


def test_variables_follow_their_chain(encode) -> None:
    rows = answers(encode, sample("variable_tracking", encode))
    assert len(rows) == 2 * 4
    for first in range(0, 8, 4):
        before, question, _ = rows[first]
        value = re.search(r"value (\d+):", question).group(1)
        holds = {name: value for name in re.findall(rf"VAR (\S+) = {value}\n", before)}
        for name, source in re.findall(r"VAR (\S+) = VAR (\S+)\n", before):
            if source in holds:
                holds[name] = value
        assert [answer.strip() for _, _, answer in rows[first : first + 4]] == list(holds)


def test_dictionary_holds_every_asked_pair_once(encode) -> None:
    rows = answers(encode, sample("kv", encode))
    assert len(rows) == 4
    for before, question, answer in rows:
        assert before[:6000].count(question + answer + '"\n') == 1
        assert before[:6000].count(question) == 1


def test_copies_repeat_what_stood_before(encode) -> None:
    made = sample("copy", encode)
    stated = [span for span in made.noise if span.stop <= 6000]
    spans = [list(made.ids[span]) for span in stated]
    assert len(made.answers) == len(spans) == 4
    for span in made.answers:
        assert list(made.ids[span.start - 4 : span.stop]) in spans


@pytest.mark.parametrize("task", tasks.TASKS)
def test_same_seed_same_sample_and_ranges_do_not_overlap(task, encode) -> None:
    first, second = sample(task, encode), sample(task, encode)
    assert (first.ids == second.ids).all()
    used = np.zeros(len(first.ids), int)
    for span in first.answers + first.noise:
        used[span] += 1
    assert used.max() == 1


def test_too_many_instances_are_refused(encode) -> None:
    with pytest.raises(ValueError, match="fewer instances"):
        sample("niah_single", encode, length=800, n=100)
