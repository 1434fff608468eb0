"""python -m prism_cuda doctor: what it finds, what it says, and that its own test can fail."""

import json

import pytest
import torch

from prism_cuda import cli, doctor, ops

pytestmark = pytest.mark.usefixtures("needs_library")


def test_every_op_is_tested():
    tested = {name.partition(",")[0] for name in doctor.CALLS}
    assert tested == set(ops.NAMES)


def test_a_sound_installation(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {"torch", "ops library", "compiled for", "test: prefill, by the grid"} <= {
        finding["what"] for finding in findings
    }
    assert all(finding["mend"] == "" for finding in findings)


def test_a_wrong_op_is_named(monkeypatch, capsys):
    right = doctor.reference.block_pool
    monkeypatch.setattr(doctor.reference, "block_pool", lambda *args: right(*args) + 1)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "test: block_pool: block_pool is wrong on this" in out
    assert "1 to mend" in out


@pytest.mark.parametrize("what", ["torch", "transformers"])
def test_old_versions_are_named(monkeypatch, what):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "5.3.0")
    (found,) = (finding for finding in doctor._packages() if finding.what == what)
    assert found.value in found.mend
    assert f"needs {what} >=" in found.mend


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["90a"], (9, 0), True),
        (["90a"], (10, 0), False),
        (["80"], (8, 6), True),
        (["86"], (8, 0), False),
        (["80"], (9, 0), False),
        (["80+PTX"], (12, 0), True),
        ([], (9, 0), False),
    ],
)
def test_which_code_runs_where(archs, capability, runs):
    assert doctor.runs_on(archs, capability) is runs


def test_nan_and_different_blocks_are_differences():
    nan = torch.tensor([1.0, float("nan")])
    assert doctor.difference(nan, torch.ones(2)) == float("inf")
    bits = torch.tensor([0b1111], dtype=torch.int32)
    assert doctor.difference(bits ^ 1, bits) == 0.25
