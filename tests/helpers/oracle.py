"""Float64 answers to what the ops compute, written from their definitions at token level.

Nothing here calls or imports prism_cuda: a mistake there cannot be repeated here unnoticed.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROWS_AT_A_TIME = 1024


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def band_dims(band: list[int]) -> list[int]:
    """The dimensions named by flattened half-open ranges."""
    return [d for start, end in zip(band[0::2], band[1::2], strict=True) for d in range(start, end)]


def half_split_bands(head_dim: int, high: int, low: int) -> tuple[list[int], list[int]]:
    """(high_band, low_band) of the rotate-half layout, pair j = dimensions (j, j + d/2)."""
    half = head_dim // 2
    high_band = [0, high // 2, half, half + high // 2]
    low_band = [half - low // 2, half, head_dim - low // 2, head_dim]
    if high == head_dim:
        high_band = [0, head_dim]
    if low == head_dim:
        low_band = [0, head_dim]
    return high_band, low_band


def block_means(x: Tensor, block_size: int) -> Tensor:
    """Float64 mean of every block of rows; a ragged last block counts its real rows only."""
    blocks = [chunk.double().mean(dim=2) for chunk in x.split(block_size, dim=2) if chunk.shape[2]]
    if not blocks:
        return x.new_zeros((*x.shape[:2], 0, x.shape[3]), dtype=torch.float64)
    return torch.stack(blocks, dim=2)


def token_positions(q_len: int, k_len: int, device: str | torch.device = "cpu") -> Tensor:
    """Position of each query row: the last row sits at the last key."""
    return torch.arange(q_len, device=device) + (k_len - q_len)


def visible_blocks(
    q_len: int,
    k_len: int,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
    device: str | torch.device = "cpu",
) -> Tensor:
    """(Nq, Nk) bool: some token of the query block may see some token of the key block."""
    first_key = torch.arange(0, k_len, k_block_size, device=device)
    blocks = token_positions(q_len, k_len, device).split(q_block_size)
    last_position = torch.tensor(
        [block[-1] for block in blocks if len(block)], dtype=torch.int64, device=device
    )
    visible = first_key[None, :] <= last_position[:, None]
    return visible if causal else torch.ones_like(visible)


def unpack_bits(bits: Tensor, k_blocks: int) -> Tensor:
    """(..., words) int32 -> (..., k_blocks) bool, least significant bit first."""
    shifts = torch.arange(32, device=bits.device, dtype=torch.int32)
    return ((bits[..., None] >> shifts) & 1).flatten(-2).bool()[..., :k_blocks]


def pack_bits(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(..., k_blocks) bool -> int32 (bits, counts)."""
    words = ceil_div(mask.shape[-1], 32)
    padded = torch.nn.functional.pad(mask, (0, 32 * words - mask.shape[-1]))
    weights = torch.tensor([1 << j for j in range(32)], device=mask.device)
    packed = (padded.unflatten(-1, (words, 32)) * weights).sum(-1)
    signed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed)
    return signed.int(), mask.sum(-1).int()


@dataclass
class Attention:
    """Float64 attention, with what a rounding error can grow from."""

    out: Tensor  # (B, Hq, q_len, D)
    lse: Tensor  # (B, Hq, q_len)
    magnitude: Tensor  # (B, Hq, q_len, D): softmax-weighted mean of |v|
    score_terms: Tensor  # (B, Hq, q_len): largest sum of |q_i k_i| * scale over the visible keys


def _rows_and_masks(
    q: Tensor,
    k: Tensor,
    block_mask: Tensor,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
    window_left: int | None,
) -> Iterator[tuple[int, int, int, slice, Tensor]]:
    """Batch element, head, key head, some rows and which keys each of those sees."""
    batch, q_heads, q_len, _ = q.shape
    kv_heads, k_len = k.shape[1], k.shape[2]
    if k_len == 0:
        return
    keys = torch.arange(k_len, device=q.device)
    positions = token_positions(q_len, k_len, q.device)
    for b, h, start in itertools.product(
        range(batch), range(q_heads), range(0, q_len, ROWS_AT_A_TIME)
    ):
        rows = slice(start, min(start + ROWS_AT_A_TIME, q_len))
        row_block = torch.arange(rows.start, rows.stop, device=q.device) // q_block_size
        token_mask = block_mask[b, h][row_block][:, keys // k_block_size]
        if causal:
            token_mask = token_mask & (keys[None, :] <= positions[rows, None])
        if window_left is not None:
            token_mask = token_mask & (keys[None, :] + window_left >= positions[rows, None])
        yield b, h, h // (q_heads // kv_heads), rows, token_mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    *,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
    scale: float | None = None,
    softcap: float | None = None,
    window_left: int | None = None,
) -> Attention:
    """Dense attention under the token mask that `block_mask` (B, Hq, Nq, Nk) stands for."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    magnitude = torch.zeros_like(out)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64, device=q.device)
    score_terms = torch.zeros_like(lse)
    sizes = (q_block_size, k_block_size)
    for b, h, g, rows, seen in _rows_and_masks(q, k, block_mask, *sizes, causal, window_left):
        qd, kd, vd = q[b, h, rows].double(), k[b, g].double(), v[b, g].double()
        scores = qd @ kd.T * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, -math.inf)
        lse[b, h, rows] = torch.logsumexp(scores, dim=-1)
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
        out[b, h, rows] = weights @ vd
        magnitude[b, h, rows] = weights @ vd.abs()
        terms = (qd.abs() @ kd.abs().T * abs(scale)).masked_fill(~seen, 0.0)
        score_terms[b, h, rows] = terms.amax(dim=-1)
    return Attention(out, lse, magnitude, score_terms)


def low_precision_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    *,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
    scale: float | None = None,
    softcap: float | None = None,
    window_left: int | None = None,
) -> Tensor:
    """The same maths in plain PyTorch at the inputs' precision: the yardstick of the tolerance.

    PRISM_YARDSTICK_ON_CPU moves it there: compute-sanitizer's racecheck aborts in cuBLAS.
    """
    device = q.device
    if "PRISM_YARDSTICK_ON_CPU" in os.environ:
        q, k, v, block_mask = (x.cpu() for x in (q, k, v, block_mask))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    sizes = (q_block_size, k_block_size)
    for b, h, g, rows, seen in _rows_and_masks(q, k, block_mask, *sizes, causal, window_left):
        scores = (q[b, h, rows] @ k[b, g].T) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.float().masked_fill(~seen, -math.inf)
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
        out[b, h, rows] = weights.to(q.dtype) @ v[b, g]
    return out.to(device)


def attention_and_plain(*tensors: Tensor, **settings: Any) -> tuple[Attention, Tensor]:
    """Both of the above."""
    return attention(*tensors, **settings), low_precision_attention(*tensors, **settings)


@dataclass
class Selection:
    """Float64 selection, and which of its decisions lie in the band around a threshold."""

    keep: Tensor  # (B, Hq, Nq, Nk) bool
    visible: Tensor  # (Nq, Nk) bool
    forced: Tensor  # (Nq, Nk) bool: sink and recent blocks
    near_tie: Tensor  # (B, Hq, Nq, Nk) bool: either decision is within rounding


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(dim=(-2, -1), keepdim=True).sqrt()


def _clamp_min_keeping_nan(x: Tensor, low: float) -> Tensor:
    return torch.where(x < low, torch.full_like(x, low), x)


def _forced_blocks(
    q_len: int,
    k_len: int,
    q_block_size: int,
    k_block_size: int,
    keep_sink: int,
    keep_recent: int,
    device: torch.device,
) -> Tensor:
    """Sink blocks, and the key blocks under the query block's own tokens and just before."""
    key_blocks = torch.arange(ceil_div(k_len, k_block_size), device=device)
    rows = []
    for positions in token_positions(q_len, k_len, device).split(q_block_size):
        if not len(positions):
            continue
        own = torch.div(positions[[0, -1]], k_block_size, rounding_mode="floor")
        recent = (key_blocks > own[0] - keep_recent) & (key_blocks <= own[1])
        rows.append((key_blocks < keep_sink) | (recent & (keep_recent > 0)))
    return torch.stack(rows) if rows else key_blocks.new_zeros((0, len(key_blocks))).bool()


def _top_p(probs: Tensor, top_p: float, rel: Tensor, band: float) -> tuple[Tensor, Tensor]:
    """Keep a block while the probability before it is under top_p; and which are near ties.

    A probability may be off by the factor 1 +- rel, so the sum before a block is only known to
    lie in an interval; a block whose interval, widened by `band`, holds top_p may go either way.
    """
    order = torch.sort(probs, dim=-1, descending=True, stable=True)
    before = order.values.cumsum(-1) - order.values
    keep = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order.indices, before < top_p)

    ascending = order.values.flip(-1).contiguous()
    tail = torch.nn.functional.pad(ascending.flip(-1).cumsum(-1), (1, 0))

    def mass_above(floor: Tensor, right: bool) -> Tensor:
        """Sum of the probabilities above (right) or at least (left) `floor`."""
        below = torch.searchsorted(ascending, floor.contiguous(), right=right)
        return tail.gather(-1, probs.shape[-1] - below)

    lowest = mass_above(probs * (1 + rel) / (1 - rel), right=True) * (1 - rel) - band
    highest = (mass_above(probs * (1 - rel) / (1 + rel), right=False) - probs) * (1 + rel) + band
    return keep, (lowest < top_p) & (highest >= top_p)


def _above(probs: Tensor, least: float, rel: Tensor, band: float) -> tuple[Tensor, Tensor]:
    """Blocks of at least the probability `least`, and which are near ties.

    The total may be off by `band` beside the error of the probability itself.
    """
    slack = rel + band
    return probs >= least, (probs * (1 + slack) >= least) & (probs * (1 - slack) < least)


def _decide(
    probs: Tensor, rel: Tensor, top_p: float, keep_above: float | None, band: float
) -> tuple[Tensor, Tensor]:
    """What both rules keep of rows of probabilities, and which decisions are near ties."""
    undefined = probs.isnan().any(-1, keepdim=True)
    probs, rel = probs.nan_to_num(0.0), rel.nan_to_num(0.0)
    kept, near = _top_p(probs, top_p, rel, band)
    if top_p >= 1:
        kept, near = torch.ones_like(kept), torch.zeros_like(near)
    if top_p == 0:
        kept, near = torch.zeros_like(kept), torch.zeros_like(near)
    if keep_above is not None:
        above, near_above = _above(probs, keep_above, rel, band)
        # A block that one rule keeps for certain is kept, whatever the other says.
        near = (near | near_above) & ~(kept & ~near) & ~(above & ~near_above)
        kept = kept | above
    return kept | undefined, near & ~undefined


def select(
    q_means: Tensor,
    k_means: Tensor,
    q_len: int,
    k_len: int,
    high_band: list[int],
    low_band: list[int],
    top_p: float,
    *,
    keep_sink: int = 1,
    keep_recent: int = 1,
    keep_above: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
    relative_error: float = 2.0**-19,
    band: float = 1e-6,
) -> Selection:
    """Selection by float64 sort.

    `relative_error` is the error allowed to a logit relative to the sum of its terms' magnitudes
    (float32 products and sums, exp), `band` that of the cumulative probability.
    """
    batch, q_heads, q_blocks, head_dim = q_means.shape
    kv_heads, k_blocks = k_means.shape[1], k_means.shape[2]
    device = q_means.device
    visible = visible_blocks(q_len, k_len, q_block_size, k_block_size, causal, device)
    forced = visible & _forced_blocks(
        q_len, k_len, q_block_size, k_block_size, keep_sink, keep_recent, device
    )
    shape = (batch, q_heads, q_blocks, k_blocks)
    keep = forced.expand(shape).clone()
    near_tie = torch.zeros(shape, dtype=torch.bool, device=device)
    certain = keep.clone()
    if 0 in shape:
        return Selection(keep, visible, forced, near_tie)

    head_of = torch.arange(q_heads, device=device) // (q_heads // kv_heads)
    q = q_means.double()
    k = k_means.double()[:, head_of]
    for ranges in (high_band, low_band):
        dims = band_dims(ranges)
        if not dims:
            continue
        qz, kz = q[..., dims], k[..., dims]
        tau = (
            math.sqrt(len(dims) / head_dim)
            * (_rms(qz) / _clamp_min_keeping_nan(_rms(q), 1e-6))
            * (_rms(kz) / _clamp_min_keeping_nan(_rms(k), 1e-6))
        )
        divisor = math.sqrt(len(dims)) * _clamp_min_keeping_nan(tau, 1e-6)
        logits = (qz @ kz.transpose(-1, -2) / divisor).masked_fill(~visible, -math.inf)
        terms = (qz.abs() @ kz.abs().transpose(-1, -2) / divisor).masked_fill(~visible, 0.0)
        error = (terms.amax(-1, keepdim=True) + 1) * relative_error
        rel = torch.expm1(2 * error).clamp(max=0.5)
        probs = torch.softmax(logits, dim=-1)
        kept, near = _decide(probs, rel, top_p, keep_above, band)
        keep |= kept & visible
        certain |= kept & ~near
        near_tie |= near & visible
    return Selection(keep, visible, forced, near_tie & ~certain)


CELL = 16  # tokens of a cell of the grid


def select_grid(
    q: Tensor,
    k: Tensor,
    top_p: float,
    *,
    keep_sink: int = 1,
    keep_recent: int = 1,
    keep_above: float | None = None,
    scale: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 128,
    rounding: float = 2.0**-11,
    relative_error: float = 2.0**-19,
    band: float = 1e-6,
) -> Selection:
    """Selection by the masses of a grid of cells, one row of cells at a time.

    `rounding` is the largest relative error of a cell's statistics. Those of a product's terms are
    independent (but for the two of one dimension, which share the query's), so the logit's is a few
    times the root of their squares. `relative_error` is that of the sum of the terms' magnitudes.
    A mass is a share, which two logits' errors enter, over a sum of such shares.
    """
    batch, q_heads, q_len, head_dim = q.shape
    k_len, device = k.shape[2], q.device
    scale = head_dim**-0.5 if scale is None else scale
    visible = visible_blocks(q_len, k_len, q_block_size, k_block_size, causal, device)
    forced = visible & _forced_blocks(
        q_len, k_len, q_block_size, k_block_size, keep_sink, keep_recent, device
    )
    shape = (batch, q_heads, *visible.shape)
    masses = torch.zeros(shape, dtype=torch.float64, device=device)
    error = torch.zeros((*shape[:3], 1), dtype=torch.float64, device=device)
    if 0 in shape:
        return Selection(forced.expand(shape), visible, forced, torch.zeros_like(masses).bool())

    head_of = torch.arange(q_heads, device=device) // (q_heads // k.shape[1])
    whole = k_len - k_len % CELL
    k_cells = []
    if whole:
        k_cells.append(k[:, :, :whole].double().unflatten(2, (whole // CELL, CELL)))
    if whole < k_len:
        k_cells.append(k[:, :, None, whole:].double())
    # (B, Hq, D, cells)
    means = torch.cat([cells.mean(3) for cells in k_cells], 2).mT[:, head_of]
    spreads = torch.cat([cells.std(3, unbiased=False) for cells in k_cells], 2).mT[:, head_of]
    first_key = torch.arange(0, k_len, CELL, device=device)
    positions = token_positions(q_len, k_len, device)
    for start in range(0, q_len, CELL):
        cell = slice(start, min(start + CELL, q_len))
        seen = first_key <= positions[cell][-1]
        if not causal:
            seen = torch.ones_like(seen)
        if not seen.any():
            continue
        mean = q[:, :, cell].double().mean(2)[..., None]
        terms = scale * torch.cat([mean * means, mean.abs() * spreads], 2)[..., seen]
        probs = torch.softmax(terms.sum(2), -1)
        block = start // q_block_size
        shares = torch.zeros_like(masses[:, :, block])
        shares.index_add_(-1, first_key[seen] // k_block_size, probs)
        masses[:, :, block] = torch.maximum(masses[:, :, block], shares)
        largest = 4 * rounding * terms.square().sum(2).sqrt().amax(-1, keepdim=True)
        largest = largest + relative_error * (terms.abs().sum(2).amax(-1, keepdim=True) + 1)
        error[:, :, block] = torch.maximum(error[:, :, block], largest)
    total = masses.sum(-1, keepdim=True)
    masses = masses / torch.where(total == 0, 1.0, total)
    rel = torch.expm1(4 * error).clamp(max=0.5)
    kept, near = _decide(masses, rel, top_p, keep_above, band)
    keep = (kept & visible) | forced
    return Selection(keep, visible, forced, near & visible & ~forced)
