"""The benchmarks' masks and points; nothing here needs a GPU or the ops library."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import attention
import masks
import suites
from accuracy import accuracy, sample
from implementations import BlockSparsity, Inputs, flex_window

from prism_cuda.bits import unpack

HEADS, LENGTH = 3, 4096
BLOCKS = LENGTH // 128
CPU = {"device": "cpu"}


def make(name: str, density: float, **changes: object) -> BlockSparsity:
    point = suites.Point(LENGTH, name, density, ("prism",), **changes)
    return suites.build_sparsity(point, HEADS, "cpu")


def forced(mask: torch.Tensor) -> bool:
    diagonal = mask.diagonal(dim1=-2, dim2=-1)
    return bool(diagonal.all() and mask[..., 0].all())


@pytest.mark.parametrize("name", suites.MASKS)
def test_causal_masks_keep_diagonal_and_first_block_and_nothing_hidden(name: str) -> None:
    mask = make(name, 0.25).mask
    assert mask.shape == (1, HEADS, BLOCKS, BLOCKS)
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()
    assert forced(mask)
    assert not mask.triu(1).any()


@pytest.mark.parametrize("density", suites.DENSITIES)
@pytest.mark.parametrize("name", ["structured", "longrow"])
def test_structured_masks_keep_as_many_blocks_a_head_as_random_ones(
    name: str, density: float
) -> None:
    mask, like = make(name, density).mask, make("random", density).mask
    assert torch.equal(mask.sum((2, 3)), like.sum((2, 3)))
    assert not torch.equal(mask, like)


def test_random_mask_has_its_density() -> None:
    for causal in (True, False):
        mask = make("random", 0.25, causal=causal).mask
        free = torch.ones(BLOCKS, BLOCKS, dtype=torch.bool)
        free = (free.tril(-1) if causal else free) & ~torch.eye(BLOCKS, dtype=torch.bool)
        free[:, 0] = False
        assert mask[..., free].float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert mask.triu(1).any()


def test_random_causal_mask_is_the_square_case() -> None:
    mask = masks.random_causal_mask(HEADS, BLOCKS, 0.25, "cpu", seed=3)
    assert torch.equal(mask, masks.random_mask(HEADS, LENGTH, 0.25, seed=3, **CPU))
    assert masks.causal_density(mask) == pytest.approx(float(mask.sum() / mask.tril().numel() * 2)
                                                       * BLOCKS / (BLOCKS + 1))  # fmt: skip


def test_structured_mask_is_band_and_lines() -> None:
    mask = make("structured", 0.25).mask[0]
    index = torch.arange(BLOCKS)
    distance = index[:, None] - index
    for head in mask:
        lines = [c for c in range(1, BLOCKS - 1) if head[c:, c].all()]
        width = int(head[-1].flip(0).long().cumprod(0).sum())
        rest = head.clone()
        rest[:, [0, *lines]] = False
        assert not rest[distance >= width].any()
        # All diagonals of the band but its last one are complete.
        assert head[(distance >= 0) & (distance < width - 1)].all()
        assert 1 < width < BLOCKS // 2
        assert any(c < BLOCKS - width for c in lines)


def test_long_row_mask_has_one_long_row() -> None:
    counts = make("longrow", 0.25).mask.sum(-1)[0]
    for head in counts:
        row = int(head.argmax())
        others = torch.cat([head[:row], head[row + 1 :]])
        assert row >= BLOCKS // 2
        assert int(head[row]) == row + 1
        full_rows = min(int(others.max()), BLOCKS - 1)
        assert int(others.max()) * 1.5 < row + 1
        # Rows that see enough all keep the same, but for the last block handed out.
        assert int(others[full_rows:].max() - others[full_rows:].min()) <= 1


@pytest.mark.parametrize("causal", [True, False])
def test_key_blocks_of_64_cover_what_is_visible(causal: bool) -> None:
    fine = masks.full_mask(1, LENGTH, k_block=64, causal=causal, **CPU)
    coarse = masks.full_mask(1, LENGTH, causal=causal, **CPU)
    assert torch.equal(fine, coarse.repeat_interleave(2, -1))
    mask = make("random", 0.25, block=64, causal=causal).mask
    assert mask.shape == (1, HEADS, BLOCKS, 2 * BLOCKS)
    pairs = mask.unflatten(-1, (BLOCKS, 2))
    assert forced(pairs[..., 0]) and forced(pairs[..., 1])
    assert not torch.equal(pairs[..., 0], pairs[..., 1])


def test_packing_and_lists_give_the_mask_back() -> None:
    mask = make("random", 0.25).mask
    bits, counts = masks.pack(mask)
    assert torch.equal(unpack(bits, BLOCKS), mask)
    listed, order = masks.block_lists(mask)
    assert torch.equal(listed, counts) and torch.equal(counts, mask.sum(-1).int())
    for row in (0, 5, BLOCKS - 1):
        kept = order[0, 1, row, : int(listed[0, 1, row])]
        assert kept.tolist() == mask[0, 1, row].nonzero().flatten().tolist()


def test_flops_count_the_kept_area() -> None:
    coarse = suites.flops(make("random", 0.25), 128)
    fine = suites.flops(make("random", 0.25, block=64), 128)
    assert coarse == 4 * 128 * 128 * 128 * make("random", 0.25).mask.sum()
    assert fine == pytest.approx(coarse, rel=0.1)
    assert suites.flops(make("full", 1.0), 64) == 2 * 64 * HEADS * LENGTH**2
    assert suites.flops(make("full", 1.0, causal=False), 64) == 4 * 64 * HEADS * LENGTH**2
    seen = int(banded(LENGTH, 100).sum())
    assert suites.flops(make("full", 1.0, window=100), 64) == 4 * 64 * HEADS * seen


def banded(length: int, window: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril().triu(-window)


@pytest.mark.parametrize("window", [0, 100, 128, 255, 256, 1023])
def test_flex_attention_gets_the_window_by_blocks(window: int) -> None:
    blocks = flex_window(masks.full_mask(1, 1024, device="cpu"), 1024, window)
    tiles = banded(1024, window).unflatten(0, (-1, 128)).unflatten(-1, (-1, 128)).transpose(1, 2)
    got = []
    for counts, indices in (
        (blocks.full_kv_num_blocks, blocks.full_kv_indices),
        (blocks.kv_num_blocks, blocks.kv_indices),
    ):
        rank = torch.empty_like(indices).scatter_(
            -1, indices.long(), torch.arange(8).int().expand_as(indices)
        )
        got.append((rank < counts[..., None])[0, 0])
    whole, partial = got
    assert torch.equal(whole, tiles.all(-1).all(-1))
    assert torch.equal(whole | partial, tiles.any(-1).any(-1))
    assert not (whole & partial).any()


@pytest.mark.parametrize(("window", "softcap"), [(100, None), (None, 1.0), (130, 2.0)])
def test_accuracy_knows_windows_and_caps(window: int | None, softcap: float | None) -> None:
    point = suites.Point(512, "full", 1.0, ("prism",), window=window, softcap=softcap)
    q, k, v = (torch.randn(1, heads, 512, 64).bfloat16() for heads in (4, 2, 2))
    scores = (q.double() @ k.double().repeat_interleave(2, 1).mT) / 8
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    seen = banded(512, 512 if window is None else window)
    weights = scores.masked_fill(~seen, -float("inf")).softmax(-1)
    out = (weights @ v.double().repeat_interleave(2, 1)).bfloat16()
    sparsity = suites.build_sparsity(point, 4, "cpu")
    assert accuracy(out, sample(Inputs(q, k, v), sparsity)).ratio <= attention.PRISM_ERROR_RATIO
    plain = replace(sparsity, window=None, softcap=None)
    assert accuracy(out, sample(Inputs(q, k, v), plain)).ratio > attention.PRISM_ERROR_RATIO


@pytest.mark.parametrize("causal", [True, False])
def test_accuracy_tells_right_from_wrong(causal: bool) -> None:
    point = suites.Point(512, "random", 0.3, ("prism",), causal=causal)
    sparsity = suites.build_sparsity(point, 4, "cpu")
    x = Inputs(*(torch.randn(1, heads, 512, 64).bfloat16() for heads in (4, 2, 2)))
    tokens = sparsity.mask.repeat_interleave(128, -2).repeat_interleave(128, -1)
    tokens = tokens.tril() if causal else tokens
    out = torch.nn.functional.scaled_dot_product_attention(
        x.q.float(), x.k.float(), x.v.float(), attn_mask=tokens, enable_gqa=True
    )
    samples = sample(x, sparsity)
    assert accuracy(out.bfloat16(), samples).ratio <= attention.PRISM_ERROR_RATIO
    out[0, samples[-1].head, samples[-1].rows] *= 1.1
    assert accuracy(out, samples).ratio > attention.PRISM_ERROR_RATIO
    out[0, 0, 0, 0] = torch.nan
    assert accuracy(out, samples).ratio == float("inf")


def points(*arguments: str) -> list[suites.Point]:
    groups = attention.selected(attention.parse(arguments))
    assert all(len({p.length for p in group}) == 1 for group in groups)
    return [point for group in groups for point in group]


def test_default_points_cover_what_is_asked() -> None:
    default = points("--fa4", "anywhere")
    assert len(set(default)) == len(default)
    for name in suites.MASKS:
        assert {p.length for p in default if p.mask == name} == {8192, 32768, 131072}
    assert {p.head_dim for p in default} == {64, 128, 256}
    assert {p.dtype for p in default} == set(suites.DTYPES)
    assert {(p.mask, p.causal) for p in default} >= {("random", False), ("full", False)}
    assert {p.block for p in default} == {64, 128}
    for p in default:
        assert p.mask != "full" or p.density == 1
        assert p.mask == "full" or not {"cudnn", "fa2"} & set(p.impls)
        assert "fa4" not in p.impls or (p.dtype == "bfloat16" and p.block == 128)
        assert "flex" not in p.impls or p.length <= 32768
        assert set(p.eager) <= set(p.impls)


def test_options_select_points() -> None:
    chosen = points("--lengths", "8192", "--masks", "random", "--impls", "prism", "fa2",
                    "--blocks", "64", "--densities", "0.25")  # fmt: skip
    assert {(p.length, p.mask, p.impls, p.block) for p in chosen} == {
        (8192, "random", ("prism",), 64)
    }
    assert not any("official" in p.impls for p in points())
    assert any("official" in p.impls for p in points("--official", "somewhere"))
    assert {p.length for p in points("--suite", "quick")} == {8192}
    with pytest.raises(SystemExit):
        attention.parse(["--impls", "official"])
    with pytest.raises(SystemExit):
        attention.parse(["--masks", "dense"])


def test_times_become_rows_and_the_faster_variant_counts() -> None:
    bench = attention.Bench(attention.parse(["--impls", "prism", "fa4"]))
    point = suites.Point(8192, "random", 0.25, ("prism", "fa4"), eager=("prism",))
    checked = {"group": 1, "kept_density": 0.3, "error_ratio": 1.0, "correct": True,
               "bit_identical": True}  # fmt: skip

    def job(impl: str, variant: str, mode: str, calls: int) -> attention.Job:
        return attention.Job(point, impl, variant, mode, lambda: None, calls, checked, 6e11)

    bench.add_times(
        [job("prism", "", "graph", 2), job("prism", "", "eager", 1),
         job("fa4", "causal", "graph", 2), job("fa4", "mask_mod", "graph", 2)],
        [[2.0, 2.2, 1.9], [1.5, 1.5, 1.5], [4.0, 4.0, 4.0], [3.0, 3.0, 3.1]],
    )  # fmt: skip
    rows = {(row["impl"], row["mode"]): row for row in bench.rows}
    assert rows["prism", "graph"]["ms"] == 1.0
    assert rows["prism", "graph"]["tflops"] == pytest.approx(600)
    assert rows["prism", "graph"]["spread"] == pytest.approx(0.15)
    assert rows["prism", "eager"]["host_us"] == pytest.approx(500)
    assert rows["fa4", "graph"]["variant"] == "mask_mod"
    assert rows["fa4", "graph"]["ms_causal"] == 2.0
    (line,) = attention.summary(bench.rows)
    assert line["prism/fa4"] == pytest.approx(1.5)
    assert line["ok"] is True
