"""PrismConfig: every setting of the method, validated where it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from prism_cuda import bands as _bands
from prism_cuda.bands import LAYOUTS, Bands, Layout

ESTIMATORS = ("bands", "grid")
BLOCK_SIZES = ((128, 128), (64, 64), (128, 64))

# Used only where neither the caller nor a model says which frequencies the heads rotate with.
DEFAULT_ROPE_THETA = 1e6


@dataclass(frozen=True)
class PrismConfig:
    """Settings of block selection and of the dense fallback.

    Attributes:
        block_size: tokens per block, 128 or 64, or a (query, key) pair; (128, 64) is the one mixed
            pair.
        estimator: "bands" scores pooled blocks in two RoPE frequency bands (Prism). "grid" scores
            means of 16 queries and 16 keys over the full width: sparser at equal perplexity, needs
            no bands and works without RoPE, and takes longer; see docs/quality.md.
        top_p: probability mass each band, or the grid, keeps per query block, in [0, 1]. The one
            quality knob: higher keeps more blocks; 1 keeps all.
        keep_above: blocks of at least this probability are kept as well, in (0, 1]. None keeps no
            more than top_p does by bands, and means (1 - top_p) / 10 on the grid.
        bands: "auto" splits the head by the RoPE frequencies; (high, low) sets the number of
            dimensions of each band; a :class:`~prism_cuda.bands.Bands` sets them one by one.
        rope_theta: RoPE base for bands="auto". None takes the model's, or 1e6 without a model.
        inv_freq: inverse frequencies for bands="auto", radians per token; wins over rope_theta.
        rope_layout: which dimensions rotate together: "half" (j, j + d/2) or "interleaved"
            (2j, 2j + 1). None takes the model's, or "half" without a model.
        keep_sink: leading key blocks every query block keeps.
        keep_recent: key blocks kept up to the query block's own, itself included.
        dense_below: sequences with fewer keys use dense attention, which is cheaper there. The
            default is where bench/prefill.py saw both take equally long on an H200.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    block_size: int | tuple[int, int] = 128
    estimator: Literal["bands", "grid"] = "bands"
    top_p: float = 0.95
    keep_above: float | None = None
    bands: Literal["auto"] | tuple[int, int] | Bands = "auto"
    rope_theta: float | None = None
    inv_freq: Sequence[float] | torch.Tensor | None = None
    rope_layout: Layout | None = None
    keep_sink: int = 1
    keep_recent: int = 1
    dense_below: int = 2304

    def __post_init__(self) -> None:
        sizes = ", ".join(str(pair) for pair in BLOCK_SIZES)
        self._check("block_size", self.block_sizes in BLOCK_SIZES, f"64, 128 or one of {sizes}")
        self._check("estimator", self.estimator in ESTIMATORS, f"one of {ESTIMATORS}")
        self._check("top_p", 0 <= self.top_p <= 1, "a number in [0, 1]")
        above_valid = self.keep_above is None or 0 < self.keep_above <= 1
        self._check("keep_above", above_valid, "None or a number above 0 and up to 1")
        self._check("bands", self._bands_valid(), "'auto', (high, low) dimensions or a Bands")
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

    def _check(self, field: str, valid: bool, allowed: str) -> None:
        if not valid:
            value = getattr(self, field)
            raise ValueError(f"PrismConfig: {field} is {value!r}; expected {allowed}")

    def _bands_valid(self) -> bool:
        if isinstance(self.bands, tuple):
            return len(self.bands) == 2 and all(isinstance(dims, int) for dims in self.bands)
        return self.bands == "auto" or isinstance(self.bands, Bands)

    @property
    def block_sizes(self) -> tuple[int, int]:
        """(q_block_size, k_block_size)."""
        if isinstance(self.block_size, int):
            return self.block_size, self.block_size
        return self.block_size

    @property
    def threshold(self) -> float | None:
        """keep_above, resolved: the probability from which on blocks are kept; None for no rule."""
        if self.keep_above is None and self.estimator == "grid" and self.top_p < 1:
            return (1 - self.top_p) / 10
        return self.keep_above

    def resolve_bands(self, head_dim: int) -> Bands:
        """The bands for heads of ``head_dim`` dimensions.

        Raises:
            ValueError: if the configured bands do not fit head_dim.
        """
        layout = self.rope_layout or "half"
        if isinstance(self.bands, Bands):
            return self.bands
        if isinstance(self.bands, tuple):
            high, low = self.bands
            return _bands.from_dims(high, low, head_dim, layout)
        # The larger block cancels first, and a pair cancelled on either side scores nothing.
        block_size = max(self.block_sizes)
        if self.inv_freq is not None:
            return _bands.split(self.inv_freq, head_dim, block_size, layout)
        return _bands.split(self.rope_theta or DEFAULT_ROPE_THETA, head_dim, block_size, layout)
