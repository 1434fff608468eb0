"""The stub against vLLM itself, by its source files, and the backend above its own classes.

The sources are an installed vLLM's, or those of the folder VLLM_SOURCE, an unpacked wheel; for them
nothing of vLLM is imported. The last test needs a vLLM that can be imported, and no GPU.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import vllm_stub

import prism_cuda
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
    return {
        node.target.id
        for node in class_node.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


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
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    assert backend["forward_includes_kv_cache_update"] is False  # the cache is written before


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, needs_library: None) -> Any:
    """Our module above vLLM's own classes, where vLLM can be imported."""
    pytest.importorskip("vllm", exc_type=ImportError)
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from prism_cuda.integrations.vllm import register, reset_counts

    register()
    reset_counts()
    backend = AttentionBackendEnum.CUSTOM.get_class()
    assert AttentionBackendEnum[backend.get_name()] is AttentionBackendEnum.CUSTOM
    return sys.modules[backend.__module__]


def engine_config() -> Any:
    """What the real classes ask of a VllmConfig."""
    known = vllm_stub.config({"top_p": 0.3, "keep_above": 1.0, "dense_below": 256})
    model, parallel = vars(known.model_config), vars(known.parallel_config)
    model.update(
        get_num_attention_heads=lambda parallel: 4,
        get_num_kv_heads=lambda parallel: 2,
        get_head_size=lambda: 64,
        rswa_window=None,
        dtype=torch.bfloat16,
    )
    parallel.update(cp_kv_cache_interleave_size=1, decode_context_parallel_size=1)
    known.cache_config = SimpleNamespace(cache_dtype="auto")
    known.compilation_config = SimpleNamespace(
        cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: True),
        max_cudagraph_capture_size=512,
    )
    known.attention_config = SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=32)
    known.speculative_config = None
    return known


def test_the_real_classes(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.26's own builder, metadata and layer, but for FlashAttention's kernel."""
    import vllm
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from prism_cuda.integrations.vllm import counts

    if not vllm.__version__.startswith("0.26."):
        pytest.skip("the configuration above is 0.26's")
    flash = sys.modules["vllm.v1.attention.backends.flash_attn"]
    config, dense = engine_config(), []
    monkeypatch.setattr(flash, "flash_attn_varlen_func", lambda **call: dense.append(call), False)
    monkeypatch.setattr(real, "get_current_vllm_config_or_none", lambda: config)
    backend, name = real.PrismBackend, "model.layers.3.self_attn.attn"
    spec = SimpleNamespace(block_size=16, dtype=torch.bfloat16, sliding_window=None)
    builder = backend.get_builder_cls()(spec, [name], config, torch.device("cpu"))
    impl = backend.get_impl_cls()(4, 64, 64**-0.5, 2, None, None, "auto")
    impl.vllm_flash_attn_version = 3

    q_lens, k_lens = torch.tensor([[1, 1, 300, 150], [40, 300, 300, 420]], dtype=torch.int32)
    starts = torch.nn.functional.pad(q_lens.cumsum(0, dtype=torch.int32), (1, 0))
    table = torch.arange(4 * 27, dtype=torch.int32).view(4, 27)
    shape = backend.get_kv_cache_shape(table.numel(), 16, 2, 64)
    cache = torch.randn(shape, dtype=torch.bfloat16)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=k_lens,
        num_reqs=4,
        num_actual_tokens=452,
        max_query_len=300,
        max_seq_len=420,
        block_table_tensor=table,
        slot_mapping=torch.zeros(452),
        seq_lens_cpu_upper_bound=k_lens,
    )
    layer = SimpleNamespace(layer_name=name, attn_backend=backend)
    layer._q_scale = layer._k_scale = layer._v_scale = torch.ones(())
    q = torch.randn(452, 4, 64, dtype=torch.bfloat16)
    out = torch.empty_like(q)
    impl.forward(layer, q, q, q, cache, builder.build(0, common), out)
    assert counts() == {"prism": 1, "flash_attn: sequences beside prefills": 1}
    (call,) = dense
    assert (call["max_seqlen_q"], call["max_seqlen_k"], call["scheduler_metadata"]) == (
        1,
        300,
        None,
    )
    assert call["cu_seqlens_q"].tolist() == [0, 1, 2]
    keys, values = cache.transpose(1, 2).split(64, -1)
    settings = prism_cuda.PrismConfig(**config.additional_config["prism"])
    for b in (2, 3):
        k, v = (
            x[table[b]].flatten(0, 1)[: k_lens[b]].transpose(0, 1)[None] for x in (keys, values)
        )
        rows = slice(starts[b], starts[b + 1])
        want = prism_cuda.prefill(q[rows].transpose(0, 1)[None], k, v, config=settings)
        torch.testing.assert_close(out[rows], want[0].transpose(0, 1))
    impl.forward(layer, q, q, q, torch.tensor([]), None, out)
    assert (out == 0).all()
