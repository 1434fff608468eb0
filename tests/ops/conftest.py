"""Devices, the helpers' import path and the sanitizer marker for the op tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.params import needs_cuda  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "sanitizer: small enough to run under compute-sanitizer (tools/sanitize.sh)"
    )


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        needs_cuda()
    return str(request.param)


@pytest.fixture
def cuda() -> str:
    needs_cuda()
    return "cuda"


@pytest.fixture(autouse=True, scope="module")
def _one_cpu_thread() -> Iterator[None]:
    """The sizes are small: threads that wait for each other on a busy machine cost more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
