"""Extending the context by YaRN in the middle of training: phases, frequencies and bands."""

from __future__ import annotations

import argparse

import pytest
import torch
import train_testbed
from transformers import Qwen3ForCausalLM

from prism_cuda import PrismConfig, bands
from prism_cuda.integrations.rope import inverse_frequencies, layer_bands

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


def arguments(yarn: float) -> argparse.Namespace:
    return argparse.Namespace(yarn=yarn, rope_theta=1e4)


def test_only_phases_beyond_the_original_context_use_yarn() -> None:
    by_length = [
        train_testbed.rope_parameters(arguments(4), phase.seq_len, 512)
        for phase in train_testbed.SMOKE.phases
    ]
    assert by_length == [PLAIN, YARN, YARN]
    assert train_testbed.rope_parameters(arguments(1), 512, 512) == PLAIN


@pytest.fixture
def extended() -> Qwen3ForCausalLM:
    model = train_testbed.build_model(train_testbed.SMOKE, dict(PLAIN))
    train_testbed.set_rope(model, dict(YARN))
    return model


def test_an_extended_model_rotates_as_a_new_one(extended, tmp_path) -> None:
    ids = torch.arange(200)[None]
    extended.eval()
    plain = train_testbed.build_model(train_testbed.SMOKE, dict(PLAIN)).eval()
    plain.load_state_dict(extended.state_dict())
    folder = tmp_path / "model"
    folder.mkdir()
    train_testbed.save_model(extended, folder)
    loaded = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = extended(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-3, atol=1e-3)
        assert (plain(ids).logits - expected).abs().max() > 0.01


def test_auto_bands_follow_yarn(extended) -> None:
    train_testbed.set_rope(extended, YARN | {"original_max_position_embeddings": 8192})
    rotary = extended.model.rotary_emb.inv_freq
    torch.testing.assert_close(inverse_frequencies(extended.config, 128), rotary)
    found = layer_bands(extended.model.layers[0].self_attn, 128, PrismConfig())
    assert found == bands.split(rotary, 128)
    # A base of 1e4 turns more pairs within a block than the 1e6 of the published 64 and 96.
    assert (found.high, found.low) == (96, 64)
