"""prism::prefill: selection and attention in one call, by every estimator and of every batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import call, inputs, oracle
from helpers.build import select_bands, select_settings, structured_batch
from helpers.cases import SELECT_GROUPS, SelectCase
from helpers.compare import (
    assert_repeats,
    assert_same,
    check_attention,
    check_selection,
)
from helpers.params import case_params
from helpers.poison import poisoned_allocations
from helpers.ragged import RaggedCase, RaggedInputs, ragged_inputs

import prism_cuda

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

SANITIZER_CASES = (
    "regular-b64_d64",
    "ragged-one_short",
    "prefix-offset_100_b128_64",
    "tiny-two_tokens",
)
GROUPS = {name: SELECT_GROUPS[name] for name in SELECT_GROUPS if name != "settings"}
every_estimator = pytest.mark.parametrize("estimator", ["bands", "grid", "all"])
SELECTING = ("bands", "grid")


def qkv(case: SelectCase, device: str, layout: str = "contiguous") -> Any:
    q, k = structured_batch(case, device)
    v = inputs.tensor(tuple(k.shape), torch.float32, device, seed=11)
    return tuple(inputs.lay_out(x.bfloat16(), layout, device) for x in (q, k, v))


def bands_of(case: SelectCase, estimator: str) -> dict[str, list[int]]:
    high, low = select_bands(case) if estimator == "bands" else ([], [])
    return {"high_band": high, "low_band": low}


def run(
    tensors: tuple[torch.Tensor, ...], case: SelectCase, estimator: str = "bands", **changes: Any
) -> Outputs:
    settings = select_settings(case) | bands_of(case, estimator) | changes
    with poisoned_allocations():
        q, k, v = tensors
        return call.prefill(q, k, v, estimator, case.top_p, **settings)


def every_block(
    shape: tuple[int, ...], case: SelectCase, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads = shape[:2]
    mask = prism_cuda.BlockMask.full(
        batch, heads, case.q_len, case.k_len, q_block_size=case.blocks[0],
        k_block_size=case.blocks[1], causal=case.causal, window_left=window,
    )  # fmt: skip
    return mask.bits, mask.counts


def chain(
    tensors: tuple[torch.Tensor, ...], case: SelectCase, estimator: str = "bands", **scores: Any
) -> Outputs:
    q, k, v = tensors
    settings = select_settings(case)
    if estimator == "bands":
        bits, counts = call.select_bands(q, k, *select_bands(case), case.top_p, **settings)
    elif estimator == "grid":
        bits, counts = call.select_grid(q, k, case.top_p, **settings)
    else:
        made = every_block(tuple(q.shape), case, scores.get("window_left"))
        bits, counts = (x.to(q.device) for x in made)
    # Filled first for initcheck too: it does not see TMA's stores through a tensor map, and takes
    # the output for unwritten when torch.equal reads it.
    with poisoned_allocations():
        out, lse = torch.ops.prism.sparse_attention(
            q, k, v, bits, counts, None, case.causal, *case.blocks, **scores
        )
    return out, lse, bits, counts


@every_estimator
@pytest.mark.parametrize("case", case_params(GROUPS, SANITIZER_CASES))
def test_equals_the_chain_of_ops(case: SelectCase, estimator: str, device: str) -> None:
    tensors = qkv(case, device)
    if estimator == "grid" and case.head_dim > 128:
        with pytest.raises(RuntimeError, match="prism::prefill: q has head_dim.*grid.*128"):
            run(tensors, case, estimator)
        return
    for got, want in zip(
        run(tensors, case, estimator), chain(tensors, case, estimator), strict=True
    ):
        assert not got.numel() or got.stride() == want.stride()
        assert torch.equal(got, want)


SCORES: dict[str, dict[str, Any]] = {
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 4.0, 2.0])},
    "softcap": {"softcap": 2.0},
    "window": {"window_left": 90},
    "window_of_all": {"window_left": 5000},
    "all": {"sinks": torch.tensor([0.5, -1.0, 4.0, 2.0]), "softcap": 2.0, "window_left": 90},
}


def scores_of(name: str, device: str) -> dict[str, Any]:
    made = dict(SCORES[name])
    return made | {"sinks": made["sinks"].to(device)} if "sinks" in made else made


@every_estimator
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SCORES)
def test_scores_equal_those_of_the_chain(
    name: str, causal: bool, estimator: str, device: str
) -> None:
    case = SelectCase("scores", 300, 700, q_heads=4, causal=causal)
    tensors, scores = qkv(case, device), scores_of(name, device)
    got = run(tensors, case, estimator, **scores)
    assert_same(got, chain(tensors, case, estimator, **scores))


@pytest.mark.parametrize("estimator", SELECTING)
def test_heads_with_rules_of_their_own(estimator: str, device: str) -> None:
    case = SelectCase("per_head", 640, 900, q_heads=4)
    q, k, v = qkv(case, device)
    top_p = [0.2, 1.0, 0.9, 0.0]
    options = select_settings(case) | bands_of(case, estimator)
    together = call.prefill(q, k, v, estimator, top_p, **options)
    for head, own in enumerate(top_p):
        alone = call.prefill(q, k, v, estimator, own, **options)
        assert all(
            torch.equal(a[:, head], b[:, head]) for a, b in zip(together, alone, strict=True)
        )


RAGGED = ((300, 700), (0, 50), (130, 200), (1, 400), (90, 64), (129, 1000))


def ragged_chain(made: RaggedInputs, estimator: str, options: dict[str, Any]) -> Outputs:
    scores = {name: options.pop(name) for name in ("sinks", "softcap", "window_left", "scale")}
    sizes = {name: options[name] for name in ("causal", "q_block_size", "k_block_size")}
    if estimator == "bands":
        bits, counts = call.select_bands(made.q, made.k, **made.where(), **options)
    elif estimator == "grid":
        options = {name: x for name, x in options.items() if not name.endswith("_band")}
        options["scale"] = scores["scale"]
        bits, counts = call.select_grid(made.q, made.k, **made.where(), **options)
    else:
        bits, counts = every_ragged_block(made, options, scores["window_left"])
    out, lse = torch.ops.prism.sparse_attention(
        made.q, made.k, made.v, bits, counts, **made.where(), **sizes, **scores
    )
    return out, lse, bits, counts


def every_ragged_block(
    made: RaggedInputs, options: dict[str, Any], window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = {name: options[name] for name in ("q_block_size", "k_block_size", "causal")}
    longest = (made.tensors["max_seqlen_q"], made.tensors["max_seqlen_k"])
    blocks = (oracle.ceil_div(n, m) for n, m in zip(longest, sizes.values(), strict=False))
    keep = torch.zeros(len(RAGGED), made.q.shape[1], *blocks, dtype=torch.bool)
    for b, (q_len, k_len) in enumerate(RAGGED):
        mask = prism_cuda.BlockMask.full(
            1, made.q.shape[1], q_len, k_len, **sizes, window_left=window
        ).to_dense()
        keep[b, :, : mask.shape[2], : mask.shape[3]] = mask[0]
    return tuple(x.to(made.q.device) for x in oracle.pack_bits(keep))  # type: ignore[return-value]


@every_estimator
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("scores", ["none", *SCORES])
def test_a_ragged_batch_equals_the_chain_of_ops(
    scores: str, page_size: int | None, estimator: str, device: str
) -> None:
    case = RaggedCase("prefill", RAGGED, page_size=page_size, slack=(70, 300), blocks=(128, 64))
    made = ragged_inputs(case, torch.bfloat16, device)
    high, low = oracle.half_split_bands(64, 32, 48) if estimator == "bands" else ([], [])
    options: dict[str, Any] = made.settings | {"high_band": high, "low_band": low, "sinks": None}
    options |= {"top_p": 0.6, "keep_above": 0.1, "dense_below": 300}
    options |= {} if scores == "none" else scores_of(scores, device)
    with poisoned_allocations():
        got = call.prefill(made.q, made.k, made.v, estimator, **made.where(), **options)
    assert_same(got, ragged_chain(made, estimator, options))


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_matches_float64_in_every_layout(device: str, layout: str) -> None:
    case = SelectCase("layout", 900, 1000, batch=2, q_heads=4)
    q, k, v = qkv(case, device, layout)
    out, lse, bits, counts = run((q, k, v), case)
    assert out.stride() == torch.empty_like(q).stride()
    assert out.dtype == q.dtype
    assert lse.is_contiguous()

    keep = oracle.unpack_bits(bits, oracle.ceil_div(case.k_len, case.blocks[1]))
    assert torch.equal(keep.sum(-1).int(), counts)
    settings = select_settings(case)
    check_selection(
        keep,
        oracle.select(
            oracle.block_means(q, case.blocks[0]), oracle.block_means(k, case.blocks[1]),
            case.q_len, case.k_len, *select_bands(case), case.top_p, **settings,
        ),
    )  # fmt: skip
    options: dict[str, Any] = {
        name: settings[name] for name in ("causal", "q_block_size", "k_block_size")
    }
    check_attention(
        out,
        lse,
        *oracle.attention_and_plain(q, k, v, keep, **options),
    )


@pytest.mark.parametrize("causal", [True, False])
def test_p_1_equals_dense_attention(device: str, causal: bool) -> None:
    case = SelectCase("dense", 300, 401, q_heads=4, top_p=1.0, causal=causal)
    q, k, v = qkv(case, device)
    out, lse, _, _ = run((q, k, v), case)
    everything = torch.ones(1, 4, 5, 7, dtype=torch.bool, device=device)
    options: dict[str, Any] = {"q_block_size": 64, "k_block_size": 64, "causal": causal}
    check_attention(
        out,
        lse,
        *oracle.attention_and_plain(q, k, v, everything, **options),
    )


def test_scale_reaches_the_attention_and_the_grid_but_not_the_bands(device: str) -> None:
    case = SelectCase("scale", 700, 700)
    tensors = qkv(case, device)
    out, _, bits, _ = run(tensors, case)
    scaled_out, _, scaled_bits, _ = run(tensors, case, scale=0.5)
    assert torch.equal(bits, scaled_bits)
    assert not torch.equal(out, scaled_out)
    grid = [run(tensors, case, "grid", scale=scale)[2] for scale in (0.125, 0.5)]
    assert not torch.equal(*grid)


def test_defaults_are_those_of_the_interface(device: str) -> None:
    case = SelectCase("defaults", 700, 700, head_dim=128, blocks=(128, 64), high=64, low=96)
    tensors = qkv(case, device)
    bare = torch.ops.prism.prefill(*tensors, "bands", *select_bands(case), [case.top_p])
    assert_same(bare, run(tensors, case, scale=128**-0.5))


def test_repeats_are_bit_identical(device: str) -> None:
    case = SelectCase("repeat", 1200, 1300, q_heads=4)
    tensors = qkv(case, device)
    assert_repeats(lambda: run(tensors, case))


def test_inputs_are_left_unchanged(device: str) -> None:
    case = SelectCase("inputs", 500, 600)
    tensors = qkv(case, device)
    before = [x.clone() for x in tensors]
    run(tensors, case)
    assert all(torch.equal(x, was) for x, was in zip(tensors, before, strict=True))


def test_long_input_matches_float64(cuda: str) -> None:
    case = SelectCase("long", 8192, 8192, q_heads=4, head_dim=128, blocks=(128, 128), high=64,
                      low=96, top_p=0.9)  # fmt: skip
    q, k, v = qkv(case, cuda, "length_first")
    out, lse, bits, _ = run((q, k, v), case)
    keep = oracle.unpack_bits(bits, 64)
    check_selection(
        keep,
        oracle.select(
            oracle.block_means(q, 128), oracle.block_means(k, 128),
            case.q_len, case.k_len, *select_bands(case), case.top_p, **select_settings(case),
        ),
    )  # fmt: skip
    options: dict[str, Any] = {"q_block_size": 128, "k_block_size": 128, "causal": True}
    check_attention(
        out,
        lse,
        *oracle.attention_and_plain(q, k, v, keep, **options),
    )
