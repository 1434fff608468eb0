"""The same public calls timed in two checkouts, in turns: is any kernel or call slower than before?

    python bench/compare_builds.py OLD NEW --out FILE      two checkouts, both built in place

Every call is timed as a CUDA-graph replay (kernels) and as host time of an eager call. The two
checkouts take turns as fresh processes, OLD NEW NEW OLD, so that both meet the same clocks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    import torch

    import prism_cuda
    from prism_cuda import PrismConfig

    def tensor(heads: int, length: int, head_dim: int = 128) -> torch.Tensor:
        return torch.randn(1, heads, length, head_dim, dtype=torch.bfloat16, device="cuda")

    for length in (8192, 32768, 131072):
        q, k, v = tensor(32, length), tensor(8, length), tensor(8, length)
        for estimator, blocks in (("grid", (128, 64)), ("bands", (128, 128))):
            config = PrismConfig(estimator=estimator, block_size=blocks, dense_below=0)
            yield (
                f"select_blocks {estimator} {length}",
                lambda q=q, k=k, config=config: prism_cuda.select_blocks(q, k, config=config),
            )
            if length < 131072:
                kept = PrismConfig(estimator=estimator, block_size=blocks, dense_below=0, top_p=0.1)
                yield (
                    f"prefill {estimator} {length} p 0.1",
                    lambda q=q, k=k, v=v, config=kept: prism_cuda.prefill(q, k, v, config=config),
                )
    for length, head_dim in ((8192, 128), (32768, 128), (8192, 64), (32768, 64), (8192, 256)):
        q, k, v = (tensor(heads, length, head_dim) for heads in (32, 8, 8))
        for density in (0.1, 0.5):
            rows, columns = length // 128, length // 64
            generator = torch.Generator("cuda").manual_seed(0)
            kept = torch.rand(1, 32, rows, columns, device="cuda", generator=generator) < density
            last = torch.arange(rows, device="cuda") * 2
            kept[:, :, torch.arange(rows, device="cuda"), last] = True
            kept[..., 0] = True
            mask = prism_cuda.BlockMask.from_dense(
                kept, length, length, q_block_size=128, k_block_size=64
            )
            yield (
                f"sparse_attention d{head_dim} {length} density {density}",
                lambda q=q, k=k, v=v, mask=mask: prism_cuda.sparse_attention(q, k, v, mask),
            )
    lengths = [700, 3000, 9000, 20000]
    starts = torch.tensor([0, 700, 3700, 12700, 32700], dtype=torch.int32, device="cuda")
    q, k, v = (tensor(heads, 32700)[0].transpose(0, 1) for heads in (32, 8, 8))
    for estimator in ("grid", "bands"):
        config = PrismConfig(estimator=estimator, block_size=(128, 64), top_p=0.2)
        yield (
            f"prefill_varlen {estimator}",
            lambda config=config: prism_cuda.prefill_varlen(
                q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=max(lengths),
                max_seqlen_k=max(lengths), config=config,
            ),
        )  # fmt: skip


def measure() -> dict[str, dict[str, float]]:
    import torch

    results = {}
    with torch.inference_mode():
        for name, call in calls():
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                call()
            host = (time.perf_counter() - start) / 20  # asynchronous unless the queue fills up
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            times = []
            for _ in range(30):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
                if sum(times) > 300 and len(times) >= 5:
                    break
            results[name] = {"graph_ms": median(times), "host_us": host * 1e6}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    order = [("old", arguments.old), ("new", arguments.new)]
    found: dict[str, list[dict]] = {"old": [], "new": []}
    for label, tree in (*order, *reversed(order)):
        environment = os.environ | {"PYTHONPATH": str(tree.resolve())}
        command = [sys.executable, str(Path(__file__).resolve()), "--measure"]
        text = subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout
        found[label].append(json.loads(text.splitlines()[-1]))
    import torch

    rows = []
    for name in found["old"][0]:
        row: dict[str, object] = {"call": name}
        for label in ("old", "new"):
            for key in ("graph_ms", "host_us"):
                row[f"{label}_{key}"] = min(run[name][key] for run in found[label])
        rows.append(row)
        ratio = row["new_graph_ms"] / row["old_graph_ms"]  # type: ignore[operator]
        print(
            f"{name:45s} {row['old_graph_ms']:9.4f} {row['new_graph_ms']:9.4f} ms  {ratio:.3f}   "
            f"host {row['old_host_us']:6.1f} {row['new_host_us']:6.1f} us"
        )
    origin = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    Path(arguments.out).write_text(json.dumps(origin | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--measure"]:
        print(json.dumps(measure()))
    else:
        main()
