"""What single architectures need besides small sizes, to be built and run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Changes = dict[str, Any]

HYBRID: Changes = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA: Changes = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 1}
MROPE: Changes = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
}
GLOBAL_HEAD: Changes = {"global_head_dim": 64}

OVERRIDES: dict[str, Changes] = {
    "bailing_hybrid": HYBRID,
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "blenderbot": {"max_position_embeddings": 1024},
    "cohere_compass": {"text_config": {"rope_parameters": "drop"}},
    "cohere_compass_text": {"rope_parameters": "drop"},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "num_hidden_layers": 3,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 512},
    "gemma3n": {"text_config": {"intermediate_size": 64, "activation_sparsity_pattern": None}},
    "gemma3n_text": {"intermediate_size": 64, "activation_sparsity_pattern": None},
    "gemma4": {"text_config": GLOBAL_HEAD},
    "gemma4_text": GLOBAL_HEAD
    | {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_unified": {"text_config": GLOBAL_HEAD},
    "gemma4_unified_text": GLOBAL_HEAD,
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "mrope_section": [4, 6, 6],
            }
        }
    },
    "glm5_next": {"text_config": {"num_key_value_heads": 4} | HYBRID},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "hunyuan_vl": {"text_config": {"head_dim": 64}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": HYBRID,
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {
        "layer_types": ["conv", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
    },
    "lfm3_vl": {"text_config": {"layer_types": ["conv", "full_attention"]}},
    "longcat_flash": {"head_dim": 32, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 64},
    "minicpm_ocr": {"text_config": HYBRID},
    "minicpmv4_6": {"text_config": HYBRID},
    "minicpmv4_7": {"text_config": HYBRID},
    "minimax_m3_vl": {"text_config": {"layer_types": ["full_attention", "minimax_m3_sparse"]}},
    "ministral": {"head_dim": 64},
    "mistral_large4": {"text_config": {"kv_source_layers": None}},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl": {"text_config": MROPE},
    "qwen2_5_omni_thinker": {"text_config": MROPE},
    "qwen2_5_vl": {"text_config": MROPE},
    "qwen2_vl": {"text_config": MROPE},
    "qwen3_5": {"text_config": HYBRID},
    "qwen3_5_moe": {"text_config": HYBRID},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp": {"text_config": HYBRID | {"indexer_topk_blocks": 2}},
    "qwen4_exp_text": HYBRID | {"indexer_topk_blocks": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "t5": {"decoder_start_token_id": 0},
    "whisper": {"max_source_positions": 100, "max_target_positions": 448},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
    "zamba2": MAMBA | {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
}


def _sounds(config: Any, ids: torch.Tensor) -> Changes:
    frames = 2 * config.max_source_positions
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(ids.shape[0], config.num_mel_bins, frames, generator=generator)
    return {"input_features": features, "decoder_input_ids": ids}


INPUTS: dict[str, Callable[[Any, torch.Tensor], Changes]] = {"whisper": _sounds}
