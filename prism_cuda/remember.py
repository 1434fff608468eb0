"""Results that are worked out once in eager calls, and traced anew by compilers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable)

# Of each function: some configs times some shapes of heads, dtypes and devices.
ENTRIES = 4096


def remembered(function: _Function) -> _Function:
    """``function`` of hashable arguments, remembered by them.

    Compilers do not look into caches, and their arguments may be symbols: while one traces, the
    function itself runs.
    """
    cached = functools.lru_cache(ENTRIES)(function)

    @functools.wraps(function)
    def call(*arguments):
        return (function if torch.compiler.is_compiling() else cached)(*arguments)

    return cast(_Function, call)
