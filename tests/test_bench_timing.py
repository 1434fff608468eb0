"""The order in which the benchmarks time things."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import timing


@pytest.mark.parametrize("size", range(1, 10))
def test_latin_square(size: int) -> None:
    rounds = timing.latin_square(size)
    assert len(rounds) == size
    for line in (*rounds, *zip(*rounds, strict=True)):
        assert sorted(line) == list(range(size))
    behind = Counter(pair for line in rounds for pair in zip(line, line[1:], strict=False))
    assert set(behind.values()) <= {1 if size % 2 == 0 else 2}


def test_no_jobs() -> None:
    assert timing.measure_alternating([]) == []
