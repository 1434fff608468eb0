"""prefill, select_blocks, sparse_attention and dispatch from Python."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch

import prism_cuda
from prism_cuda import BlockMask, PrismConfig, ops, plan
from prism_cuda.bands import Bands

pytestmark = pytest.mark.usefixtures("needs_library")

SPARSE = PrismConfig(block_size=64, estimator="bands", top_p=0.5, dense_below=0)
# Of 64 dimensions, as the heads of these tests: a grid must not ask for bands that do not fit.
GRID = PrismConfig(
    block_size=64, top_p=0.3, dense_below=0, estimator="grid", keep_above=0.3, bands=(64, 96)
)
EXACT = PrismConfig(block_size=64, estimator="bands", top_p=1.0, dense_below=0)
DENSE = PrismConfig(block_size=64, dense_below=1 << 40)


def qkv(q_len=300, k_len=300, head_dim=64, dtype=torch.float32, heads=4):
    q = torch.randn(2, heads, q_len, head_dim, dtype=dtype)
    k = torch.randn(2, heads // 2, k_len, head_dim, dtype=dtype)
    return q, k, torch.randn_like(k)


def structured_qkv(heads, length=900):
    """Blocks that differ: on noise alone the grid's threshold keeps nearly all of them."""
    q, k, v = qkv(length, length, heads=heads)
    q, k = (
        x + torch.randn_like(x[:, :, ::64]).repeat_interleave(64, 2)[:, :, :length] for x in (q, k)
    )
    return q, k, v


def dense(q, k, v, scale=None, causal=True):
    """Float64 attention with explicit bottom-right causality: (out, lse)."""
    q_len, k_len = q.shape[2], k.shape[2]
    k, v = (x.double().repeat_interleave(2, 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if causal:
        hidden = torch.ones(q_len, k_len, dtype=torch.bool).triu(k_len - q_len + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ v, scores.logsumexp(-1)


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [EXACT, DENSE], ids=["prism", "dense"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(300, 300), (130, 300), (300, 130)])
def test_both_paths_equal_dense_attention(config, causal, lengths):
    q, k, v = qkv(*lengths)
    out = prism_cuda.prefill(q, k, v, config=config, scale=0.3, causal=causal)
    with_lse, lse, mask = prism_cuda.prefill(
        q, k, v, config=config, scale=0.3, causal=causal, return_lse=True, return_mask=True
    )
    expected, expected_lse = dense(q, k, v, 0.3, causal)
    close(out, expected)
    close(with_lse, expected)
    close(lse, expected_lse)
    assert mask.density() == 1.0 and mask.causal == causal


@pytest.mark.parametrize("config", [SPARSE, GRID], ids=["bands", "grid"])
def test_prefill_is_select_then_attend(config):
    q, k, v = qkv()
    out, mask = prism_cuda.prefill(q, k, v, config=config, return_mask=True)
    selected = prism_cuda.select_blocks(q, k, config=config)
    assert torch.equal(mask.bits, selected.bits)
    assert mask.density() < 1
    attended, lse = prism_cuda.sparse_attention(q, k, v, selected, return_lse=True)
    assert torch.equal(out, attended)
    assert lse.shape == q.shape[:3]


PER_HEAD = (0.3, 0.6, 1.0, 0.3)


PER_GROUP = (0.3, 0.3, 0.6, 0.6, 0.3, 0.3)


@pytest.mark.parametrize("estimator", ["bands", "grid"])
@pytest.mark.parametrize("top_p_of_heads", [PER_HEAD, PER_GROUP], ids=["heads", "groups"])
def test_top_p_per_head_is_each_head_on_its_own(top_p_of_heads, estimator):
    q, k, v = structured_qkv(heads=len(top_p_of_heads))
    config = PrismConfig(block_size=64, top_p=top_p_of_heads, dense_below=0, estimator=estimator)
    out, lse, mask = prism_cuda.prefill(q, k, v, config=config, return_lse=True, return_mask=True)
    assert torch.equal(prism_cuda.select_blocks(q, k, config=config).bits, mask.bits)
    with prism_cuda.record(times=True):
        assert torch.equal(prism_cuda.prefill(q, k, v, config=config), out)
    density = mask.density_per_head()[0]
    for more, less in ((0.6, 0.3), (1.0, 0.6)):
        denser, sparser = (
            [density[i] for i, p in enumerate(top_p_of_heads) if p == value]
            for value in (more, less)
        )
        assert min(denser, default=2) > max(sparser)
    for head, top_p in enumerate(top_p_of_heads):
        one = PrismConfig(block_size=64, top_p=top_p, dense_below=0, estimator=estimator)
        every_head_out, every_head = prism_cuda.prefill(q, k, v, config=one, return_mask=True)
        assert torch.equal(mask.bits[:, head], every_head.bits[:, head])
        assert torch.equal(mask.counts[:, head], every_head.counts[:, head])
        assert torch.equal(out[:, head], every_head_out[:, head])


WIDE, NARROW = (48, 64), Bands((0, 8), (24, 32, 50, 64))
BANDS_PER_HEAD: dict[str, Any] = {
    "heads": (WIDE, NARROW, "auto", WIDE),
    "groups": (WIDE, WIDE, "auto", "auto", WIDE, WIDE),
    "all_the_same": (NARROW,) * 4,
}


ON_CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


def check_bands_per_head(q, k, v, config):
    """Whole calls with bands per head give each head what calls with its bands alone give it."""
    out, lse, mask = prism_cuda.prefill(q, k, v, config=config, return_lse=True, return_mask=True)
    assert torch.equal(prism_cuda.select_blocks(q, k, config=config).bits, mask.bits)
    with prism_cuda.record(times=True):
        assert torch.equal(prism_cuda.prefill(q, k, v, config=config), out)
    top_p = config.top_p if isinstance(config.top_p, tuple) else (config.top_p,) * q.shape[1]
    for head, own in enumerate(config.bands):
        one = dataclasses.replace(config, bands=own, top_p=top_p[head])
        of_all, lse_of_all, mask_of_all = prism_cuda.prefill(
            q, k, v, config=one, return_lse=True, return_mask=True
        )
        assert torch.equal(mask.bits[:, head], mask_of_all.bits[:, head])
        assert torch.equal(mask.counts[:, head], mask_of_all.counts[:, head])
        assert torch.equal(out[:, head], of_all[:, head])
        assert torch.equal(lse[:, head], lse_of_all[:, head])
    return mask


@pytest.mark.parametrize("name", BANDS_PER_HEAD)
@pytest.mark.parametrize("top_p", [0.5, "per head"])
@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_bands_per_head_are_each_head_on_its_own(device, name, top_p):
    of_heads = BANDS_PER_HEAD[name]
    if top_p == "per head":
        top_p = (0.3, 0.6, 0.6, 0.3, 0.3, 0.3)[: len(of_heads)]
    q, k, v = (x.to(device) for x in structured_qkv(heads=len(of_heads)))
    if device == "cuda":
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    config = dataclasses.replace(SPARSE, bands=list(of_heads), top_p=top_p)
    mask = check_bands_per_head(q, k, v, config)
    if name == "heads":
        alike = prism_cuda.select_blocks(q, k, config=dataclasses.replace(config, bands=WIDE))
        assert not torch.equal(mask.bits[:, 1:3], alike.bits[:, 1:3])


@pytest.fixture
def called(monkeypatch):
    """The ops that are called, each with the heads of its first tensor."""
    calls = []
    call = ops.call

    def counted(op, *arguments, **keywords):
        calls.append((op._schema.name.removeprefix("prism::"), arguments[0].shape[1]))
        return call(op, *arguments, **keywords)

    monkeypatch.setattr(ops, "call", counted)
    return calls


def test_every_distinct_choice_of_bands_is_selected_once_and_keys_are_pooled_once(called):
    q, k, _ = qkv()
    config = PrismConfig(block_size=64, bands=[WIDE, NARROW, WIDE, WIDE], top_p=[0.3] * 3 + [0.6])
    prism_cuda.select_blocks(q, k, config=config)
    assert called == [("block_pool", 2), ("select_bands", 3), ("select_bands", 1)]
    called.clear()
    prism_cuda.select_blocks(q, k, config=PrismConfig(block_size=64, bands=[NARROW] * 4))
    assert called == [("select_bands", 4)]


ONE_OP: dict[str, dict[str, Any]] = {
    "grid": {},
    "bands": {"estimator": "bands"},
    "top_p_per_head": {"top_p": PER_HEAD},
    "dense_heads": {"dense_heads": (1,)},
}


@pytest.mark.parametrize("name", ONE_OP)
@pytest.mark.parametrize(
    "scores", [{}, {"softcap": 2.0}, {"window_left": 50}, {"return_lse": True}]
)
def test_a_call_is_one_op(called, name, scores):
    config = PrismConfig(block_size=64, dense_below=0, **ONE_OP[name])
    prism_cuda.prefill(*qkv(), config=config, **scores)
    assert called == [("prefill", 4)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("estimator", ["bands", "grid"])
@pytest.mark.parametrize("top_p_of_heads", [PER_HEAD, PER_GROUP], ids=["heads", "groups"])
def test_top_p_per_head_on_cuda(top_p_of_heads, estimator):
    """But for blocks whose sums are rounded to the other side of top_p."""
    q, k, _ = (x.bfloat16().cuda() for x in structured_qkv(heads=len(top_p_of_heads)))
    config = PrismConfig(block_size=64, top_p=top_p_of_heads, estimator=estimator)
    kept = prism_cuda.select_blocks(q, k, config=config).to_dense()
    for head, top_p in enumerate(top_p_of_heads):
        one = dataclasses.replace(config, top_p=top_p)
        expected = prism_cuda.select_blocks(q, k, config=one).to_dense()
        assert (kept[:, head] != expected[:, head]).float().mean() < 0.01


@pytest.mark.parametrize("config", [SPARSE, GRID], ids=["bands", "grid"])
def test_dense_heads_keep_every_block(config):
    q, k, v = qkv()
    config = dataclasses.replace(config, top_p=0.3, dense_heads=(1,))
    out, mask = prism_cuda.prefill(q, k, v, config=config, return_mask=True)
    density = mask.density_per_head()[0]
    assert density[1] == 1 and (density[[0, 2, 3]] < 1).all()
    close(out[:, 1], dense(q, k, v)[0][:, 1])


@pytest.mark.parametrize("call", [prism_cuda.prefill, prism_cuda.select_blocks])
def test_settings_for_another_number_of_heads(call):
    tensors = qkv()[: 3 if call is prism_cuda.prefill else 2]
    with pytest.raises(ValueError, match="top_p has 3 values; expected one number or 4"):
        call(*tensors, config=PrismConfig(block_size=64, top_p=(0.1, 0.2, 0.3), dense_below=0))
    with pytest.raises(ValueError, match="dense_heads names head 4"):
        call(*tensors, config=PrismConfig(block_size=64, dense_heads=(4,), dense_below=0))


def test_top_p_per_head_needs_whole_groups():
    q, k, _ = qkv()
    config = PrismConfig(block_size=64, top_p=(0.1, 0.2, 0.3), dense_below=0)
    with pytest.raises(RuntimeError, match="q has 3 heads and k has 2"):
        prism_cuda.select_blocks(q[:, :3], k, config=config)


@pytest.mark.parametrize("causal", [True, False])
def test_grid_passes_its_settings_to_the_op(causal):
    q, k, v = qkv(300, 500)
    config = PrismConfig(block_size=(128, 64), top_p=0.5, dense_below=0, estimator="grid",
                         keep_sink=2, keep_recent=3)  # fmt: skip
    with prism_cuda.record(masks=True, times=True) as recording:
        out, mask = prism_cuda.prefill(
            q, k, v, config=config, scale=0.3, causal=causal, return_mask=True
        )
    bits, counts = torch.ops.prism.select_grid(q, k, [0.5], [0.05], 2, 3, 0.3, causal, 128, 64)
    assert torch.equal(mask.bits, bits) and torch.equal(mask.counts, counts)
    (call,) = recording.calls
    assert set(call.times) == {"select", "attend"}
    assert torch.equal(out, prism_cuda.prefill(q, k, v, config=config, scale=0.3, causal=causal))
    assert torch.equal(
        prism_cuda.select_blocks(q, k, config=config, scale=0.3, causal=causal).bits, bits
    )
    expected = prism_cuda.sparse_attention(q, k, v, mask, scale=0.3)
    assert torch.equal(out, expected)


def test_recorded_stages_give_the_same_result():
    q, k, v = qkv()
    with prism_cuda.record(masks=True, times=True) as recording:
        out = prism_cuda.prefill(q, k, v, config=SPARSE)
    assert torch.equal(out, prism_cuda.prefill(q, k, v, config=SPARSE))
    (call,) = recording.calls
    assert (call.path, call.layer_idx, call.estimator) == ("prism", None, "bands")
    assert set(call.times) == {"pool", "select", "attend"}
    assert call.mask is not None and call.density == call.mask.density()


@pytest.mark.parametrize(
    ("settings", "head_dim", "estimator"),
    [
        ({}, 64, "grid"),
        ({}, 128, "grid"),
        ({}, 136, "bands"),
        ({"bands": (16, 32)}, 64, "bands"),
        ({"bands": ["auto", "auto", (16, 32), "auto"]}, 64, "bands"),
        ({"estimator": "bands"}, 64, "bands"),
    ],
)
def test_the_estimator_follows_the_head_dim_and_the_bands(settings, head_dim, estimator):
    config = PrismConfig(dense_below=0, **settings)
    q, k = torch.randn(1, 4, 300, head_dim), torch.randn(1, 2, 300, head_dim)
    choice = prism_cuda.dispatch(300, 300, head_dim, q.dtype, "cpu", config)
    assert (choice.path, choice.estimator) == ("prism", estimator)
    with prism_cuda.record() as recording:
        _, mask = prism_cuda.prefill(q, k, k, config=config, return_mask=True)
    assert recording.calls[0].estimator == estimator
    fixed = dataclasses.replace(config, estimator=estimator)
    assert torch.equal(mask.bits, prism_cuda.select_blocks(q, k, config=fixed).bits)


def test_non_causal_stages_keep_their_causality():
    q, k, v = qkv()
    with prism_cuda.record(times=True):
        timed = prism_cuda.prefill(q, k, v, config=SPARSE, causal=False)
    assert torch.equal(timed, prism_cuda.prefill(q, k, v, config=SPARSE, causal=False))


@pytest.mark.parametrize("config", [SPARSE, DENSE], ids=["prism", "dense"])
def test_every_call_is_recorded_once(config):
    q, k, v = qkv()
    for lse, mask in ((False, False), (True, False), (False, True)):
        with prism_cuda.record(times=True) as recording:
            prism_cuda.prefill(q, k, v, config=config, return_lse=lse, return_mask=mask)
        assert len(recording.calls) == 1


def test_decode_and_empty_keys():
    q, k, v = qkv(1, 200)
    close(prism_cuda.prefill(q, k, v), dense(q, k, v)[0])
    q, k, v = qkv(3, 0)
    assert prism_cuda.prefill(q, k, v).eq(0).all()


def test_unsupported_head_dim_is_dense_and_differentiable():
    q, k, v = qkv(200, 200, head_dim=36)
    q.requires_grad_()
    prism_cuda.prefill(q, k, v, config=SPARSE).sum().backward()
    assert q.grad is not None


def test_backward_says_why():
    q, k, v = qkv()
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        prism_cuda.prefill(q, k, v, config=SPARSE).sum().backward()


def test_mask_for_other_lengths():
    q, k, v = qkv()
    mask = BlockMask.full(2, 4, 300, 301, q_block_size=64, k_block_size=64)
    with pytest.raises(ValueError, match=r"\(300, 301\); expected \(300, 300\)"):
        prism_cuda.sparse_attention(q, k, v, mask)


@pytest.mark.parametrize(
    ("call", "path", "reason"),
    [
        ((1, 9000, 128, torch.bfloat16, "cpu"), "dense", "decode"),
        ((127, 9000, 128, torch.bfloat16, "cpu"), "dense", "less than one block"),
        ((2000, 2000, 128, torch.bfloat16, "cpu"), "dense", "dense_below 2304"),
        ((9000, 9000, 100, torch.bfloat16, "cpu"), "dense", "head_dim 100 is not a multiple of 8"),
        ((9000, 9000, 264, torch.bfloat16, "cpu"), "dense", "head_dim 264"),
        ((9000, 9000, 256, torch.bfloat16, "cpu", GRID), "dense", "up to 128, as estimator 'grid'"),
        ((9000, 9000, 256, torch.bfloat16, "cpu"), "prism", "block-sparse"),
        ((9000, 9000, 96, torch.bfloat16, "cpu", GRID), "prism", "block-sparse"),
        ((9000, 9000, 128, torch.float64, "cpu"), "dense", "float64"),
        ((9000, 9000, 128, torch.float32, "cuda"), "dense", "float32 is not supported on cuda"),
        ((9000, 9000, 128, torch.bfloat16, "meta"), "dense", "meta"),
        ((128, 2304, 128, torch.float16, "cpu"), "prism", "block-sparse"),
        ((9000, 9000, 64, torch.float32, "cpu"), "prism", "block-sparse"),
    ],
)
def test_dispatch(call, path, reason):
    choice = prism_cuda.dispatch(*call)
    assert choice.path == path and reason in choice.reason
    assert choice.kernel == ("cpu" if path == "prism" else "sdpa")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    q, k, v = qkv(1000, 1000, 128, torch.bfloat16)
    config = PrismConfig(top_p=1.0, dense_below=0)
    choice = prism_cuda.dispatch(1000, 1000, 128, q.dtype, "cuda", config)
    assert choice.path == "prism" and choice.kernel.startswith("sm")
    with prism_cuda.record(times=True) as recording:
        out = prism_cuda.prefill(q.cuda(), k.cuda(), v.cuda(), config=config)
    expected, _ = dense(q, k, v)
    torch.testing.assert_close(out.cpu().double(), expected, atol=2e-2, rtol=2e-2)
    assert all(seconds > 0 for seconds in recording.calls[0].times.values())


@pytest.mark.parametrize("top_p", [0.5, PER_HEAD], ids=["one", "per_head"])
@pytest.mark.parametrize("estimator", ["bands", "grid"])
def test_compiles_without_graph_breaks(estimator, top_p):
    q, k, v = qkv(200, 200)
    config = PrismConfig(
        block_size=64, top_p=top_p, dense_heads=(2,), dense_below=0, estimator=estimator
    )
    compiled = torch.compile(
        lambda q, k, v: prism_cuda.prefill(q, k, v, config=config),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(q, k, v), prism_cuda.prefill(q, k, v, config=config))


SINKS = torch.tensor([0.5, -1.0, 4.0, 2.0])
SCORES: dict[str, dict[str, Any]] = {
    "sinks": {"sinks": SINKS},
    "softcap": {"softcap": 1.5},
    "window": {"window_left": 70},
    "narrow_window": {"window_left": 0},
    "all": {"sinks": SINKS, "softcap": 1.5, "window_left": 70},
}


def dense_scores(q, k, v, scale, causal, sinks=None, softcap=None, window_left=None):
    """Float64 attention with sinks, a cap and a window: (out, lse)."""
    q_len, k_len = q.shape[2], k.shape[2]
    k, v = (x.double().repeat_interleave(2, 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    position = torch.arange(q_len)[:, None] + k_len - q_len
    key = torch.arange(k_len)
    if causal:
        scores = scores.masked_fill(key > position, -torch.inf)
    if window_left is not None:
        scores = scores.masked_fill(key < position - window_left, -torch.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[:, None].expand_as(lse))
    return (scores - lse[..., None]).exp().nan_to_num() @ v, lse


@pytest.mark.parametrize("config", [EXACT, DENSE, GRID], ids=["prism", "dense", "grid"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SCORES)
def test_scores_of_every_path(name, causal, config):
    if config is GRID:
        config = dataclasses.replace(config, top_p=1.0)
    q, k, v = tensors = qkv(130, 300)
    options: dict[str, Any] = {"config": config, "scale": 0.3, "causal": causal} | SCORES[name]
    expected, expected_lse = dense_scores(q, k, v, 0.3, causal, **SCORES[name])
    out = prism_cuda.prefill(*tensors, **options)
    with_lse, lse, mask = prism_cuda.prefill(*tensors, **options, return_lse=True, return_mask=True)
    with prism_cuda.record(times=True) as recording:
        timed = prism_cuda.prefill(*tensors, **options)
    for got in (out, with_lse, timed):
        close(got, expected)
    close(lse, expected_lse)
    windowed = "window_left" in SCORES[name]
    assert (mask.density() < 1) == windowed
    path = "dense" if config is DENSE else "prism"
    assert [call.path for call in recording.calls] == [path]
    if windowed and path == "prism":
        assert recording.calls[0].reason == "sliding window: every block in it"


def test_a_softcap_leaves_out_what_selection_leaves_out():
    q, k, v = structured_qkv(4)
    capped, mask = prism_cuda.prefill(q, k, v, config=SPARSE, softcap=1.5, return_mask=True)
    _, plain = prism_cuda.prefill(q, k, v, config=SPARSE, return_mask=True)
    assert mask.density() < 1 and torch.equal(mask.bits, plain.bits)
    assert torch.equal(capped, prism_cuda.sparse_attention(q, k, v, mask, softcap=1.5))


@pytest.mark.parametrize("head_dim", [32, 96, 256])
def test_windows_of_other_head_sizes(head_dim):
    q, k, v = qkv(130, 300, head_dim)
    expected, _ = dense_scores(q, k, v, head_dim**-0.5, True, window_left=40)
    close(prism_cuda.prefill(q, k, v, config=SPARSE, window_left=40), expected)


def test_dispatch_of_windows_and_caps():
    def choose(q_len, k_len, head_dim, **options):
        return prism_cuda.dispatch(q_len, k_len, head_dim, torch.float32, "cpu", SPARSE, **options)

    window = plan.WINDOW
    assert choose(300, 300, 96, window_left=100).reason == window
    assert choose(300, 300, 64, window_left=299).reason == "block-sparse"  # hides nothing
    assert choose(300, 300, 264, softcap=2.0).path == "dense"
    # Torch's attention knows neither caps nor sinks.
    assert choose(300, 300, 264).kernel == "sdpa"
    for options in ({"softcap": 2.0}, {"sinks": True}, {"window_left": 5}):
        assert choose(1, 300, 64, **options).kernel == "cpu"
    assert "multiple of 8" in choose(300, 300, 36, window_left=5).reason


@pytest.mark.parametrize("changes", [{"softcap": 1.0}, {"window_left": 3}, {"sinks": True}])
def test_what_torch_s_attention_would_leave_out_is_refused(changes):
    q, k, v = qkv(256, 256)
    if "sinks" in changes:
        changes = {"sinks": torch.full((q.shape[1],), 9.0)}
    with pytest.raises(RuntimeError, match="v has head_dim 32"):
        prism_cuda.prefill(q, k, v[..., :32].contiguous(), **changes)


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_meta_tensors_get_meta_results(config):
    out = prism_cuda.prefill(*(x.to("meta") for x in qkv()), config=config)
    assert out.is_meta and out.shape == (2, 4, 300, 64)


@pytest.mark.parametrize("config", [EXACT, DENSE], ids=["prism", "dense"])
def test_autocast_decides_by_the_dtype_it_computes_in(config):
    q, k, v = qkv()
    low = [x.bfloat16() for x in (q, k, v)]
    want = prism_cuda.prefill(*low, config=config)
    with torch.autocast("cpu", dtype=torch.bfloat16), prism_cuda.record() as recording:
        out, mask = prism_cuda.prefill(q, k, v, config=config, return_mask=True)
        assert torch.equal(prism_cuda.sparse_attention(q, k, v, mask), out) or config is DENSE
        assert torch.equal(
            prism_cuda.select_blocks(q, k, config=config).bits,
            prism_cuda.select_blocks(*low[:2], config=config).bits,
        )
    assert out.dtype == torch.bfloat16 and torch.equal(out, want)
    assert recording.calls[0].path == ("dense" if config is DENSE else "prism")
    q, k, v = (x.double() for x in (q, k, v))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prism_cuda.prefill(q, k, v, config=config).dtype == torch.float64  # as SDPA


def test_a_device_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(plan, "_decide", inspect.unwrap(plan._decide))
    choice = prism_cuda.dispatch(9000, 9000, 128, torch.bfloat16, "cuda")
    assert choice.path == "dense" and "CUDA" in choice.reason


def test_plans_are_remembered_but_not_by_lengths():
    config = PrismConfig(top_p=0.71)
    device = torch.device("cpu")
    plans = {
        id(prism_cuda.dispatch(length, length, 64, torch.float32, device, config))
        for length in range(3000, 3100)
    }
    assert len(plans) == 1
    for lengths in ((5, 3000), (300, 310), (1, 70)):
        reason = prism_cuda.dispatch(*lengths, 64, torch.float32, device, config).reason
        assert not set(map(str, lengths)) & set(reason.split())


def test_fp8_keys_are_sent_to_prefill_varlen():
    q, k, v = (x.bfloat16() for x in qkv(256, 256))
    k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
    chunked = prism_cuda.ChunkedPrefill(1, k.shape[1], k.shape[3], 256, device="cpu")
    for call in (prism_cuda.prefill, chunked.prefill):
        with pytest.raises(ValueError, match=r"k has dtype torch.float8_e4m3fn"):
            call(q, k, v)
        with pytest.raises(ValueError, match=r"q has dtype torch.float8_e4m3fn"):
            call(q.to(k.dtype), k, v)
    with pytest.raises(ValueError, match=r"select_blocks: k has dtype"):
        prism_cuda.select_blocks(q, k)


def test_layers_of_an_fp32_model_attend_in_autocast_s_dtype():
    pytest.importorskip("transformers", minversion="5")
    from helpers.models import MODELS

    prism_cuda.register(EXACT, "prism-autocast")
    model = MODELS["llama"].build().float()
    ids = torch.randint(3, 90, (1, 200))
    logits = {}
    for implementation in ("sdpa", "prism-autocast"):
        model.set_attn_implementation(implementation)
        low = torch.autocast("cpu", dtype=torch.bfloat16)
        with low, torch.no_grad(), prism_cuda.record() as recording:
            logits[implementation] = model(ids).logits
    assert {call.path for call in recording.calls} == {"prism"}
    torch.testing.assert_close(logits["prism-autocast"], logits["sdpa"], atol=0.05, rtol=0.05)
