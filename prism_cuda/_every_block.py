"""Masks that keep every block: those of dense attention and of a sliding window."""

from __future__ import annotations

import torch

from prism_cuda import _bits

Lengths = int | torch.Tensor


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
    bits = _bits.prefix(end, words) & ~_bits.prefix(first, words)
    return bits, (end - first).clamp_min(0).to(torch.int32)
