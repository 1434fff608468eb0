"""Input generators: values, memory layouts and block masks, all from an explicit seed."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.oracle import visible_blocks

LAYOUTS = ("contiguous", "length_first", "packed_qkv", "odd_stride", "offset")
VALUES = ("normal", "large_logits", "constant", "outlier", "denormal", "zero", "rising")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(shape: tuple[int, ...], kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    """A CPU tensor of the kind of values named."""
    x = torch.randn(shape, generator=generator(seed))
    if kind == "large_logits":
        x *= 20.0
    elif kind == "constant":
        x.fill_(0.5)
    elif kind == "outlier" and x.numel():
        x.view(-1)[x.numel() // 2] = 200.0
    elif kind == "denormal":
        x *= torch.finfo(dtype).smallest_normal / 4
    elif kind == "zero":
        x.zero_()
    elif kind == "rising":  # towards the first tokens, which are computed last
        x *= torch.linspace(60.0, 1.0, shape[2])[:, None]
    elif kind not in VALUES:
        raise ValueError(f"unknown kind of values {kind!r}")
    return x.to(dtype)


def lay_out(x: Tensor, layout: str, device: str) -> Tensor:
    """The same (B, H, L, D) values on `device` in the memory layout named."""
    b, h, length, d = x.shape
    if layout == "contiguous":
        return x.to(device)
    if layout == "length_first":
        view = x.new_empty(b, length, h, d).to(device).transpose(1, 2)
    elif layout == "packed_qkv":
        view = x.new_empty(b, length, 3, h, d).to(device)[:, :, 1].transpose(1, 2)
    elif layout == "odd_stride":
        view = x.new_empty(b, h, length, d + 3).to(device)[..., 1 : d + 1]
    elif layout == "offset":
        view = x.new_empty(5 + x.numel()).to(device)[5:].view(x.shape)
    else:
        raise ValueError(f"unknown layout {layout!r}")
    view.copy_(x)
    return view


def tensor(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    *,
    seed: int,
    kind: str = "normal",
    layout: str = "contiguous",
) -> Tensor:
    return lay_out(values(shape, kind, dtype, seed), layout, device)


def block_mask(
    kind: str,
    batch: int,
    q_heads: int,
    q_len: int,
    k_len: int,
    blocks: tuple[int, int],
    causal: bool,
    device: str,
    seed: int,
) -> Tensor:
    """A (B, Hq, Nq, Nk) bool mask.

    Kinds: full, visible, empty, random (half the blocks, invisible ones too), one_row_empty,
    last_only (the last visible block of each row), first_only, alternating_empty.
    """
    visible = visible_blocks(q_len, k_len, *blocks, causal)
    shape = (batch, q_heads, *visible.shape)
    full = torch.ones(shape, dtype=torch.bool)
    if kind == "full":
        mask = full
    elif kind == "visible":
        mask = full & visible
    elif kind == "empty":
        mask = ~full
    elif kind == "random":
        mask = torch.rand(shape, generator=generator(seed)) < 0.5
    elif kind == "one_row_empty":
        mask = full & visible
        mask[:, :, visible.shape[0] // 2] = False
    elif kind == "alternating_empty":
        mask = full & visible
        mask[:, :, ::2] = False
    elif kind == "first_only":
        mask = ~full
        mask[..., :1] = True
    elif kind == "last_only":
        mask = full & visible & (visible.cumsum(-1) == visible.sum(-1, keepdim=True))
    else:
        raise ValueError(f"unknown mask {kind!r}")
    return mask.to(device)


def structured_qk(
    heads: int, kv_heads: int, q_len: int, k_len: int, head_dim: int, device: str, seed: int
) -> tuple[Tensor, Tensor]:
    """float32 (1, H, L, D) RoPE-rotated q, k with topics that last 64 tokens, an anchor and noise.

    Their block means differ enough for top-p to keep some blocks and drop others.
    """
    rng = generator(seed)
    topics = torch.randn(kv_heads, 8, head_dim, generator=rng)
    anchor = torch.randn(kv_heads, 1, head_dim, generator=rng)
    topic_of_run = torch.randint(0, 8, (-(-k_len // 64) + 1,), generator=rng)
    content = topics[:, topic_of_run.repeat_interleave(64)[:k_len]]
    k = content + anchor + 0.5 * torch.randn(kv_heads, k_len, head_dim, generator=rng)
    group = heads // kv_heads
    positions = torch.arange(q_len) + (k_len - q_len)
    seen = content[:, positions.clamp(min=0)] if k_len else torch.zeros(kv_heads, q_len, head_dim)
    q = (seen + anchor).repeat_interleave(group, dim=0)
    q = q + 0.5 * torch.randn(heads, q_len, head_dim, generator=rng)

    inv_freq = 1e6 ** (-torch.arange(0, head_dim, 2).double() / head_dim)

    def rotate(x: Tensor, at: Tensor) -> Tensor:
        angle = at.double()[:, None] * inv_freq
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    q, k = rotate(q, positions), rotate(k, torch.arange(k_len))
    return q[None].to(device), k[None].to(device)
