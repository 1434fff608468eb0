"""The attention kernels that the benchmarks compare, as functions of the same inputs.

prism       torch.ops.prism.sparse_attention: the Hopper kernel on a Hopper GPU
prism_sm80  the same op restricted to its portable kernel (PRISM_PORTABLE_ATTENTION=1)
fa2, cudnn  torch's dense attention
fa4         FlashAttention-4 on (batch, length, heads, head_dim) copies; block-sparse where the
            mask is not full: causal with the diagonal blocks as partial ones ("causal"), the
            same with a mask function ("mask_mod")
flex        FlexAttention with a BlockMask
official    the Triton kernel of github.com/xinghaow99/prism, its mask converted beforehand
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import site
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from masks import QUERY_BLOCK, block_lists, pack
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

DENSE = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
IMPLS = ("prism", "prism_sm80", "fa4", "cudnn", "fa2", "flex", "official")


@dataclass
class Inputs:
    q: Tensor  # (batch, heads, length, head_dim)
    k: Tensor
    v: Tensor
    bits: Tensor | None = None  # the mask, as each kernel reads it
    counts: Tensor | None = None
    flex: BlockMask | None = None
    length_first: tuple[Tensor, Tensor, Tensor] | None = None  # q, k, v as fa4 reads them


Call = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class BlockSparsity:
    """What is computed of the attention matrix."""

    mask: Tensor  # bool (1, heads, q_blocks, k_blocks)
    length: int
    k_block: int = 128
    causal: bool = True
    full: bool = False  # the mask keeps everything: dense kernels compute the same
    window: int | None = None  # keys before its own position that a row sees
    softcap: float | None = None


def dense(backend: SDPBackend, causal: bool = True) -> Call:
    def call(x: Inputs) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                x.q, x.k, x.v, is_causal=causal, enable_gqa=True
            )

    return call


def prism(sparsity: BlockSparsity) -> Call:
    bits, counts = pack(sparsity.mask)
    causal, k_block = sparsity.causal, sparsity.k_block
    options = {"softcap": sparsity.softcap, "window_left": sparsity.window}
    return lambda x: torch.ops.prism.sparse_attention(
        x.q, x.k, x.v, bits, counts, None, causal, QUERY_BLOCK, k_block, **options
    )[0]


def prism_sm80(sparsity: BlockSparsity) -> Call:
    call = prism(sparsity)

    def portable(x: Inputs) -> Tensor:
        os.environ["PRISM_PORTABLE_ATTENTION"] = "1"
        try:
            return call(x)
        finally:
            del os.environ["PRISM_PORTABLE_ATTENTION"]

    return portable


@cache
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(x: Inputs) -> Tensor:
    return compiled_flex()(x.q, x.k, x.v, block_mask=x.flex, enable_gqa=True)


def _causal(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
    return q_index >= k_index


def flex_mask(mask: Tensor, length: int) -> BlockMask:
    """Causal, in blocks of 128: the diagonal blocks are partial, the others full."""
    from torch.nn.attention.flex_attention import BlockMask

    on_diagonal = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return BlockMask.from_kv_blocks(
        *block_lists(mask & on_diagonal), *block_lists(mask & ~on_diagonal),
        BLOCK_SIZE=QUERY_BLOCK, mask_mod=_causal, seq_lengths=(length, length),
        compute_q_blocks=False,
    )  # fmt: skip


def flex_window(mask: Tensor, length: int, window: int) -> BlockMask:
    """The same of a full mask and a window: blocks at its edge are partial, too."""
    from torch.nn.attention.flex_attention import BlockMask

    def sees(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return (q_index >= k_index) & (q_index - k_index <= window)

    index = torch.arange(mask.shape[-1], device=mask.device)
    away = (index[:, None] - index)[None, None] * QUERY_BLOCK  # first row from first key
    seen = (away >= 0) & (away - (QUERY_BLOCK - 1) <= window)
    whole = (away > 0) & (away + (QUERY_BLOCK - 1) <= window)
    return BlockMask.from_kv_blocks(
        *block_lists(seen & ~whole), *block_lists(whole), BLOCK_SIZE=QUERY_BLOCK, mask_mod=sees,
        seq_lengths=(length, length), compute_q_blocks=False,
    )  # fmt: skip


def flex_sparse(sparsity: BlockSparsity) -> Call:
    _require(sparsity.causal and sparsity.k_block == 128, "causal masks in blocks of 128 only")
    _require(sparsity.softcap is None, "no soft cap")
    if sparsity.window is None:
        block_mask = flex_mask(sparsity.mask, sparsity.length)
    else:
        _require(sparsity.full, "windows of full masks only")
        block_mask = flex_window(sparsity.mask, sparsity.length, sparsity.window)
    return lambda x: compiled_flex()(x.q, x.k, x.v, block_mask=block_mask, enable_gqa=True)


@cache
def load_official(checkout: Path) -> Any:
    """The module of the Triton kernel, loaded without its package."""
    path = checkout / "prism" / "kernels" / "block_sparse_attn.py"
    spec = importlib.util.spec_from_file_location("official_block_sparse_attn", path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"--official: no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def official(sparsity: BlockSparsity, checkout: Path) -> Call:
    _require(sparsity.k_block == 128, "square blocks only")
    module, causal = load_official(checkout), sparsity.causal
    mask = sparsity.mask.int()
    return lambda x: module.block_sparse_attention(
        x.q, x.k, x.v, mask, block_size=QUERY_BLOCK, causal=causal
    )


@cache
def load_fa4(directory: Path | None) -> Any:
    """bench/fa4.py; with flash-attn-4 from `directory` (pip's --target) if one is given."""
    if directory is not None:
        if not directory.is_dir():
            raise FileNotFoundError(f"--fa4: no directory {directory}")
        site.addsitedir(str(directory))
    return importlib.import_module("fa4")


def fa4_is_installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


def fa4_calls(sparsity: BlockSparsity, directory: Path | None) -> dict[str, Call]:
    module = load_fa4(directory)
    if sparsity.full:
        return {"dense": module.dense(sparsity.causal, sparsity.window, sparsity.softcap)}
    _require(sparsity.window is None and sparsity.softcap is None, "only with full masks")
    _require(sparsity.k_block == 128, "blocks of 128 only")
    return module.sparse(sparsity.mask, sparsity.causal)


def build(
    impl: str, sparsity: BlockSparsity, *, checkout: Path | None, fa4_directory: Path | None
) -> dict[str, Call]:
    """The calls of an implementation by variant; "" where there is only one."""
    if impl in DENSE:
        plain = sparsity.window is None and sparsity.softcap is None
        _require(sparsity.full and plain, "dense kernels compute all-true masks only")
        return {"": dense(DENSE[impl], sparsity.causal)}
    if impl == "fa4":
        return fa4_calls(sparsity, fa4_directory)
    if impl == "official":
        _require(checkout is not None, "needs --official PATH")
        assert checkout is not None
        return {"": official(sparsity, checkout)}
    return {"": {"prism": prism, "prism_sm80": prism_sm80, "flex": flex_sparse}[impl](sparsity)}


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise NotImplementedError(what)
