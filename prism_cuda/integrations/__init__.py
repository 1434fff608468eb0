"""Plugins that put Prism behind other libraries' attention interfaces."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from types import ModuleType
from typing import Any

from prism_cuda.config import PrismConfig, as_config


def register(config: PrismConfig | str | os.PathLike | None = None, name: str = "prism") -> None:
    """Make ``attn_implementation=name`` available to every transformers model.

    Args:
        config: settings for all models loaded under this name; bands come from each model's own
            RoPE configuration unless the config sets them. Register several names to use several
            configs; registering a name again replaces its config. Or the path of a file that
            :meth:`PrismConfig.load` reads, such as ``python -m prism_cuda tune`` writes.
        name: the key to pass as attn_implementation.

    Raises:
        ImportError: if transformers is not installed, or a version that is not supported.
    """
    if isinstance(config, (str, os.PathLike)):
        config = PrismConfig.load(config)
    _plugin().register(as_config("register", config), name)


def use_continuous_batching(model: Any, name: str = "prism") -> None:
    """Make ``model.generate_batch`` prefill with a registered name.

    Transformers accepts only its own names for continuous batching, so ``set_attn_implementation``
    does not do; it does switch the model back to anything else.

    Args:
        model: a transformers model; it and its submodels are switched.
        name: as given to :func:`register`.

    Raises:
        ImportError: if transformers is not installed, or a version that is not supported.
        ValueError: if the name is not registered.
    """
    _plugin().use_continuous_batching(model, name)


# The versions that tools/matrix.sh tests; as in pyproject.toml.
TRANSFORMERS = ((5, 17), (6, 0))


def _plugin() -> ModuleType:
    needed = "transformers >= {}.{} and < {}.{}".format(*TRANSFORMERS[0], *TRANSFORMERS[1])
    own = sys.modules["prism_cuda"].__version__
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"prism_cuda {own} needs {needed} for this: pip install 'prism-cuda[hf]'"
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if not TRANSFORMERS[0] <= version < TRANSFORMERS[1]:
        raise ImportError(f"prism_cuda {own} needs {needed}; this is transformers {found}")
    from prism_cuda.integrations import transformers as plugin

    return plugin
