"""Changes of one argument of a right call, each so that the argument cannot be right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st

from helpers import oracle
from helpers.right_calls import PAGE_SIZE, Arguments, Right

Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass(frozen=True)
class Site:
    """An argument about to be changed: the right value and the call around it."""

    name: str
    value: Any
    arguments: Arguments
    sizes: Right

    def like(self, *shape: int) -> torch.Tensor:
        return self.value.new_zeros(shape)


Mutation = Callable[[Draw, Site], Any]


def one_of(values: Callable[[Site], list[Any]]) -> Mutation:
    return lambda draw, site: draw(st.sampled_from(values(site)))


def drawn(strategy: st.SearchStrategy[Any]) -> Mutation:
    return lambda draw, _: draw(strategy)


def other_type(*values: Any) -> Mutation:
    return drawn(st.sampled_from(values))


# Tensors

OTHER_DTYPES = (
    torch.float64,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)


def dtypes(*allowed: torch.dtype) -> Mutation:
    """None of the allowed dtypes."""

    def mutate(draw: Draw, site: Site) -> torch.Tensor:
        wrong = {*OTHER_DTYPES, torch.float32, torch.int32, torch.float16} - set(allowed)
        if site.value.is_cpu and torch.bfloat16 in allowed:
            wrong.discard(torch.float32)
        return site.value.to(draw(st.sampled_from(sorted(wrong, key=str))))

    return mutate


def other_half(_: Draw, site: Site) -> torch.Tensor:
    """A supported dtype that the other tensors do not have."""
    other = torch.float16 if site.value.dtype == torch.bfloat16 else torch.bfloat16
    return site.value.to(other)


def rank(draw: Draw, site: Site) -> torch.Tensor:
    dims = draw(st.sampled_from([n for n in (0, 1, 2, 3, 4, 5, 6) if n != site.value.dim()]))
    shape = draw(st.lists(st.sampled_from([1, 2, 64, 130]), min_size=dims, max_size=dims))
    return site.value.new_zeros(()).expand(shape)


def size(dim: int, fits: Callable[[int, Site], bool], largest: int = 1000) -> Mutation:
    """One dimension has a size that does not fit."""

    def mutate(draw: Draw, site: Site) -> torch.Tensor:
        shape = list(site.value.shape)
        near = st.integers(max(shape[dim] - 3, 0), shape[dim] + 3)
        sizes = st.one_of(near, st.integers(0, largest))
        shape[dim] = draw(sizes.filter(lambda n: n != shape[dim] and not fits(n, site)))
        return site.like(*shape)

    return mutate


def last_stride(draw: Draw, site: Site) -> torch.Tensor:
    """The right shape, its last stride not 1."""
    x = site.value
    step = draw(st.integers(0, 5).filter(lambda n: n != 1))
    if step == 0:
        return x[..., :1].expand(x.shape)
    return site.like(*x.shape, step)[..., draw(st.integers(0, step - 1))]


def transposed(draw: Draw, site: Site) -> torch.Tensor:
    """The right shape, another dimension innermost."""
    outer = site.value.shape[:-1]
    dim = draw(st.sampled_from([d for d, length in enumerate(outer) if length > 1]))
    return site.value.transpose(dim, -1).contiguous().transpose(dim, -1)


def gaps(draw: Draw, site: Site) -> torch.Tensor:
    """The right shape, not contiguous."""
    assume(site.value.numel() > 1)
    step = draw(st.integers(2, 5))
    return site.like(*site.value.shape, step)[..., draw(st.integers(0, step - 1))]


def on_meta(_: Draw, site: Site) -> torch.Tensor:
    return site.value.to("meta")


def same(n: int, _: Site) -> bool:
    return False  # any other size is wrong


def estimated_head_dim(n: int, _: Site) -> bool:
    return n % 8 == 0 and 0 < n <= 256


def whole_groups_of_kv(n: int, site: Site) -> bool:
    return n % site.sizes.kv_heads == 0


def divides_q(n: int, site: Site) -> bool:
    return n > 0 and site.sizes.q_heads % n == 0


NOT_A_TENSOR = other_type("x", 3, 0.5, [1, 2], {}, torch.float32)
ABSENT = one_of(lambda _: [None])
HALVES = (torch.bfloat16, torch.float16)
NOT_HALF = dtypes(*HALVES)
NOT_HALF_NOR_FP8 = dtypes(*HALVES, torch.float8_e4m3fn)
NOT_FP8 = dtypes(torch.float8_e4m3fn)


def may_be_fp8(*mutations: Mutation) -> tuple[Mutation, ...]:
    return tuple(NOT_HALF_NOR_FP8 if mutate is NOT_HALF else mutate for mutate in mutations)


def activation(
    head_dim: Callable[[int, Site], bool] = estimated_head_dim, dims: int = 4
) -> tuple[Mutation, ...]:
    """(B, H, L, D), or other dimensions before D, on its own."""
    return (
        NOT_HALF,
        rank,
        size(dims - 1, head_dim),
        last_stride,
        transposed,
        NOT_A_TENSOR,
    )


def other_supported_head_dim(draw: Draw, site: Site) -> torch.Tensor:
    *outer, head_dim = site.value.shape
    return site.like(*outer, draw(st.sampled_from([d for d in (64, 128) if d != head_dim])))


TOGETHER = (other_half, other_supported_head_dim, on_meta, ABSENT)
ESTIMATED = (*activation(), *TOGETHER, size(0, same))
ATTENDED = (*activation(same), *TOGETHER, size(0, same))
PACKED = activation(same, dims=3) + TOGETHER
PAGED = (*activation(same), *TOGETHER, size(0, same), size(1, same), size(2, same))
Q_HEADS = size(1, whole_groups_of_kv)
K_HEADS = size(1, divides_q)
LIKE_K = (size(1, same), size(2, same))


def _means_suffice(n: int, site: Site) -> bool:
    return n >= site.sizes.block_counts()[1]


MEANS = (
    dtypes(torch.float32),
    rank,
    size(3, same),
    other_supported_head_dim,
    size(0, same),
    size(2, _means_suffice),
    last_stride,
    transposed,
    on_meta,
    ABSENT,
    NOT_A_TENSOR,
)

MASK = (
    dtypes(torch.int32),
    rank,
    size(0, same),
    size(1, same),
    size(2, same),
    gaps,
    on_meta,
    ABSENT,
    NOT_A_TENSOR,
)

# (rows,), or None
VECTOR = (rank, size(0, same), gaps, on_meta, NOT_A_TENSOR)
SINKS = (dtypes(torch.float32), *VECTOR)
LENGTHS = (dtypes(torch.int32), *VECTOR)

CELLS = (
    dtypes(torch.float16),
    rank,
    size(0, same),
    size(3, same),
    last_stride,
    transposed,
    on_meta,
    ABSENT,
    NOT_A_TENSOR,
)
FACTORS = (
    dtypes(torch.float32),
    rank,
    size(0, same),
    size(2, same),
    last_stride,
    on_meta,
    ABSENT,
    NOT_A_TENSOR,
)

STATE = (
    dtypes(torch.float32),
    rank,
    size(0, same),
    size(1, same),
    size(3, same),
    gaps,
    on_meta,
    ABSENT,
    NOT_A_TENSOR,
)


def given(draw: Draw, site: Site) -> torch.Tensor:
    """A tensor where there must be none."""
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    return torch.zeros(shape, dtype=torch.int32, device=site.arguments["q"].device)


def scale_of_halves(draw: Draw, site: Site) -> torch.Tensor:
    """A scale where k and v are not fp8."""
    like = next(x for x in site.arguments.values() if isinstance(x, torch.Tensor))
    return torch.ones(draw(st.integers(0, 8)), device=like.device)


NO_SCALE = (scale_of_halves, NOT_A_TENSOR)

# Numbers

NOT_INT64 = st.one_of(st.integers(2**63, 2**80), st.integers(-(2**80), -(2**63) - 1))
INT64 = st.one_of(st.integers(-300, 300), st.integers(-(2**63), 2**63 - 1))
NOT_AN_INT = other_type("64", None, 0.5, [64], {})
NOT_A_FLOAT = other_type("0.5", [0.5], {}, 1j)


def integers_but(fits: Callable[[int, Site], bool]) -> tuple[Mutation, ...]:
    """Integers that do not fit, integers that are none of C++, and no integers."""

    def mutate(draw: Draw, site: Site) -> int:
        return draw(INT64.filter(lambda n: not fits(n, site)))

    return mutate, drawn(NOT_INT64), NOT_AN_INT


def _pair_fits(n: int, site: Site) -> bool:
    pair = dict(site.arguments) | {site.name: n}
    return (pair["q_block_size"], pair["k_block_size"]) in ((128, 128), (128, 64), (64, 64))


def _length_fits(n: int, site: Site) -> bool:
    index = "qk".index(site.name.removeprefix("max_seqlen_")[0])
    blocks, block_size = site.sizes.block_counts()[index], site.sizes.blocks[index]
    return n >= 0 and oracle.ceil_div(n, block_size) == blocks


def _longest_fits(n: int, site: Site) -> bool:
    table = site.arguments.get("block_table") if site.name == "max_seqlen_k" else None
    return 0 <= n <= 2**30 - 256 and (table is None or n <= table.shape[1] * PAGE_SIZE)


def _masked_k_fits(n: int, site: Site) -> bool:
    words = site.arguments["bits"].shape[3]
    return (
        _longest_fits(n, site)
        and oracle.ceil_div(oracle.ceil_div(n, site.sizes.blocks[1]), 32) == words
    )


def pages_fit(n: int, site: Site) -> bool:
    return n * PAGE_SIZE >= site.arguments["max_seqlen_k"]


def appended_fits(name: str) -> Callable[[int, Site], bool]:
    """Whether the means have room if this size of the call is n."""

    def fits(n: int, site: Site) -> bool:
        sizes = {
            "start": site.arguments["start"],
            "length": site.arguments["x"].shape[2],
            "blocks": site.arguments["means"].shape[2],
        } | {name: n}
        end = sizes["start"] + sizes["length"]
        return sizes["start"] >= 0 and end <= sizes["blocks"] * site.sizes.blocks[0]

    return fits


def celled_fits(name: str) -> Callable[[int, Site], bool]:
    """Whether the cells have room if this size of the call is n."""

    def fits(n: int, site: Site) -> bool:
        sizes = {"start": site.arguments["start"], "length": site.arguments["x"].shape[2]}
        sizes |= {name: n}
        start, capacity = sizes["start"], site.arguments["cells"].shape[2] * oracle.CELL
        return start >= 0 and start % oracle.CELL == 0 and start + sizes["length"] <= capacity

    return fits


def has_cells(n: int, site: Site) -> bool:
    return 0 <= n <= site.arguments["k_cells"].shape[2] * oracle.CELL


def _has_means(n: int, site: Site) -> bool:
    return 0 <= n <= site.arguments["k_means"].shape[2] * site.sizes.blocks[1]


START_OF_CELL = integers_but(celled_fits("start"))
CELLED_LENGTH = integers_but(has_cells)
MEANT_LENGTH = integers_but(_has_means)
BLOCK_SIZE = integers_but(lambda n, _: n in (64, 128))
BLOCK_SIZE_OF_PAIR = integers_but(_pair_fits)
LENGTH = integers_but(_length_fits)
MASKED_K = integers_but(_masked_k_fits)
LONGEST = integers_but(_longest_fits)
START = integers_but(appended_fits("start"))
COUNT = integers_but(lambda n, _: n >= 0)


def per_head(wrong: st.SearchStrategy[float]) -> tuple[Mutation, ...]:
    """One value per head or for all: a wrong value, or too many or few."""

    def one_wrong(draw: Draw, site: Site) -> list[float]:
        values = [0.5] * draw(st.sampled_from([1, site.sizes.q_heads]))
        values[draw(st.integers(0, len(values) - 1))] = draw(wrong)
        return values

    def wrong_number(draw: Draw, site: Site) -> list[float]:
        count = draw(st.integers(0, 9).filter(lambda n: n not in (1, site.sizes.q_heads)))
        return [0.5] * count

    return one_wrong, wrong_number, other_type("0.5", 0.5, {}, 1j, ["x"])


PROBABILITY = (*per_head(st.floats().filter(lambda p: not 0 <= p <= 1)), ABSENT)
THRESHOLD = per_head(st.floats().filter(lambda p: not 0 < p <= 1))
# Times log2(e) it has to be a normal float32.
SCALE = (drawn(st.floats().filter(lambda s: not 8e-39 < s < 2.4e38)), NOT_A_FLOAT)
SOFTCAP = (drawn(st.floats().filter(lambda s: not 2**-64 <= s <= 2**64)), NOT_A_FLOAT)
MAYBE_INT = (drawn(NOT_INT64), other_type("64", 0.5, [64], {}))
WINDOW = (drawn(st.integers(-(2**63), -1)), *MAYBE_INT)
ANY_INT = (drawn(INT64), *MAYBE_INT)  # where there must be none
FLAG = (other_type("yes", [True], {}),)


def band_is_right(band: list[int], head_dim: int) -> bool:
    starts, ends = band[0::2], band[1::2]
    return (
        len(starts) == len(ends) <= 8
        and all(start < end for start, end in zip(starts, ends, strict=True))
        and band == sorted(band)
        and all(0 <= d <= head_dim for d in band)
    )


def wrong_band(draw: Draw, site: Site) -> list[int]:
    dims = st.one_of(st.integers(-4, 132), INT64)
    bands = st.lists(dims, max_size=20)
    bands = st.one_of(bands, bands.map(lambda band: sorted(set(band))))
    return draw(bands.filter(lambda band: not band_is_right(band, site.sizes.head_dim)))


BAND = (wrong_band, other_type(None, 5, 0.5, "0", [0, 0.5], [0, "32"], [0, 2**63]))
