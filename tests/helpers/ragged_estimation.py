"""Estimation of ragged batches: the op for a batch beside the op for each sequence by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from helpers import oracle
from helpers.poison import poisoned_allocations
from helpers.ragged import RaggedInputs, estimated_alone

RULES: dict[str, Any] = {"top_p": 0.8, "keep_sink": 1, "keep_recent": 2, "keep_above": 0.2}


@dataclass(frozen=True)
class Estimation:
    """An estimator's op of one sequence, whose name with _varlen is that of a ragged batch."""

    name: str
    by_bands: bool

    def op(self, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(torch.ops.prism, f"{self.name}_varlen")(**arguments)

    def arguments_of(self, case: RaggedInputs) -> dict[str, Any]:
        where = {name: x for name, x in case.tensors.items() if name != "sinks"}
        settings = {
            name: case.settings[name] for name in ("causal", "q_block_size", "k_block_size")
        }
        if self.by_bands:
            high, low = oracle.half_split_bands(case.q.shape[-1], 32, 48)
            settings |= {"high_band": high, "low_band": low}
        else:
            settings["scale"] = case.settings["scale"]
        return {"q": case.q, "k": case.k} | where | RULES | settings

    def run(self, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        with poisoned_allocations():
            return self.op(arguments)

    def check(self, case: RaggedInputs, **changes: Any) -> None:
        """Every sequence keeps what it keeps alone, bit by bit."""
        arguments = self.arguments_of(case) | changes
        bits, counts = self.run(arguments)
        settings = {
            name: x
            for name, x in arguments.items()
            if name not in case.tensors and name not in ("q", "k")
        }
        alone = getattr(torch.ops.prism, self.name)
        want_bits, want_counts = estimated_alone(alone, case, settings)
        assert torch.equal(counts.cpu(), want_counts)
        assert torch.equal(bits.cpu(), want_bits)

    def refuse(self, arguments: dict[str, Any], pattern: str) -> None:
        with pytest.raises(RuntimeError, match=rf"prism::{self.name}_varlen\b.*(?:{pattern})"):
            self.op(arguments)


BLOCKS = Estimation("estimate_blocks", by_bands=True)
GRID = Estimation("estimate_grid", by_bands=False)
