"""What a transformers layer asks for, and everything that runs it: the only calls of the library's
own attention functions here."""

from __future__ import annotations

from typing import NamedTuple

import torch

from prism_cuda import plan, run
from prism_cuda.batch import Batch
from prism_cuda.config import PrismConfig
from prism_cuda.integrations.rope import config_of_layer
from prism_cuda.integrations.warnings import warn_of_dense
from prism_cuda.options import ScoreOptions, score_options

__all__ = [
    "Batch",
    "LayerCall",
    "kernel_obstacle",
    "note_dense",
    "plan_of",
    "run_dense",
    "run_ragged",
    "run_sparse",
]


class LayerCall(NamedTuple):  # a dataclass takes five times as long to make
    """What a layer asks for besides its tensors.

    Attributes:
        layer_idx: None where the module has none.
        config: settings of this layer, and of the query heads that it has here.
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

    def options(self) -> ScoreOptions:
        """Sinks, soft-capping and window, the sinks as the model has them."""
        return score_options(self.sinks, self.softcap, self._window_left())

    def kernel_options(self) -> ScoreOptions:
        """The same as the ops take them."""
        sinks = None if self.sinks is None else self.sinks.float().contiguous()
        return score_options(sinks, self.softcap, self._window_left())

    def _window_left(self) -> int | None:
        return None if self.window is None else self.window - 1


def plan_of(
    call: LayerCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masked: bool = False,
) -> plan.Plan:
    """The plan of a layer: dense by the reason that it names, or for :func:`run_sparse`.

    Args:
        masked: whether there is a mask, token by token.
    """
    chosen = plan.plan(query, key, value, call.config, call.options())
    if chosen.path != "prism":
        return chosen
    if masked:
        return plan.dense(chosen, "a token-level mask")
    if not call.causal:
        return plan.dense(chosen, "a non-causal layer")
    if call.dropout > 0:
        return plan.dense(chosen, "dropout")
    return plan.dense(chosen, "dense_layers") if call.dense else chosen


def run_sparse(
    call: LayerCall,
    chosen: plan.Plan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """Causal attention (B, Hq, q, D) of one sequence per row, recorded."""
    config = call.config
    if chosen.estimator is not None:
        config = config_of_layer(call.module, query.shape[-1], config)
    options = call.kernel_options()
    out, _, _, _ = run.run(
        chosen, query, key, value, config, options, scale=call.scale, layer_idx=call.layer_idx
    )
    return out


def run_dense(
    call: LayerCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, reason: str
) -> torch.Tensor:
    """Causal attention by torch, recorded, without what torch does not know."""
    out, _, _, _ = run.run(
        plan.Plan("dense", "sdpa", reason),
        query,
        key,
        value,
        call.config,
        scale=call.scale,
        layer_idx=call.layer_idx,
        dropout=call.dropout,
    )
    return out


def note_dense(call: LayerCall, query: torch.Tensor, key: torch.Tensor, reason: str) -> None:
    """Record a dense call that runs elsewhere."""
    run.note_dense(reason, query, key, call.layer_idx)


def kernel_obstacle(call: LayerCall, query: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why the kernels cannot serve a ragged batch, or None if they can."""
    if value.shape[-1] != query.shape[-1]:
        return f"v has head_dim {value.shape[-1]}, q has {query.shape[-1]}"
    if not call.causal:
        return "a non-causal layer"
    if call.dropout > 0:
        return "dropout"
    kernel = plan.attention_kernel(
        query.shape[-1], query.dtype, query.device, call.config.block_sizes
    )
    return kernel if kernel.startswith("unsupported") else None


def run_ragged(
    call: LayerCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """Causal attention (total_q, Hq, D) of a ragged batch in one launch, recorded; the host does
    not know its lengths."""
    head_dim, config, options = q.shape[-1], call.config, call.kernel_options()
    chosen = plan.plan(q, k, v, config, options, batch=batch)
    if call.dense:
        chosen = plan.dense(chosen, "dense_layers")
    elif chosen.estimator is not None:
        reason = plan.why_not_estimated(head_dim, config)
        if reason is None:
            config = config_of_layer(call.module, head_dim, config)
        else:
            warn_of_dense(call.module, reason)
            chosen = plan.dense(chosen, reason)
    out, _, _, _ = run.run(
        chosen,
        q,
        k,
        v,
        config,
        options,
        scale=call.scale,
        layer_idx=call.layer_idx,
        batch=batch,
    )
    return out
