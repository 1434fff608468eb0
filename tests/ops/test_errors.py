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
from helpers.params import needs_cuda
from helpers.wrong_calls import band_is_right, gpu_allocations
from hypothesis import given, settings
from hypothesis import strategies as st

import prism_cuda  # noqa: F401  registers the ops

Arguments = dict[str, Any]

BLOCKS = {"q_block_size": 64, "k_block_size": 64}
HIGH, LOW = oracle.half_split_bands(64, 32, 48)
SELECTION: Arguments = {"high_band": HIGH, "low_band": LOW, "top_p": 0.9}


def activation(device: str, heads: int, length: int = 130, **options: Any) -> torch.Tensor:
    return torch.ones(2, heads, length, 64, **{"device": device, "dtype": torch.bfloat16} | options)


def cells(device: str, prefix: str) -> Arguments:
    """Room for the cells of 224 keys of two heads."""
    return {
        prefix + "cells": torch.ones(2, 2, 14, 128, device=device, dtype=torch.half),
        prefix + "factors": torch.ones(2, 2, 14, device=device),
    }


def good(name: str, device: str) -> Arguments:
    """Arguments of a right call: 4 query heads, 2 kv heads, 130 queries, 200 keys."""
    if name == "block_pool":
        return {"x": activation(device, 2), "block_size": 64}
    if name == "pool_append_":
        return {
            "x": activation(device, 2),
            "means": activation(device, 2, 4, dtype=torch.float32),
            "sums": activation(device, 2, 16, dtype=torch.float32),
            "start": 70,
            "block_size": 64,
        }
    if name == "select_blocks":
        return {
            "q_means": activation(device, 4, 3, dtype=torch.float32),
            "k_means": activation(device, 2, 4, dtype=torch.float32),
            "q_len": 130,
            "k_len": 200,
            **SELECTION,
            **BLOCKS,
        }
    qkv = {
        "q": activation(device, 4),
        "k": activation(device, 2, 200),
        "v": activation(device, 2, 200),
    }
    if name == "prefill":
        return {**qkv, **SELECTION, **BLOCKS}
    if name == "estimate_blocks":
        return {"q": qkv["q"], "k": qkv["k"], **SELECTION, **BLOCKS}
    if name == "pool_cells_":
        return {"x": activation(device, 2), **cells(device, ""), "start": 48}
    if name == "select_grid":
        return {"q": qkv["q"], **cells(device, "k_"), "k_len": 200, "top_p": 0.9, **BLOCKS}
    if name == "estimate_grid":
        return {"q": qkv["q"], "k": qkv["k"], "top_p": 0.9, **BLOCKS}
    bits, counts = oracle.pack_bits(torch.ones(2, 4, 3, 4, dtype=torch.bool, device=device))
    return {**qkv, "bits": bits, "counts": counts, **BLOCKS}


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
    for op in ("block_pool", "pool_append_")
    for what, change in ACTIVATION
]
WRONG += [
    (op, "block_size", str(size), to(size), "block_size")
    for op in ("block_pool", "pool_append_")
    for size in (0, -64, 32, 63, 96, 256)
]
for _name in ("means", "sums"):
    WRONG += [
        ("pool_append_", _name, "bfloat16", lambda x: x.bfloat16(), _name),
        ("pool_append_", _name, "3 dimensions", lambda x: x[0], _name),
        ("pool_append_", _name, "other batch", lambda x: x[:1], _name),
        ("pool_append_", _name, "other heads", lambda x: x[:, :1], _name),
        ("pool_append_", _name, "other head_dim", lambda x: x.repeat(1, 1, 1, 2), _name),
        ("pool_append_", _name, "not contiguous", lambda x: x.mT.contiguous().mT, _name),
    ]
WRONG += [
    ("pool_append_", "means", "a block too few", lambda x: x[:, :, :3].contiguous(), "means"),
    ("pool_append_", "sums", "8 rows", lambda x: x[:, :, :8].contiguous(), "sums"),
    ("pool_append_", "start", "-1", to(-1), "start"),
    ("pool_append_", "start", "beyond the means", to(127), "means.*start"),
    ("pool_append_", "start", "beyond 64 bits", to(2**63 - 1), "means.*start"),
]
WRONG += [("pool_cells_", "x", what, change, r"\bx\b") for what, change in ACTIVATION]
WRONG += [("select_grid", "q", what, change, r"\bq\b") for what, change in ACTIVATION]
for _op, _prefix in (("pool_cells_", ""), ("select_grid", "k_")):
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
    ("select_grid", "k_len", "-1", to(-1), "k_len"),
    ("select_grid", "k_len", "225", to(225), "k_len.*14"),
    ("select_grid", "q", "3 heads for 2", lambda x: x[:, :3], r"\bq\b.*3.*k_cells.*2"),
    ("select_grid", "top_p", "1.5", to(1.5), "top_p"),
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
    WRONG += [
        ("estimate_grid", _name, what, change, rf"\b{_name}\b") for what, change in ACTIVATION
    ]
WRONG += [
    ("estimate_grid", "q", "5 heads", lambda x: x.repeat(1, 2, 1, 1)[:, :5], r"\bq\b.*5.*\bk\b.*2"),
    ("estimate_grid", "k", "other dtype", other_dtype, r"\bk\b.* dtype"),
    ("estimate_grid", "k", "other batch", lambda x: x[:1], r"\bk\b.* batch"),
]
for _op in ("estimate_grid", "sparse_attention", "prefill"):
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
for _name in ("q_means", "k_means"):
    WRONG += [
        ("select_blocks", _name, "bfloat16", lambda x: x.bfloat16(), _name),
        ("select_blocks", _name, "float64", lambda x: x.double(), _name),
        ("select_blocks", _name, "3 dimensions", lambda x: x[0], _name),
        ("select_blocks", _name, "head_dim 32", lambda x: x[..., :32], _name),
        ("select_blocks", _name, "other head_dim", lambda x: x.repeat(1, 1, 1, 2), "k_means"),
        ("select_blocks", _name, "other batch", lambda x: x[:1], "k_means"),
        ("select_blocks", _name, "a block too few", lambda x: x[:, :, :2], _name),
        ("select_blocks", _name, "last stride 2", last_stride_2, _name),
    ]
WRONG += [
    ("select_blocks", "q_means", "3 heads for 2", lambda x: x[:, :3], "q_means.*3.*k_means.*2"),
    ("select_blocks", "q_len", "128 with 3 blocks", to(128), "q_len"),
    ("select_blocks", "q_len", "193 with 3 blocks", to(193), "q_len"),
    ("select_blocks", "q_len", "-1", to(-1), "q_len"),
    ("select_blocks", "k_len", "192 with 4 blocks", to(192), "k_len"),
    ("select_blocks", "k_len", "257 with 4 blocks", to(257), "k_len"),
    ("select_blocks", "k_len", "-200", to(-200), "k_len"),
]
NINE_RANGES = [d for start in range(0, 36, 4) for d in (start, start + 2)]
for _op in ("select_blocks", "estimate_blocks", "prefill"):
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
for _op in ("select_blocks", "estimate_blocks", "estimate_grid", "prefill"):
    WRONG += [
        (_op, "top_p", str(p), to(p), "top_p") for p in (-0.01, 1.01, math.nan, math.inf, -math.inf)
    ]
    WRONG += [
        (_op, "keep_above", str(p), to(p), "keep_above")
        for p in (0.0, -0.1, 1.01, math.nan, math.inf)
    ]
    WRONG += [
        (_op, name, "negative", to(value), name)
        for name in ("keep_sink", "keep_recent")
        for value in (-1,)
    ]
for _op in ("sparse_attention", "select_blocks", "estimate_blocks", "estimate_grid", "prefill"):
    WRONG += [
        (_op, name, str(size), to(size), "block_size")
        for name in BLOCKS
        for size in (0, -64, 32, 63, 256)
    ]
    WRONG += [(_op, "k_block_size", "larger than q's", to(128), "k_block_size")]


def refuse(name: str, arguments: Arguments, pattern: str) -> None:
    """The call raises RuntimeError naming op and argument, and allocates no GPU memory."""
    before = gpu_allocations()
    with pytest.raises(RuntimeError, match=rf"prism::{name}\b.*(?:{pattern})"):
        getattr(torch.ops.prism, name)(**arguments)
    assert gpu_allocations() == before, "memory was allocated before the refusal"


@pytest.mark.parametrize(
    "name",
    [
        "block_pool",
        "pool_append_",
        "select_blocks",
        "estimate_blocks",
        "estimate_grid",
        "pool_cells_",
        "select_grid",
        "sparse_attention",
        "prefill",
    ],
)
def test_the_right_call_is_accepted(name: str, device: str) -> None:
    getattr(torch.ops.prism, name)(**good(name, device))


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


@pytest.mark.parametrize("name", ["select_blocks", "estimate_blocks", "prefill"])
def test_two_empty_bands_are_refused(name: str, device: str) -> None:
    refuse(name, good(name, device) | {"high_band": [], "low_band": []}, "high_band.*low_band")


def test_means_and_sums_in_the_same_memory_are_refused(device: str) -> None:
    arguments = good("pool_append_", device)
    arguments["means"] = arguments["sums"]
    refuse("pool_append_", arguments, "means and sums")


@pytest.mark.parametrize(
    "name",
    [
        "block_pool",
        "pool_append_",
        "estimate_blocks",
        "estimate_grid",
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
        ("estimate_blocks", "k"),
        ("estimate_grid", "k"),
        ("select_blocks", "k_means"),
        ("pool_append_", "means"),
        ("pool_append_", "sums"),
        ("pool_cells_", "cells"),
        ("pool_cells_", "factors"),
        ("select_grid", "k_cells"),
        ("select_grid", "k_factors"),
    ],
)
def test_tensors_of_two_devices_are_refused(name: str, argument: str, cuda: str) -> None:
    arguments = good(name, cuda)
    arguments[argument] = arguments[argument].cpu()
    refuse(name, arguments, rf"\b{argument}\b.* cpu.*cuda")


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("pool_append_", "means"),
        ("pool_append_", "sums"),
        ("select_blocks", "q_means"),
        ("select_blocks", "k_means"),
        ("sparse_attention", "q"),
        ("sparse_attention", "v"),
        ("sparse_attention", "bits"),
        ("sparse_attention", "counts"),
        ("prefill", "k"),
        ("estimate_blocks", "q"),
        ("estimate_blocks", "k"),
        ("estimate_grid", "q"),
        ("estimate_grid", "k"),
    ],
)
def test_missing_tensor_is_refused_by_name(name: str, argument: str, device: str) -> None:
    refuse(name, good(name, device) | {argument: None}, rf"\b{argument}\b")


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["select_blocks", "estimate_blocks", "prefill"]),
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
        getattr(torch.ops.prism, name)(**arguments)
    else:
        refuse(name, arguments, argument)
