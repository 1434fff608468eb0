"""The attention mask of a transformers forward pass, in the form that Prism layers take.

One of four things reaches the layers:

* ``None``: causal, no padding, queries at the end of the keys.
* bool (B, n): the same with padding; True marks real tokens, which are contiguous in every row.
  Keys from n on do not exist yet (the unwritten tail of a static cache).
* bool (B, w, n): the same under a sliding window of w keys, expanded over w without memory; n is 0
  where there is no padding. Not every model tells its layers of the window.
* bool (B, 1, q, kv): anything else, for dense attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.masking_utils import causal_mask_function, sdpa_mask

from prism_cuda.config import PrismConfig
from prism_cuda.integrations.warnings import warn_once

Span = tuple[int, int]

# Where the spans of a padding mask are kept on it, so that only the first layer reads them back.
_SPANS = "_prism_spans"


def prism_mask(
    prism_config: PrismConfig,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Mask function for transformers' AttentionMaskInterface; see the module's docstring.

    q_offset is an int, or a 0-d tensor where the cache is static.
    """

    def token_mask() -> torch.Tensor | None:
        kwargs.pop("allow_is_bidirectional_skip", None)
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            # None has one meaning here, and layers disagree on it where sdpa_mask returns it.
            allow_is_causal_skip=False,
            **kwargs,
        )

    # A window that no key has left yet is plain causal; any other change forbids the skip.
    window = local_size if allow_is_causal_skip else None
    window_open = window is not None and window >= kv_length
    sliding = window is not None and _is_sliding_window(kwargs.get("config"), window)
    if mask_function is not causal_mask_function and not (window_open or sliding):
        if _could_be_sparse(prism_config, q_length, kv_length):
            warn_once(
                "prism: attention other than causal (packed sequences without lengths, chunked, "
                "bidirectional or custom masks) runs dense, with a (q, kv) mask in memory."
            )
        return token_mask()
    hiding = window if mask_function is not causal_mask_function and not window_open else None
    growing = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    # A step of decode shares one mask among its layers.
    if attention_mask is None and growing and not (hiding is not None and q_length == 1):
        return _without_padding(batch_size, hiding, kwargs.get("device"))
    if not _could_be_sparse(prism_config, q_length, kv_length):
        return token_mask()

    # Keys after the last query are the unwritten tail of a static cache.
    written = min(int(q_offset) + q_length - kv_offset, kv_length)
    if attention_mask is None:
        padding = torch.ones(batch_size, written, dtype=torch.bool, device=kwargs.get("device"))
    else:
        padding = attention_mask[:, kv_offset : kv_offset + written].bool()
        padding = F.pad(padding, (0, written - padding.shape[1]))
    spans = _contiguous_spans(padding)
    if spans is None:
        warn_once("prism: an attention_mask with holes runs dense.")
        return token_mask()
    if written == kv_length and all(span == (0, written) for span in spans):
        return _without_padding(batch_size, hiding, padding.device)
    if hiding is not None:
        padding = padding[:, None, :].expand(-1, hiding, -1)
    setattr(padding, _SPANS, spans)
    return padding


def mask_window(mask: torch.Tensor) -> int:
    """Keys that a query sees, its own included, under a (B, w, n) mask."""
    return mask.shape[1]


def _without_padding(batch: int, window: int | None, device: Any) -> torch.Tensor | None:
    if window is None:
        return None
    return torch.empty(batch, window, 0, dtype=torch.bool, device=device)


def _is_sliding_window(config: Any, local_size: int) -> bool:
    """Whether ``local_size`` is a window's, and not the chunk size of chunked attention."""
    chunked = getattr(config, "attention_chunk_size", None) is not None
    return not chunked and getattr(config, "sliding_window", None) == local_size


def token_mask(
    q_len: int,
    k_len: int,
    device: torch.device,
    padding: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Bool (B or 1, 1, q_len, k_len): what causal queries see, token by token.

    Args:
        padding: bool (B, n), the real tokens; queries end at the n-th key. None: at the last one.
        window: keys that a query sees, its own included; None for all.
    """
    written = k_len if padding is None else padding.shape[1]
    position = torch.arange(written - q_len, written, device=device)[:, None]
    key = torch.arange(k_len, device=device)[None, :]
    visible = key <= position
    if window is not None:
        visible = visible & (key > position - window)
    visible = visible[None, None]
    if padding is not None:
        visible = visible & F.pad(padding, (0, k_len - written))[:, None, None, :]
    return visible


def row_spans(padding: torch.Tensor) -> list[Span]:
    """(first, end) of the real tokens of every row of a bool (B, n) or (B, window, n) mask.

    Reads the device only if :func:`prism_mask` did not make this very tensor.

    Raises:
        ValueError: if the real tokens of a row are not contiguous.
    """
    spans = getattr(padding, _SPANS, None)
    if spans is None:
        spans = _contiguous_spans(padding if padding.dim() == 2 else padding[:, 0])
        if spans is None:
            raise ValueError("prism: attention_mask has holes; its rows must be contiguous")
        setattr(padding, _SPANS, spans)
    return spans


def _could_be_sparse(prism_config: PrismConfig, q_length: int, kv_length: int) -> bool:
    """Whether a call of this size would be sparse if its mask allowed it."""
    return q_length >= prism_config.block_sizes[0] and kv_length >= prism_config.dense_below


def _contiguous_spans(padding: torch.Tensor) -> list[Span] | None:
    """Spans of the True runs of every row, or None if a row has several."""
    length = padding.shape[1]
    if length == 0:
        return [(0, 0)] * padding.shape[0]
    real = padding.int()
    first = real.argmax(-1)
    end = length - real.flip(-1).argmax(-1)
    count = real.sum(-1)
    spans: list[Span] = []
    for row_first, row_end, row_count in torch.stack([first, end, count], -1).tolist():
        if row_count == 0:
            spans.append((0, 0))
        elif row_end - row_first == row_count:
            spans.append((row_first, row_end))
        else:
            return None
    return spans
