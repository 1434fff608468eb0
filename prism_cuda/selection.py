"""Which blocks a call keeps: estimation from q and k, for every setting among the heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prism_cuda import _ops
from prism_cuda.block_mask import BlockMask
from prism_cuda.config import PrismConfig
from prism_cuda.per_head import (
    Chooser,
    HeadBands,
    Selection,
    Setting,
    each_setting,
    settings_of_heads,
    take,
)


def chooser_of(head_dim: int, config: PrismConfig, fp8_keys: bool = False) -> Chooser:
    """What config chooses blocks by, outside a model."""
    by_grid = config.estimator_of(head_dim, fp8_keys) == "grid"
    return "grid" if by_grid else config.resolve_bands(head_dim)


def estimate(
    q: torch.Tensor,
    k: torch.Tensor,
    chooser: Chooser,
    config: PrismConfig,
    scale: float | None,
    causal: bool,
) -> BlockMask:
    q_len, k_len = q.shape[2], k.shape[2]
    sizes = config.block_sizes
    settings = settings_of_heads(q.shape[1], chooser, config)
    if not isinstance(chooser, str) and len(settings) > 1:
        # The means are the same for every setting.
        return select_from_means(*pool(q, k, config), q_len, k_len, chooser, config, causal)

    def select(heads: Sequence[int], kv_heads: Sequence[int], setting: Setting) -> Selection:
        inputs = (take(q, heads), take(k, kv_heads), *arguments(setting, config))
        if isinstance(chooser, str):
            return _ops.call(torch.ops.prism.estimate_grid, *inputs, scale, causal, *sizes)
        return _ops.call(torch.ops.prism.estimate_blocks, *inputs, causal, *sizes)

    bits, counts = each_setting(select, settings, q.shape[1], k.shape[1])
    return BlockMask(bits, counts, q_len, k_len, *sizes, causal)


def pool(
    q: torch.Tensor, k: torch.Tensor, config: PrismConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    q_block_size, k_block_size = config.block_sizes
    return (
        _ops.call(torch.ops.prism.block_pool, q, q_block_size),
        _ops.call(torch.ops.prism.block_pool, k, k_block_size),
    )


def select_from_means(
    q_means: torch.Tensor,
    k_means: torch.Tensor,
    q_len: int,
    k_len: int,
    bands: HeadBands,
    config: PrismConfig,
    causal: bool,
) -> BlockMask:
    def select(heads: Sequence[int], kv_heads: Sequence[int], setting: Setting) -> Selection:
        return _ops.call(
            torch.ops.prism.select_blocks,
            take(q_means, heads),
            take(k_means, kv_heads),
            q_len,
            k_len,
            *arguments(setting, config),
            causal,
            *config.block_sizes,
        )

    settings = settings_of_heads(q_means.shape[1], bands, config)
    bits, counts = each_setting(select, settings, q_means.shape[1], k_means.shape[1])
    return BlockMask(bits, counts, q_len, k_len, *config.block_sizes, causal)


def select_from_cells(
    q: torch.Tensor,
    k_cells: torch.Tensor,
    k_factors: torch.Tensor,
    k_len: int,
    config: PrismConfig,
    scale: float | None,
) -> BlockMask:
    """The causal block mask from q and the cells of the first k_len keys."""

    def select(heads: Sequence[int], kv_heads: Sequence[int], setting: Setting) -> Selection:
        return _ops.call(
            torch.ops.prism.select_grid,
            take(q, heads),
            take(k_cells, kv_heads),
            take(k_factors, kv_heads),
            k_len,
            *arguments(setting, config),
            scale,
            True,
            *config.block_sizes,
        )

    settings = settings_of_heads(q.shape[1], "grid", config)
    bits, counts = each_setting(select, settings, q.shape[1], k_cells.shape[1])
    return BlockMask(bits, counts, q.shape[2], k_len, *config.block_sizes, True)


def arguments(setting: Setting, config: PrismConfig) -> tuple:
    """What the ops take of a setting: bands if any, and what to keep of the probabilities."""
    ranges, top_p = setting
    rules = (top_p, config.keep_sink, config.keep_recent)
    if ranges is None:
        return *rules, config.threshold(top_p, "grid")
    return list(ranges[0]), list(ranges[1]), *rules, config.threshold(top_p, "bands")
