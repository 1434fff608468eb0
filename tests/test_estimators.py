"""Estimators of one's own, by register_estimator."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import prism_cuda
from prism_cuda import BlockMask, PrismConfig

pytestmark = pytest.mark.usefixtures("needs_library")


def diagonal(
    q: torch.Tensor,
    k: torch.Tensor,
    config: PrismConfig,
    *,
    scale: float | None,
    causal: bool,
) -> BlockMask:
    """The first block and the four last of every row."""
    q_size, k_size = config.block_sizes
    rows = torch.arange(0, q.shape[2], q_size)[:, None] + k.shape[2] - q.shape[2]
    columns = torch.arange(0, k.shape[2], k_size)
    near = (columns > rows - 4 * k_size) | (columns == 0)
    kept = near.expand(*q.shape[:2], -1, -1)
    return BlockMask.from_dense(
        kept, q.shape[2], k.shape[2], q_block_size=q_size, k_block_size=k_size, causal=causal
    )


@pytest.fixture
def config() -> PrismConfig:
    prism_cuda.register_estimator("diagonal", diagonal)
    return PrismConfig(estimator="diagonal", block_size=64, dense_below=0)


def qkv(length: int = 900) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = torch.randn(1, 4, length, 64), torch.randn(1, 2, length, 64)
    return q, k, torch.randn_like(k)


def test_it_chooses_the_blocks(config: PrismConfig) -> None:
    q, k, v = qkv()
    with prism_cuda.record(masks=True) as recording:
        out, mask = prism_cuda.prefill(q, k, v, config=config, return_mask=True)
    expected = diagonal(q, k, config, scale=None, causal=True)
    assert torch.equal(mask.bits, expected.bits)
    assert torch.equal(out, prism_cuda.sparse_attention(q, k, v, expected))
    assert torch.equal(prism_cuda.select_blocks(q, k, config=config).bits, expected.bits)
    (call,) = recording.calls
    assert (call.path, call.estimator) == ("prism", "diagonal")
    assert call.density == expected.density() < 1
    with prism_cuda.record(times=True) as recording:
        assert torch.equal(prism_cuda.prefill(q, k, v, config=config), out)
    assert recording.calls[0].times.keys() == {"select", "attend"}
    choice = prism_cuda.dispatch(900, 900, 64, q.dtype, "cpu", config)
    assert (choice.path, choice.estimator) == ("prism", "diagonal")


def test_the_example_of_the_documentation_runs() -> None:
    page = Path(__file__).parents[1] / "docs" / "usage.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    (example,) = (block for block in blocks if "register_estimator" in block)
    q, k, v = qkv(4200)
    names = {"q": q[:, :, -300:], "k": k, "v": v}
    with prism_cuda.record() as recording:
        exec(example, names)
    assert names["out"].shape == names["q"].shape
    assert [call.estimator for call in recording.calls] == ["local"]
    assert 0.4 < recording.calls[0].density < 0.7


def test_it_serves_chunks(config: PrismConfig) -> None:
    q, k, v = qkv()
    chunked = prism_cuda.ChunkedPrefill(1, 2, 64, 900, config=config, device="cpu")
    chunked.prefill(q[:, :, :300], k[:, :, :300], v[:, :, :300])
    out = chunked.prefill(q[:, :, 300:], k, v)
    assert torch.equal(out, prism_cuda.prefill(q[:, :, 300:], k, v, config=config))


def test_it_serves_models(config: PrismConfig) -> None:
    pytest.importorskip("transformers", minversion="5")
    from helpers.models import MODELS

    prism_cuda.register(config, "prism-diagonal")
    model = MODELS["qwen3"].build()
    model.set_attn_implementation("prism-diagonal")
    with torch.no_grad(), prism_cuda.record() as recording:
        model(torch.randint(3, 90, (1, 500)))
    assert {call.estimator for call in recording.calls} == {"diagonal"}


def test_ragged_batches_are_refused(config: PrismConfig) -> None:
    q, k, v = (x[0].transpose(0, 1) for x in qkv())
    ends = torch.tensor([0, 900], dtype=torch.int32)
    with pytest.raises(ValueError, match="'diagonal'.*'grid' or 'bands' for a ragged batch"):
        prism_cuda.prefill_varlen(
            q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=900, max_seqlen_k=900,
            config=config,
        )  # fmt: skip


def test_wrong_results_are_refused(config: PrismConfig) -> None:
    q, k, v = qkv()
    results: dict[str, Any] = {
        "NoneType": None,
        r"q_len=900, k_len=900, .*\(128, 128\)": BlockMask.full(1, 4, 900, 900),
        "heads=1": BlockMask.full(1, 1, 900, 900, q_block_size=64, k_block_size=64),
    }
    for message, result in results.items():
        prism_cuda.register_estimator("wrong", lambda *args, result=result, **kwargs: result)
        wrong = PrismConfig(estimator="wrong", block_size=64, dense_below=0)
        with pytest.raises((TypeError, ValueError), match=message):
            prism_cuda.prefill(q, k, v, config=wrong)


def test_names_and_functions_are_checked() -> None:
    for name in ("", "auto", "all", "grid", "bands", 3):
        with pytest.raises(ValueError, match="register_estimator: name is"):
            prism_cuda.register_estimator(name, diagonal)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="register_estimator: function is None"):
        prism_cuda.register_estimator("none", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="estimator is 'nobody'; expected .* register_estimator"):
        PrismConfig(estimator="nobody")
