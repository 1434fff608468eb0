"""prefill refuses the same calls by the same words, whichever way their length would take them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import prism_cuda
from prism_cuda import PrismConfig
from prism_cuda.bands import Bands

pytestmark = pytest.mark.usefixtures("needs_library")

SPARSE = PrismConfig(block_size=64, estimator="bands", top_p=0.5, dense_below=0)
GRID = PrismConfig(block_size=64, top_p=0.3, dense_below=0, estimator="grid")
DENSE = PrismConfig(block_size=64, dense_below=1 << 40)


def qkv(q_len: int = 300, k_len: int = 300, heads: int = 4) -> tuple[torch.Tensor, ...]:
    q, k = torch.randn(2, heads, q_len, 64), torch.randn(2, heads // 2, k_len, 64)
    return q, k, torch.randn_like(k)


WRONG: dict[str, Any] = {
    "v_shorter": (lambda q, k, v: (q, k, v[:, :, :150]), {}, r"v has shape \(2, 2, 150, 64\)"),
    "v_heads": (lambda q, k, v: (q, k, v[:, :1]), {}, r"v has shape \(2, 1, 300, 64\)"),
    "batch": (lambda q, k, v: (q, k[:1], v[:1]), {}, "k has batch size 1; expected q's, 2"),
    "heads": (lambda q, k, v: (q[:, :3], k, v), {}, "q has 3 heads and k has 2; expected a mult"),
    "no_heads": (lambda q, k, v: (q[:, :0], k[:, :0], v[:, :0]), {}, "q has 0 heads and k has 0"),
    "head_dim": (lambda q, k, v: (q, k[..., :32], v), {}, "k has head_dim 32; expected q's, 64"),
    "dims": (lambda q, k, v: (q[0], k[0], v[0]), {}, r"q has shape \(4, 300, 64\); expected 4 dim"),
    "dims_of_v": (lambda q, k, v: (q, k, v[0]), {}, r"v has shape \(2, 300, 64\); expected 4 dim"),
    "dtype": (lambda q, k, v: (q, k.bfloat16(), v), {}, "k has dtype torch.bfloat16; expected q's"),
    "device": (lambda q, k, v: (q, k, v.to("meta")), {}, "v is on meta but q is on cpu; expected"),
    "stride": (lambda q, k, v: (q.mT.contiguous().mT, k, v), {}, "q has last stride 300; expected"),
    "scale": (lambda *x: x, {"scale": -0.1}, "scale is -0.1; expected None, or a finite number"),
    "no_scale": (lambda *x: x, {"scale": 0.0}, "scale is 0.0; expected None"),
    "tiny_scale": (lambda *x: x, {"scale": 1e-40}, "scale is 1e-40; expected None.*float32's"),
    "huge_scale": (lambda *x: x, {"scale": 1e39}, "scale is 1e.39; expected None.*float32's"),
    "window": (lambda *x: x, {"window_left": -1}, "window_left is -1; expected None, or 0"),
    "huge_window": (
        lambda *x: x,
        {"window_left": 1 << 63},
        "window_left is 9223372036854775808; e",
    ),
    "text_window": (lambda *x: x, {"window_left": "7"}, "window_left is '7'; expected None, or 0"),
    "causal": (lambda *x: x, {"causal": "no"}, "causal is 'no'; expected True or False"),
    "no_causal": (lambda *x: x, {"causal": None}, "causal is None; expected True or False"),
    "half_window": (lambda *x: x, {"window_left": 900.5}, "window_left is 900.5; expected None"),
}


@pytest.mark.parametrize("name", WRONG)
def test_both_paths_refuse_the_same_calls(name):
    change, options, message = WRONG[name]
    errors = set()
    for config in (DENSE, SPARSE, GRID, PrismConfig()):
        with pytest.raises(RuntimeError, match="prefill: " + message) as error:
            prism_cuda.prefill(*change(*qkv()), config=config, **options)
        errors.add(str(error.value))
    assert len(errors) == 1


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_settings_that_do_not_fit_the_heads_are_refused_on_both_paths(config):
    for wrong, message in (
        ({"top_p": (0.5, 0.6)}, "top_p has 2 values; expected one number or 4"),
        ({"dense_heads": (4,)}, "dense_heads names head 4"),
        ({"bands": (64, 96)}, "low is 96"),
        ({"bands": [(16, 32)] * 3}, "bands has 3 entries; expected one for all heads or 4"),
        ({"bands": Bands((0, 128), (0, 8))}, r"high_ranges is \(0, 128\); expected .* \[0, 64\)"),
        ({"bands": Bands((0, 8), (8, 4))}, r"low_ranges is \(8, 4\); expected"),
        ({"bands": Bands((0, 8, 4, 16), ())}, "high_ranges is .*; expected"),
        ({"bands": Bands((0, 8, 4), ())}, "high_ranges is .*; expected"),
        ({"bands": Bands((), ())}, "both empty"),
    ):
        with pytest.raises(ValueError, match=message):
            prism_cuda.prefill(*qkv(), config=dataclasses.replace(config, **wrong))


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_no_more_heads_differ_than_the_ops_take_on_either_path(config):
    tensors = qkv(64, 64, heads=130)
    config = dataclasses.replace(config, dense_heads=(3,))
    with pytest.raises(ValueError, match="top_p differs between 130 query heads"):
        prism_cuda.prefill(*tensors, config=config)
    prism_cuda.prefill(*tensors, config=dataclasses.replace(config, top_p=1.0))  # none differs


def test_plans_of_the_current_device_are_not_those_of_another(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(prism_cuda.api, "plan_of_shape", lambda *shape: asked.append(shape[4]))
    for current in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        prism_cuda.dispatch(8192, 8192, 128, torch.bfloat16, "cuda")
    assert asked == [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
def test_a_torch_without_cuda_says_so():
    for device in ("cuda", "cuda:3"):
        plan = prism_cuda.dispatch(8192, 8192, 128, torch.bfloat16, device)
        assert (plan.path, plan.reason) == ("dense", "unsupported: this torch has no CUDA")
