"""Prism block-sparse attention: estimate which blocks of a prefill matter, compute only those."""

from prism_cuda import _ops as _ops
from prism_cuda.bands import Bands
from prism_cuda.block_mask import BlockMask
from prism_cuda.chunked import ChunkedPrefill
from prism_cuda.config import PrismConfig
from prism_cuda.functional import Dispatch, dispatch, prefill, select_blocks, sparse_attention
from prism_cuda.integrations import register, use_continuous_batching
from prism_cuda.recording import record
from prism_cuda.varlen import merge_attention, prefill_varlen, sparse_attention_varlen

__version__ = "0.1.0"

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
    "select_blocks",
    "sparse_attention",
    "sparse_attention_varlen",
    "use_continuous_batching",
]
