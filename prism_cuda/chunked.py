"""ChunkedPrefill: block-sparse prefill of a prompt that comes in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from prism_cuda import _ops, functional, recording, selection
from prism_cuda.block_mask import BlockMask
from prism_cuda.config import MAX_HEAD_DIM, PrismConfig
from prism_cuda.reference import CELL_TOKENS, estimation_width

_Result = TypeVar("_Result")


def running_sums(head_dim: int) -> int:
    """Partial sums that prism::pool_append_ keeps of an unfinished block, per dimension."""
    return 1024 // estimation_width(head_dim)


class _KeyMeans:
    """What the bands need of the keys: a mean per block."""

    def __init__(
        self,
        heads: tuple[int, int],
        head_dim: int,
        max_len: int,
        config: PrismConfig,
        device: torch.device | str,
    ) -> None:
        self._config = config
        blocks = -(-max_len // config.block_sizes[1])
        self.means = torch.empty((*heads, blocks, head_dim), dtype=torch.float32, device=device)
        self._sums = torch.empty(
            (*heads, running_sums(head_dim), head_dim), dtype=torch.float32, device=device
        )

    def append(self, k: torch.Tensor, start: int) -> None:
        torch.ops.prism.pool_append_(k, self.means, self._sums, start, self._config.block_sizes[1])

    def pool_queries(self, q: torch.Tensor) -> torch.Tensor:
        return torch.ops.prism.block_pool(q, self._config.block_sizes[0])

    def select(
        self, q: torch.Tensor, q_means: torch.Tensor, k_len: int, scale: float | None
    ) -> BlockMask:
        return selection.select_from_means(
            q_means,
            self.means[:, :, : -(-k_len // self._config.block_sizes[1])],
            q.shape[2],
            k_len,
            self._config.resolve_bands(q.shape[3]),
            self._config,
            causal=True,
        )


class _KeyCells:
    """What the grid needs of the keys: mean and spread of every 16."""

    def __init__(
        self,
        heads: tuple[int, int],
        head_dim: int,
        max_len: int,
        config: PrismConfig,
        device: torch.device | str,
    ) -> None:
        self._config = config
        cells = -(-max_len // CELL_TOKENS)
        width = 2 * estimation_width(head_dim)
        self._cells = torch.empty((*heads, cells, width), dtype=torch.half, device=device)
        self._factors = torch.empty((*heads, cells), dtype=torch.float32, device=device)
        self._unfinished: torch.Tensor | None = None  # the keys of the last cell, fewer than 16

    def append(self, k: torch.Tensor, start: int) -> None:
        if start % CELL_TOKENS and self._unfinished is not None:
            k = torch.cat([self._unfinished, k], 2)
            start -= start % CELL_TOKENS
        torch.ops.prism.pool_cells_(k, self._cells, self._factors, start)
        self._unfinished = k[:, :, k.shape[2] // CELL_TOKENS * CELL_TOKENS :].clone()

    def pool_queries(self, q: torch.Tensor) -> torch.Tensor:
        return q  # pooled with the selection

    def select(
        self, q: torch.Tensor, q_means: torch.Tensor, k_len: int, scale: float | None
    ) -> BlockMask:
        return selection.select_from_cells(
            q, self._cells, self._factors, k_len, self._config, scale
        )


class ChunkedPrefill:
    """What one attention layer keeps of its keys while its prompt grows chunk by chunk.

    Every key is pooled once, in the call that brings it; :func:`prism_cuda.prefill` would read the
    whole prefix again for every chunk. Chunks may have any sizes and start within a block.

    Attributes:
        length: tokens whose keys have been pooled.

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
        self._config = config or PrismConfig()
        if not functional.is_estimated(head_dim, self._config):
            largest = MAX_HEAD_DIM[self._config.estimator]
            raise ValueError(
                f"ChunkedPrefill: head_dim is {head_dim}; expected a multiple of 8 up to {largest}"
            )
        _ops.load()
        self._estimator = self._config.estimator_of(head_dim)
        self._shape = (batch, kv_heads, head_dim)
        self._max_len = max_len
        keys = _KeyMeans if self._estimator == "bands" else _KeyCells
        self._keys = keys((batch, kv_heads), head_dim, max_len, self._config, device)
        self.length = 0

    def reset(self) -> None:
        """Begin another prompt in the same memory."""
        self.length = 0

    def append(self, k: torch.Tensor) -> None:
        """Pool new keys (B, Hkv, tokens, D), those from position ``length`` on.

        Raises:
            ValueError: if they do not fit the shapes or max_len.
        """
        batch, kv_heads, head_dim = self._shape
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
        self._keys.append(k, self.length)
        self.length += k.shape[2]

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
    ) -> torch.Tensor | tuple[torch.Tensor, BlockMask | None]:
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
            return self._keys.pool_queries(q)

        functional.check_not_fp8("ChunkedPrefill", k)
        scores = functional.Scores(sinks, softcap, window_left)
        choice = functional.choose(q, k, v, self._config, scores)
        if choice.estimator is None:
            # Nothing is estimated: the means are for later chunks.
            self.append(k[:, :, self.length :])
            out, _, full = functional.run(q, k, v, choice, self._config, scale, True, scores)
            mask = full if choice.path == "prism" else None
            return (out, mask) if return_mask else out
        q_means = stage("pool", pool)
        q_len, k_len = q.shape[2], k.shape[2]
        mask = stage("select", lambda: self._keys.select(q, q_means, k_len, scale))
        out, _ = stage(
            "attend",
            lambda: functional.attend(q, k, v, mask, scale, scores),
        )
        if recorder is not None:
            kept = mask if recorder.masks else None
            recorder.calls.append(
                recording.CallRecord(
                    None,
                    "prism",
                    choice.reason,
                    q_len,
                    k_len,
                    mask.density(),
                    kept,
                    times,
                    self._estimator,
                )
            )
        return (out, mask) if return_mask else out
