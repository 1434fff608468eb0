"""Prism's two RoPE frequency bands over the means of whole blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prism_cuda import ops
from prism_cuda.bands import Bands
from prism_cuda.batch import Batch
from prism_cuda.config import PrismConfig
from prism_cuda.estimators.base import Estimator, KeyState, batch_keywords, rules_of
from prism_cuda.heads import Selection, each_choice, take
from prism_cuda.reference import estimation_width
from prism_cuda.remember import remembered

# Dimension ranges of the high and the low band. Compilers can hash it, unlike Bands.
Ranges = tuple[tuple[int, ...], tuple[int, ...]]


class TwoBands(Estimator):
    name = "bands"

    def op_arguments(self, config: PrismConfig, head_dim: int, q_heads: int) -> tuple | None:
        of_heads = ranges_of_heads(config, head_dim, q_heads)
        if len(of_heads) > 1:
            return None
        high, low = of_heads[0]
        return ("bands", list(high), list(low), *rules_of(config, self.name, q_heads))

    def pool_keys(self, k: torch.Tensor, config: PrismConfig) -> torch.Tensor:
        return ops.call(torch.ops.prism.block_pool.default, k, config.block_sizes[1])

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
        of_heads = ranges_of_heads(config, q.shape[-1], q.shape[1])
        if batch is not None:
            return _select_ragged(q, k, config, of_heads, causal, batch, k_scale)
        if len(of_heads) > 1 and pooled is None:
            pooled = self.pool_keys(k, config)  # once for all bands
        return _select(q, k, pooled, config, of_heads, causal)

    def new_state(
        self,
        shape: tuple[int, int, int],
        max_len: int,
        config: PrismConfig,
        device: torch.device | str,
    ) -> KeyState:
        return _Means(shape, max_len, config, device)


@remembered
def ranges_of_heads(config: PrismConfig, head_dim: int, q_heads: int) -> tuple[Ranges, ...]:
    """The bands of the query heads: once if they are the same for all, or for each.

    Raises:
        ValueError: if they do not fit head_dim or the number of heads.
    """
    bands = config.resolve_bands(head_dim)
    if isinstance(bands, Bands):
        return ((bands.high_ranges, bands.low_ranges),)
    if len(bands) != q_heads:
        raise ValueError(
            f"PrismConfig: bands has {len(bands)} entries; expected one for all heads or "
            f"{q_heads}, one per query head"
        )
    of_heads = tuple((own.high_ranges, own.low_ranges) for own in bands)
    return of_heads[:1] if len(set(of_heads)) == 1 else of_heads


def _select(
    q: torch.Tensor,
    k: torch.Tensor,
    pooled: torch.Tensor | None,
    config: PrismConfig,
    of_heads: tuple[Ranges, ...],
    causal: bool,
) -> Selection:
    """Of tensors (B, H, L, D), with or without the means of the key blocks."""
    rules = rules_of(config, "bands", q.shape[1])
    end = (causal, *config.block_sizes)
    k_len = k.shape[2]
    op = torch.ops.prism.select_bands.default
    if len(of_heads) == 1:
        high, low = (list(band) for band in of_heads[0])
        if pooled is None:
            return ops.call(op, q, k, high, low, *rules, *end)
        return ops.call(op, q, None, high, low, *rules, *end, k_means=pooled, k_len=k_len)
    assert pooled is not None
    means = pooled

    def select(heads: Sequence[int], kv_heads: Sequence[int], ranges: Ranges) -> Selection:
        high, low = (list(band) for band in ranges)
        own_means = take(means, kv_heads)
        return ops.call(
            op,
            take(q, heads),
            None,
            high,
            low,
            *rules.of(heads),
            *end,
            k_means=own_means,
            k_len=k_len,
        )

    return each_choice(select, of_heads, k.shape[1])


def _select_ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    config: PrismConfig,
    of_heads: tuple[Ranges, ...],
    causal: bool,
    batch: Batch,
    k_scale: torch.Tensor | None,
) -> Selection:
    """Of packed or paged tensors. Heads are views, never copies: k may be a whole pool of pages."""
    q_heads, kv_heads = q.shape[1], k.shape[-2]
    rules = rules_of(config, "bands", q_heads)
    where = batch_keywords(batch, config)
    end = (causal, *config.block_sizes)
    op = torch.ops.prism.select_bands.default
    if len(of_heads) == 1:
        high, low = (list(band) for band in of_heads[0])
        return ops.call(op, q, k, high, low, *rules, *end, k_scale=k_scale, **where)

    def select(heads: Sequence[int], kv: Sequence[int], ranges: Ranges) -> Selection:
        # From the first to the last key head that is read: some may be estimated in vain.
        first, last = kv[0], kv[-1] + 1
        group = q_heads // kv_heads
        there = range(first * group, last * group)
        high, low = (list(band) for band in ranges)
        bits, counts = ops.call(
            op,
            q[:, there.start : there.stop],
            k[..., first:last, :],
            high,
            low,
            *rules.of(there),
            *end,
            k_scale=None if k_scale is None else k_scale[first:last],
            **where,
        )
        wanted = [head - there.start for head in heads]
        return take(bits, wanted), take(counts, wanted)

    return each_choice(select, of_heads, kv_heads)


def running_sums(head_dim: int) -> int:
    """Partial sums that prism::append_means_ keeps of an unfinished block, per dimension."""
    return 1024 // estimation_width(head_dim)


class _Means(KeyState):
    """A mean per block of keys, and the sums of the last, unfinished block."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        max_len: int,
        config: PrismConfig,
        device: torch.device | str,
    ) -> None:
        *heads, head_dim = shape
        self._config = config
        self.unit = config.block_sizes[1]
        blocks = -(-max_len // self.unit)
        self._means = torch.empty((*heads, blocks, head_dim), dtype=torch.float32, device=device)
        self._sums = torch.empty(
            (*heads, running_sums(head_dim), head_dim), dtype=torch.float32, device=device
        )

    def append(self, k: torch.Tensor, start: int) -> None:
        torch.ops.prism.append_means_(k, self._means, self._sums, start, self.unit)

    def select(self, q: torch.Tensor, k: torch.Tensor, scale: float | None) -> Selection:
        of_heads = ranges_of_heads(self._config, q.shape[-1], q.shape[1])
        return _select(q, k, self._means, self._config, of_heads, causal=True)
