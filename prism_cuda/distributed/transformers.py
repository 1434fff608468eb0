"""context_parallel for transformers models: every rank runs its tokens through all layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from prism_cuda import plan
from prism_cuda.config import PrismConfig
from prism_cuda.distributed.agreement import agree
from prism_cuda.distributed.exchange import Exchange
from prism_cuda.distributed.prefill import ContextCall, check_local, plan_of_sequence
from prism_cuda.distributed.shards import Shards, contiguous, zigzag
from prism_cuda.integrations.rope import config_of_layer
from prism_cuda.options import ScoreOptions

LAYOUTS = {"zigzag": zigzag, "contiguous": contiguous}


class ContextParallel:
    """One model over the ranks of a group, within a ``with`` block.

    Attributes:
        exchange: the group, and what was exchanged.
        shards: of the prompt that :meth:`split` was given last.
    """

    def __init__(self, exchange: Exchange, config: PrismConfig, layout: str) -> None:
        self.exchange = exchange
        self.config = config
        self.shards: Shards | None = None
        self._layout = layout

    def split(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The rank's part of a prompt, as the model's arguments.

        Args:
            input_ids: int (B, length), the whole prompt, the same on all ranks, without padding.

        Raises:
            ValueError: on every rank, if prompts or settings differ.
        """
        rank, ranks = self.exchange.rank, self.exchange.ranks
        described = {
            "input_ids": (tuple(input_ids.shape), int(input_ids.long().sum())),
            "config": self.config.to_dict(),
            "layout": self._layout,
        }
        agree(self.exchange, lambda: (described, None))
        block = self.config.block_sizes[0]
        self.shards = LAYOUTS[self._layout](input_ids.shape[1], ranks, block)
        own = self.shards.take(input_ids, rank, 1)
        positions = self.shards.positions(rank, input_ids.device)
        return {
            "input_ids": own,
            "position_ids": positions.expand(len(own), -1),
            # Without one, positions that jump would be taken for packed sequences.
            "attention_mask": torch.ones_like(own),
        }

    def join(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """What all ranks have of a tensor over the prompt, such as logits, on every rank."""
        shards = self._split_shards()
        shape, rows = list(x.shape), x.numel() // max(1, x.shape[dim])
        tokens = [shards.tokens(rank) for rank in range(shards.ranks)]
        flat = x.contiguous().view(torch.uint8).flatten()
        sizes = [rows * n * x.element_size() for n in tokens]
        parts = []
        for n, part in zip(tokens, self.exchange.all_gather("joined", flat, sizes), strict=True):
            shape[dim] = n
            parts.append(part.clone().view(x.dtype).view(shape))
        return shards.join(parts, dim)

    def _split_shards(self) -> Shards:
        if self.shards is None:
            raise RuntimeError(
                "context_parallel: the model runs before split(input_ids); expected its result as "
                "the model's arguments"
            )
        return self.shards

    def attend(
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
        """The attention function of all layers, as transformers calls it."""
        shards, config = self._split_shards(), self.config
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if not causal or dropout > 0 or kwargs.get("position_bias") is not None:
            raise NotImplementedError(
                f"context_parallel: {type(module).__name__} asks for attention that is not causal, "
                "dropout or a position bias; expected a decoder's attention, in eval mode"
            )
        if attention_mask is not None:  # of a layer with a window
            sliding_window = attention_mask.shape[1]
        layer_idx = getattr(module, "layer_idx", None)
        config = config.for_layer(layer_idx)
        if config.estimator_of(query.shape[-1]) == "bands":
            config = config_of_layer(module, query.shape[-1], config)
        sinks = None if s_aux is None else s_aux.float().contiguous()
        window_left = None if sliding_window is None else sliding_window - 1
        options = ScoreOptions(sinks, softcap, window_left)
        query, key, value = plan.computed(query, key, value)
        check_local(self.exchange, query, key, value, config, options, scaling, shards, 1)
        chosen = plan_of_sequence(shards, query, config, options)
        if self.config.is_dense_layer(layer_idx):
            chosen = plan.dense(chosen, "dense_layers")
        call = ContextCall(
            self.exchange, shards, chosen, config, options, scale=scaling, layer_idx=layer_idx
        )
        out, _, _ = call.run(query, key, value)
        return out.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def context_parallel(
    model: Any, group: Any, config: PrismConfig, layout: str
) -> Iterator[ContextParallel]:
    """See :func:`prism_cuda.distributed.context_parallel`."""
    if layout not in LAYOUTS:
        raise ValueError(
            f"context_parallel: layout is {layout!r}; expected one of {tuple(LAYOUTS)}"
        )
    context = ContextParallel(Exchange(group), config, layout)
    name = f"prism_context_parallel_{id(context)}"
    before = model.config._attn_implementation
    AttentionInterface.register(name, context.attend)
    AttentionMaskInterface.register(name, _mask)
    try:
        model.set_attn_implementation(name)
        yield context
    finally:
        model.set_attn_implementation(before)
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(name, None)


def _mask(
    *args: Any,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """None for causal layers, bool (1, window, 0) for those with a window."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise NotImplementedError(
            "context_parallel: attention_mask has padding; expected prompts of one length"
        )
    if local_size is not None:
        return torch.empty((1, local_size, 0), dtype=torch.bool)
    if mask_function is not causal_mask_function:
        raise NotImplementedError(
            "context_parallel: the model asks for a mask other than causal; expected the arguments "
            "that split(input_ids) gives, and no others that change the mask"
        )
    return None
