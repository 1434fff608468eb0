"""Times serving shapes: packed, paged and ragged attention, ragged prefill, prefill in chunks.

    python bench/serving.py --json serving.json
    python bench/serving.py --lengths 32768 --page-sizes 16 128
    python bench/serving.py --only ragged-prefill

First one sequence a length, whose tokens lie contiguous, packed or in shuffled pages;
`vs_contiguous` is the share of the contiguous call's speed. Then a batch of the lengths in MIX,
ragged and padded to the longest. Outputs are compared with the contiguous ones before anything is
timed: where the same kernel computes them the same way they have to be equal bit by bit, else
within 0.04; an fp8 pool is compared with a bfloat16 pool of the same values. Figures are CUDA-graph
replays of all layouts in turn (timing.py).

Then whole prefill of that batch, estimation included, structured inputs, top-p 0.95: prefill of one
sequence after the other, prefill of the batch padded to the longest, and prefill_varlen, in eager
calls, whose host overhead counts, and in a CUDA graph; `vs_contiguous` is against one after the
other, eager, and prefill_varlen's output is compared with that.

Last a prompt prefilled in chunks by ChunkedPrefill, estimation included, in eager calls;
`relative_change` is how far its output is from that of one call (norm of the difference over the
norm).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from masks import pack, random_mask, structured_qkv
from record import print_table, write_json
from timing import capture, measure_alternating
from torch import Tensor

import prism_cuda

DEVICE = "cuda"
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
MIX = (16384, 9000, 5000, 2500, 1200, 700, 300, 131, 64, 1)
PAGE_SIZES = (256, 128, 64, 32, 16, 8, 1)
PARTS = ("attention", "ragged-prefill", "chunks")
FP8_PAGE = 64  # tokens of a page of the fp8 pool
Result = tuple[Tensor, Tensor]
Row = dict[str, Any]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Result,
    length: int,
    size: int,
    scales: dict[str, Tensor] | None = None,
) -> Callable[[], Result]:
    """The same tokens in shuffled pages."""
    pages = -(-length // size)
    order = torch.randperm(pages, device=DEVICE)
    table = torch.empty_like(order)
    table[order] = torch.arange(pages, device=DEVICE)  # page `table[i]` of the pool holds page i

    def pool(x: Tensor) -> Tensor:
        padded = x.new_zeros((pages * size, *x.shape[1:]))
        padded[:length] = x
        return padded.unflatten(0, (pages, size))[order].contiguous()

    keys, values = pool(k), pool(v)
    used = torch.tensor([length], device=DEVICE, dtype=torch.int32)
    numbers = table.int()[None]
    cu_seqlens = ends([length])
    return lambda: prism_cuda.sparse_attention_varlen(
        q, keys, values, *mask, cu_seqlens_q=cu_seqlens, seqused_k=used, block_table=numbers,
        max_seqlen_q=length, max_seqlen_k=length, return_lse=True, **(scales or {}),
    )  # fmt: skip


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8 e4m3 of (L, H, D), and its scale (H,): powers of two, so that bfloat16 holds the
    products exactly."""
    scale = (x.abs().amax((0, 2)).float() / 448).log2().ceil().exp2()
    return (x / scale[:, None]).to(torch.float8_e4m3fn), scale


def packed(
    q: Tensor, k: Tensor, v: Tensor, mask: Result, lengths: Sequence[int]
) -> Callable[[], Result]:
    cu_seqlens, longest = ends(lengths), max(lengths)
    return lambda: prism_cuda.sparse_attention_varlen(
        q, k, v, *mask, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest, max_seqlen_k=longest, return_lse=True,
    )  # fmt: skip


def contiguous(q: Tensor, k: Tensor, v: Tensor, mask: Result) -> Callable[[], Result]:
    return lambda: torch.ops.prism.sparse_attention(q, k, v, *mask, k_block_size=128)


def check(name: str, got: Result, want: Result, exactly: bool) -> None:
    for a, b in zip(got, want, strict=True):
        error = (a.float() - b.float()).abs().max().item()
        if error > (0.0 if exactly else 0.04):
            raise SystemExit(f"{name}: off by {error}")


def time_jobs(jobs: dict[str, Callable[[], object]], budget_ms: float) -> dict[str, float]:
    replays = [capture(lambda _, job=job: job(), [None]) for job in jobs.values()]
    times = measure_alternating(replays, budget_ms=budget_ms)
    return {name: median(of_job) for name, of_job in zip(jobs, times, strict=True)}


def one_sequence(length: int, density: float, options: argparse.Namespace) -> list[Row]:
    mask = pack(random_mask(HEADS, length, density, device=DEVICE))
    q, k, v = (draw(length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    batch = [x.transpose(0, 1)[None] for x in (q, k, v)]
    jobs: dict[str, Callable[[], Any]] = {
        "contiguous": contiguous(*batch, mask),
        "packed": packed(q, k, v, mask, [length]),
    }
    for size in options.page_sizes:
        jobs[f"pages of {size}"] = paged(q, k, v, mask, length, size)
    out, lse = jobs["contiguous"]()
    want = (out[0].transpose(0, 1), lse[0])
    for name, job in jobs.items():
        if name != "contiguous":
            check(name, job(), want, exactly=not name.endswith(("of 1", "of 2", "of 4")))
    if FP8_PAGE in options.page_sizes:
        (k8, k_scale), (v8, v_scale) = quantize(k), quantize(v)
        exact = [(x.float() * s[:, None]).bfloat16() for x, s in ((k8, k_scale), (v8, v_scale))]
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        job = paged(q, k8, v8, mask, length, FP8_PAGE, scales)
        check("fp8", job(), paged(q, *exact, mask, length, FP8_PAGE)(), exactly=False)
        jobs[f"fp8, pages of {FP8_PAGE}"] = job
    times = time_jobs(jobs, options.budget_ms)
    return [
        {"L": length, "density": density, "layout": name, "ms": ms,
         "vs_contiguous": times["contiguous"] / ms}
        for name, ms in times.items()
    ]  # fmt: skip


def mixed(density: float, options: argparse.Namespace) -> list[Row]:
    longest, total = max(MIX), sum(MIX)
    mask = pack(random_mask(HEADS, longest, density, device=DEVICE).expand(len(MIX), -1, -1, -1))
    q, k, v = (draw(total, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def pad(x: Tensor) -> Tensor:
        """Sequences at the front: causal rows do not see the padding behind them."""
        parts = torch.nn.utils.rnn.pad_sequence(x.split(MIX), batch_first=True)
        return parts.transpose(1, 2)

    jobs: dict[str, Callable[[], Any]] = {
        "padded": contiguous(pad(q), pad(k), pad(v), mask),
        "ragged": packed(q, k, v, mask, MIX),
    }
    out, lse = jobs["padded"]()
    want = (
        torch.cat([x[:, :n].transpose(0, 1) for x, n in zip(out, MIX, strict=True)]),
        torch.cat([x[:, :n] for x, n in zip(lse, MIX, strict=True)], dim=1),
    )
    check("ragged", jobs["ragged"](), want, exactly=False)
    times = time_jobs(jobs, options.budget_ms)
    return [
        {"L": f"{len(MIX)} of 1 to {longest}", "density": density, "layout": name, "ms": ms,
         "vs_contiguous": times["padded"] / ms}
        for name, ms in times.items()
    ]  # fmt: skip


def ragged_prefill(options: argparse.Namespace) -> list[Row]:
    """Whole prefill of a mixed batch: by sequence, padded, and ragged; eager and captured."""
    longest = max(MIX)
    sequences = [
        structured_qkv(HEADS, KV_HEADS, length, HEAD_DIM, torch.bfloat16, DEVICE, seed)
        for seed, length in enumerate(MIX)
    ]
    q, k, v = (
        torch.cat([x[0].transpose(0, 1) for x in column]) for column in zip(*sequences, strict=True)
    )
    batch = [
        torch.nn.utils.rnn.pad_sequence(x.split(MIX), batch_first=True).transpose(1, 2)
        for x in (q, k, v)
    ]
    cu_seqlens = ends(MIX)
    jobs: dict[str, Callable[[], Any]] = {
        "one by one": lambda: [prism_cuda.prefill(*sequence) for sequence in sequences],
        "padded": lambda: prism_cuda.prefill(*batch),
        "prefill_varlen": lambda: prism_cuda.prefill_varlen(
            q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest,
            max_seqlen_k=longest,
        ),
    }  # fmt: skip
    want = torch.cat([out[0].transpose(0, 1) for out in jobs["one by one"]()])
    error = (jobs["prefill_varlen"]().float() - want.float()).norm() / want.float().norm()
    if error > 0.01:
        raise SystemExit(f"prefill_varlen: off by {error} of the norm")
    jobs["padded"]()
    replays = {
        f"{name}, graph": capture(lambda _, job=job: job(), [None]) for name, job in jobs.items()
    }
    both = jobs | replays
    times = measure_alternating(list(both.values()), budget_ms=options.budget_ms)
    medians = {name: median(of_job) for name, of_job in zip(both, times, strict=True)}
    return [
        {"L": f"{len(MIX)} of 1 to {longest}", "density": "top-p 0.95", "layout": name, "ms": ms,
         "vs_contiguous": medians["one by one"] / ms}
        for name, ms in medians.items()
    ]  # fmt: skip


def chunked(length: int, options: argparse.Namespace) -> list[Row]:
    """Whole prefill, estimation included, by chunks with pooled keys kept, and in one call."""
    q, k, v = structured_qkv(HEADS, KV_HEADS, length, HEAD_DIM, torch.bfloat16, DEVICE)
    state = prism_cuda.ChunkedPrefill(1, KV_HEADS, HEAD_DIM, length)
    want = prism_cuda.prefill(q, k, v)
    rows: list[Row] = []
    for chunk in (length, *options.chunks):
        outputs: list[Tensor] = []

        def by_chunks(chunk: int = chunk, outputs: list[Tensor] = outputs) -> None:
            state.reset()
            outputs.clear()
            for start in range(0, length, chunk):
                end = min(start + chunk, length)
                outputs.append(state.prefill(q[:, :, start:end], k[:, :, :end], v[:, :, :end]))

        by_chunks()
        got = torch.cat(outputs, dim=2).float()
        error = (got - want.float()).norm() / want.float().norm()
        (times,) = measure_alternating([by_chunks], rounds=3, budget_ms=options.budget_ms)
        rows.append(
            {"L": length, "density": "top-p 0.95", "layout": f"chunks of {chunk}",
             "ms": median(times), "relative_change": float(error)}
        )  # fmt: skip
    for row in rows:
        row["vs_contiguous"] = rows[0]["ms"] / row["ms"]
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.25])
    parser.add_argument("--page-sizes", type=int, nargs="*", default=list(PAGE_SIZES))
    parser.add_argument("--chunks", type=int, nargs="*", default=[2048, 8192, 32768])
    parser.add_argument("--chunked-length", type=int, default=131072)
    parser.add_argument("--only", choices=PARTS, help="one part of the benchmark")
    parser.add_argument("--budget-ms", type=float, default=60.0, help="GPU time of one layout")
    parser.add_argument("--json", help="file to write")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    options = parse()
    rows: list[Row] = []
    parts = PARTS if options.only is None else (options.only,)
    for density in options.densities if "attention" in parts else []:
        for length in options.lengths:
            rows += one_sequence(length, density, options)
        rows += mixed(density, options)
    if "ragged-prefill" in parts:
        rows += ragged_prefill(options)
    if "chunks" in parts and options.chunks:
        rows += chunked(options.chunked_length, options)
    print_table(rows, ["L", "density", "layout", "ms", "vs_contiguous", "relative_change"])
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
