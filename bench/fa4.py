"""FlashAttention-4's forward kernels. Importing this needs the package flash-attn-4."""

import cutlass.cute as cute
import torch
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.interface import _flash_attn_fwd
from implementations import Call, Inputs
from masks import QUERY_BLOCK, block_lists
from torch import Tensor


@cute.jit
def causal_mask(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
    return n_idx <= m_idx


def _call(**settings: object) -> Call:
    """Returns (batch, heads, length, head_dim), a view of what the kernel writes."""

    def call(x: Inputs) -> Tensor:
        assert x.length_first is not None
        return _flash_attn_fwd(*x.length_first, **settings)[0].transpose(1, 2)

    return call


def dense(causal: bool, window: int | None = None, softcap: float | None = None) -> Call:
    return _call(causal=causal, window_size_left=window, softcap=softcap)


def sparse(mask: Tensor, causal: bool) -> dict[str, Call]:
    """Calls under a bool mask (1, heads, blocks, blocks) of 128 by 128 blocks, by variant."""
    partial = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device) & causal
    blocks = BlockSparseTensorsTorch(
        *block_lists(mask & partial),
        *block_lists(mask & ~partial),
        block_size=(QUERY_BLOCK, QUERY_BLOCK),
    )
    if not causal:
        return {"full_blocks": _call(block_sparse_tensors=blocks)}
    return {
        "causal": _call(block_sparse_tensors=blocks, causal=True),
        "mask_mod": _call(block_sparse_tensors=blocks, mask_mod=causal_mask),
    }
