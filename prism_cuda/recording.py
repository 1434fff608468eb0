"""record(): what every attention call inside a `with` block did."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from prism_cuda.block_mask import BlockMask
from prism_cuda.config import Estimator

Path = Literal["prism", "dense"]


@dataclass
class CallRecord:
    """One attention call, or one sequence of a padded or ragged batch within it.

    Attributes:
        layer_idx: the layer, or None for a call that did not come from a model.
        path: "prism" (block-sparse) or "dense".
        reason: why that path was taken.
        q_len, k_len: tokens, padding excluded.
        density: kept blocks over visible blocks; 1 for dense calls.
        mask: the block mask if masks were asked for and the path is "prism".
        times: seconds per stage ("pool", "select", "attend") if times were asked for; the grid
            estimator pools within "select", and a dense call has "attend" only. Of a ragged batch
            the first record has the times of all, pooling within "select".
        estimator: "grid" or "bands", what the blocks were chosen by; None where nothing was chosen.
    """

    layer_idx: int | None
    path: Path
    reason: str
    q_len: int
    k_len: int
    density: float
    mask: BlockMask | None = None
    times: dict[str, float] = field(default_factory=dict)
    estimator: Estimator | None = None


@dataclass
class Recording:
    """The calls so far, in order, and what is asked of each."""

    masks: bool = False
    times: bool = False
    calls: list[CallRecord] = field(default_factory=list)


# A plain list, not a ContextVar: torch.compile can trace it.
_active: list[Recording] = []


@contextlib.contextmanager
def record(masks: bool = False, times: bool = False) -> Iterator[Recording]:
    """Collect a :class:`CallRecord` for every attention call in the block.

    Args:
        masks: keep every call's block mask.
        times: time the stages; runs them as separate ops and waits for the device after each.

    Recording reads densities back from the device, so it costs a synchronisation per call. It
    covers all threads of the process.
    """
    recording = Recording(masks, times)
    _active.append(recording)
    try:
        yield recording
    finally:
        _active.pop()


def active() -> Recording | None:
    """The innermost recording, or None."""
    return _active[-1] if _active else None
