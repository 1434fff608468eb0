"""Fixtures shared by the Python tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def needs_library() -> None:
    """Skip where the ops library is not built; everything above the reference needs it."""
    from prism_cuda import _ops

    if not _ops.is_loaded():
        pytest.skip("the ops library is not built")
