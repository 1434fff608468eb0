"""What single architectures need besides small sizes, to be built and run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Changes = dict[str, Any]

HYBRID: Changes = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA: Changes = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 1}

OVERRIDES: dict[str, Changes] = {
    "bailing_hybrid": HYBRID,
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1,
             "num_hidden_layers": 3},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 512},
    "gemma3n": {"text_config": {"intermediate_size": 64, "activation_sparsity_pattern": None}},
    "gemma3n_text": {"intermediate_size": 64, "activation_sparsity_pattern": None},
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": HYBRID,
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lfm3": HYBRID,
    "mamba2": {"num_heads": 8, "head_dim": 64},
    "qwen3_5": {"text_config": HYBRID},
    "qwen3_5_moe": {"text_config": HYBRID},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp": {"text_config": HYBRID},
    "qwen4_exp_text": HYBRID,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {"layer_types": ["mamba", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
}  # fmt: skip
INPUTS: dict[str, Callable[[Any, torch.Tensor], dict[str, Any]]] = {}
