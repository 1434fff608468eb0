"""Every wrong call is refused by name, before anything is allocated or launched.

Chosen cases with the message each must give; test_error_properties.py draws thousands more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import oracle
from helpers.mutations import band_is_right
from helpers.params import needs_cuda
from helpers.ragged import RaggedCase, ragged_inputs
from helpers.right_calls import arguments_of
from helpers.wrong_calls import gpu_allocations
from hypothesis import given, settings
from hypothesis import strategies as st

import prism_cuda  # noqa: F401  registers the ops

Arguments = dict[str, Any]

BLOCKS = {"q_block_size": 64, "k_block_size": 64}
HIGH, LOW = oracle.half_split_bands(64, 32, 48)
SELECTION: Arguments = {"high_band": HIGH, "low_band": LOW, "top_p": [0.9]}


def activation(device: str, heads: int, length: int = 130, **options: Any) -> torch.Tensor:
    options = {"dtype": torch.bfloat16} | options
    return torch.ones(2, heads, length, 64, device=device, **options)


RAGGED = {
    "packed": RaggedCase("packed", lengths=((5, 9), (130, 200)), blocks=(64, 64), unused=2),
    "paged": RaggedCase("paged", lengths=((5, 9), (130, 200)), blocks=(64, 64), page_size=16),
}


def cells(device: str, prefix: str) -> Arguments:
    """Room for the cells of 224 keys of two heads."""
    return {
        prefix + "cells": torch.ones(2, 2, 14, 128, device=device, dtype=torch.half),
        prefix + "factors": torch.ones(2, 2, 14, device=device),
    }


def op_of(name: str) -> str:
    """The op behind the name of a call: the op and what is special of the call."""
    return name.split()[0]


def good(name: str, device: str) -> Arguments:
    """Arguments of a right call: 4 query heads, 2 kv heads, 130 queries, 200 keys."""
    op, _, kind = name.partition(" ")
    if op == "block_pool":
        return {"x": activation(device, 2), "block_size": 64}
    if op == "append_means_":
        return {
            "x": activation(device, 2),
            "means": activation(device, 2, 4, dtype=torch.float32),
            "sums": activation(device, 2, 16, dtype=torch.float32),
            "start": 70,
            "block_size": 64,
        }
    if op == "pool_cells_":
        return {"x": activation(device, 2), **cells(device, ""), "start": 48}
    arguments: Arguments = dict(BLOCKS)
    if kind in RAGGED:
        arguments |= ragged_inputs(RAGGED[kind], torch.bfloat16, device).op_arguments()
        arguments["sinks"] = torch.zeros(4, device=device)
    else:
        arguments |= {
            "q": activation(device, 4),
            "k": activation(device, 2, 200),
            "v": activation(device, 2, 200),
        }
        keep = torch.ones(2, 4, 3, 4, dtype=torch.bool, device=device)
        arguments |= dict(zip(("bits", "counts"), oracle.pack_bits(keep), strict=True))
    if op != "sparse_attention":
        arguments |= SELECTION | {"estimator": "bands"}
    if kind == "pooled":
        arguments |= {"k": None, "k_len": 200} | cells(device, "k_")
        arguments["k_means"] = activation(device, 2, 4, dtype=torch.float32)
    return {name: x for name, x in arguments.items() if name in arguments_of(op)}


Change = Callable[[Any], Any]


def to(value: Any) -> Change:
    return lambda _: value


def last_stride_2(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


def other_dtype(x: torch.Tensor) -> torch.Tensor:
    return x.half()


def odd_start(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.flatten(), x.flatten()[:4]])[4:].view(x.shape)


# (op, argument to change, change, what the message must name)
ACTIVATION: tuple[tuple[str, Change], ...] = (
    ("float64", lambda x: x.double()),
    ("int32", lambda x: x.int()),
    ("3 dimensions", lambda x: x[0]),
    ("5 dimensions", lambda x: x[None]),
    ("head_dim 36", lambda x: x[..., :36]),
    ("head_dim 0", lambda x: x[..., :0]),
    ("head_dim 512", lambda x: x.repeat(1, 1, 1, 8)),
    ("last stride 2", last_stride_2),
)
WRONG: list[tuple[str, str, str, Change, str]] = [
    (op, "x", what, change, r"\bx\b")
    for op in ("block_pool", "append_means_")
    for what, change in ACTIVATION
]
WRONG += [
    (op, "block_size", str(size), to(size), "block_size")
    for op in ("block_pool", "append_means_")
    for size in (0, -64, 32, 63, 96, 256)
]
for _name in ("means", "sums"):
    WRONG += [
        ("append_means_", _name, "bfloat16", lambda x: x.bfloat16(), _name),
        ("append_means_", _name, "3 dimensions", lambda x: x[0], _name),
        ("append_means_", _name, "other batch", lambda x: x[:1], _name),
        ("append_means_", _name, "other heads", lambda x: x[:, :1], _name),
        ("append_means_", _name, "other head_dim", lambda x: x.repeat(1, 1, 1, 2), _name),
        ("append_means_", _name, "not contiguous", lambda x: x.mT.contiguous().mT, _name),
    ]
WRONG += [
    ("append_means_", "means", "a block too few", lambda x: x[:, :, :3].contiguous(), "means"),
    ("append_means_", "sums", "8 rows", lambda x: x[:, :, :8].contiguous(), "sums"),
    ("append_means_", "start", "-1", to(-1), "start"),
    ("append_means_", "start", "beyond the means", to(127), "means.*start"),
    ("append_means_", "start", "beyond 64 bits", to(2**63 - 1), "means.*start"),
]
WRONG += [("pool_cells_", "x", what, change, r"\bx\b") for what, change in ACTIVATION]
WRONG += [("select_grid pooled", "q", what, change, r"\bq\b") for what, change in ACTIVATION]
for _op, _prefix in (("pool_cells_", ""), ("select_grid pooled", "k_")):
    _cells, _factors = _prefix + "cells", _prefix + "factors"
    WRONG += [
        (_op, _cells, "bfloat16", lambda x: x.bfloat16(), _cells),
        (_op, _cells, "other batch", lambda x: x[:1], _cells),
        (_op, _cells, "other width", lambda x: x.repeat(1, 1, 1, 2), _cells),
        (_op, _cells, "other rows", lambda x: x.mT.contiguous().mT, _cells),
        (_op, _cells, "8 byte offset", lambda x: odd_start(x), _cells),
        (_op, _factors, "float16", lambda x: x.half(), _factors),
        (_op, _factors, "a cell less", lambda x: x[:, :, 1:].contiguous(), _factors),
        (_op, _factors, "last stride 2", last_stride_2, _factors),
    ]
WRONG += [
    ("pool_cells_", "start", "within a cell", to(40), "start.*16"),
    ("pool_cells_", "start", "-16", to(-16), "start"),
    ("pool_cells_", "start", "beyond the cells", to(112), "cells.*14"),
    ("pool_cells_", "start", "beyond 64 bits", to(2**63 - 16), "cells"),
    ("pool_cells_", "cells", "other heads", lambda x: x[:, :1].contiguous(), "cells"),
    ("select_grid pooled", "k_len", "-1", to(-1), "k_len"),
    ("select_grid pooled", "k_len", "225", to(225), "k_len.*14"),
    ("select_grid pooled", "q", "3 heads for 2", lambda x: x[:, :3], r"\bq\b.*3.*k_cells.*2"),
    ("select_grid pooled", "top_p", "1.5", to([1.5]), "top_p"),
]
for _op in ("sparse_attention", "prefill"):
    for _name in ("q", "k", "v"):
        WRONG += [
            (_op, _name, what, change, rf"\b{_name}\b")
            for what, change in ACTIVATION
        ]  # fmt: skip
        WRONG += [
            (_op, _name, "other dtype", other_dtype, rf"\b[{_name}k]\b.* dtype"),
            (_op, _name, "other batch", lambda x: x[:1], rf"\b[{_name}k]\b.* batch"),
            (_op, _name, "other head_dim", lambda x: x.repeat(1, 1, 1, 2), "head_dim"),
        ]
    WRONG += [
        (_op, "q", "5 heads for 2", lambda x: x.repeat(1, 2, 1, 1)[:, :5], r"\bq\b.*5.*\bk\b.*2"),
        (_op, "k", "3 heads", lambda x: x.repeat(1, 2, 1, 1)[:, :3], r"\b[kv]\b"),
        (_op, "v", "1 head", lambda x: x[:, :1], r"\bv\b"),
        (_op, "v", "shorter", lambda x: x[:, :, :199], r"\bv\b"),
        (_op, "k", "longer", lambda x: x.repeat(1, 1, 2, 1), r"\b[kv]\b"),
    ]
for _name in ("q", "k"):
    WRONG += [("select_grid", _name, what, change, rf"\b{_name}\b") for what, change in ACTIVATION]
WRONG += [
    ("select_grid", "q", "5 heads", lambda x: x.repeat(1, 2, 1, 1)[:, :5], r"\bq\b.*5.*\bk\b.*2"),
    ("select_grid", "k", "other dtype", other_dtype, r"\bk\b.* dtype"),
    ("select_grid", "k", "other batch", lambda x: x[:1], r"\bk\b.* batch"),
]
for _op in ("select_grid", "sparse_attention", "prefill"):
    WRONG += [
        (_op, "scale", "zero", to(0.0), "scale"),
        (_op, "scale", "negative", to(-1.0), "scale"),
        (_op, "scale", "nan", to(math.nan), "scale"),
        (_op, "scale", "inf", to(math.inf), "scale"),
        (_op, "scale", "under float32", to(1e-40), "scale"),
        (_op, "scale", "over float32", to(3e38), "scale"),
    ]
WRONG += [
    ("sparse_attention", "bits", "int64", lambda x: x.long(), "bits"),
    ("sparse_attention", "bits", "bool", lambda x: x.bool(), "bits"),
    ("sparse_attention", "bits", "a word too many", lambda x: x.repeat(1, 1, 1, 2), "bits"),
    ("sparse_attention", "bits", "a row too few", lambda x: x[:, :, :2], "bits"),
    ("sparse_attention", "bits", "kv heads", lambda x: x[:, :2], "bits"),
    ("sparse_attention", "bits", "3 dimensions", lambda x: x[..., 0], "bits"),
    ("sparse_attention", "counts", "float32", lambda x: x.float(), "counts"),
    ("sparse_attention", "counts", "a row too few", lambda x: x[:, :, :2], "counts"),
    ("sparse_attention", "counts", "4 dimensions", lambda x: x[..., None], "counts"),
    ("sparse_attention", "counts", "other batch", lambda x: x[:1], "counts"),
    ("sparse_attention", "softcap", "0", to(0.0), "softcap"),
    ("sparse_attention", "softcap", "inf", to(math.inf), "softcap"),
    ("sparse_attention", "softcap", "1e-20", to(1e-20), "softcap"),
    ("sparse_attention", "softcap", "3e38", to(3e38), "softcap"),
    ("sparse_attention", "window_left", "-1", to(-1), "window_left"),
    ("sparse_attention", "sinks", "3 heads", to(torch.zeros(3)), "sinks"),
]
WRONG += [
    ("select_bands pooled", "k_means", "bfloat16", lambda x: x.bfloat16(), "k_means"),
    ("select_bands pooled", "k_means", "float64", lambda x: x.double(), "k_means"),
    ("select_bands pooled", "k_means", "3 dimensions", lambda x: x[0], "k_means"),
    ("select_bands pooled", "k_means", "head_dim 32", lambda x: x[..., :32], "k_means"),
    ("select_bands pooled", "k_means", "other head_dim", lambda x: x.repeat(1, 1, 1, 2), "k_means"),
    ("select_bands pooled", "k_means", "other batch", lambda x: x[:1], "k_means"),
    ("select_bands pooled", "k_means", "a block too few", lambda x: x[:, :, :3], "k_means.*k_len"),
    ("select_bands pooled", "k_means", "last stride 2", last_stride_2, "k_means"),
    ("select_bands pooled", "q", "3 heads for 2", lambda x: x[:, :3], r"\bq\b.*3.*k_means.*2"),
    ("select_bands pooled", "k_len", "257 with 4 blocks", to(257), "k_len"),
    ("select_bands pooled", "k_len", "-200", to(-200), "k_len"),
    ("select_bands pooled", "k_len", "None", to(None), "k_len"),
    ("select_bands pooled", "k_means", "None", to(None), r"\bk\b and k_means are None"),
    ("select_grid pooled", "k_cells", "None", to(None), r"\bk\b and k_cells are None"),
    ("select_grid pooled", "k_factors", "None", to(None), "k_factors is None"),
    ("select_grid pooled", "k_len", "None", to(None), "k_len is None"),
]
for _op in ("select_bands", "select_grid", "sparse_attention", "prefill"):
    WRONG += [
        (_op, name, "without cu_seqlens_q", to(value), rf"{name} is given without cu_seqlens_q")
        for name, value in (
            ("cu_seqlens_k", torch.zeros(3).int()),
            ("seqused_k", torch.zeros(2).int()),
            ("block_table", torch.zeros(2, 5).int()),
            ("max_seqlen_q", 130),
            ("max_seqlen_k", 200),
        )
    ]
WRONG += [
    (_op, "dense_below", "without cu_seqlens_q", to(64), "dense_below is 64 without cu_seqlens_q")
    for _op in ("select_bands", "select_grid", "prefill")
]
WRONG += [
    (
        "prefill",
        "estimator",
        "unknown",
        to("dense"),
        "estimator is 'dense'.*'grid', 'bands', 'all'",
    ),
    ("prefill", "estimator", "grid with bands", to("grid"), "high_band.*'grid'"),
    ("prefill", "estimator", "all with bands", to("all"), "high_band.*'all'"),
]
NINE_RANGES = [d for start in range(0, 36, 4) for d in (start, start + 2)]
for _op in ("select_bands pooled", "select_bands", "prefill"):
    for _name in ("high_band", "low_band"):
        WRONG += [
            (_op, _name, str(band), to(band), _name)
            for band in (
                [0],
                [0, 32, 32],
                [0, 65],
                [-1, 32],
                [32, 0],
                [16, 32, 0, 16],
                [0, 20, 10, 30],
                NINE_RANGES,
            )
        ]
for _op in ("select_bands", "select_bands packed", "select_grid", "select_grid packed", "prefill"):
    WRONG += [
        (_op, "top_p", str(p), to([p]), "top_p")
        for p in (-0.01, 1.01, math.nan, math.inf, -math.inf)
    ]
    WRONG += [
        (_op, "keep_above", str(p), to([p]), "keep_above")
        for p in (0.0, -0.1, 1.01, math.nan, math.inf)
    ]
    WRONG += [
        (_op, name, f"{count} values", to([0.5] * count), rf"{name} has {count} values.* 4 query")
        for name in ("top_p", "keep_above")
        for count in (0, 3, 5)
    ]
    WRONG += [
        (_op, name, "negative", to(value), name)
        for name in ("keep_sink", "keep_recent")
        for value in (-1,)
    ]
for _op in ("sparse_attention", "select_bands", "select_grid", "prefill"):
    WRONG += [
        (_op, name, str(size), to(size), "block_size")
        for name in BLOCKS
        for size in (0, -64, 32, 63, 256)
    ]
    WRONG += [(_op, "k_block_size", "larger than q's", to(128), "k_block_size")]


HEADS: tuple[tuple[str, Change], ...] = (
    ("float64", lambda x: x.double()),
    ("int32", lambda x: x.int()),
    ("a dimension less", lambda x: x[0]),
    ("a dimension more", lambda x: x[None]),
    ("head_dim 512", lambda x: torch.cat([x] * 8, -1)),
    ("head_dim 63", lambda x: x[..., :63]),
    ("last stride 2", last_stride_2),
)
LENGTHS: tuple[tuple[str, Change], ...] = (
    ("int64", lambda x: x.long()),
    ("2 dimensions", lambda x: x[None]),
    ("strided", lambda x: torch.stack([x, x], -1)[:, 0]),
    ("one too many", lambda x: torch.cat([x, x[-1:]])),
)
PACKED, PAGED = "sparse_attention packed", "sparse_attention paged"
for _kind in (PACKED, PAGED):
    for _name in ("q", "k", "v"):
        WRONG += [(_kind, _name, what, change, rf"\b{_name}\b") for what, change in HEADS]
        WRONG += [
            (_kind, _name, "other dtype", lambda x: x.half(), rf"\b[{_name}k]\b.* dtype"),
            (_kind, _name, "other head_dim", lambda x: torch.cat([x, x], -1), "head_dim"),
        ]
    WRONG += [
        (_kind, "q", "3 heads for 2", lambda x: x[:, :3], r"\bq\b.*3.*\bk\b.*2"),
        (_kind, "v", "1 head", lambda x: x[..., :1, :], r"\bv\b.*expected k's"),
        (_kind, "v", "a row less", lambda x: x[1:], r"\bv\b.*expected k's"),
        (_kind, "bits", "int64", lambda x: x.long(), "bits"),
        (_kind, "bits", "a row too few", lambda x: x[:, :, :2].contiguous(), "bits"),
        (_kind, "bits", "kv heads", lambda x: x[:, :2].contiguous(), "bits"),
        (_kind, "bits", "a word too many", lambda x: torch.cat([x, x], -1), "bits"),
        (_kind, "bits", "strided", lambda x: torch.cat([x, x], 1)[:, ::2], "bits.*contiguous"),
        (_kind, "counts", "float32", lambda x: x.float(), "counts"),
        (_kind, "counts", "other batch", lambda x: x[:1], "counts"),
        (_kind, "cu_seqlens_q", "None", to(None), "cu_seqlens_q"),
        (_kind, "cu_seqlens_q", "empty", lambda x: x[:0], "cu_seqlens_q"),
        (_kind, "cu_seqlens_q", "one too few", lambda x: x[1:], "seqused_k|block_table"),
        (_kind, "max_seqlen_q", "a block more", to(193), "bits"),
        (_kind, "max_seqlen_q", "-1", to(-1), "max_seqlen_q"),
        (_kind, "max_seqlen_q", "2^30", to(1 << 30), "max_seqlen_q"),
        (_kind, "max_seqlen_k", "-1", to(-1), "max_seqlen_k"),
        (_kind, "max_seqlen_k", "2^30", to(1 << 30), "max_seqlen_k"),
        (_kind, "scale", "0", to(0.0), "scale"),
        (_kind, "scale", "nan", to(math.nan), "scale"),
        (_kind, "q_block_size", "32", to(32), "block_size"),
        (_kind, "k_block_size", "128", to(128), "block_size"),
        (_kind, "sinks", "bfloat16", lambda x: x.bfloat16(), "sinks"),
        (_kind, "sinks", "2 heads", lambda x: x[:2], "sinks"),
        (_kind, "softcap", "-1", to(-1.0), "softcap"),
        (_kind, "window_left", "-1", to(-1), "window_left"),
        (_kind, "sinks", "strided", lambda x: torch.cat([x, x])[::2], "sinks"),
    ]
    for _name in ("cu_seqlens_q", "seqused_k"):
        WRONG += [
            (_kind, _name, what, change, "seqused_k|cu_seqlens_q") for what, change in LENGTHS
        ]
WRONG += [(PACKED, "cu_seqlens_k", what, change, "cu_seqlens_k") for what, change in LENGTHS]
WRONG += [
    (PACKED, "cu_seqlens_k", "None", to(None), "cu_seqlens_k"),
    (
        "sparse_attention paged",
        "cu_seqlens_k",
        "given",
        to(torch.zeros(3).int()),
        "cu_seqlens_k.*block_table",
    ),
    (PAGED, "seqused_k", "None", to(None), "seqused_k"),
    (PAGED, "block_table", "None", to(None), "block_table"),
    (PAGED, "block_table", "int64", lambda x: x.long(), "block_table"),
    (PAGED, "block_table", "1 dimension", lambda x: x[0], "block_table"),
    (PAGED, "block_table", "other batch", lambda x: x[:1], "block_table"),
    (PAGED, "block_table", "last stride 2", last_stride_2, "block_table"),
    (
        "sparse_attention paged",
        "block_table",
        "too few pages",
        lambda x: x[:, :12].contiguous(),
        "max_seqlen_k",
    ),
]
SELECTIONS = [
    f"{op} {layout}" for op in ("select_bands", "select_grid") for layout in ("packed", "paged")
]
for _kind in SELECTIONS:
    WRONG += [
        (_kind, "q", "head_dim 48", lambda x: x[..., :48], "head_dim"),
        (_kind, "q", "head_dim 60", lambda x: x[..., :60], "head_dim.*multiples of 8 up to 256"),
        (_kind, "q", "other dtype", lambda x: x.half(), r"\bk\b.*dtype"),
        (_kind, "q", "2 dimensions", lambda x: x[0], r"\bq\b"),
        (_kind, "q", "3 heads for 2", lambda x: x[:, :3], r"\bq\b.*3.*\bk\b.*2"),
        (_kind, "k", "a dimension less", lambda x: x[0], r"\bk\b"),
        (_kind, "cu_seqlens_q", "int64", lambda x: x.long(), "cu_seqlens_q"),
        (_kind, "seqused_k", "one too few", lambda x: x[1:], "seqused_k"),
        (_kind, "max_seqlen_q", "-1", to(-1), "max_seqlen_q"),
        (_kind, "max_seqlen_q", "None", to(None), "max_seqlen_q is None"),
        (_kind, "max_seqlen_k", "2^30", to(1 << 30), "max_seqlen_k"),
        (_kind, "dense_below", "-1", to(-1), "dense_below"),
        (_kind, "q_block_size", "32", to(32), "block_size"),
    ]
WRONG += [
    ("select_grid packed", "scale", "zero", to(0.0), "scale"),
    ("select_bands packed", "high_band", "[0, 65]", to([0, 65]), "high_band"),
    ("select_bands packed", "low_band", "[3, 2]", to([3, 2]), "low_band"),
    ("select_grid packed", "cu_seqlens_k", "one too few", lambda x: x[1:], "cu_seqlens_k"),
    ("select_bands packed", "cu_seqlens_k", "None", to(None), "cu_seqlens_k"),
    ("select_grid paged", "seqused_k", "None", to(None), "seqused_k"),
    ("select_bands paged", "max_seqlen_k", "beyond the pages", to(1 << 20), "max_seqlen_k"),
    ("select_bands packed", "k_means", "given", to(torch.ones(1)), "k and k_means are both given"),
    ("select_grid packed", "k_cells", "given", to(torch.ones(1)), "k and k_cells are both given"),
]


def refuse(name: str, arguments: Arguments, pattern: str) -> None:
    """The call raises RuntimeError naming op and argument, and allocates no GPU memory."""
    before = gpu_allocations()
    with pytest.raises(RuntimeError, match=rf"prism::{op_of(name)}\b.*(?:{pattern})"):
        getattr(torch.ops.prism, op_of(name))(**arguments)
    assert gpu_allocations() == before, "memory was allocated before the refusal"


@pytest.mark.parametrize(
    "name",
    [
        "block_pool",
        "append_means_",
        "pool_cells_",
        "select_bands",
        "select_bands pooled",
        "select_grid",
        "select_grid pooled",
        "sparse_attention",
        "sparse_attention packed",
        "sparse_attention paged",
        *SELECTIONS,
        "prefill",
    ],
)
def test_the_right_call_is_accepted(name: str, device: str) -> None:
    getattr(torch.ops.prism, op_of(name))(**good(name, device))


@pytest.mark.parametrize(
    ("name", "argument", "change", "pattern"),
    [
        pytest.param(name, argument, change, pattern, id=f"{name}-{argument}-{what}")
        for name, argument, what, change, pattern in WRONG
    ],
)
def test_wrong_call_is_refused_by_name(
    name: str, argument: str, change: Change, pattern: str, device: str
) -> None:
    arguments = good(name, device)
    arguments[argument] = change(arguments.get(argument))
    refuse(name, arguments, pattern)


@pytest.mark.parametrize("name", ["select_bands pooled", "select_bands", "prefill"])
def test_two_empty_bands_are_refused(name: str, device: str) -> None:
    refuse(name, good(name, device) | {"high_band": [], "low_band": []}, "high_band.*low_band")


def test_means_and_sums_in_the_same_memory_are_refused(device: str) -> None:
    arguments = good("append_means_", device)
    arguments["means"] = arguments["sums"]
    refuse("append_means_", arguments, "means and sums")


@pytest.mark.parametrize(
    "name",
    [
        "block_pool",
        "append_means_",
        "select_bands",
        "select_grid",
        "sparse_attention",
        "prefill",
    ],
)
def test_float32_is_refused_on_cuda(name: str, cuda: str) -> None:
    arguments = {
        key: value.float() if key in ("x", "q", "k", "v") else value
        for key, value in good(name, cuda).items()
    }
    refuse(name, arguments, r"\b[xq]\b.*Float")


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("sparse_attention", "k"),
        ("sparse_attention", "v"),
        ("sparse_attention", "bits"),
        ("sparse_attention", "counts"),
        ("prefill", "k"),
        ("prefill", "v"),
        ("select_bands", "k"),
        ("select_grid", "k"),
        ("select_bands pooled", "k_means"),
        ("append_means_", "means"),
        ("append_means_", "sums"),
        ("pool_cells_", "cells"),
        ("pool_cells_", "factors"),
        ("select_grid pooled", "k_cells"),
        ("select_grid pooled", "k_factors"),
    ],
)
def test_tensors_of_two_devices_are_refused(name: str, argument: str, cuda: str) -> None:
    arguments = good(name, cuda)
    arguments[argument] = arguments[argument].cpu()
    refuse(name, arguments, rf"\b{argument}\b.* cpu.*cuda")


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("append_means_", "means"),
        ("append_means_", "sums"),
        ("select_bands pooled", "k_means"),
        ("sparse_attention", "q"),
        ("sparse_attention", "v"),
        ("sparse_attention", "bits"),
        ("sparse_attention", "counts"),
        ("prefill", "k"),
        ("select_bands", "q"),
        ("select_bands", "k"),
        ("select_grid", "q"),
        ("select_grid", "k"),
    ],
)
def test_missing_tensor_is_refused_by_name(name: str, argument: str, device: str) -> None:
    refuse(name, good(name, device) | {argument: None}, rf"\b{argument}\b")


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["select_bands pooled", "select_bands", "prefill"]),
    argument=st.sampled_from(["high_band", "low_band"]),
    band=st.lists(st.integers(-8, 72), max_size=18).flatmap(
        lambda dims: st.sampled_from([dims, sorted(set(dims))])
    ),
)
@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_a_band_is_refused_exactly_if_it_is_wrong(
    on: str, name: str, argument: str, band: list[int]
) -> None:
    if on == "cuda":
        needs_cuda()
    arguments = good(name, on) | {argument: band}
    if band_is_right(band, 64):
        getattr(torch.ops.prism, op_of(name))(**arguments)
    else:
        refuse(name, arguments, argument)


@pytest.mark.parametrize("size", [3, 24, 512])
def test_page_sizes_that_are_no_power_of_two_up_to_256(device: str, size: int) -> None:
    arguments = good("sparse_attention paged", device)
    for name in ("k", "v"):
        arguments[name] = torch.zeros(5, size, 2, 64, dtype=torch.bfloat16, device=device)
    arguments["block_table"] = torch.zeros(2, 200, dtype=torch.int32, device=device)
    refuse("sparse_attention paged", arguments, "page size")


@pytest.mark.parametrize(
    "argument", ["k", "v", "bits", "counts", "cu_seqlens_q", "seqused_k", "block_table", "sinks"]
)
def test_ragged_tensors_of_two_devices_are_refused(argument: str, cuda: str) -> None:
    arguments = good("sparse_attention paged", cuda)
    arguments[argument] = arguments[argument].cpu()
    refuse("sparse_attention paged", arguments, rf"\b{argument}\b.* cpu.*cuda")


@pytest.mark.parametrize("name", ["select_bands packed", "select_grid packed", "select_grid"])
def test_too_many_key_blocks_are_refused(name: str, cuda: str) -> None:
    arguments = good(name, cuda)
    if "max_seqlen_k" in arguments:
        arguments["max_seqlen_k"] = 16385 * 64
    else:
        arguments["k"] = arguments["k"][:, :, :1].expand(-1, -1, 16385 * 64, -1)
    refuse(name, arguments, "(k|max_seqlen_k) has 16385 blocks.*16384")


def test_rules_of_more_than_128_heads_may_not_differ(device: str) -> None:
    q = activation(device, 130, 5)
    with pytest.raises(RuntimeError, match="top_p differs between 130 query heads.*128"):
        torch.ops.prism.select_grid(q, q, [0.5] * 129 + [0.6])
    torch.ops.prism.select_grid(q, q, [0.5] * 130)
