"""Bands of a transformers attention layer, from its model's RoPE configuration."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import sys
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from prism_cuda import bands
from prism_cuda.bands import Bands, Layout
from prism_cuda.config import PrismConfig

# Hybrid models whose layers with full attention have no position embedding, by class name.
ROTATE_WINDOWED_ONLY = ("Cohere2", "Exaone4", "ExaoneMoe", "Flint")

Ranges = tuple[tuple[int, ...], tuple[int, ...]]

# By layer, then by head_dim and settings: a layer's frequencies do not change.
_ranges: WeakKeyDictionary[torch.nn.Module, dict[tuple[int, PrismConfig], tuple[Ranges, ...]]]
_ranges = WeakKeyDictionary()
_configs: WeakKeyDictionary[torch.nn.Module, dict[tuple[int, PrismConfig], PrismConfig]]
_configs = WeakKeyDictionary()


@torch.compiler.assume_constant_result
def _traced_ranges(module_id: int, head_dim: int, config_id: int) -> tuple[Ranges, ...]:
    """:func:`layer_ranges` of a module and config by their ids: before torch 2.12 compilers take
    neither for a constant. Both live as long as the graph, which is guarded by the ids."""
    module, config = (ctypes.cast(x, ctypes.py_object).value for x in (module_id, config_id))
    return layer_ranges(module, head_dim, config)


def layer_ranges(module: torch.nn.Module, head_dim: int, config: PrismConfig) -> tuple[Ranges, ...]:
    """high_ranges and low_ranges of :func:`layer_bands`, remembered; of all heads or of each.

    Plain tuples and not Bands, which a compiler cannot take as a constant.
    """
    of_layer = _ranges.setdefault(module, {})
    ranges = of_layer.get((head_dim, config))
    if ranges is None:
        # torch.export runs this with fake tensors, which have no values.
        with _disable_current_modes():
            found = layer_bands(module, head_dim, config)
        of_heads = found if isinstance(found, tuple) else (found,)
        ranges = tuple((bands.high_ranges, bands.low_ranges) for bands in of_heads)
        of_layer[head_dim, config] = ranges
    return ranges


def config_of_layer(module: torch.nn.Module, head_dim: int, config: PrismConfig) -> PrismConfig:
    """The settings of a layer with its bands spelt out, remembered; for compilers too."""
    if config.estimator_of(head_dim) != "bands":
        return config
    if torch.compiler.is_compiling():
        return _with_bands(config, _traced_ranges(id(module), head_dim, id(config)))
    of_layer = _configs.setdefault(module, {})
    known = of_layer.get((head_dim, config))
    if known is None:
        known = _with_bands(config, layer_ranges(module, head_dim, config))
        of_layer[head_dim, config] = known
    return known


def _with_bands(config: PrismConfig, ranges: tuple[Ranges, ...]) -> PrismConfig:
    of_heads = tuple(Bands(*own) for own in ranges)
    return config.with_bands(of_heads if config.bands_per_head() else of_heads[0])


def layer_bands(
    module: torch.nn.Module, head_dim: int, config: PrismConfig
) -> Bands | tuple[Bands, ...]:
    """The bands for one attention layer, of all heads or of each.

    Whatever ``config`` sets itself wins over the model.

    Raises:
        ValueError: if the model does not say how it rotates and ``config`` does not either.
    """
    choices = config.bands_per_head()
    if choices is not None:
        of_heads = (dataclasses.replace(config, bands=choice) for choice in choices)
        return tuple(cast(Bands, layer_bands(module, head_dim, one)) for one in of_heads)
    if isinstance(config.bands, Bands):
        return config.bands
    if not _rotates(module):
        # Without rotation nothing cancels: the whole head is one low band.
        return Bands((), (0, head_dim))
    layout = config.rope_layout or _layout(module)
    if config.bands != "auto" or config.inv_freq is not None or config.rope_theta is not None:
        return dataclasses.replace(config, rope_layout=layout).resolve_bands(head_dim)
    inv_freq = inverse_frequencies(module.config, head_dim, _layer_type(module))
    return bands.split(inv_freq, head_dim, max(config.block_sizes), layout)


def inverse_frequencies(
    model_config: Any, head_dim: int, layer_type: str | None = None
) -> torch.Tensor:
    """Radians per token of every RoPE pair, float32 (pairs,).

    Args:
        model_config: the transformers config of the (text) model; covers every rope_type that
            transformers knows (llama3, yarn, longrope, ...), partial rotary embedding, and M-RoPE,
            whose frequencies keep their order by pair.
        head_dim: dimensions of a head.
        layer_type: picks one entry where layers differ, such as Gemma's "full_attention".

    Raises:
        ValueError: if the config holds no RoPE base.
    """
    parameters = getattr(model_config, "rope_parameters", None) or {}
    per_layer = any(isinstance(value, dict) for value in parameters.values())
    if per_layer:
        parameters = parameters.get(layer_type) or {}
    if not parameters.get("rope_theta"):
        raise ValueError(
            f"prism: {type(model_config).__name__}.rope_parameters has no rope_theta"
            f"{f' for {layer_type} layers' if per_layer else ''}, so the bands cannot be derived; "
            "set PrismConfig(bands=...), PrismConfig(rope_theta=...) or PrismConfig(inv_freq=...)"
        )
    rope_type = parameters.get("rope_type", "default")
    if rope_type in ROPE_INIT_FUNCTIONS:
        kwargs = {"layer_type": layer_type} if per_layer else {}
        return ROPE_INIT_FUNCTIONS[rope_type](model_config, torch.device("cpu"), **kwargs)[0]
    rotary = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    exponent = torch.arange(0, rotary, 2, dtype=torch.float32) / rotary
    return parameters["rope_theta"] ** -exponent


def _layer_type(module: torch.nn.Module) -> str | None:
    """The layer's entry in config.layer_types, if its model has such a list."""
    layer_type = getattr(module, "layer_type", None)
    if layer_type is not None:
        return layer_type
    layer_types = getattr(module.config, "layer_types", None)
    layer_idx = getattr(module, "layer_idx", None)
    if not layer_types or layer_idx is None or layer_idx < 0:
        return None
    return layer_types[layer_idx]


def _rotates(module: torch.nn.Module) -> bool:
    """Whether the layer rotates its queries and keys at all."""
    if not getattr(module, "use_rope", True):
        return False
    if any(name in type(module).__name__ for name in ROTATE_WINDOWED_ONLY):
        windowed = "sliding_attention" in (getattr(module.config, "layer_types", None) or [])
        forced = getattr(module, "force_rope", False)
        return forced or not windowed or _layer_type(module) == "sliding_attention"
    if "rope" not in (getattr(module.config, "position_embedding_type", "rope") or "none"):
        return False
    parameters = getattr(module.config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        # One entry for every type of layers; None for those that do not rotate.
        layer_type = _layer_type(module)
        if layer_type in parameters and parameters[layer_type] is None:
            return False
    # Learned positions, ALiBi or none: such configs have no word of rotary embedding.
    return any("rope" in name or "rotary" in name for name in vars(module.config))


def _layout(module: torch.nn.Module) -> Layout:
    """The layout of the model's rotation, by asking its modeling file where dimensions go.

    Configs do not tell the layouts apart. A quarter turn maps (0, 1, 2, 3), up to signs, to
    (2, 3, 0, 1) in the half layout and to (1, 0, 3, 2) when interleaved.
    """
    turned: list[float] | None = None
    for layer_class in type(module).__mro__:
        modeling_file = sys.modules.get(layer_class.__module__)
        turned = turned or _quarter_turn(modeling_file)
    layouts: dict[tuple[float, ...], Layout] = {(2, 3, 0, 1): "half", (1, 0, 3, 2): "interleaved"}
    layout = layouts.get(tuple(abs(value) for value in turned or ()))
    if layout is None:
        raise ValueError(
            f"prism: cannot tell how {type(module).__name__} pairs rotary dimensions; "
            "set PrismConfig(rope_layout='half') or PrismConfig(rope_layout='interleaved')"
        )
    return layout


def _quarter_turn(modeling_file: Any) -> list[float] | None:
    """(0, 1, 2, 3) turned by 90 degrees by a modeling file's own functions, if it has any."""
    x = torch.arange(4.0)
    rotate_half = getattr(modeling_file, "rotate_half", None)
    if rotate_half is not None:
        return rotate_half(x.view(1, 4)).flatten().tolist()
    head = x.view(1, 1, 1, 4)
    rotate_pairs = getattr(modeling_file, "rotate_every_two", None)
    if rotate_pairs is not None:
        return rotate_pairs(head).flatten().tolist()
    by_angle = getattr(modeling_file, "apply_rotary_pos_emb", None)
    by_complex = getattr(modeling_file, "apply_rotary_emb", None)
    cos, sin = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)  # one angle for each of the two pairs
    # A file with functions of another kind does not fit the calls, and tells nothing.
    with contextlib.suppress(RuntimeError, TypeError, ValueError):
        if by_angle is not None:
            return by_angle(head, head, cos, sin)[0].flatten().tolist()
        if by_complex is not None:
            return by_complex(head, head, torch.complex(cos, sin))[0].flatten().tolist()
    return None
