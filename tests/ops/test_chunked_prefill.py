"""ChunkedPrefill: chunk by chunk, what one call over the whole prompt gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import inputs, oracle
from helpers.compare import check_selection

import prism_cuda
from prism_cuda import ChunkedPrefill, PrismConfig
from prism_cuda.bands import Bands
from prism_cuda.block_mask import BlockMask

HEADS, KV_HEADS, DIM = 4, 2, 64
EXACT = PrismConfig(block_size=64, estimator="bands", top_p=1.0, dense_below=0)
SPARSE = PrismConfig(block_size=64, estimator="bands", top_p=0.8, dense_below=0)
GRID = replace(SPARSE, estimator="grid")
CUTS = {
    "blocks": (256, 512, 256),
    "odd": (100, 333, 70, 521),
    "short_ones": (200, 1, 63, 300, 5, 455),
    "one_chunk": (1024,),
}
Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def prompt(device: str, length: int = 1024, seed: int = 0) -> Qkv:
    q, k = inputs.structured_qk(HEADS, KV_HEADS, length, length, DIM, device, seed)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return q.to(dtype), k.to(dtype), inputs.tensor(tuple(k.shape), dtype, device, seed=seed + 9)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Float64 causal attention."""
    full = BlockMask.full(1, HEADS, q.shape[2], k.shape[2], q_block_size=64, k_block_size=64)
    return oracle.attention(
        q, k, v, full.to_dense().to(q.device), q_block_size=64, k_block_size=64, causal=True
    ).out


def state(config: PrismConfig, device: str, max_len: int = 1024) -> ChunkedPrefill:
    return ChunkedPrefill(1, KV_HEADS, DIM, max_len, config=config, device=device)


def chunks(qkv: Qkv, cuts: tuple[int, ...]) -> Iterator[Qkv]:
    """The queries of a chunk, and all keys and values so far."""
    q, k, v = qkv
    end = 0
    for size in cuts:
        end += size
        yield q[:, :, end - size : end], k[:, :, :end], v[:, :, :end]


def means_of(k: torch.Tensor, block_size: int) -> torch.Tensor:
    """Pooled in one call of the op that the chunks use: on the CPU it adds in another order."""
    shape = (*k.shape[:2], oracle.ceil_div(k.shape[2], block_size), k.shape[3])
    means = torch.empty(shape, dtype=torch.float32, device=k.device)
    sums = torch.empty((*k.shape[:2], 16, k.shape[3]), dtype=torch.float32, device=k.device)
    torch.ops.prism.append_means_(k, means, sums, 0, block_size)
    return means


def relative_error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.double() - want).norm() / want.norm())


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_at_p_1_chunks_equal_dense_attention(device: str, cuts: tuple[int, ...]) -> None:
    qkv = prompt(device)
    chunked = state(EXACT, device)
    out = torch.cat([chunked.prefill(*chunk) for chunk in chunks(qkv, cuts)], dim=2)
    tolerance = 1e-4 if device == "cpu" else 2e-2
    torch.testing.assert_close(out.double(), dense(*qkv), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("block_size", [64, 128, (128, 64)])
def test_a_chunk_selects_from_the_means_of_all_keys_so_far(
    device: str, block_size: int | tuple[int, int], cuts: tuple[int, ...]
) -> None:
    config = replace(SPARSE, block_size=block_size)
    q_block, k_block = config.block_sizes
    bands = config.resolve_bands(DIM)
    assert isinstance(bands, Bands)
    chunked = state(config, device)
    for q, k, v in chunks(prompt(device), cuts):
        out, mask = chunked.prefill(q, k, v, return_mask=True)
        means = means_of(k, k_block)
        assert chunked.length == k.shape[2]
        if q.shape[2] < q_block:
            assert mask is None
            continue
        bits, counts = torch.ops.prism.select_bands(
            q, None, *bands.ranges, [config.top_p], q_block_size=q_block,
            k_block_size=k_block, k_means=means, k_len=k.shape[2],
        )  # fmt: skip
        assert torch.equal(mask.bits, bits)
        assert torch.equal(mask.counts, counts)
        assert torch.equal(out, prism_cuda.sparse_attention(q, k, v, mask))


@pytest.mark.parametrize("config", [SPARSE, GRID], ids=["bands", "grid"])
def test_on_cuda_a_chunk_is_prefill_over_all_keys(cuda: str, config: PrismConfig) -> None:
    """What is kept is what pooling all keys gives there, so that nothing differs."""
    chunked = state(config, cuda)
    for q, k, v in chunks(prompt(cuda), CUTS["odd"]):
        assert torch.equal(chunked.prefill(q, k, v), prism_cuda.prefill(q, k, v, config=config))


def test_on_the_grid_chunks_of_whole_blocks_are_one_call(cuda: str) -> None:
    """Nothing that it selects with depends on the call: outputs are the same, bit by bit."""
    q, k, v = prompt(cuda)
    want, whole = prism_cuda.prefill(q, k, v, config=GRID, return_mask=True)
    chunked = state(GRID, cuda)
    results = [
        chunked.prefill(*chunk, return_mask=True) for chunk in chunks((q, k, v), CUTS["blocks"])
    ]
    assert torch.equal(torch.cat([out for out, _ in results], 2), want)
    kept = torch.cat([pad(mask, whole) for _, mask in results], 2)
    assert torch.equal(kept, whole.to_dense())
    assert 0.1 < whole.density() < 0.9


def pad(mask: BlockMask | None, whole: BlockMask) -> torch.Tensor:
    assert mask is not None
    keep = mask.to_dense()
    return torch.nn.functional.pad(keep, (0, whole.to_dense().shape[3] - keep.shape[3]))


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_on_the_grid_a_chunk_selects_from_the_cells_of_all_keys_so_far(
    device: str, cuts: tuple[int, ...]
) -> None:
    chunked = state(GRID, device)
    for q, k, v in chunks(prompt(device), cuts):
        out, mask = chunked.prefill(q, k, v, return_mask=True)
        assert chunked.length == k.shape[2]
        if mask is None:
            continue
        rules: dict[str, Any] = {
            "keep_above": GRID.threshold(0.8, "grid"),
            "q_block_size": 64,
            "k_block_size": 64,
        }
        check_selection(mask.to_dense(), oracle.select_grid(q, k, 0.8, **rules))
        assert torch.equal(out, prism_cuda.sparse_attention(q, k, v, mask))


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_below_p_1_chunks_keep_and_lose_what_one_call_does(
    device: str, cuts: tuple[int, ...]
) -> None:
    """The energies behind the temperatures differ; on cuts within blocks, so do the query blocks.

    Those then mix two of the inputs' topics, which begin every 64 tokens.
    """
    config = replace(SPARSE, top_p=0.97, keep_sink=0)
    q, k, v = qkv = prompt(device, seed=3)
    want = dense(*qkv)
    whole, mask = prism_cuda.prefill(q, k, v, config=config, return_mask=True)
    assert 0.2 < mask.density() < 0.3
    chunked = state(config, device)
    outs, kept, visible = [], 0, 0.0
    for chunk in chunks(qkv, cuts):
        out, mask_of_chunk = chunked.prefill(*chunk, return_mask=True)
        outs.append(out)
        if mask_of_chunk is not None:
            kept += int(mask_of_chunk.counts.sum())
            visible += int(mask_of_chunk.counts.sum()) / mask_of_chunk.density()
    error = relative_error(torch.cat(outs, dim=2), want)
    if all(size % 64 == 0 for size in cuts):
        assert abs(kept / visible - mask.density()) < 0.01
        assert error < 1.1 * relative_error(whole, want)
    else:
        assert 0 < kept / visible - mask.density() < 0.1
        assert error < 0.07
        nothing = prism_cuda.prefill(q, k, v, config=replace(config, top_p=0.0))
        assert relative_error(nothing, want) > 0.2


def test_settings_per_head_are_those_of_each_head_alone(device: str) -> None:
    of_heads: list[Any] = [(16, 32), (32, 48), "auto", (16, 32)]
    top_p = [0.8] * 3 + [0.6]
    config = replace(SPARSE, bands=of_heads, top_p=top_p)
    together = state(config, device)
    alone = [
        state(replace(config, bands=own, top_p=top_p[head]), device)
        for head, own in enumerate(of_heads)
    ]
    for chunk in chunks(prompt(device), CUTS["odd"]):
        out, mask = together.prefill(*chunk, return_mask=True)
        for head, one in enumerate(alone):
            want, want_mask = one.prefill(*chunk, return_mask=True)
            assert torch.equal(out[:, head], want[:, head])
            assert torch.equal(mask.bits[:, head], want_mask.bits[:, head])


@pytest.mark.parametrize("head_dim", [96, 256])
def test_other_head_dims_at_p_1_equal_dense_attention(device: str, head_dim: int) -> None:
    q, k = inputs.structured_qk(HEADS, KV_HEADS, 1024, 1024, head_dim, device, 3)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    qkv = (q.to(dtype), k.to(dtype), inputs.tensor(tuple(k.shape), dtype, device, seed=4))
    chunked = ChunkedPrefill(1, KV_HEADS, head_dim, 1024, config=EXACT, device=device)
    out = torch.cat([chunked.prefill(*chunk) for chunk in chunks(qkv, CUTS["odd"])], dim=2)
    tolerance = 1e-4 if device == "cpu" else 2e-2
    torch.testing.assert_close(out.double(), dense(*qkv), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("start", [1, 63, 64, 65, 100, 127])
@pytest.mark.parametrize("block_size", [64, 128, (128, 64)])
def test_own_key_blocks_are_kept_wherever_a_chunk_starts(
    device: str, start: int, block_size: int | tuple[int, int]
) -> None:
    config = replace(SPARSE, block_size=block_size, top_p=0.0, keep_sink=0)
    q_block, k_block = config.block_sizes
    q, k, v = prompt(device)
    chunked = state(config, device)
    chunked.append(k[:, :, :start])
    end = start + 400
    _, mask = chunked.prefill(q[:, :, start:end], k[:, :, :end], v[:, :, :end], return_mask=True)
    keep = mask.to_dense()[0, 0].cpu()
    for row in range(keep.shape[0]):
        first = start + row * q_block
        last = min(first + q_block, end) - 1
        own = list(range(first // k_block, last // k_block + 1))
        assert keep[row].nonzero().flatten().tolist() == own


def test_a_reset_state_serves_another_prompt(device: str) -> None:
    chunked = state(SPARSE, device)
    first = [chunked.prefill(*chunk) for chunk in chunks(prompt(device, seed=1), CUTS["odd"])]
    chunked.reset()
    chunked.append(prompt(device, seed=2)[1][:, :, :700])
    chunked.reset()
    again = [chunked.prefill(*chunk) for chunk in chunks(prompt(device, seed=1), CUTS["odd"])]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_chunks_are_recorded(device: str) -> None:
    chunked = state(SPARSE, device)
    with prism_cuda.record(masks=True, times=True) as recording:
        for chunk in chunks(prompt(device), (512, 20, 492)):
            chunked.prefill(*chunk)
    assert [call.path for call in recording.calls] == ["prism", "dense", "prism"]
    assert [call.k_len for call in recording.calls] == [512, 532, 1024]
    assert recording.calls[0].times.keys() == {"pool", "select", "attend"}
    assert [call.estimator for call in recording.calls] == ["bands", None, "bands"]
    assert recording.calls[2].mask is not None
    assert recording.calls[2].density == recording.calls[2].mask.density()


@pytest.mark.parametrize("head_dim", [64, 136])
def test_by_default_the_estimator_follows_the_head_dim(device: str, head_dim: int) -> None:
    q, k = (
        inputs.tensor((1, heads, 200, head_dim), torch.bfloat16, device, seed=heads)
        for heads in (2, 1)
    )
    chunked = ChunkedPrefill(1, 1, head_dim, 200, config=PrismConfig(dense_below=0), device=device)
    with prism_cuda.record() as recording:
        chunked.prefill(q, k, k)
    assert recording.calls[0].estimator == ("grid" if head_dim == 64 else "bands")


def test_wrong_calls_are_refused(device: str) -> None:
    q, k, v = prompt(device)
    for head_dim in (0, 60, 264):
        with pytest.raises(ValueError, match=rf"head_dim is {head_dim};.*multiple of 8 up to 256"):
            ChunkedPrefill(1, 2, head_dim, 1024, device=device)
    chunked = state(SPARSE, device, max_len=500)
    with pytest.raises(ValueError, match=r"1024 tokens after 0 exceed max_len 500"):
        chunked.append(k)
    with pytest.raises(ValueError, match=r"shape \(1, 1, 10, 64\).*\(1, 2, tokens, 64\)"):
        chunked.append(k[:, :1, :10])
    chunked.append(k[:, :, :300])
    with pytest.raises(ValueError, match=r"k has 200 tokens.*at least 300"):
        chunked.prefill(q[:, :, :200], k[:, :, :200], v[:, :, :200])
    assert chunked.length == 300


def test_heads_with_settings_of_their_own(device: str) -> None:
    """In one chunk, so that means and temperatures are those of a whole call."""
    config = replace(SPARSE, top_p=(0.3, 0.6, 0.6, 0.8), dense_heads=(1,))
    q, k, v = prompt(device)
    _, mask = state(config, device).prefill(q, k, v, return_mask=True)
    assert torch.equal(mask.bits, prism_cuda.select_blocks(q, k, config=config).bits)
    density = mask.density_per_head()[0]
    assert density[1] == 1 and (density[[0, 2, 3]] < 1).all()


def test_settings_for_another_number_of_heads_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="top_p has 3 values; expected one number or 4"):
        state(replace(SPARSE, top_p=(0.3, 0.6, 0.6)), device).prefill(*prompt(device))


@pytest.mark.parametrize("name", ["sinks", "softcap", "window"])
def test_scores_are_those_of_prefill(device: str, name: str) -> None:
    every: dict[str, dict[str, Any]] = {
        "sinks": {"sinks": torch.tensor([0.5, -1.0, 4.0, 2.0], device=device)},
        "softcap": {"softcap": 2.0},
        "window": {"window_left": 100},
    }
    options = every[name]
    growing = state(EXACT, device)
    for q, k, v in chunks(prompt(device), CUTS["short_ones"]):
        out, mask = growing.prefill(q, k, v, **options, return_mask=True)
        want = prism_cuda.prefill(q, k, v, config=EXACT, **options)
        torch.testing.assert_close(out, want)
        assert growing.length == k.shape[2]
        if mask is not None and name == "window":
            assert mask.density() < 1 or k.shape[2] <= 101
