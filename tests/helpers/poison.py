"""Make memory that an op allocates but does not write show up in its result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

# A module whose one attribute is a property that torch adds as it is loaded.
deterministic: Any = torch.utils.deterministic


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill every new tensor with NaN (integers: the largest value) before its owner sees it.

    PyTorch does this inside every `empty` of its allocator while deterministic algorithms are on,
    for C++ callers too, so no free block of a caching allocator can escape the poison.
    """
    were_on = torch.are_deterministic_algorithms_enabled()
    filled = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(were_on)
        deterministic.fill_uninitialized_memory = filled
