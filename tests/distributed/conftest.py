"""The ranks that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed
from helpers.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.stop()
