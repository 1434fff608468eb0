"""Times the host's part of a call: what Python and the dispatcher take while the GPU waits.

    python bench/host.py --json host.json
    python bench/host.py --device cpu       # our own Python alone: the ops return at once

Small tensors, inference mode, calls queued one after the other without waiting for the device: a
batch of calls ends before the device has caught up, so that its time over the number of calls is
the host's. Every figure is the least of --rounds batches, in microseconds a call. "python" is the
same with the op left out (its place taken by a function that returns), which is all that is timed
on the CPU, where the op would be the reference. The plugin's figure is for one attention call of a
layer as transformers makes it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from record import print_table, write_json
from torch import Tensor

import prism_cuda
from prism_cuda import ops

HEADS, KV_HEADS, HEAD_DIM, LENGTH = 8, 2, 64, 256
CONFIG = prism_cuda.PrismConfig(dense_below=0)
Call = Callable[[], object]
Row = dict[str, Any]


def host_us(call: Call, device: str, calls: int, rounds: int) -> float:
    """The least mean of ``rounds`` batches of calls."""
    for _ in range(20):
        call()
    best = float("inf")
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - start)
    _wait(device)
    return 1e6 * best / calls


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def without_ops(result: tuple[Tensor, ...]) -> Iterator[None]:
    """Within it a call of any op gives ``result`` at once."""
    call = ops.call
    ops.call = lambda op, *arguments, **keywords: result[: len(op._schema.returns)]
    try:
        yield
    finally:
        ops.call = call


def plugin_call(q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    """The attention function that transformers calls, with a module that says as much as it asks.

    None without transformers.
    """
    try:
        from transformers import AttentionInterface
    except ImportError:
        return None
    prism_cuda.register(CONFIG, "prism-host")
    attend = AttentionInterface()["prism-host"]
    module = torch.nn.Module()
    module.__dict__.update(layer_idx=0, is_causal=True)
    return lambda: attend(module, q, k, v, None, scaling=0.125)


def calls_of(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    _, mask = prism_cuda.prefill(q, k, v, config=CONFIG, return_mask=True)
    bands = prism_cuda.PrismConfig(dense_below=0, estimator="bands")
    ends = torch.tensor([0, LENGTH], dtype=torch.int32, device=q.device)
    packed = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    where: dict[str, Any] = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    calls: dict[str, Call] = {
        "prefill": lambda: prism_cuda.prefill(q, k, v, config=CONFIG),
        "prefill, bands": lambda: prism_cuda.prefill(q, k, v, config=bands),
        "prefill, no config (dense)": lambda: prism_cuda.prefill(q, k, v),
        "prefill_varlen": lambda: prism_cuda.prefill_varlen(
            *packed, **where, max_seqlen_q=LENGTH, max_seqlen_k=LENGTH, config=CONFIG
        ),
        "sparse_attention": lambda: prism_cuda.sparse_attention(q, k, v, mask),
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ),
    }
    layer = plugin_call(q, k, v)
    return calls | ({"plugin, a layer": layer} if layer is not None else {})


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calls", type=int, default=200, help="of a batch, queued without waiting")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    q, k, v = (
        torch.randn(1, heads, LENGTH, HEAD_DIM, dtype=torch.bfloat16, device=options.device)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    rows: list[Row] = []
    for name, call in calls_of(q, k, v).items():
        row: Row = {"call": name}
        if on_gpu:
            row["us"] = host_us(call, "cuda", options.calls, options.rounds)
        if name != "sdpa" and "dense" not in name:
            with without_ops((q, q, q, q)):
                row["python_us"] = host_us(call, options.device, options.calls, options.rounds)
        rows.append(row)
    print_table(rows, ["call", "us", "python_us"])
    if options.json and on_gpu:
        write_json(options.json, rows)
    elif options.json:  # nothing to say of a GPU
        Path(options.json).write_text(json.dumps({"device": "cpu", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
