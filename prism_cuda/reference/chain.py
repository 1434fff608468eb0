"""Selection and attention in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from prism_cuda.reference.attention import sparse_attention
from prism_cuda.reference.bands import select_bands
from prism_cuda.reference.batch import Sequences, every_block, select_each
from prism_cuda.reference.blocks import Mask
from prism_cuda.reference.grid import select_grid


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    estimator: str,
    high_band: Sequence[int],
    low_band: Sequence[int],
    top_p: Sequence[float],
    keep_above: Sequence[float] | None = None,
    keep_sink: int = 1,
    keep_recent: int = 1,
    scale: float | None = None,
    causal: bool = True,
    q_block_size: int = 128,
    k_block_size: int = 64,
    *,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    window_left: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    dense_below: int = 0,
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]] = sparse_attention,
    **sequences: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention over the blocks that an estimator keeps: (out, lse, bits, counts).

    Args:
        estimator: "grid" (:func:`select_grid`), "bands" (:func:`select_bands`), or "all": every
            block that some row sees through the causal mask and the window. The other two know
            nothing of windows.
        attend: what attends to the kept blocks; no argument of the op.
        The others are those of the selections and of :func:`sparse_attention`.
    """
    rules = (top_p, keep_above, keep_sink, keep_recent)
    sizes = (q_block_size, k_block_size)
    batch: dict[str, Any] = {"dense_below": dense_below, **sequences}
    if estimator == "grid":
        bits, counts = select_grid(q, k, *rules, scale, causal, *sizes, **batch)
    elif estimator == "bands":
        bits, counts = select_bands(
            q, k, high_band, low_band, *rules, causal, *sizes, k_scale=k_scale, **batch
        )
    else:

        def see(q: torch.Tensor, k: torch.Tensor) -> Mask:
            return every_block(q, k, causal, sizes, window_left)

        bits, counts = select_each(see, q, k, Sequences(**sequences), causal, sizes, 0)
    out, lse = attend(
        q, k, v, bits, counts, scale, causal, *sizes, sinks=sinks, softcap=softcap,
        window_left=window_left, k_scale=k_scale, v_scale=v_scale, **sequences,
    )  # fmt: skip
    return out, lse, bits, counts
