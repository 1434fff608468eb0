"""The stub against vLLM itself, by its source files: nothing of vLLM is imported or run.

The sources are an installed vLLM's, or those of the folder VLLM_SOURCE, an unpacked wheel.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any

import pytest
from helpers import vllm_stub

from prism_cuda.integrations.vllm.versions import check_version

BACKENDS = "v1/attention/backends"
METHODS = [
    ("FlashAttentionMetadataBuilder", "__init__"),
    ("FlashAttentionMetadataBuilder", "build"),
    ("FlashAttentionMetadataBuilder", "update_block_table"),
    ("FlashAttentionImpl", "__init__"),
    ("FlashAttentionImpl", "forward"),
]


def folder() -> tuple[Path, str]:
    """The package's folder, and its version."""
    given = os.environ.get("VLLM_SOURCE")
    if given:
        (info,) = Path(given).glob("vllm-*.dist-info")
        return Path(given) / "vllm", info.name.split("-")[1].removesuffix(".dist")
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("no vLLM: install one, or set VLLM_SOURCE to an unpacked wheel")
    return Path(found.origin).parent, importlib.metadata.version("vllm")


@pytest.fixture(scope="module")
def source() -> Any:
    root, version = folder()
    check_version(version)
    trees = {}
    for name in ("v1/attention/backend.py", f"{BACKENDS}/flash_attn.py", f"{BACKENDS}/registry.py"):
        trees[name] = ast.parse((root / name).read_text(encoding="utf-8"))
    return trees, version


def definitions(source: Any, file: str) -> dict[str, Any]:
    return {node.name: node for node in source[0][file].body if hasattr(node, "name")}


def arguments(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]


def members(class_node: ast.ClassDef) -> dict[str, Any]:
    return {node.name: node for node in class_node.body if isinstance(node, ast.FunctionDef)}


def fields(class_node: ast.ClassDef) -> set[str]:
    return {node.target.id for node in class_node.body if isinstance(node, ast.AnnAssign)}


@pytest.mark.parametrize(("class_name", "method"), METHODS)
def test_methods_take_the_same(source: Any, class_name: str, method: str) -> None:
    real = members(definitions(source, f"{BACKENDS}/flash_attn.py")[class_name])[method]
    stub = getattr(getattr(vllm_stub, class_name), method)
    assert list(inspect.signature(stub).parameters) == arguments(real)


def test_metadata_has_the_fields(source: Any) -> None:
    flash = definitions(source, f"{BACKENDS}/flash_attn.py")["FlashAttentionMetadata"]
    early = source[1].startswith("0.26.")
    stub = vllm_stub.FlashAttentionMetadata026 if early else vllm_stub.FlashAttentionMetadata
    assert set(stub.__dataclass_fields__) <= fields(flash)
    common = definitions(source, "v1/attention/backend.py")["CommonAttentionMetadata"]
    assert set(vllm_stub.CommonAttentionMetadata.__dataclass_fields__) <= fields(common)


def test_the_rest_of_what_the_backend_uses(source: Any) -> None:
    base = definitions(source, "v1/attention/backend.py")
    threshold = members(base["AttentionMetadataBuilder"])["_init_reorder_batch_threshold"]
    stub = vllm_stub.FlashAttentionMetadataBuilder._init_reorder_batch_threshold
    assert list(inspect.signature(stub).parameters) == arguments(threshold)
    assert {"AttentionCGSupport", "AttentionType", "MultipleOf"} <= base.keys()
    registry = definitions(source, f"{BACKENDS}/registry.py")
    real = arguments(registry["register_backend"])
    assert list(inspect.signature(vllm_stub.register_backend).parameters) == real
    assert {"is_overridden", "get_path"} <= members(registry["AttentionBackendEnum"]).keys()
    flash = definitions(source, f"{BACKENDS}/flash_attn.py")
    backend = {
        node.target.id: node.value.value
        for node in flash["FlashAttentionBackend"].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Constant)
    }
    assert backend["forward_includes_kv_cache_update"] is False  # the cache is written before


def test_the_real_classes(source: Any) -> None:
    """Where vLLM can be imported."""
    pytest.importorskip("vllm", exc_type=ImportError)
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from prism_cuda.integrations.vllm import register

    register()
    backend = AttentionBackendEnum.CUSTOM.get_class()
    assert AttentionBackendEnum[backend.get_name()] is AttentionBackendEnum.CUSTOM
    assert issubclass(backend.get_impl_cls(), backend.__mro__[1].get_impl_cls())
