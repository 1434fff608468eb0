"""prism::estimate_blocks_varlen against estimate_blocks of every sequence by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import oracle
from helpers.cases import B128_64
from helpers.params import case_params, device_dtype_params, needs_cuda
from helpers.poison import poisoned_allocations
from helpers.ragged import LENGTHS, RaggedCase, RaggedInputs, estimated_alone, ragged_inputs

import prism_cuda  # noqa: F401  registers the ops

# Chunks that begin inside a block, and rows of more than one mask word.
LONGER = (*LENGTHS, (77, 1500), (129, 4200), (333, 1000))
B64 = (64, 64)

CASES = {
    "packed": (
        RaggedCase("d64"),
        RaggedCase("d128", head_dim=128),
        RaggedCase("d128_longer", LONGER, head_dim=128),
        RaggedCase("b128_64", LONGER, blocks=B128_64),
        RaggedCase("b64_d128", LONGER, head_dim=128, blocks=B64),
        RaggedCase("bidirectional", LONGER, causal=False),
        RaggedCase("unused_rows", LONGER, unused=37),
        RaggedCase("slack", LONGER, slack=(700, 30000)),
        RaggedCase("odd_stride", LONGER, odd_stride=True),
        RaggedCase("one_kv_head", LONGER, q_heads=5, kv_heads=1),
        RaggedCase("many_sequences", ((3, 40), (0, 9), (17, 17)) * 23, q_heads=2),
        *(RaggedCase(f"d{n}", LONGER, head_dim=n) for n in (56, 80, 96, 192, 256)),
        RaggedCase("d96_odd_stride", LONGER, head_dim=96, odd_stride=True, blocks=B64),
        # The sums behind a temperature are cut elsewhere from 129 blocks on.
        RaggedCase("energy_chunks", ((8192, 8192), (8193, 8193), (1, 1)), 1, 1, blocks=B64),
    ),
    "paged": (
        *(RaggedCase(f"page_{n}", LONGER, page_size=n) for n in (1, 16, 64, 256)),
        RaggedCase("page_8_d128_b64", LONGER, page_size=8, head_dim=128, blocks=B64),
        RaggedCase("page_256_d128", LONGER, page_size=256, head_dim=128),
        RaggedCase("page_16_d96", LONGER, page_size=16, head_dim=96),
        RaggedCase("page_64_d256_b64", LONGER, page_size=64, head_dim=256, blocks=B64),
        RaggedCase("page_4_d192_odd_stride", LONGER, page_size=4, head_dim=192, odd_stride=True),
        RaggedCase("shared_prefix", LONGER, page_size=16, shared=True),
        RaggedCase("heads_first", LONGER, page_size=32, heads_first=True, head_dim=128),
    ),
}
SANITIZER_CASES = (
    "packed-b64_d128",
    "packed-odd_stride",
    "packed-d96",
    "paged-page_1",
    "paged-page_64_d256_b64",
    "paged-heads_first",
)
RULES: dict[str, Any] = {"top_p": 0.8, "keep_sink": 1, "keep_recent": 2, "keep_above": 0.2}


def arguments_of(case: RaggedInputs) -> dict[str, Any]:
    high, low = oracle.half_split_bands(case.q.shape[-1], 32, 48)
    where = {name: x for name, x in case.tensors.items() if name != "sinks"}
    common = {name: case.settings[name] for name in ("causal", "q_block_size", "k_block_size")}
    bands = {"high_band": high, "low_band": low}
    return {"q": case.q, "k": case.k} | where | bands | RULES | common


def run(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    with poisoned_allocations():
        return torch.ops.prism.estimate_blocks_varlen(**arguments)


def alone(case: RaggedInputs, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    settings = {
        name: x
        for name, x in arguments.items()
        if name not in case.tensors and name not in ("q", "k")
    }
    return estimated_alone(torch.ops.prism.estimate_blocks, case, settings)


def check(case: RaggedInputs, **changes: Any) -> None:
    arguments = arguments_of(case) | changes
    bits, counts = run(arguments)
    want_bits, want_counts = alone(case, arguments)
    assert torch.equal(counts.cpu(), want_counts)
    assert torch.equal(bits.cpu(), want_bits)


@pytest.mark.parametrize("case", case_params(CASES, SANITIZER_CASES))
@pytest.mark.parametrize(("on", "dtype"), device_dtype_params())
def test_a_sequence_keeps_what_it_keeps_alone(
    case: RaggedCase, on: str, dtype: torch.dtype
) -> None:
    if on == "cuda":
        needs_cuda()
    check(ragged_inputs(case, dtype, on))


@pytest.mark.parametrize(
    "rules",
    [
        {"top_p": 1.0},
        {"top_p": 0.0, "keep_above": None, "keep_sink": 0, "keep_recent": 0},
        {"top_p": 0.5, "high_band": []},
        {"top_p": 0.9, "low_band": [], "keep_sink": 3},
    ],
)
@pytest.mark.parametrize("page_size", [None, 16])
def test_rules(device: str, rules: dict[str, Any], page_size: int | None) -> None:
    case = RaggedCase("rules", LONGER, page_size=page_size, slack=(300, 300))
    check(ragged_inputs(case, torch.bfloat16, device), **rules)


@pytest.mark.parametrize("page_size", [None, 64])
@pytest.mark.parametrize("heads", [1, 16])
def test_more_than_1024_key_blocks(cuda: str, heads: int, page_size: int | None) -> None:
    lengths = ((300, 70001), (64, 64), (0, 0), (129, 3000), (1, 0), (2049, 2100))
    case = RaggedCase("long", lengths, heads, 1, blocks=B64, page_size=page_size)
    inputs = ragged_inputs(case, torch.bfloat16, cuda)
    check(inputs)
    check(inputs, top_p=1.0)


def test_no_sequence_and_no_row(device: str) -> None:
    for lengths in (((0, 3), (0, 0)), ((3, 0), (130, 0))):
        check(ragged_inputs(RaggedCase("nothing", lengths), torch.bfloat16, device))
    arguments = arguments_of(ragged_inputs(RaggedCase("none"), torch.bfloat16, device))
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        arguments[name] = arguments[name][:1]
    bits, counts = run(arguments)
    assert bits.shape == (0, 4, 2, 1)
    assert counts.shape == (0, 4, 2)


@pytest.mark.parametrize("page_size", [None, 16])
def test_sequences_do_not_see_each_other(device: str, page_size: int | None) -> None:
    case = ragged_inputs(RaggedCase("nan", page_size=page_size), torch.bfloat16, device)
    arguments = arguments_of(case)
    before = run(arguments)
    victim = 3
    case.q[case.rows()[victim]] = torch.nan
    others = [b for b in range(len(LENGTHS)) if b != victim]
    for got, want in zip(run(arguments), before, strict=True):
        assert torch.equal(got[others], want[others])


def test_wrong_lengths_and_pages_stay_within_the_tensors(cuda: str) -> None:
    packed = arguments_of(ragged_inputs(RaggedCase("packed"), torch.bfloat16, cuda))
    packed["cu_seqlens_q"][-1] = 1 << 30
    packed["cu_seqlens_k"][-1] = 1 << 30
    packed["cu_seqlens_k"][2] = -5
    paged = arguments_of(ragged_inputs(RaggedCase("paged", page_size=16), torch.bfloat16, cuda))
    paged["block_table"][:, 0] = 1 << 30
    paged["block_table"][:, 1] = -7
    paged["seqused_k"][0] = 1 << 30
    paged["seqused_k"][1] = -1
    for arguments in (packed, paged):
        bits, counts = run(arguments)
        set_bits = oracle.unpack_bits(bits, 3).sum(-1)
        assert torch.equal(set_bits.cpu(), counts.cpu().long())


def test_lengths_are_read_on_the_device(cuda: str) -> None:
    """A captured graph follows lengths and pages that change afterwards."""
    case = ragged_inputs(RaggedCase("graph", page_size=16, head_dim=128), torch.bfloat16, cuda)
    arguments = arguments_of(case)
    run(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bits, counts = torch.ops.prism.estimate_blocks_varlen(**arguments)
    other = ragged_inputs(
        RaggedCase("other", LENGTHS[::-1], page_size=16, head_dim=128), torch.bfloat16, cuda, seed=7
    )
    for name in ("q", "k"):
        getattr(case, name).copy_(getattr(other, name))
    for name in ("cu_seqlens_q", "seqused_k", "block_table"):
        case.tensors[name].copy_(other.tensors[name])
    graph.replay()
    want = run(arguments_of(other))
    assert torch.equal(bits, want[0])
    assert torch.equal(counts, want[1])


WRONG: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
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
    ("high_band", lambda _: [0, 65], "high_band"),
    ("low_band", lambda _: [3, 2], "low_band"),
    ("top_p", lambda _: 1.5, "top_p"),
    ("keep_sink", lambda _: -1, "keep_sink"),
    ("keep_recent", lambda _: -1, "keep_recent"),
    ("keep_above", lambda _: 0.0, "keep_above"),
    ("q_block_size", lambda _: 32, "block_size"),
)


def refuse(arguments: dict[str, Any], pattern: str) -> None:
    with pytest.raises(RuntimeError, match=rf"prism::estimate_blocks_varlen\b.*(?:{pattern})"):
        torch.ops.prism.estimate_blocks_varlen(**arguments)


@pytest.mark.parametrize(("argument", "change", "pattern"), WRONG)
def test_wrong_call_is_refused_by_name(
    argument: str, change: Callable[[Any], Any], pattern: str, device: str
) -> None:
    case = RaggedCase("wrong", ((5, 9), (130, 200)), unused=2)
    arguments = arguments_of(ragged_inputs(case, torch.bfloat16, device))
    arguments[argument] = change(arguments[argument])
    refuse(arguments, pattern)


def test_pages_without_lengths_are_refused(device: str) -> None:
    case = ragged_inputs(RaggedCase("paged", ((5, 9),), page_size=16), torch.bfloat16, device)
    refuse(arguments_of(case) | {"seqused_k": None}, "seqused_k")
    refuse(arguments_of(case) | {"max_seqlen_k": 1 << 20}, "max_seqlen_k")


def test_too_many_key_blocks_are_refused(cuda: str) -> None:
    case = ragged_inputs(RaggedCase("long", ((5, 9),)), torch.bfloat16, cuda)
    refuse(arguments_of(case) | {"max_seqlen_k": 16385 * 128}, "max_seqlen_k.*16384")
