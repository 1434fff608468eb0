"""float8 e4m3 keys and values with a scale per head, and what attention to them should give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers import inputs, oracle
from helpers.oracle import Attention

FP8 = torch.float8_e4m3fn
NAN_CODES = (0x7F, 0xFF)


def scales(kv_heads: int, device: str, seed: int = 0) -> dict[str, Tensor]:
    """Scales of no round value: small and large ones side by side."""
    rng = inputs.generator(seed + 17)
    sizes = torch.tensor([0.7, 0.02, 3.0, 1e-4]).repeat(kv_heads)[:kv_heads]
    return {
        name: (sizes.roll(i) * (1 + torch.rand(kv_heads, generator=rng))).to(device)
        for i, name in enumerate(("k_scale", "v_scale"))
    }


def dequantize(x: Tensor, scale: Tensor | None) -> Tensor:
    """Float64 values of x (..., H, L, D)."""
    x = x.double()
    return x if scale is None else x * scale.double()[:, None, None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    **settings: Any,
) -> tuple[Attention, Tensor]:
    """Float64 attention to dequantized k and v, and the same in plain PyTorch.

    The latter takes the codes, which q's dtype holds exactly, and scales scores and outputs.
    """
    want = oracle.attention(
        q, dequantize(k, k_scale), dequantize(v, v_scale), block_mask, **settings
    )
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    plain = torch.empty_like(q)
    softmax_scale = settings.pop("scale", None) or q.shape[-1] ** -0.5
    for g in range(kv_heads):
        heads, own = slice(g * group, (g + 1) * group), slice(g, g + 1)
        k_factor, v_factor = (1.0 if x is None else float(x[g]) for x in (k_scale, v_scale))
        out = oracle.low_precision_attention(
            q[:, heads], k[:, own].to(q.dtype), v[:, own].to(q.dtype), block_mask[:, heads],
            scale=softmax_scale * k_factor, **settings,
        )  # fmt: skip
        plain[:, heads] = (out.float() * v_factor).to(q.dtype)
    return want, plain


def all_codes(rows: int, columns: int) -> Tensor:
    """(rows, columns) fp8 whose every column holds all codes in turn; zeros instead of NaN."""
    codes = (torch.arange(rows)[:, None] + torch.arange(columns)) % 256
    for code in NAN_CODES:
        codes[codes == code] = 0
    return codes.to(torch.uint8).view(FP8)
