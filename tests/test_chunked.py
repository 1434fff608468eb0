"""ChunkedPrefill.truncate: going back, as drafts that are refused and shared prefixes need."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import inputs

import prism_cuda
from prism_cuda import ChunkedPrefill, PrismConfig

pytestmark = pytest.mark.usefixtures("needs_library")

BANDS = PrismConfig(block_size=64, estimator="bands", top_p=0.8, dense_below=0)
CONFIGS = {"bands": BANDS, "grid": replace(BANDS, estimator="grid")}
LENGTH = 700


def prompt(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = inputs.structured_qk(4, 2, LENGTH, LENGTH, 64, "cpu", seed)
    return q.float(), k.float(), torch.randn_like(k, dtype=torch.float32)


def state(config: PrismConfig) -> ChunkedPrefill:
    return ChunkedPrefill(1, 2, 64, LENGTH, config=config, device="cpu")


def straight(config: PrismConfig, kept: int, chunk: tuple[torch.Tensor, ...]) -> tuple:
    """The last chunk after ``kept`` tokens that came in one piece."""
    chunked = state(config)
    chunked.append(chunk[1][:, :, :kept])
    return chunked.prefill(*chunk, return_mask=True)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kept", [0, 1, 64, 100, 256, 400, 449, 450])
def test_after_going_back_a_chunk_is_what_it_is_straight_on(name: str, kept: int) -> None:
    config = CONFIGS[name]
    q, k, v = prompt(1)
    chunked = state(config)
    for end in (300, 450):  # a prompt whose end is then thrown away
        start = chunked.length
        chunked.prefill(q[:, :, start:end], k[:, :, :end], v[:, :, :end])
    chunked.truncate(kept)
    assert chunked.length == kept
    # Another continuation of the tokens that stay.
    k, v = (
        torch.cat([x[:, :, :kept], y[:, :, kept:]], 2)
        for x, y in zip((k, v), prompt(2)[1:], strict=True)
    )
    end = min(kept + 200, LENGTH)
    chunk = (q[:, :, kept:end], k[:, :, :end], v[:, :, :end])
    out, mask = chunked.prefill(*chunk, return_mask=True)
    want, want_mask = straight(config, kept, chunk)
    assert torch.equal(mask.bits, want_mask.bits)
    assert torch.equal(out, want)
    if name == "grid":  # which looks at nothing but keys: one call over all of them
        assert torch.equal(out, prism_cuda.prefill(*chunk, config=config))


@pytest.mark.parametrize("name", CONFIGS)
def test_drafts_of_some_tokens_come_and_go(name: str) -> None:
    config = CONFIGS[name]
    q, k, v = prompt(1)
    chunked = state(config)
    chunked.prefill(q[:, :, :333], k[:, :, :333], v[:, :, :333])
    wrong = torch.randn_like(k)
    for length in (333, 342, 351):
        draft = torch.cat([k[:, :, :length], wrong[:, :, :7]], 2)
        chunked.prefill(q[:, :, length : length + 7], draft, draft)
        chunked.truncate(length)
        chunked.truncate(length - 2)
        chunk = (q[:, :, length - 2 : length + 9], k[:, :, : length + 9], v[:, :, : length + 9])
        chunked.prefill(*chunk)
    chunk = (q[:, :, 360:], k, v)
    out, mask = chunked.prefill(*chunk, return_mask=True)
    want, want_mask = straight(config, 360, chunk)
    assert torch.equal(mask.bits, want_mask.bits) and torch.equal(out, want)


@pytest.mark.parametrize("name", CONFIGS)
def test_appending_needs_the_keys_of_a_unit_that_was_cut(name: str) -> None:
    chunked = state(CONFIGS[name])
    q, k, v = prompt(1)
    chunked.append(k[:, :, :300])
    chunked.truncate(128)
    chunked.append(k[:, :, 128:300])  # whole units: as if nothing had happened
    chunked.truncate(130)
    with pytest.raises(ValueError, match=r"after truncate\(130\) the keys from position 128 on"):
        chunked.append(k[:, :, 130:300])
    chunked.prefill(q[:, :, 130:300], k[:, :, :300], v[:, :, :300])
    chunked.append(k[:, :, 300:400])
    chunk = (q[:, :, 400:], k, v)
    assert torch.equal(chunked.prefill(*chunk), straight(CONFIGS[name], 400, chunk)[0])


def test_wrong_lengths_are_refused() -> None:
    chunked = state(BANDS)
    chunked.append(prompt(1)[1][:, :, :300])
    for length in (-1, 301, 2.5):
        with pytest.raises(ValueError, match=rf"length is {length}; expected 0 to 300"):
            chunked.truncate(length)  # type: ignore[arg-type]
    assert chunked.length == 300


def test_autocast_pools_what_it_attends_to() -> None:
    q, k, v = prompt(1)
    low = [x.bfloat16() for x in (q, k, v)]
    want = state(BANDS).prefill(*low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(state(BANDS).prefill(q, k, v), want)
        chunked = state(BANDS)
        chunked.append(k[:, :, :300])
        assert torch.equal(chunked.prefill(q, k, v), want)
