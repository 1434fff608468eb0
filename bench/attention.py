"""Times block-sparse attention kernels, and dense ones beside them, on the same inputs.

    python bench/attention.py
    python bench/attention.py --lengths 8192 32768 131072 --densities 0.1 0.25 0.5 \\
        --official PATH_TO_PRISM_CHECKOUT --json attention.json

TFLOP/s = 4 * head_dim * 128 * 128 * kept blocks / time; dense: 2 * head_dim * length^2 a head.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from masks import causal_density, pack, random_causal_mask
from record import print_table, write_json
from timing import MODES, measure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import prism_cuda  # noqa: F401  registers the ops

BLOCK = 128
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = ["L", "density", "kept_density", "impl", "dtype", "head_dim", "mode", "ms", "tflops",
           "error"]  # fmt: skip


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None  # bool, and below what each kernel reads instead
    bits: Tensor | None = None
    counts: Tensor | None = None
    flex: BlockMask | None = None


def dense(backend: SDPBackend) -> Callable[[Inputs], Tensor]:
    def call(x: Inputs) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                x.q, x.k, x.v, is_causal=True, enable_gqa=True
            )

    return call


def ours(x: Inputs) -> Tensor:
    return torch.ops.prism.sparse_attention(x.q, x.k, x.v, x.bits, x.counts)[0]


@cache
def compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def flex(x: Inputs) -> Tensor:
    return compiled_flex()(x.q, x.k, x.v, block_mask=x.flex, enable_gqa=True)


def flex_mask(mask: Tensor, length: int) -> BlockMask:
    """The diagonal blocks are partial, the others full."""

    def causal(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return q_index >= k_index

    def listed(which: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(which.to(torch.int8), dim=-1, descending=True, stable=True)
        return which.sum(-1, dtype=torch.int32), order.int()

    on_diagonal = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return BlockMask.from_kv_blocks(
        *listed(mask & on_diagonal), *listed(mask & ~on_diagonal), BLOCK_SIZE=BLOCK,
        mask_mod=causal, seq_lengths=(length, length), compute_q_blocks=False,
    )  # fmt: skip


def official(checkout: Path) -> Callable[[Inputs], Tensor]:
    """The Triton kernel of a checkout of xinghaow99/prism, loaded without its package."""
    path = checkout / "prism" / "kernels" / "block_sparse_attn.py"
    spec = importlib.util.spec_from_file_location("official_block_sparse_attn", path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"--official: no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda x: module.block_sparse_attention(
        x.q, x.k, x.v, x.mask, block_size=BLOCK, causal=True
    )


def check_agreement(call: Callable[[Inputs], Tensor], x: Inputs, want: Tensor) -> None:
    """A kernel that computes something else is not worth timing."""
    error = float((call(x).float() - want.float()).abs().max())
    if not error < 0.05:
        raise RuntimeError(f"differs from prism by {error}")


def draw(options: argparse.Namespace, length: int, seed: int) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(seed)
    dtype = DTYPES[options.dtype]

    def normal(heads: int) -> Tensor:
        shape = (1, heads, length, options.head_dim)
        return torch.randn(shape, device="cuda", dtype=dtype, generator=generator)

    return Inputs(normal(options.heads), normal(options.kv_heads), normal(options.kv_heads))


def time_kernel(
    call: Callable[[Inputs], Tensor], inputs: list[Inputs], mode: str, flops: float
) -> dict[str, Any]:
    try:
        ms = measure(call, inputs, mode)
    except RuntimeError as error:  # a kernel may not support a shape, or graph capture
        torch.cuda.synchronize()
        return {"ms": None, "tflops": None, "error": str(error).splitlines()[0][:80]}
    return {"ms": ms, "tflops": flops / ms / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.25])
    parser.add_argument("--impls", nargs="+", default=None,
                        choices=["prism", "fa2", "cudnn", "flex", "official"])  # fmt: skip
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128))
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--input-sets", type=int, default=2, help="inputs taken in turn")
    parser.add_argument("--official", type=Path, help="checkout of github.com/xinghaow99/prism")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()

    dense_calls = {
        "fa2": dense(SDPBackend.FLASH_ATTENTION),
        "cudnn": dense(SDPBackend.CUDNN_ATTENTION),
    }
    sparse_calls: dict[str, Callable[[Inputs], Tensor]] = {"prism": ours, "flex": flex}
    if options.official:
        sparse_calls["official"] = official(options.official)
    chosen = options.impls or [*sparse_calls, *dense_calls]
    if "official" in chosen and not options.official:
        parser.error("--impls official needs --official PATH")

    rows: list[dict[str, Any]] = []

    def add(length: int, impl: str, mode: str, result: dict[str, Any], **more: Any) -> None:
        rows.append(
            {"L": length, **more, "impl": impl, "dtype": options.dtype,
             "head_dim": options.head_dim, "mode": mode, **result}
        )  # fmt: skip
        print_table([rows[-1]], COLUMNS)

    for length in options.lengths:
        inputs = [draw(options, length, seed) for seed in range(options.input_sets)]
        dense_flops = 2.0 * options.head_dim * length**2 * options.heads
        for impl in [name for name in dense_calls if name in chosen]:
            for mode in options.modes:
                result = time_kernel(dense_calls[impl], inputs, mode, dense_flops)
                add(length, impl, mode, result, density=1.0, kept_density=1.0, mask="causal")
        for density in options.densities:
            blocks = math.ceil(length / BLOCK)
            mask = random_causal_mask(options.heads, blocks, density, "cuda")
            for x in inputs:
                x.mask = mask
                x.bits, x.counts = pack(mask)
                x.flex = flex_mask(mask, length) if "flex" in chosen else None
            kept = int(mask.sum())
            flops = 4.0 * options.head_dim * BLOCK * BLOCK * kept
            reference = ours(inputs[0])
            for impl in [name for name in sparse_calls if name in chosen]:
                check_agreement(sparse_calls[impl], inputs[0], reference)
                for mode in options.modes:
                    result = time_kernel(sparse_calls[impl], inputs, mode, flops)
                    add(length, impl, mode, result, density=density,
                        kept_density=causal_density(mask), mask="random+diagonal+sink")  # fmt: skip
    print()
    print_table(rows, COLUMNS)
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
