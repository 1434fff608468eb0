"""Right calls of the ops, of several sizes, for tests that change one argument of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import prism_cuda  # noqa: F401  registers the ops
from helpers import oracle

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Right:
    """Sizes of a right call."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    blocks: tuple[int, int]
    dtype: torch.dtype

    def bands(self) -> tuple[list[int], list[int]]:
        return oracle.half_split_bands(self.head_dim, self.head_dim // 2, 3 * self.head_dim // 4)

    def block_counts(self) -> tuple[int, int]:
        return tuple(  # type: ignore[return-value]
            oracle.ceil_div(length, block)
            for length, block in zip((self.q_len, self.k_len), self.blocks, strict=True)
        )


PAGE_SIZE = 16


def sum_rows(head_dim: int) -> int:
    """Rows of sums that append_means_ keeps."""
    return 1024 // next(width for width in (64, 128, 256) if head_dim <= width)


# Several key/value heads and more than one block everywhere, so that every change shows.
RIGHT = (
    Right(1, 4, 2, 70, 130, 64, (64, 64), torch.bfloat16),
    Right(2, 4, 2, 200, 70, 64, (128, 64), torch.float16),
    Right(3, 6, 3, 129, 300, 128, (128, 128), torch.bfloat16),
    Right(2, 2, 2, 130, 130, 128, (64, 64), torch.float16),
)


@functools.cache
def tensors(sizes: Right, device: str) -> dict[str, torch.Tensor]:
    """Tensors of right calls of the ops. Nothing writes to them."""

    def make(heads: int, length: int, dtype: torch.dtype = sizes.dtype) -> torch.Tensor:
        shape = (sizes.batch, heads, length, sizes.head_dim)
        return torch.ones(shape, dtype=dtype, device=device)

    q_blocks, k_blocks = sizes.block_counts()
    keep = torch.ones(sizes.batch, sizes.q_heads, q_blocks, k_blocks, dtype=torch.bool)
    bits, counts = oracle.pack_bits(keep.to(device))
    return {
        "q": make(sizes.q_heads, sizes.q_len),
        "k": make(sizes.kv_heads, sizes.k_len),
        "v": make(sizes.kv_heads, sizes.k_len),
        "bits": bits,
        "counts": counts,
        "sinks": torch.zeros(sizes.q_heads, device=device),
    }


Build = Callable[[Right, str], Arguments]

RULES: Arguments = {"top_p": [0.9], "keep_above": None, "keep_sink": 1, "keep_recent": 1}


def call_of(op: str, layout: str, estimator: str = "") -> Build:
    """Builds a right call of an op that takes q.

    Args:
        layout: "dense", "packed" or "paged"; or "pooled", dense with keys pooled before.
        estimator: of prefill.
    """

    def build(sizes: Right, device: str) -> Arguments:
        x = tensors(sizes, device)
        arguments: Arguments = {"causal": True, "scale": None} | RULES
        arguments |= dict(zip(("q_block_size", "k_block_size"), sizes.blocks, strict=True))
        arguments |= {"q": x["q"], "k": x["k"], "v": x["v"], "estimator": estimator}
        by_bands = "bands" in (op.removeprefix("select_"), estimator)
        bands = sizes.bands() if by_bands else ([], [])
        arguments |= dict(zip(("high_band", "low_band"), bands, strict=True))
        arguments |= {"bits": x["bits"], "counts": x["counts"], "sinks": x["sinks"]}
        arguments |= {"softcap": 30.0, "window_left": 100}
        if layout == "pooled":
            arguments |= {"k": None} | pooled_keys(op, sizes, device)
        if layout in ("packed", "paged"):
            arguments |= ragged(sizes, device, layout == "paged")
        return {name: value for name, value in arguments.items() if name in arguments_of(op)}

    return build


def arguments_of(op: str) -> list[str]:
    """The names of an op's arguments."""
    schema = getattr(torch.ops.prism, op).default._schema
    return [argument.name for argument in schema.arguments]


def pooled_keys(op: str, sizes: Right, device: str) -> Arguments:
    """With room for a block, or a cell, more than they need."""
    if op == "select_bands":
        shape = (sizes.batch, sizes.kv_heads, sizes.block_counts()[1] + 1, sizes.head_dim)
        return {"k_means": torch.ones(shape, device=device), "k_len": sizes.k_len}
    cells = (sizes.batch, sizes.kv_heads, oracle.ceil_div(sizes.k_len, oracle.CELL) + 1)
    return {
        "k_cells": torch.ones(*cells, 2 * sizes.head_dim, dtype=torch.half, device=device),
        "k_factors": torch.ones(cells, device=device),
        "k_len": sizes.k_len,
    }


def append_means_call(sizes: Right, device: str) -> Arguments:
    """The means have room for a block more than they need, which the op writes to."""
    x, start = tensors(sizes, device)["q"], 70
    blocks = oracle.ceil_div(start + sizes.q_len, sizes.blocks[0]) + 1
    means, sums = (
        torch.zeros(*x.shape[:2], rows, sizes.head_dim, device=device)
        for rows in (blocks, sum_rows(sizes.head_dim))
    )
    return {"x": x, "means": means, "sums": sums, "start": start, "block_size": sizes.blocks[0]}


def pool_cells_call(sizes: Right, device: str) -> Arguments:
    """The cells have room for one more than they need."""
    x, start = tensors(sizes, device)["k"], 48
    cells = (*x.shape[:2], oracle.ceil_div(start + sizes.k_len, oracle.CELL) + 1)
    return {
        "x": x,
        "cells": torch.zeros(*cells, 2 * sizes.head_dim, dtype=torch.half, device=device),
        "factors": torch.zeros(cells, device=device),
        "start": start,
    }


@functools.cache
def ragged_tensors(sizes: Right, device: str) -> dict[str, torch.Tensor]:
    """The sequences of tensors() packed, and their keys in pages as well."""

    def packed(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    def ends(length: int) -> torch.Tensor:
        return length * torch.arange(sizes.batch + 1, dtype=torch.int32, device=device)

    batched = tensors(sizes, device)
    pages = oracle.ceil_div(sizes.k_len, PAGE_SIZE)
    pool = (sizes.batch * pages, PAGE_SIZE, sizes.kv_heads, sizes.head_dim)
    table = torch.arange(sizes.batch * pages, dtype=torch.int32, device=device)
    return {
        "q": packed(batched["q"]),
        "k": packed(batched["k"]),
        "v": packed(batched["v"]),
        "k_pages": torch.ones(pool, dtype=sizes.dtype, device=device),
        "v_pages": torch.ones(pool, dtype=sizes.dtype, device=device),
        "cu_seqlens_q": ends(sizes.q_len),
        "cu_seqlens_k": ends(sizes.k_len),
        "seqused_k": torch.full_like(table[: sizes.batch], sizes.k_len),
        "block_table": table.view(sizes.batch, pages),
    }


def ragged(sizes: Right, device: str, paged: bool) -> Arguments:
    """What a call of the same sequences one after the other has instead of the dense tensors."""
    x = ragged_tensors(sizes, device)
    k, v = ("k_pages", "v_pages") if paged else ("k", "v")
    return {
        "q": x["q"],
        "k": x[k],
        "v": x[v],
        "cu_seqlens_q": x["cu_seqlens_q"],
        "cu_seqlens_k": None if paged else x["cu_seqlens_k"],
        "seqused_k": x["seqused_k"],
        "block_table": x["block_table"] if paged else None,
        "max_seqlen_q": sizes.q_len,
        "max_seqlen_k": sizes.k_len,
    }


def fp8_call(
    base: Callable[[Right, str], Arguments], names: tuple[str, ...], scales: tuple[str, ...]
) -> Callable[[Right, str], Arguments]:
    """The same call with these tensors in float8 e4m3, and scales for their heads."""

    def build(sizes: Right, device: str) -> Arguments:
        arguments = base(sizes, device)
        of_x = sizes.q_heads if names == ("x",) else sizes.kv_heads
        return (
            arguments
            | {name: arguments[name].to(torch.float8_e4m3fn) for name in names}
            | {name: torch.ones(of_x, device=device) for name in scales}
        )

    return build


def block_pool_call(sizes: Right, device: str) -> Arguments:
    return {"x": tensors(sizes, device)["q"], "block_size": sizes.blocks[0]}
