"""Dense attention for the transformers layers that the block-sparse kernels do not serve."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prism_cuda import run
from prism_cuda.config import PrismConfig
from prism_cuda.integrations.masks import token_mask
from prism_cuda.options import ScoreOptions
from prism_cuda.plan import Plan

# Scores that eager attention holds in memory at once, over batch, heads, queries and keys.
EAGER_SCORES = 1 << 26


@dataclass(frozen=True)
class LayerCall:
    """What a layer asks for besides its tensors.

    Attributes:
        layer_idx: None where the module has none.
        config: settings of this layer.
        dense: whether the settings make this layer dense.
        window: keys that a query sees, its own included; None for all.
        softcap: logits are softcap * tanh(logits / softcap); None for no cap.
        sinks: (Hq,) logits that take part in the softmax and have no value; None for none.
    """

    module: torch.nn.Module
    layer_idx: int | None
    config: PrismConfig
    dense: bool
    causal: bool
    scale: float | None
    dropout: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None

    def why_dense(self, mask: torch.Tensor | None) -> str | None:
        """Why the kernels cannot serve a call of supported size and dtype, or None if they can."""
        if mask is not None:
            return "a token-level mask"
        if not self.causal:
            return "a non-causal layer"
        if self.dropout > 0:
            return "dropout"
        return "dense_layers" if self.dense else None

    def options(self) -> ScoreOptions:
        """Sinks, soft-capping and window, the sinks as the model has them."""
        window = None if self.window is None else self.window - 1
        return ScoreOptions(self.sinks, self.softcap, window)

    def kernel_options(self) -> ScoreOptions:
        """The same as the ops take them."""
        sinks = None if self.sinks is None else self.sinks.float().contiguous()
        return dataclasses.replace(self.options(), sinks=sinks)


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
        mask: (B, 1, q, kv), bool or additive; None for none but the layer's own causality and
            window, with the queries at the end of the keys.
    """
    q_len, k_len = query.shape[2], key.shape[2]
    needs_scores = call.softcap is not None or call.sinks is not None
    windowed = call.options().windowed(k_len)
    if mask is None and call.causal and not (needs_scores or windowed):
        out, _, _, _ = run.run(
            Plan("dense", "sdpa", reason),
            query,
            key,
            value,
            call.config,
            scale=call.scale,
            layer_idx=call.layer_idx,
            dropout=call.dropout,
        )
        return out
    run.note_dense(reason, query, key, call.layer_idx)
    if mask is None and call.causal and (q_len > 1 or windowed):
        mask = token_mask(q_len, k_len, query.device, window=call.window)
    if needs_scores:
        return _eager(call, query, key, value, mask)
    out, _ = sdpa_attention_forward(
        call.module, query, key, value, mask, call.dropout, call.scale, is_causal=False
    )
    return out.transpose(1, 2)


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
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest)
    outputs = []
    for start in range(0, q_len, rows):
        chunk = slice(start, start + rows)
        out, _ = forward(
            call.module,
            query[:, :, chunk],
            key,
            value,
            None if mask is None else mask[:, :, chunk],
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
