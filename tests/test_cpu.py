"""prism_cuda.cpu gives what the reference gives, and leaves to it what it does not compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import prism_cuda
from prism_cuda import cpu, reference

SIZES = [(128, 128), (128, 64), (64, 64)]


def inputs(
    q_len: int, k_len: int, dtype: torch.dtype = torch.float32, head_dim: int = 64
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(q_len)
    shapes = ((2, 6, q_len, head_dim), (2, 2, k_len, head_dim), (2, 2, k_len, head_dim))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def mask(q_len: int, k_len: int, sizes: tuple[int, int], recent: int = 1) -> Any:
    """A mask of a third of the blocks, different for every head, invisible ones among them."""
    forced = reference.recent_blocks(q_len, k_len, recent, *sizes)
    generator = torch.Generator().manual_seed(k_len)
    return reference.blocks.pack(
        torch.rand(2, 6, *forced.shape, generator=generator).lt(0.3) | forced
    )


def assert_like_reference(*args: Any, tolerance: float = 1e-5, **kwargs: Any) -> None:
    found = cpu.sparse_attention(*args, **kwargs)
    expected = reference.sparse_attention(*args, **kwargs)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("q_len", "k_len"), [(1024, 1024), (1153, 1153), (300, 1324), (1, 1025), (64, 2048)]
)
def test_matches_reference(q_len: int, k_len: int, sizes: tuple[int, int]) -> None:
    assert_like_reference(*inputs(q_len, k_len), *mask(q_len, k_len, sizes), 0.3, True, *sizes)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
)
def test_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    assert_like_reference(
        *inputs(1100, 1100, dtype, 72), *mask(1100, 1100, (128, 64)), tolerance=tolerance
    )


def test_gathers_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "GATHERED_BYTES", 1 << 20)
    assert_like_reference(*inputs(1536, 1536), *mask(1536, 1536, (128, 64)))


def test_large_logits() -> None:
    q, k, v = inputs(1280, 1280)
    assert_like_reference(5 * q, 5 * k, v, *mask(1280, 1280, (128, 64)), tolerance=1e-4)


@pytest.mark.parametrize(
    "others",
    [
        {"causal": False},
        {"sinks": torch.zeros(6)},
        {"softcap": 5.0},
        {"window_left": 100},
        {"k_scale": torch.ones(2)},
    ],
    ids=lambda others: next(iter(others)),
)
def test_left_to_the_reference(others: dict[str, Any]) -> None:
    assert_like_reference(*inputs(1024, 1024), *mask(1024, 1024, (128, 64)), **others)


def test_own_tokens_not_kept() -> None:
    assert_like_reference(*inputs(1024, 1024), *mask(1024, 1024, (128, 64), recent=0))


def test_off_the_blocks() -> None:
    assert_like_reference(*inputs(1000, 1033), *mask(1000, 1033, (128, 64)))


def test_prefill_does_not_ask_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(1200, 1200)
    config = prism_cuda.PrismConfig(dense_below=0)
    chosen = prism_cuda.select_blocks(q, k, config=config)
    bits, counts = reference.select_grid(q, k, [0.95], [0.005])
    assert torch.equal(chosen.bits, bits)
    expected, _ = reference.sparse_attention(q, k, v, bits, counts)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the reference was asked")

    monkeypatch.setattr(reference, "sparse_attention", refuse)
    torch.testing.assert_close(
        prism_cuda.prefill(q, k, v, config=config), expected, rtol=1e-5, atol=1e-5
    )
