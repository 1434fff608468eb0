"""ChunkedPrefill: block-sparse prefill of a prompt that comes in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from prism_cuda import _ops, functional, recording
from prism_cuda.block_mask import BlockMask
from prism_cuda.config import PrismConfig

_Result = TypeVar("_Result")


def running_sums(head_dim: int) -> int:
    """Partial sums that prism::pool_append_ keeps of an unfinished block, per dimension."""
    return 16 if head_dim <= 64 else 8 if head_dim <= 128 else 4


class ChunkedPrefill:
    """The key means of one attention layer while its prompt grows chunk by chunk.

    Every key is pooled once, in the call that brings it; :func:`prism_cuda.prefill` would read the
    whole prefix again for every chunk. Chunks may have any sizes and start within a block.

    Attributes:
        length: tokens whose keys have been pooled.

    Args:
        batch, kv_heads, head_dim: of k; head_dim is a multiple of 8 up to 256.
        max_len: tokens that the prompt may grow to; takes 4 * head_dim bytes a block and head.
        config: settings; what it rules out (short chunks, few keys) runs as dense attention, as in
            :func:`prism_cuda.prefill`, and is pooled all the same. The estimator is "bands".
        device: where k lives.

    Raises:
        ImportError: if the ops library is not built.
        ValueError: for another head_dim or estimator.
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
        self._config = config or PrismConfig()
        if self._config.estimator != "bands":
            raise ValueError(
                f"ChunkedPrefill: config.estimator is {self._config.estimator!r}; expected "
                "'bands', the one whose key means are kept from chunk to chunk"
            )
        largest = functional.MAX_HEAD_DIM["bands"]
        if head_dim % 8 or not 0 < head_dim <= largest:
            raise ValueError(
                f"ChunkedPrefill: head_dim is {head_dim}; expected a multiple of 8 up to {largest}"
            )
        _ops.load()
        self._max_len = max_len
        blocks = -(-max_len // self._config.block_sizes[1])
        heads = (batch, kv_heads)
        self._means = torch.empty((*heads, blocks, head_dim), dtype=torch.float32, device=device)
        self._sums = torch.empty(
            (*heads, running_sums(head_dim), head_dim), dtype=torch.float32, device=device
        )
        self.length = 0

    @property
    def means(self) -> torch.Tensor:
        """Float32 (B, Hkv, blocks, D): means of the keys so far, the last block's of its tokens."""
        return self._means[:, :, : -(-self.length // self._config.block_sizes[1])]

    def reset(self) -> None:
        """Begin another prompt in the same memory."""
        self.length = 0

    def append(self, k: torch.Tensor) -> None:
        """Pool new keys (B, Hkv, tokens, D), those from position ``length`` on.

        Raises:
            ValueError: if they do not fit the shapes or max_len.
        """
        batch, kv_heads, _, head_dim = self._means.shape
        if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (batch, kv_heads, head_dim):
            raise ValueError(
                f"ChunkedPrefill: k has shape {tuple(k.shape)}; expected "
                f"({batch}, {kv_heads}, tokens, {head_dim})"
            )
        if self.length + k.shape[2] > self._max_len:
            raise ValueError(
                f"ChunkedPrefill: {k.shape[2]} tokens after {self.length} exceed max_len "
                f"{self._max_len}"
            )
        torch.ops.prism.pool_append_(
            k, self._means, self._sums, self.length, self._config.block_sizes[1]
        )
        self.length += k.shape[2]

    def prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        return_mask: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, BlockMask | None]:
        """Causal attention of a chunk of queries to all keys so far.

        Args:
            q: (B, Hq, q_len, D), the last q_len tokens.
            k, v: (B, Hkv, k_len, D), all tokens so far, such as the filled part of a cache. Those
                from position ``length`` on are pooled; the ones before have to be as they were.
            scale: softmax scale; D ** -0.5 if None.
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
                f"{self.length} (reset() begins another prompt)"
            )
        recorder = recording.active()
        times: dict[str, float] = {}

        def stage(name: str, run: Callable[[], _Result]) -> _Result:
            if recorder is None or not recorder.times:
                return run()
            result, times[name] = functional.timed(run, q.device)
            return result

        def pool() -> torch.Tensor:
            self.append(k[:, :, self.length :])
            return torch.ops.prism.block_pool(q, self._config.block_sizes[0])

        choice = functional.choose(q, k, v, self._config)
        if choice.path == "dense":
            self.append(k[:, :, self.length :])
            out = functional.run_dense(q, k, v, scale, True, choice.reason)
            return (out, None) if return_mask else out
        q_means = stage("pool", pool)
        q_len, k_len = q.shape[2], k.shape[2]
        bands = self._config.resolve_bands(q.shape[3])
        mask = stage(
            "select",
            lambda: functional.select_from_means(
                q_means, self.means, q_len, k_len, bands, self._config, causal=True
            ),
        )
        out, _ = stage(
            "attend",
            lambda: functional.sparse_attention(q, k, v, mask, scale=scale, return_lse=True),
        )
        if recorder is not None:
            kept = mask if recorder.masks else None
            recorder.calls.append(
                recording.CallRecord(
                    None, "prism", choice.reason, q_len, k_len, mask.density(), kept, times
                )
            )
        return (out, mask) if return_mask else out
