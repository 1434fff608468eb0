"""The training text: Python source files, screened, and a tokenizer trained on them."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from eval_testbed import END_OF_FILE, as_document, python_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VENDORED = frozenset(
    ("_vendor", "vendor", "vendored", "extern", "externals", "third_party", "thirdparty")
    + ("_distutils", "backports", "importlib_metadata", "importlib_resources")
)
TESTS = frozenset(("test", "tests"))


@dataclass(frozen=True)
class TextLimits:
    """How much text is read: all of it, for the tokenizer, and the tokenizer's vocabulary."""

    vocab: int
    max_chars: int = 200_000_000
    tokenizer_chars: int = 40_000_000


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


def index_stdlib(stdlib: Path) -> None:
    """Make :func:`screen_file` know the held-out text; call it before workers are forked."""
    global _stdlib_index
    _stdlib_index = StdlibIndex(stdlib)


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
    root: Path, limits: TextLimits, seed: int, folder: Path, max_length: int, pool: Any
) -> tuple[np.ndarray, dict[str, Any]]:
    """Screen, train the tokenizer, tokenize. Returns the token stream and what it is made of."""
    start = time.perf_counter()
    rng = np.random.default_rng(seed)
    files, verdicts = find_corpus(root, limits.max_chars, rng, pool)
    total_chars = sum(file.chars for file in files)
    print(f"corpus: {len(files):,} files, {total_chars:,} characters, {dict(verdicts)}", flush=True)
    stride = max(1, total_chars // limits.tokenizer_chars)
    sample = (file.document() for file in files[::stride])
    tokenizer = train_tokenizer(sample, limits.vocab)
    save_tokenizer(tokenizer, folder, max_length)
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
