"""How a step of the engine, a batch of decodes and prefills, is divided between two attentions."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prism_cuda.batch import Batch


@dataclass(frozen=True)
class Lengths:
    """What the host knows of a step's sequences, in their order.

    Attributes:
        starts: the rows of q at which sequences begin, and the end of the last one.
        k_lens: bounds of their keys, the new ones included.
    """

    starts: list[int]
    k_lens: list[int]

    def q_lens(self, first: int, end: int) -> list[int]:
        return [self.starts[i + 1] - self.starts[i] for i in range(first, end)]


@dataclass(frozen=True)
class Prefills:
    """Consecutive sequences that one call of prism attends to.

    Attributes:
        first, end: the sequences.
        rows: their rows of q.
    """

    first: int
    end: int
    rows: slice
    batch: Batch


@dataclass(frozen=True)
class Step:
    """A step with prefills for prism.

    Attributes:
        others: FlashAttention's metadata of the sequences before them, if there are any; those
            are the first ``rows`` rows.
    """

    others: Any
    rows: int
    prefills: tuple[Prefills, ...]

    def with_table(self, block_table: torch.Tensor, slot_mapping: torch.Tensor) -> Step:
        """The same of layers whose pages are others."""
        others = copy.copy(self.others)
        if others is not None:
            others.block_table = block_table[: self.prefills[0].first]
            others.slot_mapping = slot_mapping[: self.rows]
        moved = tuple(
            dataclasses.replace(
                part,
                batch=dataclasses.replace(
                    part.batch, block_table=block_table[part.first : part.end]
                ),
            )
            for part in self.prefills
        )
        return Step(others, self.rows, moved)


def first_prefill(lengths: Lengths, q_block: int, dense_below: int) -> int | None:
    """The first sequence whose prefill is worth estimating, None if none is.

    Engines put decodes first and short chunks before long ones. Whatever comes after it goes the
    same way: prism leaves nothing out of short sequences and decodes.
    """
    for i, k_len in enumerate(lengths.k_lens):
        if lengths.starts[i + 1] - lengths.starts[i] >= q_block and k_len >= dense_below:
            return i
    return None


def grouped(k_lens: Sequence[int], tokens: int) -> list[tuple[int, int]]:
    """Runs of sequences of at most ``tokens`` keys, each counted as long as its run's longest.

    That is what the workspaces of a call take. A longer sequence makes a run by itself.
    """
    runs: list[tuple[int, int]] = []
    first, longest = 0, 0
    for i, k_len in enumerate(k_lens):
        longest = max(longest, k_len)
        if i > first and (i + 1 - first) * longest > tokens:
            runs.append((first, i))
            first, longest = i, k_len
    return [*runs, (first, len(k_lens))] if k_lens else []


def divide(metadata: Any, lengths: Lengths, first: int, tokens: int) -> Step:
    """The step with everything from sequence ``first`` on for prism.

    Args:
        metadata: FlashAttention's, of the whole step.
        tokens: as for :func:`grouped`.
    """
    end = len(lengths.k_lens)
    while lengths.starts[end - 1] == lengths.starts[end]:  # padding; first has queries
        end -= 1
    parts = []
    for a, b in grouped(lengths.k_lens[first:end], tokens):
        a, b = a + first, b + first
        row, stop = lengths.starts[a], lengths.starts[b]
        ends = metadata.query_start_loc[a : b + 1]
        batch = Batch(
            cu_seqlens_q=ends - row if row else ends,
            cu_seqlens_k=None,
            seqused_k=metadata.seq_lens[a:b],
            block_table=metadata.block_table[a:b],
            max_seqlen_q=max(lengths.q_lens(a, b)),
            max_seqlen_k=max(lengths.k_lens[a:b]),
        )
        parts.append(Prefills(a, b, slice(row, stop), batch))
    rows = lengths.starts[first]
    return Step(_before(metadata, lengths, first), rows, tuple(parts))


def _before(metadata: Any, lengths: Lengths, first: int) -> Any:
    """The metadata of the sequences before ``first``."""
    rows = lengths.starts[first]
    if rows == 0:
        return None
    others = copy.copy(metadata)
    others.num_actual_tokens = rows
    others.max_query_len = max(lengths.q_lens(0, first))
    others.max_seq_len = max(lengths.k_lens[:first])
    others.query_start_loc = metadata.query_start_loc[: first + 1]
    others.seq_lens = metadata.seq_lens[:first]
    others.block_table = metadata.block_table[:first]
    others.slot_mapping = metadata.slot_mapping[:rows]
    # Made for the whole step. FlashAttention schedules without it; 1 asks for no splits at all.
    others.scheduler_metadata = None
    others.max_num_splits = metadata.max_num_splits if metadata.max_num_splits == 1 else 0
    return others
