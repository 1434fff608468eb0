"""What share of K and V the ranks of a group would need if only kept blocks were moved.

    python bench/distributed_union.py CAPTURE.pt ... --json bench/results/cpu/distributed_union.json

A capture holds {"layers": {index: (q, k, ...)}}, (H, L, D) each, of a model's attention layers.
Blocks are selected for the whole sequence; of a rank's query blocks, and of the query heads that
share a key head, the union counts, since a block of K and V serves all of them. Shares are of the
blocks that some row of the rank sees ("seen") and of all blocks ("all"), means over layers and key
heads; "worst" is the rank that needs most of all blocks. Layouts: one stretch a rank (contiguous),
an early and a late one (zigzag), or whole sequences of a part of the heads (heads). "work" is the
busiest rank's kept blocks over the mean.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from record import print_table

import prism_cuda
from prism_cuda import distributed

RANKS = (2, 4, 8)


def kept_blocks(q: torch.Tensor, k: torch.Tensor, estimator: str, top_p: float) -> torch.Tensor:
    """Bool (Hkv, group, Nq, Nk)."""
    config = prism_cuda.PrismConfig(estimator=estimator, top_p=top_p)
    mask = prism_cuda.select_blocks(q[None].float(), k[None].float(), config=config)
    return mask.to_dense()[0].unflatten(0, (k.shape[0], -1))


def rows_of(layout: str, length: int, ranks: int) -> list[list[int]]:
    """The query blocks of every rank."""
    shards = getattr(distributed, layout)(length, ranks, 128).in_units(128)
    return [shards.positions(rank).tolist() for rank in range(ranks)]


def by_sequence(kept: torch.Tensor, seen: torch.Tensor, rows: list[list[int]]) -> dict[str, Any]:
    needed = torch.stack([kept[:, :, own].any(2).any(1) for own in rows])  # ranks, Hkv, Nk
    visible = torch.stack([seen[own].any(0) for own in rows])
    work = torch.tensor([kept[:, :, own].sum().item() for own in rows])
    of_all = needed.float().mean((1, 2))
    return {
        "seen": (needed.sum((1, 2)) / visible.sum(1) / kept.shape[0]).mean().item(),
        "all": of_all.mean().item(),
        "worst": of_all.max().item(),
        "work": (work.max() / work.float().mean()).item(),
    }


def by_heads(kept: torch.Tensor, ranks: int) -> dict[str, Any]:
    """Whole sequences, of query heads in equal runs: the key heads that a run reads."""
    kv_heads, group = kept.shape[:2]
    heads = kv_heads * group
    flat = kept.flatten(0, 1)
    shares, work, all_heads = [], [], []
    for rank in range(ranks):
        own = range(rank * heads // ranks, (rank + 1) * heads // ranks)
        of_kv = {h // group: [x for x in own if x // group == h // group] for h in own}
        union = torch.stack([flat[some].any(0).any(0) for some in of_kv.values()])
        shares.append(union.float().mean().item())
        all_heads.append(union.sum().item() / kept.shape[3] / kv_heads)
        work.append(flat[list(own)].sum().item())
    return {
        "seen": sum(shares) / ranks,
        "all": sum(all_heads) / ranks,
        "worst": max(all_heads),
        "work": max(work) * ranks / sum(work),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captures", nargs="+", help="files of a trusted origin: they are unpickled")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sums: dict[tuple, list[dict[str, Any]]] = {}
    for path in args.captures:
        layers = torch.load(path, weights_only=False, map_location="cpu")["layers"]
        for q, k, *_ in layers.values():
            length = q.shape[1] // 128 * 128
            for estimator in ("grid", "bands"):
                kept = kept_blocks(q[:, :length], k[:, :length], estimator, args.top_p)
                seen = torch.arange(length // 64) // 2 <= torch.arange(length // 128)[:, None]
                density = (kept.sum((2, 3)) / seen.sum()).mean().item()
                for ranks in RANKS:
                    found = {
                        layout: by_sequence(kept, seen, rows_of(layout, length, ranks))
                        for layout in ("contiguous", "zigzag")
                    }
                    found["heads"] = by_heads(kept, ranks)
                    for layout, row in found.items():
                        key = (Path(path).stem, length, estimator, layout, ranks)
                        sums.setdefault(key, []).append(row | {"density": density})
    rows = []
    for (name, length, estimator, layout, ranks), found in sums.items():
        row = {"capture": name, "tokens": length, "estimator": estimator, "layout": layout,
               "ranks": ranks}  # fmt: skip
        row |= {x: sum(own[x] for own in found) / len(found) for x in found[0]}
        rows.append(row)
    print_table(rows, list(rows[0]))
    if args.json:
        content = {"command": shlex.join(sys.argv), "top_p": args.top_p, "rows": rows}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
