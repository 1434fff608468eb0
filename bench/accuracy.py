"""How far an attention output is from float64, beside the same maths in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from implementations import BlockSparsity, Inputs
from masks import QUERY_BLOCK
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One query block of one head."""

    head: int
    rows: slice
    want: Tensor  # float64 (rows, head_dim)
    plain_error: float  # largest error of plain PyTorch at the inputs' precision


@dataclass(frozen=True)
class Accuracy:
    """Of the sample whose error is the largest multiple of plain PyTorch's."""

    ratio: float
    error: float
    plain_error: float


def _attend(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, softcap: float | None = None
) -> Tensor:
    """Softmax in float32 or better, all else in the dtype of q, k and v."""
    scores = (q @ k.T) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(hidden, -math.inf)
    return scores.softmax(-1).to(q.dtype) @ v


def sample(x: Inputs, sparsity: BlockSparsity) -> list[Sample]:
    """The first two, the middle, the last and the fullest query block of three heads."""
    heads, blocks = sparsity.mask.shape[1:3]
    group = x.q.shape[1] // x.k.shape[1]
    token = torch.arange(sparsity.length, device=x.q.device)
    samples = []
    for head in sorted({0, heads // 2 + 1, heads - 1}):
        mask = sparsity.mask[0, head]
        fullest = int(mask.sum(-1).argmax())
        for block in sorted({0, 1, blocks // 2, blocks - 1, fullest}):
            rows = slice(block * QUERY_BLOCK, min((block + 1) * QUERY_BLOCK, sparsity.length))
            kept = token[mask[block].repeat_interleave(sparsity.k_block)[: sparsity.length]]
            hidden = (kept > token[rows, None]) & sparsity.causal
            if sparsity.window is not None:
                hidden |= kept < token[rows, None] - sparsity.window
            q, k, v = (
                x.q[0, head, rows],
                x.k[0, head // group].index_select(0, kept),
                x.v[0, head // group].index_select(0, kept),
            )
            cap = sparsity.softcap
            want = _attend(q.double(), k.double(), v.double(), hidden, cap)
            plain = (_attend(q, k, v, hidden, cap).double() - want).abs().amax()
            samples.append(Sample(head, rows, want, float(plain)))
    return samples


def accuracy(out: Tensor, samples: Sequence[Sample]) -> Accuracy:
    """Of out (1, heads, length, head_dim); NaN counts as an infinite error."""
    worst = Accuracy(0.0, 0.0, 0.0)
    for one in samples:
        error = float((out[0, one.head, one.rows].double() - one.want).abs().amax())
        error = math.inf if math.isnan(error) else error
        ratio = error / max(one.plain_error, 1e-12)
        if ratio >= worst.ratio:
            worst = Accuracy(ratio, error, one.plain_error)
    return worst
