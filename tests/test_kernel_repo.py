"""tools/kernel_repo.py: the package under another name, and transformers with it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# In a process of its own: two copies of the package, and ops that stay registered.
PROGRAM = """
import importlib.util, json, os, pathlib, sys
import torch, transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_kernels_available

torch.set_num_threads(1)
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=4096,
)
model = transformers.LlamaForCausalLM(config).eval()
ids = torch.randint(0, 97, (2, 2560))
mask = torch.ones_like(ids)
mask[0, :200] = 0

variant = pathlib.Path(sys.argv[1])
if is_kernels_available():  # LOCAL_KERNELS says where it is
    model.set_attn_implementation("me/prism:prism_attention", allow_all_kernels=True)
else:  # what the kernels library does with a variant, and transformers with the module
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert hasattr(module, "flash_attn_forward") and not hasattr(module, "flash_attn_varlen_func")
    ALL_ATTENTION_FUNCTIONS.register("copy", module.prism_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(
        "copy", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]
    )
    model.set_attn_implementation("copy")
with torch.no_grad():
    got = model(ids, attention_mask=mask).logits
    assert "prism_cuda" not in sys.modules
    import prism_cuda

    prism_cuda.register()
    model.set_attn_implementation("prism")
    with prism_cuda.record() as recording:
        want = model(ids, attention_mask=mask).logits
assert {call.path for call in recording.calls} == {"prism"}
assert torch.equal(got[mask.bool()], want[mask.bool()])
"""


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("kernel_repo", ROOT / "tools" / "kernel_repo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_can_be_moved(tool: Any) -> None:
    files = tool.package_files()
    assert {Path("__init__.py"), Path("ops.py"), Path("integrations/transformers.py")} <= {*files}
    for path in files:
        text = tool.relocated((tool.PACKAGE / path).read_text("utf-8"), len(path.parts) - 1, "own")
        compile(text, str(path), "exec")
        assert "torch.ops.prism" not in text
        assert "\nfrom prism_cuda" not in text
    assert 'Library("own", "IMPL")' in tool.relocated(
        (tool.PACKAGE / "ops.py").read_text("utf-8"), 0, "own"
    )


def test_what_is_rewritten(tool: Any) -> None:
    text = (
        "from prism_cuda import ops\nfrom prism_cuda.a.b import c\nx = torch.ops.prism.f\n"
        'y = torch.ops.prism_check.f, "prism::f", f"prism::{f}"\n'
    )
    assert tool.relocated(text, 1, "own") == (
        "from .. import ops\nfrom ..a.b import c\nx = torch.ops.own.f\n"
        'y = torch.ops.own_check.f, "own::f", f"own::{f}"\n'
    )
    with pytest.raises(ValueError, match="cannot make 'import prism_cuda' relative"):
        tool.relocated("import prism_cuda\n", 0, "own")


def test_names_of_builds(tool: Any) -> None:
    config = {"cuda": "13.0", "torch_target": "2.10"}
    assert tool.variant_name(config).startswith("torch-stable-abi210-cu130-")
    assert tool.variant_name(config | {"cuda": None}).startswith("torch-stable-abi210-cpu-")
    assert [tool.cuda_arch(arch) for arch in ("9.0a", "90a", "8.0+PTX", "12.0")] == [
        "9.0a",
        "9.0a",
        "8.0+PTX",
        "12.0",
    ]


def test_a_library_of_another_name_is_refused(tool: Any, needs_library: None) -> None:
    with pytest.raises(
        ValueError, match="has no ops called own; build it with PRISM_NAMESPACE=own"
    ):
        tool.build_config(tool.PACKAGE / "_C.abi3.so", "own")


@pytest.mark.slow
def test_transformers_with_a_repository(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("PRISM_CPU_ONLY", "1")
    name = tool.namespace()
    variant = tool.write(tmp_path, tool.build_library(name), name, 1)
    assert json.loads((variant / "metadata.json").read_text())["id"] == name
    environment = os.environ | {
        "LOCAL_KERNELS": f"me/prism={tmp_path}",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(variant)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
