"""The grid: means of 16 queries and 16 keys over the full width of a head."""

from __future__ import annotations

import torch

from prism_cuda import ops
from prism_cuda.batch import Batch
from prism_cuda.config import PrismConfig
from prism_cuda.estimators.base import Estimator, KeyState, batch_keywords, rules_of
from prism_cuda.heads import Selection
from prism_cuda.reference import CELL_TOKENS, estimation_width


class Grid(Estimator):
    name = "grid"

    def op_arguments(self, config: PrismConfig, head_dim: int, q_heads: int) -> tuple:
        return ("grid", [], [], *rules_of(config, self.name, q_heads))

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
        return ops.call(
            torch.ops.prism.select_grid.default,
            q,
            k,
            *rules_of(config, self.name, q.shape[1]),
            scale,
            causal,
            *config.block_sizes,
            **batch_keywords(batch, config),
        )

    def new_state(
        self,
        shape: tuple[int, int, int],
        max_len: int,
        config: PrismConfig,
        device: torch.device | str,
    ) -> KeyState:
        return _Cells(shape, max_len, config, device)


class _Cells(KeyState):
    """Mean and spread of every 16 keys, and the keys of the last, unfinished cell."""

    unit = CELL_TOKENS

    def __init__(
        self,
        shape: tuple[int, int, int],
        max_len: int,
        config: PrismConfig,
        device: torch.device | str,
    ) -> None:
        *heads, head_dim = shape
        self._config = config
        cells = -(-max_len // CELL_TOKENS)
        width = 2 * estimation_width(head_dim)
        self._cells = torch.empty((*heads, cells, width), dtype=torch.half, device=device)
        self._factors = torch.empty((*heads, cells), dtype=torch.float32, device=device)
        self._unfinished: torch.Tensor | None = None

    def append(self, k: torch.Tensor, start: int) -> None:
        if start % CELL_TOKENS:
            assert self._unfinished is not None
            k = torch.cat([self._unfinished, k], 2)
            start -= start % CELL_TOKENS
        torch.ops.prism.pool_cells_(k, self._cells, self._factors, start)
        self._unfinished = k[:, :, k.shape[2] // CELL_TOKENS * CELL_TOKENS :].clone()

    def select(self, q: torch.Tensor, k: torch.Tensor, scale: float | None) -> Selection:
        return ops.call(
            torch.ops.prism.select_grid.default,
            q,
            None,
            *rules_of(self._config, "grid", q.shape[1]),
            scale,
            True,
            *self._config.block_sizes,
            k_cells=self._cells,
            k_factors=self._factors,
            k_len=k.shape[2],
        )
