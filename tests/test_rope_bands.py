"""The bands of transformers' layers: from the model's own RoPE settings, or from the config's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from helpers.models import TINY  # noqa: E402
from transformers import CohereConfig, GlmConfig, LlamaConfig, Qwen3Config  # noqa: E402

import prism_cuda  # noqa: E402
from prism_cuda import PrismConfig  # noqa: E402
from prism_cuda.integrations import rope  # noqa: E402

pytestmark = pytest.mark.usefixtures("needs_library")

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def build(config_class: Any = LlamaConfig) -> Any:
    config = config_class(**TINY)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.float().eval()


def bands_of(config: Any, layer: int = 0) -> Any:
    model = transformers.AutoModelForCausalLM.from_config(config)
    attention = model.model.layers[layer].self_attn
    return rope.layer_bands(attention, config.head_dim, PrismConfig())


def test_bands_from_model_configs():
    wide = TINY | {"head_dim": 128}
    llama = bands_of(LlamaConfig(**wide, rope_parameters=LLAMA3_SCALING))
    assert (llama.high, llama.low) == (64, 96)
    assert llama.ranges == ([0, 32, 64, 96], [16, 64, 80, 128])
    qwen = bands_of(Qwen3Config(**wide, rope_parameters={"rope_theta": 1e6}))
    assert qwen == llama
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    assert bands_of(Qwen3Config(**wide, rope_parameters=yarn)) == llama


def test_bands_of_partial_rotary_and_interleaved_models():
    partial = bands_of(GlmConfig(**(TINY | {"head_dim": 128, "partial_rotary_factor": 0.5})))
    # GLM interleaves the first half of the head; the rest is not rotated.
    assert partial.ranges[0][0] == 0 and partial.high <= 64
    assert partial.ranges[1][-1] == 128 and partial.low >= 64
    interleaved = bands_of(CohereConfig(**(TINY | {"hidden_size": 512, "head_dim": 128})))
    assert len(interleaved.high_ranges) == len(interleaved.low_ranges) == 2


def test_config_overrides_the_model():
    model = build(Qwen3Config)
    attention = model.model.layers[0].self_attn
    own: Any = rope.layer_bands(attention, 64, PrismConfig(bands=(16, 32)))
    assert own.high == 16
    by_theta = rope.layer_bands(attention, 64, PrismConfig(rope_theta=1e4))
    assert by_theta == PrismConfig(rope_theta=1e4).resolve_bands(64)


def test_bands_of_every_head_in_a_layer():
    config = PrismConfig(
        block_size=64, top_p=0.6, dense_below=0, layers={0: {"bands": [(16, 32), "auto"] * 2}}
    )
    model = build(Qwen3Config)
    attention = model.model.layers[0].self_attn
    own = rope.layer_bands(attention, 64, config.for_layer(0))
    one = [
        rope.layer_bands(attention, 64, PrismConfig(block_size=64, bands=choice))
        for choice in ((16, 32), "auto")
    ]
    assert own == tuple(one * 2) and one[0] != one[1]
    # The first layer's queries and keys are the same whatever its attention does.
    masks = []
    ids = torch.randint(3, 90, (1, 700))
    for settings in (config, *(PrismConfig(block_size=64, top_p=0.6, dense_below=0, bands=b)
                               for b in one)):  # fmt: skip
        prism_cuda.register(settings, "prism-bands")
        model.set_attn_implementation("prism-bands")
        with torch.no_grad(), prism_cuda.record(masks=True) as recording:
            model(ids)
        mask = recording.calls[0].mask
        assert mask is not None
        masks.append(mask.bits)
    for head in range(4):
        assert torch.equal(masks[0][:, head], masks[1 + head % 2][:, head])
    assert not torch.equal(masks[1], masks[2])


def test_model_without_theta_raises():
    with pytest.raises(ValueError, match="rope_theta"):
        rope.inverse_frequencies(type("Config", (), {})(), 64)


def test_nope_layers_are_one_low_band():
    model = build()
    attention = model.model.layers[0].self_attn
    attention.use_rope = False
    bands: Any = rope.layer_bands(attention, 64, PrismConfig())
    assert bands.ranges == ([], [0, 64])


@pytest.mark.parametrize(
    "changes",
    [
        {"position_embedding_type": None},
        {
            "rope_parameters": {"full_attention": None, "sliding_attention": {"rope_theta": 1e4}},
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ],
)
def test_bands_of_layers_whose_config_says_none(changes):
    attention = build().model.layers[0].self_attn
    for name, value in changes.items():
        setattr(attention.config, name, value)
    bands: Any = rope.layer_bands(attention, 64, PrismConfig())
    assert bands.ranges == ([], [0, 64])
