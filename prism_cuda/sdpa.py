"""Dense attention by torch: what runs where no block is left out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    causal: bool,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention, bottom-right causal, rows without keys 0. K and V are never repeated."""
    q_len, k_len = q.shape[2], k.shape[2]
    blind = q_len if k_len == 0 else max(q_len - k_len, 0) if causal else 0
    if blind:
        # Rows before the first key see nothing; SDPA would return NaN for them.
        seeing = attend(q[:, :, blind:], k, v, scale, causal, dropout) if blind < q_len else None
        out = q.new_zeros((*q.shape[:3], v.shape[-1]))
        if seeing is not None:
            out[:, :, blind:] = seeing
        return out
    # A single query, being last, sees every key.
    bias = _chunk_bias(q_len, k_len, q.device) if causal and 1 < q_len < k_len else None
    # Branches, because a compiler that knows no lengths makes symbols of the comparisons.
    is_causal = enable_gqa = False
    if causal and bias is None and q_len > 1:
        is_causal = True
    if q.shape[1] != k.shape[1]:
        enable_gqa = True
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=bias,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def _chunk_bias(q_len: int, k_len: int, device: torch.device) -> torch.Tensor:
    """What the last q_len of k_len tokens see: keys up to themselves.

    Torch's own bias says so without memory, but compilers cannot trace it; they get the bool mask.
    """
    if not torch.compiler.is_compiling():
        return causal_lower_right(q_len, k_len)
    return torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril(k_len - q_len)
