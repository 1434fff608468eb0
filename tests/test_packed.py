"""The transformers attention function on packed sequences: one launch, without host reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5")

from helpers.models import MODELS  # noqa: E402

import prism_cuda  # noqa: E402
from prism_cuda import PrismConfig  # noqa: E402
from prism_cuda.integrations import packed  # noqa: E402

pytestmark = pytest.mark.usefixtures("needs_library")

CONFIG = PrismConfig(block_size=64, top_p=0.5, dense_below=128)
# A prompt, a chunk after a prefix, a decode step, a short prompt, nothing.
Q_LENS, K_LENS = (300, 100, 1, 50, 0), (300, 400, 260, 50, 0)
TRAILING = 29  # tokens of no sequence, as a CUDA graph pads them
LONGEST = {"max_length_q": 300, "max_length_k": 512}
SINKS = torch.tensor([0.5, -1.0, 4.0, 2.0])
HEADS = (4, 2, 2)


def inputs(
    head_dim: int = 64, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, ...]:
    """q, k, v (1, heads, tokens, D) as transposed views, like a model's, and both ends."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (sum(Q_LENS), sum(K_LENS), sum(K_LENS))
    tensors = [
        torch.randn(1, length + TRAILING, heads, head_dim, generator=generator)
        .to(device, dtype)
        .transpose(1, 2)
        for heads, length in zip(HEADS, lengths, strict=True)
    ]
    ends = [
        torch.tensor([0, *lengths], device=device).cumsum(0).int() for lengths in (Q_LENS, K_LENS)
    ]
    return *tensors, *ends


def layer(options: Any = ()) -> torch.nn.Module:
    """A layer whose model's own attention knows these options."""
    name = "gemma2" if "softcap" in options else "gpt-oss" if "s_aux" in options else "llama"
    module = MODELS[name].build().model.layers[0].self_attn
    if "s_aux" in options:
        module.sinks.data.copy_(SINKS)
    return module


def attention(config: PrismConfig) -> Any:
    prism_cuda.register(config, "prism-packed")
    return transformers.AttentionInterface()["prism-packed"]


def one_by_one(attend: Any, module: Any, tensors: tuple[Tensor, ...], **options: Any) -> Tensor:
    """Every sequence in a call of its own."""
    q, k, v, q_ends, k_ends = tensors
    parts = []
    for b in range(len(Q_LENS)):
        rows, keys = slice(*q_ends[b : b + 2].tolist()), slice(*k_ends[b : b + 2].tolist())
        if rows.start < rows.stop:
            one = (q[:, :, rows], k[:, :, keys], v[:, :, keys])
            parts.append(attend(module, *one, None, **options)[0])
    return torch.cat([*parts, parts[0].new_zeros(1, TRAILING, *parts[0].shape[2:])], 1)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "top_p_per_head": ({"top_p": (0.3, 0.9, 0.9, 0.3)}, {}),
    "dense_heads": ({"dense_heads": (1,)}, {}),
    "settings_of_the_layer": ({"layers": {0: {"top_p": 0.2, "keep_sink": 0}}}, {}),
    "scaling": ({}, {"scaling": 0.4}),
    "dense_layer": ({"dense_layers": 1}, {}),
    "softcap": ({}, {"softcap": 3.0}),
    "sinks": ({}, {"s_aux": SINKS}),
    "window": ({}, {"sliding_window": 70}),
    "window_softcap": ({}, {"sliding_window": 70, "softcap": 3.0}),
    "dense_layer_window_sinks": ({"dense_layers": 1}, {"sliding_window": 70, "s_aux": SINKS}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_batch_at_once_is_its_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("the host read the lengths")

    changes, options = CASES[name]
    config = dataclasses.replace(CONFIG, **changes)
    attend, module, tensors = attention(config), layer(options), inputs()
    expected = one_by_one(attend, module, tensors, **options)
    *qkv, q_ends, k_ends = tensors
    lengths: dict[str, Any] = {"cu_seq_lens_q": q_ends, "cu_seq_lens_k": k_ends}
    got_by_reading, _ = attend(module, *qkv, None, **lengths, **options)
    monkeypatch.setattr(packed, "_bounds", read)
    got, _ = attend(module, *qkv, None, **lengths, **LONGEST, **options)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(got_by_reading, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("head_dim", "changes", "options", "reason"),
    [
        (64, {}, {"dropout": 0.1}, "dropout"),
        (36, {}, {}, "head_dim must be a multiple of 8"),
    ],
)
def test_what_runs_one_by_one(
    head_dim: int, changes: Any, options: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = []
    bounds = packed._bounds

    def read(*arguments: Any) -> Any:
        reasons.append(arguments[-1])
        return bounds(*arguments)

    monkeypatch.setattr(packed, "_bounds", read)
    config = dataclasses.replace(CONFIG, bands=(16, 16), **changes)
    *qkv, q_ends, k_ends = tensors = inputs(head_dim)
    attend, module = attention(config), layer()
    torch.manual_seed(0)
    expected = one_by_one(attend, module, tensors, **options)
    torch.manual_seed(0)
    got, _ = attend(
        module, *qkv, None, cu_seq_lens_q=q_ends, cu_seq_lens_k=k_ends, **LONGEST, **options
    )
    torch.testing.assert_close(got, expected)
    assert len(reasons) == 1 and reason in reasons[0]


def test_the_record_tells_what_each_sequence_did() -> None:
    attend, module = attention(CONFIG), layer()
    *qkv, q_ends, k_ends = inputs()
    lengths: dict[str, Any] = {"cu_seq_lens_q": q_ends, "cu_seq_lens_k": k_ends} | LONGEST
    with prism_cuda.record() as recording:
        attend(module, *qkv, None, **lengths)
    calls = [(call.layer_idx, call.path, call.reason) for call in recording.calls]
    short = [
        (0, "dense", "decode: one query token"),
        (0, "dense", "q_len is less than one block of 64"),
    ]
    sparse = (0, "prism", "block-sparse")
    assert calls == [sparse, sparse, *short]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_a_captured_layer_follows_lengths_without_waiting(name: str) -> None:
    changes, options = CASES[name]
    options = {k: x.cuda() if isinstance(x, Tensor) else x for k, x in options.items()}
    attend, module = attention(dataclasses.replace(CONFIG, **changes)), layer(options)
    *qkv, q_ends, k_ends = inputs(dtype=torch.bfloat16, device="cuda")

    def run() -> Tensor:
        out, _ = attend(
            module, *qkv, None, cu_seq_lens_q=q_ends, cu_seq_lens_k=k_ends, **LONGEST, **options
        )
        return out

    run()  # loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x, new in zip(qkv, inputs(dtype=torch.bfloat16, device="cuda", seed=1), strict=False):
        x.copy_(new)
    for ends, lengths in ((q_ends, (100, 1, 1, 280, 0)), (k_ends, (310, 400, 7, 280, 0))):
        ends.copy_(torch.tensor([0, *lengths]).cumsum(0))
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured, run())
    assert captured.isfinite().all()
