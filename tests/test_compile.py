"""torch.compile and torch.export of the Python functions and of whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import EagerAndRecordGraphs

import prism_cuda
from prism_cuda import PrismConfig
from prism_cuda.bands import Bands

pytestmark = pytest.mark.usefixtures("needs_library")

SETTINGS = {
    "one_top_p": PrismConfig(block_size=64, estimator="bands", top_p=0.5, dense_below=0),
    "grid": PrismConfig(block_size=64, top_p=0.5, keep_above=0.2, dense_below=0),
    "top_p_per_head": PrismConfig(
        block_size=64,
        estimator="bands",
        top_p=(0.3, 0.6, 0.6, 0.3),
        dense_heads=(2,),
        dense_below=0,
    ),
    "bands_per_head": PrismConfig(
        block_size=64, bands=[(16, 32), "auto", (16, 32), Bands((0, 8), (5, 64))], dense_below=0
    ),
}
# One call for "no less than a block" and one for the shorter: dispatch depends on the length.
SPARSE_LENGTHS = (200, 333, 129)
ANY_LENGTH = torch.export.Dim.AUTO


def qkv(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (torch.randn(1, heads, length, 64) for heads in (4, 2, 2))
    return q, k, v


class Prefill(torch.nn.Module):
    def __init__(self, config: PrismConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return prism_cuda.prefill(q, k, v, config=self.config)


def called(graph: torch.fx.GraphModule) -> set[str]:
    """The prism ops of a graph, without the name of the overload."""
    targets = [str(node.target) for node in graph.graph.nodes]
    return {".".join(name.split(".")[:2]) for name in targets if name.startswith("prism.")}


@pytest.mark.parametrize("name", SETTINGS)
def test_prefill_compiles_once_for_all_lengths(name: str) -> None:
    torch._dynamo.reset()
    prefill = Prefill(SETTINGS[name])
    backend = EagerAndRecordGraphs()
    compiled = torch.compile(prefill, fullgraph=True, dynamic=True, backend=backend)
    for length in SPARSE_LENGTHS:
        tensors = qkv(length)
        assert torch.equal(compiled(*tensors), prefill(*tensors))
    assert len(backend.graphs) == 1
    assert any("sparse_attention" in op or "prefill" in op for op in called(backend.graphs[0]))
    tensors = qkv(40)  # dense, a graph of its own
    assert torch.equal(compiled(*tensors), prefill(*tensors))
    assert not called(backend.graphs[-1])


@pytest.mark.parametrize("lengths", [(600, 601, 650), (40, 41, 50)], ids=["few_keys", "short"])
def test_dense_prefill_compiles_once_for_all_lengths(lengths: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    backend = EagerAndRecordGraphs()
    compiled = torch.compile(Prefill(PrismConfig()), fullgraph=True, dynamic=True, backend=backend)
    for length in lengths:
        tensors = qkv(length)
        assert torch.equal(compiled(*tensors), prism_cuda.prefill(*tensors))
    assert len(backend.graphs) == 1


@pytest.mark.parametrize("q_lens", [(5, 7, 60), (200, 150, 300)], ids=["short", "few_keys"])
def test_dense_chunks_compile_once_for_all_lengths(q_lens: tuple[int, ...]) -> None:
    """Short last chunks, turns after a first, verification of drafts."""
    torch._dynamo.reset()
    backend = EagerAndRecordGraphs()
    compiled = torch.compile(Prefill(PrismConfig()), fullgraph=True, dynamic=True, backend=backend)
    for q_len, k_len in zip(q_lens, (400, 777, 650), strict=True):
        q, k, v = qkv(k_len)
        chunk = (q[:, :, -q_len:], k, v)
        torch.testing.assert_close(compiled(*chunk), prism_cuda.prefill(*chunk))
    assert len(backend.graphs) == 1
    torch._dynamo.reset()
    fixed = torch.compile(Prefill(PrismConfig()), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fixed(*chunk), prism_cuda.prefill(*chunk))


@pytest.mark.parametrize("config", [PrismConfig(), SETTINGS["grid"]], ids=["dense", "sparse"])
def test_autocast_compiles(config: PrismConfig) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Prefill(config), fullgraph=True, backend="aot_eager")
    tensors = qkv(200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = compiled(*tensors)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, prism_cuda.prefill(*tensors, config=config))


def test_an_estimator_of_ones_own_compiles() -> None:
    torch._dynamo.reset()

    def halves(q: Any, k: Any, config: PrismConfig, *, scale: Any, causal: bool) -> Any:
        sizes: Any = dict(zip(("q_block_size", "k_block_size"), config.block_sizes, strict=True))
        shape: Any = (*q.shape[:3], k.shape[2])
        return prism_cuda.BlockMask.full(*shape, causal=causal, **sizes)

    prism_cuda.register_estimator("compiled", halves)
    prefill = Prefill(PrismConfig(estimator="compiled", block_size=64, dense_below=0))
    compiled = torch.compile(prefill, fullgraph=True, backend="aot_eager")
    tensors = qkv(200)
    assert torch.equal(compiled(*tensors), prefill(*tensors))


@pytest.mark.parametrize("name", SETTINGS)
def test_exported_prefill_equals_eager_at_another_length(name: str) -> None:
    prefill = Prefill(SETTINGS[name])
    lengths = [{2: ANY_LENGTH}] * 3
    program = torch.export.export(prefill, qkv(200), dynamic_shapes=lengths)
    tensors = qkv(333)
    assert torch.equal(program.module()(*tensors), prefill(*tensors))
    assert any("sparse_attention" in op or "prefill" in op for op in called(program.graph_module))


transformers = pytest.importorskip("transformers", minversion="5")

from helpers.models import MODELS  # noqa: E402


class Logits(torch.nn.Module):
    """A model as a program from tokens to logits."""

    def __init__(self, name: str, settings: str = "one_top_p") -> None:
        super().__init__()
        prism_cuda.register(SETTINGS[settings], "prism-compiled")
        self.model = MODELS[name].build()
        self.model.set_attn_implementation("prism-compiled")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        # Without a cache transformers traces the masks of packed sequences, which run dense.
        cache = transformers.DynamicCache(config=self.model.config)
        return self.model(input_ids=ids, cache=cache).logits


every_model = pytest.mark.parametrize("name", ["qwen3", "qwen3-window-per-layer", "gemma2"])
# Sinks, caps and windows too: one op a layer.
OPS = {"prism.prefill"}


def prompt(length: int) -> torch.Tensor:
    return torch.randint(3, 90, (1, length))


@every_model
@torch.no_grad()
def test_a_whole_model_compiles_once_for_all_lengths(name: str) -> None:
    torch._dynamo.reset()
    model = Logits(name)
    backend = EagerAndRecordGraphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length in SPARSE_LENGTHS:
        ids = prompt(length)
        torch.testing.assert_close(compiled(ids), model(ids), atol=1e-5, rtol=1e-4)
    assert len(backend.graphs) == 1
    assert called(backend.graphs[0]) == OPS


@torch.no_grad()
def test_a_whole_model_compiles_with_bands_per_head() -> None:
    torch._dynamo.reset()
    model = Logits("qwen3", "bands_per_head")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    ids = prompt(333)
    torch.testing.assert_close(compiled(ids), model(ids), atol=1e-5, rtol=1e-4)


@every_model
@torch.no_grad()
def test_an_exported_model_equals_eager_at_another_length(name: str) -> None:
    model = Logits(name)
    program = torch.export.export(model, (prompt(200),), dynamic_shapes=[{1: ANY_LENGTH}])
    ids = prompt(333)
    torch.testing.assert_close(program.module()(ids), model(ids), atol=1e-5, rtol=1e-4)
    assert called(program.graph_module) == OPS
