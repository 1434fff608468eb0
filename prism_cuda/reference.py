"""The algorithm in readable PyTorch: the specification, and the CPU kernels of every op.

Everything is computed in float32 (float64 for float64 inputs). Tensors are laid out (batch, heads,
length, head_dim); query head h reads key/value head h // (q_heads // kv_heads). Query row i sits at
token position i + (k_len - q_len): queries are the last q_len tokens of the keys' sequence.

These functions do not validate; the ops and the functions of :mod:`prism_cuda` do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from prism_cuda import _bits

RMS_EPS = 1e-6
CELL_TOKENS = 16  # of a cell of the grid, on both sides


def estimation_width(head_dim: int) -> int:
    """Dimensions that the kernels of estimation pad a head to."""
    return next(width for width in (64, 128, 256) if head_dim <= width)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scale_heads(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """x (B, H, N, D) times a scale (H,) of its heads."""
    return x if scale is None else x * scale[:, None, None]


def block_pool(x: torch.Tensor, block_size: int, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of every block of tokens: (B, H, L, D) -> (B, H, ceil(L / block_size), D).

    A ragged last block averages its real tokens only. The means are multiplied by scale (H,).
    """
    length = x.shape[2]
    blocks = -(-length // block_size)
    x = x.to(_accumulate_dtype(x.dtype))
    padded = torch.nn.functional.pad(x, (0, 0, 0, blocks * block_size - length))
    sums = padded.unflatten(2, (blocks, block_size)).sum(3)
    sizes = torch.full((blocks, 1), block_size, dtype=sums.dtype, device=x.device)
    if blocks:
        sizes[-1] = length - (blocks - 1) * block_size
    return _scale_heads(sums / sizes, scale)


def pool_append_(
    x: torch.Tensor,
    means: torch.Tensor,
    sums: torch.Tensor,
    start: int,
    block_size: int,
    scale: torch.Tensor | None = None,
) -> None:
    """Continue the block means of a growing sequence, in place, reading its new tokens only.

    However the sequence was cut, the means are the same, bit by bit.

    Args:
        x: (B, H, L, D), the tokens from position ``start`` on, which may lie within a block.
        means: float32 (B, H, N, D); blocks 0 to ceil((start + L) / block_size) - 1 are means
            afterwards, the last of them of its tokens so far.
        sums: float32 (B, H, R, D): of the unfinished block, sum r of its tokens r, r + R, ... What
            it holds where ``start`` is a multiple of block_size does not matter.
        scale: (H,), what the means are multiplied by; the sums are not.
    """
    length, residues = x.shape[2], sums.shape[2]
    if x.numel() == 0:
        return
    first, last = start // block_size, (start + length - 1) // block_size
    before = start - first * block_size
    after = (last + 1) * block_size - (start + length)
    steps = (last + 1 - first, block_size // residues, residues)
    padded = torch.nn.functional.pad(x.float(), (0, 0, before, after)).unflatten(2, steps)
    partial = padded.new_zeros((*x.shape[:2], steps[0], residues, x.shape[3]))
    if before:
        partial[:, :, 0] = sums
    for rows in padded.unbind(3):
        partial += rows
    total = torch.zeros_like(partial[:, :, :, 0])
    for part in partial.unbind(3):
        total += part
    sizes = torch.full((steps[0], 1), block_size, dtype=total.dtype, device=x.device)
    sizes[-1] = block_size - after
    means[:, :, first : last + 1] = _scale_heads(total / sizes, scale)
    if after:
        sums.copy_(partial[:, :, -1])


def band_index(band: Sequence[int], device: torch.device) -> torch.Tensor:
    """Dimensions of a band given as flattened half-open ranges [start0, end0, start1, ...]."""
    ranges = zip(band[::2], band[1::2], strict=True)
    dims = [dim for start, end in ranges for dim in range(start, end)]
    return torch.tensor(dims, dtype=torch.int64, device=device)


def _rms(means: torch.Tensor) -> torch.Tensor:
    """Root mean square over blocks and dimensions of each head: (B, H, N, D) -> (B, H)."""
    return means.square().mean((-2, -1)).sqrt()


def band_temperature(
    q_means: torch.Tensor, k_means: torch.Tensor, band: Sequence[int]
) -> torch.Tensor:
    """Temperature tau_z (B, Hq) that restores the energy pooling took from a band.

    tau_z = sqrt(d_z / d) * RMS(Q_z) / RMS(Q) * RMS(K_z) / RMS(K), where Q and K are the pooled
    tensors and z the band's dimensions.
    """
    dims = band_index(band, q_means.device)
    group = q_means.shape[1] // k_means.shape[1]
    q_ratio = _rms(q_means[..., dims]) / _rms(q_means).clamp_min(RMS_EPS)
    k_ratio = _rms(k_means[..., dims]) / _rms(k_means).clamp_min(RMS_EPS)
    width = math.sqrt(len(dims) / q_means.shape[-1])
    return width * q_ratio * k_ratio.repeat_interleave(group, dim=1)


def band_logits(q_means: torch.Tensor, k_means: torch.Tensor, band: Sequence[int]) -> torch.Tensor:
    """Calibrated block scores of one band, before any masking: (B, Hq, Nq, Nk)."""
    dims = band_index(band, q_means.device)
    kv_heads = k_means.shape[1]
    q_band = q_means[..., dims].unflatten(1, (kv_heads, -1))
    k_band = k_means[..., dims].unsqueeze(2)
    scores = (q_band @ k_band.transpose(-1, -2)).flatten(1, 2)
    temperature = band_temperature(q_means, k_means, band).clamp_min(RMS_EPS)
    return scores / (math.sqrt(len(dims)) * temperature[..., None, None])


def _block_positions(
    q_len: int, k_len: int, q_block_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last token position of every query block, each int64 (Nq, 1); may be negative."""
    first = torch.arange(0, q_len, q_block_size, device=device)
    last = (first + q_block_size).clamp_max(q_len) - 1
    return (first + k_len - q_len)[:, None], (last + k_len - q_len)[:, None]


def visible_blocks(
    q_len: int,
    k_len: int,
    causal: bool,
    q_block_size: int,
    k_block_size: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Bool (Nq, Nk): key blocks holding a token that some token of the query block may see."""
    device = torch.device(device)
    _, last = _block_positions(q_len, k_len, q_block_size, device)
    first_key = torch.arange(0, k_len, k_block_size, device=device)[None, :]
    if not causal:
        return torch.ones(last.shape[0], first_key.shape[1], dtype=torch.bool, device=device)
    return first_key <= last


def recent_blocks(
    q_len: int,
    k_len: int,
    keep_recent: int,
    q_block_size: int,
    k_block_size: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Bool (Nq, Nk): the key blocks at the query block's own tokens, and keep_recent - 1 before."""
    device = torch.device(device)
    first, last = _block_positions(q_len, k_len, q_block_size, device)
    block = torch.arange(-(-k_len // k_block_size), device=device)[None, :]
    if keep_recent < 1:
        return torch.zeros(first.shape[0], block.shape[1], dtype=torch.bool, device=device)
    first_block = torch.div(first, k_block_size, rounding_mode="floor") - (keep_recent - 1)
    last_block = torch.div(last, k_block_size, rounding_mode="floor")
    return (block >= first_block) & (block <= last_block)


def probable_blocks(
    logits: torch.Tensor, visible: torch.Tensor, top_p: float, keep_above: float | None = None
) -> torch.Tensor:
    """:func:`top_p_blocks` of the softmax of logits (..., Nq, Nk) over the visible blocks."""
    return top_p_blocks(
        logits.masked_fill(~visible, -math.inf).softmax(-1), visible, top_p, keep_above
    )


def top_p_blocks(
    probs: torch.Tensor, visible: torch.Tensor, top_p: float, keep_above: float | None = None
) -> torch.Tensor:
    """Keep the most probable visible blocks of each row until their probabilities sum to top_p.

    Blocks of a probability of at least keep_above are kept as well.

    Args:
        probs: (..., Nq, Nk). visible: bool (Nq, Nk). top_p: in [0, 1]; at 1 all visible are kept.
        keep_above: in (0, 1], or None for no such rule.

    Returns:
        bool (..., Nq, Nk). Ties go to the lower index; a row with NaN probabilities keeps every
        visible block, since nothing is known about it.
    """
    if top_p >= 1:
        return visible.expand(probs.shape).clone()
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.double()
    sum_before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, order, sum_before < top_p)
    if keep_above is not None:
        kept = kept | (probs >= keep_above)
    unknown = probs.isnan().any(-1, keepdim=True)
    return (kept | unknown) & visible


def select_blocks(
    q_means: torch.Tensor,
    k_means: torch.Tensor,
    q_len: int,
    k_len: int,
    high_band: Sequence[int],
    low_band: Sequence[int],
    top_p: float,
    keep_sink: int = 1,
    keep_recent: int = 1,
    keep_above: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the key blocks of every query block from block means.

    Args:
        q_means, k_means: (B, Hq, Nq, D) and (B, Hkv, Nk, D) from :func:`block_pool`.
        q_len, k_len: tokens behind the means.
        top_p, keep_above: what each band keeps, see :func:`probable_blocks`.
        high_band, low_band: flattened half-open dimension ranges; an empty band selects nothing.

    Returns:
        bits int32 (B, Hq, Nq, ceil(Nk / 32)) and counts int32 (B, Hq, Nq).
    """
    device = q_means.device
    visible = visible_blocks(q_len, k_len, causal, q_block_size, k_block_size, device)
    forced = recent_blocks(q_len, k_len, keep_recent, q_block_size, k_block_size, device)
    forced[:, :keep_sink] = True
    kept = (forced & visible).expand(*q_means.shape[:2], *visible.shape)
    for band in (high_band, low_band):
        if len(band):
            logits = band_logits(q_means, k_means, band)
            kept = kept | probable_blocks(logits, visible, top_p, keep_above)
    return _bits.pack(kept), kept.sum(-1, dtype=torch.int32)


def cell_statistics(k: torch.Tensor) -> torch.Tensor:
    """Mean and spread of each dimension in every cell of keys: (B, H, ceil(L / 16), 2 D).

    The spread is the standard deviation.
    """
    means = block_pool(k, CELL_TOKENS)
    # Around the mean: less of it cancels than in the mean square minus the squared mean.
    own_mean = means.repeat_interleave(CELL_TOKENS, 2)[:, :, : k.shape[2]]
    variance = block_pool((k.to(means.dtype) - own_mean).square(), CELL_TOKENS)
    return torch.cat([means, variance.sqrt()], -1)


def grid_masses(
    q: torch.Tensor,
    k_vectors: torch.Tensor,
    k_len: int,
    scale: float,
    causal: bool,
    q_block_size: int,
    k_block_size: int,
) -> torch.Tensor:
    """How much some queries of every query block need each key block, estimated on a grid.

    A cell of the grid is 16 queries by 16 keys. Its logit is that of the mean query and the mean
    key, plus sum_d |q_d| std(k_d), q the mean query and std the keys' standard deviation in the
    cell: about what the best key scores above the mean key. A softmax over the visible cells of
    each 16 queries, summed to key blocks, gives the shares of the key blocks; a block's mass is
    the largest share that any 16 queries of the query block give it, scaled to sum to 1, so that
    queries that need one block are not outvoted by their neighbours.

    Args:
        q: (B, Hq, q_len, D). k_vectors: :func:`cell_statistics` of k_len keys. scale: of the
            softmax.

    Returns:
        (B, Hq, Nq, Nk), rows summing to 1; 0 where nothing is visible, NaN where undefined.
    """
    kv_heads, q_len = k_vectors.shape[1], q.shape[2]
    q_means = block_pool(q, CELL_TOKENS)
    q_vectors = torch.cat([q_means, q_means.abs()], -1)
    grouped = q_vectors.unflatten(1, (kv_heads, q.shape[1] // kv_heads)) * scale
    logits = (grouped @ k_vectors.unsqueeze(2).mT).flatten(1, 2)
    visible = visible_blocks(q_len, k_len, causal, CELL_TOKENS, CELL_TOKENS, q.device)
    seeing = visible.any(-1, keepdim=True)
    probs = logits.masked_fill(~visible, -math.inf).softmax(-1).masked_fill(~seeing, 0)
    q_blocks, k_blocks = -(-q_len // q_block_size), -(-k_len // k_block_size)
    q_cells, k_cells = q_block_size // CELL_TOKENS, k_block_size // CELL_TOKENS
    pad_q = q_blocks * q_cells - probs.shape[2]
    pad_k = k_blocks * k_cells - probs.shape[3]
    probs = torch.nn.functional.pad(probs, (0, pad_k, 0, pad_q)).unflatten(3, (k_blocks, k_cells))
    masses = probs.sum(-1).unflatten(2, (q_blocks, q_cells)).amax(3)
    total = masses.sum(-1, keepdim=True)
    return masses / torch.where(total == 0, 1, total)


def estimate_grid(
    q: torch.Tensor,
    k: torch.Tensor,
    top_p: float,
    keep_sink: int = 1,
    keep_recent: int = 1,
    keep_above: float | None = None,
    scale: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the key blocks of every query block by their masses on a grid of cells.

    Args:
        q: (B, Hq, q_len, D). k: (B, Hkv, k_len, D). scale: of the softmax, D ** -0.5 if None.
        top_p, keep_above: keep the blocks of most mass until they hold top_p of it, and all of at
            least keep_above, see :func:`top_p_blocks`.

    Returns:
        bits int32 (B, Hq, Nq, ceil(Nk / 32)) and counts int32 (B, Hq, Nq).
    """
    rules = (top_p, keep_sink, keep_recent, keep_above, scale, causal, q_block_size, k_block_size)
    return _select_by_cells(q, cell_statistics(k), k.shape[2], *rules)


def _select_by_cells(
    q: torch.Tensor,
    k_vectors: torch.Tensor,
    k_len: int,
    top_p: float,
    keep_sink: int,
    keep_recent: int,
    keep_above: float | None,
    scale: float | None,
    causal: bool,
    q_block_size: int,
    k_block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_len = q.shape[2]
    sizes = (q_block_size, k_block_size)
    visible = visible_blocks(q_len, k_len, causal, *sizes, q.device)
    forced = recent_blocks(q_len, k_len, keep_recent, *sizes, q.device)
    forced[:, :keep_sink] = True
    masses = grid_masses(q, k_vectors, k_len, scale, causal, *sizes)
    kept = top_p_blocks(masses, visible, top_p, keep_above) | (forced & visible)
    return _bits.pack(kept), kept.sum(-1, dtype=torch.int32)


def pool_cells_(x: torch.Tensor, cells: torch.Tensor, factors: torch.Tensor, start: int) -> None:
    """Pool the cells of a growing sequence of keys, in place, from ``start`` on.

    Args:
        x: (B, H, L, D), the tokens from position ``start`` on, a multiple of 16. An unfinished cell
            has to be given again, from its beginning, once it has more tokens.
        cells: float16 (B, H, N, 2 W), W the :func:`estimation_width` of D: mean and spread of every
            cell, zeros behind the D dimensions of each, brought into float16's range by a power of
            two.
        factors: float32 (B, H, N): what a cell is to be multiplied by; NaN where it is not finite.
    """
    if x.numel() == 0:
        return
    vectors = cell_statistics(x).float()
    pad = estimation_width(x.shape[3]) - x.shape[3]
    vectors = torch.nn.functional.pad(vectors.unflatten(3, (2, -1)), (0, pad)).flatten(3)
    largest = vectors.abs().amax(-1, keepdim=True)
    finite = largest.isfinite()
    _, exponent = torch.frexp(largest.clamp_min(2.0**-100))
    inverse = torch.ldexp(torch.ones_like(largest), torch.where(finite, exponent - 14, 0))
    where = slice(start // CELL_TOKENS, start // CELL_TOKENS + vectors.shape[2])
    cells[:, :, where] = torch.where(finite, vectors / inverse, 0).to(cells.dtype)
    factors[:, :, where] = torch.where(finite, inverse, math.nan).squeeze(-1)


def select_grid(
    q: torch.Tensor,
    k_cells: torch.Tensor,
    k_factors: torch.Tensor,
    k_len: int,
    top_p: float,
    keep_sink: int = 1,
    keep_recent: int = 1,
    keep_above: float | None = None,
    scale: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`estimate_grid` with the first k_len keys' cells as :func:`pool_cells_` left them."""
    used = -(-k_len // CELL_TOKENS)
    vectors = (k_cells.float() * k_factors.unsqueeze(-1))[:, :, :used]
    vectors = vectors.unflatten(3, (2, -1))[..., : q.shape[3]].flatten(3)
    rules = (top_p, keep_sink, keep_recent, keep_above, scale, causal, q_block_size, k_block_size)
    return _select_by_cells(q, vectors, k_len, *rules)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bits: torch.Tensor,
    counts: torch.Tensor,
    scale: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    window_left: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the kept (query block, key block) pairs, causal token by token.

    Args:
        q: (B, Hq, q_len, D). k, v: (B, Hkv, k_len, D).
        bits, counts: a block mask as :func:`select_blocks` returns it. Rows whose count is 0 are
            skipped.
        scale: softmax scale, D ** -0.5 if None.
        sinks: (Hq,) logits that join the softmax denominators of their heads, without a value.
        softcap: scaled scores become softcap * tanh(score / softcap).
        window_left: a row sees its own position and so many keys before it only.
        k_scale, v_scale: (Hkv,), what the keys and values of a head are multiplied by.

    Returns:
        out like q, and lse (B, Hq, q_len), the natural logarithm of the softmax denominator, sink
        included. A row that sees nothing gets out 0, and as lse its sink or -inf.
    """
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, k_len = k.shape[1], k.shape[2]
    group = q_heads // kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    dtype = _accumulate_dtype(q.dtype)
    kept = _bits.unpack(bits, -(-k_len // k_block_size))
    token = torch.arange(k_len, device=q.device)
    k, v = k.to(dtype), v.to(dtype)
    k_scales = [1.0] * kv_heads if k_scale is None else k_scale.tolist()
    v_scales = [1.0] * kv_heads if v_scale is None else v_scale.tolist()

    out = torch.empty_like(q)
    lse = torch.empty(batch, q_heads, q_len, dtype=dtype, device=q.device)
    for b in range(batch):
        for h in range(q_heads):
            g = h // group
            k_head, v_head = k[b, g], v[b, g]
            row_counts = counts[b, h].tolist()
            for i, start in enumerate(range(0, q_len, q_block_size)):
                rows = slice(start, min(start + q_block_size, q_len))
                kept_tokens = kept[b, h, i].repeat_interleave(k_block_size)[:k_len]
                columns = token[kept_tokens]
                if row_counts[i] == 0 or not len(columns):
                    out[b, h, rows] = 0
                    lse[b, h, rows] = -math.inf if sinks is None else sinks[h]
                    continue
                first = start + k_len - q_len
                block_out, block_lse = _attend(
                    q[b, h, rows].to(dtype) * (scale * k_scales[g]),
                    k_head.index_select(0, columns),
                    v_head.index_select(0, columns),
                    columns,
                    first,
                    causal,
                    softcap,
                    window_left,
                )
                if sinks is not None:
                    block_out, block_lse = _add_sink(block_out, block_lse, sinks[h].to(dtype))
                out[b, h, rows] = (block_out * v_scales[g]).to(q.dtype)
                lse[b, h, rows] = block_lse
    return out, lse


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    columns: torch.Tensor,
    first_position: int,
    causal: bool,
    softcap: float | None,
    window_left: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query block, q (M, D) already scaled, to the gathered keys (N, D).

    columns (N,) are the keys' positions, ascending; first_position is that of q's first row.
    """
    scores = q @ k.T
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    position = first_position + torch.arange(q.shape[0], device=q.device)
    if causal:
        # Keys up to the block's first position are visible to all its rows.
        free = int(torch.searchsorted(columns, first_position, right=True))
        scores[:, free:].masked_fill_(columns[free:] > position[:, None], -math.inf)
    if window_left is not None:
        scores.masked_fill_(columns < position[:, None] - window_left, -math.inf)
    highest = scores.amax(-1, keepdim=True)
    shift = torch.where(highest == -math.inf, 0, highest)
    weights = scores.sub_(shift).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.where(total == 0, 0, (weights @ v) / total)
    return out, (total.log() + shift).squeeze(-1)


def _add_sink(
    out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (M, D), (M,) with one more logit in the denominator, which has no value."""
    total = torch.logaddexp(lse, sink)
    share = torch.where(lse == -math.inf, 0, (lse - total).exp())
    return out * share[:, None], total


def _rows_of_sequences(cu_seqlens: torch.Tensor) -> list[slice]:
    ends = cu_seqlens.tolist()
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def _keys_of_sequence(
    x: torch.Tensor,
    sequence: int,
    cu_seqlens_k: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> torch.Tensor:
    """(k_len, Hkv, D) of packed rows or of a pool of pages, see :func:`sparse_attention_varlen`."""
    used = None if seqused_k is None else int(seqused_k[sequence])
    if block_table is not None and used is not None:
        pages = block_table[sequence, : -(-used // x.shape[1])].long()
        return x[pages].flatten(0, 1)[:used]
    assert cu_seqlens_k is not None
    return x[_rows_of_sequences(cu_seqlens_k)[sequence]][:used]


def estimate_blocks_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    high_band: list[int],
    low_band: list[int],
    top_p: float,
    keep_sink: int = 1,
    keep_recent: int = 1,
    keep_above: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
    k_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`block_pool` and :func:`select_blocks` of every sequence of a ragged batch by itself.

    Args:
        q: (total_q, Hq, D). k: packed or in pages, see :func:`sparse_attention_varlen`.

    Returns:
        bits int32 (B, Hq, Nq, words) and counts int32 (B, Hq, Nq) for the blocks of max_seqlen_q
        and max_seqlen_k; 0 past a sequence's end.
    """
    q_blocks, k_blocks = -(-max_seqlen_q // q_block_size), -(-max_seqlen_k // k_block_size)

    def estimate(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return select_blocks(
            block_pool(queries, q_block_size),
            block_pool(keys, k_block_size, k_scale),
            queries.shape[2],
            keys.shape[2],
            high_band,
            low_band,
            top_p,
            keep_sink,
            keep_recent,
            keep_above,
            causal,
            q_block_size,
            k_block_size,
        )

    where = (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table)
    return _estimate_each(estimate, q, k, *where, q_blocks, k_blocks)


def _estimate_each(
    estimate: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    q_blocks: int,
    k_blocks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows_of = _rows_of_sequences(cu_seqlens_q)
    counts = torch.zeros(len(rows_of), q.shape[1], q_blocks, dtype=torch.int32, device=q.device)
    bits = counts.new_zeros(*counts.shape, -(-k_blocks // _bits.WORD_BITS))
    for b, rows in enumerate(rows_of):
        queries = q[rows].transpose(0, 1)[None]
        keys = _keys_of_sequence(k, b, cu_seqlens_k, seqused_k, block_table).transpose(0, 1)[None]
        of_sequence, of_sequence_counts = estimate(queries, keys)
        own_blocks, words = of_sequence.shape[2:]
        bits[b, :, :own_blocks, :words] = of_sequence[0]
        counts[b, :, :own_blocks] = of_sequence_counts[0]
    return bits, counts


def estimate_grid_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    top_p: float,
    keep_sink: int = 1,
    keep_recent: int = 1,
    keep_above: float | None = None,
    scale: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`estimate_grid` of every sequence of a ragged batch by itself.

    Args and returns as for :func:`estimate_blocks_varlen`.
    """
    rules = (top_p, keep_sink, keep_recent, keep_above, scale, causal, q_block_size, k_block_size)
    q_blocks, k_blocks = -(-max_seqlen_q // q_block_size), -(-max_seqlen_k // k_block_size)

    def estimate(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return estimate_grid(queries, keys, *rules)

    where = (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table)
    return _estimate_each(estimate, q, k, *where, q_blocks, k_blocks)


def sparse_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bits: torch.Tensor,
    counts: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    window_left: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`sparse_attention` of every sequence of a ragged batch by itself.

    Args:
        q: (total_q, Hq, D); sequence b has the rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        k, v: (total_k, Hkv, D) and cu_seqlens_k; or pools (pages, page_size, Hkv, D), where
            block_table (B, any) names the pages of each sequence in order.
        seqused_k: (B,) keys of each sequence that count; with pages its length.
        bits, counts: (B, Hq, Nq, words), (B, Hq, Nq) for max_seqlen_q and max_seqlen_k. Blocks are
            counted from the first token of each sequence.

    Returns:
        out like q, and lse (Hq, total_q). Rows of no sequence are 0 and -inf.
    """
    total_q, q_heads, _ = q.shape
    out = torch.zeros_like(q)
    lse = torch.full(
        (q_heads, total_q), -math.inf, dtype=_accumulate_dtype(q.dtype), device=q.device
    )
    for b, rows in enumerate(_rows_of_sequences(cu_seqlens_q)):
        keys, values = (
            _keys_of_sequence(x, b, cu_seqlens_k, seqused_k, block_table) for x in (k, v)
        )
        q_blocks = -(-(rows.stop - rows.start) // q_block_size)
        words = -(-len(keys) // (k_block_size * _bits.WORD_BITS))
        of_sequence, of_sequence_lse = sparse_attention(
            q[rows].transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            bits[b : b + 1, :, :q_blocks, :words],
            counts[b : b + 1, :, :q_blocks],
            scale,
            causal,
            q_block_size,
            k_block_size,
            sinks,
            softcap,
            window_left,
            k_scale,
            v_scale,
        )
        out[rows] = of_sequence[0].transpose(0, 1)
        lse[:, rows] = of_sequence_lse[0]
    return out, lse
