"""Block masks in 32-bit words: packing, unpacking, and the mask that keeps every block."""

from __future__ import annotations

import torch

WORD_BITS = 32

Lengths = int | torch.Tensor


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


def every_block(
    q_len: Lengths,
    k_len: Lengths,
    q_blocks: int,
    words: int,
    block_sizes: tuple[int, int],
    causal: bool,
    window_left: int | None,
    device: torch.device | str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks with a key that some row of the query block may see, and no others.

    Args:
        q_len, k_len: numbers, or int tensors (B,) for a mask per sequence; they stay on the device.
        q_blocks, words: how many the mask has, at least those of the lengths.
        block_sizes: (query, key) tokens per block.
        window_left: keys before its own position that a row sees; None for all.

    Returns:
        bits int32 ([B,] q_blocks, words) and counts int32 ([B,] q_blocks).
    """
    q_block_size, k_block_size = block_sizes
    if isinstance(q_len, torch.Tensor):
        q_len = q_len[:, None]
    if isinstance(k_len, torch.Tensor):
        k_len = k_len[:, None]
    row = torch.arange(q_blocks, device=device) * q_block_size  # the first of every block
    offset = k_len - q_len
    rows_end = row + q_block_size
    if isinstance(q_len, torch.Tensor):
        rows_end = torch.minimum(rows_end, q_len)
    else:
        rows_end = rows_end.clamp_max(q_len)
    keys_end = rows_end + offset if causal else torch.zeros_like(rows_end) + k_len
    end = (-(-keys_end // k_block_size)).clamp_min(0).masked_fill(row >= q_len, 0)
    if window_left is None:
        first = torch.zeros_like(end)
    else:
        first = ((row + offset - window_left) // k_block_size).clamp_min(0)
    bits = prefix(end, words) & ~prefix(first, words)
    return bits, (end - first).clamp_min(0).to(torch.int32)


def cut(bits: torch.Tensor, first: int, length: int) -> torch.Tensor:
    """Bits ``first`` to ``first + length`` of each row, int32 (..., ceil(length / 32))."""
    words = -(-length // WORD_BITS)
    start, shift = divmod(first, WORD_BITS)
    own = bits[..., start : start + words].clone(memory_format=torch.contiguous_format)
    if shift:
        # Right shifts of int32 drag the sign along.
        own >>= shift
        own &= (1 << (WORD_BITS - shift)) - 1
        after = bits[..., start + 1 : start + 1 + words]
        own[..., : after.shape[-1]] |= after << (WORD_BITS - shift)
    if length % WORD_BITS:
        own[..., -1] &= (1 << length % WORD_BITS) - 1
    return own


def count(bits: torch.Tensor) -> torch.Tensor:
    """The set bits of each row: int32 (..., words) -> (...)."""
    # Sums of neighbouring pairs, fours and bytes; masks take the sign away after every shift.
    x = bits - ((bits >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24 & 0xFF).sum(-1, dtype=torch.int32)
