"""The evaluation of selection quality is a folder of scripts: its modules are found by path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "bench" / "quality"))

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
