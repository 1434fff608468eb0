"""What the ops that estimate ragged batches have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import oracle
from helpers.ragged import LENGTHS, RaggedCase, ragged_inputs
from helpers.ragged_estimation import BLOCKS, GRID, Estimation

import prism_cuda  # noqa: F401  registers the ops

every_estimation = pytest.mark.parametrize("estimation", [BLOCKS, GRID], ids=lambda e: e.name)


@every_estimation
def test_no_sequence_and_no_row(estimation: Estimation, device: str) -> None:
    for lengths in (((0, 3), (0, 0)), ((3, 0), (130, 0))):
        estimation.check(ragged_inputs(RaggedCase("nothing", lengths), torch.bfloat16, device))
    arguments = estimation.arguments_of(ragged_inputs(RaggedCase("none"), torch.bfloat16, device))
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        arguments[name] = arguments[name][:1]
    bits, counts = estimation.run(arguments)
    assert bits.shape == (0, 4, 2, 1)
    assert counts.shape == (0, 4, 2)


@every_estimation
@pytest.mark.parametrize("page_size", [None, 16])
def test_sequences_do_not_see_each_other(
    estimation: Estimation, device: str, page_size: int | None
) -> None:
    case = ragged_inputs(RaggedCase("nan", page_size=page_size), torch.bfloat16, device)
    arguments = estimation.arguments_of(case)
    before = estimation.run(arguments)
    victim = 3
    case.q[case.rows()[victim]] = torch.nan
    if page_size is None and estimation is GRID:
        first_key = sum(k_len for _, k_len in LENGTHS[:victim])
        case.k[first_key : first_key + LENGTHS[victim][1]] = torch.nan
    others = [b for b in range(len(LENGTHS)) if b != victim]
    for got, want in zip(estimation.run(arguments), before, strict=True):
        assert torch.equal(got[others], want[others])


@every_estimation
def test_wrong_lengths_and_pages_stay_within_the_tensors(estimation: Estimation, cuda: str) -> None:
    packed = estimation.arguments_of(ragged_inputs(RaggedCase("packed"), torch.bfloat16, cuda))
    packed["cu_seqlens_q"][-1] = 1 << 30
    packed["cu_seqlens_k"][-1] = 1 << 30
    packed["cu_seqlens_k"][2] = -5
    paged = estimation.arguments_of(
        ragged_inputs(RaggedCase("paged", page_size=16), torch.bfloat16, cuda)
    )
    paged["block_table"][:, 0] = 1 << 30
    paged["block_table"][:, 1] = -7
    paged["seqused_k"][0] = 1 << 30
    paged["seqused_k"][1] = -1
    for arguments in (packed, paged):
        bits, counts = estimation.run(arguments)
        set_bits = oracle.unpack_bits(bits, 3).sum(-1)
        assert torch.equal(set_bits.cpu(), counts.cpu().long())


@every_estimation
def test_lengths_are_read_on_the_device(estimation: Estimation, cuda: str) -> None:
    """A captured graph follows lengths and pages that change afterwards."""
    case = ragged_inputs(RaggedCase("graph", page_size=16, head_dim=128), torch.bfloat16, cuda)
    arguments = estimation.arguments_of(case)
    estimation.run(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bits, counts = estimation.op(arguments)
    other = ragged_inputs(
        RaggedCase("other", LENGTHS[::-1], page_size=16, head_dim=128), torch.bfloat16, cuda, seed=7
    )
    for name in ("q", "k"):
        getattr(case, name).copy_(getattr(other, name))
    for name in ("cu_seqlens_q", "seqused_k", "block_table"):
        case.tensors[name].copy_(other.tensors[name])
    graph.replay()
    want = estimation.run(estimation.arguments_of(other))
    assert torch.equal(bits, want[0])
    assert torch.equal(counts, want[1])


Wrong = tuple[str, Callable[[Any], Any], str]
WRONG: tuple[Wrong, ...] = (
    ("q", lambda x: x[..., :48], "head_dim"),
    ("q", lambda x: x[..., :60], "head_dim.*multiples of 8 up to 256"),
    ("q", lambda x: x.half(), r"\bk\b.*dtype"),
    ("q", lambda x: x[0], r"\bq\b"),
    ("q", lambda x: x[:, :3], r"\bq\b.*3.*\bk\b.*2"),
    ("k", lambda x: x[0], r"\bk\b"),
    ("cu_seqlens_q", lambda x: x.long(), "cu_seqlens_q"),
    ("cu_seqlens_k", lambda x: x[1:], "cu_seqlens_k"),
    ("cu_seqlens_k", lambda _: None, "cu_seqlens_k"),
    ("seqused_k", lambda x: x[1:], "seqused_k"),
    ("max_seqlen_q", lambda _: -1, "max_seqlen_q"),
    ("max_seqlen_k", lambda _: 1 << 30, "max_seqlen_k"),
    ("top_p", lambda _: 1.5, "top_p"),
    ("keep_sink", lambda _: -1, "keep_sink"),
    ("keep_recent", lambda _: -1, "keep_recent"),
    ("keep_above", lambda _: 0.0, "keep_above"),
    ("q_block_size", lambda _: 32, "block_size"),
)
WRONG_BANDS: tuple[Wrong, ...] = (
    ("high_band", lambda _: [0, 65], "high_band"),
    ("low_band", lambda _: [3, 2], "low_band"),
)


@pytest.mark.parametrize(
    ("estimation", "argument", "change", "pattern"),
    [(estimation, *wrong) for estimation in (BLOCKS, GRID) for wrong in WRONG]
    + [(BLOCKS, *wrong) for wrong in WRONG_BANDS]
    + [(GRID, "scale", lambda _: 0.0, "scale")],
)
def test_wrong_call_is_refused_by_name(
    estimation: Estimation, argument: str, change: Callable[[Any], Any], pattern: str, device: str
) -> None:
    case = RaggedCase("wrong", ((5, 9), (130, 200)), unused=2)
    arguments = estimation.arguments_of(ragged_inputs(case, torch.bfloat16, device))
    arguments[argument] = change(arguments[argument])
    estimation.refuse(arguments, pattern)


@every_estimation
def test_pages_without_lengths_are_refused(estimation: Estimation, device: str) -> None:
    case = ragged_inputs(RaggedCase("paged", ((5, 9),), page_size=16), torch.bfloat16, device)
    estimation.refuse(estimation.arguments_of(case) | {"seqused_k": None}, "seqused_k")
    estimation.refuse(estimation.arguments_of(case) | {"max_seqlen_k": 1 << 20}, "max_seqlen_k")


@every_estimation
def test_too_many_key_blocks_are_refused(estimation: Estimation, cuda: str) -> None:
    case = ragged_inputs(RaggedCase("long", ((5, 9),)), torch.bfloat16, cuda)
    estimation.refuse(
        estimation.arguments_of(case) | {"max_seqlen_k": 16385 * 128}, "max_seqlen_k.*16384"
    )
