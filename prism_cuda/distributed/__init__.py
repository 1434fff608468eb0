"""Prefill over several processes, on torch.distributed; see docs/distributed.md."""

from prism_cuda.distributed.exchange import Exchange, Traffic
from prism_cuda.distributed.prefill import context_parallel_prefill
from prism_cuda.distributed.shards import Shards, Stretch, contiguous, from_lengths, zigzag

__all__ = [
    "Exchange",
    "Shards",
    "Stretch",
    "Traffic",
    "context_parallel_prefill",
    "contiguous",
    "from_lengths",
    "zigzag",
]
