"""The demo: one real model over long text, dense and with prism, side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prism_cuda import demo_model
from prism_cuda.config import PrismConfig
from prism_cuda.integrations import register
from prism_cuda.recording import CallRecord, record
from prism_cuda.tables import print_table

STAGES = ("pool", "select", "attend")

# The same short prompt for every implementation, so that no timing includes one-time set-up.
WARM_UP_TOKENS = 512

# Tokens whose logits exist at once: 16K of them would take gigabytes.
LOGIT_CHUNK = 1024

# Said early in the text and asked for at its end; dense attention finds it.
FACT = "\n# The special magic number for amber-harbor is: 4815162.\n"
FACT_POSITION = 0.05
QUESTION = "\n# The special magic number for amber-harbor is:"
ANSWER = "4815162"
ANSWER_TOKENS = 12

HOW_TO_READ = """\
How to read this: perplexity tells the quality (equal is as good as dense), density the share of
attention that was computed (1.00 is dense). The answer needs a line that stands at {position} of
the text; after the prefill it is decoded with dense attention. pool + select is the price of
estimating, attend the attention itself. In {output} each panel is a head: dark blocks were
computed, light skipped."""

ON_CPU = "On a CPU no kernel runs: these times say nothing about a GPU's."


@dataclass
class Run:
    """One forward pass over the whole text, and what the model then says."""

    perplexity: float
    seconds: float
    answer: str


def model_folder(name: str | None) -> Path:
    """The folder of a model: "smollm2" (None, downloaded once), "testbed" or a path.

    Raises:
        FileNotFoundError: for "testbed" outside a checkout, or a path without a model.
    """
    if name in (None, "smollm2"):
        return demo_model.fetch()
    if name == "testbed":
        for root in (Path(__file__).resolve().parents[1], Path.cwd()):
            folder = root / "examples" / "testbed"
            if (folder / "config.json").exists():
                return folder
        raise FileNotFoundError(
            "examples/testbed is not here; run from a checkout of the repository or pass --model"
        )
    if not (Path(name) / "config.json").exists():
        raise FileNotFoundError(f"--model is {name}; expected smollm2, testbed or a model's folder")
    return Path(name)


def run(
    model_path: Path,
    tokens: int | None,
    config: PrismConfig,
    layer: int | None,
    output: Path,
    json_path: Path | None = None,
) -> None:
    """Compare dense attention and prism on one model, print the result and draw one layer's masks.

    Args:
        model_path: folder of a causal language model and its tokenizer.
        tokens: tokens of standard-library text to prefill; None: 8192 on a GPU, 6144 on a CPU, and
            no more than the model takes.
        config: settings of prism.
        layer: the layer to draw; the middle one if None.
        output: PNG file to write.
        json_path: file for the figures of both passes, if any.

    Raises:
        ImportError: if transformers or matplotlib is missing.
        ValueError: if the model does not take so many tokens, the layer does not exist or nothing
            in it ran sparse.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(
            "the demo needs transformers >= 5.17: pip install 'prism-cuda[hf]'"
        ) from error
    register(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    model.to(device).eval()
    settings = model.config.get_text_config()
    tokens = _checked_tokens(tokens, settings.max_position_embeddings, device)
    layers = settings.num_hidden_layers
    layer = layers // 2 if layer is None else layer
    if not 0 <= layer < layers:
        raise ValueError(f"--layer is {layer}; expected 0 to {layers - 1}")
    input_ids = demo_tokens(tokenizer, tokens).to(device)
    print(f"{model_path.name}: {tokens} tokens of the standard library, {dtype} on {device.type}")

    model.set_attn_implementation("sdpa")
    dense = _forward(model, tokenizer, input_ids, "dense")
    model.set_attn_implementation("prism")
    with record(masks=True, times=True) as recording:
        sparse = _forward(model, tokenizer, input_ids, "prism")
    calls = [call for call in recording.calls if call.q_len == tokens]

    print_table(
        "Whole forward pass",
        ("attention", "perplexity", "density", "seconds", f"answer ({ANSWER} is right)"),
        [_run_row("dense (sdpa)", dense, 1.0), _run_row("prism", sparse, _density(calls))],
    )
    print_table(
        "Prism by layer, times in ms",
        ("layer", "path", "density", *STAGES),
        [_call_row(call) for call in calls] + [_mean_row(calls)],
    )
    _draw(calls, layer, output)
    if json_path is not None:
        figures = {
            "model": model_path.name,
            "tokens": tokens,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "config": config.to_dict(),
            "dense": dataclasses.asdict(dense),
            "prism": dataclasses.asdict(sparse) | {"density": _density(calls)},
            "prism_attention_seconds": {
                stage: sum(call.times.get(stage, 0.0) for call in calls) for stage in STAGES
            },
        }
        json_path.write_text(json.dumps(figures, indent=1) + "\n")
    print()
    print(HOW_TO_READ.format(output=output, position=f"{100 * FACT_POSITION:g} %"))
    if device.type == "cpu":
        print(ON_CPU)


def _checked_tokens(tokens: int | None, limit: int, device: torch.device) -> int:
    room = limit - ANSWER_TOKENS
    if tokens is None:
        return min(8192 if device.type == "cuda" else 6144, room)
    if not WARM_UP_TOKENS <= tokens <= room:
        raise ValueError(
            f"--tokens is {tokens}; expected {WARM_UP_TOKENS} to {room}, the model's {limit} "
            f"positions less {ANSWER_TOKENS} for the answer"
        )
    return tokens


def demo_tokens(tokenizer: Any, tokens: int) -> torch.Tensor:
    """``tokens`` tokens of standard-library text with the fact and the question: int64 (1, n).

    Raises:
        ValueError: if the library holds fewer.
    """
    fact, question = (_encode(tokenizer, text) for text in (FACT, QUESTION))
    ids: list[int] = []
    for source in _standard_library():
        ids += _encode(tokenizer, source)
        if len(ids) >= tokens:
            at = int(FACT_POSITION * tokens)
            text = ids[:at] + fact + ids[at:]
            return torch.tensor([text[: tokens - len(question)] + question])
    raise ValueError(f"--tokens is {tokens}; the standard library has only {len(ids)}")


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _standard_library() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


@torch.inference_mode()
def _forward(model: Any, tokenizer: Any, input_ids: torch.Tensor, name: str) -> Run:
    model(input_ids[:, :WARM_UP_TOKENS], use_cache=False, logits_to_keep=1)
    _wait(input_ids.device)
    with _progress(model, name):
        start = time.perf_counter()
        prefilled = model.base_model(input_ids, use_cache=True)
        _wait(input_ids.device)
        seconds = time.perf_counter() - start
    hidden, cache = prefilled.last_hidden_state[0], prefilled.past_key_values
    perplexity = math.exp(nats_of(model, hidden[:-1], input_ids[0, 1:]))
    answer = [int(logits_of(model, hidden[-1:]).argmax())]
    while len(answer) < ANSWER_TOKENS:
        last = torch.tensor([[answer[-1]]], device=input_ids.device)
        hidden = model.base_model(last, past_key_values=cache, use_cache=True).last_hidden_state
        answer.append(int(logits_of(model, hidden[0]).argmax()))
    return Run(perplexity, seconds, tokenizer.decode(answer).strip().split("\n")[0])


@contextlib.contextmanager
def _progress(model: Any, name: str) -> Iterator[None]:
    """A bar over the layers of one forward pass, on a terminal; transformers brings tqdm."""
    from tqdm import tqdm

    layers = model.base_model.layers
    with tqdm(total=len(layers), desc=name, unit="layer", leave=False, disable=None) as bar:
        hooks = [layer.register_forward_hook(lambda *_: _advance(bar)) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _advance(bar: Any) -> None:
    bar.update()  # what it returns must not reach the hook, which would replace the layer's output


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits in float32 of last hidden states."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * (logits / cap).tanh()


def nats_of(model: Any, hidden: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean negative log-likelihood of the targets, from the hidden states that predict them."""
    total = 0.0
    chunks = zip(hidden.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK), strict=True)
    for chunk, target in chunks:
        logits = logits_of(model, chunk)
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
    return total / len(targets)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _density(calls: list[CallRecord]) -> float:
    return sum(call.density for call in calls) / max(len(calls), 1)


def _run_row(name: str, run: Run, density: float) -> tuple[str, ...]:
    return name, f"{run.perplexity:.3f}", f"{density:.3f}", f"{run.seconds:.2f}", run.answer


def _call_row(call: CallRecord) -> tuple[str, ...]:
    times = (f"{1e3 * call.times[name]:.2f}" if name in call.times else "" for name in STAGES)
    return str(call.layer_idx), call.path, f"{call.density:.3f}", *times


def _mean_row(calls: list[CallRecord]) -> tuple[str, ...]:
    sums = (sum(call.times.get(name, 0.0) for call in calls) for name in STAGES)
    return "all", "", f"{_density(calls):.3f}", *(f"{1e3 * seconds:.2f}" for seconds in sums)


def _draw(calls: list[CallRecord], layer: int, output: Path) -> None:
    drawn = [call for call in calls if call.layer_idx == layer]
    if not drawn or drawn[0].mask is None:
        reason = drawn[0].reason if drawn else "it made no attention call"
        raise ValueError(f"layer {layer} has no block mask to draw: {reason}")
    title = f"Layer {layer}: block masks, density {drawn[0].density:.2f}"
    drawn[0].mask.plot(output, title=title)
