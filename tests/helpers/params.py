"""pytest parameters made from the case tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import pytest
import torch

Case = TypeVar("Case")

CPU_DTYPES = (torch.float32, torch.bfloat16)
CUDA_DTYPES = (torch.bfloat16, torch.float16)


def needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_dtype_params() -> list[Any]:
    cpu = [("cpu", dtype) for dtype in CPU_DTYPES]
    cuda = [("cuda", dtype) for dtype in CUDA_DTYPES]
    return [pytest.param(d, t, id=f"{d}-{dtype_name(t)}") for d, t in cpu + cuda]


def case_params(groups: Mapping[str, tuple[Case, ...]], sanitizer: Iterable[str] = ()) -> list[Any]:
    """One parameter per case, named group-case; those in `sanitizer` carry that marker."""
    wanted = set(sanitizer)
    params = []
    for group, cases in groups.items():
        for case in cases:
            name = f"{group}-{case.name}"  # type: ignore[attr-defined]
            marks = [pytest.mark.sanitizer] if name in wanted else []
            wanted.discard(name)
            params.append(pytest.param(case, id=name, marks=marks))
    if wanted:
        raise ValueError(f"no such cases: {sorted(wanted)}")
    return params
