"""attn_implementation="prism" for transformers 5: one attention and one mask function.

Sparse runs where the method applies: causal self-attention over long inputs, whole, in chunks or
packed, with or without padding and attention sinks. Decode, short inputs and everything else run
dense; what neither path gets right raises.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from prism_cuda import plan, run
from prism_cuda.config import PrismConfig
from prism_cuda.integrations import dense
from prism_cuda.integrations.dense import LayerCall
from prism_cuda.integrations.masks import mask_window, prism_mask, row_spans
from prism_cuda.integrations.packed import Attend, attend_packed
from prism_cuda.integrations.rope import config_of_layer
from prism_cuda.integrations.warnings import warn_of_dense, warn_once


def register(config: PrismConfig, name: str) -> None:
    """Register ``name`` with transformers; see :func:`prism_cuda.register`."""
    attention = PrismAttention(config)
    for key in (name, continuous_batching_name(name)):
        AttentionInterface.register(key, attention)
        AttentionMaskInterface.register(key, functools.partial(prism_mask, config))


def continuous_batching_name(name: str) -> str:
    """The key under which ``name`` serves generate_batch, see :func:`use_continuous_batching`."""
    return f"{name}-flash"


def use_continuous_batching(model: Any, name: str) -> None:
    """Switch a model to ``name`` for generate_batch; see prism_cuda.use_continuous_batching."""
    key = continuous_batching_name(name)
    if key not in AttentionInterface._global_mapping:
        raise ValueError(
            f"prism_cuda: name is {name!r}; expected a registered one: call "
            f"prism_cuda.register(name={name!r}) first"
        )
    # generate_batch asks the name whether the attention reads cumulative lengths ("flash") or a
    # mask of all the batch's tokens, and set_attn_implementation would look for a kernel to
    # download behind a name with "flash" in it.
    model.config._attn_implementation = key


class PrismAttention:
    """The attention function of one registered name, for all layers of all models under it."""

    def __init__(self, config: PrismConfig) -> None:
        self.config = config
        self._layer_configs: dict[int | None, PrismConfig] = {
            layer: config.for_layer(layer) for layer in config.own_layers()
        }

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
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend as transformers asks.

        Args:
            module: the attention layer, asked for its config, layer_idx and is_causal.
            query: (B, Hq, q, D), rotated. key, value: (B, Hkv, kv, D), the cache included.
            attention_mask: as :func:`prism_cuda.integrations.masks.prism_mask` makes it.
            softcap: logits are softcap * tanh(logits / softcap).
            s_aux: (Hq,) attention sinks, logits that take part in the softmax and have no value.
            cu_seq_lens_q, cu_seq_lens_k: int (sequences + 1,), where packed sequences begin and
                end in a batch of 1.
            max_length_q, max_length_k: at least the longest sequence's queries and keys. Without
                them the host reads the lengths in every layer.

        Returns:
            out (B, q, Hq, D), and None for the weights.

        Raises:
            NotImplementedError: for position biases and block tables.
        """
        _refuse_unsupported(module, kwargs)
        if kwargs.get("output_attentions"):
            warn_once("prism: attention weights are never computed; none are returned.")
        query, key, value = plan.computed(query, key, value)
        layer_idx = getattr(module, "layer_idx", None)
        if attention_mask is not None and attention_mask.dim() == 3:
            sliding_window = mask_window(attention_mask)
            if attention_mask.shape[2] == 0:  # no padding
                attention_mask = None
        call = LayerCall(
            module,
            layer_idx,
            self._layer_configs.get(layer_idx, self.config),
            self.config.is_dense_layer(layer_idx),
            getattr(module, "is_causal", True) if is_causal is None else is_causal,
            scaling,
            dropout,
            sliding_window,
            softcap,
            s_aux,
        )
        attend = functools.partial(self._attend, call)
        q_ends = kwargs.get("cu_seq_lens_q")
        if attention_mask is None and q_ends is not None:
            k_ends = kwargs.get("cu_seq_lens_k")
            longest = (kwargs.get("max_length_q"), kwargs.get("max_length_k"))
            out = attend_packed(call, query, key, value, q_ends, k_ends, *longest, attend)
        elif attention_mask is None:
            out = attend(query, key, value)
        elif attention_mask.dim() == 3 or (attention_mask.dim() == 2 and call.causal):
            out = _attend_padded(attend, query, key, value, attention_mask)
        elif attention_mask.dim() == 2:
            out = attend(query, key, value, attention_mask[:, None, None, :])
        else:
            out = attend(query, key, value, attention_mask)
        return out.transpose(1, 2).contiguous(), None

    def _attend(
        self,
        call: LayerCall,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one sequence per row, sparse if it can be: (B, Hq, q, D)."""
        chosen = plan.plan(query, key, value, call.config, call.options())
        reason = call.why_dense(mask) if chosen.path == "prism" else chosen.reason
        if reason is not None:
            _warn_of_dense(call, query, key, mask, reason)
            return dense.attend(call, query, key, value, mask, reason)
        config = call.config
        if chosen.estimator is not None:
            config = config_of_layer(call.module, query.shape[-1], config)
        out, _, _, _ = run.run(
            chosen,
            query,
            key,
            value,
            config,
            call.kernel_options(),
            scale=call.scale,
            layer_idx=call.layer_idx,
        )
        return out


def _warn_of_dense(
    call: LayerCall,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    reason: str,
) -> None:
    """Say once which long prefills run dense although nobody asked for it."""
    asked_for = call.dense or not call.causal
    warned_of = mask is not None  # by prism_mask
    long = key.shape[2] >= call.config.dense_below and query.shape[2] > 1
    if long and not (asked_for or warned_of):
        warn_of_dense(call.module, reason)


def _attend_padded(
    attend: Attend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor,
) -> torch.Tensor:
    """Attend row by row to the real tokens only; padding queries get 0.

    Args:
        padding: bool (B, n) or, under a window, (B, window, n), see masks.py.
    """
    written = padding.shape[-1]
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


def _refuse_unsupported(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    features = {
        "position_bias": "position biases, which prism does not support; load the model with "
        "another attn_implementation",
        "block_table": "a block table, which prism does not read; set "
        "ContinuousBatchingConfig(max_blocks_per_request=0)",
        "cache": "continuous batching as transformers did it before 5.24; upgrade transformers",
    }
    for argument, feature in features.items():
        if kwargs.get(argument) is not None:
            raise NotImplementedError(f"prism: {type(module).__name__} uses {feature}")
