"""prefill_varlen and the CUDA runtime: no waiting, graphs that follow lengths, streams, devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.compare import assert_same, assert_streams_share_nothing
from helpers.ragged import RaggedCase, ragged_inputs

import prism_cuda
from prism_cuda import PrismConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG = PrismConfig(top_p=0.6, dense_below=400)
# (queries, keys): whole, a chunk, a decode step, a short prompt, nothing.
LENGTHS = ((900, 900), (300, 1400), (1, 700), (200, 300), (0, 50))
OTHER_LENGTHS = ((1, 600), (800, 1400), (129, 500), (0, 0), (471, 850))
BOUNDS = {"max_seqlen_q": 1000, "max_seqlen_k": 1500}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"config": CONFIG},
    "per_head": {"config": PrismConfig(top_p=(0.3, 0.6, 0.6, 0.9), dense_below=400)},
    "window": {"config": CONFIG, "window_left": 200},
    "softcap_sinks": {"config": CONFIG, "softcap": 4.0, "sinks": (0.5, -1.0, 4.0, 2.0)},
    "all_short": {"config": PrismConfig(dense_below=4000)},
}
CASES = [(name, page_size) for name in SETTINGS for page_size in (None, 16)]
every_case = pytest.mark.parametrize(("name", "page_size"), CASES)

Tensors = dict[str, Any]  # torch.Tensor | None


def tensors(
    page_size: int | None, lengths: Any = LENGTHS, device: str = "cuda", seed: int = 0
) -> Tensors:
    assert [sum(column) for column in zip(*lengths, strict=True)] == [1401, 3350]
    case = ragged_inputs(
        RaggedCase("runtime", lengths, head_dim=128, page_size=page_size),
        torch.bfloat16, device, seed,
    )  # fmt: skip
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "block_table")
    made: Tensors = {"q": case.q, "k": case.k, "v": case.v}
    made |= {name: case.tensors[name] for name in names}
    if page_size is not None:
        # One shape for all lengths, so that a graph can take another table.
        table = made["block_table"]
        assert table is not None
        wide = table.new_zeros(len(lengths), -(-BOUNDS["max_seqlen_k"] // page_size))
        wide[:, : table.shape[1]] = table.clamp(0, len(case.k) - 1)
        made["block_table"] = wide
    return made


def call_of(name: str, **options: Any) -> Callable[[Tensors], Any]:
    settings: dict[str, Any] = BOUNDS | SETTINGS[name]
    sinks = settings.pop("sinks", None)
    on: dict[torch.device, torch.Tensor] = {}

    def call(batch: Tensors) -> Any:
        q = batch["q"]
        assert q is not None
        if sinks is not None and q.device not in on:
            on[q.device] = torch.tensor(sinks, device=q.device)
        return prism_cuda.prefill_varlen(
            **batch, **settings, **options, sinks=on.get(q.device), return_lse=True
        )

    return call


@every_case
def test_torch_sees_no_synchronisation(name: str, page_size: int | None) -> None:
    batch = tensors(page_size)
    for options in ({}, {"return_mask": True}):
        call = call_of(name, **options)
        call(batch)  # loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@every_case
def test_a_graph_follows_lengths_and_pages(name: str, page_size: int | None) -> None:
    static = tensors(page_size)
    call = call_of(name, return_mask=True)
    short = call_of(name)  # without an exact mask, in fewer launches
    call(static), short(static)  # load the kernels and copy the sinks
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(static)
        captured_short = short(static)
    for lengths, seed in ((OTHER_LENGTHS, 3), (LENGTHS[::-1], 4)):
        other = tensors(page_size, lengths, seed=seed)
        for old, new in zip(static.values(), other.values(), strict=True):
            if old is not None and new is not None:
                old.copy_(new)
        for result in (*captured, *captured_short):
            result.fill_(-1)
        graph.replay()
        want = call(static)
        assert_same(captured, want)
        assert_same(captured_short, want[:2])
        assert captured[0].isfinite().all()


def test_streams_run_side_by_side() -> None:
    call = call_of("plain")
    batches = [tensors(size, seed=i) for i, size in enumerate((None, 16, None))]
    assert_streams_share_nothing([partial(call, batch) for batch in batches])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_case
def test_the_tensors_device_is_used(name: str, page_size: int | None) -> None:
    call = call_of(name, return_mask=True)
    want = call(tensors(page_size))
    assert torch.cuda.current_device() == 0
    got = call(tensors(page_size, device="cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(result.device == torch.device("cuda:1") for result in got)
    assert_same([result.to("cuda:0") for result in got], want)
