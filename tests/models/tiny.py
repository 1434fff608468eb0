"""A tiny configuration of any architecture, from its own defaults with every size shrunk."""

from __future__ import annotations

import inspect
import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 101
WINDOW = 48

KEY_HEADS = r"(num_key_value|num_kv|n_kv|kv_n|num_key_value_attention)_?heads|num_query_groups"
HEADS = r"(attention|^n|^num|query|encoder|decoder|_n)_?heads?$|^num_heads$|^n_head$"

# By name, the first that matches; only ever shrinks.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(^|_)vocab(_size)?$|^vocab_size|_vocab_size$|^n_words$", VOCABULARY),
    (r"mtp|nextn", 0),
    (r"num_experts_per_tok|moe_top_?k|moe_k$|top_k_experts|num_activated|experts_top_k", 2),
    (r"n_group|topk_group|num_expert_groups", 1),
    (r"first_k_dense|num_dense_layers|n_dense", 1),
    (r"num_.*shared_layers|max_window_layers|num_kv_shared", 0),
    (r"num_shared_experts|n_shared_experts", 1),
    (r"(num|n)_(routed_|local_)?experts|^num_experts|moe_num_experts|zero_expert", 4),
    (r"index_topk_blocks", 2),
    (r"index_topk|topk_tokens", 32),
    (r"index_block_size|index_kv_block|block_topk", 16),
    (r"(num|n)_(hidden_)?layers?$|_layers$|^depth$|^layers$|num_blocks$|^n_layers?$", 2),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (KEY_HEADS, 2),
    (HEADS, 4),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim|rotary_dim$", 32),
    (r"lora_rank|low_rank", 32),
    (r"head_dim|head_size|d_kv$|kv_channels|attention_key_dim", 64),
    (r"sliding_window$|local_attention$|window_size$|attention_window", WINDOW),
    (r"attention_chunk_size", WINDOW),
    (r"moe_intermediate|expert_.*size|intermediate|ffn|d_ff|mlp_dim|n_inner|d_inner|inner_dim", 64),
    (r"hidden_size_per_layer|vocab_size_per_layer", 16),
    (
        r"hidden_dim$|hidden_size|d_model|n_embd|embed_dim|embedding_size|word_embed|^dim$|emb_dim",
        256,
    ),
    (r"projection_dim|text_dim|out_dim|output_dim|adapter_dim", 256),
    (r"state_size|d_state|ssm_state|mamba_d_state", 8),
    (r"conv_dim$", 32),
    (r"image_size", 56),
    (r"max_(source|target)_positions|max_position|n_positions|n_ctx|seq_length|max_seq", 1024),
    (r"num_mel_bins", 16),
    (r"num_mel_channels|input_feat", 16),
)
# Written for the default sizes, or made again from the others.
DROPPED = re.compile(
    r"layer_types|layers_block_type|_types$|layers_map|no_rope_layers|attention_types|"
    r"^attention_layers$|layer_pattern|hybrid_override_pattern|mlp_only_layers|_layer_indices$|"
    r"layer_idx|cross_attention_layers|moe_layers$|full_attn_idxs|compress_ratios|"
    r"^architectures$|transformers_version|^model_type$|deepstack"
)
SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "sep": 2, "decoder_start": 1}


def tiny_config(model_type: str, changes: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A tiny configuration; ``changes`` win, nested as the configurations are."""
    return _shrink(CONFIG_MAPPING[model_type], None, changes or {})


def _shrink(
    config_class: type[PreTrainedConfig], given: PreTrainedConfig | None, changes: dict[str, Any]
) -> PreTrainedConfig:
    default = config_class() if given is None else given
    taken = set(inspect.signature(config_class.__init__).parameters) | set(
        getattr(config_class, "__dataclass_fields__", {})
    )
    values: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name.startswith("_") or DROPPED.search(name) or name not in taken:
            continue
        if isinstance(value, PreTrainedConfig):
            sub_changes = changes.get(name, {})
            values[name] = _shrink(type(value), value, sub_changes)
        elif _is_token(name):
            values[name] = _token(name, value)
        else:
            values[name] = _shrunk(name, value)
            if re.search(KEY_HEADS, name) and value == getattr(default, "num_attention_heads", 0):
                values[name] = 4  # one for every query head, in other sizes as well
    plain = {k: v for k, v in changes.items() if not isinstance(values.get(k), PreTrainedConfig)}
    values |= plain
    values = {k: v for k, v in values.items() if v != "drop"}
    return config_class(**values)


def _is_token(name: str) -> bool:
    return name.endswith(("token_id", "token_index", "_token_ids", "image_token", "token_idx"))


def _token(name: str, value: Any) -> Any:
    if value is None:
        return None
    for prefix, token in SPECIAL.items():
        if name.startswith(prefix):
            return token
    one = VOCABULARY - 2 - sum(map(ord, name)) % 7  # of the last few, which no prompt holds
    return [one] if isinstance(value, (list, tuple)) else one


def _shrunk(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        if name.endswith("rope_parameters") or name.endswith("rope_scaling"):
            return {k: _rope(k, v) for k, v in value.items()}
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, size in SIZES:
        if re.search(pattern, name):
            return min(value, size)
    return value


def _rope(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rope(k, v) for k, v in value.items()}
    if name == "mrope_section" and value:
        total = sum(value)
        parts = [part * 32 // total for part in value]
        return [*parts[:-1], 32 - sum(parts[:-1])]
    return value
