"""context_parallel_prefill against one process: the same masks bit by bit, outputs to rounding."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.params import needs_cuda
from helpers.ranks import Ranks

import prism_cuda
from prism_cuda import PrismConfig, distributed
from prism_cuda.distributed import Exchange, Shards, context_parallel_prefill

pytestmark = pytest.mark.usefixtures("needs_library")

GRID = PrismConfig(block_size=64, estimator="grid", top_p=0.7, dense_below=0)
BANDS = replace(GRID, estimator="bands", bands=(32, 48))
MIXED = replace(GRID, block_size=(128, 64))
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Case:
    config: PrismConfig
    shards: Shards | None = None
    length: int = 704
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    batch: int = 1
    keywords: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        shapes = [(self.batch, h, self.length, self.head_dim) for h in (*self.heads, self.heads[1])]
        q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
        # Blocks that differ, so that some stand out.
        scale = 1 + torch.rand(self.length // 64 + 1, generator=generator).repeat_interleave(64)
        made = [x * scale[: self.length, None] for x in (2 * q, k, v)]
        return [x.to(self.device, self.dtype) for x in made]

    def arguments(self) -> dict[str, Any]:
        sinks = self.keywords.get("sinks")
        if sinks is None:
            return self.keywords
        return self.keywords | {"sinks": torch.tensor(sinks, device=self.device)}


def on_rank(group: Any, case: Case, shards: Shards, given: bool) -> tuple[Any, ...]:
    exchange = Exchange(group)
    own = [shards.take(x, exchange.rank) for x in case.tensors()]
    out, lse, masks = context_parallel_prefill(
        *own,
        exchange if given else group,
        config=case.config,
        shards=shards if given else None,
        return_lse=True,
        return_mask=True,
        **case.arguments(),
    )
    assert out.dtype == case.dtype and out.shape == own[0].shape
    return out.cpu(), lse.cpu(), [(mask.bits.cpu(), mask.counts.cpu()) for mask in masks]


def check(ranks: Ranks, count: int, case: Case, shards: Shards) -> None:
    contiguous_ranks = [own.rank for own in shards.stretches] == sorted(range(count))
    parts = ranks.run(count, on_rank, case, shards, not contiguous_ranks)
    q, k, v = case.tensors()
    out, lse, mask = prism_cuda.prefill(
        q, k, v, config=case.config, return_lse=True, return_mask=True, **case.arguments()
    )
    out, lse, mask_bits, mask_counts = (x.cpu() for x in (out, lse, mask.bits, mask.counts))
    joined = shards.join([part[0] for part in parts])
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(joined, out, atol=tolerance, rtol=tolerance)
    own_lse = shards.join([part[1] for part in parts])
    torch.testing.assert_close(own_lse, lse, atol=1e-5, rtol=1e-5)
    # Blocks of queries of the aligned stretches, and words up to what each of them sees.
    q_block_size, _ = case.config.block_sizes
    blocks = shards.aligned(q_block_size).in_units(q_block_size)
    words = mask_bits.shape[-1]
    bits, counts = [], []
    for _, _, masks in parts:
        padded = [torch.nn.functional.pad(own, (0, words - own.shape[-1])) for own, _ in masks] or [
            mask_bits[:, :, :0]
        ]
        bits.append(torch.cat(padded, 2))
        counts.append(torch.cat([own for _, own in masks] or [mask_counts[:, :, :0]], 2))
    assert torch.equal(blocks.join(bits), mask_bits)
    assert torch.equal(blocks.join(counts), mask_counts)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("config", [GRID, BANDS, MIXED], ids=["grid", "bands", "mixed"])
def test_equals_one_process(ranks: Ranks, count: int, layout: str, config: PrismConfig) -> None:
    case = Case(config)
    check(ranks, count, case, getattr(distributed, layout)(case.length, count))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [GRID, BANDS], ids=["grid", "bands"])
def test_every_dtype(ranks: Ranks, dtype: torch.dtype, config: PrismConfig) -> None:
    case = Case(config, dtype=dtype, length=512)
    check(ranks, 2, case, distributed.zigzag(512, 2, 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("config", [GRID, BANDS, MIXED], ids=["grid", "bands", "mixed"])
def test_two_ranks_on_one_card(
    ranks: Ranks, config: PrismConfig, layout: str, dtype: torch.dtype
) -> None:
    """Through gloo, which copies tensors of the GPU to the host and back."""
    needs_cuda()
    case = Case(config, dtype=dtype, device="cuda:0", length=1408)
    check(ranks, 2, case, getattr(distributed, layout)(case.length, 2))


OTHERS = {
    "ragged_end": Case(GRID, length=700),
    "rank_without_tokens": Case(GRID, length=130),
    "two_rows": Case(BANDS, batch=2, length=300),
    "heads_do_not_divide": Case(BANDS, heads=(6, 2)),
    "fewer_heads_than_ranks": Case(BANDS, heads=(2, 1)),
    "settings_of_heads": Case(
        replace(
            BANDS,
            top_p=[0.9, 0.5, 0.7, 1.0],
            bands=[(32, 48), (64, 64), (32, 48), (48, 32)],
            dense_heads=(1,),
        )
    ),
    "sinks_and_cap": Case(GRID, keywords={"sinks": [0.5, -1.0, 2.0, 0.0], "softcap": 5.0}),
    "window": Case(GRID, keywords={"window_left": 200}),
    "dense": Case(PrismConfig(), length=320),
    "nothing_recent": Case(replace(GRID, keep_recent=0, keep_sink=0, top_p=0.3)),
    "wide_heads": Case(BANDS, head_dim=192, length=256),
    "two_words": Case(GRID, length=2304, heads=(1, 1)),
    "empty": Case(GRID, length=0),
}


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "empty"])
def test_other_calls(ranks: Ranks, name: str) -> None:
    case = OTHERS[name]
    check(ranks, 3, case, distributed.zigzag(case.length, 3, case.config.block_sizes[0]))


@pytest.mark.parametrize("config", [GRID, BANDS], ids=["grid", "bands"])
@pytest.mark.parametrize("lengths", [(100, 333, 67), (10, 20, 200), (0, 250, 0)])
def test_stretches_that_begin_within_blocks(
    ranks: Ranks, config: PrismConfig, lengths: tuple[int, ...]
) -> None:
    check(ranks, 3, Case(config, length=sum(lengths)), distributed.from_lengths(lengths))


def test_an_empty_sequence(ranks: Ranks) -> None:
    case = OTHERS["empty"]
    parts = ranks.run(2, on_rank, case, distributed.contiguous(0, 2), False)
    assert all(part[0].shape == (1, 4, 0, 64) and part[2] == [] for part in parts)


def in_steps(group: Any, steps: int) -> torch.Tensor:
    case = Case(GRID)
    exchange = Exchange(group)
    shards = distributed.contiguous(case.length, exchange.ranks, 64)
    own = [shards.take(x, exchange.rank) for x in case.tensors()]
    return context_parallel_prefill(*own, group, config=GRID, steps=steps)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_keys_may_arrive_in_any_number_of_steps(ranks: Ranks, steps: int) -> None:
    out = torch.cat(ranks.run(4, in_steps, steps), 2)
    expected = prism_cuda.prefill(*Case(GRID).tensors(), config=GRID)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


def through_mesh(group: Any) -> torch.Tensor:
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh.from_group(group, "cpu")
    case = Case(GRID, length=256)
    shards = distributed.contiguous(256, 2, 64)
    own = [shards.take(x, mesh.get_local_rank()) for x in case.tensors()]
    with prism_cuda.record(masks=True) as recording:
        out = context_parallel_prefill(*own, mesh, config=GRID)
    (call,) = recording.calls
    assert call.path == "prism" and call.estimator == "grid" and call.q_len == 128
    assert call.mask is not None and 0 < call.density <= 1
    return out


def test_a_device_mesh_and_recording(ranks: Ranks) -> None:
    out = torch.cat(ranks.run(2, through_mesh), 2)
    expected = prism_cuda.prefill(*Case(GRID, length=256).tensors(), config=GRID)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


def structured(group: Any, config: PrismConfig, layout: str, length: int) -> None:
    """Realistic inputs, each rank against the whole sequence that it makes itself."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
    from masks import structured_qkv

    exchange = Exchange(group)
    q, k, v = structured_qkv(2, 1, length, 64, torch.bfloat16, "cpu")
    shards = getattr(distributed, layout)(length, exchange.ranks)
    own = [shards.take(x, exchange.rank) for x in (q, k, v)]
    out, masks = context_parallel_prefill(
        *own, group, config=config, shards=shards, return_mask=True
    )
    expected, mask = prism_cuda.prefill(q, k, v, config=config, return_mask=True)
    assert 0.05 < mask.density() < 0.95
    torch.testing.assert_close(out, shards.take(expected, exchange.rank), atol=2e-2, rtol=2e-2)
    for stretch, found in zip(shards.of(exchange.rank), masks, strict=True):
        rows = slice(stretch.start // 128, -(-stretch.end // 128))
        words = found.bits.shape[-1]
        assert torch.equal(found.bits, mask.bits[:, :, rows, :words])
        assert torch.equal(found.counts, mask.counts[:, :, rows])


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("estimator", ["grid", "bands"])
def test_structured_inputs(ranks: Ranks, count: int, layout: str, estimator: str) -> None:
    config = PrismConfig(estimator=estimator, top_p=0.9)
    ranks.run(count, structured, config, layout, 4000)
