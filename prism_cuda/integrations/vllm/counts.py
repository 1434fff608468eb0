"""How many layer calls of this process went which way: the proof that a server is sparse."""

from __future__ import annotations

from collections import Counter

PRISM = "prism"

_counts: Counter[str] = Counter()


def count(way: str) -> None:
    """Note a call of one layer: ``PRISM``, or why FlashAttention took it."""
    _counts[way] += 1


def counts() -> dict[str, int]:
    """Layer calls so far: "prism", and for those of FlashAttention a key for every reason.

    A batch of decodes beside prefills counts once for each of the two in every layer. Calls that a
    CUDA graph replays are not seen, and calls are counted where the model runs: in another process
    than ``LLM`` unless VLLM_ENABLE_V1_MULTIPROCESSING is 0.
    """
    return dict(_counts)


def reset_counts() -> None:
    _counts.clear()
