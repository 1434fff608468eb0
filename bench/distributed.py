"""Context parallel prefill on several ranks: the same as one process, and how long it takes.

    torchrun --nproc-per-node 2 bench/distributed.py --json distributed.json     # a GPU each, NCCL
    torchrun --nproc-per-node 2 bench/distributed.py --backend gloo --one-card --lengths 8192 32768
    torchrun --nproc-per-node 2 bench/distributed.py --backend gloo --device cpu --lengths 1024 \
      --heads 4 --kv-heads 2 --head-dim 64
    python bench/distributed.py --plan                       # what the cost model expects, no run

Structured inputs, default settings but for the estimator. Every rank makes the whole sequence and
its result in one process, then takes part with its own tokens. "masks" says whether all bits are
equal, "error" is the largest difference of outputs. Milliseconds, medians of the slowest rank's:
"alone" one process, "parallel" the call on all ranks without the agreement, "agree" with it,
"in_turn" without overlap (keys first, then attention), "keys" the transfer of keys and values by
itself, of "kv_mb" megabytes into a rank. "gain" is alone / parallel. Two ranks on one card share
its multiprocessors and move keys through the host: their times say nothing about two cards.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from masks import structured_qkv
from record import print_table

import prism_cuda
from prism_cuda import PrismConfig, distributed
from prism_cuda.distributed import Exchange, context_parallel_prefill
from prism_cuda.distributed.cost import Machine, Work, expect
from prism_cuda.distributed.prefill import _Arriving

Row = dict[str, Any]
# Attention and estimation at 128K of the structured inputs on an H200, docs/performance.md; what
# NCCL's collectives bring to a rank over NVLink (of 450 GB/s), and over one 400 Gb/s NIC a GPU.
FLOPS = 6.2e14
LINKS = {"NVLink": 3.5e11, "InfiniBand": 4e10}


def plan(args: argparse.Namespace) -> list[Row]:
    rows = []
    for ranks, link in ((8, "NVLink"), (8, "InfiniBand"), (64, "InfiniBand"), (64, "NVLink")):
        for length in (1 << 17, 1 << 18, 1 << 20, 1 << 22):
            work = Work(args.heads, args.kv_heads, args.head_dim)
            machine = Machine(FLOPS, LINKS[link])
            alone = expect(distributed.zigzag(length, 1), work, machine)
            for layout in ("contiguous", "zigzag"):
                shards = getattr(distributed, layout)(length, ranks)
                cost = expect(shards, work, machine)
                rows.append(
                    {
                        "gpus": ranks,
                        "link": link,
                        "tokens": length,
                        "layout": layout,
                        "alone_ms": 1e3 * alone.seconds,
                        "compute_ms": 1e3 * cost.compute,
                        "transfer_ms": 1e3 * cost.transfer,
                        "exposed_ms": 1e3 * cost.exposed,
                        "gain": alone.seconds / cost.seconds,
                        "balance": cost.balance,
                        "memory_gb": cost.memory / 1e9,
                    }
                )
    return rows


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        options = None
        if args.backend == "nccl":
            # Collectives have to get multiprocessors while attention holds them all.
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        timeout = timedelta(seconds=args.timeout)
        self.device = torch.device("cpu")
        if args.device == "cuda":
            local = 0 if args.one_card else int(os.environ["LOCAL_RANK"])
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        dist.init_process_group(args.backend, timeout=timeout, pg_options=options)
        self.exchange = Exchange()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def ms(self, call: Callable[[], object], together: bool = True) -> float:
        """The median of the slowest rank's times; of this rank's own if not ``together``."""
        times = []
        for i in range(self.args.repeat + 1):
            self.wait()
            if together:
                dist.barrier()
            start = time.perf_counter()
            call()
            self.wait()
            if i:  # the first one warms up
                times.append(1e3 * (time.perf_counter() - start))
        if not together:
            return statistics.median(times)
        slowest = [max(of_ranks) for of_ranks in zip(*self.exchange.objects(times), strict=True)]
        return statistics.median(slowest)

    def in_turns(self, call: Callable[[], float]) -> float:
        """call() on one rank after the other; rank 0's result. They may share a card."""
        result = 0.0
        for rank in range(self.exchange.ranks):
            if rank == self.exchange.rank:
                result = call()
            dist.barrier()
        return self.exchange.objects(result)[0]

    def run(self, length: int, estimator: str, layout: str) -> Row:
        args, exchange = self.args, self.exchange
        dtype = getattr(torch, args.dtype)
        q, k, v = structured_qkv(
            args.heads, args.kv_heads, length, args.head_dim, dtype, str(self.device)
        )
        config = PrismConfig(estimator=estimator)
        shards = getattr(distributed, layout)(length, exchange.ranks)
        own = [shards.take(x, exchange.rank) for x in (q, k, v)]
        expected, mask = prism_cuda.prefill(q, k, v, config=config, return_mask=True)
        # Ranks that share a card take turns with what one process does.
        alone = self.in_turns(
            lambda: self.ms(lambda: prism_cuda.prefill(q, k, v, config=config), together=False)
        )
        visible = self.visible_blocks(length, config)
        density = float(mask.counts.sum(dtype=torch.int64)) / visible / mask.counts[..., 0].numel()

        def call(**keywords: Any) -> Any:
            return context_parallel_prefill(
                *own, exchange, config=config, shards=shards, **keywords
            )

        out, masks = call(return_mask=True)
        error = (out.float() - shards.take(expected, exchange.rank).float()).abs().amax().item()
        block = config.block_sizes[0]
        equal = True
        for stretch, found in zip(shards.of(exchange.rank), masks, strict=True):
            rows = slice(stretch.start // block, -(-stretch.end // block))
            words = found.bits.shape[-1]
            equal &= torch.equal(found.bits, mask.bits[:, :, rows, :words])
            equal &= torch.equal(found.counts, mask.counts[:, :, rows])
            equal &= not mask.bits[:, :, rows, words:].any()
        del expected, mask, masks, out

        def keys() -> None:
            arriving = _Arriving(exchange, shards, own[1], own[2])
            arriving.wait_until(length)

        exchange.traffic = distributed.Traffic()
        call(check=False)
        received = exchange.traffic.received.get("kv", 0)
        return {
            "tokens": length,
            "estimator": estimator,
            "layout": layout,
            "density": density,
            "masks": all(exchange.objects(bool(equal))),
            "error": max(exchange.objects(error)),
            "alone": alone,
            "parallel": (parallel := self.ms(lambda: call(check=False, steps=args.steps))),
            "agree": self.ms(call),
            "in_turn": self.ms(lambda: (keys(), call(check=False, steps=1))),
            "keys": self.ms(keys),
            "kv_mb": received / 1e6,
            "gain": alone / parallel,
        }

    @staticmethod
    def visible_blocks(length: int, config: PrismConfig) -> int:
        q_block, k_block = config.block_sizes
        ends = range(q_block, length + q_block, q_block)
        return sum(-(-min(end, length) // k_block) for end in ends)


def origin(exchange: Exchange, args: argparse.Namespace) -> Row:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "ranks": exchange.ranks,
        "backend": args.backend,
        "one_card": args.one_card,
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "build": json.loads(torch.ops.prism.build_config()),
        "command": shlex.join(sys.argv),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--one-card", action="store_true", help="all ranks on the first GPU")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--estimators", nargs="+", default=["grid", "bands"])
    parser.add_argument("--layouts", nargs="+", default=["contiguous", "zigzag"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--timeout", type=float, default=120, help="seconds, of the group")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.plan:
        rows, about = plan(args), {"command": shlex.join(sys.argv), "flops": FLOPS, "links": LINKS}
        print_table(rows, list(rows[0]))
    else:
        bench = Bench(args)
        about, rows = origin(bench.exchange, args), []
        for length in args.lengths:
            for estimator in args.estimators:
                for layout in args.layouts:
                    rows.append(bench.run(length, estimator, layout))
                    if bench.exchange.rank == 0:
                        print_table(rows[-1:], list(rows[-1]))
        first = bench.exchange.rank == 0
        dist.destroy_process_group()
        if not first:
            return
    if args.json:
        Path(args.json).write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
        print(f"wrote {args.json}")
    if not args.plan and not all(row["masks"] for row in rows):
        sys.exit("masks differ from one process")


if __name__ == "__main__":
    main()
