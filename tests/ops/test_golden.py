"""The official estimator's masks: only near ties at the threshold may differ from them."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import call, oracle
from helpers.compare import check_selection
from torch import Tensor

import prism_cuda  # noqa: F401  registers the ops

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
BLOCK = 128
MAX_FRACTION = 0.003
# The official code subtracts 1e-9 * block index from each probability before it sorts and sums,
# which moves the sum before a block by up to 1e-9 * 128^2 / 2; float32 sums add a little.
BAND = 2e-5


def _load_inputs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_inputs", GOLDEN / "inputs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


INPUTS = _load_inputs()


@cache
def golden(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 q, k (1, H, L, D) and the official (1, H, Nq, Nk) mask from float32 means."""
    q, k = INPUTS.golden_inputs(**INPUTS.CASES[name][0])
    stored = np.load(GOLDEN / f"{name}.npz")
    shape = tuple(stored["shape"])
    mask = np.unpackbits(stored["official_fp32"])[: np.prod(shape)].reshape(shape).astype(bool)
    return (
        torch.from_numpy(q)[None].bfloat16(),
        torch.from_numpy(k)[None].bfloat16(),
        torch.from_numpy(mask)[None],
    )


@pytest.mark.parametrize("name", sorted(INPUTS.CASES))
def test_mask_differs_from_the_official_one_in_near_ties_only(name: str, device: str) -> None:
    q, k, official = (x.to(device) for x in golden(name))
    options = INPUTS.CASES[name][1]
    bands = oracle.half_split_bands(q.shape[-1], options["high"], options["low"])
    lengths = (q.shape[2], k.shape[2])
    bits, counts = call.select_bands(
        q, k, *bands, options["p"], q_block_size=BLOCK, k_block_size=BLOCK
    )
    keep = oracle.unpack_bits(bits, official.shape[-1])
    assert torch.equal(keep.sum(-1).int(), counts)

    want = oracle.select(
        oracle.block_means(q, BLOCK), oracle.block_means(k, BLOCK),
        *lengths, *bands, options["p"], band=BAND,
    )  # fmt: skip
    causal = want.visible.expand_as(official)
    assert not (official & ~causal).any()
    differing = (keep != official)[causal]
    assert differing.double().mean() <= MAX_FRACTION
    want.keep = official
    check_selection(keep, want, MAX_FRACTION)
