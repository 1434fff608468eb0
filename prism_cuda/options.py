"""ScoreOptions: what changes scores and denominators of attention, not which blocks it reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ScoreOptions:
    """Sinks, soft cap and window of a call.

    Attributes:
        sinks: float32 (Hq,), a logit per head that joins the softmax denominator.
        softcap: scaled scores become softcap * tanh(score / softcap).
        window_left: a row sees only so many keys before its own position.
    """

    sinks: torch.Tensor | None = None
    softcap: float | None = None
    window_left: int | None = None

    def windowed(self, k_len: int) -> bool:
        """Whether the window hides any of the keys."""
        return self.window_left is not None and self.window_left + 1 < k_len

    def keywords(self) -> dict[str, object]:
        """Those that are set, as the ops take them."""
        given = {
            "sinks": self.sinks,
            "softcap": self.softcap,
            "window_left": self.window_left,
        }
        return {name: value for name, value in given.items() if value is not None}


PLAIN = ScoreOptions()


def score_options(
    sinks: torch.Tensor | None, softcap: float | None, window_left: int | None
) -> ScoreOptions:
    """The options of a call; the same object for all calls without any."""
    if sinks is None and softcap is None and window_left is None:
        return PLAIN
    return ScoreOptions(sinks, softcap, window_left)
