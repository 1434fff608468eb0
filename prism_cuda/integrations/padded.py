"""Attention of a padded batch: its real tokens alone, wherever padding lies, in one launch.

Every row's real tokens are gathered to its front, which leaves their order and so causality as they
were. What is padding decides on the device: the host reads nothing, and a CUDA graph of the layer
follows the masks that it is replayed with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prism_cuda.integrations import calls
from prism_cuda.integrations.calls import LayerCall
from prism_cuda.integrations.masks import Causal

# Where the order of a mask's tokens is kept on it, so that only the first layer sorts them.
_ORDER = "_prism_order"


@dataclass(frozen=True)
class _Order:
    """Where the tokens of a batch are gathered from, real ones first.

    Attributes:
        queries, keys: int64 (B, q) and (B, n) positions.
        q_ends, k_ends: int32 (2B + 1,): real tokens and padding of every row take turns.
        used: int32 (2B,), keys that are attended to: none by padding.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    q_ends: torch.Tensor
    k_ends: torch.Tensor
    used: torch.Tensor


def attend_padded(
    call: LayerCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    causal: Causal,
) -> torch.Tensor:
    """Attention (B, Hq, q, D) under a marker with padding; padding queries get 0.

    Args:
        mask: the marker. causal: what it says.
    """
    assert causal.real is not None
    batch, written = causal.real.shape
    q_len = query.shape[2]
    if not q_len <= written <= key.shape[2]:
        raise ValueError(
            f"prism: attention_mask covers {written} keys; expected {q_len}, the queries, to "
            f"{key.shape[2]}, the keys that there are"
        )
    order = getattr(mask, _ORDER, None)
    if order is None or order.queries.shape[1] != q_len:
        order = _order(causal.real, q_len)
        if not torch.compiler.is_compiling():
            setattr(mask, _ORDER, order)
    rows = torch.arange(batch, device=query.device)[:, None]
    q = query.transpose(1, 2)[rows, order.queries]
    k, v = (x.transpose(1, 2)[rows, order.keys] for x in (key, value))
    ragged = calls.Batch(order.q_ends, order.k_ends, order.used, None, q_len, written)
    gathered = calls.run_ragged(call, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ragged)
    out = torch.empty_like(q)
    out[rows, order.queries] = gathered.unflatten(0, (batch, q_len))
    return out.transpose(1, 2)


def _order(real: torch.Tensor, q_len: int) -> _Order:
    batch, written = real.shape
    real_queries = real[:, written - q_len :]
    queries, keys = (x.logical_not().to(torch.uint8) for x in (real_queries, real))
    counts = real.sum(-1, dtype=torch.int32)
    return _Order(
        queries.argsort(dim=-1, stable=True),
        keys.argsort(dim=-1, stable=True),
        _ends(real_queries.sum(-1, dtype=torch.int32), q_len),
        _ends(counts, written),
        torch.stack([counts, torch.zeros_like(counts)], 1).flatten(),
    )


def _ends(counts: torch.Tensor, length: int) -> torch.Tensor:
    """Where real tokens and padding end, row by row, after a leading 0: int32 (2B + 1,)."""
    lengths = torch.stack([counts, length - counts], 1).flatten()
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
