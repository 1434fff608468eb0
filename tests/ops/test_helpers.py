"""The comparators, the oracle and the poison find what is planted for them."""

from __future__ import annotations

import pytest
import torch
from helpers import inputs, oracle
from helpers.build import attention_inputs, select_inputs
from helpers.cases import AttentionCase, SelectCase
from helpers.compare import Mismatch, check_attention, check_elements, check_selection
from helpers.poison import poisoned_allocations


def test_elements_within_bounds_pass() -> None:
    want = torch.randn(3, 5, generator=inputs.generator(0))
    check_elements("x", want + 1e-4, want, 2e-4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.nan, r"being NaN.*\(2, 1\)"),
        (torch.inf, r"being \+inf.*\(2, 1\)"),
        (-torch.inf, r"being -inf.*\(2, 1\)"),
        (9.0, r"1 of 15 elements(.|\n)*\(2, 1\): got 9"),
    ],
)
def test_one_wrong_element_is_found_and_located(value: float, message: str) -> None:
    want = torch.zeros(3, 5)
    got = want.clone()
    got[2, 1] = value
    with pytest.raises(Mismatch, match=message):
        check_elements("x", got, want, 1e-3)


def test_missing_infinity_is_found() -> None:
    want = torch.tensor([0.0, -torch.inf])
    with pytest.raises(Mismatch, match="being -inf"):
        check_elements("lse", torch.tensor([0.0, -1e30]), want, 1e30)


def test_wrong_direction_is_found_when_every_element_is_in_bounds() -> None:
    want = torch.ones(8)
    with pytest.raises(Mismatch, match="cosine"):
        check_elements("x", torch.tensor([1.0, -1.0] * 4), want, 3.0)


def test_wrong_shape_is_found() -> None:
    with pytest.raises(Mismatch, match="shape"):
        check_elements("x", torch.zeros(2, 3), torch.zeros(3, 2), 1.0)


def _attention() -> tuple[oracle.Attention, torch.Tensor]:
    case = attention_inputs(AttentionCase("x", 200, 200, mask="full"), torch.bfloat16, "cpu")
    arguments = (case.q, case.k, case.v, case.mask)
    return oracle.attention_and_plain(*arguments, **case.settings)


def test_oracle_agrees_with_sdpa_in_float64() -> None:
    case = attention_inputs(
        AttentionCase("x", 150, 187, q_heads=4, mask="full"), torch.float32, "cpu"
    )
    got = oracle.attention(case.q, case.k, case.v, case.mask, **case.settings)
    seen = torch.ones(150, 187, dtype=torch.bool).tril(37)
    dense = torch.nn.functional.scaled_dot_product_attention(
        case.q.double(), case.k.double(), case.v.double(), attn_mask=seen, enable_gqa=True
    )
    torch.testing.assert_close(got.out, dense, rtol=1e-12, atol=1e-12)


def test_rounded_attention_passes() -> None:
    want, plain = _attention()
    check_attention(want.out.bfloat16(), want.lse.float(), want, plain)


@pytest.mark.parametrize("row", [0, 63, 199])
def test_a_row_off_by_five_percent_is_found(row: int) -> None:
    want, plain = _attention()
    out = want.out.clone()
    out[0, 1, row] *= 1.05
    with pytest.raises(Mismatch, match=f"{row}, "):
        check_attention(out.bfloat16(), want.lse.float(), want, plain)


def test_a_row_that_misses_one_key_is_found() -> None:
    want, plain = _attention()
    case = attention_inputs(AttentionCase("x", 200, 200, mask="full"), torch.bfloat16, "cpu")
    case.v[:, :, 40] = 0
    without = oracle.attention(case.q, case.k, case.v, case.mask, **case.settings)
    with pytest.raises(Mismatch, match="out: "):
        check_attention(without.out.bfloat16(), want.lse.float(), want, plain)


def test_a_wrong_lse_is_found() -> None:
    want, plain = _attention()
    lse = want.lse.float()
    lse[0, 0, 150] += 1e-3
    with pytest.raises(Mismatch, match=r"lse: 1 of(.|\n)*150\)"):
        check_attention(want.out.bfloat16(), lse, want, plain)


def _selection() -> oracle.Selection:
    case = select_inputs(SelectCase("x", 2560, 2560, keep_recent=2), "cpu")
    return case.expected()


def _planted(selection: oracle.Selection, where: torch.Tensor) -> torch.Tensor:
    """The selection with its first entry among `where` flipped."""
    keep = selection.keep.clone()
    spot = tuple(where.nonzero()[0].tolist())
    keep[spot] = ~keep[spot]
    return keep


def test_equal_selection_passes() -> None:
    selection = _selection()
    check_selection(selection.keep, selection)


def test_flip_of_a_near_tie_passes() -> None:
    selection = _selection()
    selection.near_tie[0, 0, 20, 9] = True
    selection.forced[20, 9] = False
    keep = selection.keep.clone()
    keep[0, 0, 20, 9] = ~keep[0, 0, 20, 9]
    check_selection(keep, selection)


def test_too_many_near_ties_are_found() -> None:
    selection = _selection()
    selection.near_tie |= selection.visible & ~selection.forced
    keep = selection.keep ^ (selection.near_tie & (torch.arange(40) % 7 == 0))
    with pytest.raises(Mismatch, match="visible blocks differ"):
        check_selection(keep, selection)


def test_block_dropped_far_from_the_threshold_is_found() -> None:
    selection = _selection()
    clear = selection.keep & ~selection.forced & ~selection.near_tie
    with pytest.raises(Mismatch, match=r"away from the threshold.*dropped"):
        check_selection(_planted(selection, clear), selection)


def test_block_kept_far_from_the_threshold_is_found() -> None:
    selection = _selection()
    clear = ~selection.keep & selection.visible & ~selection.near_tie
    with pytest.raises(Mismatch, match=r"away from the threshold.*kept"):
        check_selection(_planted(selection, clear), selection)


def test_dropped_recent_block_is_found() -> None:
    selection = _selection()
    with pytest.raises(Mismatch, match="sink or recent"):
        check_selection(_planted(selection, selection.forced.expand_as(selection.keep)), selection)


def test_kept_invisible_block_is_found() -> None:
    selection = _selection()
    hidden = ~selection.visible.expand_as(selection.keep)
    with pytest.raises(Mismatch, match="invisible"):
        check_selection(_planted(selection, hidden), selection)


def test_near_ties_are_exactly_the_blocks_around_the_threshold() -> None:
    probs = torch.tensor([[0.5, 0.2, 0.1, 0.1 + 1e-9, 0.06, 0.04]], dtype=torch.float64)
    rel = torch.full((1, 1), 1e-6, dtype=torch.float64)

    def near(top_p: float) -> list[int]:
        return oracle._top_p(probs, top_p, rel, 1e-6)[1][0].nonzero().flatten().tolist()

    assert near(0.6) == []  # between the sums before two blocks
    assert near(0.7) == [2, 3]  # the sum before block 3; blocks 2 and 3 may swap
    assert near(0.75) == [2, 3]  # only the swap
    assert near(0.85) == []
    assert near(0.9) == [4]
    assert near(0.5 + 5e-7) == [1]


def test_packing_is_little_endian_in_bits() -> None:
    mask = torch.zeros(1, 1, 1, 70, dtype=torch.bool)
    mask[..., [0, 33, 31, 69]] = True
    bits, counts = oracle.pack_bits(mask)
    assert bits.tolist() == [[[[1 - (1 << 31), 2, 32]]]]
    assert counts.item() == 4
    assert torch.equal(oracle.unpack_bits(bits, 70), mask)


def test_poison_fills_new_tensors_and_ends_with_the_block(device: str) -> None:
    with poisoned_allocations():
        assert torch.isnan(torch.empty(1000, device=device)).all()
        assert torch.isnan(torch.empty_like(torch.zeros(64, 64, device=device).bfloat16())).all()
        assert (torch.empty(1000, dtype=torch.int32, device=device) == 2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_layouts_hold_the_same_values(layout: str) -> None:
    x = torch.randn(2, 3, 5, 64, generator=inputs.generator(1))
    laid_out = inputs.lay_out(x, layout, "cpu")
    assert torch.equal(laid_out, x)
    assert laid_out.stride(-1) == 1
    assert laid_out.is_contiguous() == (layout in ("contiguous", "offset"))
    assert (laid_out.storage_offset() % 8 != 0) == (layout in ("odd_stride", "offset"))
    assert (laid_out.stride(2) % 8 != 0) == (layout == "odd_stride")
