"""attn_implementation="prism" for transformers 5: one attention and one mask function.

Sparse runs where the method applies: causal self-attention over long inputs, whole or in chunks,
with or without padding. Decode, short inputs and everything else that stays exact run dense; what
would be silently wrong raises.
"""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

from prism_cuda import functional
from prism_cuda.bands import Bands
from prism_cuda.config import PrismConfig
from prism_cuda.integrations.masks import prism_mask, row_spans
from prism_cuda.integrations.rope import layer_bands

logger = logging.get_logger(__name__)


def register(config: PrismConfig, name: str) -> None:
    """Register ``name`` with transformers; see :func:`prism_cuda.register`."""
    AttentionInterface.register(name, PrismAttention(config))
    AttentionMaskInterface.register(name, functools.partial(prism_mask, config))


class PrismAttention:
    """The attention function of one registered name, for all layers of all models under it."""

    def __init__(self, config: PrismConfig) -> None:
        self.config = config
        self._bands: WeakKeyDictionary[torch.nn.Module, Bands] = WeakKeyDictionary()

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend as transformers asks.

        Args:
            module: the attention layer, asked for its config, layer_idx and is_causal.
            query: (B, Hq, q, D), rotated. key, value: (B, Hkv, kv, D), the cache included.
            attention_mask: as :func:`prism_cuda.integrations.masks.prism_mask` makes it.

        Returns:
            out (B, q, Hq, D), and None for the weights.

        Raises:
            NotImplementedError: for softcap, attention sinks, position biases, paged caches and
                unmasked packed sequences.
        """
        _refuse_unsupported(module, attention_mask, kwargs)
        if kwargs.get("output_attentions"):
            logger.warning_once("prism: attention weights are never computed; none are returned.")
        layer_idx = getattr(module, "layer_idx", None)
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        masked = attention_mask is not None and attention_mask.dim() != 2
        if masked or not is_causal:
            choice = functional.choose(query, key, value, self.config)
            if choice.path == "dense":
                reason = choice.reason
            else:
                reason = "a token-level mask" if masked else "a non-causal layer"
            functional.note_dense(reason, query, key, layer_idx)
            if attention_mask is not None and not masked:
                attention_mask = attention_mask[:, None, None, :]
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal
            )
        if sliding_window is not None and sliding_window < key.shape[2]:
            raise NotImplementedError(
                f"prism: layer {layer_idx} has a sliding window of {sliding_window} over "
                f"{key.shape[2]} keys, but its model made no window mask for it"
            )
        attend = functools.partial(
            self._attend, module, dropout=dropout, scale=scaling, layer_idx=layer_idx
        )
        if attention_mask is None:
            out = attend(query, key, value)
        else:
            out = _attend_padded(attend, query, key, value, attention_mask)
        return out.transpose(1, 2).contiguous(), None

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout: float,
        scale: float | None,
        layer_idx: int | None,
    ) -> torch.Tensor:
        """Causal attention without padding, sparse if it can be: (B, Hq, q, D)."""
        choice = functional.choose(query, key, value, self.config)
        if dropout > 0 and choice.path == "prism":
            choice = functional.Dispatch("dense", "sdpa", "dropout")
        if choice.path == "dense":
            if key.shape[2] >= self.config.dense_below and query.shape[2] > 1:
                logger.warning_once(f"prism: {type(module).__name__} runs dense: {choice.reason}.")
            return functional.run_dense(
                query, key, value, scale, True, choice.reason, layer_idx, dropout
            )
        bands = self._bands.get(module)
        if bands is None and self.config.estimator == "bands":
            bands = self._bands[module] = layer_bands(module, query.shape[-1], self.config)
        out, _, _ = functional.run_sparse(
            query, key, value, bands, self.config, scale, True, choice.reason, layer_idx
        )
        return out


def _attend_padded(
    attend: functools.partial[torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor,
) -> torch.Tensor:
    """Attend row by row to the real tokens only; padding queries get 0."""
    written = padding.shape[1]
    if written > key.shape[2]:
        raise ValueError(
            f"prism: attention_mask covers {written} keys; expected at most {key.shape[2]}"
        )
    spans = row_spans(padding)
    q_start = written - query.shape[2]
    if all(span == (0, written) for span in spans):
        return attend(query, key[:, :, :written], value[:, :, :written])
    out = query.new_zeros((*query.shape[:3], value.shape[-1]))
    for row, (first, end) in enumerate(spans):
        rows = slice(row, row + 1)
        queries = slice(max(first - q_start, 0), max(end - q_start, 0))
        if queries.start < queries.stop:
            keys = slice(first, end)
            out[rows, :, queries] = attend(
                query[rows, :, queries], key[rows, :, keys], value[rows, :, keys]
            )
    return out


def _refuse_unsupported(
    module: torch.nn.Module, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> None:
    features = {
        "softcap": "logit soft-capping",
        "s_aux": "attention sinks",
        "position_bias": "position biases",
        "cache": "paged caches (continuous batching)",
    }
    for argument, feature in features.items():
        if kwargs.get(argument) is not None:
            raise NotImplementedError(
                f"prism: {type(module).__name__} uses {feature}, which prism does not support; "
                "load the model with another attn_implementation"
            )
    lengths = kwargs.get("cu_seq_lens_q")
    if lengths is not None and len(lengths) > 2 and attention_mask is None:
        raise NotImplementedError(
            "prism: packed sequences arrived without a mask that keeps them apart; pass "
            "position_ids and no cache, or pad the batch"
        )
