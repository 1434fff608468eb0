#!/usr/bin/env python3
"""Train the testbed: a small Qwen3-style language model that really uses a long context.

The corpus is the Python source installed next to this interpreter (site-packages), package by
package and folder by folder; the standard library is held out, vendored copies of it included. Part
of the training sequences get synthetic copies: spans that reappear up to a whole context later.
Context grows in phases, and the learning rate falls to zero over the last two of them. Phases and
learning rate follow elapsed time, so a run always ends with a finished model.

    python bench/quality/train_testbed.py --minutes 7 --out examples/testbed
    python bench/quality/train_testbed.py --smoke --out /tmp/testbed     # CPU, under a minute
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import sys
import sysconfig
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from eval_testbed import END_OF_FILE, as_document, evaluate, python_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VENDORED = frozenset(
    ("_vendor", "vendor", "vendored", "extern", "externals", "third_party", "thirdparty")
    + ("_distutils", "backports", "importlib_metadata", "importlib_resources")
)
TESTS = frozenset(("test", "tests"))


@dataclass(frozen=True)
class Phase:
    seq_len: int
    share: float  # of the training time
    batch_tokens: int


@dataclass(frozen=True)
class Recipe:
    """Everything that differs between the real run and the smoke run."""

    phases: tuple[Phase, ...] = (
        Phase(2048, 0.28, 65536),
        Phase(8192, 0.25, 131072),
        Phase(16384, 0.27, 131072),
        Phase(32768, 0.20, 131072),
    )
    hidden: int = 256
    intermediate: int = 768
    layers: int = 6
    vocab: int = 4096
    max_chars: int = 200_000_000
    tokenizer_chars: int = 40_000_000
    eval_options: dict[str, Any] = field(default_factory=dict)


SMOKE = Recipe(
    phases=(Phase(128, 0.4, 2048), Phase(256, 0.3, 2048), Phase(512, 0.3, 2048)),
    hidden=128,
    intermediate=256,
    layers=2,
    vocab=1024,
    max_chars=1_500_000,
    tokenizer_chars=500_000,
    eval_options=dict(
        contexts=(64, 256, 448), distances=(128, 256), max_windows=8, n_samples=4, max_files=40
    ),
)


# --------------------------------------------------------------------------------------- corpus


class StdlibIndex:
    """Finds files that share much of their text with one file of the standard library."""

    MIN_SHARE = 0.3  # of the distinct lines of either file
    MIN_LINES = 8  # fewer lines in common never count as a copy
    MAX_FILES = 8  # a line found in more files than this is boilerplate

    def __init__(self, stdlib: Path) -> None:
        files_of_line: dict[str, list[int]] = defaultdict(list)
        self.size: list[int] = []
        for index, path in enumerate(python_files(stdlib)):
            lines = distinct_lines(path.read_text(encoding="utf-8", errors="ignore"))
            self.size.append(len(lines))
            for line in lines:
                files_of_line[line].append(index)
        self.files_of_line = {k: v for k, v in files_of_line.items() if len(v) <= self.MAX_FILES}

    def is_copy(self, text: str) -> bool:
        lines = distinct_lines(text)
        in_common = Counter(i for line in lines for i in self.files_of_line.get(line, ()))
        return any(
            count >= self.MIN_LINES and count >= self.MIN_SHARE * min(len(lines), self.size[index])
            for index, count in in_common.most_common(20)
        )


def distinct_lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= 12}


def is_generated(text: str) -> bool:
    """Tables, minified code and machine-written modules: nothing a reader would call source."""
    lines = text.splitlines()
    if len(text) > 300_000 or max(map(len, lines), default=0) > 1000:
        return True
    if len(text) / max(len(lines), 1) > 90:
        return True
    if len(lines) > 200 and len(set(lines)) < 0.35 * len(lines):
        return True
    return sum(map(str.isdigit, text)) > 0.2 * len(text)


@dataclass(frozen=True)
class SourceFile:
    root: Path
    path: Path  # relative to root
    chars: int

    @property
    def package(self) -> str:
        return self.path.parts[0].removesuffix(".py")

    def document(self) -> str:
        text = (self.root / self.path).read_text(encoding="utf-8", errors="ignore")
        return as_document(self.path, text)


_stdlib_index: StdlibIndex | None = None  # built before the worker processes fork


def screen_file(path: Path) -> tuple[str, int, bytes]:
    """(verdict, characters, digest) of one file; only the verdict 'ok' is trained on."""
    assert _stdlib_index is not None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "unreadable", 0, b""
    digest = hashlib.sha1("\n".join(map(str.strip, text.splitlines())).encode()).digest()
    if len(text) < 200:
        return "tiny", len(text), digest
    if is_generated(text):
        return "generated", len(text), digest
    if _stdlib_index.is_copy(text):
        return "standard library copy", len(text), digest
    return "ok", len(text), digest


def find_corpus(
    root: Path, max_chars: int, rng: np.random.Generator, pool: Any
) -> tuple[list[SourceFile], Counter[str]]:
    """Files to train on, in folder order, and how many were dropped for which reason."""
    paths = list(python_files(root, VENDORED | TESTS))
    verdicts: Counter[str] = Counter()
    seen: set[bytes] = set()
    files: list[SourceFile] = []
    for path, (verdict, chars, digest) in zip(paths, pool.map(screen_file, paths, 64), strict=True):
        if verdict == "ok" and digest in seen:
            verdict = "duplicate"
        seen.add(digest)
        verdicts[verdict] += 1
        if verdict == "ok":
            files.append(SourceFile(root, path.relative_to(root), chars))
    kept = limit_packages(files, max_chars, rng)
    verdicts["over its package's limit"] = len(files) - len(kept)
    verdicts["ok"] = len(kept)
    return kept, verdicts


def limit_packages(
    files: list[SourceFile], max_chars: int, rng: np.random.Generator
) -> list[SourceFile]:
    """Whole folders at random from each package, so that big packages share `max_chars` evenly."""
    package_chars: Counter[str] = Counter()
    folders: dict[str, dict[Path, int]] = defaultdict(lambda: defaultdict(int))
    for file in files:
        package_chars[file.package] += file.chars
        folders[file.package][file.path.parent] += file.chars
    limit, left = math.inf, max_chars
    for n_done, chars in enumerate(sorted(package_chars.values())):
        if chars * (len(package_chars) - n_done) > left:
            limit = left / (len(package_chars) - n_done)
            break
        left -= chars
    kept: set[tuple[str, Path]] = set()
    for package, sizes in folders.items():
        total = 0.0
        for index in rng.permutation(len(sizes)):
            folder = list(sizes)[index]
            if total + sizes[folder] <= limit:
                total += sizes[folder]
                kept.add((package, folder))
    return [file for file in files if (file.package, file.path.parent) in kept]


def train_tokenizer(documents: Iterator[str], vocab: int) -> Tokenizer:
    """A byte-level BPE whose digits are single tokens, so that numbers can be copied."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_FILE,
        bos_token=END_OF_FILE,
        pad_token=END_OF_FILE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    # The class name that every release of transformers knows.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def encode_files(job: tuple[str, list[SourceFile]]) -> tuple[np.ndarray, Counter[str]]:
    """Token ids of some files, concatenated (uint16), and the number of tokens per package."""
    tokenizer_json, files = job
    tokenizer = Tokenizer.from_str(tokenizer_json)
    rows, tokens_of_package = [], Counter[str]()
    for file in files:
        rows.append(np.array(tokenizer.encode(file.document()).ids, dtype=np.uint16))
        tokens_of_package[file.package] += len(rows[-1])
    return np.concatenate(rows), tokens_of_package


def prepare_corpus(
    root: Path, recipe: Recipe, seed: int, folder: Path, pool: Any
) -> tuple[np.ndarray, dict[str, Any]]:
    """Screen, train the tokenizer, tokenize. Returns the token stream and what it is made of."""
    start = time.perf_counter()
    rng = np.random.default_rng(seed)
    files, verdicts = find_corpus(root, recipe.max_chars, rng, pool)
    total_chars = sum(file.chars for file in files)
    print(f"corpus: {len(files):,} files, {total_chars:,} characters, {dict(verdicts)}", flush=True)
    stride = max(1, total_chars // recipe.tokenizer_chars)
    sample = (file.document() for file in files[::stride])
    tokenizer = train_tokenizer(sample, recipe.vocab)
    save_tokenizer(tokenizer, folder, recipe.phases[-1].seq_len)
    print(f"tokenizer: {time.perf_counter() - start:.0f} s", flush=True)

    tokenizer_json = tokenizer.to_str()
    jobs = [(tokenizer_json, files[i : i + 64]) for i in range(0, len(files), 64)]
    rows, tokens_of_package = [], Counter[str]()
    for row, counts in pool.imap(encode_files, jobs):
        rows.append(row)
        tokens_of_package += counts
    tokens = np.concatenate(rows)
    seconds = round(time.perf_counter() - start, 1)
    print(f"tokens: {len(tokens):,} after {seconds} s", flush=True)
    return tokens, {
        "files": len(files),
        "characters": total_chars,
        "tokens": len(tokens),
        "verdicts": dict(verdicts),
        "seconds": seconds,
        "tokens_of_package": dict(tokens_of_package.most_common()),
    }


# -------------------------------------------------------------------------------------- batches


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
            if self.rng.random() < self.copy_share:
                self._plant_copies(row, label)
        return torch.from_numpy(rows[:, :-1]), torch.from_numpy(labels[:, 1:])

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


def build_model(recipe: Recipe) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=recipe.vocab,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=recipe.phases[-1].seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config)


class Muon:
    """Momentum, made orthogonal: every singular value of a matrix's update is about 1.

    All matrices of one shape are updated together, which keeps the number of kernels small.
    """

    def __init__(
        self, matrices: Sequence[torch.Tensor], momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.groups: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        for matrix in matrices:
            self.groups[matrix.shape].append(matrix)
        self.buffers = {
            shape: torch.zeros_like(torch.stack(group)) for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for shape, group in self.groups.items():
            gradient = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            buffer = self.buffers[shape].lerp_(gradient, 1 - self.momentum)
            update = self.orthogonalize(gradient.lerp(buffer, self.momentum))  # Nesterov
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for matrix, direction in zip(group, update, strict=True):
                matrix.mul_(1 - lr * self.weight_decay).add_(direction, alpha=-lr * scale)

    @staticmethod
    def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
        """Newton-Schulz iteration on [n, rows, columns], in bf16."""
        a, b, c = 3.4445, -4.7750, 2.0315  # quintic with the steepest slope at 0
        tall = matrices.shape[1] > matrices.shape[2]
        x = (matrices.mT if tall else matrices).bfloat16()
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return (x.mT if tall else x).float()


class MixedPrecision:
    """bf16 parameters in the model, float32 master copies in the optimizers."""

    def __init__(self, model: Qwen3ForCausalLM, muon_lr: float, adam_lr: float) -> None:
        self.muon_lr, self.adam_lr = muon_lr, adam_lr
        self.params = list(model.parameters())
        self.masters = [param.detach().clone() for param in self.params]
        for param in self.params:  # not model.to(): RoPE's frequencies stay float32
            param.data = param.data.bfloat16()
        embedding = model.get_input_embeddings().weight
        in_muon = [param.ndim == 2 and param is not embedding for param in self.params]
        self.muon = Muon([m for m, yes in zip(self.masters, in_muon, strict=True) if yes])
        self.adam = torch.optim.AdamW(
            [m for m, yes in zip(self.masters, in_muon, strict=True) if not yes],
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )

    def step(self, scale: float) -> torch.Tensor:
        """One update at `scale` times the base learning rates; returns the gradient norm."""
        for master, param in zip(self.masters, self.params, strict=True):
            assert param.grad is not None
            master.grad = param.grad.float()
            param.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
        self.muon.step(self.muon_lr * scale)
        with torch.no_grad():
            for master, param in zip(self.masters, self.params, strict=True):
                param.copy_(master)
        return norm


def learning_rate_scale(done: float, decay_from: float) -> float:
    """Warm-up, plateau, linear decay to zero; `done` is the share of the time used, 0 to 1."""
    warmup = 0.02
    if done < decay_from:
        return min(1.0, 0.05 + done / warmup)
    return max(0.0, (1 - done) / (1 - decay_from))


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


# ------------------------------------------------------------------------------------- training


def use_sdp_backends(*names: str) -> None:
    """Allow only these scaled-dot-product-attention backends on CUDA."""
    torch.backends.cuda.enable_flash_sdp("flash" in names)
    torch.backends.cuda.enable_cudnn_sdp("cudnn" in names)
    torch.backends.cuda.enable_mem_efficient_sdp("efficient" in names)
    torch.backends.cuda.enable_math_sdp("math" in names)


def choose_attention(seq_len: int) -> str:
    """The faster of FlashAttention and cuDNN, forward and backward, at the model's head shape."""
    shape = dict(device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q = torch.randn(2, seq_len, 4, 128, **shape)  # type: ignore[call-overload]
    k, v = (torch.randn(2, seq_len, 2, 128, **shape) for _ in "kv")  # type: ignore[call-overload]
    grad = torch.randn(2, 4, seq_len, 128, device="cuda", dtype=torch.bfloat16)
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    parser.add_argument("--no-compile", action="store_true", help="never use torch.compile")
    parser.add_argument("--min-rate", type=float, default=1e5, help="tokens/s below which to stop")
    parser.add_argument("--log-every", type=int, default=20, metavar="STEPS")
    args = parser.parse_args()
    args.device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    if args.smoke:
        args.minutes = min(args.minutes, 0.25)
    return args


def main() -> None:
    global _stdlib_index
    begin = time.perf_counter()
    args = parse_args()
    recipe = SMOKE if args.smoke else Recipe()
    device = torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"

    _stdlib_index = StdlibIndex(Path(sysconfig.get_paths()["stdlib"]))
    pool = multiprocessing.get_context("fork").Pool()  # before CUDA starts, for it cannot be forked
    with pool, ThreadPoolExecutor(1) as executor:
        corpus = executor.submit(prepare_corpus, args.corpus, recipe, args.seed, args.out, pool)
        model = build_model(recipe)
        model.to(device)  # type: ignore[arg-type]
        n_params = sum(param.numel() for param in model.parameters())
        print(f"model: {n_params:,} parameters on {device}", flush=True)
        optimizer = MixedPrecision(model, args.muon_lr, args.adam_lr)
        attention, compiled = "sdpa", list[int]()
        if device.type == "cuda":
            attention = choose_attention(recipe.phases[-1].seq_len)
            use_sdp_backends(attention, "efficient")
            if not args.no_compile:
                compiled = warm_up(model, recipe.phases, device)
        tokens, corpus_report = corpus.result()
    sampler = Sampler(tokens, recipe.vocab, args.copy_share, np.random.default_rng(args.seed))

    reserved = 5 if args.smoke else 50  # seconds for evaluation and saving
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

    use_sdp_backends("flash", "cudnn", "efficient", "math")
    results = evaluate(args.out, device, seed=args.seed, **recipe.eval_options)
    (args.out / "eval.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"done in {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
