"""Cutting and counting packed masks."""

from __future__ import annotations

import pytest
import torch

from prism_cuda.bits import count, cut, pack


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 100, 128])
def test_cut_and_count(length: int, share: float) -> None:
    dense = torch.rand(2, 3, length) < share
    bits = pack(dense)
    assert torch.equal(count(bits), dense.sum(-1).int())
    for first in range(0, length, 7):
        for size in {1, (length - first) // 2, length - first} - {0}:
            part = cut(bits, first, size)
            assert torch.equal(part, pack(dense[..., first : first + size]))
            assert part.is_contiguous()
    assert torch.equal(bits, pack(dense))  # nothing was written to
