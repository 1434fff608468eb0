"""Every wrong call of prism::sparse_attention_varlen is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.ragged import RaggedCase, ragged_inputs

import prism_cuda  # noqa: F401  registers the ops

Change = Callable[[Any], Any]

CASES = {
    "packed": RaggedCase("packed", lengths=((5, 9), (130, 200)), blocks=(64, 64), unused=2),
    "paged": RaggedCase("paged", lengths=((5, 9), (130, 200)), blocks=(64, 64), page_size=16),
}


def good(kind: str, device: str) -> dict[str, Any]:
    """4 query heads, 2 kv heads, head_dim 64; 2 sequences; 3 blocks of queries, 4 of keys."""
    arguments = ragged_inputs(CASES[kind], torch.bfloat16, device).op_arguments()
    return arguments | {"sinks": torch.zeros(4, device=device)}


def to(value: Any) -> Change:
    return lambda _: value


def last_stride_2(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


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
WRONG: list[tuple[str, str, str, Change, str]] = []
for _kind in CASES:
    for _name in ("q", "k", "v"):
        WRONG += [(_kind, _name, what, change, rf"\b{_name}\b") for what, change in HEADS]
        WRONG += [
            (_kind, _name, "other dtype", lambda x: x.half(), rf"\b[{_name}k]\b.* dtype"),
            (_kind, _name, "other head_dim", lambda x: torch.cat([x, x], -1), "head_dim"),
        ]
    WRONG += [
        (_kind, "q", "3 heads for 2", lambda x: x[:, :3], r"\bq\b.*3.*\bk\b.*2"),
        (_kind, "v", "1 head", lambda x: x[..., :1, :], r"\bv\b.*k's shape"),
        (_kind, "v", "a row less", lambda x: x[1:], r"\bv\b.*k's shape"),
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
WRONG += [("packed", "cu_seqlens_k", what, change, "cu_seqlens_k") for what, change in LENGTHS]
WRONG += [
    ("packed", "cu_seqlens_k", "None", to(None), "cu_seqlens_k"),
    ("paged", "cu_seqlens_k", "given", to(torch.zeros(3).int()), "cu_seqlens_k.*block_table"),
    ("paged", "seqused_k", "None", to(None), "seqused_k"),
    ("paged", "block_table", "None", to(None), "block_table"),
    ("paged", "block_table", "int64", lambda x: x.long(), "block_table"),
    ("paged", "block_table", "1 dimension", lambda x: x[0], "block_table"),
    ("paged", "block_table", "other batch", lambda x: x[:1], "block_table"),
    ("paged", "block_table", "last stride 2", last_stride_2, "block_table"),
    ("paged", "block_table", "too few pages", lambda x: x[:, :12].contiguous(), "max_seqlen_k"),
]


def refuse(arguments: dict[str, Any], pattern: str) -> None:
    with pytest.raises(RuntimeError, match=rf"prism::sparse_attention_varlen\b.*(?:{pattern})"):
        torch.ops.prism.sparse_attention_varlen(**arguments)


@pytest.mark.parametrize("kind", CASES)
def test_the_right_call_is_accepted(kind: str, device: str) -> None:
    torch.ops.prism.sparse_attention_varlen(**good(kind, device))


@pytest.mark.parametrize(
    ("kind", "argument", "change", "pattern"),
    [
        pytest.param(kind, argument, change, pattern, id=f"{kind}-{argument}-{what}")
        for kind, argument, what, change, pattern in WRONG
    ],
)
def test_wrong_call_is_refused_by_name(
    kind: str, argument: str, change: Change, pattern: str, device: str
) -> None:
    arguments = good(kind, device)
    arguments[argument] = change(arguments[argument])
    refuse(arguments, pattern)


@pytest.mark.parametrize("size", [3, 24, 512])
def test_page_sizes_that_are_no_power_of_two_up_to_256(device: str, size: int) -> None:
    arguments = good("paged", device)
    for name in ("k", "v"):
        arguments[name] = torch.zeros(5, size, 2, 64, dtype=torch.bfloat16, device=device)
    arguments["block_table"] = torch.zeros(2, 200, dtype=torch.int32, device=device)
    refuse(arguments, "page size")


@pytest.mark.parametrize(
    "argument",
    ["k", "v", "bits", "counts", "cu_seqlens_q", "seqused_k", "block_table", "sinks"],
)
def test_tensors_of_two_devices_are_refused(argument: str, cuda: str) -> None:
    arguments = good("paged", cuda)
    arguments[argument] = arguments[argument].cpu()
    refuse(arguments, rf"\b{argument}\b.* cpu.*cuda")
