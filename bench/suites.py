"""What bench/attention.py measures: points, in groups that are timed side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from implementations import BlockSparsity
from masks import full_mask, long_row_mask, random_mask, structured_mask
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DENSITIES = (0.1, 0.25, 0.5)
# full: every visible block. The others keep diagonal and first block, and `structured` and
# `longrow` exactly as many blocks of each head as `random` does.
MASKS = ("random", "full", "structured", "longrow")
SUITES = {
    "quick": (8192,),
    "paper": (8192, 32768, 131072),
    "full": (8192, 32768, 131072),
    "scores": (8192, 32768),
    "head64": (8192, 32768),
}
LONG = 65536  # longer inputs: fewer points, and slow peers only where they are the subject


@dataclass(frozen=True)
class Point:
    length: int
    mask: str
    density: float  # what is asked of the random blocks; 1 for full
    impls: tuple[str, ...]
    dtype: str = "bfloat16"
    head_dim: int = 128
    block: int = 128  # tokens of a key block
    causal: bool = True
    window: int | None = None  # keys before its own position that a row sees
    softcap: float | None = None
    eager: tuple[str, ...] = ()  # implementations whose eager calls are timed as well

    def columns(self) -> dict[str, object]:
        return {
            "L": self.length, "density": self.density, "mask": self.mask, "dtype": self.dtype,
            "head_dim": self.head_dim, "block": self.block, "causal": self.causal,
            "window": self.window, "softcap": self.softcap,
        }  # fmt: skip


Group = list[Point]  # of one length; the first is the one that the others are compared with


def build_sparsity(point: Point, heads: int, device: str) -> BlockSparsity:
    block, causal = point.block, point.causal
    if point.mask == "full":
        mask = full_mask(heads, point.length, k_block=block, causal=causal, device=device)
    else:
        mask = random_mask(
            heads, point.length, point.density, k_block=block, causal=causal, device=device
        )
    if point.mask in ("structured", "longrow"):
        if not causal or block != 128:
            raise ValueError(f"mask {point.mask!r} is made causal and in blocks of 128 only")
        make = structured_mask if point.mask == "structured" else long_row_mask
        mask = make(mask, point.length)
    full = point.mask == "full"
    return BlockSparsity(mask, point.length, block, causal, full, point.window, point.softcap)


def kept_density(sparsity: BlockSparsity, visible: Tensor) -> float:
    """Kept share of the visible blocks (Nq, Nk)."""
    heads = sparsity.mask.shape[0] * sparsity.mask.shape[1]
    return float(sparsity.mask.sum()) / (heads * float(visible.sum()))


def flops(sparsity: BlockSparsity, head_dim: int) -> float:
    """Of the kept area; full causal masks count half the square, as is usual of dense kernels.

    A window counts the keys that each row sees.
    """
    heads = sparsity.mask.shape[1]
    if sparsity.window is not None:
        if not (sparsity.full and sparsity.causal):
            raise ValueError("windows count on full causal masks only")
        width = min(sparsity.window + 1, sparsity.length)
        return 4.0 * head_dim * heads * width * (sparsity.length - (width - 1) / 2)
    if sparsity.full:
        return (2.0 if sparsity.causal else 4.0) * head_dim * heads * sparsity.length**2
    return 4.0 * head_dim * 128 * sparsity.k_block * float(sparsity.mask.sum())


def suite(name: str, lengths: Sequence[int], densities: Sequence[float]) -> list[Group]:
    """The groups of a suite, most important first.

    quick: one density and the full mask. paper: every density and the full mask at head_dim 128 in
    bfloat16. full: also structured masks and long rows, float16, key blocks of 64, head_dim 64 and
    256, and non-causal masks. head64: every density, key blocks of 64 and the full mask at head_dim
    64. scores: up to 8K a soft cap and a window that hides nothing beside
    neither, beyond that a window of 4096, all under the full mask.
    """
    if name == "scores":
        return [_scores_group(length) for length in lengths]
    if name == "head64":
        return [group for length in lengths for group in _head64_groups(length, densities)]
    middle = densities[len(densities) // 2]
    if name == "quick":
        return [
            group
            for length in lengths
            for group in (
                [Point(length, "random", middle, ("prism", "fa4"), eager=("prism", "fa4"))],
                [Point(length, "full", 1.0, ("prism", "fa4", "cudnn"))],
            )
        ]
    rest = name == "full"
    groups = [
        group
        for length in lengths
        for group in (
            *(_random_group(length, density, density == middle, rest) for density in densities),
            _full_group(length, rest),
        )
    ]
    if rest:
        groups += [
            group
            for length in lengths
            for group in (
                _head_dim_group(length, 64, middle),
                _head_dim_group(length, 256, middle),
                *_video_groups(length, middle),
            )
        ]
    return groups


def _random_group(length: int, density: float, is_middle: bool, rest: bool) -> Group:
    peers = ("prism", "prism_sm80", "fa4", "official")
    eager = ("prism", "fa4") if length <= 8192 else ()
    base = Point(length, "random", density, peers, eager=eager)
    if length < LONG:
        base = replace(base, impls=(*peers, "flex"))
    if not rest:
        return [base]
    against_fa4 = replace(base, impls=("prism", "fa4"), eager=())
    alone = replace(base, impls=("prism",), eager=())
    group = [base]
    if length < LONG or not density > 0.25:
        group.append(replace(against_fa4, mask="structured"))
    if is_middle:
        group += [replace(against_fa4, mask="longrow"), replace(alone, dtype="float16")]
    if is_middle or length < LONG:
        group.append(replace(alone, block=64))
    return group


def _full_group(length: int, rest: bool) -> Group:
    base = Point(length, "full", 1.0, ("prism", "prism_sm80", "fa4", "cudnn", "fa2"))
    if length <= 8192:
        base = replace(base, eager=("prism", "fa4"))
    if not rest:
        return [base]
    if length >= LONG:
        return [base, replace(base, impls=("prism",), dtype="float16")]
    return [
        base,
        replace(base, impls=("prism", "cudnn", "fa2"), dtype="float16", eager=()),
        replace(base, impls=("prism",), block=64, eager=()),
    ]


def _scores_group(length: int) -> Group:
    base = Point(length, "full", 1.0, ("prism", "prism_sm80", "fa4"))
    if length > 8192:
        return [replace(base, window=4096, impls=(*base.impls, "flex"))]
    return [
        replace(base, impls=("prism", "fa4")),
        replace(base, softcap=50.0),
        replace(base, window=length - 1, impls=("prism",)),
    ]


def _head_dim_group(length: int, head_dim: int, density: float) -> Group:
    peers = ("prism", "prism_sm80", "fa4", "cudnn", "fa2")
    base = Point(length, "full", 1.0, peers, head_dim=head_dim)
    if length >= LONG:
        return [replace(base, impls=("prism", "fa4", "cudnn"))]
    return [base, replace(base, mask="random", density=density, impls=("prism", "prism_sm80"))]


def _head64_groups(length: int, densities: Sequence[float]) -> list[Group]:
    full = Point(length, "full", 1.0, ("prism", "fa4", "cudnn"), head_dim=64)
    groups = [[full, replace(full, impls=("prism",), block=64)]]
    for density in densities:
        sparse = replace(full, mask="random", density=density, impls=("prism", "fa4"))
        groups.append([sparse, replace(sparse, impls=("prism",), block=64)])
    return groups


def _video_groups(length: int, density: float) -> list[Group]:
    sparse = Point(length, "random", density, ("prism", "prism_sm80", "fa4"), causal=False)
    if length >= LONG:
        return [[replace(sparse, impls=("prism", "fa4"))]]
    dense = replace(sparse, mask="full", density=1.0, impls=("prism", "fa4", "cudnn", "fa2"))
    return [[sparse, replace(sparse, block=64, impls=("prism",))], [dense]]
