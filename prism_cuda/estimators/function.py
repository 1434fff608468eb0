"""Estimators of one's own: a function of queries, keys and settings."""

from __future__ import annotations

from typing import Protocol

import torch

from prism_cuda.batch import Batch
from prism_cuda.block_mask import BlockMask
from prism_cuda.config import PrismConfig
from prism_cuda.estimators.base import Estimator, KeyState
from prism_cuda.heads import Selection


class EstimatorFunction(Protocol):
    """What :func:`prism_cuda.register_estimator` takes."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        config: PrismConfig,
        *,
        scale: float | None,
        causal: bool,
    ) -> BlockMask: ...


class ByFunction(Estimator):
    ragged = False

    def __init__(self, name: str, function: EstimatorFunction) -> None:
        self.name = name
        self._function = function

    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        config: PrismConfig,
        *,
        scale: float | None = None,
        causal: bool = True,
        pooled: torch.Tensor | None = None,
        batch: Batch | None = None,
        k_scale: torch.Tensor | None = None,
    ) -> Selection:
        if batch is not None:
            raise ValueError(
                f"prism: estimator {self.name!r} chooses blocks of (B, H, L, D) tensors only; "
                "expected 'grid' or 'bands' for a ragged batch"
            )
        mask = self._function(q, k, config, scale=scale, causal=causal)
        if not isinstance(mask, BlockMask):
            raise TypeError(
                f"prism: estimator {self.name!r} returned a {type(mask).__name__}; expected a "
                "BlockMask"
            )
        got = (mask.q_len, mask.k_len, mask.q_block_size, mask.k_block_size, mask.causal)
        expected = (q.shape[2], k.shape[2], *config.block_sizes, causal)
        if got != expected or mask.bits.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"prism: estimator {self.name!r} returned {mask}; expected batch {q.shape[0]}, "
                f"heads {q.shape[1]} and (q_len, k_len, q_block_size, k_block_size, causal) "
                f"{expected}"
            )
        return mask.bits, mask.counts

    def new_state(
        self,
        shape: tuple[int, int, int],
        max_len: int,
        config: PrismConfig,
        device: torch.device | str,
    ) -> KeyState:
        return _NoState(self, config)


class _NoState(KeyState):
    """Nothing is kept: the function sees all keys every time."""

    def __init__(self, estimator: ByFunction, config: PrismConfig) -> None:
        self._estimator = estimator
        self._config = config

    def append(self, k: torch.Tensor, start: int) -> None:
        pass

    def select(self, q: torch.Tensor, k: torch.Tensor, scale: float | None) -> Selection:
        return self._estimator.select(q, k, self._config, scale=scale)
