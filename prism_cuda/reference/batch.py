"""Ragged batches: sequences of different lengths, packed or in pages, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from prism_cuda.bits import WORD_BITS
from prism_cuda.reference.blocks import Mask, pack, visible_blocks


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a batch lie; without cu_seqlens_q the batch is not ragged.

    What a sequence has beyond max_seqlen_q queries and max_seqlen_k keys is left out, and so is
    what the tensors do not have. Blocks are counted from the first token of each sequence.

    Attributes:
        cu_seqlens_q: int32 (B + 1): sequence b has the rows cu_seqlens_q[b] to cu_seqlens_q[b + 1]
            of q (total_q, Hq, D).
        cu_seqlens_k: the same for k and v (total_k, Hkv, D); None with pages.
        seqused_k: int32 (B,), keys of each sequence that count; with pages its length.
        block_table: int32 (B, any), the pages of each sequence in order; k and v are then pools
            (pages, page_size, Hkv, D). A page that the pools do not have reads as zeros.
        max_seqlen_q, max_seqlen_k: the most queries and keys of a sequence.
    """

    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None

    def is_ragged(self) -> bool:
        return self.cu_seqlens_q is not None

    def count(self) -> int:
        assert self.cu_seqlens_q is not None
        return self.cu_seqlens_q.shape[0] - 1

    def rows(self, sequence: int, total: int) -> slice:
        assert self.cu_seqlens_q is not None and self.max_seqlen_q is not None
        return _span(self.cu_seqlens_q, sequence, total, self.max_seqlen_q)

    def keys(self, x: torch.Tensor, sequence: int) -> torch.Tensor:
        """(1, Hkv, k_len, D) of k or v."""
        longest = self.max_seqlen_k
        assert longest is not None
        used = longest if self.seqused_k is None else int(self.seqused_k[sequence])
        if self.block_table is None:
            assert self.cu_seqlens_k is not None
            rows = x[_span(self.cu_seqlens_k, sequence, x.shape[0], longest)]
        else:
            rows = _rows_of_pages(x, self.block_table[sequence])[:longest]
        return rows[: max(used, 0)].transpose(0, 1)[None]

    @staticmethod
    def blocks(q_len: int, k_len: int, sizes: tuple[int, int]) -> tuple[int, int]:
        return -(-q_len // sizes[0]), -(-k_len // sizes[1])


def _span(ends: torch.Tensor, sequence: int, total: int, longest: int) -> slice:
    start = min(max(int(ends[sequence]), 0), total)
    end = min(max(int(ends[sequence + 1]), start), total)
    return slice(start, min(end, start + longest))


def _rows_of_pages(pool: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """(tokens, Hkv, D) of a pool of pages."""
    if not pool.shape[0]:
        return pool.flatten(0, 1)
    exists = (pages >= 0) & (pages < pool.shape[0])
    rows = pool[torch.where(exists, pages, 0).long()]
    return torch.where(exists[:, None, None, None], rows, torch.zeros_like(rows)).flatten(0, 1)


def select_each(
    select: Callable[[torch.Tensor, torch.Tensor], Mask],
    q: torch.Tensor,
    k: torch.Tensor,
    sequences: Sequences,
    causal: bool,
    sizes: tuple[int, int],
    dense_below: int,
) -> Mask:
    """What ``select`` keeps of q and k, of a ragged batch sequence by sequence.

    Sequences of fewer than dense_below keys, or fewer queries than a block, keep all blocks that
    they see; 0: none do. Rows and words past a sequence's end are 0.
    """
    if not sequences.is_ragged():
        return select(q, k)
    assert sequences.max_seqlen_q is not None and sequences.max_seqlen_k is not None
    q_blocks, k_blocks = sequences.blocks(sequences.max_seqlen_q, sequences.max_seqlen_k, sizes)
    counts = q.new_zeros(sequences.count(), q.shape[1], q_blocks, dtype=torch.int32)
    bits = counts.new_zeros(*counts.shape, -(-k_blocks // WORD_BITS))
    for b in range(sequences.count()):
        queries = q[sequences.rows(b, q.shape[0])].transpose(0, 1)[None]
        keys = sequences.keys(k, b)
        q_len, k_len = queries.shape[2], keys.shape[2]
        if dense_below and (k_len < dense_below or q_len < sizes[0]):
            own_bits, own_counts = every_block(queries, keys, causal, sizes)
        else:
            own_bits, own_counts = select(queries, keys)
        bits[b, :, : own_bits.shape[2], : own_bits.shape[3]] = own_bits[0]
        counts[b, :, : own_counts.shape[2]] = own_counts[0]
    return bits, counts


def every_block(
    q: torch.Tensor,
    k: torch.Tensor,
    causal: bool,
    sizes: tuple[int, int],
    window_left: int | None = None,
) -> Mask:
    """Every block that some row of q's blocks sees, for all heads."""
    visible = visible_blocks(q.shape[2], k.shape[2], causal, *sizes, q.device, window_left)
    return pack(visible.expand(*q.shape[:2], *visible.shape))
