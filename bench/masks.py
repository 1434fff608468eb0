"""Block masks and structured inputs for the benchmarks.

Masks are bool (1, heads, query blocks, key blocks). Query blocks have 128 rows, key blocks 128 or
64 tokens, and key blocks that causality hides are never kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_cuda.bands import from_dims
from prism_cuda.bits import pack as pack_bits

QUERY_BLOCK = 128


def random_causal_mask(
    heads: int, blocks: int, density: float, device: str, seed: int = 0
) -> Tensor:
    """(1, heads, blocks, blocks) bool: random below the diagonal, plus diagonal and block 0."""
    return random_mask(heads, blocks * QUERY_BLOCK, density, device=device, seed=seed)


def _blocks(length: int, k_block: int, device: str) -> tuple[Tensor, Tensor]:
    """First row of each query block (Nq, 1), first token of each key block (1, Nk)."""
    rows = torch.arange(0, length, QUERY_BLOCK, device=device)
    return rows[:, None], torch.arange(0, length, k_block, device=device)[None]


def visible_mask(length: int, *, k_block: int = 128, causal: bool = True, device: str) -> Tensor:
    """(Nq, Nk): every key block that some row of the query block may see."""
    rows, tokens = _blocks(length, k_block, device)
    return (tokens < rows + QUERY_BLOCK) | (not causal)


def _forced(length: int, k_block: int, device: str) -> Tensor:
    """(Nq, Nk): the query block's own tokens and the first 128, in key blocks of any size."""
    rows, tokens = _blocks(length, k_block, device)
    return (tokens // QUERY_BLOCK == rows // QUERY_BLOCK) | (tokens < QUERY_BLOCK)


def full_mask(
    heads: int, length: int, *, k_block: int = 128, causal: bool = True, device: str
) -> Tensor:
    """Every visible block."""
    visible = visible_mask(length, k_block=k_block, causal=causal, device=device)
    return visible.expand(1, heads, *visible.shape).contiguous()


def random_mask(
    heads: int,
    length: int,
    density: float,
    *,
    k_block: int = 128,
    causal: bool = True,
    device: str,
    seed: int = 0,
) -> Tensor:
    """Each visible block with probability `density`, plus the diagonal and the first 128 tokens."""
    visible = visible_mask(length, k_block=k_block, causal=causal, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    mask = torch.rand(1, heads, *visible.shape, device=device, generator=generator) < density
    return mask.logical_or_(_forced(length, k_block, device)).logical_and_(visible)


def structured_mask(like: Tensor, length: int, *, seed: int = 0) -> Tensor:
    """Sink, local band and a few vertical lines, as many blocks a head as `like` keeps.

    `like` is causal with 128-token blocks. One vertical line for 32 blocks of length, while they
    fit into half of what is to be kept; the rest widens the band, its last diagonal in part.
    """
    _, heads, blocks, _ = like.shape
    index = torch.arange(blocks, device=like.device)
    distance, from_end = index[:, None] - index, blocks - 1 - index[:, None]
    rank = (distance * blocks + from_end + 2).expand(1, heads, -1, -1).clone()
    generator = torch.Generator().manual_seed(seed)
    lines = max(1, blocks // 32)
    for head, kept in enumerate(like.sum((0, 2, 3)).tolist()):
        free = (kept - (2 * blocks - 1)) // 2
        for column in (1 + torch.randperm(blocks - 1, generator=generator)[:lines]).tolist():
            free -= blocks - column
            if free < 0:
                break
            rank[0, head, :, column] = 1
    return _keep_lowest(rank, like, length)


def long_row_mask(like: Tensor, length: int, *, seed: int = 0) -> Tensor:
    """One row of each head keeps all it sees, the others few and equally many.

    As many blocks a head as `like` keeps, which is causal with 128-token blocks. The long row lies
    somewhere in the second half, the blocks of the short rows are random.
    """
    _, heads, blocks, _ = like.shape
    generator = torch.Generator(like.device).manual_seed(seed)
    drawn = torch.rand(like.shape, device=like.device, generator=generator)
    free = visible_mask(length, device=str(like.device)) & ~_forced(length, 128, str(like.device))
    # The place of a block among its row's: filling by it lets all rows grow alike.
    rank = drawn.masked_fill_(~free, 2.0).argsort(-1).argsort(-1) + 2
    long_rows = torch.randint(
        blocks // 2, blocks, (heads,), device=like.device, generator=generator
    )
    rank[0, torch.arange(heads, device=like.device), long_rows] = 1
    return _keep_lowest(rank, like, length)


def _keep_lowest(rank: Tensor, like: Tensor, length: int) -> Tensor:
    """The forced blocks, then those of lowest rank (from 1), as many a head as `like` keeps."""
    device = str(like.device)
    rank = rank.masked_fill(_forced(length, QUERY_BLOCK, device), 0)
    rank.masked_fill_(~visible_mask(length, device=device), torch.iinfo(rank.dtype).max)
    order = rank.flatten(2).argsort(stable=True, dim=-1)
    places = torch.arange(order.shape[-1], device=like.device)
    chosen = places < like.sum((2, 3))[..., None]
    return torch.zeros_like(like).flatten(2).scatter_(-1, order, chosen).view_as(like)


def default_bands(head_dim: int) -> tuple[list[int], list[int]]:
    """The published bands as ranges: half and three quarters of the dimensions, rotate-half."""
    return from_dims(head_dim // 2, head_dim * 3 // 4, head_dim).ranges


def causal_density(mask: Tensor) -> float:
    """Kept share of the blocks on and below the diagonal, for square masks."""
    blocks = mask.shape[-1]
    return float(mask.sum()) / (mask.shape[0] * mask.shape[1] * blocks * (blocks + 1) / 2)


def block_lists(which: Tensor) -> tuple[Tensor, Tensor]:
    """int32 counts (..., Nq) and indices (..., Nq, Nk) of the blocks of each row, in order."""
    order = torch.argsort(which.to(torch.int8), dim=-1, descending=True, stable=True)
    return which.sum(-1, dtype=torch.int32), order.int()


def pack(mask: Tensor) -> tuple[Tensor, Tensor]:
    """int32 (bits, counts) of a bool mask: key block 32 w + j is bit j of word w."""
    return pack_bits(mask), mask.sum(-1, dtype=torch.int32)


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
