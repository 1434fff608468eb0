"""context_parallel_prefill: attention to a sequence whose tokens lie on several ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prism_cuda import ops, plan, recording
from prism_cuda.bits import count, cut
from prism_cuda.block_mask import BlockMask
from prism_cuda.config import PrismConfig, as_config
from prism_cuda.distributed.agreement import agree, describe
from prism_cuda.distributed.exchange import Exchange, Pending
from prism_cuda.distributed.selection import (
    ESTIMATORS,
    Select,
    select_by_bands,
    select_by_grid,
    select_every,
)
from prism_cuda.distributed.shards import Range, Shards, Stretch, from_lengths
from prism_cuda.heads import Selection
from prism_cuda.options import ScoreOptions, score_options
from prism_cuda.plan import Plan

NAME = "context_parallel_prefill"


def context_parallel_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: Any = None,
    *,
    config: PrismConfig | None = None,
    shards: Shards | None = None,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    window_left: int | None = None,
    steps: int = 4,
    check: bool = True,
    return_lse: bool = False,
    return_mask: bool = False,
) -> Any:
    """Causal :func:`prism_cuda.prefill` of a sequence that is spread over the ranks of a group.

    Every rank of the group calls it with its own tokens. Blocks are selected as one process selects
    them, bit by bit, and outputs are equal to rounding.

    Args:
        q: (B, Hq, tokens, D), the rank's tokens, rotated by their positions in the sequence.
        k, v: (B, Hkv, tokens, D), the keys and values of the same tokens.
        group: a ProcessGroup or a DeviceMesh of one dimension, of NCCL or gloo; None: all ranks.
        config, scale, sinks, softcap, window_left: as for :func:`prism_cuda.prefill`, the
            same on all ranks. What the config decides by lengths it decides by the sequence's.
        shards: who holds which tokens, such as :func:`zigzag` gives. None: every rank one stretch,
            in the order of ranks. Where stretches do not begin at query blocks, tokens at their
            borders are exchanged first and outputs last.
        steps: parts, about, that keys arrive in; attention to one part runs while the next is on
            its way. More overlap better and join more outputs.
        check: compare shapes, dtypes, settings and shards of all ranks first, which the host waits
            for. Without it they have to be known to agree, and shards to be given.
        return_lse: also return float32 (B, Hq, tokens).
        return_mask: also return a :class:`BlockMask` for every stretch of the rank, of its queries
            among the keys up to its end. Of shards that do not begin at
            query blocks these are the aligned stretches.

    Returns:
        out like q, or (out[, lse][, masks]).

    Raises:
        ValueError: on every rank, if they do not agree, or config's estimator is not "grid" or
            "bands".
        RuntimeError: if the tensors do not fit each other, no kernel serves them, or a rank does
            not answer within the group's time limit.
    """
    config = as_config(NAME, config)
    options = score_options(sinks, softcap, window_left)
    exchange = group if isinstance(group, Exchange) else Exchange(group)
    q, k, v = plan.computed(q, k, v)

    def local() -> tuple[dict[str, Any], tuple[int, Shards | None]]:
        check_local(exchange, q, k, v, config, options, scale, shards, steps)
        return describe(q, k, config, options, scale), (q.shape[2], shards)

    if check:
        shards = _agreed_shards(exchange, agree(exchange, local))
    else:
        if shards is None:
            raise ValueError(f"{NAME}: shards is None; expected them where check is False")
        local()
    chosen = plan_of_sequence(shards, q, config, options)
    call = ContextCall(exchange, shards, chosen, config, options, scale=scale, steps=steps)
    out, lse, masks = call.run(q, k, v)
    extras: list[object] = [lse] if return_lse else []
    if return_mask:
        extras.append(masks)
    return (out, *extras) if extras else out


def check_local(
    exchange: Exchange,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: PrismConfig,
    options: ScoreOptions,
    scale: float | None,
    shards: Shards | None,
    steps: int,
) -> None:
    """Refuse what is wrong whatever the other ranks have."""
    plan.check(NAME, q, k, v, scale, options)
    if not q.shape[3] == v.shape[3]:
        raise RuntimeError(f"{NAME}: v has head_dim {v.shape[3]}; expected q's, {q.shape[3]}")
    if q.shape[2] != k.shape[2]:
        raise RuntimeError(
            f"{NAME}: k has {k.shape[2]} tokens; expected q's, {q.shape[2]}: a rank brings queries "
            "and keys of the same tokens"
        )
    if steps < 1:
        raise ValueError(f"{NAME}: steps is {steps}; expected 1 or more")
    plan.check_settings(config, q.shape[1], q.shape[3], False)
    estimator = config.estimator_of(q.shape[3])
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"{NAME}: estimator is {estimator!r}; expected one of {ESTIMATORS}: functions choose "
            "by all queries and keys in one place"
        )
    changed = options.softcap is not None or options.window_left is not None
    kernel = plan.attention_kernel(
        q.shape[3], q.dtype, q.device, config.block_sizes, False, changed
    )
    if kernel.startswith("unsupported"):
        raise RuntimeError(f"{NAME}: {kernel}")
    if shards is None:
        return
    if shards.ranks != exchange.ranks:
        raise ValueError(
            f"{NAME}: shards are for {shards.ranks} ranks; expected the group's {exchange.ranks}"
        )
    if shards.tokens(exchange.rank) != q.shape[2]:
        raise ValueError(
            f"{NAME}: q has {q.shape[2]} tokens; expected {shards.tokens(exchange.rank)}, those "
            f"of rank {exchange.rank} by shards"
        )


def _agreed_shards(exchange: Exchange, said: Sequence[tuple[int, Shards | None]]) -> Shards:
    first = said[0][1]
    for rank, (_, shards) in enumerate(said):
        if shards != first:
            raise ValueError(
                f"{NAME}: shards are {shards} on rank {rank} and {first} on rank 0; expected the "
                "same on all ranks"
            )
    return from_lengths(length for length, _ in said) if first is None else first


def plan_of_sequence(
    shards: Shards, q: torch.Tensor, config: PrismConfig, options: ScoreOptions
) -> Plan:
    """The plan of the whole sequence in one process."""
    length = shards.length
    return plan.plan_of_shape(
        length,
        length,
        q.shape[3],
        q.dtype,
        q.device,
        config,
        options,
        options.sinks is not None,
    )


@dataclass(frozen=True)
class ContextCall:
    """A call that all ranks agree on, of every rank's tensors.

    Attributes:
        plan: of the whole sequence. Dense ones keep every block here, too, by the sparse kernel.
    """

    exchange: Exchange
    shards: Shards
    plan: Plan
    config: PrismConfig
    options: ScoreOptions
    scale: float | None = None
    steps: int = 4
    layer_idx: int | None = None

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[BlockMask]]:
        """out, lse and the masks of the rank's stretches."""
        ops.load()
        if self.shards.length == 0:
            return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32), []
        aligned = self.shards.aligned(self.config.block_sizes[0])
        if aligned == self.shards:
            return self._run_aligned(self.shards, q, k, v)
        q, k, v = (x.contiguous() for x in (q, k, v))
        moved = self.exchange.reshard("halos", [q, k, v], self.shards, aligned)
        out, lse, masks = self._run_aligned(aligned, *moved)
        (out,) = self.exchange.reshard("halos", [out], aligned, self.shards)
        (lse,) = self.exchange.reshard("halos", [lse[..., None]], aligned, self.shards)
        return out, lse[..., 0], masks

    def _run_aligned(
        self, shards: Shards, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[BlockMask]]:
        select = self._select(shards, q, k)
        keys = _Arriving(self.exchange, shards, k, v)
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        stretches = [
            _Rows(self, own, at, q[:, :, slice(*at)], select(own, at))
            for own, at in shards.local(self.exchange.rank)
        ]
        windowed = self.options.windowed(shards.length)
        for end in keys.ends(self.steps):
            # The first end is 0: what is here already.
            keys.wait_until(end)
            for rows in stretches:
                rows.attend_to(keys, end, whole=windowed)
        for rows in stretches:
            where = slice(*rows.at)
            out[:, :, where], lse[:, :, where] = rows.result()
        masks = [rows.mask() for rows in stretches]
        self._record(masks)
        return out, lse, masks

    def _select(self, shards: Shards, q: torch.Tensor, k: torch.Tensor) -> Select:
        estimator, config = self.plan.estimator, self.config
        if estimator is None:
            return select_every(shards, q, config, self.options.window_left)
        if estimator == "grid":
            return select_by_grid(self.exchange, shards, q, k, config, self.scale)
        return select_by_bands(self.exchange, shards, q, k, config)

    def _record(self, masks: Sequence[BlockMask]) -> None:
        if not recording.active:
            return
        for mask in masks:
            dense = self.plan.path == "dense"
            record = recording.CallRecord(
                self.layer_idx,
                self.plan.path,
                self.plan.reason,
                mask.q_len,
                mask.k_len,
                1.0 if dense else mask.density(),
                None if dense else mask,
                estimator=self.plan.estimator,
            )
            recording.note(recording.listening(), record)


class _Arriving:
    """Keys and values of all ranks, each stretch sent by its owner, in the order of the sequence.

    They lie token by token, (length, 2, B, Hkv, D): a stretch is in one piece for the collective,
    and any run of tokens is a view for the kernels.
    """

    def __init__(
        self, exchange: Exchange, shards: Shards, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        batch, heads, _, head_dim = k.shape
        self._shards = shards
        self._tokens = k.new_empty((shards.length, 2, batch, heads, head_dim))
        for own, at in shards.local(exchange.rank):
            for i, x in enumerate((k, v)):
                self._tokens[own.start : own.end, i] = x[:, :, slice(*at)].permute(2, 0, 1, 3)
        self._pending: list[tuple[int, Pending]] = [
            (own.end, exchange.broadcast("kv", self._tokens[own.start : own.end], own.rank))
            for own in shards.stretches
        ]

    def ends(self, steps: int) -> Iterator[int]:
        """0, and then the ends of about ``steps`` runs of stretches that are waited for at once."""
        yield 0
        done = 0
        for own in self._shards.stretches:
            if (own.end - done) * steps >= self._shards.length or own.end == self._shards.length:
                yield own.end
                done = own.end

    def wait_until(self, end: int) -> None:
        """Wait for what begins before ``end``."""
        while self._pending and self._pending[0][0] <= end:
            self._pending.pop(0)[1].wait()

    def range(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self._tokens[start:end].unbind(1)
        return k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)


class _Rows:
    """The queries of one stretch, and what they have attended to so far."""

    def __init__(
        self,
        call: ContextCall,
        own: Stretch,
        at: Range,
        q: torch.Tensor,
        selection: Selection,
    ) -> None:
        self.at = at
        self._call, self._own, self._q = call, own, q
        self._bits, self._counts = selection
        self._until = 0  # keys from elsewhere before this are done
        self._own_done = False
        self._so_far: tuple[torch.Tensor, torch.Tensor] | None = None

    def attend_to(self, keys: _Arriving, end: int, whole: bool) -> None:
        """Attend to what has come, all keys before ``end``, and was not attended to.

        Args:
            whole: do all at once when all is here: the window of a part of the keys would not be
                where the ops take it to be.
        """
        own = self._own
        if whole:
            if end >= own.end and not self._own_done:
                window, block = self._call.options.window_left, self._call.config.block_sizes[1]
                assert window is not None
                first = max(0, own.start - window) // block * block
                self._attend(keys, (first, own.end), True)
                self._own_done = True
            return
        if not self._own_done:
            self._attend(keys, (own.start, own.end), True)
            self._own_done = True
        end = min(end, own.start)
        if self._until < end:
            self._attend(keys, (self._until, end), False)
            self._until = end

    def _attend(self, keys: _Arriving, part: Range, causal: bool) -> None:
        call = self._call
        block = call.config.block_sizes[1]
        first, blocks = part[0] // block, -(-part[1] // block) - part[0] // block
        bits, counts = self._bits, self._counts
        if part != (0, self._own.end):
            bits = cut(bits, first, blocks)
            counts = count(bits)
        # A sink counts once: with the first part, which every row has.
        options = call.options if self._so_far is None else ScoreOptions(None, call.options.softcap)
        keywords = options.keywords()
        if not call.options.windowed(self._own.end):
            keywords.pop("window_left", None)
        out, lse = ops.call(
            torch.ops.prism.sparse_attention.default,
            self._q,
            *keys.range(*part),
            bits,
            counts,
            call.scale,
            causal,
            *call.config.block_sizes,
            **keywords,
        )
        if self._so_far is None:
            self._so_far = out, lse
        else:
            self._so_far = join_(*self._so_far, out, lse)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._so_far is not None
        return self._so_far

    def mask(self) -> BlockMask:
        call = self._call
        return BlockMask(
            self._bits,
            self._counts,
            self._own.length,
            self._own.end,
            *call.config.block_sizes,
            True,
        )


def join_(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """merge_attention in float32, over out if it is float32 already."""
    # The part's share of the denominator; no key on either side leaves out as it is.
    share = torch.sigmoid(part_lse - lse).nan_to_num_(0.0)[..., None]
    return out.float().lerp_(part.float(), share), torch.logaddexp(lse, part_lse)
