"""Dense attention for the transformers layers that the block-sparse kernels do not serve."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prism_cuda.integrations import calls
from prism_cuda.integrations.calls import LayerCall
from prism_cuda.integrations.masks import Causal

# Scores that eager attention holds in memory at once, over batch, heads, queries and keys.
EAGER_SCORES = 1 << 26


def attend(
    call: LayerCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    reason: str,
) -> torch.Tensor:
    """Dense attention (B, Hq, q, D), recorded.

    Args:
        mask: (B, 1 or Hq, q or 1, kv), bool or additive; None for none but the layer's own
            causality and window, with the queries at the end of the keys.
    """
    q_len, k_len = query.shape[2], key.shape[2]
    needs_scores = call.softcap is not None or call.sinks is not None
    windowed = call.options().windowed(k_len)
    if mask is None and call.causal and not (needs_scores or windowed):
        return calls.run_dense(call, query, key, value, reason)
    calls.note_dense(call, query, key, reason)
    if mask is None and call.causal and (q_len > 1 or windowed):
        mask = Causal(call.window).token_mask(q_len, k_len, query.device)
    if needs_scores:
        return _eager(call, query, key, value, mask)
    out, _ = sdpa_attention_forward(
        call.module, query, key, value, mask, call.dropout, call.scale, is_causal=False
    )
    return out.transpose(1, 2)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask in the form that is added to scores; others as they are."""
    if mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)


def _eager(
    call: LayerCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """The model's own eager attention, a chunk of queries at a time to bound its memory."""
    forward = _eager_function(call.module)
    batch, heads, q_len, head_dim = query.shape
    rows = max(1, EAGER_SCORES // max(1, batch * heads * key.shape[2]))
    mask = None if mask is None else additive(mask, query.dtype)
    outputs = []
    for start in range(0, q_len, rows):
        chunk = slice(start, start + rows)
        out, _ = forward(
            call.module,
            query[:, :, chunk],
            key,
            value,
            mask if mask is None or mask.shape[2] == 1 else mask[:, :, chunk],
            scaling=head_dim**-0.5 if call.scale is None else call.scale,
            dropout=call.dropout,
            softcap=call.softcap,
            s_aux=call.sinks,
        )
        outputs.append(out)
    return torch.cat(outputs, 1).transpose(1, 2)


def _eager_function(module: torch.nn.Module) -> Callable:
    """eager_attention_forward of the file that defines the layer."""
    for layer_class in type(module).__mro__:
        modeling_file = sys.modules.get(layer_class.__module__)
        forward = getattr(modeling_file, "eager_attention_forward", None)
        if forward is not None:
            return forward
    raise NotImplementedError(
        f"prism: {type(module).__name__} uses soft-capping or attention sinks, and its modeling "
        "file has no eager_attention_forward; load the model with another attn_implementation"
    )
