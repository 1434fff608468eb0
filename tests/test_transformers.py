"""attn_implementation="prism" against eager and sdpa, on tiny random models."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from helpers.models import EXACT, TINY  # noqa: E402
from transformers import (  # noqa: E402
    CohereConfig,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
    StaticCache,
)
from transformers.masking_utils import create_causal_mask  # noqa: E402

import prism_cuda  # noqa: E402
from prism_cuda import PrismConfig  # noqa: E402
from prism_cuda.integrations import masks, padded  # noqa: E402

pytestmark = pytest.mark.usefixtures("needs_library")


@pytest.fixture(autouse=True)
def _registered() -> None:
    prism_cuda.register(EXACT)
    sparse = PrismConfig(block_size=64, estimator="bands", top_p=0.4, dense_below=0)
    prism_cuda.register(sparse, "prism-sparse")
    prism_cuda.register(PrismConfig(), "prism-default")


def build(config_class=LlamaConfig, **changes):
    config = config_class(**(TINY | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.float().eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (batch, length))


@torch.no_grad()
def logits(model, attention: str, *args, **kwargs) -> torch.Tensor:
    model.set_attn_implementation(attention)
    return model(*args, **kwargs).logits


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


MODELS = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral-window": (MistralConfig, {"sliding_window": 100}),
    "mistral-wide-window": (MistralConfig, {"sliding_window": 1000}),
    "phi3-partial": (
        Phi3Config,
        {"hidden_size": 256, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "cohere-interleaved": (CohereConfig, {"hidden_size": 256}),
    "glm-interleaved-partial": (GlmConfig, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_all_blocks_equal_eager(name):
    model = build(MODELS[name][0], **MODELS[name][1])
    ids = tokens(2, 300)
    expected = logits(model, "eager", ids)
    with prism_cuda.record() as recording:
        close(logits(model, "prism", ids), expected)
    reason = "sliding window: every block in it" if name == "mistral-window" else "block-sparse"
    assert [(call.path, call.reason) for call in recording.calls] == [("prism", reason)] * 2
    assert [call.layer_idx for call in recording.calls] == [0, 1]


def test_sparse_differs_and_is_recorded():
    model = build()
    ids = tokens(1, 640)
    expected = logits(model, "sdpa", ids)
    with prism_cuda.record(masks=True, times=True) as recording:
        timed = logits(model, "prism-sparse", ids)
    assert (timed - expected).abs().max() > 1e-3
    for call in recording.calls:
        assert call.path == "prism" and 0 < call.density < 1
        assert call.mask.density() == call.density
        assert set(call.times) == {"pool", "select", "attend"}
    close(logits(model, "prism-sparse", ids), timed)
    assert len(recording.calls) == 2


def test_layers_and_heads_have_their_own_settings():
    config = PrismConfig(
        block_size=64,
        estimator="bands",
        top_p=0.4,
        dense_below=0,
        dense_layers=1,
        layers={
            2: {"top_p": 1.0},
            3: {"dense_heads": (1, 2), "keep_sink": 0},
            4: {"estimator": "grid"},
        },
    )
    prism_cuda.register(config, "prism-layers")
    model = build(num_hidden_layers=6)
    ids = tokens(1, 640)
    with prism_cuda.record(masks=True, times=True) as recording:
        logits(model, "prism-layers", ids)
    assert [call.path for call in recording.calls] == ["dense"] + ["prism"] * 5
    assert recording.calls[0].reason == "dense_layers"
    _, sparse, full, by_head, grid, last = recording.calls
    assert "pool" in sparse.times and "pool" not in grid.times
    assert (sparse.estimator, grid.estimator) == ("bands", "grid")
    assert full.density == 1 and sparse.density < 1 and last.density < 1
    density = by_head.mask.density_per_head()[0]
    assert (density[1:3] == 1).all() and (density[[0, 3]] < 1).all()
    assert not by_head.mask.to_dense()[0, [0, 3], :, 0].all()
    assert sparse.mask.to_dense()[..., 0].all()


def test_every_layer_dense_equals_eager():
    prism_cuda.register(PrismConfig(block_size=64, dense_below=0, dense_layers=2), "prism-dense")
    model = build()
    ids = tokens(2, 200)
    real = torch.ones_like(ids)
    real[0, :30] = 0
    expected = logits(model, "eager", ids, attention_mask=real)
    actual = logits(model, "prism-dense", ids, attention_mask=real)
    close(actual[real.bool()], expected[real.bool()])


def test_settings_of_heads_that_the_model_does_not_have():
    prism_cuda.register(PrismConfig(block_size=64, dense_below=0, dense_heads=(4,)), "prism-wrong")
    with pytest.raises(ValueError, match="dense_heads names head 4; expected less than 4"):
        logits(build(), "prism-wrong", tokens(1, 200))


def test_grid_of_a_model_without_rope():
    config = GPT2Config(
        vocab_size=97, n_embd=128, n_layer=2, n_head=2, n_positions=1024, bos_token_id=1,
        eos_token_id=2, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    exact = PrismConfig(block_size=64, top_p=1.0, dense_below=0, estimator="grid")
    prism_cuda.register(exact, "prism-grid")
    prism_cuda.register(
        PrismConfig(block_size=64, top_p=0.3, keep_above=0.5, dense_below=0, estimator="grid"),
        "prism-grid-sparse",
    )
    ids = tokens(2, 640)
    expected = logits(model, "eager", ids)
    close(logits(model, "prism-grid", ids), expected)
    with prism_cuda.record() as recording:
        assert (logits(model, "prism-grid-sparse", ids) - expected).abs().max() > 1e-4
    assert all(call.path == "prism" and 0 < call.density < 1 for call in recording.calls)


def test_padding_on_both_sides():
    model = build(Qwen3Config)
    ids = tokens(4, 300)
    real = torch.ones_like(ids)
    real[0, :77] = 0
    real[1, 231:] = 0
    real[2, :20] = 0
    real[2, 290:] = 0
    expected = logits(model, "eager", ids, attention_mask=real)
    with prism_cuda.record() as recording:
        actual = logits(model, "prism", ids, attention_mask=real)
    assert actual.isfinite().all()
    close(actual[real.bool()], expected[real.bool()])
    assert {(call.path, call.k_len) for call in recording.calls} == {
        ("prism", length) for length in (223, 231, 270, 300)
    }


def test_padded_rows_select_as_alone():
    model = build()
    ids = tokens(1, 500)
    alone = logits(model, "prism-sparse", ids)
    padded = torch.cat([torch.zeros(1, 75, dtype=torch.int64), ids], 1)
    real = (padded != 0).long()
    positions = (real.cumsum(-1) - 1).clamp_min(0)
    actual = logits(model, "prism-sparse", padded, attention_mask=real, position_ids=positions)
    close(actual[:, 75:], alone)


def test_masks_with_holes_are_sparse():
    """As after several turns of left-padded prompts."""
    model = build()
    ids = tokens(2, 300)
    real = torch.ones_like(ids)
    real[0, 50:60] = 0
    real[1, :20] = real[1, 100:131] = real[1, 260:] = 0
    expected = logits(model, "eager", ids, attention_mask=real)
    with prism_cuda.record() as recording:
        actual = logits(model, "prism", ids, attention_mask=real)
    close(actual[real.bool()], expected[real.bool()])
    assert {(call.path, call.k_len) for call in recording.calls} == {
        ("prism", 290),
        ("prism", 209),
    }


def test_a_window_counts_the_tokens_of_a_hole():
    """The kernels would not, so such a layer runs dense."""
    model = build(MistralConfig, sliding_window=100)
    ids = tokens(2, 300)
    real = torch.ones_like(ids)
    real[0, 50:110] = 0
    expected = logits(model, "eager", ids, attention_mask=real)
    with prism_cuda.record() as recording:
        actual = logits(model, "prism", ids, attention_mask=real)
    close(actual[real.bool()], expected[real.bool()])
    assert {call.reason for call in recording.calls} == {"a token-level mask"}


def test_a_token_level_mask_runs_dense():
    model = build()
    ids = tokens(1, 200)
    custom = torch.ones(200, 200, dtype=torch.bool).tril()[None, None].clone()
    custom[..., 100:, :50] = False
    with prism_cuda.record() as recording:
        actual = logits(model, "prism", ids, attention_mask=custom)
    close(actual, logits(model, "sdpa", ids, attention_mask=custom))
    assert {call.reason for call in recording.calls} == {"a token-level mask"}


def test_packed_sequences_run_dense_behind_a_mask():
    model = build()
    ids = tokens(1, 200)
    positions = torch.cat([torch.arange(120), torch.arange(80)])[None]
    with prism_cuda.record() as recording:
        actual = logits(model, "prism", ids, position_ids=positions, use_cache=False)
    close(actual, logits(model, "sdpa", ids, position_ids=positions, use_cache=False))
    assert {call.reason for call in recording.calls} == {"a token-level mask"}


@pytest.mark.parametrize(
    "longest", [{}, {"max_length_q": 300, "max_length_k": 310}], ids=["read", "passed_on"]
)
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_packed_sequences_with_lengths_are_sparse_each_on_its_own(name, longest):
    model = build(MODELS[name][0], **MODELS[name][1])
    parts = [tokens(1, length) for length in (120, 1, 300, 80)]
    alone = [logits(model, "prism-sparse", part) for part in parts]
    lengths = torch.tensor([0, 120, 121, 121, 421, 501], dtype=torch.int32)  # one is empty
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    with prism_cuda.record() as recording:
        packed = logits(
            model,
            "prism-sparse",
            torch.cat(parts, 1),
            position_ids=positions,
            past_key_values=transformers.DynamicCache(config=model.config),
            cu_seq_lens_q=lengths,
            cu_seq_lens_k=lengths,
            **longest,
        )
    for got, want in zip(packed.split((120, 1, 300, 80), 1), alone, strict=True):
        close(got, want)
    paths = [call.path for call in recording.calls[:4]]
    assert paths == ["prism", "dense", "prism", "prism"]


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_short_packed_sequences_do_not_see_each_other(name):
    model = build(MODELS[name][0], **MODELS[name][1])
    parts = [tokens(1, length) for length in (120, 180)]
    alone = [logits(model, "eager", part) for part in parts]
    lengths = torch.tensor([0, 120, 300], dtype=torch.int32)
    packed = logits(
        model,
        "prism-default",
        torch.cat(parts, 1),
        position_ids=torch.cat([torch.arange(part.shape[1]) for part in parts])[None],
        past_key_values=transformers.DynamicCache(config=model.config),
        cu_seq_lens_q=lengths,
        cu_seq_lens_k=lengths,
        max_length_q=180,
        max_length_k=180,
    )
    close(packed, torch.cat(alone, 1))


@pytest.mark.parametrize(
    ("q_lengths", "k_lengths", "message"),
    [
        ([0, 120, 201], [0, 120, 200], "cu_seq_lens_q ends at 201"),
        ([0, 120, 200], [0, 120, 202], "cu_seq_lens_k at 202"),
        ([0, 120, 200], [0, 200], "cu_seq_lens_k has 2 entries; expected 3"),
    ],
)
def test_wrong_lengths_are_refused(q_lengths, k_lengths, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        logits(
            model,
            "prism",
            tokens(1, 200),
            past_key_values=transformers.DynamicCache(config=model.config),
            cu_seq_lens_q=torch.tensor(q_lengths),
            cu_seq_lens_k=torch.tensor(k_lengths),
        )


@pytest.mark.parametrize("chunks", [(128, 128, 44), (200, 100), (64, 235, 1)])
def test_chunked_prefill(chunks):
    model = build(Qwen3Config)
    ids = tokens(2, sum(chunks))
    expected = logits(model, "eager", ids)
    model.set_attn_implementation("prism")
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.split(chunks, 1)]
    close(torch.cat(parts, 1), expected)


def test_chunked_prefill_with_left_padding():
    model = build()
    ids = tokens(2, 300)
    real = torch.ones_like(ids)
    real[0, :150] = 0
    expected = logits(model, "eager", ids, attention_mask=real)
    model.set_attn_implementation("prism")
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [
            model(ids[:, a:b], attention_mask=real[:, :b], past_key_values=cache).logits
            for a, b in ((0, 100), (100, 300))
        ]
    close(torch.cat(parts, 1)[real.bool()], expected[real.bool()])


@pytest.mark.parametrize("padded", [False, True])
def test_static_cache(padded):
    model = build()
    ids = tokens(2, 200)
    real = torch.ones_like(ids)
    if padded:
        real[1, :30] = 0
    expected = logits(model, "eager", ids, attention_mask=real)
    model.set_attn_implementation("prism")
    cache = StaticCache(config=model.config, max_cache_len=256)
    with torch.no_grad(), prism_cuda.record() as recording:
        parts = [
            model(
                ids[:, a:b],
                attention_mask=real[:, :b] if padded else None,
                past_key_values=cache,
            ).logits
            for a, b in ((0, 120), (120, 199), (199, 200))
        ]
    close(torch.cat(parts, 1)[real.bool()], expected[real.bool()])
    paths = [call.path for call in recording.calls]
    assert paths[:2] == ["prism"] * 2 and paths[-2:] == ["dense"] * 2


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(padded, cache):
    model = build(Qwen3Config)
    ids = tokens(2, 150)
    real = torch.ones_like(ids)
    if padded:
        real[0, :40] = 0
    kwargs = {"attention_mask": real, "max_new_tokens": 5, "do_sample": False}
    if cache:
        kwargs |= {"cache_implementation": cache, "disable_compile": True}
    model.set_attn_implementation("eager")
    expected = model.generate(ids, **kwargs)
    model.set_attn_implementation("prism")
    with prism_cuda.record() as recording:
        actual = model.generate(ids, **kwargs)
    assert torch.equal(actual, expected)
    assert {call.path for call in recording.calls} == {"prism", "dense"}


def test_scaling_is_honoured():
    model = build()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.9
    ids = tokens(1, 200)
    expected = logits(model, "eager", ids)
    close(logits(model, "prism", ids), expected)
    close(logits(model, "prism-default", ids), expected)


def test_short_inputs_run_dense_by_default():
    model = build()
    ids = tokens(2, 200)
    real = torch.ones_like(ids)
    real[0, :9] = 0
    with prism_cuda.record() as recording:
        actual = logits(model, "prism-default", ids, attention_mask=real)
    assert {call.path for call in recording.calls} == {"dense"}
    assert "dense_below" in recording.calls[0].reason
    expected = logits(model, "eager", ids, attention_mask=real)
    close(actual[real.bool()], expected[real.bool()])


def test_dropout_runs_dense():
    model = build(attention_dropout=0.5).train()
    model.set_attn_implementation("prism")
    with prism_cuda.record() as recording:
        model(tokens(1, 200)).logits.sum().backward()
    assert {call.reason for call in recording.calls} == {"dropout"}


def test_backward_through_sparse_says_why():
    model = build()
    model.set_attn_implementation("prism")
    with pytest.raises(RuntimeError, match="inference only"):
        model(tokens(1, 200)).logits.sum().backward()


def test_non_causal_layers_run_dense():
    model = build(is_causal=False)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    ids = tokens(1, 200)
    close(logits(model, "prism", ids), logits(model, "sdpa", ids))


@pytest.mark.parametrize("argument", ["block_table", "cache", "unheard_of"])
def test_unsupported_features_raise(argument):
    model = build()
    attention = transformers.AttentionInterface()["prism"]
    q = torch.zeros(1, 4, 10, 64)
    k = torch.zeros(1, 2, 10, 64)
    with pytest.raises(NotImplementedError, match="prism: LlamaAttention (uses|passes)"):
        attention(model.model.layers[0].self_attn, q, k, k, None, **{argument: torch.zeros(1)})


def test_unsupported_head_dim_runs_dense():
    model = build(head_dim=36)
    ids = tokens(1, 200)
    with prism_cuda.record() as recording:
        close(logits(model, "prism", ids), logits(model, "eager", ids))
    assert "head_dim 36" in recording.calls[0].reason


def test_the_host_does_not_read_a_padded_batch(monkeypatch):
    """Only masks on the CPU, where it costs nothing; here they pass for another device's."""
    monkeypatch.setattr(masks, "_readable", lambda x: False)
    model = build()
    ids = tokens(2, 200)
    real = torch.ones_like(ids)
    expected = logits(model, "eager", ids)
    with prism_cuda.record() as recording:
        close(logits(model, "prism", ids, attention_mask=real), expected)
    assert {call.path for call in recording.calls} == {"prism"}
    real[0, :9] = 0
    expected = logits(model, "eager", ids, attention_mask=real)
    close(logits(model, "prism", ids, attention_mask=real)[real.bool()], expected[real.bool()])


def test_padding_is_sorted_once_per_forward(monkeypatch):
    calls = []
    original = padded._order
    monkeypatch.setattr(padded, "_order", lambda *args: calls.append(1) or original(*args))
    ids = tokens(2, 200)
    real = torch.ones_like(ids)
    real[0, :9] = 0
    logits(build(), "prism", ids, attention_mask=real)
    assert len(calls) == 1


def test_a_causal_mask_is_never_none():
    """None would mean "no mask" to layers that do not call themselves causal."""
    model = build()
    model.set_attn_implementation("prism")
    embeds = torch.zeros(2, 100, 128)
    for attention_mask in (None, torch.ones(2, 100)):
        mask = create_causal_mask(model.config, embeds, attention_mask, None)
        assert masks.Causal.of(mask) == masks.Causal() and mask.numel() == 0
        with pytest.raises(RuntimeError):
            torch.zeros(2, 4, 100, 100) + mask
        # generate makes masks ahead and passes them through the models' own making of masks.
        assert create_causal_mask(model.config, embeds, mask, None) is mask


@pytest.mark.parametrize("padded", [False, True])
def test_what_the_mask_function_made_is_causal_whatever_the_layer_says(padded):
    model = build()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    ids = tokens(2, 200)
    real = torch.ones_like(ids)
    if padded:
        real[0, :20] = 0
    expected = logits(model, "eager", ids, attention_mask=real)
    for name in ("prism", "prism-default"):
        with prism_cuda.record() as recording:
            actual = logits(model, name, ids, attention_mask=real)
        close(actual[real.bool()], expected[real.bool()])
        assert {call.path for call in recording.calls} == {"prism" if name == "prism" else "dense"}


@pytest.mark.parametrize(
    ("window", "written", "real"),
    [
        (None, None, None),
        (5, None, None),
        (None, 7, None),
        (5, 7, None),
        (None, 3, [[True, False, True]]),
        (2, 3, [[False, True, True], [True, True, True]]),
    ],
)
def test_markers_say_what_they_were_made_of(window, written, real):
    real = None if real is None else torch.tensor(real)
    causal = masks.Causal(window, written, real)
    batch = 1 if real is None else real.shape[0]
    marker = causal.mark(batch, "cpu")
    assert marker.dim() == 4 and marker.shape[0] == batch
    for mask in (marker, marker.clone()):
        said = masks.Causal.of(mask)
        assert (said.window, said.written) == (window, written)
        assert (said.real is None) == (real is None)
        assert real is None or torch.equal(said.real, real)
    assert marker.untyped_storage().nbytes() <= 1 + (0 if real is None else real.numel())
    sliced = masks.Causal.of(marker[:, :, -1:, :])  # as Gemma 4 does
    tokens_of = [c.token_mask(2, 9, "cpu").expand(batch, 1, 2, 9) for c in (causal, sliced)]
    if written is not None:
        assert torch.equal(*tokens_of)


@pytest.mark.parametrize(
    "name", ["", "my-flash-prism", "org/prism", "sdpa", "eager", "paged|prism", None, 3]
)
def test_names_that_transformers_reads_otherwise_are_refused(name):
    with pytest.raises(ValueError, match="prism_cuda: name is"):
        prism_cuda.register(name=name)


def test_speculative_decoding_warns_of_nothing(monkeypatch):
    """Its chunks of a few queries run dense, as they should."""
    from prism_cuda.integrations import warnings

    told = []
    monkeypatch.setattr(warnings.logger, "warning_once", told.append)
    model = build(num_hidden_layers=1)
    model.set_attn_implementation("prism-default")
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 2400), past_key_values=cache)
        for count in (5, 3, 6, 2):
            model(tokens(1, count), past_key_values=cache)
    assert told == []


def test_layers_that_share_attention_have_no_index():
    """Zamba's has layer_idx -1, which is no layer of dense_layers."""
    model = build(num_hidden_layers=1)
    model.model.layers[0].self_attn.layer_idx = -1
    model.set_attn_implementation("prism")
    with torch.no_grad(), prism_cuda.record() as recording:
        model(tokens(1, 200), use_cache=False)
    assert [(call.layer_idx, call.path) for call in recording.calls] == [(None, "prism")]


def test_position_biases_run_dense():
    model = build()
    attention = transformers.AttentionInterface()["prism"]
    q, k = torch.randn(2, 4, 100, 64), torch.randn(2, 2, 100, 64)
    bias = torch.randn(1, 4, 100, 100)
    layer = model.model.layers[0].self_attn
    with prism_cuda.record() as recording:
        out, _ = attention(layer, q, k, k, masks.Causal().mark(2, "cpu"), position_bias=bias)
    hidden = torch.ones(100, 100, dtype=torch.bool).triu(1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, k, bias.masked_fill(hidden, -torch.inf), enable_gqa=True
    )
    close(out.transpose(1, 2), expected)
    assert [call.reason for call in recording.calls] == ["position biases"]


def test_a_padded_batch_is_one_graph():
    """Its masks decide on the device, holes included."""
    model = build(num_hidden_layers=1)
    ids = tokens(2, 150)
    real = torch.ones_like(ids)
    real[0, :41] = real[1, 60:70] = 0
    expected = logits(model, "eager", ids, attention_mask=real, use_cache=False)
    model.set_attn_implementation("prism")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual = compiled(ids, attention_mask=real, use_cache=False).logits
    close(actual[real.bool()], expected[real.bool()])
