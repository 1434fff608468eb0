"""The functions for ragged batches, and merge_attention."""

from __future__ import annotations

import math

import pytest
import torch

import prism_cuda


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = q.double() @ k.double().transpose(-1, -2)
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)


def test_merged_parts_are_the_whole() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 8), torch.randn(2, 30, 8), torch.randn(2, 30, 8)
    parts = [attention(q, k[:, rows], v[:, rows]) for rows in (slice(0, 11), slice(11, 30))]
    out, lse = prism_cuda.merge_attention(*parts[0], *parts[1])
    want, want_lse = attention(q, k, v)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


def test_a_part_without_keys_changes_nothing() -> None:
    out, lse = torch.randn(3, 4), torch.randn(3)
    empty = torch.full((3,), -math.inf)
    for merged in (
        prism_cuda.merge_attention(out, lse, torch.full_like(out, math.nan), empty),
        prism_cuda.merge_attention(torch.full_like(out, math.nan), empty, out, lse),
    ):
        torch.testing.assert_close(merged[0], out)
        torch.testing.assert_close(merged[1], lse)
    nothing = prism_cuda.merge_attention(torch.zeros(3, 4), empty, torch.zeros(3, 4), empty)
    assert (nothing[0] == 0).all()
    assert (nothing[1] == -math.inf).all()


def test_merge_keeps_dtypes_and_refuses_other_shapes() -> None:
    out, lse = torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(3)
    merged, merged_lse = prism_cuda.merge_attention(out, lse, out, lse)
    assert merged.dtype == torch.bfloat16
    assert merged_lse.dtype == torch.float32
    for wrong in ((out, lse, out[:2], lse), (out, lse[:2], out, lse), (out, lse, out, lse[None])):
        with pytest.raises(ValueError, match="merge_attention.*shapes"):
            prism_cuda.merge_attention(*wrong)


def test_varlen_wrapper_passes_everything_on() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(200, 4, 64), torch.randn(230, 2, 64), torch.randn(230, 2, 64)
    mask = prism_cuda.BlockMask.full(1, 4, 200, 230, q_block_size=64, k_block_size=64)
    sinks = torch.randn(4)
    out, lse = prism_cuda.sparse_attention_varlen(
        q,
        k,
        v,
        mask.bits,
        mask.counts,
        cu_seqlens_q=torch.tensor([0, 200], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, 230], dtype=torch.int32),
        max_seqlen_q=200,
        max_seqlen_k=230,
        scale=0.3,
        block_size=(64, 64),
        sinks=sinks,
        return_lse=True,
    )
    want, want_lse = prism_cuda.sparse_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), mask, scale=0.3, sinks=sinks, return_lse=True
    )
    assert torch.equal(out, want[0].transpose(0, 1))
    assert torch.equal(lse, want_lse[0])
