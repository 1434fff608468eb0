"""select_bands and select_grid of ragged batches: what each sequence keeps by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import oracle
from helpers.call import listed
from helpers.cases import B64, B128_64
from helpers.compare import assert_same
from helpers.params import case_params, device_dtype_params, needs_cuda
from helpers.poison import poisoned_allocations
from helpers.ragged import LENGTHS, RaggedCase, RaggedInputs, ragged_inputs, selected_alone

import prism_cuda  # noqa: F401  registers the ops

# Chunks that begin inside a block, and rows of more than one mask word.
LONGER = (*LENGTHS, (77, 1500), (129, 4200), (333, 1000))
RULES: dict[str, Any] = {"top_p": 0.8, "keep_sink": 1, "keep_recent": 2, "keep_above": 0.2}


@dataclass(frozen=True)
class RaggedSelection:
    name: str

    def op(self, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = {name: listed(arguments[name]) for name in ("top_p", "keep_above")}
        return getattr(torch.ops.prism, self.name)(**arguments | numbers)

    def arguments_of(self, case: RaggedInputs) -> dict[str, Any]:
        names = ("causal", "q_block_size", "k_block_size")
        settings = {name: case.settings[name] for name in names}
        if self is BANDS:
            high, low = oracle.half_split_bands(case.q.shape[-1], 32, 48)
            settings |= {"high_band": high, "low_band": low}
        return {"q": case.q, "k": case.k} | case.where() | RULES | settings

    def run(self, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        with poisoned_allocations():
            return self.op(**arguments)

    def check(self, case: RaggedInputs, **changes: Any) -> None:
        """Every sequence keeps what it keeps alone, bit by bit."""
        arguments = self.arguments_of(case) | changes
        bits, counts = self.run(arguments)
        not_alone = {*case.where(), "q", "k", "dense_below"}
        settings = {name: x for name, x in arguments.items() if name not in not_alone}
        want_bits, want_counts = selected_alone(self.op, case, settings)
        assert torch.equal(counts.cpu(), want_counts)
        assert torch.equal(bits.cpu(), want_bits)


BANDS = RaggedSelection("select_bands")
GRID = RaggedSelection("select_grid")
every_selection = pytest.mark.parametrize("select", [BANDS, GRID], ids=lambda s: s.name)

# Shared by both, but for head sizes; what only one of them can show is in ONLY_BANDS and ONLY_GRID.
CASES = {
    "packed": (
        RaggedCase("d64"),
        RaggedCase("d128", head_dim=128),
        RaggedCase("d128_longer", LONGER, head_dim=128),
        RaggedCase("b128_64", LONGER, blocks=B128_64),
        RaggedCase("b64_d128", LONGER, head_dim=128, blocks=B64),
        RaggedCase("bidirectional", LONGER, causal=False),
        RaggedCase("unused_rows", LONGER, unused=37),
        RaggedCase("slack", LONGER, slack=(700, 30000)),
        RaggedCase("odd_stride", LONGER, odd_stride=True),
        RaggedCase("one_kv_head", LONGER, q_heads=5, kv_heads=1),
        RaggedCase("many_sequences", ((3, 40), (0, 9), (17, 17)) * 23, q_heads=2),
        *(RaggedCase(f"d{n}", LONGER, head_dim=n) for n in (56, 80, 96)),
        RaggedCase("d96_odd_stride", LONGER, head_dim=96, odd_stride=True, blocks=B64),
    ),
    "paged": (
        *(RaggedCase(f"page_{n}", LONGER, page_size=n) for n in (1, 2, 8, 16, 64, 256)),
        RaggedCase("page_8_d128_b64", LONGER, page_size=8, head_dim=128, blocks=B64),
        RaggedCase("page_256_d128", LONGER, page_size=256, head_dim=128),
        RaggedCase("page_16_d96", LONGER, page_size=16, head_dim=96),
        RaggedCase("page_4_d80_odd_stride", LONGER, page_size=4, head_dim=80, odd_stride=True),
        RaggedCase("shared_prefix", LONGER, page_size=16, shared=True),
        RaggedCase("heads_first", LONGER, page_size=32, heads_first=True, head_dim=128),
        RaggedCase("slack", LONGER, page_size=64, slack=(300, 9000), causal=False),
    ),
}
ONLY_BANDS = {
    "bands": (
        RaggedCase("d192", LONGER, head_dim=192),
        RaggedCase("d256", LONGER, head_dim=256),
        RaggedCase("page_64_d256_b64", LONGER, page_size=64, head_dim=256, blocks=B64),
        RaggedCase("page_4_d192_odd_stride", LONGER, page_size=4, head_dim=192, odd_stride=True),
        # The sums behind a temperature are cut elsewhere from 129 blocks on.
        RaggedCase("energy_chunks", ((8192, 8192), (8193, 8193), (1, 1)), 1, 1, blocks=B64),
    ),
}
ONLY_GRID = {
    "grid": (
        RaggedCase("d8", LONGER, head_dim=8),
        # Masses of a row that do not fit shared memory.
        RaggedCase("long_row", ((5, 300), (40, 70000)), 1, 1),
    ),
}
SANITIZER_CASES = (
    "packed-b64_d128",
    "packed-odd_stride",
    "packed-d96",
    "packed-many_sequences",
    "paged-page_1",
    "paged-page_64",
    "paged-heads_first",
)


def check_on(select: RaggedSelection, case: RaggedCase, on: str, dtype: torch.dtype) -> None:
    if on == "cuda":
        needs_cuda()
    select.check(ragged_inputs(case, dtype, on))


@every_selection
@pytest.mark.parametrize("case", case_params(CASES, SANITIZER_CASES))
@pytest.mark.parametrize(("on", "dtype"), device_dtype_params())
def test_a_sequence_keeps_what_it_keeps_alone(
    select: RaggedSelection, case: RaggedCase, on: str, dtype: torch.dtype
) -> None:
    check_on(select, case, on, dtype)


@pytest.mark.parametrize("case", case_params(ONLY_BANDS, ["bands-page_64_d256_b64"]))
@pytest.mark.parametrize(("on", "dtype"), device_dtype_params())
def test_by_bands_a_sequence_keeps_what_it_keeps_alone(
    case: RaggedCase, on: str, dtype: torch.dtype
) -> None:
    check_on(BANDS, case, on, dtype)


@pytest.mark.parametrize("case", case_params(ONLY_GRID))
@pytest.mark.parametrize(("on", "dtype"), device_dtype_params())
def test_on_the_grid_a_sequence_keeps_what_it_keeps_alone(
    case: RaggedCase, on: str, dtype: torch.dtype
) -> None:
    check_on(GRID, case, on, dtype)


@pytest.mark.parametrize(
    ("select", "rules"),
    [
        *(
            (select, rules)
            for select in (BANDS, GRID)
            for rules in (
                {"top_p": 1.0},
                {"top_p": 0.0, "keep_above": None, "keep_sink": 0, "keep_recent": 0},
                {"top_p": 0.9, "keep_sink": 3},
                {"top_p": [0.2, 1.0, 0.9, 0.0], "keep_above": [0.3, 0.5, 0.01, 0.02]},
            )
        ),
        (BANDS, {"top_p": 0.5, "high_band": []}),
        (BANDS, {"top_p": 0.9, "low_band": [], "keep_sink": 3}),
        (GRID, {"top_p": 0.5, "keep_above": None, "scale": 0.7}),
    ],
)
@pytest.mark.parametrize("page_size", [None, 16])
def test_rules(
    select: RaggedSelection, device: str, rules: dict[str, Any], page_size: int | None
) -> None:
    case = RaggedCase("rules", LONGER, page_size=page_size, slack=(300, 300))
    select.check(ragged_inputs(case, torch.bfloat16, device), **rules)


@every_selection
@pytest.mark.parametrize("page_size", [None, 64])
@pytest.mark.parametrize("heads", [1, 16])
def test_more_than_1024_key_blocks(
    select: RaggedSelection, cuda: str, heads: int, page_size: int | None
) -> None:
    lengths = ((300, 70001), (64, 64), (0, 0), (129, 3000), (1, 0), (2049, 2100))
    case = RaggedCase("long", lengths, heads, 1, blocks=B64, page_size=page_size)
    inputs = ragged_inputs(case, torch.bfloat16, cuda)
    select.check(inputs)
    select.check(inputs, top_p=1.0)


@every_selection
@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_tiles_than_fit_at_a_time(select: RaggedSelection, cuda: str, head_dim: int) -> None:
    """Thread blocks go from tiles of one sequence to those of others, more than 32 further."""
    lengths = ((2500, 2500), (1, 1), (0, 5), (700, 2100)) * 20
    case = RaggedCase("tiles", lengths, 8, 2, head_dim=head_dim)
    select.check(ragged_inputs(case, torch.bfloat16, cuda))


@every_selection
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("causal", [True, False])
def test_short_sequences_keep_what_they_see(
    select: RaggedSelection, device: str, causal: bool, page_size: int | None
) -> None:
    """Below dense_below keys, or one block of queries: every block that a row sees, no others."""
    case = ragged_inputs(
        RaggedCase("short", LONGER, page_size=page_size, causal=causal, slack=(200, 500)),
        torch.bfloat16,
        device,
    )
    arguments = select.arguments_of(case) | {"top_p": 0.1, "keep_above": None}
    plain = select.run(arguments)
    bits, counts = select.run(arguments | {"dense_below": 1200})
    kept = 0
    for b, (q_len, k_len) in enumerate(LONGER):
        own = (bits[b], counts[b])
        if q_len >= 128 and k_len >= 1200:
            kept += int(counts[b].sum())
            assert all(torch.equal(x, y[b]) for x, y in zip(own, plain, strict=True))
            continue
        seen = oracle.visible_blocks(q_len, k_len, 128, 128, causal)
        want = torch.zeros(bits.shape[2], 32 * bits.shape[3], dtype=torch.bool)
        want[: seen.shape[0], : seen.shape[1]] = seen
        got = oracle.unpack_bits(bits[b].cpu(), want.shape[1])
        assert torch.equal(got, want.expand_as(got))
        assert torch.equal(counts[b].cpu(), got.sum(-1).int())
    assert kept, "no sequence is selected from"


@every_selection
@pytest.mark.parametrize("page_size", [None, 16])
def test_what_exceeds_the_longest_lengths_is_left_out(
    select: RaggedSelection, device: str, page_size: int | None
) -> None:
    made = ragged_inputs(
        RaggedCase("cut", ((300, 500), (70, 90)), page_size=page_size), torch.bfloat16, device
    )
    cut = {"max_seqlen_q": 200, "max_seqlen_k": 333}
    bits, counts = select.run(select.arguments_of(made) | cut)
    q, k = made.q[:200].transpose(0, 1)[None], made.keys[0][None, :, :333]
    rest = {name: None for name in made.where()}
    want = select.op(**select.arguments_of(made) | rest | {"q": q, "k": k})
    assert torch.equal(bits[:1], want[0])
    assert torch.equal(counts[:1], want[1])


@every_selection
def test_pages_that_are_not_there_read_as_zeros(select: RaggedSelection, device: str) -> None:
    made = ragged_inputs(
        RaggedCase("zeros", ((130, 300), (70, 200)), page_size=16), torch.bfloat16, device
    )
    arguments = select.arguments_of(made)
    table = arguments["block_table"] = arguments["block_table"].clone()
    pages = table[0].tolist()
    table[0, 3], table[0, 5] = -7, len(made.k)
    got = select.run(arguments)
    table[0, 3], table[0, 5] = pages[3], pages[5]
    made.k[[pages[3], pages[5]]] = 0
    assert_same(got, select.run(arguments))


@every_selection
def test_no_sequence_and_no_row(select: RaggedSelection, device: str) -> None:
    for lengths in (((0, 3), (0, 0)), ((3, 0), (130, 0))):
        select.check(ragged_inputs(RaggedCase("nothing", lengths), torch.bfloat16, device))
    arguments = select.arguments_of(ragged_inputs(RaggedCase("none"), torch.bfloat16, device))
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        arguments[name] = arguments[name][:1]
    bits, counts = select.run(arguments)
    assert bits.shape == (0, 4, 2, 1)
    assert counts.shape == (0, 4, 2)


@every_selection
@pytest.mark.parametrize("page_size", [None, 16])
def test_sequences_do_not_see_each_other(
    select: RaggedSelection, device: str, page_size: int | None
) -> None:
    case = ragged_inputs(RaggedCase("nan", page_size=page_size), torch.bfloat16, device)
    arguments = select.arguments_of(case)
    before = select.run(arguments)
    victim = 3
    case.q[case.rows()[victim]] = torch.nan
    if page_size is None and select is GRID:
        first_key = sum(k_len for _, k_len in LENGTHS[:victim])
        case.k[first_key : first_key + LENGTHS[victim][1]] = torch.nan
    others = [b for b in range(len(LENGTHS)) if b != victim]
    for got, want in zip(select.run(arguments), before, strict=True):
        assert torch.equal(got[others], want[others])


@every_selection
def test_wrong_lengths_and_pages_stay_within_the_tensors(
    select: RaggedSelection, device: str
) -> None:
    packed = select.arguments_of(ragged_inputs(RaggedCase("packed"), torch.bfloat16, device))
    packed["cu_seqlens_q"][-1] = 1 << 30
    packed["cu_seqlens_k"][-1] = 1 << 30
    packed["cu_seqlens_k"][2] = -5
    paged = select.arguments_of(
        ragged_inputs(RaggedCase("paged", page_size=16), torch.bfloat16, device)
    )
    paged["block_table"][:, 0] = 1 << 30
    paged["block_table"][:, 1] = -7
    paged["seqused_k"][0] = 1 << 30
    paged["seqused_k"][1] = -1
    for arguments in (packed, paged):
        bits, counts = select.run(arguments)
        set_bits = oracle.unpack_bits(bits, 3).sum(-1)
        assert torch.equal(set_bits.cpu(), counts.cpu().long())


@every_selection
def test_lengths_are_read_on_the_device(select: RaggedSelection, cuda: str) -> None:
    """A captured graph follows lengths and pages that change afterwards."""
    case = ragged_inputs(RaggedCase("graph", page_size=16, head_dim=128), torch.bfloat16, cuda)
    arguments = select.arguments_of(case)
    select.run(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bits, counts = select.op(**arguments)
    other = ragged_inputs(
        RaggedCase("other", LENGTHS[::-1], page_size=16, head_dim=128), torch.bfloat16, cuda, seed=7
    )
    for name in ("q", "k"):
        getattr(case, name).copy_(getattr(other, name))
    for name in ("cu_seqlens_q", "seqused_k", "block_table"):
        case.tensors[name].copy_(other.tensors[name])
    graph.replay()
    want = select.run(select.arguments_of(other))
    assert torch.equal(bits, want[0])
    assert torch.equal(counts, want[1])
