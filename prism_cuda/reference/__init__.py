"""The algorithm in readable PyTorch: the specification, and the CPU kernel of every op.

The functions named like ops take the ops' arguments. Everything is computed in float32 (float64 for
float64 inputs). Tensors are laid out (batch, heads, length, head_dim), or ragged (batch.py); query
head h reads key/value head h // (q_heads // kv_heads). Query row i sits at token position
i + (k_len - q_len): queries are the last q_len tokens of the keys' sequence.

These functions do not validate; the ops and the functions of :mod:`prism_cuda` do.
"""

from prism_cuda.reference.attention import sparse_attention
from prism_cuda.reference.bands import (
    RMS_EPS,
    append_means_,
    band_index,
    band_logits,
    band_temperature,
    block_pool,
    select_bands,
    select_from_means,
)
from prism_cuda.reference.blocks import (
    probable_blocks,
    recent_blocks,
    top_p_blocks,
    visible_blocks,
)
from prism_cuda.reference.chain import prefill
from prism_cuda.reference.grid import (
    CELL_TOKENS,
    cell_statistics,
    estimation_width,
    grid_masses,
    pool_cells_,
    select_grid,
)

__all__ = [
    "CELL_TOKENS",
    "RMS_EPS",
    "append_means_",
    "band_index",
    "band_logits",
    "band_temperature",
    "block_pool",
    "cell_statistics",
    "estimation_width",
    "grid_masses",
    "pool_cells_",
    "prefill",
    "probable_blocks",
    "recent_blocks",
    "select_bands",
    "select_from_means",
    "select_grid",
    "sparse_attention",
    "top_p_blocks",
    "visible_blocks",
]
