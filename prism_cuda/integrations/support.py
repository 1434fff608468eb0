"""What prism refuses, by name: model classes, names to register, arguments of attention."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

# Arguments that reach attention functions and do not change attention, or that other arguments say
# again: positions are in the rotated queries, lengths of sequences in the mask.
HARMLESS = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "logits_indices",
        "logits_processor_args",
        "max_length_k",
        "max_length_q",
        "mm_token_type_ids",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "read_index",
        "seq_idx",
        "token_type_ids",
        "use_cache",
        "write_index",
    }
)

UNSUPPORTED = {
    "block_table": "a block table, which prism does not read; set "
    "ContinuousBatchingConfig(max_blocks_per_request=0)",
    "cache": "an argument cache, by which transformers before 5.24 means continuous batching, "
    "which prism supports from 5.24 on; a model's own cache is past_key_values there",
}


def check_name(name: str) -> None:
    """Refuse names that transformers would not take for an attention function of ours.

    Raises:
        ValueError: naming what is wrong.
    """
    # Parts that make transformers look for other libraries, and its own names.
    free = isinstance(name, str) and not re.search(
        r"flash|sdpa|flex_attention|[/|]|^eager$|^$", name
    )
    if free:
        return
    raise ValueError(
        f"prism_cuda: name is {name!r}; expected a string without 'flash', 'sdpa', "
        "'flex_attention', '/' and '|', which transformers reads as something else, and not 'eager'"
    )


def watch(is_ours: Callable[[str], bool]) -> None:
    """Have :func:`implementation_of` asked wherever transformers gives a model its implementation.

    Transformers checks its own implementations there (PreTrainedModel's
    get_correct_attn_implementation), and has no place where others could register a check.
    """
    original = PreTrainedModel.get_correct_attn_implementation
    if hasattr(original, "prism_watches"):
        return

    @functools.wraps(original)
    def checked(self: PreTrainedModel, *args: Any, **kwargs: Any) -> str:
        name = original(self, *args, **kwargs)
        return implementation_of(self, name) if is_ours(name) else name

    checked.prism_watches = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = checked  # type: ignore[method-assign]


def implementation_of(model: PreTrainedModel, name: str) -> str:
    """The implementation for a model that is asked to run with ``name``, one of ours.

    Raises:
        NotImplementedError: if its class does not attend through transformers' interface.
    """
    model_class = type(model)
    tower = not (model_class.can_generate() or hasattr(model.config, "vocab_size"))
    tower = tower and not model.config.sub_configs
    if tower and (_has_table(model_class) or why_unsupported(model_class)):
        # The images or sounds of another model are seen as a whole: nothing would be sparse.
        return "sdpa" if model_class._supports_sdpa else "eager"
    reason = why_unsupported(model_class)
    if reason is None:
        return name
    raise NotImplementedError(
        f"prism: {model_class.__name__} {reason}; load the model with another attn_implementation"
    )


def why_unsupported(model_class: type[PreTrainedModel]) -> str | None:
    """Why a model class would not attend by an attention function that is registered, or None."""
    if _has_table(model_class) and not model_class._can_set_attn_implementation():
        return (
            "chooses its attention from a table of its own and not through transformers' "
            "attention interface"
        )
    if not (model_class._supports_sdpa or model_class._supports_attention_backend):
        return (
            "has neither _supports_sdpa nor _supports_attention_backend: it does not attend "
            "through transformers' attention interface, or does not hold to its masks"
        )
    return None


def _has_table(model_class: type[PreTrainedModel]) -> bool:
    """Whether the modeling file keeps classes by the names of implementations."""
    names = vars(sys.modules[model_class.__module__])
    return any(
        isinstance(table, dict) and isinstance(table.get("eager"), type) for table in names.values()
    )


def check_arguments(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse what would change attention and is not known here.

    Args:
        kwargs: arguments of an attention function that it does not take by itself.

    Raises:
        NotImplementedError: naming the layer and the argument.
    """
    for argument, feature in UNSUPPORTED.items():
        if kwargs.get(argument) is not None:
            raise NotImplementedError(f"prism: {type(module).__name__} uses {feature}")
    for argument, value in kwargs.items():
        if argument not in HARMLESS and _holds_tensor(value):
            raise NotImplementedError(
                f"prism: {type(module).__name__} passes {argument!r} to its attention, which prism "
                "does not know; load the model with another attn_implementation"
            )


def _holds_tensor(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, torch.Tensor)
