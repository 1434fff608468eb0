"""Tiny random transformers models, one for every kind of attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from prism_cuda import Bands, PrismConfig

# Everything kept and nothing too short: sparse attention that must equal dense.
EXACT = PrismConfig(block_size=64, estimator="bands", top_p=1.0, dense_below=0)

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
WINDOW = "sliding window: every block in it"
SPARSE = (PRISM, WINDOW)  # reasons of the block-sparse path
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
    # Their layers do not hear of the window: it is in the mask alone.
    "qwen2-moe-window": Model(
        "Qwen2MoeConfig",
        TINY_MOE
        | {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 2}
        | {"shared_expert_intermediate_size": 64},
        (WINDOW, PRISM),
    ),
    "phimoe-window": Model(
        "PhimoeConfig",
        {"sliding_window": 50, "num_local_experts": 2, "num_experts_per_tok": 1},
        (WINDOW, WINDOW),
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
        (WINDOW, PRISM),
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
    "phi3-d96-partial": Model(
        "Phi3Config",
        {
            "hidden_size": 384,
            "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75},
        },
    ),
    "llama-narrow-head": Model("LlamaConfig", {"head_dim": 40}),
    "llama-wide-head": Model("LlamaConfig", {"head_dim": 256}),
    "llama-odd-head": Model("LlamaConfig", {"head_dim": 36}, ("head_dim 36", "head_dim 36")),
}
