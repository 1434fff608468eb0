"""What vLLM does not tell a layer's attention: its index, and how the model rotates its keys."""

from __future__ import annotations

import importlib
import re
from types import SimpleNamespace
from typing import Any

from prism_cuda.config import PrismConfig

_AFTER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?=\.|$)")
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def layer_index(name: str) -> int | None:
    """The index in a layer's name, such as 7 of "model.layers.7.self_attn.attn"; None if unclear.

    Of several numbers it is the last that follows a list of layers: experts and towers come after
    and before.
    """
    found = _AFTER.findall(name)
    if found:
        return int(found[-1])
    numbers = _NUMBER.findall(name)
    return int(numbers[0]) if len(numbers) == 1 else None


def config_of_layer(
    config: PrismConfig, model_config: Any, index: int | None, head_dim: int
) -> PrismConfig:
    """The settings of one layer, its bands spelt out where it is estimated by bands.

    Args:
        model_config: the transformers config of the text model.

    Raises:
        ValueError: if the bands are needed and neither the settings nor the model say them.
    """
    own = config.for_layer(index)
    if own.estimator_of(head_dim) != "bands":
        return own
    from prism_cuda.integrations import rope  # imports transformers, which vLLM has loaded

    bands = rope.layer_bands(_stand_in(model_config, index), head_dim, own)
    return own.with_bands(bands)


def _stand_in(model_config: Any, index: int | None) -> Any:
    """What rope.py asks a layer of transformers, from the config alone.

    vLLM has layers of its own, that pair dimensions as those of transformers do: the file that
    defines them is next to the config's.
    """
    config_class = type(model_config)
    module = config_class.__module__.replace("configuration_", "modeling_")
    try:
        importlib.import_module(module)
    except ImportError:  # rope.py then asks for rope_layout
        module = __name__
    name = config_class.__name__.removesuffix("Config").removesuffix("Text") + "Attention"
    stand_in = type(name, (SimpleNamespace,), {"__module__": module})
    layer = stand_in(config=model_config, layer_idx=index)
    rotating = getattr(model_config, "no_rope_layers", None)  # 1 where a layer does rotate
    if rotating and index is not None:
        layer.use_rope = bool(rotating[index])
    return layer
