"""The transformers attention function on padded batches: one launch, without host reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5")

from helpers.models import MODELS  # noqa: E402

import prism_cuda  # noqa: E402
from prism_cuda import PrismConfig  # noqa: E402
from prism_cuda.integrations.masks import Causal  # noqa: E402

pytestmark = pytest.mark.usefixtures("needs_library")

LENGTH, CHUNK = 400, 150
HEADS = (4, 2, 2)


def attention() -> tuple[Any, torch.nn.Module]:
    prism_cuda.register(PrismConfig(block_size=64, top_p=0.5, dense_below=128), "prism-padded")
    module = MODELS["llama"].build().model.layers[0].self_attn
    return transformers.AttentionInterface()["prism-padded"], module


def inputs(q_len: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """q, k, v and which keys are real: left padding, a hole, right padding, nothing, everything."""
    generator = torch.Generator().manual_seed(0)
    real = torch.ones(5, LENGTH, dtype=torch.bool)
    real[0, :61] = real[1, 290:310] = real[2, 377:] = real[3] = False
    lengths = (q_len, LENGTH, LENGTH)
    qkv = (
        torch.randn(5, length, heads, 64, generator=generator).transpose(1, 2)
        for heads, length in zip(HEADS, lengths, strict=True)
    )
    return *(x.to(device, dtype) for x in qkv), real.to(device)


@pytest.mark.parametrize("q_len", [LENGTH, CHUNK], ids=["whole", "chunk"])
def test_every_row_is_its_real_tokens_alone(q_len: int) -> None:
    attend, module = attention()
    q, k, v, real = inputs(q_len, torch.float32, "cpu")
    with prism_cuda.record() as recording:
        got, _ = attend(module, q, k, v, Causal(None, LENGTH, real).mark(5, "cpu"))
    assert {call.path for call in recording.calls} == {"prism"}
    for b in range(5):
        keys, rows = real[b], real[b, LENGTH - q_len :]
        assert not got[b, ~rows].any()
        if rows.any():
            one = q[b : b + 1, :, rows], k[b : b + 1, :, keys], v[b : b + 1, :, keys]
            expected, _ = attend(module, *one, Causal().mark(1, "cpu"))
            torch.testing.assert_close(got[b : b + 1, rows], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_layer_follows_the_padding_without_waiting() -> None:
    attend, module = attention()
    q, k, v, real = inputs(LENGTH, torch.bfloat16, "cuda")

    def run() -> Tensor:
        return attend(module, q, k, v, Causal(None, LENGTH, real).mark(5, "cuda"))[0]

    run()  # loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    real.copy_(real.flip(0))
    graph.replay()
    assert torch.equal(captured, run())
    assert captured.isfinite().all()
