"""The public functions on tensors: (batch, heads, length, head_dim), and ragged batches."""

from __future__ import annotations

from typing import Any

import torch

from prism_cuda import estimators, ops
from prism_cuda.batch import Batch
from prism_cuda.block_mask import BlockMask
from prism_cuda.config import PrismConfig, as_config
from prism_cuda.options import ScoreOptions, score_options
from prism_cuda.plan import (
    FP8,
    Plan,
    check,
    check_settings,
    computed,
    plan,
    plan_of_shape,
)
from prism_cuda.run import mask_of, run

Dispatch = Plan


def dispatch(
    q_len: int,
    k_len: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    config: PrismConfig | None = None,
    *,
    sinks: bool = False,
    softcap: float | None = None,
    window_left: int | None = None,
) -> Plan:
    """Say how :func:`prefill` would run a call, without running it.

    Args:
        dtype: what attention computes in: under autocast its dtype.
        sinks: whether the call has sinks; softcap, window_left: as :func:`prefill` takes them.
    """
    config = as_config("dispatch", config)
    options = ScoreOptions(softcap=softcap, window_left=window_left)
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        # Plans are remembered by their device, and the current one changes.
        device = torch.device("cuda", torch.cuda.current_device())
    return plan_of_shape(q_len, k_len, head_dim, dtype, device, config, options, sinks)


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    config: PrismConfig | None = None,
    scale: float | None = None,
    causal: bool = True,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    window_left: int | None = None,
    return_lse: bool = False,
    return_mask: bool = False,
) -> Any:
    """Attention that estimates which blocks matter and computes only those.

    Args:
        q: (B, Hq, q_len, D), already rotated; bf16 or fp16 (float32 too on CPU), D a
            multiple of 8 up to 256 (128 where the config asks for the grid).
        k, v: (B, Hkv, k_len, D) with Hq a multiple of Hkv. Any strides whose last is 1.
        config: settings; what it rules out (short sequences, other dtypes or head sizes) runs as
            dense attention, see :func:`dispatch`.
        scale: softmax scale; D ** -0.5 if None.
        causal: row i sees keys up to i + (k_len - q_len).
        sinks: float32 (Hq,), a logit per head that joins the softmax denominator without a value
            (attention sinks); lse includes it. Selection does not look at it.
        softcap: scaled scores become softcap * tanh(score / softcap), in attention; selection
            ranks blocks by scores without the cap.
        window_left: a row sees only so many keys before its own position (a sliding window of
            window_left + 1 tokens). Where that hides any key nothing is estimated: every block in
            the window is kept and the result is exact, at any D that is a multiple of 8 up to 256.
        return_lse: also return float32 (B, Hq, q_len), the log of the softmax denominator.
        return_mask: also return the :class:`BlockMask` that was computed.

    Returns:
        out like q, or (out[, lse][, mask]). A row that sees no key gets out 0 and lse -inf (its
        sink, where there are sinks).

    Raises:
        ImportError: if the ops library is not built.
        RuntimeError: if the tensors do not fit each other, or if lse, sinks, softcap or a window
            are asked of a dtype or head size without a kernel.
        ValueError: if k is float8, which :func:`prefill_varlen` takes.
    """
    config = as_config("prefill", config)
    options = score_options(sinks, softcap, window_left)
    q, k, v = computed(q, k, v)
    check("prefill", q, k, v, scale, options, causal)
    check_settings(config, q.shape[1], q.shape[3], False)
    chosen = plan(q, k, v, config, options, needs_lse=return_lse)
    result = run(chosen, q, k, v, config, options, scale=scale, causal=causal)
    if not (return_lse or return_mask):
        return result[0]
    extras: list[object] = [result[1]] if return_lse else []
    if return_mask:
        by_torch = result[2] is None
        full = _full_mask(q, k, config, causal) if by_torch else None
        extras.append(full or mask_of(result, q.shape[2], k.shape[2], config, causal))
    return (result[0], *extras)


def _full_mask(q: torch.Tensor, k: torch.Tensor, config: PrismConfig, causal: bool) -> BlockMask:
    q_block_size, k_block_size = config.block_sizes
    return BlockMask.full(
        q.shape[0],
        q.shape[1],
        q.shape[2],
        k.shape[2],
        q_block_size=q_block_size,
        k_block_size=k_block_size,
        causal=causal,
        device=q.device,
    )


def select_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    config: PrismConfig | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> BlockMask:
    """Estimate which key blocks every query block needs; never falls back to dense.

    Args and errors as in :func:`prefill`. Only the grid estimator uses ``scale``.
    """
    config = as_config("select_blocks", config)
    q, k, _ = computed(q, k, k)
    check("select_blocks", q, k, k, scale, causal=causal)
    ops.load()
    estimator = estimators.get(config.estimator_of(q.shape[-1]))
    bits, counts = estimator.select(q, k, config, scale=scale, causal=causal)
    return BlockMask(bits, counts, q.shape[2], k.shape[2], *config.block_sizes, causal)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    causal: bool | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    window_left: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention over the blocks of ``mask`` only.

    Args:
        q, k, v, scale, return_lse: as in :func:`prefill`, with D any multiple of 8 up to 256; k and
            v may also both be float8_e4m3fn.
        mask: made for q's and k's lengths, on their device.
        causal: the mask's own setting if None.
        sinks, softcap: as in :func:`prefill`.
        window_left: a row sees its own position and so many keys before it only. Blocks that no
            row of a query block sees cost nothing, whatever the mask keeps.
        k_scale, v_scale: float32 (Hkv,), contiguous: what fp8 k and v of each head are multiplied
            by, finite and above 0; None: 1. Only for fp8.

    Returns:
        out like q, or (out, lse).

    Raises:
        ImportError: if the ops library is not built.
        ValueError: if the mask was made for other lengths.
        RuntimeError: if the tensors do not fit each other.
    """
    lengths = (q.shape[-2], k.shape[-2])
    if lengths != (mask.q_len, mask.k_len):
        raise ValueError(
            f"sparse_attention: mask is for (q_len, k_len) {(mask.q_len, mask.k_len)}; "
            f"expected {lengths}, the lengths of q and k"
        )
    q, k, v = computed(q, k, v)
    ops.load()
    out, lse = ops.call(
        torch.ops.prism.sparse_attention.default,
        q,
        k,
        v,
        mask.bits,
        mask.counts,
        scale,
        mask.causal if causal is None else causal,
        mask.q_block_size,
        mask.k_block_size,
        sinks=sinks,
        softcap=softcap,
        window_left=window_left,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return (out, lse) if return_lse else out


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
    block_size: tuple[int, int] = (128, 64),
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    window_left: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
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
        sinks, softcap, window_left, k_scale, v_scale: as for :func:`sparse_attention`.
        return_lse: also return float32 (Hq, total_q), the log of the softmax denominator.

    Returns:
        out like q, or (out, lse). A row that sees no key gets out 0, and as lse its sink or -inf.
        Rows of q that belong to no sequence are left unwritten.

    Raises:
        ImportError: if the ops library is not built.
        RuntimeError: if the tensors do not fit each other. Their contents are not looked at:
            lengths and pages outside the tensors are cut, and give results without meaning.
    """
    q, k, v = computed(q, k, v)
    batch = Batch(cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, max_seqlen_q, max_seqlen_k)
    ops.load()
    out, lse = ops.call(
        torch.ops.prism.sparse_attention.default,
        q,
        k,
        v,
        bits,
        counts,
        scale,
        causal,
        *block_size,
        sinks=sinks,
        softcap=softcap,
        window_left=window_left,
        k_scale=k_scale,
        v_scale=v_scale,
        **batch.keywords(),
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
) -> Any:
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
        config: settings; heads that its estimator has no kernels for keep every block.
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
        ValueError: if the config's settings of heads do not fit them, or its estimator does not
            take float8 keys ("grid") or ragged batches (one of register_estimator).
    """
    config = as_config("prefill_varlen", config)
    options = score_options(sinks, softcap, window_left)
    batch = Batch(cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, max_seqlen_q, max_seqlen_k)
    q, k, v = computed(q, k, v)
    _check_dims("prefill_varlen", q, k, v)
    check_settings(config, q.shape[1], q.shape[2], k.dtype == FP8, True)
    chosen = plan(q, k, v, config, options, batch=batch)
    out, lse, bits, counts = run(
        chosen, q, k, v, config, options, scale=scale, causal=causal, batch=batch, k_scale=k_scale,
        v_scale=v_scale,
    )  # fmt: skip
    assert lse is not None and bits is not None and counts is not None  # of every ragged batch
    extras = ([lse] if return_lse else []) + ([bits, counts] if return_mask else [])
    return (out, *extras) if extras else out


def _check_dims(function: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """What has to be right for the batch to be planned; the ops check the rest."""
    for name, x, dims, shape in (
        ("q", q, (3,), "(total_q, Hq, D)"),
        ("k", k, (3, 4), "(total_k, Hkv, D) or (pages, page_size, Hkv, D)"),
        ("v", v, (3, 4), "(total_k, Hkv, D) or (pages, page_size, Hkv, D)"),
    ):
        if x.dim() not in dims:
            raise RuntimeError(f"{function}: {name} has shape {tuple(x.shape)}; expected {shape}")


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
