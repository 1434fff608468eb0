"""Shards: who holds which tokens."""

from __future__ import annotations

import pytest
import torch

from prism_cuda.distributed import Shards, Stretch, contiguous, from_lengths, zigzag

LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [0, 1, 64, 200, 1024, 4000])
def test_every_token_has_one_rank_and_parts_join(layout: str, ranks: int, length: int) -> None:
    shards = LAYOUTS[layout](length, ranks, 64)
    x = torch.arange(length)[None, None, :, None]
    parts = [shards.take(x, rank) for rank in range(ranks)]
    assert shards.length == length == sum(part.shape[2] for part in parts)
    assert [part.shape[2] for part in parts] == [shards.tokens(rank) for rank in range(ranks)]
    for rank, part in enumerate(parts):
        assert torch.equal(part.flatten(), shards.positions(rank))
    if length:
        assert torch.equal(shards.join(parts), x)
    assert shards.is_aligned(64)


def test_zigzag_gives_all_ranks_as_much_to_attend_to() -> None:
    shards = zigzag(4096, 4, 64)
    assert shards.of(0) == (Stretch(0, 512, 0), Stretch(3584, 4096, 0))
    assert shards.of(3) == (Stretch(1536, 2560, 3),)  # its two are neighbours
    assert len({int(shards.positions(rank).sum()) for rank in range(4)}) == 1


def test_borders_move_back_to_blocks() -> None:
    shards = from_lengths([100, 27, 3, 250])
    assert not shards.is_aligned(64)
    expected = (Stretch(0, 64, 0), Stretch(64, 128, 2), Stretch(128, 380, 3))
    assert shards.aligned(64) == Shards(expected, 4)  # nothing is left to rank 1
    assert shards.aligned(64).is_aligned(64)


@pytest.mark.parametrize(
    "stretches",
    [
        (Stretch(0, 64, 0), Stretch(65, 100, 1)),
        (Stretch(0, 64, 2),),
        (Stretch(0, 0, 0),),
        (Stretch(64, 128, 0),),
    ],
)
def test_what_is_no_partition_is_refused(stretches: tuple[Stretch, ...]) -> None:
    with pytest.raises(ValueError, match="without gaps"):
        Shards(stretches, 2)


def test_sizes_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="ranks 0"):
        contiguous(128, 0)
