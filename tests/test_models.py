"""Tiny random models of every kind of attention through generate, prism against eager."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from helpers.models import EXACT, MODELS, SPARSE  # noqa: E402

import prism_cuda  # noqa: E402
from prism_cuda.integrations import rope  # noqa: E402

pytestmark = pytest.mark.usefixtures("needs_library")

PROMPT = 200


@pytest.fixture(autouse=True)
def _registered() -> None:
    prism_cuda.register(EXACT)
    prism_cuda.register(dataclasses.replace(EXACT, top_p=0.3), "prism-sparse")
    prism_cuda.register(dataclasses.replace(EXACT, estimator="grid"), "prism-grid")


def prompt(batch: int) -> torch.Tensor:
    return torch.randint(3, 90, (batch, PROMPT))


def attention_layers(model: Any) -> list[torch.nn.Module]:
    layers = [m for m in model.modules() if getattr(m, "layer_idx", None) is not None]
    layers = [m for m in layers if "Attention" in type(m).__name__]
    return sorted(layers, key=lambda module: module.layer_idx)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_generates_what_eager_generates(name: str, padded: bool) -> None:
    model = MODELS[name].build()
    ids = prompt(2)
    real = torch.ones_like(ids)
    if padded:
        real[0, :45] = 0
        ids[0, :45] = 0
    arguments: dict[str, Any] = {
        "attention_mask": real,
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    expected = model.generate(ids, **arguments)
    model.set_attn_implementation("prism")
    with prism_cuda.record() as recording:
        actual = model.generate(ids, **arguments)
    assert torch.equal(actual.sequences, expected.sequences)
    for got, want in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-4)

    prefill = [call for call in recording.calls if call.q_len > 1]
    for layer, reason in enumerate(MODELS[name].reasons):
        reasons = {call.reason for call in prefill if call.layer_idx == layer}
        assert len(reasons) == 1 and reason in reasons.pop()
        paths = {call.path for call in prefill if call.layer_idx == layer}
        assert paths == {"prism" if reason in SPARSE else "dense"}
    decoded = [call for call in recording.calls if call.q_len == 1]
    assert decoded and all(call.path == "dense" for call in decoded)


@pytest.mark.parametrize("name", ["gpt-oss", "gemma2", "qwen3-window-per-layer", "qwen2-vl"])
def test_static_cache(name: str) -> None:
    model = MODELS[name].build()
    ids = prompt(2)
    real = torch.ones_like(ids)
    real[1, :30] = 0
    arguments: dict[str, Any] = {
        "attention_mask": real,
        "max_new_tokens": 4,
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": True,
        "pad_token_id": 0,
    }
    expected = model.generate(ids, **arguments)
    model.set_attn_implementation("prism")
    with prism_cuda.record() as recording:
        assert torch.equal(model.generate(ids, **arguments), expected)
    sparse = {call.layer_idx for call in recording.calls if call.path == "prism"}
    assert sparse == {i for i, reason in enumerate(MODELS[name].reasons) if reason in SPARSE}


@pytest.mark.parametrize("name", MODELS)
def test_bands_are_those_of_the_rotation(name: str) -> None:
    model = MODELS[name]
    for layer, bands in zip(attention_layers(model.build()), model.bands, strict=False):
        if bands is not None:
            assert rope.layer_bands(layer, 64, EXACT) == bands


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt-oss", "qwen2-vl", "phi3-partial", "phi3-d96-partial", "gpt2-learned-positions"],
)
def test_leaving_blocks_out_changes_the_logits(name: str) -> None:
    """Shows that the comparison above sees the sparse path: with a low top_p it would fail."""
    model = MODELS[name].build()
    ids = torch.randint(3, 90, (1, 700))[:, : 500 if "gpt2" in name else 700]
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("prism-sparse")
        with prism_cuda.record() as recording:
            actual = model(ids).logits
    assert any(call.density < 1 for call in recording.calls)
    assert (actual - expected).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["gpt-oss", "gemma2"])
def test_eager_layers_in_chunks_of_queries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from prism_cuda.integrations import dense

    monkeypatch.setattr(dense, "EAGER_SCORES", 2 * 4 * PROMPT * 33)
    model = MODELS[name].build()
    ids = prompt(2)
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("prism")
        torch.testing.assert_close(model(ids).logits, expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["prism", "prism-grid"])
@pytest.mark.parametrize("timed", [False, True], ids=["untimed", "timed"])
def test_sinks_take_their_share_in_the_sparse_path(implementation: str, timed: bool) -> None:
    """Sinks so large that leaving them out would show in every logit."""
    model = MODELS["gpt-oss"].build()
    for layer in attention_layers(model):
        torch.nn.init.constant_(layer.sinks, 3.0)
    ids = prompt(1)
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation(implementation)
        with prism_cuda.record(times=timed) as recording:
            actual = model(ids).logits
        assert any(call.path == "prism" for call in recording.calls)
        for layer in attention_layers(model):
            torch.nn.init.constant_(layer.sinks, -100.0)
        without = model(ids).logits
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4)
    assert (without - expected).abs().max() > 1e-2
