"""What the ops do to the CUDA runtime: no host synchronisation, any stream, any device, graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import inputs, oracle
from helpers.compare import assert_replay_follows, assert_same, assert_streams_share_nothing

import prism_cuda
from prism_cuda import PrismConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HEAD_DIM = 128
BANDS = oracle.half_split_bands(HEAD_DIM, 64, 96)
CONFIG = PrismConfig(estimator="bands", top_p=0.7, dense_below=0)
PER_HEAD = dataclasses.replace(CONFIG, top_p=(0.3, 0.7, 0.7, 0.9), dense_heads=(3,))
GRID_PER_HEAD = dataclasses.replace(PER_HEAD, estimator="grid")

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def qkv(length: int = 1500, seed: int = 0, device: str = "cuda") -> Tensors:
    q, k = inputs.structured_qk(4, 2, length, length + 100, HEAD_DIM, "cpu", seed)
    v = inputs.tensor(tuple(k.shape), torch.float32, "cpu", seed=seed + 7)
    return q.bfloat16().to(device), k.bfloat16().to(device), v.bfloat16().to(device)


def op_prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return torch.ops.prism.prefill(q, k, v, "bands", *BANDS, [0.7])


def op_grid(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return torch.ops.prism.prefill(q, k, v, "grid", [], [], [0.7])


def op_chain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    means = torch.ops.prism.block_pool(k, 64)
    bits, counts = torch.ops.prism.select_bands(
        q, None, *BANDS, [0.7], k_means=means, k_len=k.shape[2]
    )
    return (*torch.ops.prism.sparse_attention(q, k, v, bits, counts), bits, counts)


def op_every_block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return torch.ops.prism.prefill(q, k, v, "all", [], [], [1.0], window_left=700)


def public(config: PrismConfig) -> Callable[..., Any]:
    def prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out, lse, mask = prism_cuda.prefill(
            q, k, v, config=config, return_lse=True, return_mask=True
        )
        return out, lse, mask.bits, mask.counts

    return prefill


CALLS = {
    "prefill": op_prefill,
    "grid": op_grid,
    "chain": op_chain,
    "every_block": op_every_block,
    "public": public(CONFIG),
    "per_head": public(PER_HEAD),
    "grid_per_head": public(GRID_PER_HEAD),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_torch_sees_no_synchronisation(call: Callable[..., Any]) -> None:
    tensors = qkv()
    call(*tensors)  # loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*tensors)
        with pytest.raises(RuntimeError, match="synchronizing"):
            tensors[0].sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(body: Callable[[], Any]) -> int:
    """Runtime calls in ``body`` that make the host wait for the device, or copy to the host."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        body()
    names = [event.name for event in profile.events()]
    if not any("Launch" in name for name in names):
        pytest.skip("the profiler sees no runtime calls on this machine")
    return sum("Synchronize" in name or "DtoH" in name for name in names)


@every_call
def test_the_profiler_sees_no_synchronisation(call: Callable[..., Any]) -> None:
    tensors = qkv()
    call(*tensors)
    x = torch.zeros(4, device="cuda")
    waits(lambda: x + 1)  # the first profile of a process sets the profiler up
    idle = waits(lambda: x + 1)  # what the profiler itself does
    assert waits(lambda: (x + 1).sum().item()) > idle, "a read back goes unnoticed"
    assert waits(lambda: call(*tensors)) == idle


@every_call
def test_graph_replay_equals_eager_on_new_inputs(call: Callable[..., Any]) -> None:
    assert_replay_follows(call, qkv(), (qkv(seed=seed) for seed in (21, 22)))


def test_streams_run_side_by_side() -> None:
    """Workspaces and counters of calls in flight must not be shared between streams."""
    batches = [qkv(length, seed) for seed, length in enumerate((1500, 700, 1100))]
    assert_streams_share_nothing([partial(op_prefill, *tensors) for tensors in batches])


@every_call
def test_a_side_stream_orders_the_work(call: Callable[..., Any]) -> None:
    """The inputs are written late, on the stream that the call must follow."""
    tensors = qkv()
    want = call(*tensors)
    late = tuple(torch.zeros_like(x) for x in tensors)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for x, y in zip(late, tensors, strict=True):
            x.copy_(y)
        got = call(*late)
    side.synchronize()
    assert_same(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_call
def test_the_tensors_device_is_used(call: Callable[..., Any]) -> None:
    want = call(*qkv())
    assert torch.cuda.current_device() == 0
    got = call(*qkv(device="cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(result.device == torch.device("cuda:1") for result in got)
    assert_same([result.to("cuda:0") for result in got], want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_two_devices_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match="k is on cuda:1 but q is on cuda:0"):
        op_prefill(q, k.to("cuda:1"), v)
