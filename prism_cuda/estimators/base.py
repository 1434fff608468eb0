"""What an estimator is: something that says which blocks of keys every block of queries needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch

from prism_cuda.batch import Batch
from prism_cuda.config import PrismConfig
from prism_cuda.heads import Selection
from prism_cuda.remember import remembered


class Rules(NamedTuple):
    """What a row keeps of the probabilities, as the ops take it; see PrismConfig."""

    top_p: list[float]  # one for all query heads, or one for each
    keep_above: list[float] | None
    keep_sink: int
    keep_recent: int

    def of(self, heads: Sequence[int]) -> Rules:
        """The rules of some of the query heads."""
        top_p, keep_above = (
            [values[head] for head in heads] if values is not None and len(values) > 1 else values
            for values in (self.top_p, self.keep_above)
        )
        assert top_p is not None
        return Rules(top_p, keep_above, self.keep_sink, self.keep_recent)


@remembered
def rules_of(config: PrismConfig, estimator: str, q_heads: int) -> Rules:
    """The rules of all ``q_heads`` query heads.

    Raises:
        ValueError: if config's settings of heads do not fit their number.
    """
    top_p = config.top_p_of_heads(q_heads)
    values = list(top_p) if isinstance(top_p, tuple) else [top_p]
    above = [config.threshold(value, estimator) for value in values]
    # A head without a threshold keeps everything by its top_p of 1: any threshold will do.
    keep_above = None if all(x is None for x in above) else [1.0 if x is None else x for x in above]
    if keep_above is not None and all(x == keep_above[0] for x in keep_above):
        keep_above = keep_above[:1]
    return Rules(values, keep_above, config.keep_sink, config.keep_recent)


class KeyState(ABC):
    """What an estimator keeps of the keys of a prompt that grows chunk by chunk.

    Attributes:
        unit: tokens that are pooled together. What is kept of whole units does not depend on
            later keys, so that a prompt may be cut back to any of them.
    """

    unit: int = 1

    @abstractmethod
    def append(self, k: torch.Tensor, start: int) -> None:
        """Take in keys (B, Hkv, tokens, D) from position ``start`` on.

        start is the end of the keys so far, or any multiple of ``unit`` before it.
        """

    @abstractmethod
    def select(self, q: torch.Tensor, k: torch.Tensor, scale: float | None) -> Selection:
        """The causal selection of q, the last queries, among all keys k taken in so far."""


class Estimator(ABC):
    """Chooses blocks by its config, and for ragged batches too if it is ``ragged``."""

    name: str
    ragged: bool = True

    def op_arguments(self, config: PrismConfig, head_dim: int, q_heads: int) -> tuple | None:
        """What prism::prefill takes from ``estimator`` to ``keep_recent``.

        None where that op cannot do it all and :meth:`select` has to.
        """
        return None

    def pool_keys(self, k: torch.Tensor, config: PrismConfig) -> torch.Tensor | None:
        """What :meth:`select` takes as ``pooled``, or None where it pools the keys itself."""
        return None

    @abstractmethod
    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        config: PrismConfig,
        *,
        scale: float | None = None,
        causal: bool = True,
        pooled: torch.Tensor | None = None,
        batch: Batch | None = None,
        k_scale: torch.Tensor | None = None,
    ) -> Selection:
        """Bits and counts as prism::sparse_attention takes them."""

    @abstractmethod
    def new_state(
        self,
        shape: tuple[int, int, int],
        max_len: int,
        config: PrismConfig,
        device: torch.device | str,
    ) -> KeyState:
        """The state of an empty prompt; shape is (B, Hkv, D)."""


def batch_keywords(batch: Batch | None, config: PrismConfig) -> dict[str, object]:
    """A ragged batch as the ops that select take it: none of its short sequences leave blocks out.

    Those are decided on the device. 0 would switch off the rule for few queries as well.
    """
    if batch is None:
        return {}
    return batch.keywords() | {"dense_below": max(config.dense_below, 1)}
