"""The reference against definitions spelled out row by row in float64."""

from __future__ import annotations

import math

import pytest
import torch

from prism_cuda import reference
from prism_cuda.bits import pack, unpack
from prism_cuda.reference.blocks import Rules

# q_len, k_len, q_block_size, k_block_size
LENGTHS = {
    "square": (256, 256, 64, 64),
    "ragged": (200, 200, 64, 64),
    "one block": (5, 5, 128, 128),
    "one row": (1, 300, 64, 64),
    "aligned prefix": (128, 320, 64, 64),
    "straddling prefix": (130, 300, 64, 64),
    "mixed blocks": (300, 345, 128, 64),
    "more queries than keys": (300, 170, 64, 64),
    "no keys": (70, 0, 64, 64),
    "no queries": (0, 70, 64, 64),
}


def qkv(q_len, k_len, heads=4, kv_heads=2, dim=64, dtype=torch.float64):
    q = torch.randn(2, heads, q_len, dim, dtype=dtype)
    k = torch.randn(2, kv_heads, k_len, dim, dtype=dtype)
    return q, k, torch.randn_like(k)


def visible_by_token(q_len, k_len, q_size, k_size, causal, window=None):
    """Block pairs with at least one visible token pair, found token by token."""
    mask = torch.zeros(-(-q_len // q_size), -(-k_len // k_size), dtype=torch.bool)
    for row in range(q_len):
        position = row + k_len - q_len
        first = 0 if window is None else max(position - window, 0)
        for column in range(first, k_len if not causal else min(k_len, position + 1)):
            mask[row // q_size, column // k_size] = True
    return mask


def attention_by_row(q, k, v, kept, scale, causal, q_size, k_size):
    """Dense softmax attention under an explicit token mask."""
    q_len, k_len = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    rows = torch.arange(q_len)[:, None]
    columns = torch.arange(k_len)[None, :]
    tokens = kept[..., rows // q_size, columns // k_size]
    if causal:
        tokens = tokens & (columns <= rows + k_len - q_len)
    scores = (q.double() @ k.transpose(-1, -2) * scale).masked_fill(~tokens, -math.inf)
    lse = scores.logsumexp(-1) if k_len else torch.full(scores.shape[:-1], -math.inf)
    weights = torch.where(lse[..., None] == -math.inf, 0, (scores - lse[..., None]).exp())
    return weights @ v, lse


def pick_by_row(logits, visible, top_p, keep_above):
    """Top-p, and what is above keep_above, of one row of logits, as a loop over the definition."""
    indices = [i for i, seen in enumerate(visible) if seen]
    if top_p >= 1:
        return set(indices)
    row = [float(logits[i]) for i in indices]
    top = max(row, default=0.0)
    if any(math.isnan(x) or x == math.inf for x in row) or top == -math.inf:
        return set(indices)
    weights = [math.exp(x - top) for x in row]
    order = sorted(range(len(row)), key=lambda i: (-weights[i], i))
    kept, total = set(), 0.0
    for i in order:
        if not total / sum(weights) < top_p:
            break
        kept.add(indices[i])
        total += weights[i]
    if keep_above is not None:
        kept |= {i for i, w in zip(indices, weights, strict=True) if w / sum(weights) >= keep_above}
    return kept


@pytest.mark.parametrize("length", [0, 1, 63, 64, 200])
def test_block_pool(length):
    x = torch.randn(2, 3, length, 8, dtype=torch.float64)
    means = reference.block_pool(x, 64)
    assert means.shape == (2, 3, -(-length // 64), 8)
    for i in range(means.shape[2]):
        expected = x[:, :, 64 * i : min(64 * i + 64, length)].mean(2)
        torch.testing.assert_close(means[:, :, i], expected)


def test_block_pool_returns_float32():
    assert reference.block_pool(torch.ones(1, 1, 70, 8, dtype=torch.bfloat16), 64).dtype == (
        torch.float32
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_visible_blocks(lengths, causal):
    q_len, k_len, q_size, k_size = lengths
    for window in (None, 0, 50, 64, 1000):
        actual = reference.visible_blocks(q_len, k_len, causal, q_size, k_size, window_left=window)
        expected = visible_by_token(q_len, k_len, q_size, k_size, causal, window)
        assert torch.equal(actual, expected), window


@pytest.mark.parametrize("keep_recent", [0, 1, 3])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_recent_blocks_hold_the_querys_own_tokens(lengths, keep_recent):
    q_len, k_len, q_size, k_size = lengths
    actual = reference.recent_blocks(q_len, k_len, keep_recent, q_size, k_size)
    expected = torch.zeros_like(actual)
    for row in range(q_len if keep_recent else 0):
        own = (row + k_len - q_len) // k_size
        expected[row // q_size, max(own - keep_recent + 1, 0) : max(own + 1, 0)] = True
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("keep_above", [None, 1e-6, 0.1, 1.0])
def test_probable_blocks_row_by_row(top_p, keep_above):
    logits = 3 * torch.randn(5, 12, 12, dtype=torch.float64)
    logits[1] = 0.0  # ties
    logits[2, 3, 1] = math.nan
    logits[2, 4, 2] = math.inf
    logits[2, 5] = -math.inf
    logits[2, 6, 9] = math.nan  # invisible: must not matter
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    visible[0] = False
    above = None if keep_above is None else [keep_above]
    kept = reference.probable_blocks(logits, visible, Rules([top_p], above))
    for head in range(5):
        for row in range(12):
            expected = pick_by_row(logits[head, row], visible[row], top_p, keep_above)
            assert set(kept[head, row].nonzero().flatten().tolist()) == expected, (head, row)


def test_temperature_is_one_for_the_whole_head():
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    torch.testing.assert_close(reference.band_temperature(q, k, [0, 16]), torch.ones(1, 4))


def test_band_logits():
    q, k = torch.randn(1, 4, 3, 16).double(), torch.randn(1, 2, 5, 16).double()
    dims = [1, 2, 9]
    actual = reference.band_logits(q, k, [1, 3, 9, 10])
    for head in range(4):
        q_head, k_head = q[0, head], k[0, head // 2]
        tau = math.sqrt(3 / 16)
        for x in (q_head, k_head):
            tau *= x[:, dims].square().mean().sqrt() / x.square().mean().sqrt()
        expected = q_head[:, dims] @ k_head[:, dims].T / (math.sqrt(3) * tau)
        torch.testing.assert_close(actual[0, head], expected)


def test_zero_means_give_finite_logits():
    zeros = torch.zeros(1, 2, 3, 16)
    assert reference.band_logits(zeros, zeros, [0, 8]).eq(0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_select_bands_is_the_union(lengths, causal):
    q_len, k_len, q_size, k_size = lengths
    q, k, _ = qkv(q_len, k_len)
    q_means, k_means = reference.block_pool(q, q_size), reference.block_pool(k, k_size)
    high, low = [0, 16, 32, 48], [8, 32, 40, 64]
    rules = Rules([0.4], [0.1], 2, 2)
    arguments = (high, low, rules, causal, q_size, k_size)
    bits, counts = reference.select_from_means(q_means, k_means, q_len, k_len, *arguments)
    visible = visible_by_token(q_len, k_len, q_size, k_size, causal)
    expected = reference.recent_blocks(q_len, k_len, 2, q_size, k_size)
    expected[:, :2] = True
    for band in (high, low):
        logits = reference.band_logits(q_means, k_means, band)
        expected = expected | reference.probable_blocks(logits, visible, rules)
    kept = unpack(bits, visible.shape[1])
    assert torch.equal(kept, (expected & visible).expand_as(kept))
    assert torch.equal(counts, kept.sum(-1, dtype=torch.int32))


def test_an_empty_band_selects_nothing():
    means = torch.randn(1, 1, 4, 16)
    nothing = Rules([0.9], None, 0, 0)
    _, counts = reference.select_from_means(means, means, 256, 256, [], [], nothing, True, 64, 64)
    assert counts.eq(0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_sparse_attention(lengths, causal):
    q_len, k_len, q_size, k_size = lengths
    q, k, v = qkv(q_len, k_len)
    kept = torch.rand(2, 4, -(-q_len // q_size), -(-k_len // k_size)) < 0.5
    counts = kept.sum(-1, dtype=torch.int32)
    out, lse = reference.sparse_attention(q, k, v, pack(kept), counts, 0.3, causal, q_size, k_size)
    expected, expected_lse = attention_by_row(q, k, v, kept, 0.3, causal, q_size, k_size)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse.to(lse.dtype))


def test_sparse_attention_in_low_precision_and_strides():
    q, k, v = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(100, 100, dtype=torch.bfloat16)
    )
    kept = torch.ones(2, 4, 2, 2, dtype=torch.bool)
    counts = kept.sum(-1, dtype=torch.int32)
    bits = pack(kept)
    out, lse = reference.sparse_attention(q, k, v, bits, counts, None, True, 64, 64)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert out.stride() == q.stride()
    expected, _ = attention_by_row(q, k, v, kept, 64**-0.5, True, 64, 64)
    torch.testing.assert_close(out.double(), expected, atol=1e-2, rtol=1e-2)


def test_nan_in_a_key_reaches_only_the_rows_that_see_it():
    q, k, v = qkv(128, 128)
    k[0, 0, 100] = math.nan
    kept = torch.ones(2, 4, 2, 2, dtype=torch.bool)
    counts = kept.sum(-1, dtype=torch.int32)
    out, _ = reference.sparse_attention(q, k, v, pack(kept), counts, None, True, 64, 64)
    assert out[0, :2, 100:].isnan().all()
    assert not out[0, :2, :100].isnan().any() and not out[0, 2:].isnan().any()


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 64, 100])
def test_pack_and_unpack(length):
    dense = torch.rand(3, 2, length) < 0.5
    bits = pack(dense)
    assert bits.dtype == torch.int32 and bits.shape == (3, 2, -(-length // 32))
    assert torch.equal(unpack(bits, length), dense)
    for i in range(length):
        assert bool(bits[0, 0, i // 32] >> i % 32 & 1) == bool(dense[0, 0, i])
    if bits.numel():
        assert not unpack(bits, 32 * bits.shape[-1])[..., length:].any()
