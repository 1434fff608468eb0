"""Prism block-sparse attention: estimate which blocks of a prefill matter, compute only those."""

from prism_cuda import ops as ops  # registers torch.ops.prism
from prism_cuda.api import (
    Dispatch,
    dispatch,
    merge_attention,
    prefill,
    prefill_varlen,
    select_blocks,
    sparse_attention,
    sparse_attention_varlen,
)
from prism_cuda.bands import Bands
from prism_cuda.block_mask import BlockMask
from prism_cuda.chunked import ChunkedPrefill
from prism_cuda.config import PrismConfig
from prism_cuda.estimators import register_estimator
from prism_cuda.integrations import register, use_continuous_batching
from prism_cuda.recording import record

__version__ = "0.2.0"

__all__ = [
    "Bands",
    "BlockMask",
    "ChunkedPrefill",
    "Dispatch",
    "PrismConfig",
    "dispatch",
    "merge_attention",
    "prefill",
    "prefill_varlen",
    "record",
    "register",
    "register_estimator",
    "select_blocks",
    "sparse_attention",
    "sparse_attention_varlen",
    "use_continuous_batching",
]
