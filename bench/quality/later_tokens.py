"""How much a row's logits depend on tokens after it, which chose blocks together with it.

    python bench/quality/later_tokens.py --model FOLDER --text FILE --json OUT

Tokens from the middle of the last query block on are replaced by others. Rows before them see the
same keys; what changes is which blocks they keep: on the grid in their own query block alone, by
bands everywhere, since temperatures come from the whole call.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import package  # noqa: F401
import torch
import transformers

import prism_cuda
from prism_cuda import PrismConfig

LENGTH, CUT, BLOCK = 2048, 1984, 128


def divergence(of: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of every row, in nats."""
    return (of.exp() * (of - given)).sum(-1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a transformers folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text()[20000:60000]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :LENGTH]
    other = ids.clone()
    other[:, CUT:] = ids[:, CUT:].roll(17, 1).flip(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.eval()

    def rows(tokens: torch.Tensor, implementation: str) -> torch.Tensor:
        model.set_attn_implementation(implementation)
        return model(tokens).logits[0, :CUT].log_softmax(-1)

    dense = rows(ids, "sdpa")
    first = CUT // BLOCK * BLOCK
    results = {}
    for estimator in ("grid", "bands"):
        config = PrismConfig(estimator=estimator, dense_below=0)
        prism_cuda.register(config, f"prism-{estimator}")
        whole, changed = (rows(x, f"prism-{estimator}") for x in (ids, other))
        moved, cost = divergence(whole, changed), divergence(dense, whole)
        results[estimator] = {
            "own_block": {"mean": moved[first:].mean().item(), "max": moved[first:].max().item()},
            "blocks_before": {
                "mean": moved[:first].mean().item(),
                "max": moved[:first].max().item(),
            },
            "from_dense_own_block": cost[first:].mean().item(),
        }
    origin = {"model": Path(options.model).name, "text": options.text.name, "tokens": LENGTH}
    origin |= {"replaced_from": CUT, "torch": torch.__version__, "device": "cpu"}
    options.json.write_text(json.dumps(origin | {"nats": results}, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
