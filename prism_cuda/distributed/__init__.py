"""Prefill over several processes, on torch.distributed; see docs/distributed.md."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from prism_cuda.config import PrismConfig, as_config
from prism_cuda.distributed.exchange import Exchange, Traffic
from prism_cuda.distributed.prefill import context_parallel_prefill
from prism_cuda.distributed.shards import Shards, Stretch, contiguous, from_lengths, zigzag


def context_parallel(
    model: Any,
    group: Any = None,
    *,
    config: PrismConfig | None = None,
    layout: str = "zigzag",
) -> AbstractContextManager[Any]:
    """Within the block a transformers model prefills a prompt over the ranks of a group.

    ::

        with context_parallel(model, group) as context:
            logits = context.join(model(**context.split(input_ids), use_cache=False).logits)

    Every rank has the whole model. Attention exchanges keys, everything else is local. Prompts have
    no padding, and there is no cache to continue from.

    Args:
        model: a causal language model of transformers >= 5, in eval mode.
        group: as for :func:`context_parallel_prefill`.
        config: settings, as for :func:`prism_cuda.register`.
        layout: "zigzag" gives every rank an early and a late stretch, so that all have as much to
            do; "contiguous" one stretch.

    Raises:
        ImportError: if transformers >= 5 is not installed.
    """
    try:
        from prism_cuda.distributed import transformers as plugin
    except ImportError as error:
        raise ImportError(
            "prism_cuda needs transformers >= 5 for this: pip install 'prism-cuda[hf]'"
        ) from error
    return plugin.context_parallel(model, group, as_config("context_parallel", config), layout)


__all__ = [
    "Exchange",
    "Shards",
    "Stretch",
    "Traffic",
    "context_parallel",
    "context_parallel_prefill",
    "contiguous",
    "from_lengths",
    "zigzag",
]
