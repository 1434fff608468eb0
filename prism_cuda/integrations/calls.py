"""What a transformers layer asks for, and everything that runs it: the only calls of the library's
own attention functions here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from prism_cuda import functional, ragged
from prism_cuda.config import PrismConfig
from prism_cuda.functional import Scores
from prism_cuda.integrations.rope import chooser_of_layer
from prism_cuda.integrations.warnings import warn_of_dense
from prism_cuda.ragged import Sequences

__all__ = [
    "LayerCall",
    "Sequences",
    "kernel_obstacle",
    "note_dense",
    "run_dense",
    "run_ragged",
    "run_sparse",
    "why_dense",
]


@dataclass(frozen=True)
class LayerCall:
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

    def scores(self) -> Scores:
        """Sinks, soft-capping and window, the sinks as the model has them."""
        return Scores(self.sinks, self.softcap, None if self.window is None else self.window - 1)

    def kernel_scores(self) -> Scores:
        """The same as the ops take them."""
        sinks = None if self.sinks is None else self.sinks.float().contiguous()
        return dataclasses.replace(self.scores(), sinks=sinks)


def why_dense(
    call: LayerCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masked: bool = False,
) -> str | None:
    """Why a layer runs dense, or None: :func:`run_sparse` serves it.

    Args:
        masked: whether there is a mask, token by token.
    """
    choice = functional.choose(query, key, value, call.config, call.scores())
    if choice.path != "prism":
        return choice.reason
    if masked:
        return "a token-level mask"
    if not call.causal:
        return "a non-causal layer"
    if call.dropout > 0:
        return "dropout"
    return "dense_layers" if call.dense else None


def run_sparse(
    call: LayerCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Causal attention (B, Hq, q, D) of one sequence per row, recorded."""
    choice = functional.choose(query, key, value, call.config, call.scores())
    chooser = None
    if choice.estimator is not None:
        chooser = chooser_of_layer(call.module, query.shape[-1], call.config)
    out, _, _ = functional.run_sparse(
        query,
        key,
        value,
        chooser,
        call.config,
        call.scale,
        True,
        choice.reason,
        call.layer_idx,
        call.kernel_scores(),
    )
    return out


def run_dense(
    call: LayerCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, reason: str
) -> torch.Tensor:
    """Causal attention by torch, recorded, without what torch does not know."""
    return functional.run_dense(
        query, key, value, call.scale, True, reason, call.layer_idx, call.dropout
    )


def note_dense(call: LayerCall, query: torch.Tensor, key: torch.Tensor, reason: str) -> None:
    """Record a dense call that runs elsewhere."""
    functional.note_dense(reason, query, key, call.layer_idx)


def kernel_obstacle(call: LayerCall, query: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why the kernels cannot serve a ragged batch, or None if they can."""
    if value.shape[-1] != query.shape[-1]:
        return f"v has head_dim {value.shape[-1]}, q has {query.shape[-1]}"
    if not call.causal:
        return "a non-causal layer"
    if call.dropout > 0:
        return "dropout"
    kernel = functional.attention_kernel(query.shape[-1], query.dtype, query.device, call.config)
    return kernel if kernel.startswith("unsupported") else None


def run_ragged(
    call: LayerCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, where: Sequences
) -> torch.Tensor:
    """Causal attention (total_q, Hq, D) of a ragged batch in one launch, recorded; the host does
    not know its lengths."""
    scores = call.kernel_scores()
    head_dim = q.shape[-1]
    chooser = None
    selects = not call.dense and ragged.selects(where, call.config, scores)
    if selects and not functional.is_estimated(head_dim, call.config):
        lengths = (where.max_seqlen_q, where.max_seqlen_k)
        warn_of_dense(
            call.module, functional.why_dense(*lengths, head_dim, call.config, windowed=False)
        )
    elif selects:
        chooser = chooser_of_layer(call.module, head_dim, call.config)
    out, _, _, _ = ragged.run(
        q,
        k,
        v,
        where,
        chooser,
        call.config,
        call.scale,
        True,
        scores,
        dense="dense_layers" if call.dense else None,
        layer_idx=call.layer_idx,
    )
    return out
