"""The methods under comparison: each a block mask for one attention call at one knob setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import rules
import scores
import torch
from attend import Blocks, block_mass
from scores import Call, Score

from prism_cuda.bits import unpack

Rule = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
Group = Literal["reference", "baseline", "ablation", "variant"]

P = (0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
EACH_P = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TAU = (2e-2, 1e-2, 5e-3, 2e-3, 1e-3, 5e-4)


@dataclass(frozen=True)
class Method:
    """A way to select blocks, and the settings of its one knob, from sparse to dense.

    Attributes:
        name, about: for tables and plots.
        group: "reference", "baseline" (published), "ablation" (of Prism) or "variant" (ours).
        score: block probabilities, one tensor per view; the views' selections are united.
        rule: probabilities, visible blocks and knob to a mask.
        knobs: settings of the rule; ``main`` is the one that a single run uses.
        q_size, k_size: tokens per block.
        tail: how dropped blocks take part: not at all, by their mean key and value, or with the
            scores' variance added.
        skip: of the kept blocks, do not compute P V where no row has a weight above this, relative
            to its row's largest (Block Sparse Flash Attention); 0 computes all.
    """

    name: str
    about: str
    group: Group
    score: Score | None
    rule: Rule = rules.top_p
    knobs: tuple[float, ...] = P
    main: float = 0.95
    q_size: int = 128
    k_size: int = 128
    tail: Literal["none", "mean", "variance"] = "none"
    skip: float = 0.0

    def blocks(self, length: int) -> Blocks:
        return Blocks(self.q_size, self.k_size, length)

    def mask(self, call: Call, knob: float) -> torch.Tensor:
        """Bool (B, Hq, Nq, Nk): causal, with the sink block and the diagonal."""
        blocks = self.blocks(call.q.shape[2])
        visible = blocks.visible(call.q.device)
        kept = blocks.forced(call.q.device).expand(*call.q.shape[:2], -1, -1)
        if self.score is None:
            return visible.expand_as(kept).clone()
        for view in self.score(call, blocks):
            kept = kept | self.rule(view, visible, knob)
        return kept & visible


@dataclass(frozen=True)
class VerticalSlash(Method):
    """MInference and FlexPrefill's pattern: whole columns and whole diagonals of tokens."""

    def mask(self, call: Call, knob: float) -> torch.Tensor:
        blocks = self.blocks(call.q.shape[2])
        device = call.q.device
        visible, forced = blocks.visible(device), blocks.forced(device)
        columns, diagonals = (
            rules.top_p(profile, torch.ones_like(profile, dtype=torch.bool), knob)
            for profile in scores.last_queries(call, blocks)
        )
        pad = (0, blocks.k_blocks * blocks.k - blocks.length)
        vertical = torch.nn.functional.pad(columns, pad).unflatten(-1, (-1, blocks.k)).any(-1)
        # A diagonal of distance d touches key blocks at first row - d and at last row - d.
        first = torch.arange(0, blocks.length, blocks.q, device=device)
        kept = vertical[:, :, None] | forced
        # How many kept distances fall between two bounds, by a running count.
        count = torch.nn.functional.pad(diagonals.int().cumsum(-1), (1, 0))
        start = torch.arange(0, blocks.length, blocks.k, device=device)
        nearest = first[:, None] - (start + blocks.k - 1)
        farthest = first[:, None] + blocks.q - 1 - start
        low = nearest.clamp(0, blocks.length)
        high = (farthest + 1).clamp(0, blocks.length)
        kept = kept | ((count[..., high] - count[..., low]) > 0)
        return kept & visible


@dataclass(frozen=True)
class PerHead(Method):
    """A threshold per head: lowered until a few exactly known query blocks lose little more mass
    than exact scores would have lost at the knob's threshold.

    Attributes:
        tiles: query blocks whose attention is computed exactly, evenly spaced.
        slack: mass that may be lost beyond that.
        steps: thresholds tried, each 0.6 of the one before.
    """

    tiles: int = 4
    slack: float = 0.01
    steps: int = 8

    def mask(self, call: Call, knob: float) -> torch.Tensor:
        assert self.score is not None
        blocks, device = self.blocks(call.q.shape[2]), call.q.device
        visible, forced = blocks.visible(device), blocks.forced(device)
        (probs,) = self.score(call, blocks)
        chosen = {(i + 1) * blocks.q_blocks // self.tiles - 1 for i in range(self.tiles)} - {-1}
        tiles = sorted(chosen)
        exact = block_mass(call.q, call.k, blocks, tiles)[:, :, tiles]
        always = forced[tiles]
        allowed = (exact * ~((exact >= knob) | always)).sum((-1, -2)) + self.slack * len(tiles)
        thresholds = knob * 0.6 ** torch.arange(self.steps, device=device)
        kept = (probs[:, :, tiles, :, None] >= thresholds) | always[..., None]
        enough = (exact[..., None] * ~kept).sum((2, 3)) <= allowed[..., None]  # (B, Hq, steps)
        first = torch.where(enough.any(-1), enough.int().argmax(-1), self.steps - 1)
        return ((probs >= thresholds[first][..., None, None]) | forced) & visible


@dataclass(frozen=True)
class Grid(Method):
    """``peak``, by the package's kernel on CUDA: its cells are 16 x 16 as well.

    Attributes:
        divisor: of the rule ``either``; None for top-p alone.
    """

    divisor: float | None = 10

    def mask(self, call: Call, knob: float) -> torch.Tensor:
        return self.kernel_mask(call, knob) if call.q.is_cuda else super().mask(call, knob)

    def kernel_mask(self, call: Call, knob: float) -> torch.Tensor:
        """The mask by the op: that of ``score`` and ``rule``, but for near ties."""
        above = None if self.divisor is None or knob >= 1 else [(1 - knob) / self.divisor]
        options = {"q_block_size": self.q_size, "k_block_size": self.k_size}
        bits, _ = torch.ops.prism.select_grid(call.q, call.k, [knob], above, **options)
        return unpack(bits, self.blocks(call.q.shape[2]).k_blocks)


@dataclass(frozen=True)
class PeakAndMean(Method):
    """Two views: top-p of the first, the peaks, or a mean share of at least (1 - p) / divisor.

    Where the first view has a score per cell, every cell chooses, and a block is kept if one did.
    """

    divisor: float = 20

    def mask(self, call: Call, knob: float) -> torch.Tensor:
        assert self.score is not None
        blocks = self.blocks(call.q.shape[2])
        visible, forced = blocks.visible(call.q.device), blocks.forced(call.q.device)
        peak, mean = self.score(call, blocks)
        if peak.dim() > mean.dim():
            seen = visible[:, None].expand(peak.shape)
            exists = peak.sum(-1, keepdim=True) > 0  # not past the end
            kept = (rules.top_p(peak, seen, knob) & exists).any(3)
        else:
            kept = rules.top_p(peak, visible, knob)
        return kept | rules.above(mean, visible, (1 - knob) / self.divisor) | (forced & visible)


OFFICIAL = partial(scores.bands, dims=(64, 96))
FINE = partial(scores.fine, q_step=16, k_step=16)
EITHER: dict[str, Any] = dict(rule=rules.either, main=0.9, k_size=64)
DIVISORS = (5, 20, 40)
THRESHOLD: dict[str, Any] = dict(rule=rules.above, knobs=TAU, main=5e-3, k_size=64)


def _grid(q_step: int, k_step: int, variance: bool) -> Method:
    """Our estimator on one grid."""
    score = partial(scores.fine, q_step=q_step, k_step=k_step, variance=float(variance))
    name = f"grid_{q_step}_{k_step}{'v' if variance else ''}"
    about = f"means of {q_step} queries, {k_step} keys{' and their variance' if variance else ''}"
    return Method(name, f"{about}; threshold, 64-key blocks", "variant", score, **THRESHOLD)


def _peak(
    name: str, about: str, kind: type[Method] = Method, pool: scores.Pool = "peak", **changes: Any
) -> Method:
    """Blocks by the largest share of any cell's queries; ``changes`` to the score or the method."""
    options: dict[str, Any] = dict(q_step=16, k_step=16, variance=0.0, spread=1.0, sharpen=1.0)
    options |= {key: changes.pop(key) for key in list(changes) if key in options}
    score = partial(scores.fine, pool=pool, **options)
    return kind(name, about, "variant", score, **EITHER | changes)


def _peak_and_mean(name: str, about: str, divisor: float = 20, **changes: Any) -> Method:
    """Top-p of the peaks, or a threshold on the mean."""
    pool = changes.pop("pool", "both")
    rule: dict[str, Any] = dict(divisor=divisor, rule=rules.top_p)
    return _peak(name, about, PeakAndMean, pool, **rule, **changes)


def _divided(base: Method, divisor: int) -> Method:
    """The same scores with another threshold at every p."""
    name, about = f"{base.name}_by{divisor}", f"{base.name}, threshold (1 - p) / {divisor}"
    changes: dict[str, Any] = dict(rule=partial(rules.either, divisor=divisor))
    if isinstance(base, Grid):
        changes["divisor"] = divisor
    return replace(base, name=name, about=about, **changes)


FINE_E = Method("fine", "grid_16_16v, top-p or threshold", "variant", FINE, **EITHER)
PEAK = _peak(
    "peak", "largest share of any 16 queries, spread of the keys: top-p or threshold", Grid
)

_METHODS = (
    Method("dense", "every block", "reference", None, knobs=(1.0,), main=1.0),
    Method("oracle_p", "true block mass, top-p", "reference", scores.oracle),
    Method(
        "oracle_t",
        "true block mass, threshold, 64-key blocks",
        "reference",
        scores.oracle,
        rules.above,
        TAU,
        5e-3,
        k_size=64,
    ),
    Method("prism", "official: bands 64/96, calibrated, top-p", "baseline", OFFICIAL),
    Method(
        "mean_pool",
        "one full-width view of the means, top-p",
        "baseline",
        partial(scores.bands, dims=(0, 128), calibrated=False),
    ),
    Method(
        "xattention", "antidiagonals, stride 8, top-p", "baseline", scores.antidiagonal, main=0.9
    ),
    VerticalSlash("vertical_slash", "from the last 64 queries, top-p", "baseline", None),
    Method(
        "random",
        "a random share of every row",
        "baseline",
        scores.noise,
        rules.share,
        (0.1, 0.25, 0.5, 0.75, 0.9),
        0.5,
    ),
    Method(
        "no_calibration",
        "official without temperature",
        "ablation",
        partial(OFFICIAL, calibrated=False),
    ),
    Method("low_only", "official low band alone", "ablation", partial(scores.bands, dims=(0, 96))),
    Method(
        "high_only", "official high band alone", "ablation", partial(scores.bands, dims=(64, 0))
    ),
    Method(
        "bands_32_96", "dead zone as high band", "ablation", partial(scores.bands, dims=(32, 96))
    ),
    Method("bands_64_64", "no overlap", "ablation", partial(scores.bands, dims=(64, 64))),
    Method("bands_96_96", "wider high band", "ablation", partial(scores.bands, dims=(96, 96))),
    Method("prism_64", "official bands, B = 64", "ablation", OFFICIAL, q_size=64, k_size=64),
    Method("prism_256", "official bands, B = 256", "ablation", OFFICIAL, q_size=256, k_size=256),
    Method(
        "prism_128_64",
        "official bands, 64-key blocks under 128 rows",
        "ablation",
        OFFICIAL,
        k_size=64,
    ),
    Method(
        "auto",
        "official, bands from the model's frequencies",
        "variant",
        partial(scores.bands, dims=None),
    ),
    Method(
        "auto_64",
        "B = 64, bands from the model's frequencies",
        "variant",
        partial(scores.bands, dims=None),
        q_size=64,
        k_size=64,
    ),
    Method(
        "running",
        "official, energies of the blocks so far",
        "variant",
        partial(OFFICIAL, running=True),
    ),
    Method("group", "official, one selection per KV head", "variant", scores.shared(OFFICIAL)),
    Method(
        "variance", "official plus the keys' variance", "variant", partial(OFFICIAL, variance=1.0)
    ),
    Method("bounds", "elementwise extrema of the keys", "variant", scores.bounds),
    Method("dominant", "32 strongest pairs of each head", "variant", scores.dominant),
    Method("prism_t", "official, threshold", "variant", OFFICIAL, rules.above, TAU, 5e-3),
    Method(
        "prism_r",
        "official, relative to the row's largest",
        "variant",
        OFFICIAL,
        rules.relative,
        (0.2, 0.1, 0.05, 0.02, 0.01, 0.005),
        0.05,
    ),
    Method("prism_t_64", "official, threshold, 64-key blocks", "variant", OFFICIAL, **THRESHOLD),
    Method(
        "antidiagonal_t",
        "XAttention's scores, threshold, 64-key blocks",
        "variant",
        scores.antidiagonal,
        **THRESHOLD,
    ),
    *(_grid(128, step, False) for step in (64,)),
    *(_grid(q_step, k_step, False) for q_step, k_step in ((64, 64), (64, 32), (32, 16), (16, 16))),
    *(_grid(q_step, k_step, True) for q_step, k_step in ((128, 64), (32, 16), (16, 32), (8, 8))),
    Method(
        "prism_e_64", "official, top-p or threshold, 64-key blocks", "variant", OFFICIAL, **EITHER
    ),
    FINE_E,
    *(_divided(FINE_E, divisor) for divisor in DIVISORS),
    Method("fine_t", "fine with the threshold alone", "variant", FINE, **THRESHOLD),
    Method("fine_p", "fine with top-p alone", "variant", FINE, k_size=64),
    Method("fine_128", "fine, 128-key blocks", "variant", FINE, **EITHER | {"k_size": 128}),
    Method(
        "fine_undo", "fine, pooling's loss undone", "variant", partial(FINE, undo=0.3), **EITHER
    ),
    Method(
        "fine_group", "fine, one selection per KV head", "variant", scores.shared(FINE), **EITHER
    ),
    Method(
        "fine_tail", "fine, dropped blocks by their means", "variant", FINE, **EITHER, tail="mean"
    ),
    Method("fine_skip", "fine, P V skipped under 0.03", "variant", FINE, **EITHER, skip=0.03),
    Method(
        "fine_rows",
        "fine, or the exact attention of every 16th query",
        "variant",
        scores.both(FINE, scores.rows),
        **EITHER,
    ),
    PerHead("fine_head", "fine_t, a threshold per head", "variant", FINE, **THRESHOLD),
    Method(
        "fine_spread",
        "fine, spread of the keys instead of their variance",
        "variant",
        partial(FINE, variance=0.0, spread=1.0),
        **EITHER,
    ),
    Method(
        "fine_both",
        "fine, and the queries' variance",
        "variant",
        partial(FINE, q_variance=1.0),
        **EITHER,
    ),
    PEAK,
    *(_divided(PEAK, divisor) for divisor in DIVISORS),
    *(
        _peak_and_mean(
            f"mixed_by{divisor}", f"peaks with top-p, or a mean of (1 - p) / {divisor}", divisor
        )
        for divisor in (10, 20, 40)
    ),
    _peak_and_mean("sharp_by5", "peaks of shares^1.5, or a mean of (1 - p) / 5", 5, sharpen=1.5),
    _peak_and_mean("sharp_by10", "sharp_by5 with (1 - p) / 10", 10, sharpen=1.5),
    _peak_and_mean("sharp_more", "sharp_by5, 1.5 times the spread", 5, sharpen=1.5, spread=1.5),
    _peak_and_mean("sharp_128", "sharp_by5, 128-key blocks", 5, sharpen=1.5, k_size=128),
    _peak_and_mean("sharp_8_16", "sharp_by5, cells of 8 queries", 5, sharpen=1.5, q_step=8),
    _peak_and_mean("sharper_by5", "peaks of shares^2, or a mean of (1 - p) / 5", 5, sharpen=2.0),
    _peak_and_mean(
        "each_by20",
        "top-p of every 16 queries, or a mean of (1 - p) / 20",
        pool="cells",
        knobs=EACH_P,
    ),
    _peak_and_mean("mixed_128", "mixed_by20, 128-key blocks", k_size=128),
    _peak_and_mean("mixed_more", "mixed_by20, 1.5 times the spread", spread=1.5),
    _peak_and_mean("mixed_v", "mixed_by20, the keys' variance", variance=1.0, spread=0.0),
    _peak_and_mean("mixed_8_16", "mixed_by20, cells of 8 queries", q_step=8),
    _peak_and_mean(
        "mixed_8_8", "mixed_by20, 8 x 8 cells, half the spread", q_step=8, k_step=8, spread=0.5
    ),
    _peak("peak_p", "peak with top-p alone", Grid, rule=rules.top_p, divisor=None),
    _peak("peak_t", "peak with the threshold alone", rule=rules.above, knobs=TAU, main=5e-3),
    _peak("peak_128", "peak, 128-key blocks", Grid, k_size=128),
    _peak("peak_16_16v", "peak with the keys' variance", variance=1.0, spread=0.0),
    _peak("peak_half", "peak with half the spread", spread=0.5),
    _peak("peak_more", "peak with 1.5 times the spread", spread=1.5),
    _peak("peak_8_16", "peak, cells of 8 queries", q_step=8),
    _peak("peak_4_16", "peak, cells of 4 queries, half the spread", q_step=4, spread=0.5),
    _peak("peak_8_8", "peak, 8 x 8 cells, half the spread", q_step=8, k_step=8, spread=0.5),
    _peak("peak_8_8v", "peak, 8 x 8 cells, variance", q_step=8, k_step=8, variance=1.0, spread=0.0),
    Method(
        "peak_antidiagonal",
        "XAttention's scores, largest share: top-p or threshold",
        "variant",
        partial(scores.antidiagonal, pool="peak"),
        **EITHER,
    ),
    Method("oracle_e", "true block mass, top-p or threshold", "reference", scores.oracle, **EITHER),
)

METHODS = {method.name: method for method in _METHODS}
