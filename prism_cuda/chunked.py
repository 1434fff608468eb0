"""ChunkedPrefill: block-sparse prefill of a prompt that comes in chunks."""

from __future__ import annotations

from typing import Any

import torch

from prism_cuda import estimators, ops, plan, run
from prism_cuda.config import MAX_HEAD_DIM, PrismConfig, as_config
from prism_cuda.options import score_options


class ChunkedPrefill:
    """What one attention layer keeps of its keys while its prompt grows chunk by chunk.

    Every key is pooled once, in the call that brings it; :func:`prism_cuda.prefill` would read the
    whole prefix again for every chunk. Chunks may have any sizes and start within a block.

    Attributes:
        length: tokens whose keys have been taken in.

    Args:
        batch, kv_heads, head_dim: of k; head_dim is a multiple of 8 up to 256, or up to 128 where
            the config asks for the grid.
        max_len: tokens that the prompt may grow to. A key head takes 4 * head_dim bytes a block
            with the bands, with the grid 260 or 516 (head_dim over 64) for every 16 tokens.
        config: settings; what it rules out (short chunks, few keys) runs as dense attention, as in
            :func:`prism_cuda.prefill`, and is pooled all the same.
        device: where k lives.

    Raises:
        ImportError: if the ops library is not built.
        ValueError: for another head_dim.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        max_len: int,
        *,
        config: PrismConfig | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        self._config = as_config("ChunkedPrefill", config)
        if plan.why_not_estimated(head_dim, self._config) is not None:
            largest = MAX_HEAD_DIM[self._config.estimator]
            raise ValueError(
                f"ChunkedPrefill: head_dim is {head_dim}; expected a multiple of 8 up to {largest}"
            )
        ops.load()
        self._shape = (batch, kv_heads, head_dim)
        self._max_len = max_len
        estimator = estimators.get(self._config.estimator_of(head_dim))
        self._keys = estimator.new_state(self._shape, max_len, self._config, device)
        self.length = 0
        self._in_order = True  # the state's unfinished unit is the one that ends at length

    def reset(self) -> None:
        """Begin another prompt in the same memory."""
        self.truncate(0)

    def truncate(self, length: int) -> None:
        """Go back to the first ``length`` tokens, as if the others had never come.

        Reads and moves nothing: what is pooled of whole units (a block by bands, 16 tokens on the
        grid) depends on no later key. Of a unit that is cut, :meth:`prefill` pools the keys again,
        from k; :meth:`append`, which does not see them, then has to wait for a prefill.

        Raises:
            ValueError: for more tokens than there are, or less than 0.
        """
        if not 0 <= length <= self.length:
            raise ValueError(
                f"ChunkedPrefill.truncate: length is {length}; expected 0 to {self.length}, the "
                "tokens so far"
            )
        if length < self.length:
            self.length = length
            self._in_order = length % self._keys.unit == 0

    def append(self, k: torch.Tensor) -> None:
        """Pool new keys (B, Hkv, tokens, D), those from position ``length`` on.

        Raises:
            ValueError: if they do not fit the shapes or max_len, or after a :meth:`truncate` that
                cut a unit.
        """
        if not self._in_order:
            unit = self._keys.unit
            raise ValueError(
                f"ChunkedPrefill.append: after truncate({self.length}) the keys from position "
                f"{self.length // unit * unit} on have to be pooled again; expected a prefill, "
                f"which has them, or a truncate to a multiple of {unit}"
            )
        self._append(k, self.length)

    def _append(self, k: torch.Tensor, start: int) -> None:
        batch, kv_heads, head_dim = self._shape
        if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (batch, kv_heads, head_dim):
            raise ValueError(
                f"ChunkedPrefill: k has shape {tuple(k.shape)}; expected "
                f"({batch}, {kv_heads}, tokens, {head_dim})"
            )
        if start + k.shape[2] > self._max_len:
            raise ValueError(
                f"ChunkedPrefill: {k.shape[2]} tokens after {start} exceed max_len {self._max_len}"
            )
        self._keys.append(k, start)
        self.length = start + k.shape[2]
        self._in_order = True

    def _take_in(self, k: torch.Tensor) -> None:
        """Pool what is new of all keys so far."""
        unit = self._keys.unit
        start = self.length if self._in_order else self.length // unit * unit
        self._append(k[:, :, start:], start)

    def prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        sinks: torch.Tensor | None = None,
        softcap: float | None = None,
        window_left: int | None = None,
        return_mask: bool = False,
    ) -> Any:
        """Causal attention of a chunk of queries to all keys so far.

        Args:
            q: (B, Hq, q_len, D), the last q_len tokens.
            k, v: (B, Hkv, k_len, D), all tokens so far, such as the filled part of a cache. Those
                from position ``length`` on are pooled; the ones before have to be as they were.
            scale: softmax scale; D ** -0.5 if None.
            sinks, softcap, window_left: as for :func:`prism_cuda.prefill`.
            return_mask: also return the :class:`BlockMask`, None where the chunk ran dense.

        Returns:
            out like q, or (out, mask).

        Raises:
            ValueError: if k has fewer tokens than were pooled, if config's top_p, bands or
                dense_heads do not fit q's heads, or as for :meth:`append`.
            RuntimeError: if the tensors do not fit each other.
        """
        if k.dim() == 4 and k.shape[2] < self.length:
            raise ValueError(
                f"ChunkedPrefill: k has {k.shape[2]} tokens; expected all so far, at least "
                f"{self.length} (reset() begins another prompt, truncate() goes back)"
            )
        config, options = self._config, score_options(sinks, softcap, window_left)
        q, k, v = plan.computed(q, k, v)
        plan.check("ChunkedPrefill.prefill", q, k, v, scale, options)
        plan.check_settings(config, q.shape[1], q.shape[3], False)
        chosen = plan.plan(q, k, v, config, options)
        source = None
        if chosen.estimator is None:
            self._take_in(k)  # for later chunks
        else:
            source = run.Source(lambda: self._take_in(k), lambda _: self._keys.select(q, k, scale))
        result = run.run(chosen, q, k, v, config, options, scale=scale, source=source)
        if not return_mask:
            return result[0]
        if chosen.path == "dense":
            return result[0], None
        return result[0], run.mask_of(result, q.shape[2], k.shape[2], config, causal=True)
