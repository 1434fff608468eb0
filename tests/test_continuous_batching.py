"""generate_batch with prism prefill: what generate gives for every prompt alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

from helpers.models import EXACT, MODELS  # noqa: E402
from transformers import GenerationConfig  # noqa: E402
from transformers.generation import ContinuousBatchingConfig  # noqa: E402

import prism_cuda  # noqa: E402
from prism_cuda import PrismConfig  # noqa: E402

pytestmark = pytest.mark.usefixtures("needs_library")

NEW_TOKENS = 3
LENGTHS = (200, 80, 3, 300)
GREEDY = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=96)
# Fewer tokens in a batch than in the prompts: some of them are prefilled in chunks, and prefill
# and decode share batches.
BATCHING = {"page_size": 32, "num_blocks": 64, "max_batch_tokens": 256, "use_cuda_graph": False}


@pytest.fixture(autouse=True)
def _registered() -> None:
    prism_cuda.register(EXACT)


def alone(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    tensors = [torch.tensor([prompt], device=model.device) for prompt in prompts]
    return [
        model.generate(ids, generation_config=GREEDY)[0, ids.shape[1] :].tolist() for ids in tensors
    ]


def batched(model: Any, prompts: list[list[int]], **changes: Any) -> list[list[int]]:
    outputs = model.generate_batch(
        prompts,
        generation_config=GREEDY,
        continuous_batching_config=ContinuousBatchingConfig(**BATCHING | changes),
        warmup=False,
    )
    assert all(output.error is None for output in outputs.values())
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.parametrize(
    ("name", "sparse_layers"),
    [("llama", {0, 1}), ("gpt-oss", {0, 1}), ("mistral-window", {0, 1}), ("gemma2", {0, 1})],
)
def test_equals_generate_on_every_prompt(name: str, sparse_layers: set[int]) -> None:
    model = MODELS[name].build()
    prompts = [torch.randint(3, 90, (length,)).tolist() for length in LENGTHS]
    expected = alone(model, prompts)
    prism_cuda.use_continuous_batching(model)
    with prism_cuda.record() as recording:
        assert batched(model, prompts) == expected
    sparse = [call for call in recording.calls if call.path == "prism"]
    assert {call.layer_idx for call in sparse} == sparse_layers
    if sparse:
        assert any(call.q_len < call.k_len for call in sparse), "no prompt came in chunks"

    model.set_attn_implementation("prism")
    assert alone(model, prompts) == expected


def test_a_prefix_of_pages_is_shared() -> None:
    model = MODELS["llama"].build()
    start = torch.randint(3, 90, (160,)).tolist()
    prompts = [start + torch.randint(3, 90, (70,)).tolist() for _ in range(3)]
    expected = alone(model, prompts)
    prism_cuda.use_continuous_batching(model)
    with prism_cuda.record() as recording:
        assert batched(model, prompts) == expected
    prefilled = sum(call.q_len for call in recording.calls if call.layer_idx == 0)
    assert prefilled < 3 * (230 + NEW_TOKENS - 1), "every prompt was prefilled from its start"


def test_an_unregistered_name_is_refused() -> None:
    model = MODELS["llama"].build()
    with pytest.raises(ValueError, match="name is 'prisn'; expected a registered one"):
        prism_cuda.use_continuous_batching(model, "prisn")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_on_the_gpu(graph: bool) -> None:
    prism_cuda.register(PrismConfig(top_p=1.0, dense_below=0))
    model = MODELS["llama"].build().to("cuda", torch.bfloat16)
    prompts = [torch.randint(3, 90, (length,)).tolist() for length in LENGTHS]
    prism_cuda.use_continuous_batching(model)
    tokens = batched(model, prompts, use_cuda_graph=graph)
    assert [len(row) for row in tokens] == [NEW_TOKENS] * len(LENGTHS)
    if not graph:  # a recording reads the device
        with prism_cuda.record() as recording:
            assert batched(model, prompts) == tokens
        assert any(call.path == "prism" for call in recording.calls)
