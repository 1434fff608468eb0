"""Stands in for vLLM where it is not installed: the part of its interface that the backend uses.

Names, arguments and fields are vLLM's, as its 0.26.0 and 0.33.0 have them, which
``test_vllm_interface.py`` checks against their sources. What they do is written here: attention in
float32, sequence by sequence, from pages.
"""

from __future__ import annotations

import copy
import sys
import types
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
import torch

LAYOUTS = ("2BNHD", "B2NHD", "BHN2D")


class AttentionCGSupport(Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    NEVER = 0


class AttentionType(str, Enum):
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"
    ENCODER_DECODER = "encoder_decoder"


class MultipleOf:
    def __init__(self, base: int) -> None:
        self.base = base


@dataclass
class CommonAttentionMetadata:
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool | torch.Tensor = True
    seq_lens_cpu_upper_bound: torch.Tensor | None = None


@dataclass
class FlashAttentionMetadata:
    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    max_seq_len: int
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    scheduler_metadata: torch.Tensor | None = None
    max_num_splits: int = 0
    causal: bool | torch.Tensor = True
    rswa_prefix_lens: torch.Tensor | None = None


@dataclass
class FlashAttentionMetadata026(FlashAttentionMetadata):
    use_cascade: bool = False
    sliding_window: tuple[int, int] | None = None
    mm_prefix_range_tensor: torch.Tensor | None = None


class FlashAttentionBackend:
    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(16)]


class FlashAttentionMetadataBuilder:
    _cudagraph_support = AttentionCGSupport.ALWAYS
    reorder_batch_threshold: int | None = None
    metadata_class: type[FlashAttentionMetadata] = FlashAttentionMetadata026

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        self.kv_cache_spec = kv_cache_spec
        self.vllm_config = vllm_config

    def _init_reorder_batch_threshold(
        self,
        reorder_batch_threshold: int | None = 1,
        supports_spec_as_decode: bool = False,
        supports_dcp_with_varlen: bool = False,
    ) -> None:
        self.reorder_batch_threshold = reorder_batch_threshold

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        common = common_attn_metadata
        metadata = self.metadata_class(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=torch.zeros(1),  # of the whole step
            max_num_splits=32,
            causal=common.causal,
        )
        if common_prefix_len:
            assert isinstance(metadata, FlashAttentionMetadata026)
            metadata.use_cascade = True
        return metadata

    def update_block_table(
        self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> FlashAttentionMetadata:
        moved = copy.copy(metadata)
        moved.block_table = blk_table
        moved.slot_mapping = slot_mapping
        return moved

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        return True


def rows_of(cache: torch.Tensor, layout: str, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (pages, page_size, Hkv, D)."""
    if layout == "2BNHD":
        return cache[0], cache[1]
    if layout == "B2NHD":
        return cache[:, 0], cache[:, 1]
    rows = cache.transpose(1, 2)
    return rows[..., :head_dim], rows[..., head_dim:]


class FlashAttentionImpl:
    dcp_world_size = 1
    pcp_world_size = 1
    layout = LAYOUTS[-1]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: AttentionType = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_size, self.scale = head_size, scale
        self.alibi_slopes = alibi_slopes
        self.sliding_window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or 0
        self.attn_type = attn_type
        self.sinks = sinks
        self.seen: list[Any] = []  # metadata of every call

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.seen.append(attn_metadata)
        if attn_metadata is None:
            return output.fill_(0)
        k_pages, v_pages = rows_of(kv_cache, self.layout, self.head_size)
        group = self.num_heads // self.num_kv_heads
        starts, k_lens = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        assert starts[-1] == attn_metadata.num_actual_tokens <= len(query)
        assert len(attn_metadata.slot_mapping) == starts[-1]
        for b, k_len in enumerate(k_lens):
            q = query[starts[b] : starts[b + 1]].transpose(0, 1).float()
            pages = attn_metadata.block_table[b]
            k, v = (
                x[pages].flatten(0, 1)[:k_len].transpose(0, 1).float().repeat_interleave(group, 0)
                for x in (k_pages, v_pages)
            )
            seen = torch.ones(q.shape[1], k_len, dtype=torch.bool).tril(k_len - q.shape[1])
            scores = (q @ k.transpose(1, 2) * self.scale).masked_fill(~seen, -torch.inf)
            out = scores.softmax(-1) @ v
            output[starts[b] : starts[b + 1]].view(-1, *query.shape[1:]).copy_(out.transpose(0, 1))
        return output


class Logger:
    def info(self, *args: Any) -> None: ...

    info_once = warning = warning_once = info


class AttentionBackendEnum(Enum):
    FLASH_ATTN = "flash_attn"
    CUSTOM = ""

    def is_overridden(self) -> bool:
        return self in _overrides

    def get_path(self) -> str:
        return _overrides.get(self, self.value)


_overrides: dict[AttentionBackendEnum, str] = {}


def register_backend(
    backend: AttentionBackendEnum, class_path: str | None = None, is_mamba: bool = False
) -> Any:
    assert class_path is not None
    _overrides[backend] = class_path


current: list[Any] = []


def get_current_vllm_config_or_none() -> Any:
    return current[-1] if current else None


def config(prism: Any = None, **fields: Any) -> types.SimpleNamespace:
    """A VllmConfig of a small model."""
    names = {"max_num_batched_tokens": 256, "max_num_seqs": 4}
    return types.SimpleNamespace(
        additional_config={} if prism is None else {"prism": prism},
        model_config=types.SimpleNamespace(hf_text_config=None, max_model_len=512),
        scheduler_config=types.SimpleNamespace(**names),
        parallel_config=types.SimpleNamespace(tensor_parallel_size=1),
        **fields,
    )


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Put the stub where vLLM would be, with nothing of our backend imported yet."""
    here = sys.modules[__name__]
    contents = {
        "vllm": ("__version__",),
        "vllm.config": ("get_current_vllm_config_or_none",),
        "vllm.logger": ("init_logger",),
        "vllm.v1": (),
        "vllm.v1.attention": (),
        "vllm.v1.attention.backend": ("AttentionCGSupport", "AttentionType", "MultipleOf"),
        "vllm.v1.attention.backends": (),
        "vllm.v1.attention.backends.registry": ("AttentionBackendEnum", "register_backend"),
        "vllm.v1.attention.backends.flash_attn": (
            "FlashAttentionBackend",
            "FlashAttentionImpl",
            "FlashAttentionMetadataBuilder",
        ),
    }
    own = {"__version__": version, "init_logger": lambda name: Logger()}
    for name, attributes in contents.items():
        module = types.ModuleType(name)
        module.__path__ = []
        for attribute in attributes:
            setattr(module, attribute, own.get(attribute) or getattr(here, attribute))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(
        FlashAttentionMetadataBuilder,
        "metadata_class",
        FlashAttentionMetadata026 if version.startswith("0.26.") else FlashAttentionMetadata,
    )
    _overrides.clear()
    current.clear()
    monkeypatch.delitem(sys.modules, "prism_cuda.integrations.vllm.backend", raising=False)
