#!/usr/bin/env python3
"""Train the testbed: a small Qwen3-style language model that really uses a long context.

The corpus is the Python source installed next to this interpreter (site-packages), package by
package and folder by folder; the standard library is held out, vendored copies of it included. Part
of the training sequences get synthetic copies: spans that reappear up to a whole context later.
Context grows in phases, and the learning rate falls to zero over the last two of them. Phases and
learning rate follow elapsed time, so a run always ends with a finished model. With --yarn the
phases up to the longest context over its factor are trained with plain RoPE, the longer ones with
YaRN, as models that were extended this way.

    python bench/quality/train_testbed.py --minutes 7 --out examples/testbed
    python bench/quality/train_testbed.py --smoke --out /tmp/testbed     # CPU, under a minute
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import tokenizers
import torch
import transformers
from corpus import TextLimits
from eval_testbed import evaluate
from optimizer import MixedPrecision, learning_rate_scale
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config, Qwen3ForCausalLM


@dataclass(frozen=True)
class Phase:
    seq_len: int
    share: float  # of the training time
    batch_tokens: int


@dataclass(frozen=True)
class Recipe:
    """Everything that differs between two runs besides time and seed."""

    phases: tuple[Phase, ...] = (
        Phase(2048, 0.28, 65536),
        Phase(8192, 0.25, 131072),
        Phase(16384, 0.27, 131072),
        Phase(32768, 0.20, 131072),
    )
    hidden: int = 256
    intermediate: int = 768
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    text: TextLimits = TextLimits(vocab=4096)
    eval_options: dict[str, Any] = field(default_factory=dict)


SMOKE = Recipe(
    phases=(Phase(128, 0.4, 2048), Phase(256, 0.3, 2048), Phase(512, 0.3, 2048)),
    hidden=128,
    intermediate=256,
    layers=2,
    text=TextLimits(vocab=1024, max_chars=1_500_000, tokenizer_chars=500_000),
    eval_options=dict(
        contexts=(64, 256, 448), distances=(128, 256), max_windows=8, n_samples=4, max_files=40
    ),
)


class Sampler:
    """Training batches from a token stream, some sequences with synthetic copies planted."""

    def __init__(
        self, tokens: np.ndarray, vocab: int, copy_share: float, rng: np.random.Generator
    ) -> None:
        self.tokens, self.vocab, self.copy_share, self.rng = tokens, vocab, copy_share, rng
        self._starts: dict[int, Iterator[int]] = {}

    def batch(self, seq_len: int, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(input ids, labels), each int64 [n_rows, seq_len]; label -100 is not trained on."""
        starts = self._starts.setdefault(seq_len, self._shuffled_starts(seq_len + 1))
        row_starts = islice(starts, n_rows)
        rows = np.stack([self.tokens[i : i + seq_len + 1] for i in row_starts])
        rows = rows.astype(np.int64)
        labels = rows.copy()
        for row, label in zip(rows, labels, strict=True):
            self.plant(row, label)
        return torch.from_numpy(rows[:, :-1]), torch.from_numpy(labels[:, 1:])

    def plant(self, row: np.ndarray, label: np.ndarray) -> None:
        """Change one sequence in place; both arrays hold one token more than is trained on."""
        if self.rng.random() < self.copy_share:
            self._plant_copies(row, label)

    def _shuffled_starts(self, length: int) -> Iterator[int]:
        """Window starts, epoch after epoch, each epoch shuffled and shifted."""
        while True:
            shift = self.rng.integers(length)
            yield from self.rng.permutation(np.arange(shift, len(self.tokens) - length, length))

    def _plant_copies(self, row: np.ndarray, label: np.ndarray) -> None:
        """Overwrite spans of `row` with copies of earlier spans, about one per 512 tokens."""
        rng = self.rng
        for _ in range(rng.integers(1, max(2, len(row) // 512) + 1)):
            span = min(int(2 ** rng.uniform(4, 7)), len(row) // 4)
            if rng.random() < 0.5:
                distance = int(2 ** rng.uniform(np.log2(span), np.log2(len(row) - span)))
            else:
                distance = int(rng.integers(span, len(row) - span))
            source = int(rng.integers(0, len(row) - span - distance + 1))
            first = slice(source, source + span)
            second = slice(source + distance, source + distance + span)
            if rng.random() < 0.5:
                row[first] = rng.integers(1, self.vocab, span)
                label[first] = -100  # noise, not predictable
            row[second] = label[second] = row[first]
            label[second.start] = -100  # nothing announces a copy


# ---------------------------------------------------------------------------- model, optimizers


def build_model(recipe: Recipe, rope: dict[str, Any]) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=recipe.text.vocab,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.phases[-1].seq_len,
        rope_parameters=rope,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config)


def chunk_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def language_model_loss(
    model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor, chunk: int = 16384
) -> torch.Tensor:
    """Mean cross entropy; logits exist for `chunk` tokens at a time, and again in backward."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    weight, labels = model.lm_head.weight, labels.flatten()
    parts = [
        checkpoint(chunk_loss, h, weight, y, use_reentrant=False)
        for h, y in zip(hidden.split(chunk), labels.split(chunk), strict=True)
    ]
    return torch.stack(parts).sum() / (labels != -100).sum()


def use_sdp_backends(*names: str) -> None:
    """Allow only these scaled-dot-product-attention backends on CUDA."""
    torch.backends.cuda.enable_flash_sdp("flash" in names)
    torch.backends.cuda.enable_cudnn_sdp("cudnn" in names)
    torch.backends.cuda.enable_mem_efficient_sdp("efficient" in names)
    torch.backends.cuda.enable_math_sdp("math" in names)


def choose_attention(recipe: Recipe) -> str:
    """The faster of FlashAttention and cuDNN, forward and backward, at the model's head shape."""
    seq_len, dim = recipe.phases[-1].seq_len, recipe.head_dim
    options: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q = torch.randn(2, seq_len, recipe.heads, dim, **options)
    k, v = (torch.randn(2, seq_len, recipe.kv_heads, dim, **options) for _ in "kv")
    grad = torch.randn(2, recipe.heads, seq_len, dim, device="cuda", dtype=torch.bfloat16)
    times: dict[str, float] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name in ("flash", "cudnn"):
        use_sdp_backends(name)
        try:
            for _ in range(4):
                torch.cuda.synchronize()
                start = time.perf_counter()
                qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
                out = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, enable_gqa=True)
                out.backward(grad)
                torch.cuda.synchronize()
                times[name] = min(times.get(name, math.inf), time.perf_counter() - start)
            outputs[name] = out.detach()
        except RuntimeError as error:
            times.pop(name, None)
            print(f"attention {name}: not available ({str(error)[:200]})", flush=True)
    if len(outputs) == 2:
        difference = (outputs["flash"] - outputs["cudnn"]).abs().max().item()
        if not difference < 0.05:
            times.pop("cudnn")
    milliseconds = {name: round(1e3 * seconds, 2) for name, seconds in times.items()}
    print(f"attention forward + backward at {seq_len} tokens, ms: {milliseconds}", flush=True)
    return min(times, key=lambda name: times[name])


def warm_up(
    model: Qwen3ForCausalLM, phases: Sequence[Phase], device: torch.device, max_seconds: float = 60
) -> list[int]:
    """Compile the decoder layers for the phases' shapes, as many as fit into `max_seconds`.

    Returns the sequence lengths compiled; the others, or all if the compiler fails, run eagerly.
    """
    start = time.perf_counter()

    def loss_of(phase: Phase) -> float:
        rows = phase.batch_tokens // phase.seq_len
        ids = torch.zeros(rows, phase.seq_len, dtype=torch.int64, device=device)
        ids += torch.arange(phase.seq_len, device=device) % model.config.vocab_size
        loss = language_model_loss(model, ids, ids.roll(-1, 1))
        loss.backward()
        for param in model.parameters():
            param.grad = None
        return loss.item()

    eager = loss_of(phases[0])
    try:
        torch._dynamo.config.recompile_limit = 64
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        seq_lens: list[int] = []
        for phase in phases:
            if time.perf_counter() - start < max_seconds:
                loss = loss_of(phase)
                seq_lens.append(phase.seq_len)
                if phase is phases[0] and not abs(loss - eager) < 0.02:
                    raise ValueError(f"loss is {loss} compiled, {eager} in eager mode")
        torch.compiler.set_stance("eager_on_recompile")
    except Exception as error:  # any failure of the compiler only costs speed
        print(f"torch.compile not used: {str(error)[:300]}", flush=True)
        torch._dynamo.reset()
        for layer in model.model.layers:
            layer._compiled_call_impl = None
        return []
    print(f"torch.compile: {time.perf_counter() - start:.0f} s for lengths {seq_lens}", flush=True)
    return seq_lens


def set_rope(model: Qwen3ForCausalLM, parameters: dict[str, Any]) -> None:
    """Rotate queries and keys by these rope_parameters from now on."""
    model.config.rope_parameters = parameters
    old = model.model.rotary_emb
    model.model.rotary_emb = type(old)(model.config).to(old.inv_freq.device)


def save_model(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write the weights beside the old ones, then swap: a killed run leaves a whole file."""
    beside = folder.with_name(folder.name + ".new")
    model.config.dtype = torch.bfloat16
    model.save_pretrained(beside)
    for path in beside.iterdir():
        path.replace(folder / path.name)
    beside.rmdir()


def train(
    model: Qwen3ForCausalLM,
    optimizer: MixedPrecision,
    sampler: Sampler,
    recipe: Recipe,
    args: argparse.Namespace,
    device: torch.device,
    seconds: float,
) -> list[dict[str, Any]]:
    """Train for `seconds`; returns steps, tokens and last loss of each phase."""
    ends = np.cumsum([phase.share for phase in recipe.phases])
    report: list[dict[str, Any]] = [
        asdict(phase) | {"steps": 0, "tokens": 0, "seconds": 0.0} for phase in recipe.phases
    ]
    step, saved, waiting = 0, False, None
    start = last_time = time.perf_counter()
    with open(args.out / "train_log.jsonl", "w") as log:
        while (elapsed := time.perf_counter() - start) < seconds:
            done = elapsed / seconds
            index = min(int(np.searchsorted(ends, done, side="right")), len(ends) - 1)
            phase = recipe.phases[index]
            parameters = rope_parameters(args, phase.seq_len, recipe.phases[-1].seq_len)
            if parameters["rope_type"] != model.config.rope_parameters["rope_type"]:
                set_rope(model, parameters)
            batch = sampler.batch(phase.seq_len, phase.batch_tokens // phase.seq_len)
            if device.type == "cuda":  # from pageable memory the copy would wait for the GPU
                batch = (batch[0].pin_memory(), batch[1].pin_memory())
            ids, labels = (x.to(device, non_blocking=True) for x in batch)
            loss = language_model_loss(model, ids, labels)
            loss.backward()
            scale = learning_rate_scale(done, args.decay_from)
            norm = optimizer.step(scale)
            step += 1
            now = time.perf_counter()
            entry = report[index]
            entry["steps"] += 1
            entry["tokens"] += phase.batch_tokens
            entry["seconds"] = round(entry["seconds"] + now - last_time, 3)
            last_time = now

            if waiting is not None:  # the step before this one: the GPU is never idle
                value = waiting.item()
                entry["loss"] = value
                if not math.isfinite(value):
                    sys.exit(f"loss is {value} at step {step - 1}: stopping")
                if step % args.log_every == 1:
                    line = {
                        "step": step - 1,
                        "seconds": round(elapsed, 2),
                        "seq_len": phase.seq_len,
                        "loss": round(value, 4),
                        "grad_norm": round(norm.item(), 3),
                        "lr_scale": round(scale, 4),
                        "tokens_per_second": round(entry["tokens"] / entry["seconds"]),
                    }
                    print(json.dumps(line), file=log, flush=True)
                    if step % (5 * args.log_every) == 1:
                        print(json.dumps(line), flush=True)
            waiting = loss.detach()
            if device.type == "cuda" and 20 < elapsed < 25:
                rate = sum(row["tokens"] for row in report) / elapsed
                if rate < args.min_rate:
                    sys.exit(f"only {rate:.0f} tokens/s, --min-rate is {args.min_rate}: stopping")
            if not saved and done > 0.9:
                save_model(model, args.out)
                saved = True
    return report


def parse_args(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--minutes", type=float, default=8.0, help="training time (default: 8)")
    parser.add_argument(
        "--total-minutes",
        type=float,
        default=math.inf,
        help="shorten training so that everything, evaluation included, takes no longer",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny model and corpus, for a CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, corpus and batches")
    parser.add_argument(
        "--corpus",
        type=Path,
        default=Path(sysconfig.get_paths()["purelib"]),
        help="folder of packages to train on (default: this interpreter's site-packages)",
    )
    parser.add_argument("--muon-lr", type=float, default=0.02, help="learning rate of matrices")
    parser.add_argument("--adam-lr", type=float, default=3e-3, help="of embeddings and norms")
    parser.add_argument("--decay-from", type=float, default=0.53, help="share of time before decay")
    parser.add_argument("--copy-share", type=float, default=0.25, help="sequences with copies")
    parser.add_argument("--rope-theta", type=float, default=1e6, help="base (default: 1e6)")
    parser.add_argument(
        "--yarn",
        type=float,
        default=1.0,
        help="factor of YaRN in the long phases (default: 1, none)",
    )
    parser.add_argument("--no-eval", action="store_true", help="end when the model is saved")
    parser.add_argument("--no-compile", action="store_true", help="never use torch.compile")
    parser.add_argument("--min-rate", type=float, default=1e5, help="tokens/s below which to stop")
    parser.add_argument("--log-every", type=int, default=20, metavar="STEPS")
    args = parser.parse_args()
    args.device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    if args.smoke:
        args.minutes = min(args.minutes, 0.25)
    return args


MakeSampler = Callable[[np.ndarray, Recipe, argparse.Namespace], Sampler]


def plain_sampler(tokens: np.ndarray, recipe: Recipe, args: argparse.Namespace) -> Sampler:
    rng = np.random.default_rng(args.seed)
    return Sampler(tokens, recipe.text.vocab, args.copy_share, rng)


def rope_parameters(args: argparse.Namespace, seq_len: int, longest: int) -> dict[str, Any]:
    """transformers' description of the rotation of a phase that trains ``seq_len`` tokens.

    Args:
        longest: tokens of the last phase, whose context YaRN reaches.
    """
    original = int(longest / args.yarn)
    if seq_len <= original:
        return {"rope_type": "default", "rope_theta": args.rope_theta}
    return {
        "rope_type": "yarn",
        "rope_theta": args.rope_theta,
        "factor": args.yarn,
        "original_max_position_embeddings": original,
    }


def run(
    recipe: Recipe, smoke: Recipe, make_sampler: MakeSampler, description: str | None
) -> argparse.Namespace:
    """Train, save and evaluate as the command line asks; returns its arguments."""
    begin = time.perf_counter()
    args = parse_args(description)
    recipe = smoke if args.smoke else recipe
    device = torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"

    corpus.index_stdlib(Path(sysconfig.get_paths()["stdlib"]))
    pool = multiprocessing.get_context("fork").Pool()  # before CUDA starts, for it cannot be forked
    with pool, ThreadPoolExecutor(1) as executor:
        longest = recipe.phases[-1].seq_len
        text = executor.submit(
            corpus.prepare_corpus, args.corpus, recipe.text, args.seed, args.out, longest, pool
        )
        first = recipe.phases[0].seq_len
        model = build_model(recipe, rope_parameters(args, first, longest))
        model.to(device)  # type: ignore[arg-type]
        n_params = sum(param.numel() for param in model.parameters())
        print(f"model: {n_params:,} parameters on {device}", flush=True)
        optimizer = MixedPrecision(model, args.muon_lr, args.adam_lr)
        attention, compiled = "sdpa", list[int]()
        if device.type == "cuda":
            attention = choose_attention(recipe)
            use_sdp_backends(attention, "efficient")
            if not args.no_compile:
                compiled = warm_up(model, recipe.phases, device)
        tokens, corpus_report = text.result()
    sampler = make_sampler(tokens, recipe, args)

    reserved = 5 if args.smoke or args.no_eval else 50  # seconds for evaluation and saving
    left = 60 * args.total_minutes - (time.perf_counter() - begin) - reserved
    seconds = min(60 * args.minutes, left)
    print(f"training for {seconds:.0f} s", flush=True)
    phases = train(model, optimizer, sampler, recipe, args, device, seconds)
    save_model(model, args.out)
    print(json.dumps(phases, indent=1), flush=True)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "seed": args.seed,
        "parameters": n_params,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "attention": attention,
        "compiled_seq_lens": compiled,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "training_seconds": round(seconds, 1),
        "phases": phases,
        "corpus": corpus_report,
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")

    if args.no_eval:
        return args
    use_sdp_backends("flash", "cudnn", "efficient", "math")
    results = evaluate(args.out, device, seed=args.seed, **recipe.eval_options)
    (args.out / "eval.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"done in {time.perf_counter() - begin:.0f} s", flush=True)
    return args


if __name__ == "__main__":
    run(Recipe(), SMOKE, plain_sampler, __doc__)
