"""Comparators that say where and by how much a result is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from helpers.oracle import Attention, Selection

WORST = 5
# Probabilities and the output are each rounded once to the working precision: half a unit in the
# last place each, and half as much again for the accumulation order.
ROUNDING = {torch.bfloat16: 1.5 * 2.0**-8, torch.float16: 1.5 * 2.0**-11, torch.float32: 2.0**-19}


class Mismatch(AssertionError):
    """A result that differs from its oracle."""


def assert_same(got: Tensor | Iterable[Tensor], want: Tensor | Iterable[Tensor]) -> None:
    """Results of ops are the same, bit by bit."""
    pairs = ([x] if isinstance(x, Tensor) else x for x in (got, want))
    for a, b in zip(*pairs, strict=True):
        assert torch.equal(a, b)


def assert_repeats(call: Callable[[], Tensor | Iterable[Tensor]]) -> None:
    first = call()
    for _ in range(3):
        assert_same(call(), first)


def assert_replay_follows(
    call: Callable[..., Iterable[Tensor]],
    static: Sequence[Tensor],
    others: Iterable[Sequence[Tensor]],
) -> None:
    """A CUDA graph captured over `static` gives what `call` does whatever is copied there."""
    call(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tuple(call(*static))
    for other in others:
        for old, new in zip(static, other, strict=True):
            old.copy_(new)
        for result in captured:
            result.fill_(-1)
        graph.replay()
        assert_same(captured, call(*static))


def assert_streams_share_nothing(calls: Sequence[Callable[[], Iterable[Tensor]]]) -> None:
    """Calls in flight on streams of their own give what each gives alone."""
    want = [call() for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results: list[list[Iterable[Tensor]]] = [[] for _ in calls]
    for _ in range(10):
        for call, stream, made in zip(calls, streams, results, strict=True):
            with torch.cuda.stream(stream):
                made.append(call())
    torch.cuda.synchronize()
    for made, expected in zip(results, want, strict=True):
        for result in made:
            assert_same(result, expected)


def _at(mask: Tensor) -> list[tuple[int, ...]]:
    return [tuple(c) for c in mask.nonzero()[:WORST].tolist()]


def check_elements(name: str, got: Tensor, want: Tensor, bound: Tensor | float) -> None:
    """inf and NaN positions first, then |got - want| <= bound, then the cosine."""
    if got.shape != want.shape:
        raise Mismatch(f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    got, want = got.double(), want.double()
    for what, of in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = of(got) != of(want)
        if differ.any():
            raise Mismatch(
                f"{name}: {int(differ.sum())} positions differ in being {what}, first {_at(differ)}"
            )
    finite = torch.isfinite(want)
    error = torch.where(finite, (got - want).abs(), 0.0)
    excess = error - torch.as_tensor(bound, dtype=torch.float64, device=got.device)
    if (excess > 0).any():
        worst = excess.flatten().topk(min(WORST, excess.numel())).indices
        bounds = torch.as_tensor(bound, dtype=torch.float64, device=got.device).expand_as(error)
        lines = [
            f"  {tuple(int(i) for i in torch.unravel_index(flat, error.shape))}: "
            f"got {got.flatten()[flat]:.6g}, want {want.flatten()[flat]:.6g}, "
            f"error {error.flatten()[flat]:.3g} > {bounds.flatten()[flat]:.3g}"
            for flat in worst
            if excess.flatten()[flat] > 0
        ]
        count = int((excess > 0).sum())
        raise Mismatch(
            f"{name}: {count} of {error.numel()} elements out of bounds\n" + "\n".join(lines)
        )
    a, b = torch.where(finite, got, 0.0).flatten(), torch.where(finite, want, 0.0).flatten()
    norms = a.norm() * b.norm()
    if norms > 1e-12 and a @ b < 0.999 * norms:
        raise Mismatch(f"{name}: cosine {float(a @ b / norms):.6f} < 0.999")


def check_means(got: Tensor, want: Tensor, mean_magnitude: Tensor) -> None:
    """Float32 sums of up to 128 terms in any order; subnormal results may be flushed."""
    check_elements("means", got, want, mean_magnitude * 2.0**-19 + torch.finfo(torch.float32).tiny)


def check_attention(out: Tensor, lse: Tensor, want: Attention, plain: Tensor) -> None:
    """`plain` is the same maths in plain PyTorch at the working precision."""
    if not torch.isfinite(plain).all():
        raise ValueError("the yardstick is not finite: choose smaller values for this case")
    plain_error = (plain.double() - want.out).abs()
    if out.numel():
        plain_error = plain_error.amax(-1, keepdim=True)
    tiny = torch.finfo(out.dtype).smallest_normal
    # A float32 score is off by its terms' rounding, and its probability by the same factor.
    rounding = ROUNDING[out.dtype] + 2.0**-24 * want.score_terms[..., None]
    bound = 2 * plain_error + rounding * want.magnitude + tiny
    check_elements("lse", lse, want.lse, 1e-5 + 2.0**-20 * want.score_terms)
    check_elements("out", out, want.out, bound)


def check_selection(keep: Tensor, want: Selection, max_fraction: float = 0.003) -> None:
    """Equal but for near ties, and those on at most `max_fraction` of the visible blocks.

    A handful of blocks is allowed whatever their number, so that small masks can be compared.
    """
    if keep.shape != want.keep.shape:
        raise Mismatch(f"shape {tuple(keep.shape)}, expected {tuple(want.keep.shape)}")
    hidden = keep & ~want.visible
    if hidden.any():
        raise Mismatch(f"{int(hidden.sum())} invisible blocks kept, first {_at(hidden)}")
    missing = want.forced & ~keep
    if missing.any():
        raise Mismatch(f"{int(missing.sum())} sink or recent blocks dropped, first {_at(missing)}")
    differ = keep != want.keep
    wrong = differ & ~want.near_tie
    if wrong.any():
        first = _at(wrong)
        verb = ["dropped" if bool(want.keep[c]) else "kept" for c in first]
        raise Mismatch(
            f"{int(wrong.sum())} blocks differ away from the threshold, first "
            f"{list(zip(first, verb, strict=True))}"
        )
    total = int(want.visible.sum()) * keep.shape[0] * keep.shape[1]
    if int(differ.sum()) > max(3, max_fraction * total):
        raise Mismatch(
            f"{int(differ.sum())} of {total} visible blocks differ, more than {max_fraction:.1%}"
        )
