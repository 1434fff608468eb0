"""prism::sparse_attention of ragged batches beyond the table of cases: lengths, pages and sinks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import fp8, oracle
from helpers.attention import check
from helpers.build import attention_inputs
from helpers.cases import B128, B128_64, AttentionCase
from helpers.compare import assert_same, check_attention
from helpers.params import needs_cuda
from helpers.ragged import LENGTHS, RaggedCase, add_sinks, ragged_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

import prism_cuda  # noqa: F401  registers the ops


@pytest.mark.parametrize("blocks", [B128, B128_64])
@pytest.mark.parametrize("page_size", [None, 16, 256])
def test_equal_lengths_give_what_a_batch_gives(
    device: str, blocks: tuple[int, int], page_size: int | None
) -> None:
    batch = attention_inputs(
        AttentionCase("batch", 200, 256, batch=3, q_heads=4, head_dim=128, blocks=blocks),
        torch.bfloat16,
        device,
    )
    out, lse = batch.run()
    ends = torch.arange(4, device=device, dtype=torch.int32)
    k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (batch.k, batch.v))
    where: dict[str, torch.Tensor | None]
    if page_size is None:
        where = {"cu_seqlens_k": ends * 256, "seqused_k": None, "block_table": None}
    else:
        pages = 256 // page_size
        table = torch.arange(3 * pages, device=device, dtype=torch.int32).view(3, pages)
        used = torch.full((3,), 256, device=device, dtype=torch.int32)
        where = {"cu_seqlens_k": None, "seqused_k": used, "block_table": table}
        k, v = (x.unflatten(0, (-1, page_size)) for x in (k, v))
    packed, packed_lse = torch.ops.prism.sparse_attention(
        batch.q.transpose(1, 2).flatten(0, 1),
        k,
        v,
        batch.bits,
        batch.counts,
        cu_seqlens_q=ends * 200,
        **where,
        max_seqlen_q=200,
        max_seqlen_k=256,
        **batch.settings,
    )
    assert torch.equal(packed.unflatten(0, (3, 200)).transpose(1, 2), out)
    assert torch.equal(packed_lse.unflatten(1, (3, 200)).transpose(0, 1), lse)


@pytest.mark.parametrize("page_size", [None, 16, 64])
def test_sequences_do_not_see_each_other(device: str, page_size: int | None) -> None:
    case = ragged_inputs(RaggedCase("nan", page_size=page_size), torch.bfloat16, device)
    before = case.run()
    victim = 3
    rows = case.rows()[victim]
    case.q[rows] = torch.nan
    for x in (case.k, case.v):
        if page_size is None:
            ends = case.tensors["cu_seqlens_k"].tolist()
            x[ends[victim] : ends[victim + 1]] = torch.nan
        else:
            pages = oracle.ceil_div(LENGTHS[victim][1], page_size)
            x[case.tensors["block_table"][victim, :pages].long()] = torch.nan
    after = case.run()
    others = torch.ones(len(case.q), dtype=torch.bool, device=device)
    others[rows] = False
    assert torch.equal(after[0][others], before[0][others])
    assert torch.equal(after[1][:, others], before[1][:, others])
    assert torch.isnan(after[0][rows]).any()


def test_rows_of_no_sequence_are_left_alone(cuda: str) -> None:
    case = ragged_inputs(RaggedCase("gap", head_dim=128), torch.bfloat16, cuda)
    out, lse = case.run()
    total = len(case.q)
    case.q = torch.cat([torch.full_like(case.q[:70], torch.nan), case.q, case.q[:300]])
    case.tensors["cu_seqlens_q"] = case.tensors["cu_seqlens_q"] + 70
    padded, padded_lse = case.run()
    inside = slice(70, 70 + total)
    assert torch.equal(padded[inside], out)
    assert torch.equal(padded_lse[:, inside], lse)
    outside = torch.ones(len(padded), dtype=torch.bool, device=cuda)
    outside[inside] = False
    assert torch.isnan(padded[outside]).all()  # the poison
    assert torch.isnan(padded_lse[:, outside]).all()


@pytest.mark.parametrize("page_size", [None, 16])
def test_what_exceeds_the_longest_lengths_is_left_out(device: str, page_size: int | None) -> None:
    """Of queries and of keys, as if the sequences ended there."""
    case = ragged_inputs(
        RaggedCase("long", ((300, 500), (70, 90)), page_size=page_size, mask="full"),
        torch.bfloat16,
        device,
    )
    case.tensors |= {"max_seqlen_q": 200, "max_seqlen_k": 333}
    case.mask = case.mask[:, :, :2, :3]
    out, lse = case.run()
    one = (case.q[:200].transpose(0, 1)[None], case.keys[0][None, :, :333])
    masks = (case.mask[:1], case.values[0][None, :, :333])
    bits, counts = oracle.pack_bits(masks[0])
    want, want_lse = torch.ops.prism.sparse_attention(*one, masks[1], bits, counts, **case.settings)
    assert torch.equal(out[:200], want[0].transpose(0, 1))
    assert torch.equal(lse[:, :200], want_lse[0])


def test_a_length_beyond_the_tensor_is_no_wild_read(device: str) -> None:
    case = ragged_inputs(RaggedCase("long", head_dim=128, mask="full"), torch.bfloat16, device)
    case.tensors["max_seqlen_k"] = 100
    case.tensors["cu_seqlens_k"][-1] = 1 << 30
    case.mask = case.mask[..., :1]
    out, lse = case.run()
    assert torch.isfinite(out).all()
    assert not torch.isnan(lse).any()


def test_pages_that_are_not_there_read_as_zeros(device: str) -> None:
    case = ragged_inputs(
        RaggedCase("zeros", ((130, 300), (70, 200)), head_dim=128, page_size=16, mask="full"),
        torch.bfloat16,
        device,
    )
    table = case.tensors["block_table"]
    pages = table[0].tolist()
    table[0, 3], table[0, 5] = -7, len(case.k)
    got = case.run()
    table[0, 3], table[0, 5] = pages[3], pages[5]
    for pool in (case.k, case.v):
        pool[[pages[3], pages[5]]] = 0
    assert_same(got, case.run())


def test_no_sequence_and_no_row(device: str) -> None:
    none = ragged_inputs(RaggedCase("no_row", lengths=((0, 3), (0, 0))), torch.bfloat16, device)
    out, lse = none.run()
    assert out.shape == (0, 4, 64)
    assert lse.shape == (4, 0)
    no_key = ragged_inputs(RaggedCase("no_key", lengths=((3, 0), (130, 0))), torch.bfloat16, device)
    out, lse = no_key.run()
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("estimator", ["grid", "bands", "all"])
def test_a_table_without_pages_has_no_keys(estimator: str, device: str) -> None:
    """It has no address either, which must not make the batch a packed one."""
    q = torch.randn(7, 2, 64, dtype=torch.bfloat16, device=device)
    pool = torch.randn(3, 16, 1, 64, dtype=torch.bfloat16, device=device)
    out, lse, bits, counts = torch.ops.prism.prefill(
        q,
        pool,
        pool,
        estimator,
        [0, 32] if estimator == "bands" else [],
        [32, 64] if estimator == "bands" else [],
        [0.5],
        cu_seqlens_q=torch.tensor([0, 3, 7], dtype=torch.int32, device=device),
        seqused_k=torch.tensor([5, 0], dtype=torch.int32, device=device),
        block_table=torch.empty(2, 0, dtype=torch.int32, device=device),
        max_seqlen_q=4,
        max_seqlen_k=0,
        dense_below=1,
    )
    assert (out == 0).all() and (lse == -math.inf).all()
    assert bits.shape == (2, 2, 1, 0) and (counts == 0).all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_sinks_of_a_batch_match_float64(device: str, head_dim: int) -> None:
    batch = attention_inputs(
        AttentionCase("sinks", 300, 333, batch=2, q_heads=4, head_dim=head_dim, blocks=B128_64,
                      mask="one_row_empty"),
        torch.bfloat16,
        device,
    )  # fmt: skip
    sinks = torch.tensor([-60.0, 0.5, 4.0, 60.0], device=device)
    check_attention(*batch.run(sinks=sinks), *add_sinks(*batch.expected(), sinks))
    none = torch.full_like(sinks, -math.inf)
    assert_same(batch.run(sinks=none), batch.run())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 400)), min_size=1, max_size=5),
    page_size=st.sampled_from([None, 1, 8, 16, 32, 64, 128, 256]),
    head_dim=st.sampled_from([64, 128, 256]),
    blocks=st.sampled_from([(64, 64), (128, 64), (128, 128)]),
    causal=st.booleans(),
    mask=st.sampled_from(["full", "random", "alternating_empty", "first_only"]),
    shared=st.booleans(),
)
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, fp8.FP8], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_any_batch_matches_float64(
    on: str,
    kv_dtype: torch.dtype,
    lengths: list[tuple[int, int]],
    page_size: int | None,
    head_dim: int,
    blocks: tuple[int, int],
    causal: bool,
    mask: str,
    shared: bool,
) -> None:
    if on == "cuda":
        needs_cuda()
    case = RaggedCase(
        "drawn", tuple(lengths), q_heads=4, kv_heads=2, head_dim=head_dim, blocks=blocks,
        causal=causal, page_size=page_size, mask=mask, shared=shared and page_size is not None,
    )  # fmt: skip
    check(ragged_inputs(case, torch.bfloat16, on, kv_dtype=kv_dtype))


def test_long_sequences_match_float64(cuda: str) -> None:
    case = RaggedCase(
        "long", ((3000, 4111), (1, 5000), (2049, 2049), (0, 1)), head_dim=128, q_heads=8
    )
    for page_size in (None, 16, 128):
        check(ragged_inputs(replace(case, page_size=page_size), torch.bfloat16, cuda))


def test_lengths_are_read_on_the_device(cuda: str) -> None:
    """A captured graph follows lengths and pages that change afterwards."""
    case = ragged_inputs(
        RaggedCase("graph", page_size=16, head_dim=128, mask="full"), torch.bfloat16, cuda
    )
    case.run()
    arguments = case.op_arguments()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = torch.ops.prism.sparse_attention(**arguments)
    other = ragged_inputs(
        RaggedCase("other", lengths=LENGTHS[::-1], page_size=16, head_dim=128, mask="full"),
        torch.bfloat16,
        cuda,
        seed=7,
    )
    assert other.k.shape == case.k.shape
    for name in ("q", "k", "v"):
        getattr(case, name).copy_(getattr(other, name))
    for name in ("cu_seqlens_q", "seqused_k", "block_table"):
        case.tensors[name].copy_(other.tensors[name])
    graph.replay()
    want = other.run()
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])
