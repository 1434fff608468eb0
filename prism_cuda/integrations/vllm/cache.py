"""Keys and values of vLLM's paged cache, in any of the layouts that it has had."""

from __future__ import annotations

import torch


def split_cache(
    cache: torch.Tensor, kv_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views (pages, page_size, Hkv, D) of the keys and the values.

    Raises:
        ValueError: if the shape is none that is known, or fits two of them.
    """
    shape = tuple(cache.shape)
    if len(shape) == 4 and shape[1] == kv_heads and shape[3] == 2 * head_dim:
        k, v = cache.transpose(1, 2).split(head_dim, -1)
        return k, v
    if len(shape) == 5 and shape[3:] == (kv_heads, head_dim):
        axes = [axis for axis in (0, 1) if shape[axis] == 2]
        if len(axes) == 1:
            k, v = cache.unbind(axes[0])
            return k, v
    raise ValueError(
        f"prism: kv_cache has shape {shape}; expected (pages, {kv_heads}, page_size, "
        f"{2 * head_dim}), (2, pages, page_size, {kv_heads}, {head_dim}) or (pages, 2, page_size, "
        f"{kv_heads}, {head_dim}), with other than 2 pages"
    )


def is_page_size(tokens: int) -> bool:
    """Whether prism's kernels read pages of so many tokens."""
    return 0 < tokens <= 256 and tokens & (tokens - 1) == 0
