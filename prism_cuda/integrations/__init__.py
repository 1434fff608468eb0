"""Plugins that put Prism behind other libraries' attention interfaces."""

from __future__ import annotations

from prism_cuda.config import PrismConfig


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
    try:
        from prism_cuda.integrations import transformers as plugin
    except ImportError as error:
        raise ImportError(
            "prism_cuda.register needs transformers >= 5: pip install 'prism-cuda[hf]'"
        ) from error
    plugin.register(config or PrismConfig(), name)
