"""The functions for ragged batches, and merge_attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.ragged import RaggedCase, ragged_inputs

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
    batch: Any = [x.transpose(0, 1)[None] for x in (q, k, v)]
    want, want_lse = prism_cuda.sparse_attention(
        *batch, mask, scale=0.3, sinks=sinks, return_lse=True
    )
    assert torch.equal(out, want[0].transpose(0, 1))
    assert torch.equal(lse, want_lse[0])


ON_CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("q_heads", [4, 6])
def test_settings_per_head_are_those_of_each_head_alone(
    device: str, q_heads: int, paged: bool
) -> None:
    case = ragged_inputs(
        RaggedCase("heads", ((300, 1500), (0, 9), (129, 700)), q_heads=q_heads,
                   page_size=16 if paged else None),
        torch.bfloat16, device,
    )  # fmt: skip
    bands = [(32, 48), "auto", (16, 64), (16, 64), "auto", "auto"][:q_heads]
    top_p = [0.6, 0.6, 0.3, 0.8, 0.6, 0.6][:q_heads]
    where = {name: x for name, x in case.tensors.items() if name != "sinks"}

    def run(**settings: Any) -> tuple[torch.Tensor, ...]:
        config = prism_cuda.PrismConfig(estimator="bands", dense_below=0, **settings)
        return prism_cuda.prefill_varlen(
            case.q, case.k, case.v, **where, config=config, return_lse=True, return_mask=True
        )

    out, lse, bits, counts = run(bands=bands, top_p=top_p)
    for head in range(q_heads):
        alone = run(bands=bands[head], top_p=top_p[head])
        assert torch.equal(bits[:, head], alone[2][:, head])
        assert torch.equal(counts[:, head], alone[3][:, head])
        assert torch.equal(out[:, head], alone[0][:, head])
        assert torch.equal(lse[head], alone[1][head])
    with pytest.raises(ValueError, match=f"bands has 3 entries; expected one .* or {q_heads}, one"):
        run(bands=bands[:3])
