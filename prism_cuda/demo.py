"""The demo: one real model over long source code, dense and with prism, side by side."""

from __future__ import annotations

import math
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prism_cuda.config import PrismConfig
from prism_cuda.integrations import register
from prism_cuda.recording import CallRecord, record
from prism_cuda.tables import print_table

STAGES = ("pool", "select", "attend")

# The same short prompt for every implementation, so that no timing includes one-time set-up.
WARM_UP_TOKENS = 512

HOW_TO_READ = """\
How to read this: perplexity tells the quality (equal is as good as dense), density the share of
attention that was computed (1.00 is dense). pool + select is the price of estimating, attend the
attention itself. In {output} each panel is a head: dark blocks were computed, light skipped."""

ON_CPU = "On a CPU the reference implementation runs: its times say nothing about the kernels."


@dataclass
class Run:
    """One forward pass over the whole text."""

    perplexity: float
    seconds: float


def default_model() -> Path:
    """The model that the repository ships.

    Raises:
        FileNotFoundError: outside a checkout.
    """
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        folder = root / "examples" / "testbed"
        if (folder / "config.json").exists():
            return folder
    raise FileNotFoundError(
        "examples/testbed is not here; run from a checkout of the repository or pass --model PATH"
    )


def run(
    model_path: Path, tokens: int, config: PrismConfig, layer: int | None, output: Path
) -> None:
    """Compare dense attention and prism on one model, print the result and draw one layer's masks.

    Args:
        model_path: folder of a causal language model and its tokenizer.
        tokens: tokens of standard-library source to prefill.
        config: settings of prism.
        layer: the layer to draw; the middle one if None.
        output: PNG file to write.

    Raises:
        ImportError: if transformers or matplotlib is missing.
        ValueError: if the layer does not exist or nothing in it ran sparse.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(
            "the demo needs transformers >= 5: pip install 'prism-cuda[hf]'"
        ) from error
    register(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    model.to(device).eval()
    layers = model.config.get_text_config().num_hidden_layers
    layer = layers // 2 if layer is None else layer
    if not 0 <= layer < layers:
        raise ValueError(f"--layer is {layer}; expected 0 to {layers - 1}")
    input_ids = standard_library_tokens(tokenizer, tokens).to(device)
    print(f"{model_path}: {tokens} tokens of standard-library source, {dtype} on {device.type}")

    model.set_attn_implementation("sdpa")
    dense = _forward(model, input_ids)
    model.set_attn_implementation("prism")
    with record(masks=True, times=True) as recording:
        sparse = _forward(model, input_ids)
    calls = [call for call in recording.calls if call.q_len == tokens]

    print_table(
        "Whole forward pass",
        ("attention", "perplexity", "seconds"),
        [_run_row("dense (sdpa)", dense), _run_row("prism", sparse)],
    )
    print_table(
        "Prism by layer, times in ms",
        ("layer", "path", "density", *STAGES),
        [_call_row(call) for call in calls] + [_mean_row(calls)],
    )
    _draw(calls, layer, output)
    print()
    print(HOW_TO_READ.format(output=output))
    if device.type == "cpu":
        print(ON_CPU)


def standard_library_tokens(tokenizer: Any, tokens: int) -> torch.Tensor:
    """The first ``tokens`` tokens of this Python's standard library, file by file: int64 (1, n).

    Raises:
        ValueError: if the library holds fewer.
    """
    ids: list[int] = []
    for source in _standard_library():
        ids += tokenizer(source, add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            return torch.tensor([ids[:tokens]])
    raise ValueError(f"--tokens is {tokens}; the standard library has only {len(ids)}")


def _standard_library() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


@torch.inference_mode()
def _forward(model: torch.nn.Module, input_ids: torch.Tensor) -> Run:
    model(input_ids[:, :WARM_UP_TOKENS], use_cache=False)
    _wait(input_ids.device)
    start = time.perf_counter()
    logits = model(input_ids, use_cache=False).logits
    _wait(input_ids.device)
    seconds = time.perf_counter() - start
    return Run(_perplexity(logits[0, :-1], input_ids[0, 1:]), seconds)


def _perplexity(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood, in chunks to keep float32 copies small."""
    total = 0.0
    for chunk, target in zip(logits.split(1024), targets.split(1024), strict=True):
        loss = torch.nn.functional.cross_entropy(chunk.float(), target, reduction="sum")
        total += float(loss)
    return math.exp(total / len(targets))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _run_row(name: str, run: Run) -> tuple[str, ...]:
    return name, f"{run.perplexity:.3f}", f"{run.seconds:.2f}"


def _call_row(call: CallRecord) -> tuple[str, ...]:
    times = (f"{1e3 * call.times[name]:.2f}" if name in call.times else "" for name in STAGES)
    return str(call.layer_idx), call.path, f"{call.density:.3f}", *times


def _mean_row(calls: list[CallRecord]) -> tuple[str, ...]:
    density = sum(call.density for call in calls) / len(calls)
    sums = (sum(call.times.get(name, 0.0) for call in calls) for name in STAGES)
    return "all", "", f"{density:.3f}", *(f"{1e3 * seconds:.2f}" for seconds in sums)


def _draw(calls: list[CallRecord], layer: int, output: Path) -> None:
    drawn = [call for call in calls if call.layer_idx == layer]
    if not drawn or drawn[0].mask is None:
        reason = drawn[0].reason if drawn else "it made no attention call"
        raise ValueError(f"layer {layer} has no block mask to draw: {reason}")
    title = f"Layer {layer}: block masks, density {drawn[0].density:.2f}"
    drawn[0].mask.plot(output, title=title)
