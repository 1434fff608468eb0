"""vLLM with prism's backend beside its own FlashAttention: equal outputs, accuracy, speed.

    python bench/vllm_bench.py generate MODEL --backend FLASH_ATTN --out flash.json
    python bench/vllm_bench.py generate MODEL --backend FLASH_ATTN --batch 1 --out single.json
    python bench/vllm_bench.py generate MODEL --backend CUSTOM --prism '{"top_p": 1}' --out p.json
    python bench/vllm_bench.py compare flash.json single.json p.json
    python bench/vllm_bench.py accuracy MODEL --backend CUSTOM --out accuracy.json
    python bench/vllm_bench.py speed MODEL --out speed.json

``generate`` writes greedy outputs of 32 prompts of 10 to 30,000 tokens with their two best log
probabilities at every step, and how many layer calls went to prism. ``compare`` takes two such runs
of one backend, batched otherwise, for what the engine's own rounding changes, and accepts of the
third only outputs that part where their two best are closer than that. ``accuracy`` scores the
tasks of bench/quality by prompt log probabilities, as its evaluation does in transformers.
``speed`` has both engines in memory and asks them in turns. tools/vllm_gpu_run.sh runs all of it on
a machine without network.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shlex
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "quality"))

BACKENDS = ("FLASH_ATTN", "CUSTOM")
LENGTHS = [int(x) for x in np.geomspace(10, 30_000, 32)]
RETRIEVAL = ("kv", "niah_single", "niah_multikey", "niah_multivalue")


def held_out(model: str) -> tuple[Any, np.ndarray]:
    """The model's tokenizer, and the standard library in its tokens."""
    from eval_testbed import held_out_tokens  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return tokenizer, held_out_tokens(tokenizer, Path(sysconfig.get_path("stdlib")), 400)


def engine(args: argparse.Namespace, backend: str, **more: Any) -> Any:
    from vllm import LLM

    settings: dict[str, Any] = dict(
        model=args.model,
        dtype="bfloat16",
        max_model_len=args.max_model_len,
        max_num_batched_tokens=args.chunk,
        enforce_eager=args.eager,
        attention_config={"backend": backend},
        gpu_memory_utilization=0.85,
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
    )
    if backend == "CUSTOM":
        settings["additional_config"] = {"prism": json.loads(args.prism)}
    return LLM(**(settings | more))


def prompts_of(ids: np.ndarray, lengths: list[int], rng: np.random.Generator) -> list[dict]:
    starts = rng.integers(0, len(ids) - max(lengths), len(lengths))
    return [
        {"prompt_token_ids": ids[start : start + length].tolist()}
        for start, length in zip(starts, lengths, strict=True)
    ]


def counted() -> dict[str, int]:
    """Layer calls by way; the engine has to run in this process."""
    from prism_cuda.integrations.vllm import counts

    return counts()


def generate(args: argparse.Namespace) -> None:
    from vllm import SamplingParams

    _, ids = held_out(args.model)
    prompts = prompts_of(ids, LENGTHS, np.random.default_rng(0))
    llm = engine(args, args.backend, max_num_seqs=args.batch or 32)
    greedy = SamplingParams(temperature=0, max_tokens=args.tokens, logprobs=2, ignore_eos=True)
    rows = []
    for result in llm.generate(prompts, greedy, use_tqdm=False):
        best = []  # of every step: the two best tokens and their log probabilities
        for position in result.outputs[0].logprobs:
            top = sorted(((value.logprob, int(token)) for token, value in position.items()))[::-1]
            best.append(top[:2])
        rows.append(
            {
                "length": len(result.prompt_token_ids),
                "tokens": list(result.outputs[0].token_ids),
                "best": best,
            }
        )
    write(args, rows, counts=counted())


def compare(args: argparse.Namespace) -> None:
    first, second, other = (json.loads(Path(path).read_text())["rows"] for path in args.runs)
    noise = max(differences(a, b) for a, b in zip(first, second, strict=True))
    print(f"largest difference of a log probability between the first two runs: {noise:.4f}")
    wrong = 0
    for a, b in zip(first, other, strict=True):
        at = parts_at(a, b)
        if at is None:
            print(
                f"{a['length']:6} tokens: equal; log probabilities within {differences(a, b):.4f}"
            )
            continue
        gap = a["best"][at][0][0] - a["best"][at][1][0]
        wrong += gap > noise
        verdict = "as close as batches" if gap <= noise else "WRONG"
        print(f"{a['length']:6} tokens: part at {at}, the best two {gap:.4f} apart: {verdict}")
    if wrong:
        sys.exit(f"{wrong} of {len(first)} outputs differ by more than the engine's own rounding")


def parts_at(a: dict, b: dict) -> int | None:
    for at, (x, y) in enumerate(zip(a["tokens"], b["tokens"], strict=True)):
        if x != y:
            return at
    return None


def differences(a: dict, b: dict) -> float:
    """Largest change of the best log probability up to where outputs part, that step included.

    Steps before have the same text before them; so has that one.
    """
    at = parts_at(a, b)
    end = len(a["tokens"]) if at is None else at + 1
    changes = [0.0]
    for x, y in zip(a["best"][:end], b["best"][:end], strict=True):
        there = {token: value for value, token in y}
        changes += [abs(value - there[token]) for value, token in x if token in there]
    return max(changes)


def accuracy(args: argparse.Namespace) -> None:
    from vllm import SamplingParams

    from prism_cuda.tune.tasks import Encoder, make

    tokenizer, ids = held_out(args.model)
    encode = Encoder(tokenizer)
    llm = engine(args, args.backend, max_num_seqs=8, gpu_memory_utilization=0.6)
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    rows = []
    for length in args.lengths:
        for index, task in enumerate(RETRIEVAL):
            rng = np.random.default_rng((0, index, length))
            samples = [
                make(task, rng, encode, ids[start : start + length - 1], 24)
                for start in rng.integers(0, len(ids) - length, args.samples)
            ]
            prompts = [{"prompt_token_ids": sample.ids.tolist()} for sample in samples]
            hits: list[list[bool]] = []
            for sample, result in zip(
                samples, llm.generate(prompts, scoring, use_tqdm=False), strict=True
            ):
                ranks = [
                    None if position is None else position[token].rank
                    for token, position in zip(
                        result.prompt_token_ids, result.prompt_logprobs, strict=True
                    )
                ]
                hits += [[rank == 1 for rank in ranks[answer]] for answer in sample.answers]
            rows.append(
                {
                    "task": task,
                    "length": length,
                    "answers": len(hits),
                    "answer_accuracy": float(np.mean([all(hit) for hit in hits])),
                    "token_accuracy": float(np.mean([x for hit in hits for x in hit])),
                }
            )
            print(rows[-1], flush=True)
    write(args, rows, counts=counted())


def speed(args: argparse.Namespace) -> None:
    from vllm import SamplingParams

    _, ids = held_out(args.model)
    share = 0.42  # of the GPU's memory; both stay there
    engines = {name: engine(args, name, gpu_memory_utilization=share) for name in BACKENDS}
    rng, rows = np.random.default_rng(1), []
    for length in args.lengths:
        for together in (1, 8):
            for output, what in ((1, "ttft"), (64, "throughput")):
                options = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
                times: dict[str, list[float]] = {name: [] for name in BACKENDS}
                first: dict[str, list[float]] = {name: [] for name in BACKENDS}
                for turn in range(args.repeats + 1):  # the first is a warm-up
                    # Room for the output within the model's length; a new prompt every time.
                    prompts = prompts_of(ids, [length - 64] * together, rng)
                    for name in BACKENDS if turn % 2 else BACKENDS[::-1]:
                        start = time.perf_counter()
                        results = engines[name].generate(prompts, options, use_tqdm=False)
                        if turn:
                            times[name].append(time.perf_counter() - start)
                            first[name] += [
                                result.metrics.first_token_latency
                                for result in results
                                if result.metrics is not None
                            ]
                for name in BACKENDS:
                    seconds = statistics.median(times[name])
                    row = {"backend": name, "length": length, "together": together, "what": what}
                    row |= {"seconds": seconds, "all_seconds": times[name]}
                    if what == "ttft":
                        row["ttft_mean"] = statistics.fmean(first[name]) if first[name] else seconds
                    else:
                        row["tokens_per_second"] = together * (length - 64 + output) / seconds
                    row["vs_flash_attn"] = statistics.median(times["FLASH_ATTN"]) / seconds
                    rows.append(row)
                    shown = {k: v for k, v in row.items() if k != "all_seconds"}
                    print(shown, flush=True)
    write(args, rows)


def write(args: argparse.Namespace, rows: list[dict], **more: Any) -> None:
    import torch

    content = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "vllm")},
        "command": shlex.join(sys.argv),
        "prism": json.loads(args.prism),
        **more,
        "rows": rows,
    }
    Path(args.out).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print({key: value for key, value in content.items() if key != "rows"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("generate", "accuracy", "speed"):
        command = commands.add_parser(name)
        command.add_argument("model")
        command.add_argument("--out", required=True)
        command.add_argument("--prism", default="{}", help="settings, as JSON")
        command.add_argument("--max-model-len", type=int, default=32768)
        command.add_argument("--chunk", type=int, default=8192, help="tokens of a step")
        command.add_argument("--eager", action="store_true", help="no compilation and no graphs")
        if name != "speed":
            command.add_argument("--backend", choices=BACKENDS, required=True)
    commands.choices["generate"].add_argument("--batch", type=int, help="sequences at once")
    commands.choices["generate"].add_argument("--tokens", type=int, default=32)
    commands.choices["accuracy"].add_argument("--lengths", type=int, nargs="+", default=[32768])
    commands.choices["accuracy"].add_argument("--samples", type=int, default=6, help="of each task")
    commands.choices["speed"].add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 16384, 32768]
    )
    commands.choices["speed"].add_argument("--repeats", type=int, default=5)
    commands.add_parser("compare").add_argument("runs", nargs=3)
    args = parser.parse_args()
    # Counts are of the process that runs the model; two engines need a process each.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(args.command == "speed")))
    {"generate": generate, "compare": compare, "accuracy": accuracy, "speed": speed}[args.command](
        args
    )


if __name__ == "__main__":
    main()
