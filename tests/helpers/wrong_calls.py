"""Wrong calls of the ops: a right call with one argument changed so that it cannot be right.

A new op needs one entry in OPS: how to build a right call, and what kind each argument is of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from helpers import oracle

Arguments = dict[str, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass(frozen=True)
class Right:
    """Sizes of a right call."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    blocks: tuple[int, int]
    dtype: torch.dtype

    def bands(self) -> tuple[list[int], list[int]]:
        return oracle.half_split_bands(self.head_dim, self.head_dim // 2, 3 * self.head_dim // 4)

    def block_counts(self) -> tuple[int, int]:
        return tuple(  # type: ignore[return-value]
            oracle.ceil_div(length, block)
            for length, block in zip((self.q_len, self.k_len), self.blocks, strict=True)
        )


# Several key/value heads and more than one block everywhere, so that every change shows.
RIGHT = (
    Right(1, 4, 2, 70, 130, 64, (64, 64), torch.bfloat16),
    Right(2, 4, 2, 200, 70, 64, (128, 64), torch.float16),
    Right(3, 6, 3, 129, 300, 128, (128, 128), torch.bfloat16),
    Right(2, 2, 2, 130, 130, 128, (64, 64), torch.float16),
)


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
    dim = draw(st.sampled_from([d for d in range(3) if site.value.shape[d] > 1]))
    return site.value.transpose(dim, -1).contiguous().transpose(dim, -1)


def gaps(draw: Draw, site: Site) -> torch.Tensor:
    """The right shape, not contiguous."""
    step = draw(st.integers(2, 5))
    return site.like(*site.value.shape, step)[..., draw(st.integers(0, step - 1))]


def on_meta(_: Draw, site: Site) -> torch.Tensor:
    return site.value.to("meta")


def same(n: int, _: Site) -> bool:
    return False  # any other size is wrong


def head_dims(*allowed: int) -> Callable[[int, Site], bool]:
    return lambda n, _: n in allowed


def whole_groups_of_kv(n: int, site: Site) -> bool:
    return n % site.sizes.kv_heads == 0


def divides_q(n: int, site: Site) -> bool:
    return n > 0 and site.sizes.q_heads % n == 0


NOT_A_TENSOR = other_type("x", 3, 0.5, [1, 2], {}, torch.float32)
ABSENT = one_of(lambda _: [None])
HALVES = (torch.bfloat16, torch.float16)


def activation(*head_dim: int) -> tuple[Mutation, ...]:
    """(B, H, L, D) of one of the head_dims, on its own."""
    return (
        dtypes(*HALVES),
        rank,
        size(3, head_dims(*head_dim)),
        last_stride,
        transposed,
        NOT_A_TENSOR,
    )


def other_supported_head_dim(draw: Draw, site: Site) -> torch.Tensor:
    shape = site.value.shape
    return site.like(*shape[:3], draw(st.sampled_from([d for d in (64, 128) if d != shape[3]])))


TOGETHER = (other_half, other_supported_head_dim, size(0, same), on_meta, ABSENT)
ESTIMATED = activation(64, 128) + TOGETHER
ATTENDED = activation(64, 128, 256) + TOGETHER
Q_HEADS = size(1, whole_groups_of_kv)
K_HEADS = size(1, divides_q)
LIKE_K = (size(1, same), size(2, same))

MEANS = (
    dtypes(torch.float32),
    rank,
    size(3, head_dims(64, 128)),
    other_supported_head_dim,
    size(0, same),
    size(2, same),
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
    index = "qk".index(site.name[0])
    blocks, block_size = site.sizes.block_counts()[index], site.sizes.blocks[index]
    return n >= 0 and oracle.ceil_div(n, block_size) == blocks


BLOCK_SIZE = integers_but(lambda n, _: n in (64, 128))
BLOCK_SIZE_OF_PAIR = integers_but(_pair_fits)
LENGTH = integers_but(_length_fits)
COUNT = integers_but(lambda n, _: n >= 0)
PROBABILITY = (drawn(st.floats().filter(lambda p: not 0 <= p <= 1)), ABSENT, NOT_A_FLOAT)
THRESHOLD = (drawn(st.floats().filter(lambda p: not 0 < p <= 1)), NOT_A_FLOAT)
# Times log2(e) it has to be a normal float32.
SCALE = (drawn(st.floats().filter(lambda s: not 8e-39 < s < 2.4e38)), NOT_A_FLOAT)
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

# Ops


@dataclass(frozen=True)
class Op:
    """A right call of the given sizes, and the mutations of every argument."""

    build: Callable[[Right, str], Arguments]
    mutations: dict[str, tuple[Mutation, ...]]


@functools.cache
def tensors(sizes: Right, device: str) -> dict[str, torch.Tensor]:
    """All tensors of a right call of any op. Nothing writes to them."""

    def make(heads: int, length: int, dtype: torch.dtype = sizes.dtype) -> torch.Tensor:
        shape = (sizes.batch, heads, length, sizes.head_dim)
        return torch.ones(shape, dtype=dtype, device=device)

    q_blocks, k_blocks = sizes.block_counts()
    keep = torch.ones(sizes.batch, sizes.q_heads, q_blocks, k_blocks, dtype=torch.bool)
    bits, counts = oracle.pack_bits(keep.to(device))
    return {
        "q": make(sizes.q_heads, sizes.q_len),
        "k": make(sizes.kv_heads, sizes.k_len),
        "v": make(sizes.kv_heads, sizes.k_len),
        "q_means": make(sizes.q_heads, q_blocks, torch.float32),
        "k_means": make(sizes.kv_heads, k_blocks, torch.float32),
        "bits": bits,
        "counts": counts,
    }


def call_of(*names: str, selects: bool = False, attends: bool = False) -> Any:
    """Builds a right call with these tensors and settings."""

    def build(sizes: Right, device: str) -> Arguments:
        arguments: Arguments = {name: tensors(sizes, device)[name] for name in names}
        if selects:
            high_band, low_band = sizes.bands()
            arguments |= {"high_band": high_band, "low_band": low_band, "top_p": 0.9}
            arguments |= {"keep_sink": 1, "keep_recent": 1, "keep_above": None}
        if attends:
            arguments["scale"] = None
        blocks = dict(zip(("q_block_size", "k_block_size"), sizes.blocks, strict=True))
        return arguments | {"causal": True} | blocks

    return build


def select_blocks_call(sizes: Right, device: str) -> Arguments:
    build = call_of("q_means", "k_means", selects=True)
    return build(sizes, device) | {"q_len": sizes.q_len, "k_len": sizes.k_len}


BLOCKS = {
    "causal": FLAG,
    "q_block_size": BLOCK_SIZE_OF_PAIR,
    "k_block_size": BLOCK_SIZE_OF_PAIR,
}
SELECTION = BLOCKS | {
    "high_band": BAND,
    "low_band": BAND,
    "top_p": PROBABILITY,
    "keep_sink": COUNT,
    "keep_recent": COUNT,
    "keep_above": THRESHOLD,
}

OPS: dict[str, Op] = {
    "block_pool": Op(
        lambda sizes, device: {"x": tensors(sizes, device)["q"], "block_size": sizes.blocks[0]},
        {"x": activation(64, 128), "block_size": BLOCK_SIZE},
    ),
    "select_blocks": Op(
        select_blocks_call,
        SELECTION
        | {
            "q_means": (*MEANS, Q_HEADS),
            "k_means": (*MEANS, K_HEADS),
            "q_len": LENGTH,
            "k_len": LENGTH,
        },
    ),
    "estimate_blocks": Op(
        call_of("q", "k", selects=True),
        SELECTION | {"q": (*ESTIMATED, Q_HEADS), "k": (*ESTIMATED, K_HEADS)},
    ),
    "sparse_attention": Op(
        call_of("q", "k", "v", "bits", "counts", attends=True),
        BLOCKS
        | {
            "q": (*ATTENDED, Q_HEADS),
            "k": (*ATTENDED, *LIKE_K),
            "v": (*ATTENDED, *LIKE_K),
            "bits": (*MASK, size(3, same)),
            "counts": MASK,
            "scale": SCALE,
        },
    ),
    "prefill": Op(
        call_of("q", "k", "v", selects=True, attends=True),
        SELECTION
        | {
            "q": (*ESTIMATED, Q_HEADS),
            "k": (*ESTIMATED, *LIKE_K),
            "v": (*ESTIMATED, *LIKE_K),
            "scale": SCALE,
        },
    ),
}


def gpu_allocations() -> int:
    """Blocks the CUDA allocator has handed out so far; 0 where it has not been used."""
    if not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))


class WrongCall:
    """Arguments of a call, one of which is wrong; shown by that one."""

    def __init__(self, argument: str, arguments: Arguments) -> None:
        self.argument = argument
        self.arguments = arguments

    def __repr__(self) -> str:
        value = self.arguments[self.argument]
        if isinstance(value, torch.Tensor):
            stride = tuple(value.stride())
            value = f"{value.dtype} {tuple(value.shape)} strides {stride} on {value.device}"
        return f"{self.argument} = {value!s}"


@st.composite
def wrong_calls(draw: Draw, name: str, device: str) -> WrongCall:
    op = OPS[name]
    sizes = draw(st.sampled_from(RIGHT))
    arguments = op.build(sizes, device)
    argument = draw(st.sampled_from(sorted(op.mutations)))
    mutate = draw(st.sampled_from(op.mutations[argument]))
    wrong = mutate(draw, Site(argument, arguments[argument], arguments, sizes))
    return WrongCall(argument, arguments | {argument: wrong})
