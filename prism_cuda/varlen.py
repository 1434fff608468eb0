"""Prefill and attention of ragged batches, packed or in pages, and of parts computed apart."""

from __future__ import annotations

import torch

from prism_cuda import _ops, ragged, selection
from prism_cuda.config import PrismConfig
from prism_cuda.functional import Scores
from prism_cuda.ragged import Sequences


def sparse_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bits: torch.Tensor,
    counts: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    block_size: tuple[int, int] = (128, 128),
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    window_left: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Block-sparse attention of sequences of different lengths, in one launch.

    Lengths and page numbers stay on the device: nothing here waits for them, and a captured CUDA
    graph follows them when they change. Query row i of a sequence sits at position
    i + (k_len - q_len) of its keys, so a chunk of queries goes with all the keys so far; chunks and
    prefixes may begin at any token.

    Args:
        q: (total_q, Hq, D) bf16 or fp16 (float32 too on CPU), all sequences one after the other;
            D a multiple of 8 up to 256. Any strides whose last is 1, as for k and v.
        k, v: packed like q, (total_k, Hkv, D) with cu_seqlens_k; or pools of pages,
            (pages, page_size, Hkv, D) with block_table, page_size a power of two up to 256. Hq is a
            multiple of Hkv. q's dtype, or both float8_e4m3fn; q and out stay as they are.
        bits: int32 (B, Hq, Nq, ceil(Nk / 32)), the kept blocks: key block 32 * w + j is bit j of
            word w. Nq and Nk are the blocks of max_seqlen_q and max_seqlen_k. Blocks are counted
            from the first token of each sequence; those past its end are not looked at.
        counts: int32 (B, Hq, Nq), the set bits of every row.
        cu_seqlens_q: int32 (B + 1), ascending from 0: the rows of q at which sequences begin, and
            the end of the last one.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's queries and keys, at most
            2 ** 30 - 256; what a sequence has beyond is left out.
        cu_seqlens_k: the same for k and v. None with pages.
        seqused_k: int32 (B,), keys of each sequence. With pages required; without them it leaves
            out the end of a sequence's rows. Rows and slots beyond are never read.
        block_table: int32 (B, any), last stride 1: the pages of each sequence in order. Sequences
            may share pages. Entries past a sequence's last page are not looked at.
        scale: softmax scale; D ** -0.5 if None.
        causal: whether a row sees no key after its position.
        block_size: (query, key) tokens per block: (128, 128), (128, 64) or (64, 64).
        sinks: float32 (Hq,), a logit per head that joins the softmax denominator without a value;
            lse includes it.
        softcap: scaled scores become softcap * tanh(score / softcap).
        window_left: a row sees its own position and so many keys before it only. Blocks that no
            row of a query block sees cost nothing, whatever the mask keeps.
        k_scale, v_scale: float32 (Hkv,), contiguous: what fp8 k and v of each head are multiplied
            by, finite and above 0; None: 1. Only for fp8.
        return_lse: also return float32 (Hq, total_q), the log of the softmax denominator.

    Returns:
        out like q, or (out, lse). A row that sees no key gets out 0, and as lse its sink or -inf.
        Rows of q that belong to no sequence are left unwritten.

    Raises:
        ImportError: if the ops library is not built.
        RuntimeError: if the tensors do not fit each other. Their contents are not looked at:
            lengths and pages outside the tensors are cut, and give results without meaning.
    """
    _ops.load()
    out, lse = _ops.call(
        torch.ops.prism.sparse_attention_varlen,
        q,
        k,
        v,
        bits,
        counts,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        block_table,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        causal,
        *block_size,
        sinks,
        softcap,
        window_left,
        k_scale,
        v_scale,
    )
    return (out, lse) if return_lse else out


def prefill_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    config: PrismConfig | None = None,
    scale: float | None = None,
    causal: bool = True,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    window_left: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: bool = False,
    return_mask: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Estimate the blocks of every sequence of a ragged batch, and attend to those.

    The host needs no lengths and nothing here waits for them: a captured CUDA graph follows lengths
    and pages. Every sequence keeps the blocks that it would keep by itself in
    :func:`prism_cuda.prefill`; those with fewer than config.dense_below keys, or fewer queries than
    one block (decode), keep every block, which is decided on the device.

    Args:
        q: (total_q, Hq, D), already rotated; bf16 or fp16 (float32 too on CPU), D a multiple
            of 8 up to 256.
        k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, k_scale, v_scale: as for
            :func:`sparse_attention_varlen`.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's queries and keys. On CUDA
            max_seqlen_k is at most 16,384 blocks. The mask's memory grows with their product.
        config: settings.
        scale: softmax scale; D ** -0.5 if None.
        causal: row i of a sequence sees keys up to i + (k_len - q_len).
        sinks, softcap: as for :func:`prism_cuda.prefill`.
        window_left: a row sees only so many keys before its own position. Where max_seqlen_k lets
            that hide any key, nothing is estimated for any sequence: every block in the window is
            kept, and the result is exact.
        return_lse: also return float32 (Hq, total_q), the log of the softmax denominator.
        return_mask: also return the kept blocks, bits and counts as
            :func:`sparse_attention_varlen` takes them with block_size=config.block_sizes; 0 past a
            sequence's end.

    Returns:
        out like q, or (out[, lse][, bits, counts]). A row that sees no key gets out 0, and as lse
        its sink or -inf. Rows of q that belong to no sequence are left unwritten.

    Raises:
        ImportError: if the ops library is not built.
        RuntimeError: if the tensors do not fit each other, as for :func:`sparse_attention_varlen`.
        ValueError: if the config's settings of heads do not fit their number.
    """
    config = config or PrismConfig()
    where = Sequences(
        cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, max_seqlen_q, max_seqlen_k
    )
    scores = Scores(sinks, softcap, window_left)
    chooser = None
    if ragged.selects(where, config, scores):
        chooser = selection.chooser_of(q.shape[-1], config, k.dtype == torch.float8_e4m3fn)
    out, lse, bits, counts = ragged.run(
        q, k, v, where, chooser, config, scale, causal, scores,
        k_scale=k_scale, v_scale=v_scale, exact_mask=return_mask,
    )  # fmt: skip
    extras = ([lse] if return_lse else []) + ([bits, counts] if return_mask else [])
    return (out, *extras) if extras else out


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to two disjoint sets of keys from attention to each of them.

    Args:
        out_a, out_b: (..., D) outputs of the same queries.
        lse_a, lse_b: (...), the logs of their softmax denominators, as the ops return them. For
            (total_q, Hq, D) outputs of :func:`sparse_attention_varlen` transpose its lse. At most
            one of them may include a sink.

    Returns:
        out in out_a's dtype, and lse in lse_a's. Where both lse are -inf out is 0.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    if out_a.shape != out_b.shape or not out_a.shape[:-1] == lse_a.shape == lse_b.shape:
        shapes = [tuple(x.shape) for x in (out_a, lse_a, out_b, lse_b)]
        raise ValueError(
            f"merge_attention: out_a, lse_a, out_b, lse_b have shapes {shapes}; expected (..., D) "
            "for both out and (...) for both lse"
        )
    lse = torch.logaddexp(lse_a, lse_b)
    base = torch.where(lse == -torch.inf, 0.0, lse)
    weight_a, weight_b = ((x - base).exp().unsqueeze(-1) for x in (lse_a, lse_b))
    # A part without keys has weight 0, whatever its output holds.
    part_a, part_b = (
        torch.where(weight == 0, 0.0, out.to(lse.dtype) * weight)
        for weight, out in ((weight_a, out_a), (weight_b, out_b))
    )
    return (part_a + part_b).to(out_a.dtype), lse
