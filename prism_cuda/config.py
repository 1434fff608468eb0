"""PrismConfig: every setting of the method, validated and brought to one form where it is made."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch

from prism_cuda import bands as _bands
from prism_cuda.bands import LAYOUTS, Bands, Layout

BandsChoice = Literal["auto"] | tuple[int, int] | Bands

# The largest head_dim, a multiple of 8, that blocks are estimated for, by the name of the
# estimator. register_estimator adds to it.
MAX_HEAD_DIM = {"auto": 256, "grid": 128, "bands": 256}
BLOCK_SIZES = ((128, 128), (64, 64), (128, 64))

# Used only where neither the caller nor a model says which frequencies the heads rotate with.
DEFAULT_ROPE_THETA = 1e6

# What PrismConfig.layers may change. The others decide which mask a whole model gets.
LAYER_FIELDS = (
    "estimator",
    "top_p",
    "keep_above",
    "bands",
    "keep_sink",
    "keep_recent",
    "dense_heads",
)


@dataclass(frozen=True)
class PrismConfig:
    """Settings of block selection and of the dense fallback.

    Numbers may be numpy's or torch's, sequences lists, tuples, arrays or tensors, and layer indices
    strings, as JSON has them: ``PrismConfig(**json.loads(text))`` works with what
    :meth:`to_dict` or ``dataclasses.asdict`` gave.

    Attributes:
        block_size: tokens per block, 128 or 64, or a (query, key) pair; (128, 64) is the one mixed
            pair, and what docs/quality.md measures the grid with.
        estimator: "bands" scores pooled blocks in two RoPE frequency bands (Prism). "grid" scores
            means of 16 queries and 16 keys over the full width, and keeps what any 16 queries of a
            block look at: much sparser at equal quality, needs no bands and works without RoPE, and
            takes longer; see docs/quality.md. "auto" is "bands" where ``bands`` sets them, heads
            have more than 128 dimensions or :func:`prefill_varlen` has float8 keys, and "grid"
            everywhere else. Or a name given to :func:`prism_cuda.register_estimator`.
        top_p: probability mass each band, or the grid, keeps per query block, in [0, 1]. The one
            quality knob: higher keeps more blocks; 1 keeps all. A sequence gives one value per
            query head.
        keep_above: blocks of at least this probability are kept as well, in (0, 1]. None keeps no
            more than top_p does by bands, and means (1 - top_p) / 10 on the grid.
        bands: "auto" splits the head by the RoPE frequencies; (high, low) sets the number of
            dimensions of each band; a :class:`~prism_cuda.bands.Bands` sets them one by one. A
            sequence gives one of these per query head.
        rope_theta: RoPE base for bands="auto". None takes the model's, or 1e6 without a model.
        inv_freq: inverse frequencies for bands="auto", radians per token; wins over rope_theta.
        rope_layout: which dimensions rotate together: "half" (j, j + d/2) or "interleaved"
            (2j, 2j + 1). None takes the model's, or "half" without a model.
        keep_sink: leading key blocks every query block keeps.
        keep_recent: key blocks kept up to the query block's own, itself included.
        dense_below: sequences with fewer keys use dense attention, which is cheaper there. The
            default is where bench/prefill.py saw both take equally long on an H200, by bands.
        dense_heads: query heads that keep every block, whatever top_p says.
        dense_layers: layers of a model that run dense: the first n of them, or a collection of
            layer indices. Like ``layers``, for models only: calls from Python have no layer.
        layers: settings of single layers, {layer index: {field: value}}; fields are
            estimator, top_p, keep_above, bands, keep_sink, keep_recent and dense_heads.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    block_size: int | Sequence[int] = (128, 64)
    estimator: str = "auto"
    top_p: float | Sequence[float] | torch.Tensor = 0.95
    keep_above: float | None = None
    bands: BandsChoice | Sequence[BandsChoice] = "auto"
    rope_theta: float | None = None
    inv_freq: Sequence[float] | torch.Tensor | None = None
    rope_layout: Layout | None = None
    keep_sink: int = 1
    keep_recent: int = 1
    dense_below: int = 2304
    dense_heads: Iterable[int] = ()
    dense_layers: int | Iterable[int] = 0
    layers: Mapping[int, Mapping[str, Any]] | Sequence = ()

    _hash: ClassVar[int]

    def __post_init__(self) -> None:
        for name, (convert, allowed) in _FIELDS.items():
            value = getattr(self, name)
            try:
                converted = convert(value)
            except (TypeError, ValueError, OverflowError):
                raise ValueError(
                    f"PrismConfig: {name} is {value!r}; expected {allowed()}"
                ) from None
            object.__setattr__(self, name, converted)
        if self.layers:
            object.__setattr__(self, "layers", self._checked_layers())

    def _checked_layers(self) -> tuple:
        """``layers`` with every value in the form that its field has."""
        checked = []
        for layer, fields in self._layer_fields():
            for name, _ in fields:
                if name not in LAYER_FIELDS:
                    raise ValueError(
                        f"PrismConfig: layers[{layer}] sets {name!r}; expected {LAYER_FIELDS}"
                    )
            try:
                own = dataclasses.replace(self, layers=(), **dict(fields))
            except ValueError as error:
                raise ValueError(f"PrismConfig: layers[{layer}] is wrong: {error}") from error
            checked.append((layer, tuple((name, getattr(own, name)) for name, _ in fields)))
        return tuple(checked)

    def with_bands(self, bands: Bands | tuple[Bands, ...]) -> PrismConfig:
        """The same settings with these bands.

        Without making the others anew, which they need not and compilers cannot.
        """
        twin = object.__new__(PrismConfig)
        for name in _FIELDS:
            object.__setattr__(twin, name, bands if name == "bands" else getattr(self, name))
        return twin

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:  # computed once: every call looks things up by its config
            known = hash(tuple(getattr(self, name) for name in _FIELDS))
            object.__setattr__(self, "_hash", known)
            return known

    def __getstate__(self) -> dict[str, Any]:
        # Another process hashes strings otherwise.
        return {name: getattr(self, name) for name in _FIELDS}

    def to_dict(self) -> dict[str, Any]:
        """The settings in JSON's types; ``PrismConfig(**settings)`` is this config."""
        settings = {name: _to_json(getattr(self, name)) for name in _FIELDS}
        settings["layers"] = {
            str(layer): {name: _to_json(value) for name, value in fields}
            for layer, fields in self._layer_fields()
        }
        return settings

    def save(self, path: str | os.PathLike) -> None:
        """Write the settings as a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> PrismConfig:
        """The settings of a JSON file, such as :meth:`save` writes; what it leaves out is default.

        Raises:
            ValueError: naming the file, if it holds no JSON object or a setting that is not one.
        """
        try:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"PrismConfig.load: {path} is not JSON: {error}") from error
        if not isinstance(settings, dict):
            kind = type(settings).__name__
            raise ValueError(f"PrismConfig.load: {path} holds a {kind}; expected an object")
        unknown = sorted(settings.keys() - _FIELDS.keys())
        if unknown:
            raise ValueError(
                f"PrismConfig.load: {path} sets {', '.join(unknown)}; expected {tuple(_FIELDS)}"
            )
        return cls(**settings)

    def _layer_fields(self) -> tuple[tuple[int, tuple[tuple[str, Any], ...]], ...]:
        """``layers`` in the form that making the config gives it."""
        return cast(Any, self.layers)

    def bands_per_head(self) -> tuple[BandsChoice, ...] | None:
        """The choice of every query head; None where one is made for all of them."""
        one = self.bands == "auto" or isinstance(self.bands, Bands) or _is_pair(self.bands)
        return None if one else cast(Any, self.bands)

    @property
    def block_sizes(self) -> tuple[int, int]:
        """(q_block_size, k_block_size)."""
        if isinstance(self.block_size, int):
            return self.block_size, self.block_size
        return cast(Any, self.block_size)

    def for_layer(self, layer: int | None) -> PrismConfig:
        """The settings of one layer of a model; of a call without a layer if None."""
        for index, fields in self._layer_fields():
            if index == layer:
                return dataclasses.replace(self, layers=(), dense_layers=0, **dict(fields))
        return self

    def own_layers(self) -> list[int]:
        """The layers with settings of their own."""
        return [layer for layer, _ in self._layer_fields()]

    def is_dense_layer(self, layer: int | None) -> bool:
        """Whether ``dense_layers`` names the layer.

        Layers that have no number of their own, None or -1 as models write it, are not named.
        """
        if layer is None or layer < 0:
            return False
        if isinstance(self.dense_layers, int):
            return layer < self.dense_layers
        return layer in self.dense_layers

    def top_p_of_heads(self, q_heads: int) -> float | tuple[float, ...]:
        """One top_p for all query heads, or where they differ one for each of the ``q_heads``.

        Raises:
            ValueError: if top_p or dense_heads do not fit the number of heads.
        """
        if isinstance(self.top_p, float):
            if not self.dense_heads:
                return self.top_p
            values = [self.top_p] * q_heads
        else:
            values = list(cast(Any, self.top_p))
        if len(values) != q_heads:
            raise ValueError(
                f"PrismConfig: top_p has {len(values)} values; expected one number or {q_heads}, "
                "one per query head"
            )
        for head in self.dense_heads:
            if head >= q_heads:
                raise ValueError(
                    f"PrismConfig: dense_heads names head {head}; expected less than {q_heads}, "
                    "the number of query heads"
                )
            values[head] = 1.0
        return values[0] if len(set(values)) == 1 else tuple(values)

    def estimator_of(self, head_dim: int, fp8_keys: bool = False) -> str:
        """``estimator``, resolved for heads of ``head_dim`` dimensions."""
        if self.estimator != "auto":
            return self.estimator
        no_grid = self.bands != "auto" or fp8_keys or head_dim > MAX_HEAD_DIM["grid"]
        return "bands" if no_grid else "grid"

    def threshold(self, top_p: float, estimator: str) -> float | None:
        """keep_above, resolved for heads of this top_p: blocks of at least this probability are
        kept; None for no such rule."""
        if self.keep_above is None and estimator == "grid" and top_p < 1:
            return (1 - top_p) / 10
        return self.keep_above

    def resolve_bands(self, head_dim: int) -> Bands | tuple[Bands, ...]:
        """The bands for heads of ``head_dim`` dimensions: of all, or where they differ of each.

        Raises:
            ValueError: if the configured bands do not fit head_dim.
        """
        choices = self.bands_per_head()
        if choices is None:
            return self._resolve_bands(cast(Any, self.bands), head_dim)
        return tuple(self._resolve_bands(choice, head_dim) for choice in choices)

    def _resolve_bands(self, choice: BandsChoice, head_dim: int) -> Bands:
        layout = self.rope_layout or "half"
        if isinstance(choice, Bands):
            return choice
        if isinstance(choice, tuple):
            high, low = choice
            return _bands.from_dims(high, low, head_dim, layout)
        # The larger block cancels first, and a pair cancelled on either side scores nothing.
        block_size = max(self.block_sizes)
        if self.inv_freq is not None:
            return _bands.split(self.inv_freq, head_dim, block_size, layout)
        return _bands.split(self.rope_theta or DEFAULT_ROPE_THETA, head_dim, block_size, layout)


def _plain(value: Any) -> Any:
    """Python's own numbers and lists for those of numpy and torch."""
    return value.tolist() if hasattr(value, "tolist") else value


def _items(value: Any) -> list:
    value = _plain(value)
    if isinstance(value, (str, bytes, Mapping)):
        raise TypeError
    return list(value)


def _whole(value: Any) -> int:
    """An integer >= 0."""
    value = _plain(value)
    if isinstance(value, bool):
        raise TypeError
    value = operator.index(value)
    if value < 0:
        raise ValueError
    return value


def _real(value: Any) -> float:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
        raise TypeError
    return float(value)


def _require(valid: bool) -> None:
    if not valid:
        raise ValueError


def _block_size(value: Any) -> int | tuple[int, int]:
    value = _plain(value)
    if hasattr(value, "__index__"):
        size: Any = _whole(value)
        _require((size, size) in BLOCK_SIZES)
    else:
        size = tuple(_whole(item) for item in _items(value))
        _require(size in BLOCK_SIZES)
    return size


def _estimator(value: Any) -> str:
    _require(isinstance(value, str) and value in MAX_HEAD_DIM)
    return value


def _probability(value: Any) -> float:
    number = _real(value)
    _require(0 <= number <= 1)
    return number


def _top_p(value: Any) -> float | tuple[float, ...]:
    value = _plain(value)
    if isinstance(value, numbers.Real):
        return _probability(value)
    values = tuple(_probability(item) for item in _items(value))
    _require(len(values) > 0)
    return values


def _keep_above(value: Any) -> float | None:
    if value is None:
        return None
    number = _probability(value)
    _require(number > 0)
    return number


def _is_pair(value: Any) -> bool:
    return len(value) == 2 and all(hasattr(item, "__index__") for item in value)


def _bands_choice(value: Any) -> BandsChoice:
    value = _plain(value)
    if isinstance(value, str):
        _require(value == "auto")
        return "auto"
    if isinstance(value, Bands):
        value = {"high_ranges": value.high_ranges, "low_ranges": value.low_ranges}
    if isinstance(value, Mapping):  # as dataclasses.asdict writes Bands
        _require(value.keys() == {"high_ranges", "low_ranges"})
        high, low = (_items(value[name]) for name in ("high_ranges", "low_ranges"))
        return Bands(tuple(_whole(dim) for dim in high), tuple(_whole(dim) for dim in low))
    pair = _items(value)
    _require(_is_pair(pair))
    return _whole(pair[0]), _whole(pair[1])


def _bands_field(value: Any) -> BandsChoice | tuple[BandsChoice, ...]:
    value = _plain(value)
    if isinstance(value, (str, Bands, Mapping)) or _is_pair(_items(value)):
        return _bands_choice(value)
    choices = tuple(_bands_choice(choice) for choice in _items(value))
    _require(len(choices) > 0)
    return choices


def _rope_theta(value: Any) -> float | None:
    if value is None:
        return None
    number = _real(value)
    _require(number > 1)
    return number


def _inv_freq(value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    frequencies = tuple(_real(item) for item in _items(value))
    _require(len(frequencies) > 0)
    return frequencies


def _rope_layout(value: Any) -> Layout | None:
    _require(value is None or (isinstance(value, str) and value in LAYOUTS))
    return value


def _indices(value: Any) -> tuple[int, ...]:
    return tuple(sorted({_whole(item) for item in _items(value)}))


def _dense_layers(value: Any) -> int | tuple[int, ...]:
    value = _plain(value)
    return _whole(value) if hasattr(value, "__index__") else _indices(value)


def _layers(value: Any) -> tuple:
    """(layer, ((field, value), ...)) by layer and field; pairs as asdict and JSON leave them."""
    pairs = value.items() if isinstance(value, Mapping) else [tuple(_items(x)) for x in value]
    layers: dict[int, dict[str, Any]] = {}
    for layer, fields in pairs:
        index = int(layer) if isinstance(layer, str) and layer.isdecimal() else _whole(layer)
        _require(not isinstance(fields, str))
        layers[index] = dict(fields)
    return tuple((layer, tuple(sorted(layers[layer].items()))) for layer in sorted(layers))


def _to_json(value: Any) -> Any:
    if isinstance(value, Bands):
        return {"high_ranges": list(value.high_ranges), "low_ranges": list(value.low_ranges)}
    return [_to_json(item) for item in value] if isinstance(value, tuple) else value


def _say(text: str) -> Callable[[], str]:
    return lambda: text


_AT_LEAST_0 = _say("an integer >= 0")

# By field: what brings a value to its one form, or raises, and what is allowed.
_FIELDS: dict[str, tuple[Callable[[Any], Any], Callable[[], str]]] = {
    "block_size": (_block_size, _say(f"64, 128 or one of {BLOCK_SIZES}")),
    "estimator": (
        _estimator,
        lambda: f"one of {tuple(MAX_HEAD_DIM)}, or a name given to register_estimator",
    ),
    "top_p": (_top_p, _say("a number in [0, 1], or one per query head")),
    "keep_above": (_keep_above, _say("None or a number above 0 and up to 1")),
    "bands": (
        _bands_field,
        _say("'auto', (high, low) dimensions, a Bands, or one per query head"),
    ),
    "rope_theta": (_rope_theta, _say("None or a number above 1")),
    "inv_freq": (_inv_freq, _say("None or a non-empty 1-D sequence")),
    "rope_layout": (_rope_layout, _say(f"None or one of {LAYOUTS}")),
    "keep_sink": (_whole, _AT_LEAST_0),
    "keep_recent": (_whole, _AT_LEAST_0),
    "dense_below": (_whole, _AT_LEAST_0),
    "dense_heads": (_indices, _say("a collection of query head indices >= 0")),
    "dense_layers": (_dense_layers, _say("a number of layers, or layer indices >= 0")),
    "layers": (_layers, _say("{layer index: {field: value}}")),
}

DEFAULT = PrismConfig()


def as_config(function: str, config: PrismConfig | None) -> PrismConfig:
    """The default settings for None.

    Raises:
        TypeError: for anything but None and a PrismConfig.
    """
    if config is None:
        return DEFAULT
    if not isinstance(config, PrismConfig):
        raise TypeError(
            f"{function}: config is {config!r}; expected a PrismConfig or None (settings in a dict "
            "become one by PrismConfig(**settings))"
        )
    return config
