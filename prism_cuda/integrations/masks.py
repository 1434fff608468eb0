"""The attention mask of a transformers forward pass, in the form that Prism layers take.

One of three things reaches the layers:

* ``None``: the model asked for no mask; the layer's own ``is_causal`` decides, as for sdpa.
* A **marker** that :func:`prism_mask` made, see :class:`Causal`: causal, whatever the layer says,
  perhaps under a window, perhaps with padding. It has the four dimensions of a mask, so models pass
  it on and slice its queries; but of a dtype that neither adds to scores nor combines with masks,
  so whoever reads it as a mask fails instead of attending to everything.
* A mask of (q, kv): (B, 1 or Hq, q, kv) bool or additive, for dense attention, (B, 1, 1, kv) or
  (B, 1, 1, 1) where all queries see the same; or the (B, kv) padding of a layer that makes no
  other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)

from prism_cuda.config import PrismConfig
from prism_cuda.integrations.warnings import warn_once

MARKER_DTYPE = torch.float8_e5m2

# Layers that attend to what their own trained index picks. They are written for the masks of eager
# attention (DeepSeek-V4 appends additive terms), and run dense.
TRAINED_INDEX_LAYERS = frozenset(
    {
        "indexed_attention",
        "minimax_m3_sparse",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    }
)


@dataclass(frozen=True)
class Causal:
    """What a marker says: queries stand at the end of the keys that there are.

    Attributes:
        window: keys that a query sees, its own included; None for all.
        written: how many keys there are; later ones are the unwritten tail of a static cache. None
            for as many as the layer has.
        real: bool (B, written), which of them are tokens and not padding; None for all of them.

    As a tensor it is (B, window + 1 or 1, rows, written or 0), expanded where no padding is told;
    the rows are 2 where all keys are known to be real, as a slice of which is still right.
    """

    window: int | None = None
    written: int | None = None
    real: torch.Tensor | None = None

    def mark(self, batch: int, device: Any) -> torch.Tensor:
        """The marker."""
        windows = 1 if self.window is None else self.window + 1
        if self.real is not None:
            keys = self.real.to(torch.uint8).view(MARKER_DTYPE)[:, None, None, :]
            return keys.expand(-1, windows, -1, -1)
        if self.written is None:
            return torch.empty(batch, windows, 1, 0, dtype=MARKER_DTYPE, device=device)
        one = torch.ones(1, 1, 1, 1, dtype=torch.uint8, device=device).view(MARKER_DTYPE)
        return one.expand(batch, windows, 2, self.written)

    @classmethod
    def of(cls, mask: torch.Tensor | None) -> Causal | None:
        """What a marker says; None for any other mask."""
        if mask is None or mask.dtype != MARKER_DTYPE:
            return None
        _, windows, rows, written = mask.shape
        window = windows - 1 if windows > 1 else None
        if written == 0:
            return cls(window)
        if rows > 1:
            return cls(window, written)
        return cls(window, written, mask.view(torch.uint8)[:, 0, 0] != 0)

    def token_mask(self, q_len: int, k_len: int, device: torch.device) -> torch.Tensor:
        """Bool (B or 1, 1, q_len, k_len): what is seen, token by token."""
        written = k_len if self.written is None else self.written
        position = torch.arange(written - q_len, written, device=device)[:, None]
        key = torch.arange(k_len, device=device)[None, :]
        visible = key <= position
        if self.window is not None:
            visible = visible & (key > position - self.window)
        visible = visible[None, None]
        if self.real is not None:
            visible = visible & F.pad(self.real, (0, k_len - written))[:, None, None, :]
        return visible


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
) -> torch.Tensor:
    """Mask function for transformers' AttentionMaskInterface; see the module's docstring.

    q_offset is an int, or a 0-d tensor where the cache is static.
    """
    config, device = kwargs.get("config"), kwargs.get("device")

    def token_mask() -> torch.Tensor:
        kwargs.pop("allow_is_bidirectional_skip", None)
        make = eager_mask if has_trained_index(config) else sdpa_mask
        mask = make(
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
        assert mask is not None
        return mask

    if mask_function is bidirectional_mask_function and kwargs.get("allow_is_bidirectional_skip"):
        return _bidirectional(batch_size, kv_length, kv_offset, attention_mask, device)
    could_be_sparse = (
        q_length >= prism_config.block_sizes[0] and kv_length >= prism_config.dense_below
    )
    sliding = local_size is not None and _is_sliding_window(config, local_size)
    # A window that no key has left yet is plain causal, and so is the first chunk of chunked
    # attention; any other change forbids the skip.
    window_open = local_size is not None and local_size >= kv_length
    window_open = window_open and (sliding or kv_offset == 0)
    causal = mask_function is causal_mask_function or window_open or sliding
    if not (allow_is_causal_skip and causal) or has_trained_index(config):
        if could_be_sparse:
            warn_once(
                "prism: attention other than causal (packed sequences without lengths, chunked, "
                "bidirectional or custom masks) runs dense, with a (q, kv) mask in memory."
            )
        return token_mask()
    window = local_size if mask_function is not causal_mask_function and not window_open else None
    growing = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    # A step of decode shares one mask among its layers.
    if attention_mask is None and growing and not (window is not None and q_length == 1):
        return Causal(window).mark(batch_size, device)
    if not could_be_sparse:
        return token_mask()

    # Keys after the last query are the unwritten tail of a static cache.
    written = min(int(q_offset) + q_length - kv_offset, kv_length)
    whole = Causal(window, None if written == kv_length else written)
    if attention_mask is None:
        return whole.mark(batch_size, device)
    real = attention_mask[:, kv_offset : kv_offset + written].bool()
    real = F.pad(real, (0, written - real.shape[1]))
    # Of a larger batch the host learns nothing: its contents decide on the device.
    if _readable(real) and (real.device.type == "cpu" or batch_size == 1) and bool(real.all()):
        return whole.mark(batch_size, device)
    if window is not None and not (_readable(real) and _without_holes(real)):
        # A window counts the tokens of a hole, which the kernels never see.
        warn_once("prism: an attention_mask with holes runs dense under a sliding window.")
        return token_mask()
    return Causal(window, written, real).mark(batch_size, device)


def _bidirectional(
    batch: int, kv_length: int, kv_offset: int, attention_mask: torch.Tensor | None, device: Any
) -> torch.Tensor:
    """Of attention to all that is real, from every query; never None, which causal layers would
    take for their own."""
    if attention_mask is None:
        return torch.ones(batch, 1, 1, 1, dtype=torch.bool, device=device)
    real = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if real.device.type == "cpu" and _readable(real) and bool(real.all()):
        return torch.ones(batch, 1, 1, 1, dtype=torch.bool, device=device)
    return F.pad(real, (0, kv_length - real.shape[1]))[:, None, None, :]


def has_trained_index(config: Any) -> bool:
    """Whether a model has layers of :data:`TRAINED_INDEX_LAYERS`."""
    return not TRAINED_INDEX_LAYERS.isdisjoint(getattr(config, "layer_types", None) or ())


def _is_sliding_window(config: Any, local_size: int) -> bool:
    """Whether ``local_size`` is a window's, and not the chunk size of chunked attention."""
    chunked = getattr(config, "attention_chunk_size", None) is not None
    return not chunked and getattr(config, "sliding_window", None) == local_size


def _readable(x: torch.Tensor) -> bool:
    """Whether the host may read x: not while a graph is traced or captured."""
    if torch.compiler.is_compiling() or isinstance(x, torch._subclasses.FakeTensor):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _without_holes(real: torch.Tensor) -> bool:
    """Whether the real tokens of every row follow one another; read by the host."""
    starts = real & ~F.pad(real, (1, 0))[:, :-1]
    return bool((starts.sum(-1) <= 1).all())
