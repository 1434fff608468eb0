"""The estimators by name, and how to add one."""

from __future__ import annotations

from prism_cuda.config import MAX_HEAD_DIM, PrismConfig
from prism_cuda.estimators.bands import TwoBands
from prism_cuda.estimators.base import Estimator, rules_of
from prism_cuda.estimators.function import ByFunction, EstimatorFunction
from prism_cuda.estimators.grid import Grid
from prism_cuda.remember import remembered

MAX_ATTENTION_HEAD_DIM = 256  # multiples of 8

# Keeps every block that a row sees and estimates nothing; only prism::prefill knows it.
ALL = "all"

_estimators: dict[str, Estimator] = {own.name: own for own in (Grid(), TwoBands())}
_BUILT_IN = ("auto", ALL, *_estimators)


def get(name: str) -> Estimator:
    """The estimator of this name."""
    return _estimators[name]


def register_estimator(name: str, function: EstimatorFunction) -> None:
    """Let ``PrismConfig(estimator=name)`` choose blocks by a function of yours.

    Args:
        name: what the config says and recordings show. A name of yours is replaced.
        function: ``function(q, k, config, *, scale, causal) -> BlockMask`` for q (B, Hq, q_len, D)
            and k (B, Hkv, k_len, D), with the config's block sizes. What it makes of the config's
            other settings is its own affair; calls that the config runs dense do not come to it.

    Raises:
        TypeError: if function cannot be called.
        ValueError: if name is empty or built in.
    """
    if not callable(function):
        raise TypeError(
            f"register_estimator: function is {function!r}; expected function(q, k, config, *, "
            "scale, causal) -> BlockMask"
        )
    if not isinstance(name, str) or not name or name in _BUILT_IN:
        raise ValueError(
            f"register_estimator: name is {name!r}; expected a string other than '' and {_BUILT_IN}"
        )
    _estimators[name] = ByFunction(name, function)
    MAX_HEAD_DIM[name] = MAX_ATTENTION_HEAD_DIM


@remembered
def op_arguments(
    name: str | None, config: PrismConfig, head_dim: int, q_heads: int
) -> tuple | None:
    """What prism::prefill takes from ``estimator`` to ``keep_recent``; None where it cannot do.

    Args:
        name: the estimator; None to keep every block.

    Raises:
        ValueError: if config's settings of heads do not fit them.
    """
    if name is None:
        rules_of(config, ALL, q_heads)  # settings that do not fit the heads are refused here, too
        return (ALL, [], [], [1.0], None, config.keep_sink, config.keep_recent)
    return _estimators[name].op_arguments(config, head_dim, q_heads)


__all__ = ["Estimator", "get", "op_arguments", "register_estimator"]
