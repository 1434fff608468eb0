"""Inputs of the ops from a case of the tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from helpers import call, fp8, inputs, oracle
from helpers.cases import AttentionCase, PoolCase, SelectCase
from helpers.oracle import Attention
from helpers.poison import poisoned_allocations


@dataclass
class AttentionInputs:
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor  # (B, Hq, Nq, Nk) bool
    bits: Tensor
    counts: Tensor
    settings: dict[str, Any]  # scale, causal, block sizes: the op's and the oracle's names

    scales: dict[str, Any] = field(default_factory=dict)  # k_scale and v_scale of fp8

    def op_arguments(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.bits, self.counts

    def run(self, **options: Any) -> tuple[Tensor, Tensor]:
        options = self.settings | self.scales | options
        with poisoned_allocations():
            return torch.ops.prism.sparse_attention(*self.op_arguments(), **options)

    def expected(self) -> tuple[Attention, Tensor]:
        """Float64 results, and the same in plain PyTorch."""
        attend = fp8.attention if self.k.dtype == fp8.FP8 else oracle.attention_and_plain
        return attend(self.q, self.k, self.v, self.mask, **self.scales, **self.settings)

    def by_head(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Results in the shape of the expected ones."""
        return out, lse


def attention_inputs(
    case: AttentionCase,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    kv_dtype: torch.dtype | None = None,
) -> AttentionInputs:
    """q in `dtype`, k and v in `kv_dtype` if it is given: fp8 ones get scales."""

    def make(heads: int, length: int, offset: int) -> Tensor:
        return inputs.tensor(
            (case.batch, heads, length, case.head_dim),
            dtype if offset == 0 else kv_dtype or dtype,
            device,
            seed=seed + offset,
            kind=case.values,
            layout=case.layout,
        )

    mask = inputs.block_mask(
        case.mask,
        case.batch,
        case.q_heads,
        case.q_len,
        case.k_len,
        case.blocks,
        case.causal,
        device,
        seed + 3,
    )
    bits, counts = oracle.pack_bits(mask)
    return AttentionInputs(
        make(case.q_heads, case.q_len, 0),
        make(case.kv_heads, case.k_len, 1),
        make(case.kv_heads, case.k_len, 2),
        mask,
        bits,
        counts,
        {
            "scale": case.scale,
            "causal": case.causal,
            "q_block_size": case.blocks[0],
            "k_block_size": case.blocks[1],
            "softcap": case.softcap,
            "window_left": case.window_left,
        },
        fp8.scales(case.kv_heads, device) if kv_dtype == fp8.FP8 else {},
    )


def pool_input(case: PoolCase, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    shape = (case.batch, case.heads, case.length, case.head_dim)
    return inputs.tensor(shape, dtype, device, seed=seed, kind=case.values, layout=case.layout)


def structured_batch(case: SelectCase, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """float32 q (B, Hq, q_len, D) and k (B, Hkv, k_len, D); every batch element differs."""
    if case.batch == 0:
        return (
            torch.empty(0, case.q_heads, case.q_len, case.head_dim, device=device),
            torch.empty(0, case.kv_heads, case.k_len, case.head_dim, device=device),
        )
    pairs = [
        inputs.structured_qk(
            case.q_heads, case.kv_heads, case.q_len, case.k_len, case.head_dim, device, seed + b
        )
        for b in range(case.batch)
    ]
    return torch.cat([q for q, _ in pairs]), torch.cat([k for _, k in pairs])


def select_bands(case: SelectCase) -> tuple[list[int], list[int]]:
    high, low = oracle.half_split_bands(case.head_dim, case.high or 2, case.low or 2)
    return high if case.high else [], low if case.low else []


@dataclass
class SelectInputs:
    """A selection by bands from means; a query block's tokens are all equal to its mean."""

    q_means: Tensor
    k_means: Tensor
    q_len: int
    k_len: int
    high_band: list[int]
    low_band: list[int]
    top_p: float
    settings: dict[str, Any]  # the keyword arguments, under the op's and the oracle's names

    def q(self) -> Tensor:
        size = self.settings.get("q_block_size", 128)
        q = self.q_means.repeat_interleave(size, 2)[:, :, : self.q_len]
        return q.bfloat16() if q.is_cuda else q

    def run(self) -> tuple[Tensor, Tensor]:
        bands = (self.high_band, self.low_band)
        return call.select_bands(
            self.q(), None, *bands, self.top_p, k_means=self.k_means, k_len=self.k_len,
            **self.settings,
        )  # fmt: skip

    def expected(self) -> oracle.Selection:
        q_means = oracle.block_means(self.q(), self.settings.get("q_block_size", 128))
        return oracle.select(
            q_means, self.k_means, self.q_len, self.k_len, self.high_band, self.low_band,
            self.top_p, **self.settings,
        )  # fmt: skip


def select_settings(case: SelectCase) -> dict[str, Any]:
    return {
        "keep_sink": case.keep_sink,
        "keep_recent": case.keep_recent,
        "keep_above": case.keep_above,
        "causal": case.causal,
        "q_block_size": case.blocks[0],
        "k_block_size": case.blocks[1],
    }


def select_inputs(case: SelectCase, device: str, seed: int = 0) -> SelectInputs:
    q, k = structured_batch(case, device, seed)
    high_band, low_band = select_bands(case)
    return SelectInputs(
        oracle.block_means(q, case.blocks[0]).float(),
        oracle.block_means(k, case.blocks[1]).float(),
        case.q_len,
        case.k_len,
        high_band,
        low_band,
        case.top_p,
        select_settings(case),
    )
