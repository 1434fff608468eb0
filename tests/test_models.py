"""Tiny random models of every kind of attention through generate, prism against eager."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

import prism_cuda  # noqa: E402
from prism_cuda import Bands, PrismConfig  # noqa: E402
from prism_cuda.integrations import rope  # noqa: E402

pytestmark = pytest.mark.usefixtures("needs_library")

PROMPT = 200
EXACT = PrismConfig(block_size=64, top_p=1.0, dense_below=0)

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY_GPT = {
    "vocab_size": 97,
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TINY_OPT = {
    "vocab_size": 97,
    "hidden_size": 128,
    "word_embed_proj_dim": 128,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
TINY_MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
TINY_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
MROPE = {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [8, 12, 12]}

PRISM = "block-sparse"
WINDOW = "token-level mask"
ROTATED = Bands((0, 16, 32, 48), (8, 32, 40, 64))


@dataclass(frozen=True)
class Model:
    """A tiny model, and why each of its two layers runs as it does on a prompt of 200."""

    config_class: str
    changes: dict[str, Any]
    reasons: tuple[str, str] = (PRISM, PRISM)
    base: dict[str, Any] = field(default_factory=lambda: TINY)
    auto_class: str = "AutoModelForCausalLM"
    bands: tuple[Bands | None, Bands | None] = (None, None)

    def build(self) -> Any:
        config = getattr(transformers, self.config_class)(**(self.base | self.changes))
        auto = getattr(transformers, self.auto_class)
        model = auto.from_config(config, attn_implementation="eager").float().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):  # from_config leaves them as they were allocated
                torch.nn.init.normal_(parameter, std=2.0)
        return model


def vision_language(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92}
    return {"text_config": TINY | text, "vision_config": TINY_VISION | vision} | tokens


NOT_ROTATED = Bands((), (0, 64))
MODELS = {
    "llama": Model("LlamaConfig", {"rope_parameters": {"rope_theta": 1e6}}, bands=(ROTATED,) * 2),
    "qwen3": Model("Qwen3Config", {}),
    "qwen3-moe": Model("Qwen3MoeConfig", TINY_MOE),
    "mistral": Model("MistralConfig", {"sliding_window": None}),
    "mistral-window": Model("MistralConfig", {"sliding_window": 70}, (WINDOW, WINDOW)),
    "mistral-open-window": Model("MistralConfig", {"sliding_window": 1000}),
    "qwen3-window-per-layer": Model(
        "Qwen3Config",
        {
            "use_sliding_window": True,
            "sliding_window": 50,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        (PRISM, WINDOW),
    ),
    "phi3-partial": Model(
        "Phi3Config",
        {
            "hidden_size": 256,
            "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "glm-partial-interleaved": Model("GlmConfig", {}),
    "cohere-interleaved": Model("CohereConfig", {"hidden_size": 256}),
    "gpt-oss": Model(
        "GptOssConfig",
        {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (WINDOW, PRISM),
    ),
    "gemma2": Model(
        "Gemma2Config",
        {
            "query_pre_attn_scalar": 64,
            "attn_logit_softcapping": 5.0,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (WINDOW, "soft-capping"),
    ),
    "gemma3": Model(
        "Gemma3TextConfig",
        {
            "query_pre_attn_scalar": 64,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (WINDOW, PRISM),
    ),
    "qwen2-vl": Model(
        "Qwen2VLConfig",
        vision_language(
            {"hidden_size": 256, "rope_parameters": MROPE}, {"embed_dim": 32, "hidden_size": 256}
        ),
        base={},
        auto_class="AutoModelForImageTextToText",
        bands=(ROTATED,) * 2,
    ),
    "qwen3-vl": Model(
        "Qwen3VLConfig",
        vision_language(
            {"rope_parameters": MROPE | {"mrope_interleaved": True}},
            {"out_hidden_size": 128, "deepstack_visual_indexes": [0]},
        ),
        base={},
        auto_class="AutoModelForImageTextToText",
        bands=(ROTATED,) * 2,
    ),
    "gpt2-learned-positions": Model(
        "GPT2Config", {}, base=TINY_GPT, bands=(NOT_ROTATED, NOT_ROTATED)
    ),
    "opt-learned-positions": Model(
        "OPTConfig", {}, base=TINY_OPT, bands=(NOT_ROTATED, NOT_ROTATED)
    ),
    "smollm3-one-layer-without-rope": Model(
        "SmolLM3Config", {"no_rope_layers": [0, 1]}, bands=(NOT_ROTATED, None)
    ),
    "cohere2-full-layers-without-rope": Model(
        "Cohere2Config",
        {
            "hidden_size": 256,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (WINDOW, PRISM),
        bands=(None, NOT_ROTATED),
    ),
    "exaone4-full-layers-without-rope": Model(
        "Exaone4Config",
        {
            "sliding_window": 64,
            "sliding_window_pattern": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (WINDOW, PRISM),
        bands=(None, NOT_ROTATED),
    ),
    "llama-narrow-head": Model("LlamaConfig", {"head_dim": 32}, ("head_dim 32", "head_dim 32")),
    "llama-wide-head": Model("LlamaConfig", {"head_dim": 256}, ("head_dim 256", "head_dim 256")),
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    prism_cuda.register(EXACT)
    prism_cuda.register(PrismConfig(block_size=64, top_p=0.3, dense_below=0), "prism-sparse")


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
        assert paths == {"prism" if reason == PRISM else "dense"}
    decoded = [call for call in recording.calls if call.q_len == 1]
    assert decoded and all(call.path == "dense" for call in decoded)


@pytest.mark.parametrize("name", MODELS)
def test_bands_are_those_of_the_rotation(name: str) -> None:
    model = MODELS[name]
    for layer, bands in zip(attention_layers(model.build()), model.bands, strict=False):
        if bands is not None:
            assert rope.layer_bands(layer, 64, EXACT) == bands


@pytest.mark.parametrize(
    "name", ["llama", "gpt-oss", "qwen2-vl", "phi3-partial", "gpt2-learned-positions"]
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


def test_sinks_take_their_share_in_the_sparse_path() -> None:
    """Sinks so large that leaving them out would show in every logit."""
    model = MODELS["gpt-oss"].build()
    for layer in attention_layers(model):
        torch.nn.init.constant_(layer.sinks, 3.0)
    ids = prompt(1)
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("prism")
        actual = model(ids).logits
        for layer in attention_layers(model):
            torch.nn.init.constant_(layer.sinks, -100.0)
        without = model(ids).logits
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4)
    assert (without - expected).abs().max() > 1e-2
