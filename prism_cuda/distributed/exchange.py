"""What ranks send each other: every collective of this package, counted, its errors named."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from prism_cuda.distributed.shards import Shards

# Its name until torch 2.13, which warns of the old one.
_all_gather_single: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


def group_of(group: Any) -> dist.ProcessGroup:
    """The process group of what a caller gave: one, a DeviceMesh of one dimension, or None.

    Raises:
        ValueError: for a mesh of several dimensions, or where this process is not in the group.
        RuntimeError: if torch.distributed was not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "prism_cuda.distributed: torch.distributed is not initialised; call "
            "torch.distributed.init_process_group first"
        )
    if hasattr(group, "get_group"):  # a DeviceMesh
        if group.ndim != 1:
            raise ValueError(
                f"prism_cuda.distributed: group is a DeviceMesh of {group.ndim} dimensions; "
                "expected one: take mesh['its name']"
            )
        return group.get_group()
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"prism_cuda.distributed: group is {group!r}; expected a ProcessGroup or DeviceMesh "
            "that this process belongs to"
        )
    return group


@dataclass
class Traffic:
    """What one rank exchanged.

    Attributes:
        sent, received: bytes of payload by kind ("pooled", "kv", "queries", "halos"): sent counts
            what other ranks get once for a collective and once for each of them otherwise;
            received counts padding, too.
        waited: seconds in which the host waited, by kind.
    """

    sent: dict[str, int] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, sent: int, received: int) -> None:
        self.sent[kind] = self.sent.get(kind, 0) + sent
        self.received[kind] = self.received.get(kind, 0) + received


class Exchange:
    """A group as one of its ranks sees it."""

    def __init__(self, group: Any = None) -> None:
        self.group = group_of(group)
        self.rank = dist.get_rank(self.group)
        self.ranks = dist.get_world_size(self.group)
        self.traffic = Traffic()

    def objects(self, value: Any) -> list[Any]:
        """The small Python value of every rank."""
        values: list[Any] = [None] * self.ranks
        with self._waiting("agreement", "all ranks' descriptions of the call"):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def all_gather(self, kind: str, x: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        """The flat bytes uint8 (sizes[rank],) of every rank; padded to the longest on the way."""
        longest = max(1, *sizes)
        padded = torch.nn.functional.pad(x, (0, longest - len(x)))
        gathered = x.new_empty(self.ranks * longest)
        with self._waiting(kind, f"{kind} of all ranks"):
            _all_gather_single(gathered, padded, group=self.group)
        self.traffic.add(kind, longest * (self.ranks > 1), (self.ranks - 1) * longest)
        return [part[:size] for part, size in zip(gathered.split(longest), sizes, strict=True)]

    def broadcast(self, kind: str, x: torch.Tensor, source: int) -> Pending:
        """Begin to send contiguous x from rank ``source`` to all."""
        flat = x.view(torch.uint8)
        size = flat.numel()
        if self.ranks == 1:
            return Pending(self, None, kind, source)
        with self._waiting(kind, f"{kind} of rank {source}"):
            work = dist.broadcast(flat, group=self.group, group_src=source, async_op=True)
        own = source == self.rank
        self.traffic.add(kind, size * own, size * (not own))
        return Pending(self, work, kind, source)

    def all_to_all(
        self, kind: str, parts: Sequence[torch.Tensor], sizes: Sequence[int]
    ) -> list[torch.Tensor]:
        """Send flat part r to rank r; the parts of this dtype, of ``sizes``, that others sent."""
        sent = torch.cat(list(parts))
        received = sent.new_empty(sum(sizes))
        scale = sent.element_size()
        with self._waiting(kind, f"{kind} of all ranks"):
            dist.all_to_all_single(
                received.view(torch.uint8),
                sent.view(torch.uint8),
                [size * scale for size in sizes],
                [len(part) * scale for part in parts],
                group=self.group,
            )
        own = len(parts[self.rank])
        self.traffic.add(kind, (len(sent) - own) * scale, (len(received) - own) * scale)
        return list(received.split(list(sizes)))

    def reshard(
        self, kind: str, tensors: Sequence[torch.Tensor], source: Shards, target: Shards
    ) -> list[torch.Tensor]:
        """(B, H, tokens, D) tensors of one dtype as other shards have them."""
        moves = [_overlaps(source, self.rank, target, rank) for rank in range(self.ranks)]
        parts = []
        for ranges in moves:
            pieces = [x[:, :, s:e].flatten() for x in tensors for (s, e), _ in ranges]
            parts.append(torch.cat(pieces) if pieces else tensors[0].new_empty(0))
        row = sum(x.shape[0] * x.shape[1] * x.shape[3] for x in tensors)
        arrivals = [_overlaps(source, rank, target, self.rank) for rank in range(self.ranks)]
        sizes = [row * sum(e - s for (s, e), _ in ranges) for ranges in arrivals]
        tokens = target.tokens(self.rank)
        results = [x.new_empty((*x.shape[:2], tokens, x.shape[3])) for x in tensors]
        for flat, ranges in zip(self.all_to_all(kind, parts, sizes), arrivals, strict=True):
            at = 0
            for x in results:
                for _, (s, e) in ranges:
                    piece = x[:, :, s:e]
                    piece.copy_(flat[at : at + piece.numel()].view(piece.shape))
                    at += piece.numel()
        return results

    @contextlib.contextmanager
    def _waiting(self, kind: str, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except RuntimeError as error:  # of the backends: timeouts, lost connections
            raise RuntimeError(
                f"prism_cuda.distributed: rank {self.rank} of {self.ranks} did not get {what}: "
                f"{error}"
            ) from error
        spent = time.perf_counter() - start
        self.traffic.waited[kind] = self.traffic.waited.get(kind, 0.0) + spent


class Pending:
    """A tensor on its way."""

    def __init__(self, exchange: Exchange, work: Any, kind: str, source: int) -> None:
        self._exchange, self._work = exchange, work
        self._kind, self._source = kind, source

    def wait(self) -> None:
        """Return when what is queued next on the device will find the tensor there."""
        if self._work is None:
            return
        with self._exchange._waiting(self._kind, f"{self._kind} of rank {self._source}"):
            self._work.wait()
        self._work = None


def _overlaps(
    source: Shards, source_rank: int, target: Shards, target_rank: int
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Tokens that one rank has before and another one after: ranges within both's tensors."""
    found = []
    for one, (at, _) in source.local(source_rank):
        for other, (there, _) in target.local(target_rank):
            start, end = max(one.start, other.start), min(one.end, other.end)
            if start < end:
                here = at - one.start
                then = there - other.start
                found.append(((start + here, end + here), (start + then, end + then)))
    return found
