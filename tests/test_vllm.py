"""The vLLM backend against a stub of the interface: which sequences go where, and their results."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import vllm_stub
from helpers.vllm_stub import LAYOUTS, CommonAttentionMetadata

import prism_cuda
from prism_cuda.integrations import vllm as plugin
from prism_cuda.integrations.vllm.cache import split_cache
from prism_cuda.integrations.vllm.layers import config_of_layer, layer_index
from prism_cuda.integrations.vllm.settings import DENSE_BELOW, settings_of
from prism_cuda.integrations.vllm.steps import grouped
from prism_cuda.integrations.vllm.versions import check_version

pytestmark = pytest.mark.usefixtures("needs_library")

Q_HEADS, KV_HEADS, DIM, PAGE = 4, 2, 64, 16
SETTINGS = {"top_p": 0.3, "keep_above": 1.0, "dense_below": 256}
CONFIG = prism_cuda.PrismConfig(**SETTINGS)  # type: ignore[arg-type]
DECODES, CHUNKS = [(1, 40), (1, 300)], [(20, 50), (150, 420), (140, 200), (260, 260)]
MIXED = DECODES + CHUNKS  # (queries, keys); the first long prefill is number 3


@pytest.fixture(params=["0.26.0", "0.33.0"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    vllm_stub.install(monkeypatch, request.param)
    plugin.reset_counts()
    yield importlib.import_module(plugin.BACKEND.rpartition(".")[0])
    sys.modules.pop("prism_cuda.integrations.vllm.backend")


class Engine:
    """A layer, its cache, and steps of sequences through both."""

    def __init__(
        self, backend: Any, layout: str = "BHN2D", settings: Any = SETTINGS, **layer: Any
    ) -> None:
        self.config = vllm_stub.config(settings)
        vllm_stub.current.append(self.config)
        self.impl = self.layer(backend, **layer)
        self.impl.layout = layout
        self.name = SimpleNamespace(
            layer_name="model.layers.3.self_attn.attn", attn_backend=backend.PrismBackend
        )
        spec = SimpleNamespace(block_size=PAGE)
        self.builder = backend.PrismMetadataBuilder(spec, ["layer"], self.config, None)
        self.layout = layout

    @staticmethod
    def layer(backend: Any, **given: Any) -> Any:
        arguments = {
            "num_heads": Q_HEADS,
            "head_size": DIM,
            "scale": DIM**-0.5,
            "num_kv_heads": KV_HEADS,
            "alibi_slopes": None,
            "sliding_window": None,
            "kv_cache_dtype": "auto",
        }
        return backend.PrismImpl(**(arguments | given))

    def step(self, lengths: list[tuple[int, int]], bounds: bool = True, **common: Any) -> None:
        """Draw a step's queries and cache, and what the engine says of it."""
        pages = [-(-k // PAGE) for _, k in lengths]
        total = sum(pages) + 3
        rows = torch.randn(2, total, PAGE, KV_HEADS, DIM, dtype=torch.bfloat16)
        self.k, self.v = rows
        self.cache = {
            "2BNHD": rows,
            "B2NHD": rows.transpose(0, 1),
            "BHN2D": torch.cat([*rows], -1).transpose(1, 2),
        }[self.layout]
        self.table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
        order = torch.randperm(total, dtype=torch.int32).split([*pages, 3])
        for row, own in zip(self.table, order, strict=False):
            row[: len(own)] = own
        self.lengths = lengths
        q_lens, k_lens = (
            torch.tensor(values, dtype=torch.int32) for values in zip(*lengths, strict=True)
        )
        starts = torch.nn.functional.pad(q_lens.cumsum(0, dtype=torch.int32), (1, 0))
        self.starts = starts.tolist()
        self.q = torch.randn(self.starts[-1], Q_HEADS, DIM, dtype=torch.bfloat16)
        known: dict[str, Any] = dict(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=k_lens,
            num_reqs=len(lengths),
            num_actual_tokens=self.starts[-1],
            max_query_len=int(q_lens.max()),
            max_seq_len=int(k_lens.max()),
            block_table_tensor=self.table,
            slot_mapping=torch.zeros(self.starts[-1]),
            seq_lens_cpu_upper_bound=k_lens if bounds else None,
        )
        self.common = CommonAttentionMetadata(**(known | common))

    def forward(self, metadata: Any = None) -> torch.Tensor:
        if metadata is None:
            metadata = self.builder.build(0, self.common)
        out = torch.full_like(self.q, torch.nan)
        returned = self.impl.forward(
            self.name, self.q, self.q, self.q, self.cache, metadata, out, None, None
        )
        assert returned is out
        return out

    def prefill(self, b: int, options: Any = None, **settings: Any) -> torch.Tensor:
        """prism_cuda.prefill of one sequence, (queries, Hq, D)."""
        k_len = self.lengths[b][1]
        q = self.q[self.starts[b] : self.starts[b + 1]].transpose(0, 1)[None]
        pages = self.table[b]
        k, v = (x[pages].flatten(0, 1)[:k_len].transpose(0, 1)[None] for x in (self.k, self.v))
        config = prism_cuda.PrismConfig(**(SETTINGS | settings))
        return prism_cuda.prefill(q, k, v, config=config, **(options or {}))[0].transpose(0, 1)

    def check(self, out: torch.Tensor, sparse: set[int], **settings: Any) -> None:
        """Sequences of ``sparse`` are prism's, to the bit where it estimates; others are dense."""
        for b, (q_len, k_len) in enumerate(self.lengths):
            got = out[self.starts[b] : self.starts[b + 1]]
            want = self.prefill(b, **(settings if b in sparse else {"dense_below": 1 << 20}))
            torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
            if b in sparse and q_len >= 128 and k_len >= 256:
                dense = self.prefill(b, dense_below=1 << 20)
                assert (got - dense).abs().max() > 0.1  # it did leave blocks out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mixed_step_is_divided(backend: Any, layout: str) -> None:
    engine = Engine(backend, layout)
    engine.step(MIXED)
    engine.check(engine.forward(), {3, 4, 5})
    assert plugin.counts() == {"prism": 1, "flash_attn: sequences beside prefills": 1}
    (others,) = engine.impl.seen
    assert (others.num_actual_tokens, others.max_query_len, others.max_seq_len) == (22, 20, 300)
    assert others.scheduler_metadata is None  # the whole step's does not fit
    assert others.max_num_splits == 0


def test_a_step_of_prefills_alone(backend: Any) -> None:
    engine = Engine(backend)
    engine.step([(300, 300)], bounds=False)
    engine.check(engine.forward(), {0})
    assert plugin.counts() == {"prism": 1}


def test_padding_at_the_end_of_a_step(backend: Any) -> None:
    engine = Engine(backend)
    engine.step([(1, 30), (300, 300), (0, 1)])
    out = engine.forward()
    engine.lengths = engine.lengths[:2]
    engine.check(out, {1})


def test_groups_bound_the_workspaces(backend: Any) -> None:
    engine = Engine(backend, settings=SETTINGS | {"workspace_tokens": 500})
    engine.step(MIXED)
    metadata = engine.builder.build(0, engine.common)
    parts = [(part.first, part.end) for part in metadata.prism_step.prefills]
    assert parts == [(3, 4), (4, 5), (5, 6)]
    engine.check(engine.forward(metadata), {3, 4, 5})


@pytest.mark.parametrize(
    ("k_lens", "runs"),
    [
        ([], []),
        ([9], [(0, 1)]),
        ([2, 2, 2], [(0, 3)]),
        ([2, 3, 2], [(0, 2), (2, 3)]),
        ([1, 1, 1, 1, 6], [(0, 4), (4, 5)]),
        ([7, 1, 8], [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_grouped(k_lens: list[int], runs: list[tuple[int, int]]) -> None:
    assert grouped(k_lens, 6) == runs


def test_pages_of_another_group_of_layers(backend: Any) -> None:
    engine = Engine(backend)
    engine.step(MIXED)
    metadata = engine.builder.build(0, engine.common)
    renamed = torch.randperm(len(engine.cache), dtype=torch.int32)
    moved = engine.builder.update_block_table(
        metadata, renamed[engine.table], metadata.slot_mapping
    )
    engine.cache = engine.cache[renamed.argsort()]
    engine.check(engine.forward(moved), {3, 4, 5})
    short = engine.builder.build(0, replaced(engine.common, max_query_len=1))
    assert engine.builder.update_block_table(short, engine.table, None).prism_step == (
        "decode, or chunks of less than a block"
    )


def replaced(common: CommonAttentionMetadata, **changes: Any) -> CommonAttentionMetadata:
    return CommonAttentionMetadata(**(vars(common) | changes))


@pytest.mark.parametrize(
    ("lengths", "common", "reason"),
    [
        (DECODES, {}, "decode, or chunks of less than a block"),
        ([(20, 600)], {}, "decode, or chunks of less than a block"),
        ([(200, 200)], {}, "fewer than 256 keys"),
        ([(1, 300), (200, 200)], {}, "fewer than 256 keys"),
        (MIXED, {"causal": False}, "not causal"),
        (MIXED, {"causal": torch.ones(6)}, "not causal"),
    ],
)
def test_steps_that_stay_whole(backend: Any, lengths: list, common: dict, reason: str) -> None:
    engine = Engine(backend)
    engine.step(lengths, **common)
    out = engine.forward()
    assert plugin.counts() == {f"flash_attn: {reason}": 1}
    assert engine.impl.seen[0].num_actual_tokens == len(out)
    if not common:
        engine.check(out, set())


@pytest.mark.parametrize(
    ("layer", "settings", "reason"),
    [
        ({"sliding_window": 64}, {}, "sliding window"),
        ({"attn_type": vllm_stub.AttentionType.ENCODER_DECODER}, {}, "not self-attention"),
        ({"alibi_slopes": [1.0] * 4}, {}, "ALiBi"),
        ({"kv_cache_dtype": "fp8"}, {}, "fp8 cache"),
        ({}, {"dense_layers": [3]}, "dense_layers"),
    ],
)
def test_layers_that_stay_dense(backend: Any, layer: dict, settings: dict, reason: str) -> None:
    engine = Engine(backend, settings=SETTINGS | settings, **layer)
    engine.step(MIXED)
    engine.forward()
    (way,) = plugin.counts()
    assert way.startswith(f"flash_attn: {reason}")


def test_what_else_stays_dense(backend: Any) -> None:
    engine = Engine(backend)
    engine.step(MIXED)
    build = engine.builder.build
    assert build(0, engine.common, fast_build=True).prism_step == "a draft model"
    engine.builder.kv_cache_spec.block_size = 48
    assert build(0, engine.common).prism_step == "pages of 48 tokens"
    engine.builder.kv_cache_spec.block_size = PAGE
    metadata = build(0, engine.common)
    if hasattr(metadata, "use_cascade"):
        assert build(7, engine.common).prism_step == "cascade attention"
    del metadata.prism_step
    engine.forward(metadata)
    engine.name.attn_backend = type("Chunked", (backend.PrismBackend,), {})
    engine.impl._own = None
    engine.forward()
    assert set(plugin.counts()) == {
        "flash_attn: metadata of another builder",
        "flash_attn: attention in chunks of its own",
    }


def test_cascade_attention_is_for_decodes(backend: Any) -> None:
    builder = Engine(backend).builder
    assert builder.use_cascade_attention(300, [1, 1])
    assert not builder.use_cascade_attention(300, [1, 128])


def test_settings_of_a_layer_reach_it(backend: Any) -> None:
    layers = {"layers": {"3": {"top_p": 1.0}}}
    engine = Engine(backend, settings=SETTINGS | layers)
    engine.step([(300, 300)])
    out = engine.forward()
    torch.testing.assert_close(out, engine.prefill(0, top_p=1.0), atol=2e-2, rtol=2e-2)
    with prism_cuda.record() as recording:
        engine.forward()
    assert [(call.layer_idx, call.path) for call in recording.calls] == [(3, "prism")]


def test_soft_cap_and_sinks_are_passed_on(backend: Any) -> None:
    sinks = torch.randn(Q_HEADS, dtype=torch.bfloat16)
    engine = Engine(backend, logits_soft_cap=2.0, sinks=sinks)
    engine.step([(300, 300)])
    k, v = (
        x[engine.table[0]].flatten(0, 1)[:300].transpose(0, 1)[None] for x in (engine.k, engine.v)
    )
    want = prism_cuda.prefill(
        engine.q.transpose(0, 1)[None],
        k,
        v,
        config=CONFIG,
        softcap=2.0,
        sinks=sinks.float(),
    )
    torch.testing.assert_close(engine.forward(), want[0].transpose(0, 1), atol=2e-2, rtol=2e-2)


def test_profiling_makes_the_largest_call_once(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def note(*args: Any, **kwargs: Any) -> None:
        seen.append(kwargs)
        real(*args, **kwargs)

    real = backend.run_worst_case
    monkeypatch.setattr(backend, "run_worst_case", note)
    engine = Engine(backend, settings=SETTINGS | {"workspace_tokens": 1200})
    q, out = torch.randn(8, Q_HEADS, DIM, dtype=torch.bfloat16), torch.ones(8, Q_HEADS, DIM)
    for impl in (engine.impl, engine.layer(backend), engine.layer(backend, sliding_window=9)):
        impl.forward(engine.name, q, q, q, torch.tensor([]), None, out)
    assert seen == [{"tokens": 256, "longest": 512, "sequences": 2}]
    assert (out == 0).all()


def test_heads_that_settings_do_not_fit(backend: Any) -> None:
    engine = Engine(backend, settings=SETTINGS | {"top_p": [0.5] * 3})
    engine.step([(300, 300)])
    with pytest.raises(ValueError, match="top_p has 3 values; expected one number or 4"):
        engine.forward()
    engine = Engine(backend, settings=SETTINGS | {"dense_heads": [0]})
    engine.config.parallel_config.tensor_parallel_size = 2
    engine.step([(300, 300)])
    with pytest.raises(ValueError, match="settings of single heads .* 2 tensor-parallel ranks"):
        engine.forward()


def test_what_the_engine_asks_of_the_classes(backend: Any) -> None:
    chosen = backend.PrismBackend
    assert chosen.get_name() == "CUSTOM"
    assert chosen.get_impl_cls() is backend.PrismImpl
    builder = chosen.get_builder_cls()
    assert builder._cudagraph_support == vllm_stub.AttentionCGSupport.UNIFORM_BATCH
    assert Engine(backend).builder.reorder_batch_threshold == 1
    assert chosen.get_supported_kernel_block_sizes() == [16, 32, 64, 128, 256]


def test_registering(backend: Any) -> None:
    custom = vllm_stub.AttentionBackendEnum.CUSTOM
    for _ in range(2):
        plugin.register()
        module, _, name = custom.get_path().rpartition(".")
        assert getattr(importlib.import_module(module), name) is backend.PrismBackend
    vllm_stub.register_backend(custom, "theirs.Backend")
    plugin.register()
    assert custom.get_path() == "theirs.Backend"


def test_unknown_versions_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_version("0.26.0")
    assert check_version("0.26.1+cu130")
    assert not check_version("0.33.0")
    for version in ("0.25.9", "0.27.0", "0.34.0rc1", "1.26.0", "dev"):
        with pytest.raises(ImportError, match=f"vLLM {version}; expected 0.26.x, or 0.33.x"):
            check_version(version)
    vllm_stub.install(monkeypatch, "0.30.1")
    plugin.register()  # in every process, whichever backend is asked for
    with pytest.raises(ImportError, match=r"vLLM 0\.30\.1"):
        importlib.import_module("prism_cuda.integrations.vllm.backend")


def test_settings() -> None:
    assert settings_of(None) == settings_of({}) == settings_of({"other": 1})
    assert settings_of({}).config.dense_below == DENSE_BELOW
    given = settings_of({"prism": {"top_p": 0.9, "layers": {"2": {"top_p": 1}}}})
    assert (given.config.top_p, given.config.dense_below) == (0.9, DENSE_BELOW)
    assert given.config.for_layer(2).top_p == 1
    for wrong, message in (
        (7, "additional_config is a int; expected a dict"),
        ({"prism": 0.9}, r'additional_config\["prism"\] is 0.9; expected a dict'),
        ({"prism": {"topp": 1}}, "sets 'topp'; expected block_size, .*top_p, .*workspace_tokens"),
        ({"prism": {"top_p": 2}}, "is wrong: PrismConfig: top_p is 2; expected a number in"),
        ({"prism": {"workspace_tokens": 0}}, "is 0; expected an integer above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            settings_of(wrong)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.7.self_attn.attn", 7),
        ("language_model.model.layers.12.attn", 12),
        ("transformer.h.3.attn", 3),
        ("towers.2.model.layers.5.self_attn.0.attn", 5),
        ("gpt.parts.4.attn", 4),
        ("a.1.b.2", None),
        ("attn", None),
    ],
)
def test_layer_index(name: str, index: int | None) -> None:
    assert layer_index(name) == index


def test_caches_that_are_not_known() -> None:
    for shape in ((9, 3, 16, 128), (2, 2, 16, 2, 64), (9, 3, 16, 2, 64), (9, 16, 2, 64)):
        with pytest.raises(ValueError, match=r"kv_cache has shape .*; expected \(pages, 2"):
            split_cache(torch.zeros(shape), 2, 64)


def test_bands_come_from_the_model() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, rope_parameters={"rope_theta": 5e5}
    )
    config = prism_cuda.PrismConfig(estimator="bands")
    want = prism_cuda.PrismConfig(estimator="bands", rope_theta=5e5).resolve_bands(64)
    assert config_of_layer(config, model, 0, 64).bands == want
    assert config_of_layer(prism_cuda.PrismConfig(), None, 0, 64) == prism_cuda.PrismConfig()
    model.no_rope_layers = [1, 0]
    assert config_of_layer(config, model, 1, 64).bands == prism_cuda.Bands((), (0, 64))
    own = type("OwnConfig", (), {"rope_parameters": {"rope_theta": 1e4}})()
    own.rope_theta = 1e4
    with pytest.raises(ValueError, match="rope_layout"):
        config_of_layer(config, own, 0, 64)
