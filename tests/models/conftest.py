"""The sweep runs only where it is asked for: `make test-models`."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "models" in config.getoption("-m"):
        return
    swept = [item for item in items if item.get_closest_marker("models")]
    config.hook.pytest_deselected(items=swept)
    items[:] = [item for item in items if item not in swept]
