"""Shards: which rank of a group holds which tokens of a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

Range = tuple[int, int]


@dataclass(frozen=True)
class Stretch:
    """Tokens ``start`` to ``end`` of a sequence, and the rank that holds them."""

    start: int
    end: int
    rank: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Shards:
    """A sequence cut into stretches, each on one rank.

    A rank's tensors hold its stretches one after the other, in the order of the sequence.

    Attributes:
        stretches: in the order of the sequence, without gaps.
        ranks: how many ranks there are; some may hold nothing.

    Raises:
        ValueError: for gaps, empty stretches or ranks that do not exist.
    """

    stretches: tuple[Stretch, ...]
    ranks: int

    def __post_init__(self) -> None:
        end = 0
        for stretch in self.stretches:
            if stretch.start != end or stretch.length <= 0 or not 0 <= stretch.rank < self.ranks:
                raise ValueError(
                    f"Shards: {stretch} follows token {end} of a sequence over {self.ranks} "
                    "ranks; expected stretches of 1 token or more, without gaps"
                )
            end = stretch.end

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return self.stretches[-1].end if self.stretches else 0

    def of(self, rank: int) -> tuple[Stretch, ...]:
        return tuple(stretch for stretch in self.stretches if stretch.rank == rank)

    def tokens(self, rank: int) -> int:
        return sum(stretch.length for stretch in self.of(rank))

    def is_aligned(self, block: int) -> bool:
        """Whether every stretch begins at a multiple of ``block`` tokens."""
        return all(stretch.start % block == 0 for stretch in self.stretches)

    def aligned(self, block: int) -> Shards:
        """The same with every border moved back to a multiple of ``block``."""
        borders = [stretch.start // block * block for stretch in self.stretches] + [self.length]
        owners = [stretch.rank for stretch in self.stretches]
        return _shards(borders, owners, self.ranks)

    def positions(self, rank: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The rank's positions in the sequence, int64 (tokens,)."""
        parts = [torch.arange(own.start, own.end, device=device) for own in self.of(rank)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)

    def take(self, x: torch.Tensor, rank: int, dim: int = 2) -> torch.Tensor:
        """The rank's part of a tensor over the whole sequence."""
        parts = [x.narrow(dim, own.start, own.length) for own in self.of(rank)]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def join(self, parts: Sequence[torch.Tensor], dim: int = 2) -> torch.Tensor:
        """The tensor over the whole sequence from the parts of all ranks."""
        lengths = [[own.length for own in self.of(rank)] for rank in range(self.ranks)]
        cut = [iter(part.split(own, dim)) for part, own in zip(parts, lengths, strict=True)]
        return torch.cat([next(cut[own.rank]) for own in self.stretches], dim)

    def in_units(self, unit: int) -> Shards:
        """The same counted in units of tokens, the last of which may be cut."""
        stretches = (
            Stretch(own.start // unit, -(-own.end // unit), own.rank) for own in self.stretches
        )
        return Shards(tuple(stretches), self.ranks)

    def local(self, rank: int) -> tuple[tuple[Stretch, Range], ...]:
        """The rank's stretches, each with its range within the rank's tensors."""
        found, at = [], 0
        for own in self.of(rank):
            found.append((own, (at, at + own.length)))
            at += own.length
        return tuple(found)


def contiguous(length: int, ranks: int, block: int = 128) -> Shards:
    """One stretch a rank, of equally many blocks of ``block`` tokens to within one.

    Late ranks have more keys to attend to: see :func:`zigzag`.
    """
    return _even(length, range(ranks), ranks, block)


def zigzag(length: int, ranks: int, block: int = 128) -> Shards:
    """Two stretches a rank, an early and a late one, so that all have equally much to attend to.

    Of 2 n equal stretches rank r holds the r-th and the r-th from the end.
    """
    return _even(length, [*range(ranks), *reversed(range(ranks))], ranks, block)


def from_lengths(lengths: Iterable[int]) -> Shards:
    """One stretch a rank, of these many tokens."""
    borders = [0]
    for length in lengths:
        borders.append(borders[-1] + length)
    ranks = len(borders) - 1
    return _shards(borders, range(ranks), ranks)


def _even(length: int, owners: Sequence[int], ranks: int, block: int) -> Shards:
    if length < 0 or ranks < 1 or block < 1:
        raise ValueError(
            f"Shards: length is {length}, ranks {ranks}, block {block}; expected a length of 0 or "
            "more, and 1 or more of the others"
        )
    blocks, parts = -(-length // block), len(owners)
    borders = [min(i * blocks // parts * block, length) for i in range(parts + 1)]
    return _shards(borders, owners, ranks)


def _shards(borders: Sequence[int], owners: Sequence[int], ranks: int) -> Shards:
    """Without empty stretches, and with neighbours of one rank joined."""
    stretches: list[Stretch] = []
    for start, end, rank in zip(borders[:-1], borders[1:], owners, strict=True):
        if start == end:
            continue
        if stretches and stretches[-1].rank == rank:
            start = stretches.pop().start
        stretches.append(Stretch(start, end, rank))
    return Shards(tuple(stretches), ranks)
