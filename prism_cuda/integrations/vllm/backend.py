"""The backend, its metadata builder and its layers: FlashAttention's, with another prefill.

Imported where vLLM looks the backend up, so a vLLM that it does not know is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import vllm
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, MultipleOf
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from prism_cuda import plan, run
from prism_cuda.config import PrismConfig
from prism_cuda.integrations.vllm.cache import is_page_size, split_cache
from prism_cuda.integrations.vllm.counts import PRISM, count
from prism_cuda.integrations.vllm.layers import config_of_layer, layer_index
from prism_cuda.integrations.vllm.settings import Settings, has_settings_of_heads, settings_of
from prism_cuda.integrations.vllm.steps import Lengths, Step, divide, first_prefill
from prism_cuda.integrations.vllm.versions import check_version
from prism_cuda.integrations.vllm.workspace import run_worst_case
from prism_cuda.options import ScoreOptions, score_options

logger = init_logger("vllm.prism_cuda")

if not check_version(vllm.__version__):
    logger.warning("prism: support of vLLM %s is an experiment", vllm.__version__)

CACHE_DTYPES = ("auto", "float16", "bfloat16")
PAGE_SIZES = (16, 32, 64, 128, 256)

# Where the builder leaves a Step on FlashAttention's metadata, or why there is none.
STEP = "prism_step"


class PrismBackend(FlashAttentionBackend):
    """vLLM's CUSTOM backend."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # a name of vLLM's enumeration of backends

    @staticmethod
    def get_impl_cls() -> type[PrismImpl]:
        return PrismImpl

    @staticmethod
    def get_builder_cls() -> type[PrismMetadataBuilder]:
        return PrismMetadataBuilder

    @classmethod
    def get_supported_kernel_block_sizes(cls, *args: Any) -> list:
        """Pages that both kernels read; vLLM cuts the larger ones of hybrid models into these."""
        sizes = super().get_supported_kernel_block_sizes(*args)
        any_size = any(isinstance(size, MultipleOf) for size in sizes)
        return list(PAGE_SIZES) if any_size else sizes


class PrismMetadataBuilder(FlashAttentionMetadataBuilder):
    """FlashAttention's metadata, and with it how the step is divided."""

    # Graphs hold whole steps of uniform decodes only: FlashAttention's, with nothing of ours.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Decodes first, as the newer model runner has them anyway.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._settings = settings_of(vllm_config.additional_config)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: Any,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        step = self._step(metadata, common_attn_metadata, fast_build)
        setattr(metadata, STEP, step)
        return metadata

    def update_block_table(self, metadata: Any, blk_table: Any, slot_mapping: Any) -> Any:
        moved = super().update_block_table(metadata, blk_table, slot_mapping)
        step = getattr(metadata, STEP, None)
        if isinstance(step, Step):
            setattr(moved, STEP, step.with_table(blk_table, slot_mapping))
        return moved

    def use_cascade_attention(
        self, common_prefix_len: int, query_lens: Any, *args: Any, **kwargs: Any
    ) -> bool:
        """Not in steps with prefills, which could not be divided."""
        if max(query_lens) >= self._settings.config.block_sizes[0]:
            return False
        return super().use_cascade_attention(common_prefix_len, query_lens, *args, **kwargs)

    def _step(self, metadata: Any, common: Any, fast_build: bool) -> Step | str:
        """How prism takes part in a step, or why it does not."""
        config = self._settings.config
        q_block, dense_below = config.block_sizes[0], config.dense_below
        if common.max_query_len < q_block:
            return "decode, or chunks of less than a block"
        if common.max_seq_len < dense_below:
            return f"fewer than {dense_below} keys"
        reason = self._why_whole(metadata, fast_build)
        if reason is not None:
            return reason
        sequences = common.num_reqs
        bounds = common.seq_lens_cpu_upper_bound
        k_lens = [common.max_seq_len] * sequences if bounds is None else bounds[:sequences].tolist()
        lengths = Lengths(common.query_start_loc_cpu[: sequences + 1].tolist(), k_lens)
        first = first_prefill(lengths, q_block, dense_below)
        if first is None:
            return f"fewer than {dense_below} keys"
        return divide(metadata, lengths, first, self._settings.workspace_tokens)

    def _why_whole(self, metadata: Any, fast_build: bool) -> str | None:
        """What keeps a step with long prefills whole for FlashAttention."""
        if fast_build:
            return "a draft model"
        if metadata.causal is not True:
            return "not causal"
        if getattr(metadata, "use_cascade", False):
            return "cascade attention"
        if getattr(metadata, "sliding_window", None) not in (None, (-1, -1)):
            return "sliding window"
        # Of images: named differently from version to version.
        ranges = ("mm_prefix_range_tensor", "mm_prefix_query_range_tensor", "rswa_prefix_lens")
        if any(getattr(metadata, name, None) is not None for name in ranges):
            return "tokens that see more or less than all before them"
        if not is_page_size(self.kv_cache_spec.block_size):
            return f"pages of {self.kv_cache_spec.block_size} tokens"
        return None


@dataclass(frozen=True)
class _Layer:
    """What a layer's first call settles for all.

    Attributes:
        dense: why FlashAttention takes all its calls; None: prism may take prefills.
    """

    index: int | None
    config: PrismConfig
    dense: str | None


class PrismImpl(FlashAttentionImpl):
    """One layer's attention."""

    # Shapes of layers whose largest call vLLM has seen in this process.
    _measured: ClassVar[set[tuple]] = set()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vllm_config = get_current_vllm_config_or_none()
        given = None if self._vllm_config is None else self._vllm_config.additional_config
        self._settings: Settings = settings_of(given)
        self._own: _Layer | None = None

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
        """As vLLM asks; the step's keys and values are in the cache already."""
        own = self._own
        if own is None:
            own = self._own = self._settle(layer, query)
        step: Any = None
        reason: str | None
        if attn_metadata is None:  # vLLM measures the memory that a step takes
            if own.dense is None:
                self._measure(query, own.config)
            reason = "no metadata"
        else:
            step = getattr(attn_metadata, STEP, "metadata of another builder")
            reason = own.dense or (step if isinstance(step, str) else None)
        if reason is None and (output_scale is not None or output_block_scale is not None):
            reason = "quantised output"  # which FlashAttention refuses
        if reason is not None:
            count(f"flash_attn: {reason}")
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        if step.others is not None:
            count("flash_attn: sequences beside prefills")
            rows = slice(0, step.rows)
            super().forward(layer, query[rows], key, value, kv_cache, step.others, output[rows])
        count(PRISM)
        self._prefill(own, step, query, kv_cache, output)
        return output

    def _prefill(
        self,
        own: _Layer,
        step: Step,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        k, v = split_cache(kv_cache, self.num_kv_heads, self.head_size)
        options = self._options()
        for part in step.prefills:
            q = query[part.rows]
            chosen = plan.plan(q, k, v, own.config, options, batch=part.batch)
            out, _, _, _ = run.run(
                chosen,
                q,
                k,
                v,
                own.config,
                options,
                scale=self.scale,
                layer_idx=own.index,
                batch=part.batch,
            )
            output[part.rows].view(out.shape).copy_(out)

    def _options(self) -> ScoreOptions:
        sinks = None if self.sinks is None else self.sinks.float().contiguous()
        return score_options(sinks, self.logits_soft_cap or None, None)

    def _settle(self, layer: Any, query: torch.Tensor) -> _Layer:
        config = self._settings.config
        index = layer_index(layer.layer_name)
        dense = self._why_dense(layer, index, query.dtype)
        if dense is not None:
            return _Layer(index, config, dense)
        model_config = getattr(self._vllm_config, "model_config", None)
        model_config = getattr(model_config, "hf_text_config", None)
        own = config_of_layer(config, model_config, index, self.head_size)
        if has_settings_of_heads(config) and self._parallel() > 1:
            raise ValueError(
                f"prism: settings of single heads (top_p, bands or dense_heads) with "
                f"{self._parallel()} tensor-parallel ranks; expected 1 rank, or settings of all "
                "heads"
            )
        plan.check_settings(own, self.num_heads, self.head_size, False)
        logger.info_once(
            "prism: prefills of %d keys and more are block-sparse, by %s",
            config.dense_below,
            own.estimator_of(self.head_size),
        )
        return _Layer(index, own, None)

    def _why_dense(self, layer: Any, index: int | None, dtype: torch.dtype) -> str | None:
        if self._settings.config.is_dense_layer(index):
            return "dense_layers"
        if self.attn_type != AttentionType.DECODER:
            return "not self-attention of a decoder"
        if getattr(layer, "attn_backend", PrismBackend) is not PrismBackend:
            return "attention in chunks of its own"
        if tuple(self.sliding_window) != (-1, -1):
            return "sliding window"
        if self.alibi_slopes is not None:
            return "ALiBi"
        if self.kv_cache_dtype not in CACHE_DTYPES:
            return f"{self.kv_cache_dtype} cache"
        if self.dcp_world_size > 1 or getattr(self, "pcp_world_size", 1) > 1:
            return "context parallelism"
        if dtype not in plan.CUDA_DTYPES:
            return f"{dtype}"
        return plan.why_not_estimated(self.head_size, self._settings.config.for_layer(index))

    def _parallel(self) -> int:
        parallel = getattr(self._vllm_config, "parallel_config", None)
        return getattr(parallel, "tensor_parallel_size", 1)

    def _measure(self, query: torch.Tensor, config: PrismConfig) -> None:
        """Once for all layers of a kind: they run one after the other, and share the memory."""
        estimator = config.estimator_of(self.head_size)
        shape = (self.num_heads, self.num_kv_heads, self.head_size, estimator)
        if self._vllm_config is None or shape in self._measured:
            return
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._measured.add(shape)
        scheduler = self._vllm_config.scheduler_config
        longest = self._vllm_config.model_config.max_model_len
        run_worst_case(
            query,
            self.num_kv_heads,
            config,
            tokens=scheduler.max_num_batched_tokens,
            longest=longest,
            sequences=max(
                1, min(self._settings.workspace_tokens // longest, scheduler.max_num_seqs)
            ),
        )
