"""Which blocks a call keeps: estimation from q and k, for every top_p among the heads."""

from __future__ import annotations

from collections.abc import Callable

import torch

from prism_cuda.bands import Bands
from prism_cuda.block_mask import BlockMask
from prism_cuda.config import PrismConfig

Selected = tuple[torch.Tensor, torch.Tensor]  # bits, counts


def bands_of(q: torch.Tensor, config: PrismConfig) -> Bands | None:
    return config.resolve_bands(q.shape[-1]) if config.estimator == "bands" else None


def estimate(
    q: torch.Tensor,
    k: torch.Tensor,
    bands: Bands | None,
    config: PrismConfig,
    scale: float | None,
    causal: bool,
) -> BlockMask:
    """The block mask by bands, or by the grid where there are none."""
    q_len, k_len = q.shape[2], k.shape[2]
    sizes = config.block_sizes
    if bands is not None and isinstance(config.top_p_of_heads(q.shape[1]), tuple):
        # The means are the same for every top_p.
        return select_from_means(*pool(q, k, config), q_len, k_len, bands, config, causal)

    def select(q: torch.Tensor, k: torch.Tensor, top_p: float) -> Selected:
        kept = rules(config, top_p)
        if bands is None:
            return torch.ops.prism.estimate_grid(q, k, *kept, scale, causal, *sizes)
        high, low = bands.ranges
        return torch.ops.prism.estimate_blocks(q, k, high, low, *kept, causal, *sizes)

    bits, counts = each_top_p(select, q, k, config)
    return BlockMask(bits, counts, q_len, k_len, *sizes, causal)


def pool(
    q: torch.Tensor, k: torch.Tensor, config: PrismConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    q_block_size, k_block_size = config.block_sizes
    return (
        torch.ops.prism.block_pool(q, q_block_size),
        torch.ops.prism.block_pool(k, k_block_size),
    )


def select_from_means(
    q_means: torch.Tensor,
    k_means: torch.Tensor,
    q_len: int,
    k_len: int,
    bands: Bands,
    config: PrismConfig,
    causal: bool,
) -> BlockMask:
    high, low = bands.ranges

    def select(q_means: torch.Tensor, k_means: torch.Tensor, top_p: float) -> Selected:
        return torch.ops.prism.select_blocks(
            q_means,
            k_means,
            q_len,
            k_len,
            high,
            low,
            *rules(config, top_p),
            causal,
            *config.block_sizes,
        )

    bits, counts = each_top_p(select, q_means, k_means, config)
    return BlockMask(bits, counts, q_len, k_len, *config.block_sizes, causal)


def rules(config: PrismConfig, top_p: float) -> tuple[float, int, int, float | None]:
    """What the ops take to keep of the probabilities of heads with this top_p."""
    return top_p, config.keep_sink, config.keep_recent, config.threshold(top_p)


def each_top_p(
    select: Callable[[torch.Tensor, torch.Tensor, float], Selected],
    q: torch.Tensor,
    k: torch.Tensor,
    config: PrismConfig,
) -> Selected:
    """Bits and counts by one ``select(q, k, top_p)`` for every distinct top_p among q's heads.

    Args:
        q, k: (B, Hq, ...) and (B, Hkv, ...), what select takes of q and k.
    """
    top_p = config.top_p_of_heads(q.shape[1])
    if isinstance(top_p, float):
        return select(q, k, top_p)
    kv_heads = int(k.shape[1])
    if kv_heads == 0 or len(top_p) % kv_heads:
        raise ValueError(
            f"q has {len(top_p)} heads and k has {kv_heads}; expected a multiple of k's"
        )
    group = len(top_p) // kv_heads
    bits: dict[int, torch.Tensor] = {}
    counts: dict[int, torch.Tensor] = {}
    for value in sorted(set(top_p)):
        heads = [head for head, head_value in enumerate(top_p) if head_value == value]
        # Whole groups share their key heads, as in any call; others get a key head each.
        groups = [heads[i] // group for i in range(0, len(heads), group)]
        whole = heads == [head for kv in groups for head in range(kv * group, (kv + 1) * group)]
        kv = groups if whole else [head // group for head in heads]
        selected = select(_take(q, heads), _take(k, kv), value)
        for i, head in enumerate(heads):
            bits[head], counts[head] = selected[0][:, i], selected[1][:, i]
    heads_in_order = range(len(top_p))
    return (
        torch.stack([bits[head] for head in heads_in_order], 1),
        torch.stack([counts[head] for head in heads_in_order], 1),
    )


def _take(x: torch.Tensor, heads: list[int]) -> torch.Tensor:
    """x[:, heads], a view where they follow one another.

    By slices: an index tensor would have to be copied to the device.
    """
    first, end = heads[0], heads[-1] + 1
    if heads == list(range(first, end)):
        return x[:, first:end]
    return torch.stack([x[:, head] for head in heads], 1)
