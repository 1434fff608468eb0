"""Save a model's queries and keys, rotated, as bench/distributed_union.py reads them.

    python bench/quality/real/capture_layers.py MODEL TEXT CAPTURE.pt --tokens 8192 --every 1

MODEL is a folder that transformers loads, TEXT a file. With --every N only every Nth attention
layer is kept; --until M stops the model behind layer M - 1, where a long text would take too long.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModel, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--until", type=int)
    args = parser.parse_args()

    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attention(module: Any, q: torch.Tensor, k: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if module.layer_idx % args.every == 0:
            layers[module.layer_idx] = (q[0].clone(), k[0].clone())
            print(f"layer {module.layer_idx}, {time.perf_counter() - start:.0f} s", flush=True)
        return sdpa_attention_forward(module, q, k, *rest, **options)

    AttentionInterface.register("sdpa", attention)
    ids = AutoTokenizer.from_pretrained(args.model)(args.text.read_text()).input_ids
    if len(ids) < args.tokens:
        parser.error(f"{args.text} has {len(ids)} tokens, fewer than {args.tokens}")
    model = AutoModel.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    if args.until:
        del model.layers[args.until :]
        model.config.num_hidden_layers = args.until
    start = time.perf_counter()
    with torch.inference_mode():
        model(torch.tensor([ids[: args.tokens]]), use_cache=False)
    torch.save({"layers": layers}, args.out)


if __name__ == "__main__":
    main()
