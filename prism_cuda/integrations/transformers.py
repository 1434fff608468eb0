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

from prism_cuda import plan
from prism_cuda.config import PrismConfig
from prism_cuda.integrations import calls, dense, support
from prism_cuda.integrations.calls import LayerCall
from prism_cuda.integrations.heads import config_of_heads
from prism_cuda.integrations.masks import Causal, prism_mask
from prism_cuda.integrations.packed import attend_packed
from prism_cuda.integrations.padded import attend_padded
from prism_cuda.integrations.warnings import warn_of_dense, warn_once

TRAINED_INDEX = "a trained sparse index"
POSITION_BIASES = "position biases"


def register(config: PrismConfig, name: str) -> None:
    """Register ``name`` with transformers; see :func:`prism_cuda.register`."""
    support.check_name(name)
    support.watch(_is_ours)
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
    if not _is_ours(key):
        raise ValueError(
            f"prism_cuda: name is {name!r}; expected a registered one: call "
            f"prism_cuda.register(name={name!r}) first"
        )
    support.implementation_of(model, key)
    # generate_batch asks the name whether the attention reads cumulative lengths ("flash") or a
    # mask of all the batch's tokens, and set_attn_implementation would look for a kernel to
    # download behind a name with "flash" in it.
    model.config._attn_implementation = key


def _is_ours(name: str) -> bool:
    return isinstance(AttentionInterface._global_mapping.get(name), PrismAttention)


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
        position_bias: torch.Tensor | None = None,
        indices: torch.Tensor | None = None,
        block_indices: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend as transformers asks.

        Args:
            module: the attention layer, asked for its config, layer_idx and is_causal.
            query: (B, Hq, q, D), rotated. key, value: (B, Hkv, kv, D), the cache included.
            attention_mask: see :mod:`prism_cuda.integrations.masks`.
            softcap: logits are softcap * tanh(logits / softcap).
            s_aux: (Hq,) attention sinks, logits that take part in the softmax and have no value.
            position_bias: (B or 1, Hq, q, kv), added to the logits.
            indices, block_indices: what a trained index picks for every query.
            cu_seq_lens_q, cu_seq_lens_k: int (sequences + 1,), where packed sequences begin and
                end in a batch of 1.
            max_length_q, max_length_k: at least the longest sequence's queries and keys. Without
                them the host reads the lengths in every layer.

        Returns:
            out (B, q, Hq, D), and None for the weights.

        Raises:
            NotImplementedError: for arguments that hold tensors and are not known here.
        """
        support.check_arguments(module, kwargs)
        if kwargs.get("output_attentions"):
            warn_once("prism: attention weights are never computed; none are returned.")
        query, key, value = plan.computed(query, key, value)
        causal = Causal.of(attention_mask)
        if causal is not None:
            is_causal, sliding_window = True, causal.window
        call = self._call(
            module, query, is_causal, scaling, dropout, sliding_window, softcap, s_aux
        )

        mask, reason = attention_mask, None
        if block_indices is not None or indices is not None:
            mask, reason = self._indexed(call, query, key, mask, indices, block_indices, kwargs)
        if position_bias is not None:
            mask = dense.additive(self._token_mask(call, query, key, mask), query.dtype)
            mask, reason = position_bias + mask, POSITION_BIASES
        if reason is not None:
            out = dense.attend(call, query, key, value, mask, reason)
        else:
            out = self._attend_masked(call, query, key, value, mask, kwargs)
        return out.transpose(1, 2).contiguous(), None

    def _call(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        is_causal: bool | None,
        scaling: float | None,
        dropout: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> LayerCall:
        layer_idx = getattr(module, "layer_idx", None)
        if layer_idx is not None and layer_idx < 0:  # one for several layers, as Zamba2 has
            layer_idx = None
        config = self._layer_configs.get(layer_idx, self.config)
        return LayerCall(
            module,
            layer_idx,
            config_of_heads(module, query.shape[1], config),
            self.config.is_dense_layer(layer_idx),
            getattr(module, "is_causal", True) if is_causal is None else is_causal,
            scaling,
            dropout,
            window,
            softcap,
            sinks,
        )

    def _attend_masked(
        self,
        call: LayerCall,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Attention under any mask (B, Hq, q, D)."""
        causal = Causal.of(mask)
        attend = functools.partial(self._attend, call)
        if mask is not None and mask.dim() == 2:
            return self._attend_own_padding(call, query, key, value, mask)
        if mask is not None and causal is None:
            return self._attend_tokens(call, query, key, value, mask)
        if causal is not None and causal.written is not None:
            if causal.real is not None:
                return self._attend_padded(call, query, key, value, mask, causal)
            key, value = key[:, :, : causal.written], value[:, :, : causal.written]
        q_ends = kwargs.get("cu_seq_lens_q")
        if q_ends is None:
            return attend(query, key, value)
        longest = (kwargs.get("max_length_q"), kwargs.get("max_length_k"))
        k_ends = kwargs.get("cu_seq_lens_k")
        return attend_packed(call, query, key, value, q_ends, k_ends, *longest, attend)

    def _attend(
        self, call: LayerCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attention of one sequence per row, sparse if it can be: (B, Hq, q, D)."""
        chosen = calls.plan_of(call, query, key, value)
        if chosen.path == "prism":
            return calls.run_sparse(call, chosen, query, key, value)
        _warn_of_dense(call, query, key, chosen.reason)
        return dense.attend(call, query, key, value, None, chosen.reason)

    def _attend_tokens(
        self,
        call: LayerCall,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Attention under a (B, 1 or Hq, q or 1, kv or 1) mask, dense."""
        if mask.dtype == torch.bool and mask.shape[2:] == (1, 1) != (query.shape[2], key.shape[2]):
            everything = call._replace(causal=False)  # as prism_mask says so
            reason = calls.plan_of(everything, query, key, value).reason
            return dense.attend(everything, query, key, value, None, reason)
        reason = calls.plan_of(call, query, key, value, masked=True).reason
        return dense.attend(call, query, key, value, mask, reason)

    def _attend_padded(
        self,
        call: LayerCall,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        causal: Causal,
    ) -> torch.Tensor:
        """Attention under a marker with padding."""
        obstacle = calls.kernel_obstacle(call, query, value)
        if obstacle is None:
            assert mask is not None
            return attend_padded(call, query, key, value, mask, causal)
        chosen = calls.plan_of(call, query, key, value)
        reason = obstacle if chosen.path == "prism" else chosen.reason
        _warn_of_dense(call, query, key, reason)
        tokens = causal.token_mask(query.shape[2], key.shape[2], query.device)
        return dense.attend(call, query, key, value, tokens, reason)

    def _attend_own_padding(
        self,
        call: LayerCall,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Attention under the (B, n) padding of a layer that makes no other mask."""
        if not call.causal:
            return self._attend_tokens(call, query, key, value, mask.bool()[:, None, None, :])
        causal = Causal(call.window, mask.shape[1], mask.bool())
        return self._attend_padded(call, query, key, value, mask, causal)

    def _token_mask(
        self,
        call: LayerCall,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Any mask, token by token: (B or 1, 1 or Hq, q, kv), bool or additive."""
        causal = Causal.of(mask)
        q_len, k_len = query.shape[2], key.shape[2]
        if causal is None and mask is None and call.causal:
            causal = Causal(call.window)
        if causal is not None:
            return causal.token_mask(q_len, k_len, query.device)
        if mask is None:
            return torch.ones(1, 1, q_len, k_len, dtype=torch.bool, device=query.device)
        return mask if mask.dim() == 4 else mask.bool()[:, None, None, :]

    def _indexed(
        self,
        call: LayerCall,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        indices: torch.Tensor | None,
        block_indices: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, str]:
        """The mask with what a trained index leaves out, and why the layer runs dense."""
        k_len, dtype = key.shape[2], query.dtype
        mask = dense.additive(self._token_mask(call, query, key, mask), dtype)
        if indices is not None:  # (B, q, n), of keys
            picked = torch.where(indices < 0, k_len, indices).long()
            hidden = torch.ones((*picked.shape[:2], k_len + 1), dtype=torch.bool, device=key.device)
            hidden = hidden.scatter_(-1, picked, False)[:, None, :, :k_len]
            mask = mask.masked_fill(hidden, torch.finfo(dtype).min)
        if block_indices is not None:  # (B, heads, q, n), of blocks of the indexer's size
            positions = kwargs.get("position_ids")
            mask = call.module.indexer.build_block_mask(  # type: ignore[operator, union-attr]
                block_indices, mask, k_len, dtype, key.device, positions
            )
        return mask, TRAINED_INDEX


def _warn_of_dense(call: LayerCall, query: torch.Tensor, key: torch.Tensor, reason: str) -> None:
    """Say once which long prefills run dense although nobody asked for it."""
    asked_for = call.dense or not call.causal
    prefills = query.shape[2] >= call.config.block_sizes[0]  # and does not decode, or verify drafts
    if prefills and key.shape[2] >= call.config.dense_below and not asked_for:
        warn_of_dense(call.module, reason)
