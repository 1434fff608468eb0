"""Batch: where the sequences of a ragged batch lie, packed or in pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """The arguments of the ops that make a call ragged; see :func:`prism_cuda.prefill_varlen`."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor | None
    seqused_k: torch.Tensor | None
    block_table: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int

    def keywords(self) -> dict[str, object]:
        """The same as the ops take them."""
        return {
            "cu_seqlens_q": self.cu_seqlens_q,
            "cu_seqlens_k": self.cu_seqlens_k,
            "seqused_k": self.seqused_k,
            "block_table": self.block_table,
            "max_seqlen_q": self.max_seqlen_q,
            "max_seqlen_k": self.max_seqlen_k,
        }

    def device_lengths(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of every sequence, int (B,) on the device, within the bounds."""
        q_lens = self.cu_seqlens_q.diff()
        if self.cu_seqlens_k is None:
            assert self.seqused_k is not None  # an op has refused anything else
            k_lens = self.seqused_k
        else:
            k_lens = self.cu_seqlens_k.diff()
            if self.seqused_k is not None:
                k_lens = torch.minimum(k_lens, self.seqused_k)
        return q_lens.clamp_max(self.max_seqlen_q), k_lens.clamp_max(self.max_seqlen_k)

    def lengths(self) -> tuple[list[int], list[int]]:
        """The same on the host, which waits for the device."""
        q_lens, k_lens = self.device_lengths()
        return q_lens.tolist(), k_lens.tolist()
