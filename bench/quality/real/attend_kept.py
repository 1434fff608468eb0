"""Causal attention of one sequence under a block mask: a Triton kernel on CUDA, else PyTorch.

Tensors are (heads, length, head_dim) with grouped key/value heads; masks bool (heads, length / 128,
length / 64). It needs nothing but PyTorch, so that an evaluation needs no build of the package.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of PyTorch for CPUs
    triton = None

Q_BLOCK, K_BLOCK = 128, 64

if triton is not None:

    @triton.jit
    def _attend_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        out_ptr,
        list_ptr,
        count_ptr,
        length,
        group,
        scale,
        D: tl.constexpr,
        M: tl.constexpr,
        N: tl.constexpr,
    ):
        block, head = tl.program_id(0), tl.program_id(1)
        q_blocks, k_blocks = length // M, length // N
        kv_head = head // group
        rows = block * M + tl.arange(0, M)
        columns = tl.arange(0, N)
        dims = tl.arange(0, D)
        at = head.to(tl.int64) * length * D + rows[:, None] * D + dims[None, :]
        q = tl.load(q_ptr + at)
        keys = kv_head.to(tl.int64) * length * D
        highest = tl.full((M,), -1e30, tl.float32)
        total = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, D), tl.float32)
        row = head * q_blocks + block
        for i in range(tl.load(count_ptr + row)):
            key = tl.load(list_ptr + row.to(tl.int64) * k_blocks + i) * N + columns
            k = tl.load(k_ptr + keys + key[:, None] * D + dims[None, :])
            v = tl.load(v_ptr + keys + key[:, None] * D + dims[None, :])
            scores = tl.dot(q, tl.trans(k)) * scale
            scores = tl.where(key[None, :] <= rows[:, None], scores, -1e30)
            above = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores - above[:, None])
            shrink = tl.exp2(highest - above)
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
            highest = above
        tl.store(out_ptr + at, (acc / total[:, None]).to(q.dtype))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention to the kept blocks, the diagonal among them; dense where the mask is None."""
    if mask is None:
        grouped = {"is_causal": True, "enable_gqa": True, "scale": scale}
        return F.scaled_dot_product_attention(q[None], k[None], v[None], **grouped)[0]
    if q.is_cuda and triton is not None and not _broken:
        return _by_triton(q, k, v, mask, scale)
    return _by_rows(q, k, v, mask, scale)


_broken = False  # the kernel, on this machine


def check(device: torch.device, heads: int, kv_heads: int, dim: int) -> None:
    """Compare the kernel with PyTorch once; do without it where it fails."""
    global _broken
    if device.type != "cuda" or triton is None:
        return
    generator = torch.Generator().manual_seed(0)
    shape = {"dtype": torch.bfloat16, "device": device}
    q = torch.randn(heads, 1024, dim, generator=generator).to(**shape)
    k, v = (torch.randn(kv_heads, 1024, dim, generator=generator).to(**shape) for _ in range(2))
    mask = torch.rand(heads, 8, 16, generator=generator) < 0.4
    block = torch.arange(16)
    own = torch.arange(8)[:, None] * 2
    mask = ((mask | (block >= own)) & (block <= own + 1)).to(device)
    mask[:, :, 0] = True
    try:
        expected = _by_rows(q.float(), k.float(), v.float(), mask, 0.2)
        error = (_by_triton(q, k, v, mask, 0.2) - expected).abs().max().item()
        _broken = not error < 0.05
    except Exception as problem:  # whatever a compiler may say
        error, _broken = repr(problem), True
    print(
        f"attention kernel: {'NOT USED, ' if _broken else ''}largest difference {error}", flush=True
    )


def _by_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    heads, length, dim = q.shape
    counts = mask.sum(-1, dtype=torch.int32)
    lists = (~mask).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32).contiguous()
    out = torch.empty_like(q)
    log2e = 1.4426950408889634
    _attend_kernel[(length // Q_BLOCK, heads)](
        q, k, v, out, lists, counts, length, heads // k.shape[0], scale * log2e,
        D=dim, M=Q_BLOCK, N=K_BLOCK, num_warps=8 if dim > 64 else 4, num_stages=2,
    )  # fmt: skip
    return out


def _by_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """One head and query block at a time, over the gathered keys."""
    group, length = q.shape[0] // k.shape[0], q.shape[1]
    position = torch.arange(length, device=q.device)
    out = torch.empty_like(q)
    for head in range(q.shape[0]):
        keys, values = k[head // group], v[head // group]
        for block in range(length // Q_BLOCK):
            rows = slice(block * Q_BLOCK, (block + 1) * Q_BLOCK)
            kept = position[: rows.stop].view(-1, K_BLOCK)[
                mask[head, block, : rows.stop // K_BLOCK]
            ]
            kept = kept.flatten()
            scores = (q[head, rows] * scale) @ keys[kept].T
            # Only the diagonal's keys, the last ones, are hidden from some rows.
            diagonal = slice(-Q_BLOCK, None)
            hidden = kept[diagonal] > position[rows, None]
            scores[:, diagonal].masked_fill_(hidden, -math.inf)
            out[head, rows] = scores.softmax(-1) @ values[kept]
    return out


def decode(
    q: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor],
    own: tuple[torch.Tensor, torch.Tensor],
    lengths: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Dense attention of the next token of several continuations of one sequence.

    Args:
        q: (answers, heads, head_dim). prefix: keys and values (kv_heads, length, head_dim) of the
            sequence, of which answer i sees the first lengths[i]. own: keys and values
            (answers, kv_heads, tokens, head_dim) of what was decoded so far, this token included,
            which the window has to hold.
    """
    heads, kv_heads = q.shape[1], prefix[0].shape[0]
    grouped = q.unflatten(1, (kv_heads, heads // kv_heads))
    before = torch.einsum("akgd,knd->akgn", grouped, prefix[0]).float() * scale
    position = torch.arange(prefix[0].shape[1], device=q.device)
    hidden = position >= lengths[:, None]
    if window is not None:
        hidden |= position <= (lengths + own[0].shape[2] - 1 - window)[:, None]
    before.masked_fill_(hidden[:, None, None], -math.inf)
    after = torch.einsum("akgd,aknd->akgn", grouped, own[0]).float() * scale
    weights = torch.cat([before, after], -1).softmax(-1).to(q.dtype)
    first = weights[..., : before.shape[-1]]
    out = torch.einsum("akgn,knd->akgd", first, prefix[1])
    out = out + torch.einsum("akgn,aknd->akgd", weights[..., before.shape[-1] :], own[1])
    return out.flatten(1, 2)
