"""Wrong calls of the ops: a right call with one argument changed so that it cannot be right.

A new op needs one entry in OPS: how to build a right call, and what kind each argument is of. An op
that is called in several ways has an entry for each, its name followed by the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from helpers.mutations import (
    ABSENT,
    ANY_INT,
    ATTENDED,
    BAND,
    BLOCK_SIZE,
    BLOCK_SIZE_OF_PAIR,
    CELLED_LENGTH,
    CELLS,
    COUNT,
    ESTIMATED,
    FACTORS,
    FLAG,
    K_HEADS,
    LENGTH,
    LENGTHS,
    LIKE_K,
    LONGEST,
    MASK,
    MASKED_K,
    MEANS,
    MEANT_LENGTH,
    NO_SCALE,
    NOT_A_TENSOR,
    NOT_FP8,
    NOT_HALF,
    NOT_HALF_NOR_FP8,
    PACKED,
    PAGED,
    PROBABILITY,
    Q_HEADS,
    SCALE,
    SINKS,
    SOFTCAP,
    START,
    START_OF_CELL,
    STATE,
    THRESHOLD,
    TOGETHER,
    WINDOW,
    Draw,
    Mutation,
    Site,
    activation,
    appended_fits,
    celled_fits,
    dtypes,
    gaps,
    given,
    integers_but,
    last_stride,
    may_be_fp8,
    on_meta,
    other_half,
    other_supported_head_dim,
    other_type,
    pages_fit,
    rank,
    same,
    size,
)
from helpers.right_calls import (
    RIGHT,
    Arguments,
    Right,
    append_means_call,
    arguments_of,
    block_pool_call,
    call_of,
    fp8_call,
    pool_cells_call,
)


@dataclass(frozen=True)
class Op:
    """A right call of the given sizes, and the mutations of every argument."""

    build: Callable[[Right, str], Arguments]
    mutations: dict[str, tuple[Mutation, ...]]

    def in_fp8(self, *names: str) -> Op:
        """The same op with these tensors, x or k or k and v, in float8 e4m3."""
        mutations = dict(self.mutations)
        for name in names:
            others = (m for m in mutations[name] if m not in (NOT_HALF, NOT_HALF_NOR_FP8))
            mutations[name] = (NOT_FP8, *others)
        if "q" in mutations:  # has a dtype of its own
            mutations["q"] = tuple(m for m in mutations["q"] if m is not other_half)
        scales = tuple(
            name for name in ("scale", "k_scale", "v_scale") if mutations.get(name) == NO_SCALE
        )
        mutations |= dict.fromkeys(scales, SINKS)
        return Op(fp8_call(self.build, names, scales), mutations)


BLOCKS = {
    "causal": FLAG,
    "q_block_size": BLOCK_SIZE_OF_PAIR,
    "k_block_size": BLOCK_SIZE_OF_PAIR,
}
RULES = {
    "top_p": PROBABILITY,
    "keep_above": THRESHOLD,
    "keep_sink": COUNT,
    "keep_recent": COUNT,
}
SCORES = {
    "scale": SCALE,
    "sinks": SINKS,
    "softcap": SOFTCAP,
    "window_left": WINDOW,
    "k_scale": NO_SCALE,
    "v_scale": NO_SCALE,
}
MASKS = {"bits": (*MASK, size(3, same)), "counts": MASK}
GIVEN = (given, NOT_A_TENSOR)
# Of a dense batch, of a packed and of a paged one.
BATCHES: dict[str, dict[str, tuple[Mutation, ...]]] = {
    "dense": {
        **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "block_table"), GIVEN),
        **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), ANY_INT),
        "dense_below": integers_but(lambda n, _: n == 0),
    },
    "packed": {
        "cu_seqlens_q": (*LENGTHS, ABSENT),
        "cu_seqlens_k": (*LENGTHS, ABSENT),
        "seqused_k": LENGTHS,
        "block_table": GIVEN,
        "max_seqlen_q": LONGEST,
        "max_seqlen_k": LONGEST,
        "dense_below": COUNT,
    },
    "paged": {
        "cu_seqlens_q": (*LENGTHS, ABSENT),
        "cu_seqlens_k": GIVEN,
        "seqused_k": (*LENGTHS, ABSENT),
        "block_table": (
            dtypes(torch.int32),
            rank,
            size(0, same),
            size(1, pages_fit),
            last_stride,
            on_meta,
            ABSENT,
            NOT_A_TENSOR,
        ),
        "max_seqlen_q": LONGEST,
        "max_seqlen_k": LONGEST,
        "dense_below": COUNT,
    },
}
ROWS = activation(dims=3) + TOGETHER
QUERIES = {"dense": (*ESTIMATED, Q_HEADS), "packed": (*ROWS, Q_HEADS), "paged": (*ROWS, Q_HEADS)}
KEYS = {
    "dense": (*ESTIMATED, K_HEADS),
    "packed": (*ROWS, K_HEADS),
    "paged": (*activation(), *TOGETHER),
}
# Beside v, which has to be alike.
KEYS_AND_VALUES = {
    "dense": (*ATTENDED, *LIKE_K),
    "packed": (*PACKED, size(0, same), size(1, same)),
    "paged": PAGED,
}


def fitting_mask(layout: str) -> dict[str, tuple[Mutation, ...]]:
    """Of attention alone: bits and counts must have the lengths' blocks."""
    longest = {"max_seqlen_q": LENGTH, "max_seqlen_k": MASKED_K}
    return MASKS | (longest if layout != "dense" else {})


def dimensions(draw: Draw, site: Site) -> list[int]:
    return draw(st.sampled_from([[0, 8], [0, 8, 16, 24]]))


NO_BAND = (dimensions, other_type(None, 5, 0.5, "0", [0, 0.5], [0, "32"], [0, 2**63]))


def bands_of(estimator: str) -> dict[str, tuple[Mutation, ...]]:
    return dict.fromkeys(("high_band", "low_band"), BAND if estimator == "bands" else NO_BAND)


def taking_q(
    op: str, layout: str, mutations: dict[str, tuple[Mutation, ...]], estimator: str = ""
) -> Op:
    everything = BATCHES["dense" if layout == "pooled" else layout] | BLOCKS | mutations
    wanted = {name: everything[name] for name in arguments_of(op)}
    return Op(call_of(op, layout, estimator), wanted)


POOLED_NONE = {"k_means": GIVEN, "k_cells": GIVEN, "k_factors": GIVEN, "k_len": ANY_INT}
QUERIES_ALONE = (
    *activation(), other_supported_head_dim, on_meta, ABSENT, size(0, same), Q_HEADS,
)  # fmt: skip

OPS: dict[str, Op] = {
    "block_pool": Op(
        block_pool_call,
        {"x": may_be_fp8(*activation()), "block_size": BLOCK_SIZE, "scale": NO_SCALE},
    ),
    "append_means_": Op(
        append_means_call,
        {
            "x": may_be_fp8(
                *activation(),
                other_supported_head_dim,
                size(0, same),
                size(1, same),
                size(2, appended_fits("length")),
                on_meta,
                ABSENT,
            ),
            "means": (*STATE, size(2, appended_fits("blocks"))),
            "sums": (*STATE, size(2, same)),
            "start": START,
            "block_size": BLOCK_SIZE,
            "scale": NO_SCALE,
        },
    ),
    "pool_cells_": Op(
        pool_cells_call,
        {
            "x": (
                *activation(),
                other_supported_head_dim,
                size(0, same),
                size(1, same),
                size(2, celled_fits("length")),
                on_meta,
                ABSENT,
            ),
            "cells": (*CELLS, size(1, same), gaps, size(2, same)),
            "factors": (*FACTORS, size(1, same), gaps),
            "start": START_OF_CELL,
        },
    ),
    "select_bands pooled": taking_q(
        "select_bands",
        "pooled",
        RULES
        | bands_of("bands")
        | {
            "q": QUERIES_ALONE,
            "k": (given,),
            "k_means": (*MEANS, K_HEADS),
            "k_len": MEANT_LENGTH,
            "k_scale": (given, NOT_A_TENSOR),
        },
    ),
    "select_grid pooled": taking_q(
        "select_grid",
        "pooled",
        RULES
        | {
            "q": QUERIES_ALONE,
            "k": (given,),
            "k_cells": (*CELLS, K_HEADS, size(2, same)),
            "k_factors": (*FACTORS, size(1, same)),
            "k_len": CELLED_LENGTH,
            "scale": SCALE,
        },
    ),
}
for _layout in ("dense", "packed", "paged"):
    _tensors = {"q": QUERIES[_layout], "k": KEYS[_layout]}
    _attended = {"q": QUERIES[_layout]} | dict.fromkeys("kv", KEYS_AND_VALUES[_layout])
    _may_be_fp8 = {"k": may_be_fp8(*KEYS[_layout]), "k_scale": NO_SCALE}
    OPS |= {
        f"select_bands {_layout}": taking_q(
            "select_bands",
            _layout,
            RULES | bands_of("bands") | POOLED_NONE | _tensors | _may_be_fp8,
        ),
        f"select_grid {_layout}": taking_q(
            "select_grid", _layout, RULES | POOLED_NONE | _tensors | {"scale": SCALE}
        ),
        f"sparse_attention {_layout}": taking_q(
            "sparse_attention", _layout, SCORES | _attended | fitting_mask(_layout)
        ),
    }
    for _estimator in ("grid", "bands", "all"):
        OPS[f"prefill {_estimator} {_layout}"] = taking_q(
            "prefill",
            _layout,
            RULES | bands_of(_estimator) | SCORES | _attended
            | {"estimator": (other_type("", "Grid", "dense", None, 3, ["grid"]),)},
            _estimator,
        )  # fmt: skip
OPS |= {
    "block_pool fp8": OPS["block_pool"].in_fp8("x"),
    "append_means_ fp8": OPS["append_means_"].in_fp8("x"),
    "select_bands fp8": OPS["select_bands dense"].in_fp8("k"),
    "select_bands fp8 paged": OPS["select_bands paged"].in_fp8("k"),
    "sparse_attention fp8": OPS["sparse_attention dense"].in_fp8("k", "v"),
    "sparse_attention fp8 packed": OPS["sparse_attention packed"].in_fp8("k", "v"),
    "sparse_attention fp8 paged": OPS["sparse_attention paged"].in_fp8("k", "v"),
    "prefill fp8": OPS["prefill bands dense"].in_fp8("k", "v"),
}


def op_of(name: str) -> Any:
    """The op behind an entry of OPS."""
    return getattr(torch.ops.prism, name.split()[0])


def gpu_allocations() -> int:
    """Blocks the CUDA allocator has handed out so far; 0 where it has not been used."""
    if not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))


class WrongCall:
    """Arguments of a call, one of which is wrong; shown by that one."""

    def __init__(self, argument: str, arguments: Arguments) -> None:
        self.argument = argument
        self.arguments = arguments

    def __repr__(self) -> str:
        value = self.arguments[self.argument]
        if isinstance(value, torch.Tensor):
            stride = tuple(value.stride())
            value = f"{value.dtype} {tuple(value.shape)} strides {stride} on {value.device}"
        return f"{self.argument} = {value!s}"


@st.composite
def wrong_calls(draw: Draw, name: str, device: str) -> WrongCall:
    op = OPS[name]
    sizes = draw(st.sampled_from(RIGHT))
    arguments = op.build(sizes, device)
    argument = draw(st.sampled_from(sorted(op.mutations)))
    mutate = draw(st.sampled_from(op.mutations[argument]))
    wrong = mutate(draw, Site(argument, arguments.get(argument), arguments, sizes))
    return WrongCall(argument, arguments | {argument: wrong})
