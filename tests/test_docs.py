"""The Python blocks of docs/serving.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
BLOCK = re.compile(r"^```python( cuda)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("needs_library")
def test_the_blocks_run_in_order() -> None:
    text = PAGE.read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```") // 2
    names: dict[str, Any] = {}
    for block in blocks:
        needs_cuda, source = block.groups()
        if needs_cuda and not torch.cuda.is_available():
            compile(source, str(PAGE), "exec")
            continue
        # Lines as in the page, for the traceback.
        lines_before = text.count("\n", 0, block.start(2))
        exec(compile("\n" * lines_before + source, str(PAGE), "exec"), names)
    assert names["out"].shape == names["q"].shape
    assert names["out"].isfinite().all()
