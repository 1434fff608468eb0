"""Block masks and structured inputs for the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


def random_causal_mask(
    heads: int, blocks: int, density: float, device: str, seed: int = 0
) -> Tensor:
    """(1, heads, blocks, blocks) bool: random below the diagonal, plus diagonal and block 0."""
    generator = torch.Generator(device).manual_seed(seed)
    mask = torch.rand(1, heads, blocks, blocks, device=device, generator=generator) < density
    mask |= torch.eye(blocks, dtype=torch.bool, device=device)
    mask[..., 0] = True
    return mask.tril_()


def causal_density(mask: Tensor) -> float:
    """Kept share of the blocks on and below the diagonal."""
    blocks = mask.shape[-1]
    return float(mask.sum()) / (mask.shape[0] * mask.shape[1] * blocks * (blocks + 1) / 2)


def pack(mask: Tensor) -> tuple[Tensor, Tensor]:
    """int32 (bits, counts) of a bool mask: key block 32 w + j is bit j of word w."""
    words = -(-mask.shape[-1] // 32)
    padded = torch.nn.functional.pad(mask, (0, 32 * words - mask.shape[-1]))
    bits = torch.zeros(*mask.shape[:-1], words, dtype=torch.int32, device=mask.device)
    for j, lane in enumerate(padded.unflatten(-1, (words, 32)).unbind(-1)):
        bits |= lane.int() << j
    return bits, mask.sum(-1, dtype=torch.int32)


def structured_qkv(
    heads: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    base: float = 1e6,
) -> tuple[Tensor, Tensor, Tensor]:
    """RoPE-rotated q, k and normal v, (1, H, L, D): topics of 64 tokens, an anchor, noise.

    The mix of the golden inputs in tests/data/golden, drawn on the device.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    topics, anchor = normal(kv_heads, 16, head_dim), normal(kv_heads, 1, head_dim)
    topic_of_run = torch.randint(0, 16, (-(-length // 64),), device=device, generator=generator)
    content = topics[:, topic_of_run.repeat_interleave(64)[:length]]
    inv_freq = base ** (-torch.arange(0, head_dim, 2, device=device).double() / head_dim)
    angle = torch.arange(length, device=device).double()[:, None] * inv_freq
    cos, sin = angle.cos().float(), angle.sin().float()

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(dtype)

    group = heads // kv_heads
    mix = 0.2 + 0.8 * torch.rand(heads, 2, 1, 1, device=device, generator=generator)
    q = torch.empty(1, heads, length, head_dim, dtype=dtype, device=device)
    for h in range(heads):
        mean = mix[h, 0] * content[h // group] + mix[h, 1] * anchor[h // group]
        q[0, h] = rotate(mean + 0.5 * normal(length, head_dim))
    k = rotate(content + anchor + 0.5 * normal(kv_heads, length, head_dim))[None]
    v = normal(1, kv_heads, length, head_dim).to(dtype)
    return q, k, v
