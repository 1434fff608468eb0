"""What is asked of every architecture: prism at top_p = 1 equals eager, in every way it is run."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

import prism_cuda
from models.architectures import Architecture
from prism_cuda import PrismConfig
from prism_cuda.integrations import support

PROMPT = 150
PADDING = 41
NEW_TOKENS = 3
# Forced to be sparse, every block kept; and what users get. With both estimators in turn.
BANDS, GRID = "prism-bands", "prism"
FORCED = {
    BANDS: PrismConfig(top_p=1.0, dense_below=0, block_size=64, estimator="bands"),
    GRID: PrismConfig(top_p=1.0, dense_below=0, block_size=64),
}
DEFAULT = "prism-default"


@dataclass
class Outcome:
    """What became of an architecture.

    Attributes:
        refused: the sentence, where prism refuses it.
        skipped: what eager attention itself cannot do, by check.
        wrong: what differs from eager, by check.
        no_bands: why estimator="bands" wants to be told of the rotation.
        paths: (path, reason) of the layers' attention to the prompt, forced to be sparse.
    """

    refused: str | None = None
    unbuilt: str | None = None
    no_bands: str | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    paths: set[tuple[str, str]] = field(default_factory=set)


def register() -> None:
    for name, config in FORCED.items():
        prism_cuda.register(config, name)
    prism_cuda.register(PrismConfig(), DEFAULT)


def check(architecture: Architecture, checks: tuple[str, ...] | None = None) -> Outcome:
    """Run all checks, or the named ones."""
    register()
    outcome = Outcome()
    reason = support.why_unsupported(architecture.model_class())
    if reason is not None:
        outcome.refused = reason
        return outcome
    try:
        model = architecture.build()
        inputs = architecture.inputs(2, PROMPT, model)
        with torch.no_grad():
            _logits(model, inputs)
    except (Exception, SystemExit) as error:
        outcome.unbuilt = _short(error)
        return outcome
    for name, run in CHECKS.items():
        if checks is not None and name not in checks:
            continue
        try:
            run(model, inputs, outcome)
        except _EagerCannot as error:
            outcome.skipped[name] = str(error)
        except NotImplementedError as error:
            if not str(error).startswith("prism:"):
                outcome.wrong[name] = _short(error)
            else:
                outcome.refused = str(error)
                return outcome
        except Exception as error:
            outcome.wrong[name] = _short(error)
        else:
            outcome.passed.append(name)
    return outcome


class _EagerCannot(Exception):
    pass


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


def _eager(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:
        raise _EagerCannot(_short(error)) from error


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    logits = model(**inputs).logits
    return logits[0] if isinstance(logits, tuple) else logits


def _close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Within what rounding does; NaN where eager has NaN."""
    scale = max(1.0, expected[expected.isfinite()].abs().max().item())
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    difference = (actual - expected).abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN"
    assert difference < 2e-4 * scale, f"{what}: differs by {difference:.2g} of {scale:.2g}"


def _text_key(inputs: dict[str, Any]) -> str:
    return "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"


def _padded(model: Any, inputs: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """The inputs with a left-padded row, and the logits that count."""
    real = torch.ones_like(inputs[_text_key(inputs)])
    real[0, :PADDING] = 0
    if "decoder_input_ids" in inputs:
        return inputs | {"decoder_attention_mask": real}, real.bool()
    return inputs | {"attention_mask": real}, real.bool()


def _compare(model: Any, inputs: dict[str, Any], outcome: Outcome | None, *names: str) -> None:
    model.set_attn_implementation("eager")
    expected = _eager(lambda: _logits(model, inputs))
    for name in names:
        model.set_attn_implementation(name)
        with prism_cuda.record() as recording:
            actual = _logits(model, inputs)
        _close(actual, expected, name)
        if outcome is not None:
            outcome.paths |= {(c.path, c.reason) for c in recording.calls if c.q_len >= 64}


def plain(model: Any, inputs: dict[str, Any], outcome: Outcome) -> None:
    _compare(model, inputs, outcome, GRID)
    try:
        _compare(model, inputs, None, BANDS)
    except ValueError as error:
        if not str(error).startswith("prism: "):
            raise
        outcome.no_bands = str(error)
    _compare(model, inputs, None, DEFAULT)


def _forced(outcome: Outcome) -> tuple[str, ...]:
    return (GRID,) if outcome.no_bands else (GRID, BANDS)


def padded(model: Any, inputs: dict[str, Any], outcome: Outcome) -> None:
    arguments, real = _padded(model, inputs)
    model.set_attn_implementation("eager")
    expected = _eager(lambda: _logits(model, arguments))
    for name in (*_forced(outcome), DEFAULT):
        model.set_attn_implementation(name)
        actual = _logits(model, arguments)
        _close(actual[real], expected[real], name)


def chunked(model: Any, inputs: dict[str, Any], outcome: Outcome) -> None:
    """A prompt in two chunks and a token."""
    key = _text_key(inputs)
    parameters = inspect.signature(model.forward).parameters
    cache_name = "cache" if "cache" in parameters else "past_key_values"

    @torch.no_grad()
    def run() -> torch.Tensor:
        cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
        parts = []
        if key == "decoder_input_ids":
            from transformers import EncoderDecoderCache

            cache = EncoderDecoderCache(cache, DynamicCache(config=model.config))
        for part in inputs[key].split((80, PROMPT - 81, 1), 1):
            outputs = model(**inputs | {key: part, cache_name: cache, "use_cache": True})
            parts.append(outputs.logits)
        return torch.cat(parts, 1)

    model.set_attn_implementation("eager")
    expected = _eager(run)
    for name in _forced(outcome):
        model.set_attn_implementation(name)
        _close(run(), expected, name)


def _generate(cache: str | None) -> Callable[[Any, dict[str, Any], Outcome], None]:
    def generated(model: Any, inputs: dict[str, Any], outcome: Outcome) -> None:
        if not model.can_generate():
            raise _EagerCannot("it does not generate")
        arguments, _ = _padded(model, inputs)
        options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        options |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        options |= {"pad_token_id": 0, "num_beams": 1}
        if cache is not None:
            options |= {"cache_implementation": cache, "disable_compile": True}

        def run() -> torch.Tensor:
            return torch.stack(model.generate(**arguments, **options).logits)

        model.set_attn_implementation("eager")
        expected = _eager(run)
        for name in (GRID, DEFAULT):
            model.set_attn_implementation(name)
            # Tokens that are as likely as one another may be swapped; so the first that differs.
            _close(run()[0], expected[0], name)
            actual = run()
            for got, want in zip(actual, expected, strict=True):
                _close(got, want, name)
                if not torch.equal(got.argmax(-1), want.argmax(-1)):
                    break

    return generated


def loaded(model: Any, inputs: dict[str, Any], outcome: Outcome) -> None:
    model.set_attn_implementation("eager")
    expected = _eager(lambda: _logits(model, inputs))
    with tempfile.TemporaryDirectory() as folder:
        _eager(lambda: model.save_pretrained(folder))
        load = type(model).from_pretrained
        again = _eager(lambda: load(folder, attn_implementation="eager", dtype=torch.float32))
        again = again.eval()
        _eager(lambda: _close(_logits(again, inputs), expected, "eager, loaded"))
        ours = load(folder, attn_implementation=GRID, dtype=torch.float32).eval()
    with prism_cuda.record() as recording:
        _close(_logits(ours, inputs), expected, "from_pretrained")
    took = {(c.path, c.reason) for c in recording.calls if c.q_len >= 64}
    assert took <= outcome.paths or not outcome.paths, f"from_pretrained: {took}"


CHECKS: dict[str, Callable[[Any, dict[str, Any], Outcome], None]] = {
    "plain": plain,
    "padded": padded,
    "chunked": chunked,
    "generate": _generate(None),
    "static cache": _generate("static"),
    "sliding cache": _generate("sliding_window"),
    "from_pretrained": loaded,
}
