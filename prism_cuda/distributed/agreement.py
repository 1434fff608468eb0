"""What all ranks of a call have to agree on, compared before anything else is exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from prism_cuda.config import PrismConfig
from prism_cuda.distributed.exchange import Exchange
from prism_cuda.options import ScoreOptions

Description = dict[str, Any]


def describe(
    q: torch.Tensor,
    k: torch.Tensor,
    config: PrismConfig,
    options: ScoreOptions,
    scale: float | None,
) -> Description:
    """All that has to be equal; the lengths are not."""
    return {
        "batch size": q.shape[0],
        "query heads": q.shape[1],
        "key heads": k.shape[1],
        "head_dim": q.shape[3],
        "dtype": str(q.dtype),
        "device": q.device.type,
        "config": config.to_dict(),
        "scale": scale,
        "softcap": options.softcap,
        "window_left": options.window_left,
        "sinks": None if options.sinks is None else options.sinks.tolist(),
    }


def agree(exchange: Exchange, local: Callable[[], tuple[Description, Any]]) -> list[Any]:
    """Compare the descriptions of all ranks; what else each of them says.

    Args:
        local: checks the rank's own arguments, and gives their description and a value for all.
            What it raises is raised here, when the others know.

    Raises:
        ValueError: if a rank says otherwise or has refused its arguments, naming it and them; on
            every rank.
    """
    failure: Exception | None = None
    mine: tuple[Description, Any] = {}, None
    try:
        mine = local()
    except Exception as error:
        failure = error
    said = exchange.objects((None if failure is None else str(failure), *mine))
    if failure is not None:
        raise failure
    for rank, (refusal, _, _) in enumerate(said):
        if refusal is not None:
            raise ValueError(f"context_parallel_prefill: rank {rank} was refused: {refusal}")
    _, first, _ = said[0]
    for rank, (_, other, _) in enumerate(said):
        for name, value in first.items():
            if other.get(name) != value:
                found, expected = _difference(other.get(name), value)
                raise ValueError(
                    f"context_parallel_prefill: {name} is {found} on rank {rank} and {expected} "
                    "on rank 0; expected the same on all ranks"
                )
    return [value for _, _, value in said]


def _difference(one: Any, other: Any) -> tuple[Any, Any]:
    """Of two configs only what differs."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [name for name in other if one.get(name) != other[name]]
        return {name: one.get(name) for name in names}, {name: other[name] for name in names}
    return one, other
