"""record(): what every attention call inside a `with` block did."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from prism_cuda.block_mask import BlockMask
from prism_cuda.tables import format_table

Path = Literal["prism", "dense"]

# A selection that keeps nearly everything of so long an input costs more than it saves.
LONG_INPUT = 8192
NEARLY_ALL = 0.9
HELP = "docs/diagnose.md, Density near 1"


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
        times: seconds per stage ("pool", "select", "attend") if times were asked for. Only bands
            pool keys apart, and a dense call has "attend" only. Of a ragged batch the first record
            has the times of all, pooling within "select".
        estimator: what the blocks were chosen by: "grid", "bands" or a registered name; None where
            nothing was chosen.
    """

    layer_idx: int | None
    path: Path
    reason: str
    q_len: int
    k_len: int
    density: float
    mask: BlockMask | None = None
    times: dict[str, float] = field(default_factory=dict)
    estimator: str | None = None


@dataclass(eq=False)
class Recording:
    """The calls so far, in order, and what is asked of each."""

    masks: bool = False
    times: bool = False
    calls: list[CallRecord] = field(default_factory=list)
    thread: int | None = None  # None: calls of all threads

    def summary(self) -> str:
        """A table with a row for every layer and way that its calls went."""
        rows: dict[tuple, list[CallRecord]] = {}
        for call in self.calls:
            key = (call.layer_idx, call.path, call.estimator, call.reason)
            rows.setdefault(key, []).append(call)
        order = sorted(rows, key=lambda key: (key[0] is None, key[0] or 0))  # else as they came
        header = ["layer", "path", "by", "calls", "queries", "keys", "density"]
        header += ["ms"] if self.times else []
        table = format_table([*header, "reason"], [self._row(key, rows[key]) for key in order])
        chosen = (call for call in self.calls if call.estimator is not None)
        full = sum(_keeps_nearly_all(call.k_len, call.density) for call in chosen)
        if not full:
            return table
        return (
            f"{table}\n{full} of {len(self.calls)} calls computed more than {NEARLY_ALL:.0%} of "
            f"the blocks of a long input: nothing to leave out here, see {HELP}"
        )

    def _row(self, key: tuple, calls: list[CallRecord]) -> list[str]:
        layer, path, estimator, reason = key
        density = sum(call.density for call in calls) / len(calls)
        row = ["" if layer is None else str(layer), path, estimator or "", str(len(calls))]
        row += [_range([call.q_len for call in calls]), _range([call.k_len for call in calls])]
        row.append(f"{density:.3f}")
        if self.times:
            row.append(f"{1e3 * sum(sum(call.times.values()) for call in calls):.2f}")
        return [*row, reason]


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


# The open blocks of all threads. A plain list, not a ContextVar: torch.compile can trace it.
active: list[Recording] = []


@contextlib.contextmanager
def record(
    masks: bool = False, times: bool = False, own_thread: bool = False
) -> Iterator[Recording]:
    """Collect a :class:`CallRecord` for every attention call in the block.

    A block gets every call that is made while it is open, in whatever thread and whatever other
    blocks are open, or with ``own_thread`` those of the thread that opened it.

    Args:
        masks: keep every call's block mask.
        times: time the stages; runs them as separate ops and waits for the device after each.
        own_thread: leave out the calls of other threads. Models that attend in a thread of their
            own, as generate_batch does, are then left out too.

    Recording reads densities back from the device, so it costs a synchronisation per call.
    """
    recording = Recording(masks, times, thread=threading.get_ident() if own_thread else None)
    active.append(recording)
    try:
        yield recording
    finally:
        active.remove(recording)  # this very one: blocks of other threads end in any order


def listening() -> list[Recording]:
    """The open blocks that get the calls of this thread."""
    own = (None, threading.get_ident())
    # Of a copy: while another thread closes its block, a walk along the list itself would step
    # over the block behind that.
    return [recording for recording in list(active) if recording.thread in own]


def note(recordings: list[Recording], call: CallRecord) -> None:
    """Add a call to recordings, to each with what it asked for."""
    for recording in recordings:
        mask = call.mask if recording.masks else None
        times = dict(call.times) if recording.times else {}
        recording.calls.append(dataclasses.replace(call, mask=mask, times=times))
    if call.estimator is not None:
        warn_of_density(call.layer_idx, call.k_len, call.density, call.estimator)


def _keeps_nearly_all(k_len: int, density: float) -> bool:
    return k_len >= LONG_INPUT and density > NEARLY_ALL


_warned = False


def still_silent() -> bool:
    """Whether :func:`warn_of_density` has not warned in this process."""
    return not _warned


def warn_of_density(
    layer_idx: int | None, k_len: int, density: float, estimator: str | None
) -> None:
    """Say once, where it is so, that a selection left next to nothing out of a long input.

    It takes the kept blocks on the host. So it is given where they are there: by recordings, which
    wait for the device anyway, and by calls on the CPU. Other CUDA calls do not look: one copy to
    the host would stop the launches of every layer and could not be captured in a CUDA graph.
    """
    global _warned
    if not _warned and _keeps_nearly_all(k_len, density):
        _warned = True
        layer = "" if layer_idx is None else f" of layer {layer_idx}"
        warnings.warn(
            f"prism: a call{layer} with {k_len} keys computed {density:.0%} of its blocks, chosen "
            f"by {estimator}: nothing to leave out here, dense attention would be faster; see "
            f"{HELP}",
            stacklevel=2,
        )
