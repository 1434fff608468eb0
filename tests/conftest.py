"""Fixtures shared by the Python tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def needs_library() -> None:
    """Skip where the ops library is not built; everything above the reference needs it."""
    from prism_cuda import ops

    if not ops.is_loaded():
        pytest.skip("the ops library is not built")


@pytest.fixture(autouse=True, scope="module")
def _one_cpu_thread() -> Iterator[None]:
    """The sizes are small: threads that wait for each other on a busy machine cost more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
