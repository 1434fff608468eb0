"""Attention of packed sequences in transformers: a batch in one launch, or one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch

from prism_cuda import plan, run
from prism_cuda.batch import Batch
from prism_cuda.integrations.dense import LayerCall
from prism_cuda.integrations.rope import config_of_layer
from prism_cuda.integrations.warnings import warn_of_dense

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attend_packed(
    call: LayerCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_ends: torch.Tensor,
    k_ends: torch.Tensor | None,
    max_q_len: int | None,
    max_k_len: int | None,
    attend: Attend,
) -> torch.Tensor:
    """Attention (1, Hq, q, D) of every sequence on its own; queries past the last one get 0.

    Args:
        q_ends, k_ends: int (sequences + 1,), where the sequences end, after a leading 0. Read by
            the host only where a longest length is missing or the batch cannot run in one launch.
        max_q_len, max_k_len: at least the longest sequence's queries and keys.
        attend: attention of one sequence, for what the kernels do not serve.
    """
    if query.shape[0] != 1:
        raise ValueError(f"prism: cu_seq_lens_q with a batch of {query.shape[0]}; expected 1")
    k_ends = q_ends if k_ends is None else k_ends
    if k_ends.shape != q_ends.shape:
        raise ValueError(
            f"prism: cu_seq_lens_k has {k_ends.shape[0]} entries; expected {q_ends.shape[0]}, as "
            "many as cu_seq_lens_q"
        )
    obstacle = _why_apart(call, query, value)
    if obstacle is not None:
        return _one_by_one(
            query, key, value, *_bounds(query, key, q_ends, k_ends, obstacle), attend
        )
    if max_q_len is None or max_k_len is None:
        missing = "max_length_q and max_length_k were not passed on"
        q_bounds, k_bounds = _bounds(query, key, q_ends, k_ends, missing)
        # The queries past the last sequence count as one more.
        max_q_len = max(*_lengths(q_bounds), query.shape[2] - q_bounds[-1])
        max_k_len = max(_lengths(k_bounds))
    return _at_once(call, query, key, value, q_ends, k_ends, int(max_q_len), int(max_k_len))


def _why_apart(call: LayerCall, query: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why the kernels cannot serve the batch in one launch, or None if they can."""
    if value.shape[-1] != query.shape[-1]:
        return f"v has head_dim {value.shape[-1]}, q has {query.shape[-1]}"
    if not call.causal:
        return "a non-causal layer"
    if call.dropout > 0:
        return "dropout"
    kernel = plan.attention_kernel(
        query.shape[-1], query.dtype, query.device, call.config.block_sizes
    )
    return kernel if kernel.startswith("unsupported") else None


def _at_once(
    call: LayerCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_ends: torch.Tensor,
    k_ends: torch.Tensor,
    max_q_len: int,
    max_k_len: int,
) -> torch.Tensor:
    """All sequences in one launch; the host does not know their lengths."""
    # Queries past the last sequence become one without keys, whose output is 0.
    q_ends = torch.cat([q_ends, q_ends.new_full((1,), query.shape[2])])
    k_ends = torch.cat([k_ends, k_ends[-1:]])
    q_ends, k_ends = (ends.to(query.device, torch.int32) for ends in (q_ends, k_ends))
    batch = Batch(q_ends, k_ends, None, None, max_q_len, max_k_len)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    head_dim, config, options = query.shape[-1], call.config, call.kernel_options()
    chosen = plan.plan(q, k, v, config, options, batch=batch)
    if call.dense:
        chosen = plan.dense(chosen, "dense_layers")
    elif chosen.estimator is not None:
        reason = plan.why_not_estimated(head_dim, config)
        if reason is None:
            config = config_of_layer(call.module, head_dim, config)
        else:
            warn_of_dense(call.module, reason)
            chosen = plan.dense(chosen, reason)
    out, _, _, _ = run.run(
        chosen,
        q,
        k,
        v,
        config,
        options,
        scale=call.scale,
        layer_idx=call.layer_idx,
        batch=batch,
    )
    return out.transpose(0, 1)[None]


def _bounds(
    query: torch.Tensor,
    key: torch.Tensor,
    q_ends: torch.Tensor,
    k_ends: torch.Tensor,
    reason: str,
) -> tuple[list[int], list[int]]:
    """Where the sequences begin and end, read by the host and checked."""
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(
            f"prism: the host reads the lengths of packed sequences because {reason}, which a CUDA "
            "graph cannot do; pass ContinuousBatchingConfig(use_cuda_graph=False)"
        )
    q_bounds = q_ends.tolist()
    k_bounds = q_bounds if k_ends is q_ends else k_ends.tolist()
    if q_bounds[-1] > query.shape[2] or k_bounds[-1] > key.shape[2]:
        raise ValueError(
            f"prism: cu_seq_lens_q ends at {q_bounds[-1]} and cu_seq_lens_k at {k_bounds[-1]}; "
            f"expected at most {query.shape[2]} and {key.shape[2]}, the tokens there are"
        )
    return q_bounds, k_bounds


def _lengths(bounds: list[int]) -> list[int]:
    return [end - start for start, end in zip(bounds, bounds[1:], strict=False)]


def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_bounds: list[int],
    k_bounds: list[int],
    attend: Attend,
) -> torch.Tensor:
    out = query.new_zeros((*query.shape[:3], value.shape[-1]))
    for i in range(len(q_bounds) - 1):
        queries = slice(q_bounds[i], q_bounds[i + 1])
        keys = slice(k_bounds[i], k_bounds[i + 1])
        if queries.start < queries.stop:
            out[:, :, queries] = attend(query[:, :, queries], key[:, :, keys], value[:, :, keys])
    return out
