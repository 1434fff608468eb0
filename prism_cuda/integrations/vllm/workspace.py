"""Lets vLLM see the memory of our workspaces while it measures what is left for the cache."""

from __future__ import annotations

import torch

from prism_cuda import plan, run
from prism_cuda.batch import Batch
from prism_cuda.config import PrismConfig

PAGE_SIZE = 16


def run_worst_case(
    like: torch.Tensor,
    kv_heads: int,
    config: PrismConfig,
    *,
    tokens: int,
    longest: int,
    sequences: int,
) -> None:
    """Make the largest call that a step can ask for, and forget its result.

    Every page of every sequence is the same one, of zeros: there is no cache yet. The call also
    loads the kernels.

    Args:
        like: queries (any, Hq, D) of the dtype and device.
        config: settings of the layer, its bands spelt out.
        tokens: most queries of a step. longest: most keys of a sequence. sequences: most sequences
            of that length in a call.
    """
    q = like.new_zeros((tokens, *like.shape[1:]))
    k = like.new_zeros((1, PAGE_SIZE, kv_heads, like.shape[-1]))
    pages = -(-longest // PAGE_SIZE)
    of_each = min(tokens, longest)
    ends = [min(i * of_each, tokens) for i in range(sequences + 1)]
    batch = Batch(
        cu_seqlens_q=torch.tensor(ends, dtype=torch.int32, device=q.device),
        cu_seqlens_k=None,
        seqused_k=torch.full((sequences,), longest, dtype=torch.int32, device=q.device),
        block_table=torch.zeros((sequences, pages), dtype=torch.int32, device=q.device),
        max_seqlen_q=of_each,
        max_seqlen_k=longest,
    )
    run.run(plan.plan(q, k, k, config, batch=batch), q, k, k, config, batch=batch)
