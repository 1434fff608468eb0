"""Plugins that put Prism behind other libraries' attention interfaces."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from prism_cuda.config import PrismConfig, as_config


def register(config: PrismConfig | None = None, name: str = "prism") -> None:
    """Make ``attn_implementation=name`` available to every transformers model.

    Args:
        config: settings for all models loaded under this name; bands come from each model's own
            RoPE configuration unless the config sets them. Register several names to use several
            configs; registering a name again replaces its config.
        name: the key to pass as attn_implementation.

    Raises:
        ImportError: if transformers >= 5 is not installed.
    """
    _plugin().register(as_config("register", config), name)


def use_continuous_batching(model: Any, name: str = "prism") -> None:
    """Make ``model.generate_batch`` prefill with a registered name.

    Transformers accepts only its own names for continuous batching, so ``set_attn_implementation``
    does not do; it does switch the model back to anything else.

    Args:
        model: a transformers model; it and its submodels are switched.
        name: as given to :func:`register`.

    Raises:
        ImportError: if transformers >= 5 is not installed.
        ValueError: if the name is not registered.
    """
    _plugin().use_continuous_batching(model, name)


def _plugin() -> ModuleType:
    try:
        from prism_cuda.integrations import transformers as plugin
    except ImportError as error:
        raise ImportError(
            "prism_cuda needs transformers >= 5 for this: pip install 'prism-cuda[hf]'"
        ) from error
    return plugin
