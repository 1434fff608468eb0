"""Which of a layer's query heads a process has under tensor parallelism, and their settings."""

from __future__ import annotations

import dataclasses
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from prism_cuda.config import PrismConfig

_Key = tuple[PrismConfig, int]
_local: WeakKeyDictionary[nn.Module, dict[_Key, PrismConfig]] = WeakKeyDictionary()


def config_of_heads(module: nn.Module, q_heads: int, config: PrismConfig) -> PrismConfig:
    """``config`` for the ``q_heads`` query heads of a layer that this process has.

    Settings name the heads of the whole layer.

    Raises:
        ValueError: if they do not fit the number of the layer's heads.
    """
    if not _names_heads(config):
        return config
    if torch.compiler.is_compiling():
        rank, ranks = _shard(module)
        return _of_part(config, rank * q_heads, q_heads, ranks * q_heads)
    of_layer = _local.setdefault(module, {})
    local = of_layer.get((config, q_heads))
    if local is None:
        rank, ranks = _shard(module)
        local = _of_part(config, rank * q_heads, q_heads, ranks * q_heads)
        of_layer[config, q_heads] = local
    return local


def _names_heads(config: PrismConfig) -> bool:
    per_head = isinstance(config.top_p, tuple) or config.bands_per_head() is not None
    return per_head or bool(config.dense_heads)


def _of_part(config: PrismConfig, first: int, count: int, total: int) -> PrismConfig:
    """The settings of heads first to first + count of a layer with ``total`` heads."""
    if count == total:
        return config
    end = first + count
    for head in config.dense_heads:
        if head >= total:
            raise ValueError(
                f"PrismConfig: dense_heads names head {head}; expected less than {total}, the "
                "number of query heads"
            )
    changes: dict[str, Any] = {
        "dense_heads": tuple(head - first for head in config.dense_heads if first <= head < end)
    }
    for name, values in (("top_p", config.top_p), ("bands", config.bands_per_head())):
        if isinstance(values, tuple):
            if len(values) != total:
                raise ValueError(
                    f"PrismConfig: {name} has {len(values)} entries; expected one for all heads "
                    f"or {total}, one per query head"
                )
            changes[name] = values[first:end]
    return dataclasses.replace(config, **changes)


def _shard(module: nn.Module) -> tuple[int, int]:
    """(rank, ranks) over which the layer's heads are split; (0, 1) where they are not.

    A projection whose outputs are split has a weight that is a DTensor sharded by its rows. What
    else splits weights by rows, FSDP, has gathered them by the time a layer attends.
    """
    if not torch.distributed.is_available():
        return 0, 1
    from torch.distributed.tensor import DTensor

    for weight in module.parameters():
        if isinstance(weight, DTensor):
            for dim, placement in enumerate(weight.placements):
                if weight.ndim > 1 and placement.is_shard(0):
                    mesh = weight.device_mesh
                    return mesh.get_local_rank(dim), mesh.size(dim)
    return 0, 1
