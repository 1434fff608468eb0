"""context_parallel: a tiny model over two ranks against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.ranks import Ranks

import prism_cuda
from prism_cuda import PrismConfig
from prism_cuda.distributed import context_parallel

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("needs_library")

LENGTH = 320
CONFIGS = {
    "grid": PrismConfig(block_size=64, estimator="grid", top_p=0.7, dense_below=0),
    "bands": PrismConfig(
        block_size=64, estimator="bands", top_p=0.8, dense_below=0, dense_layers=1
    ),
}


def model_of(name: str) -> Any:
    from helpers.models import TINY, Model

    torch.manual_seed(1)
    changes = {"sliding_window": 100} if name == "MistralConfig" else {}
    return Model(name, changes, base=TINY | {"num_hidden_layers": 2}).build()


def prompt() -> torch.Tensor:
    return torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def on_rank(group: Any, name: str, config: PrismConfig) -> torch.Tensor:
    model = model_of(name)
    with context_parallel(model, group, config=config) as context:
        own = context.split(prompt())
        logits = context.join(model(**own, use_cache=False).logits)
    assert model.config._attn_implementation == "eager"
    assert context.exchange.traffic.received["kv"] > 0
    return logits


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig"])
def test_a_model_over_two_ranks(ranks: Ranks, name: str, config: str) -> None:
    logits = ranks.run(2, on_rank, name, CONFIGS[config])
    model = model_of(name)
    prism_cuda.register(CONFIGS[config], "prism_alone")
    model.set_attn_implementation("prism_alone")
    with torch.inference_mode():
        expected = model(prompt(), use_cache=False).logits
    for own in logits:
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


def refusals(group: Any) -> list[str]:
    import torch.distributed as dist

    rank = dist.get_rank(group)
    model = model_of("LlamaConfig")
    found = []

    def refused(call: Any) -> None:
        try:
            call()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            found.append(str(error))
        else:
            found.append("nothing")

    with context_parallel(model, group, config=CONFIGS["grid"]) as context:
        refused(lambda: model(prompt()))
        refused(lambda: context.split(prompt()[:, : LENGTH - rank]))
        own = context.split(prompt())
        padded = own | {"attention_mask": own["attention_mask"].tril()}
        refused(lambda: model(**padded, use_cache=False))
        refused(lambda: model(own["input_ids"][:, :7], use_cache=False))
    refused(lambda: context_parallel(model, group, layout="ring").__enter__())
    return found


def test_refusals(ranks: Ranks) -> None:
    expected = ["before split", "input_ids is", "has padding", "q has 7 tokens", "layout is 'ring'"]
    for found in ranks.run(2, refusals):
        assert len(found) == len(expected)
        for text, part in zip(found, expected, strict=True):
            assert part in text
