"""Devices, the helpers' import path and the sanitizer marker for the op tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

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
