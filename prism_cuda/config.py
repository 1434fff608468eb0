"""PrismConfig: every setting of the method, validated where it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from prism_cuda import bands as _bands
from prism_cuda.bands import LAYOUTS, Bands, Layout

BandsChoice = Literal["auto"] | tuple[int, int] | Bands

Estimator = Literal["bands", "grid"]

ESTIMATORS = ("auto", "grid", "bands")
# Of the heads that blocks are estimated for: multiples of 8.
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

    Attributes:
        block_size: tokens per block, 128 or 64, or a (query, key) pair; (128, 64) is the one mixed
            pair, and what docs/quality.md measures the grid with.
        estimator: "bands" scores pooled blocks in two RoPE frequency bands (Prism). "grid" scores
            means of 16 queries and 16 keys over the full width, and keeps what any 16 queries of a
            block look at: much sparser at equal quality, needs no bands and works without RoPE, and
            takes longer; see docs/quality.md. "auto" is "bands" where ``bands`` sets them, heads
            have more than 128 dimensions or :func:`prefill_varlen` has float8 keys, and "grid"
            everywhere else.
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

    block_size: int | tuple[int, int] = (128, 64)
    estimator: Literal["auto", "grid", "bands"] = "auto"
    top_p: float | Sequence[float] = 0.95
    keep_above: float | None = None
    bands: BandsChoice | Sequence[BandsChoice] = "auto"
    rope_theta: float | None = None
    inv_freq: Sequence[float] | torch.Tensor | None = None
    rope_layout: Layout | None = None
    keep_sink: int = 1
    keep_recent: int = 1
    dense_below: int = 2304
    dense_heads: Sequence[int] = ()
    dense_layers: int | Sequence[int] = 0
    layers: Mapping[int, Mapping[str, Any]] | tuple = ()

    def __post_init__(self) -> None:
        sizes = ", ".join(str(pair) for pair in BLOCK_SIZES)
        self._check("block_size", self.block_sizes in BLOCK_SIZES, f"64, 128 or one of {sizes}")
        self._check("estimator", self.estimator in ESTIMATORS, f"one of {ESTIMATORS}")
        self._check("top_p", self._top_p_valid(), "a number in [0, 1], or one per query head")
        above_valid = self.keep_above is None or 0 < self.keep_above <= 1
        self._check("keep_above", above_valid, "None or a number above 0 and up to 1")
        bands_valid = _bands_choice(self.bands) or self._bands_per_head_valid()
        self._check(
            "bands", bands_valid, "'auto', (high, low) dimensions, a Bands, or one per query head"
        )
        theta_valid = self.rope_theta is None or self.rope_theta > 1
        self._check("rope_theta", theta_valid, "None or a number above 1")
        layout_valid = self.rope_layout is None or self.rope_layout in LAYOUTS
        self._check("rope_layout", layout_valid, f"None or one of {LAYOUTS}")
        for name in ("keep_sink", "keep_recent", "dense_below"):
            value = getattr(self, name)
            self._check(name, isinstance(value, int) and value >= 0, "an integer >= 0")
        if self.inv_freq is not None:
            # A tuple keeps the config hashable and free of device memory.
            frequencies = tuple(float(freq) for freq in self.inv_freq)
            object.__setattr__(self, "inv_freq", frequencies)
            self._check("inv_freq", len(frequencies) > 0, "None or a non-empty 1-D sequence")
        heads_valid = isinstance(self.dense_heads, _COLLECTIONS) and _indices(self.dense_heads)
        self._check("dense_heads", heads_valid, "a collection of query head indices >= 0")
        layers_valid = _index(self.dense_layers) or (
            isinstance(self.dense_layers, _COLLECTIONS) and _indices(self.dense_layers)
        )
        self._check("dense_layers", layers_valid, "a number of layers, or layer indices >= 0")
        self._check("layers", self._layers_valid(), "{layer index: {field: value}}")
        self._make_hashable()
        for layer, fields in self._layer_fields():
            for name, _ in fields:
                if name not in LAYER_FIELDS:
                    raise ValueError(
                        f"PrismConfig: layers[{layer}] sets {name!r}; expected {LAYER_FIELDS}"
                    )
            try:
                self.for_layer(layer)
            except ValueError as error:
                raise ValueError(f"PrismConfig: layers[{layer}] is wrong: {error}") from error

    def _make_hashable(self) -> None:
        """Replace collections by sorted tuples."""
        if not isinstance(self.top_p, (int, float)):
            object.__setattr__(self, "top_p", _hashable(self.top_p))
        if self.bands_per_head() is not None:
            object.__setattr__(self, "bands", _hashable(self.bands))
        object.__setattr__(self, "dense_heads", tuple(sorted(set(self.dense_heads))))
        if not isinstance(self.dense_layers, int):
            object.__setattr__(self, "dense_layers", tuple(sorted(set(self.dense_layers))))
        if isinstance(self.layers, Mapping):
            layers = [
                (layer, tuple((name, _hashable(value)) for name, value in sorted(fields.items())))
                for layer, fields in sorted(self.layers.items())
            ]
            object.__setattr__(self, "layers", tuple(layers))

    def _layer_fields(self) -> tuple[tuple[int, tuple[tuple[str, Any], ...]], ...]:
        """``layers`` in the form that :meth:`_make_hashable` gives it."""
        return cast(Any, self.layers)

    def _top_p_valid(self) -> bool:
        values = self.top_p.tolist() if isinstance(self.top_p, torch.Tensor) else self.top_p
        if isinstance(values, Sequence):
            return len(values) > 0 and all(_probability(p) for p in values)
        return _probability(values)

    def _layers_valid(self) -> bool:
        if isinstance(self.layers, Mapping):
            items = self.layers.items()
            return all(_index(layer) and isinstance(fields, Mapping) for layer, fields in items)
        return isinstance(self.layers, tuple) and all(
            isinstance(item, tuple) and len(item) == 2 and _index(item[0]) for item in self.layers
        )  # as dataclasses.replace passes it on

    def _check(self, field: str, valid: bool, allowed: str) -> None:
        if not valid:
            value = getattr(self, field)
            raise ValueError(f"PrismConfig: {field} is {value!r}; expected {allowed}")

    def _bands_per_head_valid(self) -> bool:
        choices = self.bands
        if isinstance(choices, str) or not isinstance(choices, Sequence):
            return False
        return len(choices) > 0 and all(_bands_choice(choice) for choice in choices)

    def bands_per_head(self) -> tuple[BandsChoice, ...] | None:
        """The choice of every query head; None where one is made for all of them."""
        return None if _bands_choice(self.bands) else tuple(cast(Any, self.bands))

    @property
    def block_sizes(self) -> tuple[int, int]:
        """(q_block_size, k_block_size)."""
        if isinstance(self.block_size, int):
            return self.block_size, self.block_size
        return self.block_size

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
        """Whether ``dense_layers`` names the layer."""
        if layer is None:
            return False
        if isinstance(self.dense_layers, int):
            return layer < self.dense_layers
        return layer in self.dense_layers

    def top_p_of_heads(self, q_heads: int) -> float | tuple[float, ...]:
        """One top_p for all query heads, or where they differ one for each of the ``q_heads``.

        Raises:
            ValueError: if top_p or dense_heads do not fit the number of heads.
        """
        if isinstance(self.top_p, (int, float)):
            values = [float(self.top_p)] * q_heads
        else:
            values = list(self.top_p)
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

    def estimator_of(self, head_dim: int, fp8_keys: bool = False) -> Estimator:
        """``estimator``, resolved for heads of ``head_dim`` dimensions."""
        if self.estimator != "auto":
            return self.estimator
        no_grid = self.bands != "auto" or fp8_keys or head_dim > MAX_HEAD_DIM["grid"]
        return "bands" if no_grid else "grid"

    def threshold(self, top_p: float, estimator: Estimator) -> float | None:
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


_COLLECTIONS = (Sequence, set, frozenset, range)


def _index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _bands_choice(value: object) -> bool:
    if isinstance(value, tuple):
        return len(value) == 2 and all(isinstance(dims, int) for dims in value)
    return isinstance(value, Bands) or (isinstance(value, str) and value == "auto")


def _probability(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _hashable(value: Any) -> Any:
    value = value.tolist() if isinstance(value, torch.Tensor) else value
    return tuple(value) if isinstance(value, _COLLECTIONS) and not isinstance(value, str) else value


def _indices(values: Any) -> bool:
    return not isinstance(values, str) and all(_index(value) for value in values)
