"""Right calls of the ops, of several sizes, for tests that change one argument of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

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
    """Rows of sums that pool_append_ keeps."""
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
        "q_means": make(sizes.q_heads, q_blocks, torch.float32),
        "k_means": make(sizes.kv_heads, k_blocks, torch.float32),
        "bits": bits,
        "counts": counts,
        "sinks": torch.zeros(sizes.q_heads, device=device),
    }


def call_of(
    *names: str, selects: bool = False, bands: bool = True, attends: bool = False
) -> Callable[[Right, str], Arguments]:
    """Builds a right call with these tensors and settings."""

    def build(sizes: Right, device: str) -> Arguments:
        arguments: Arguments = {name: tensors(sizes, device)[name] for name in names}
        if selects and bands:
            arguments["high_band"], arguments["low_band"] = sizes.bands()
        if selects:
            arguments |= {"top_p": 0.9, "keep_sink": 1, "keep_recent": 1, "keep_above": None}
        if attends:
            arguments["scale"] = None
        if "bits" in names:
            arguments |= {"softcap": 30.0, "window_left": 100}
        blocks = dict(zip(("q_block_size", "k_block_size"), sizes.blocks, strict=True))
        return arguments | {"causal": True} | blocks

    return build


def select_blocks_call(sizes: Right, device: str) -> Arguments:
    build = call_of("q_means", "k_means", selects=True)
    return build(sizes, device) | {"q_len": sizes.q_len, "k_len": sizes.k_len}


def pool_append_call(sizes: Right, device: str) -> Arguments:
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


def select_grid_call(sizes: Right, device: str) -> Arguments:
    build = call_of("q", selects=True, bands=False, attends=True)
    cells = (sizes.batch, sizes.kv_heads, oracle.ceil_div(sizes.k_len, oracle.CELL) + 1)
    return build(sizes, device) | {
        "k_cells": torch.ones(*cells, 2 * sizes.head_dim, dtype=torch.half, device=device),
        "k_factors": torch.ones(cells, device=device),
        "k_len": sizes.k_len,
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


def ragged_call(
    base: Callable[[Right, str], Arguments], paged: bool, *names: str
) -> Callable[[Right, str], Arguments]:
    """A call of an op's batched arguments and of `names` as ragged sequences."""

    def build(sizes: Right, device: str) -> Arguments:
        ragged = ragged_tensors(sizes, device)
        return (
            base(sizes, device)
            | {name: ragged[f"{name}_pages" if paged and name != "q" else name] for name in names}
            | {
                "cu_seqlens_q": ragged["cu_seqlens_q"],
                "cu_seqlens_k": None if paged else ragged["cu_seqlens_k"],
                "seqused_k": ragged["seqused_k"],
                "block_table": ragged["block_table"] if paged else None,
                "max_seqlen_q": sizes.q_len,
                "max_seqlen_k": sizes.k_len,
            }
        )

    return build


def varlen_call(paged: bool) -> Callable[[Right, str], Arguments]:
    return ragged_call(call_of("bits", "counts", "sinks", attends=True), paged, "q", "k", "v")


def estimate_varlen_call(paged: bool) -> Callable[[Right, str], Arguments]:
    return ragged_call(call_of(selects=True), paged, "q", "k")


def grid_varlen_call(paged: bool) -> Callable[[Right, str], Arguments]:
    return ragged_call(call_of(selects=True, bands=False, attends=True), paged, "q", "k")


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
