"""What every method must hold, and what single ones promise."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import rules
import scores
import torch
from attend import Blocks, density
from methods import METHODS, Grid
from scores import Call

from prism_cuda import PrismConfig, reference
from prism_cuda.bits import unpack

LENGTH = 700


def call(length: int = LENGTH, head_dim: int = 128) -> Call:
    return Call(torch.randn(1, 4, length, head_dim), torch.randn(1, 2, length, head_dim))


@pytest.mark.parametrize("name", METHODS)
def test_masks_are_causal_with_sink_and_diagonal(name) -> None:
    method = METHODS[name]
    blocks = method.blocks(LENGTH)
    mask = method.mask(call(), method.main)
    assert mask.dtype == torch.bool
    assert mask.shape == (1, 4, blocks.q_blocks, blocks.k_blocks)
    assert not (mask & ~blocks.visible()).any()
    assert mask[..., 0].all()
    assert (mask | ~blocks.forced()).all()


@pytest.mark.parametrize("name", METHODS)
def test_knobs_run_from_sparse_to_dense(name) -> None:
    method, one = METHODS[name], call()
    densities = [
        density(method.mask(one, knob), method.blocks(LENGTH)).mean().item()
        for knob in method.knobs
    ]
    assert densities == sorted(densities)
    assert method.main in method.knobs


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, m in METHODS.items()
        if getattr(m.rule, "func", m.rule) in (rules.top_p, rules.either)
    ],
)
def test_top_p_of_one_keeps_everything(name) -> None:
    method = METHODS[name]
    visible = method.blocks(LENGTH).visible()
    assert (method.mask(call(), 1.0) == visible).all()


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.rule is rules.above])
def test_threshold_of_zero_keeps_everything(name) -> None:
    method = METHODS[name]
    assert (method.mask(call(), 0.0) == method.blocks(LENGTH).visible()).all()


@pytest.mark.parametrize("name, size", [("prism", 128), ("prism_64", 64)])
def test_official_selection_is_the_package_s(name, size) -> None:
    one = call()
    bands = PrismConfig(bands=(64, 96)).resolve_bands(128)
    bits, _ = reference.select_bands(
        one.q, one.k, *bands.ranges, [0.9], q_block_size=size, k_block_size=size
    )
    mask = METHODS[name].mask(one, 0.9)
    assert (mask == unpack(bits, mask.shape[-1])).all()


@pytest.mark.parametrize("name", ["peak", "peak_128"])
def test_peak_is_the_package_s_grid(name) -> None:
    def drift(heads: int) -> torch.Tensor:
        """Means that change from block to block: noise alone keeps everything."""
        return torch.randn(1, heads, 11, 128).repeat_interleave(64, 2)[:, :, :LENGTH]

    noise, method = call(), METHODS[name]
    one = Call(noise.q + 2 * drift(4), noise.k + 2 * drift(2))
    config = PrismConfig(block_size=(128, method.k_size), estimator="grid", top_p=0.9)
    above = config.threshold(config.top_p, "grid")
    assert above is not None
    bits, _ = reference.select_grid(
        one.q,
        one.k,
        [config.top_p],
        [above],
        q_block_size=128,
        k_block_size=method.k_size,
    )
    mask = method.mask(one, config.top_p)
    kept = unpack(bits, mask.shape[-1])
    assert (mask == kept).all()
    assert not (kept == method.blocks(LENGTH).visible()).all()


def test_the_kernel_gets_the_rule_of_the_grid(monkeypatch) -> None:
    """What ``mask`` does on CUDA, with the reference in the op's place."""

    monkeypatch.setattr(torch.ops.prism, "select_grid", reference.select_grid)
    grids = [method for method in METHODS.values() if isinstance(method, Grid)]
    assert {"peak", "peak_p", "peak_128", "peak_by20"} <= {grid.name for grid in grids}
    one = call()
    one = Call(one.q + torch.randn(1, 4, 11, 128).repeat_interleave(64, 2)[:, :, :LENGTH], one.k)
    for grid in grids:
        for knob in (0.5, 0.9, 1.0):
            assert (grid.kernel_mask(one, knob) == grid.mask(one, knob)).all(), (grid.name, knob)


def test_running_energies_make_chunks_equal_the_whole() -> None:
    one = call(512)
    head = Call(one.q[:, :, :256], one.k[:, :, :256])
    running = partial(scores.bands, running=True)
    whole, part = running(one, Blocks(128, 64, 512)), running(head, Blocks(128, 64, 256))
    for full, start in zip(whole, part, strict=True):
        torch.testing.assert_close(full[:, :, :2, :4], start)
    official = scores.bands(one, Blocks(128, 64, 512))[0][:, :, :2, :4]
    assert not torch.allclose(official, scores.bands(head, Blocks(128, 64, 256))[0])


def test_group_selection_is_shared_by_query_heads() -> None:
    mask = METHODS["group"].mask(call(), 0.8)
    assert (mask[:, 0] == mask[:, 1]).all() and (mask[:, 2] == mask[:, 3]).all()
    assert (mask[:, 0] != mask[:, 2]).any()


def test_the_finest_grid_and_rows_are_the_oracle() -> None:
    one, blocks = call(256, 64), Blocks(128, 64, 256)
    (exact,) = scores.oracle(one, blocks)
    (estimated,) = scores.fine(one, blocks, 1, 1)
    torch.testing.assert_close(estimated, exact, rtol=1e-4, atol=1e-7)
    (by_rows,) = scores.rows(one, blocks, 1)
    torch.testing.assert_close(by_rows, exact, rtol=1e-4, atol=1e-7)


def test_a_peak_of_one_cell_outweighs_a_broad_share() -> None:
    """One of eight cells looks at block 1 alone; all of them a little at block 2."""
    one = call(1024)
    one.q.zero_()
    one.q[:, :, 896:912, 0] = 30.0  # one cell
    one.q[:, :, 896:, 1] = 8.0
    one.k.zero_()
    one.k[:, :, 64:128, 0] = 10.0
    one.k[:, :, 128:192, 1] = 4.0
    blocks = Blocks(128, 64, 1024)
    grid = partial(scores.fine, one, blocks, 16, 16)
    (mean,), (peak,) = grid(), grid(pool="peak")
    assert (mean[..., 7, 1] < mean[..., 7, 2]).all()
    assert (peak[..., 7, 1] > peak[..., 7, 2]).all()
    torch.testing.assert_close(peak.sum(-1), torch.ones(1, 4, 8))
    for view, expected in zip(grid(pool="both"), (peak, mean), strict=True):
        torch.testing.assert_close(view, expected)


def test_mixed_rules_read_their_own_view() -> None:
    def score(call, blocks):
        shape = (1, 1, blocks.q_blocks, blocks.k_blocks)
        peak, mean = torch.zeros(shape), torch.zeros(shape)
        peak[..., 3], peak[..., 2] = 0.95, 0.05
        mean[..., 5], mean[..., 6] = 0.0051, 0.0049
        return [peak, mean]

    one = Call(torch.randn(1, 1, 1024, 64), torch.randn(1, 1, 1024, 64))
    mask = replace(METHODS["mixed_by20"], score=score, k_size=128).mask(one, 0.9)
    assert mask[0, 0, 7].nonzero().flatten().tolist() == [0, 3, 5, 7]


def test_every_cell_chooses_for_itself() -> None:
    def score(call, blocks):
        cells = torch.zeros(1, 1, blocks.q_blocks, 8, blocks.k_blocks)
        cells[..., 3] = 1.0
        cells[..., 4, 3], cells[..., 4, 5] = 0.1, 0.9
        cells[..., 7, :] = 0  # as past the end
        return [cells, torch.zeros(1, 1, blocks.q_blocks, blocks.k_blocks)]

    one = Call(torch.randn(1, 1, 1024, 64), torch.randn(1, 1, 1024, 64))
    mask = replace(METHODS["each_by20"], score=score, k_size=128).mask(one, 0.8)
    assert mask[0, 0, 7].nonzero().flatten().tolist() == [0, 3, 5, 7]
    assert mask[0, 0, 4].nonzero().flatten().tolist() == [0, 3, 4]


def test_sharp_peaks_of_diffuse_cells_shrink() -> None:
    one, blocks = call(1024), Blocks(128, 64, 1024)
    cells, mean = scores.fine(one, blocks, 16, 16, pool="cells")
    assert cells.shape == (1, 4, 8, 8, 16)
    torch.testing.assert_close(cells.mean(3), mean)
    (peak,) = scores.fine(one, blocks, 16, 16, pool="peak", sharpen=2.0)
    square = cells.square() / cells.square().sum(-1, keepdim=True)
    torch.testing.assert_close(peak, square.amax(3) / square.amax(3).sum(-1, keepdim=True))


def test_spread_lets_the_best_key_of_a_cell_count() -> None:
    one = call(256, 64)
    one.q.fill_(1.0)
    one.k.zero_()
    one.k[:, :, 64:80, ::2] = torch.tensor([3.0, -3.0]).repeat(8)[:, None]  # mean 0, deviation 3
    blocks = Blocks(128, 64, 256)
    (plain,) = scores.fine(one, blocks, 16, 16, variance=0.0)
    (spread,) = scores.fine(one, blocks, 16, 16, variance=0.0, spread=1.0)
    # sum |q| std / sqrt(64) = 32 * 3 / 8, over 16 cells of which 4 are the block's
    weight = math.exp(12)
    torch.testing.assert_close(plain[0, 0, 1, 1], plain[0, 0, 1, 0])
    cells = torch.arange(9, 17, dtype=torch.float64)  # visible cells of the 8 query cells
    expected = ((weight + 3) / (weight + cells - 1)).mean().float()
    torch.testing.assert_close(spread[0, 0, 1, 1], expected)


def test_the_queries_variance_adds_what_their_mean_lost() -> None:
    one = call(256, 64)
    one.q.zero_()
    one.q[..., 0] = torch.tensor([1.0, -1.0]).repeat(128)  # mean 0, variance 1
    one.k.zero_()
    one.k[:, :, :64, 0] = 16.0
    blocks = Blocks(128, 64, 256)
    (blind,) = scores.fine(one, blocks, 16, 16)
    (seeing,) = scores.fine(one, blocks, 16, 16, q_variance=1.0)
    assert blind[0, 0, 1, 0] < 0.5
    # var(q) k^2 / (2 * 64) = 2 more of logit for the 4 cells of block 0
    cells = torch.arange(9, 17, dtype=torch.float64)
    expected = (4 * math.exp(2) / (4 * math.exp(2) + cells - 4)).mean().float()
    torch.testing.assert_close(seeing[0, 0, 1, 0], expected)


def test_per_head_thresholds_only_add_blocks() -> None:
    one = call(1024)
    fixed, lowered = METHODS["fine_t"].mask(one, 0.05), METHODS["fine_head"].mask(one, 0.05)
    assert (lowered | ~fixed).all()


def test_antidiagonals_find_a_planted_block() -> None:
    one = call(1024)
    one.k[:, :, 200:208] = (
        6 * one.q[:, ::2, 900:908] / one.q[:, ::2, 900:908].norm(dim=-1)[..., None]
    )
    mask = METHODS["xattention"].mask(one, 0.7)
    assert mask[0, 0, 900 // 128, 200 // 128]


def test_vertical_slash_covers_its_columns_and_diagonals() -> None:
    one = call(1024)
    one.k[:, :, 300] = one.q[:, ::2, -64:].mean(2) * 100
    mask = METHODS["vertical_slash"].mask(one, 0.5)
    assert mask[0, 0, 3:, 300 // 128].all()


def test_rules() -> None:
    visible = torch.tensor([[True, True, True, False]])
    probs = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    assert rules.top_p(probs, visible, 0.5).tolist() == [[True, False, False, False]]
    assert rules.top_p(probs, visible, 0.6).tolist() == [[True, True, False, False]]
    assert rules.above(probs, visible, 0.2).tolist() == [[True, True, True, False]]
    assert rules.either(probs, visible, 0.5).tolist() == [[True, True, True, False]]
    peaks = torch.tensor([[0.93, 0.06, 0.01, 0.0]])
    assert rules.either(peaks, visible, 0.5).tolist() == [[True, True, False, False]]
    assert rules.either(peaks, visible, 0.5, divisor=100).tolist() == [[True, True, True, False]]
    assert rules.relative(probs, visible, 0.5).tolist() == [[True, True, False, False]]
    assert rules.share(probs, visible, 0.5).tolist() == [[True, True, False, False]]
