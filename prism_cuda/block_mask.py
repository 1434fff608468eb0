"""BlockMask: which key blocks every query block attends to, packed as the kernels read it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prism_cuda import reference
from prism_cuda.bits import WORD_BITS, every_block, pack, unpack
from prism_cuda.config import BLOCK_SIZES

if TYPE_CHECKING:
    from torch.nn.attention import flex_attention


@dataclass(frozen=True, eq=False)
class BlockMask:
    """A block mask of one attention call.

    Block i of the queries (keys) covers rows [i * block_size, (i + 1) * block_size). With
    ``causal`` the mask is further restricted token by token: query row i sees keys up to
    i + (k_len - q_len).

    Attributes:
        bits: int32 (B, Hq, Nq, ceil(Nk / 32)); key block 32 * w + j is bit j of word w.
        counts: int32 (B, Hq, Nq), kept key blocks per query block.
        q_len, k_len: tokens.
        q_block_size, k_block_size: tokens per block.
        causal: whether attention under this mask is causal.

    Raises:
        ValueError: if shapes, dtypes or sizes do not fit each other.
    """

    bits: torch.Tensor
    counts: torch.Tensor
    q_len: int
    k_len: int
    q_block_size: int = 128
    k_block_size: int = 128
    causal: bool = True

    def __post_init__(self) -> None:
        _check_sizes(self.q_len, self.k_len, self.q_block_size, self.k_block_size)
        words = -(-self.k_blocks // WORD_BITS)
        for name, tensor, dims in (("bits", self.bits, 4), ("counts", self.counts, 3)):
            if tensor.dtype != torch.int32 or tensor.dim() != dims:
                raise ValueError(
                    f"BlockMask: {name} is {tensor.dtype} with shape {tuple(tensor.shape)}; "
                    f"expected torch.int32 with {dims} dimensions"
                )
        if self.bits.shape[2:] != (self.q_blocks, words):
            raise ValueError(
                f"BlockMask: bits has shape {tuple(self.bits.shape)}; expected "
                f"(batch, heads, {self.q_blocks}, {words}) for q_len {self.q_len}, "
                f"k_len {self.k_len} and blocks of ({self.q_block_size}, {self.k_block_size})"
            )
        if self.counts.shape != self.bits.shape[:3]:
            raise ValueError(
                f"BlockMask: counts has shape {tuple(self.counts.shape)}; expected "
                f"{tuple(self.bits.shape[:3])}, that of bits without its last dimension"
            )
        if self.counts.device != self.bits.device:
            raise ValueError(
                f"BlockMask: counts is on {self.counts.device}; expected {self.bits.device}, "
                "the device of bits"
            )

    def __repr__(self) -> str:
        batch, heads = self.bits.shape[:2]
        sizes = (self.q_block_size, self.k_block_size)
        return (
            f"BlockMask(batch={batch}, heads={heads}, q_len={self.q_len}, k_len={self.k_len}, "
            f"{self.q_blocks} x {self.k_blocks} blocks of {sizes}, "
            f"causal={self.causal}, device={self.bits.device})"
        )

    @classmethod
    def from_dense(
        cls,
        dense: torch.Tensor,
        q_len: int,
        k_len: int,
        *,
        q_block_size: int = 128,
        k_block_size: int = 128,
        causal: bool = True,
    ) -> BlockMask:
        """Pack a bool mask (B, Hq, Nq, Nk); with ``causal``, invisible blocks are dropped.

        Raises:
            ValueError: if dense is not bool or its shape does not fit the lengths.
        """
        _check_sizes(q_len, k_len, q_block_size, k_block_size)
        visible = reference.visible_blocks(
            q_len, k_len, causal, q_block_size, k_block_size, dense.device
        )
        if dense.dtype != torch.bool or dense.dim() != 4 or dense.shape[2:] != visible.shape:
            raise ValueError(
                f"BlockMask.from_dense: dense is {dense.dtype} with shape {tuple(dense.shape)}; "
                f"expected torch.bool (batch, heads, {visible.shape[0]}, {visible.shape[1]})"
            )
        kept = dense & visible
        counts = kept.sum(-1, dtype=torch.int32)
        return cls(pack(kept), counts, q_len, k_len, q_block_size, k_block_size, causal)

    @classmethod
    def full(
        cls,
        batch: int,
        q_heads: int,
        q_len: int,
        k_len: int,
        *,
        q_block_size: int = 128,
        k_block_size: int = 128,
        causal: bool = True,
        window_left: int | None = None,
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """The mask of dense attention: every visible block kept.

        Args:
            window_left: keep only blocks with a key that some row sees through a window of so many
                keys before its own. Attention under this mask needs the same ``window_left``.
        """
        _check_sizes(q_len, k_len, q_block_size, k_block_size)
        sizes = (q_block_size, k_block_size)
        words = -(-k_len // (k_block_size * WORD_BITS))
        bits, counts = every_block(
            q_len, k_len, -(-q_len // q_block_size), words, sizes, causal, window_left, device
        )
        bits = bits.expand(batch, q_heads, -1, -1).contiguous()
        counts = counts.expand(batch, q_heads, -1).contiguous()
        return cls(bits, counts, q_len, k_len, *sizes, causal)

    @property
    def q_blocks(self) -> int:
        """Number of query blocks, Nq."""
        return -(-self.q_len // self.q_block_size)

    @property
    def k_blocks(self) -> int:
        """Number of key blocks, Nk."""
        return -(-self.k_len // self.k_block_size)

    def visible(self) -> torch.Tensor:
        """Bool (Nq, Nk): the blocks that dense attention would compute."""
        return reference.visible_blocks(
            self.q_len,
            self.k_len,
            self.causal,
            self.q_block_size,
            self.k_block_size,
            self.bits.device,
        )

    def to_dense(self) -> torch.Tensor:
        """The mask as bool (B, Hq, Nq, Nk)."""
        return unpack(self.bits, self.k_blocks)

    def density_per_head(self) -> torch.Tensor:
        """Kept blocks over visible blocks of every head: float64 (B, Hq)."""
        return self.counts.sum(-1).double() / self.visible().sum().clamp_min(1)

    def density(self) -> float:
        """Kept blocks over visible blocks of all heads, in [0, 1]; waits for the device."""
        per_head = self.density_per_head()
        return float(per_head.mean()) if per_head.numel() else 0.0

    def to_flex(self) -> flex_attention.BlockMask:
        """A FlexAttention mask of the same effect: same blocks, same token-level causality."""
        from torch.nn.attention import flex_attention

        kept = self.to_dense()
        offset = self.k_len - self.q_len
        q_size, k_size, causal = self.q_block_size, self.k_block_size, self.causal

        def mask_mod(b, h, q_index, k_index):
            # Eager flex_attention applies only this function, so it has to know the blocks too.
            in_block = kept[b, h, q_index // q_size, k_index // k_size]
            return in_block & (k_index <= q_index + offset) if causal else in_block

        device = self.bits.device
        first_position = torch.arange(0, self.q_len, q_size, device=device)[:, None] + offset
        block_end = torch.arange(1, self.k_blocks + 1, device=device)[None, :] * k_size
        # FlexAttention skips mask_mod in full blocks: none may reach past the diagonal or the end.
        whole = block_end <= self.k_len
        if causal:
            whole = whole & (block_end - 1 <= first_position)
        partial_count, partial_index = _ordered_blocks(kept & ~whole)
        full_count, full_index = _ordered_blocks(kept & whole)
        return flex_attention.BlockMask.from_kv_blocks(
            partial_count,
            partial_index,
            full_count,
            full_index,
            BLOCK_SIZE=(q_size, k_size),
            mask_mod=mask_mod,
            seq_lengths=(self.q_len, self.k_len),
        )

    def plot(self, path: str | os.PathLike, batch: int = 0, title: str | None = None) -> None:
        """Write a picture of every head's mask: kept dark, dropped light, invisible white.

        Raises:
            ImportError: if matplotlib is missing (`pip install prism-cuda[plot]`).
        """
        try:
            from matplotlib.colors import ListedColormap
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "BlockMask.plot needs matplotlib: pip install 'prism-cuda[plot]'"
            ) from error

        kept = self.to_dense()[batch].cpu()
        shades = self.visible().cpu().int() + kept.int()
        density = self.density_per_head()[batch].tolist()
        columns = min(len(kept), 4)
        rows = -(-len(kept) // columns)
        figure = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flat
        colors = ListedColormap(["white", "#d7e3ee", "#15466e"])
        for head, axis in enumerate(axes):
            if head >= len(kept):
                axis.set_axis_off()
                continue
            axis.imshow(shades[head].numpy(), cmap=colors, vmin=0, vmax=2, interpolation="nearest")
            axis.set_title(f"head {head}: density {density[head]:.2f}", fontsize=9)
            axis.set_xlabel("key block", fontsize=8)
            axis.set_ylabel("query block", fontsize=8)
        if title is not None:
            figure.suptitle(title)
        figure.savefig(path, dpi=120)


def _check_sizes(q_len: int, k_len: int, q_block_size: int, k_block_size: int) -> None:
    if q_len < 0 or k_len < 0:
        raise ValueError(f"BlockMask: q_len, k_len are {q_len}, {k_len}; expected >= 0")
    if (q_block_size, k_block_size) not in BLOCK_SIZES:
        raise ValueError(
            f"BlockMask: (q_block_size, k_block_size) is {(q_block_size, k_block_size)}; "
            f"expected one of {BLOCK_SIZES}"
        )


def _ordered_blocks(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention's form of a bool mask: counts, and indices with the kept ones first."""
    order = kept.int().argsort(dim=-1, descending=True, stable=True)
    return kept.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()
