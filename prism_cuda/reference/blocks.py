"""Which key blocks a query block sees, and which of them the rules keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from prism_cuda.bits import pack as pack_bits

Mask = tuple[torch.Tensor, torch.Tensor]  # bits and counts


@dataclass(frozen=True)
class Rules:
    """What a row of query blocks keeps of the key blocks that it sees.

    Attributes:
        top_p: in [0, 1], one for all query heads or one for each: blocks are kept until they hold
            so much probability; at 1 all are.
        keep_above: likewise, in (0, 1]: blocks of so much probability are kept as well; None for no
            such rule.
        keep_sink, keep_recent: blocks kept at the beginning, and at the query block's own tokens.
    """

    top_p: Sequence[float]
    keep_above: Sequence[float] | None = None
    keep_sink: int = 1
    keep_recent: int = 1

    @staticmethod
    def per_head(values: Sequence[float], device: torch.device) -> torch.Tensor:
        """Float64 (Hq or 1, 1, 1), beside (..., Hq, Nq, Nk)."""
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None, None]


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
    window_left: int | None = None,
) -> torch.Tensor:
    """Bool (Nq, Nk): key blocks holding a token that some token of the query block may see."""
    device = torch.device(device)
    first, last = _block_positions(q_len, k_len, q_block_size, device)
    first_key = torch.arange(0, k_len, k_block_size, device=device)[None, :]
    visible = torch.ones(last.shape[0], first_key.shape[1], dtype=torch.bool, device=device)
    if causal:
        visible &= first_key <= last
    if window_left is not None:
        visible &= first_key + k_block_size > first - window_left
    return visible


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


def probable_blocks(logits: torch.Tensor, visible: torch.Tensor, rules: Rules) -> torch.Tensor:
    """:func:`top_p_blocks` of the softmax of logits (..., Nq, Nk) over the visible blocks."""
    return top_p_blocks(logits.masked_fill(~visible, -math.inf).softmax(-1), visible, rules)


def top_p_blocks(probs: torch.Tensor, visible: torch.Tensor, rules: Rules) -> torch.Tensor:
    """Keep the most probable visible blocks of each row until their probabilities sum to top_p.

    Blocks of a probability of at least keep_above are kept as well.

    Args:
        probs: (..., Hq, Nq, Nk). visible: bool (Nq, Nk).

    Returns:
        bool (..., Hq, Nq, Nk). Ties go to the lower index; a row with NaN probabilities keeps every
        visible block, since nothing is known about it.
    """
    top_p = rules.per_head(rules.top_p, probs.device)
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.double()
    sum_before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, order, sum_before < top_p)
    if rules.keep_above is not None:
        keep_above = rules.per_head(rules.keep_above, probs.device)
        kept = kept | (probs >= keep_above.to(probs.dtype))
    unknown = probs.isnan().any(-1, keepdim=True)
    return (kept | unknown | (top_p >= 1)) & visible


def select(
    probable: Callable[[torch.Tensor], torch.Tensor],
    shape: Sequence[int],
    lengths: tuple[int, int],
    rules: Rules,
    causal: bool,
    sizes: tuple[int, int],
    device: torch.device,
) -> Mask:
    """Bits and counts of the probable blocks, with the sink and the recent ones.

    Args:
        probable: takes the visible blocks, bool (Nq, Nk), and says which of them an estimator
            keeps, bool (B, Hq, Nq, Nk).
        shape: (B, Hq). lengths, sizes: (query, key) tokens of the sequence, and of a block.
    """
    visible = visible_blocks(*lengths, causal, *sizes, device)
    forced = recent_blocks(*lengths, rules.keep_recent, *sizes, device)
    forced[:, : rules.keep_sink] = True
    kept = (forced & visible).expand(*shape, *visible.shape) | probable(visible)
    return pack(kept)


def pack(kept: torch.Tensor) -> Mask:
    """Bits int32 (..., Nq, ceil(Nk / 32)) and counts int32 (..., Nq) of bool (..., Nq, Nk)."""
    return pack_bits(kept), kept.sum(-1, dtype=torch.int32)
