"""Masks and outputs of every public call on fixed inputs, to compare two builds bit by bit.

    python tools/compare_outputs.py dump FILE        in either checkout
    python tools/compare_outputs.py compare OLD NEW

A change that should alter nothing has to give equal files; compare names every case that differs,
by how many bits of its mask and by how much in its output.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import prism_cuda
from prism_cuda import PrismConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Case = tuple[str, Callable[[], tuple[torch.Tensor, ...]]]


def inputs(
    q_len: int, k_len: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k, v with directions that persist over blocks, so that blocks differ."""
    generator = torch.Generator().manual_seed(q_len * 31 + k_len * 17 + head_dim)

    def tensor(count: int, length: int, strength: float) -> torch.Tensor:
        noise = torch.randn(1, count, length, head_dim, generator=generator)
        topic = torch.randn(1, count, -(-length // 80), head_dim, generator=generator)
        topics = topic.repeat_interleave(80, 2)[:, :, :length]
        return (noise + strength * topics).to(DEVICE, dtype)

    q_heads, kv_heads = heads
    return tensor(q_heads, q_len, 1.0), tensor(kv_heads, k_len, 1.0), tensor(kv_heads, k_len, 0.0)


def cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float16):
        for estimator in ("grid", "bands"):
            for head_dim in (64, 96, 128, 256):
                if estimator == "grid" and head_dim > 128:
                    continue
                for blocks in ((128, 128), (128, 64), (64, 64)):
                    yield from dense_cases(dtype, estimator, head_dim, blocks)
    yield from option_cases()
    yield from ragged_cases()
    yield from chunk_cases()


def dense_cases(
    dtype: torch.dtype, estimator: str, head_dim: int, blocks: tuple[int, int]
) -> Iterator[Case]:
    for q_len, k_len, heads in ((1000, 1000, (4, 2)), (4096, 4096, (3, 1)), (300, 5003, (4, 4))):
        for top_p in (0.5, 0.95, 1.0):
            name = f"prefill {dtype} {estimator} d{head_dim} {blocks} {q_len}x{k_len} p{top_p}"
            config = PrismConfig(estimator=estimator, block_size=blocks, top_p=top_p, dense_below=0)

            def run(
                q_len: int = q_len,
                k_len: int = k_len,
                heads: tuple[int, int] = heads,
                config: PrismConfig = config,
            ) -> tuple[torch.Tensor, ...]:
                q, k, v = inputs(q_len, k_len, heads, head_dim, dtype)
                out, lse, mask = prism_cuda.prefill(
                    q, k, v, config=config, return_lse=True, return_mask=True
                )
                return mask.bits, mask.counts, out, lse

            yield name, run


def option_cases() -> Iterator[Case]:
    q, k, v = inputs(1500, 2100, (4, 2), 128, torch.bfloat16)
    sinks = torch.linspace(-1, 1, 4, device=DEVICE)
    for estimator in ("grid", "bands"):
        for label, options in (
            ("sinks", {"sinks": sinks}),
            ("softcap", {"softcap": 20.0}),
            ("window", {"window_left": 700}),
            ("not causal", {"causal": False}),
            ("scale", {"scale": 0.3}),
        ):
            for label_config, extra in (
                ("", {}),
                (" heads", {"top_p": (0.3, 0.6, 0.6, 1.0)}),
                (" keep_above", {"keep_above": 0.01, "top_p": 0.5}),
                (" sink 2 recent 3", {"keep_sink": 2, "keep_recent": 3, "top_p": 0.2}),
            ):
                config = PrismConfig(estimator=estimator, dense_below=0, **extra)

                def run(
                    config: PrismConfig = config, options: dict = options
                ) -> tuple[torch.Tensor, ...]:
                    out, lse, mask = prism_cuda.prefill(
                        q, k, v, config=config, return_lse=True, return_mask=True, **options
                    )
                    return mask.bits, mask.counts, out, lse

                yield f"options {estimator} {label}{label_config}", run


def ragged_cases() -> Iterator[Case]:
    lengths_q, lengths_k = [1, 700, 0, 1300, 129], [400, 700, 33, 2600, 129]
    starts_q, starts_k = (
        torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
        for x in (lengths_q, lengths_k)
    )
    q, k, v = (
        x[0].transpose(0, 1)
        for x in inputs(sum(lengths_q), sum(lengths_k), (4, 2), 128, torch.bfloat16)
    )
    longest: dict[str, Any] = {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}
    page = 16
    pages = [-(-n // page) for n in lengths_k]
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    pools = [torch.zeros(sum(pages) + 1, page, 2, 128, dtype=q.dtype, device=DEVICE) for _ in "kv"]
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(1)).tolist()
    row = 0
    for b, length in enumerate(lengths_k):
        for i in range(pages[b]):
            table[b, i] = number = order.pop()
            here = slice(row + i * page, row + min((i + 1) * page, length))
            for pool, x in zip(pools, (k, v), strict=True):
                pool[number, : here.stop - here.start] = x[here]
        row += length
    paged = {
        "seqused_k": torch.tensor(lengths_k, dtype=torch.int32, device=DEVICE),
        "block_table": table.to(DEVICE),
    }
    fp8 = [pool.to(torch.float8_e4m3fn) for pool in pools]
    for estimator in ("grid", "bands"):
        for dense_below in (0, 600):
            config = PrismConfig(estimator=estimator, top_p=0.7, dense_below=dense_below)
            for label, tensors, where in (
                ("packed", (k, v), {"cu_seqlens_k": starts_k}),
                ("paged", tuple(pools), paged),
                ("fp8", tuple(fp8), paged),
            ):
                if label == "fp8" and estimator == "grid":
                    continue

                def run(
                    config: PrismConfig = config,
                    tensors: tuple = tensors,
                    where: dict = where,
                ) -> tuple[torch.Tensor, ...]:
                    k, v = tensors
                    out, lse, bits, counts = prism_cuda.prefill_varlen(
                        q, k, v, cu_seqlens_q=starts_q, config=config, return_lse=True,
                        return_mask=True, **where, **longest,
                    )  # fmt: skip
                    return bits, counts, out, lse

                yield f"ragged {label} {estimator} dense_below {dense_below}", run


def chunk_cases() -> Iterator[Case]:
    q, k, v = inputs(2304, 2304, (4, 2), 128, torch.bfloat16)
    for estimator in ("grid", "bands"):
        config = PrismConfig(estimator=estimator, top_p=0.7, dense_below=0)

        def run(config: PrismConfig = config) -> tuple[torch.Tensor, ...]:
            state = prism_cuda.ChunkedPrefill(1, 2, 128, 2304, config=config, device=DEVICE)
            outs = [
                state.prefill(q[:, :, end - 768 : end], k[:, :, :end], v[:, :, :end])
                for end in (768, 1536, 2304)
            ]
            return tuple(outs)

        yield f"chunks {estimator}", run


def dump(path: str) -> None:
    results = {}
    for name, run in cases():
        results[name] = [x.cpu() for x in run()]
    torch.save(results, path)
    print(f"{len(results)} cases written to {path}")


def compare(old_path: str, new_path: str) -> int:
    old, new = torch.load(old_path), torch.load(new_path)
    different = sorted(set(old) ^ set(new))
    for name in different:
        print(f"only in one file: {name}")
    equal = 0
    for name in (name for name in old if name in new):
        notes = []
        for i, (a, b) in enumerate(zip(old[name], new[name], strict=True)):
            if a.shape != b.shape:
                notes.append(f"tensor {i}: {tuple(a.shape)} and {tuple(b.shape)}")
            elif not torch.equal(a.nan_to_num(), b.nan_to_num()):
                if a.dtype == torch.int32:
                    notes.append(f"tensor {i}: {int((a != b).sum())} of {a.numel()} words")
                else:
                    gap = (a.double() - b.double()).nan_to_num().abs().max().item()
                    notes.append(f"tensor {i}: largest difference {gap:.3g}")
        if notes:
            different.append(name)
            print(f"{name}: {'; '.join(notes)}")
        else:
            equal += 1
    print(f"{equal} cases equal, {len(different)} different")
    return 1 if different else 0


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "dump":
        dump(sys.argv[2])
    elif len(sys.argv) == 4 and sys.argv[1] == "compare":
        sys.exit(compare(sys.argv[2], sys.argv[3]))
    else:
        sys.exit(__doc__)
