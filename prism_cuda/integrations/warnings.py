"""Warnings that are given once, and not while a model is being traced."""

from __future__ import annotations

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


def warn_once(message: str) -> None:
    """Log a warning the first time it is given; torch.compile cannot trace a logger."""
    if not torch.compiler.is_compiling():
        logger.warning_once(message)


def warn_of_dense(module: torch.nn.Module, reason: str | None) -> None:
    """Say once that a long prefill runs dense although nobody asked for it."""
    warn_once(f"prism: {type(module).__name__} runs dense: {reason}.")
