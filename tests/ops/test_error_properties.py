"""Thousands of wrong calls of every op: each is refused by the name of the wrong argument."""

from __future__ import annotations

import pytest
from helpers.params import needs_cuda
from helpers.right_calls import RIGHT, Right
from helpers.wrong_calls import OPS, WrongCall, gpu_allocations, op_of, wrong_calls
from hypothesis import HealthCheck, Phase, given, settings

from prism_cuda import ops

# On a GPU the refusals are the same code; a few show that nothing is launched.
CALLS = [
    pytest.param("cpu", 200, id="cpu"),
    pytest.param("cpu", 2000, id="cpu-many", marks=pytest.mark.slow),
    pytest.param("cuda", 200, id="cuda"),
]


def test_every_op_has_wrong_calls() -> None:
    assert {op_of(name).default.name().partition("::")[2] for name in OPS} == set(ops.NAMES)


@pytest.mark.parametrize("sizes", RIGHT)
@pytest.mark.parametrize("name", OPS)
def test_the_right_calls_are_accepted(name: str, sizes: Right, device: str) -> None:
    op_of(name)(**OPS[name].build(sizes, device))


@pytest.mark.parametrize("name", OPS)
def test_every_argument_is_changed(name: str) -> None:
    schema = op_of(name).default._schema
    assert set(OPS[name].mutations) == {argument.name for argument in schema.arguments}


@pytest.mark.parametrize(("device", "calls"), CALLS)
@pytest.mark.parametrize("name", OPS)
def test_wrong_calls_are_refused_by_name(name: str, device: str, calls: int) -> None:
    if device == "cuda":
        needs_cuda()
    op = op_of(name)
    prefix = f"prism::{name.split()[0]}"
    refused = 0

    @settings(
        max_examples=calls + 50,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(wrong_calls(name, device))
    def call(wrong: WrongCall) -> None:
        nonlocal refused
        before = gpu_allocations()
        with pytest.raises(RuntimeError, match=rf"^{prefix}\b.*\b{wrong.argument}\b"):
            op(**wrong.arguments)
        assert gpu_allocations() == before, "memory was allocated before the refusal"
        refused += 1

    call()
    assert refused >= calls
