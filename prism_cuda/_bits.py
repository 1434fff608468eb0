"""Packing of boolean block masks into 32-bit words, the storage of every mask in this package."""

from __future__ import annotations

import torch

WORD_BITS = 32


def pack(dense: torch.Tensor) -> torch.Tensor:
    """Pack bool (..., n) into int32 (..., ceil(n / 32)); element 32 * w + j is bit j of word w."""
    words = -(-dense.shape[-1] // WORD_BITS)
    padded = torch.nn.functional.pad(dense, (0, words * WORD_BITS - dense.shape[-1]))
    weights = 1 << torch.arange(WORD_BITS, device=dense.device, dtype=torch.int64)
    sums = (padded.unflatten(-1, (words, WORD_BITS)) * weights).sum(-1)
    # A set top bit is the sign of an int32 word.
    return torch.where(sums >= 1 << 31, sums - (1 << 32), sums).to(torch.int32)


def unpack(bits: torch.Tensor, length: int) -> torch.Tensor:
    """Unpack int32 (..., words) into bool (..., length); the inverse of :func:`pack`."""
    shifts = torch.arange(WORD_BITS, device=bits.device, dtype=torch.int32)
    return ((bits.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)[..., :length]


def prefix(lengths: torch.Tensor, words: int) -> torch.Tensor:
    """Int32 (..., words) with the first ``lengths`` (int, >= 0) of each row's bits set."""
    starts = torch.arange(0, words * WORD_BITS, WORD_BITS, device=lengths.device)
    in_word = (lengths.unsqueeze(-1) - starts).clamp(0, WORD_BITS)
    # In 64 bits, where a shift by 32 is defined.
    return ((1 << in_word.long()) - 1).to(torch.int32)
