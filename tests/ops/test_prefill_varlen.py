"""prefill_varlen against prefill of every sequence alone, and what it records."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import prism_cuda
from prism_cuda import BlockMask, PrismConfig

pytestmark = pytest.mark.usefixtures("needs_library")

# (queries, keys): whole, a chunk, short in either, one token, nothing, longer than its keys.
LENGTHS = ((200, 230), (130, 670), (40, 500), (100, 100), (1, 400), (0, 70), (90, 64), (5, 0))
Q_HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 64, 16
CONFIG = PrismConfig(block_size=64, top_p=0.5, dense_below=128)
CONFIGS = {
    "plain": CONFIG,
    "keep_above": dataclasses.replace(CONFIG, keep_above=0.3),
    "nothing_too_short": dataclasses.replace(CONFIG, dense_below=0),
    "everything_too_short": dataclasses.replace(CONFIG, dense_below=671),
    "top_p_per_head": dataclasses.replace(CONFIG, top_p=(0.3, 0.8, 0.8, 0.3)),
    "top_p_per_group": dataclasses.replace(CONFIG, top_p=(0.3, 0.3, 0.8, 0.8)),
    "dense_heads": dataclasses.replace(CONFIG, dense_heads=(2,)),
    "bands": dataclasses.replace(CONFIG, estimator="bands"),
    "bands_top_p_per_head": dataclasses.replace(
        CONFIG, estimator="bands", top_p=(0.3, 0.8, 0.8, 0.3)
    ),
}
SCORES: dict[str, dict[str, Any]] = {
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 4.0, 2.0])},
    "softcap": {"softcap": 2.0},
    "window": {"window_left": 90},
    "open_window": {"window_left": 669},
    "all": {"sinks": torch.tensor([0.5, -1.0, 4.0, 2.0]), "softcap": 2.0, "window_left": 90},
}


def ends(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


@dataclasses.dataclass
class Batch:
    q: Tensor
    k: Tensor  # packed
    v: Tensor
    where: dict[str, Any]  # of the packed batch

    def paged(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """k and v in shuffled pages, and where they are."""
        k_lens = [k_len for _, k_len in LENGTHS]
        pages = [-(-k_len // PAGE) for k_len in k_lens]
        order = torch.randperm(sum(pages)).tolist()
        table = torch.zeros(len(LENGTHS), max(pages), dtype=torch.int32)
        shape = (sum(pages), PAGE, KV_HEADS, HEAD_DIM)
        pools = [torch.full_like(self.k[:1, :1, :1], torch.nan).expand(shape).clone() for _ in "kv"]
        starts = ends(k_lens).tolist()
        for b, k_len in enumerate(k_lens):
            for i in range(pages[b]):
                page = order.pop()
                table[b, i] = page
                rows = slice(starts[b] + i * PAGE, starts[b] + min((i + 1) * PAGE, k_len))
                for pool, x in zip(pools, (self.k, self.v), strict=True):
                    pool[page, : rows.stop - rows.start] = x[rows]
        where = {name: x for name, x in self.where.items() if name != "cu_seqlens_k"}
        where["seqused_k"] = torch.tensor(k_lens, dtype=torch.int32, device=self.k.device)
        return *pools, where | {"block_table": table.to(self.k.device)}

    def alone(self) -> list[tuple[slice, tuple[Tensor, Tensor, Tensor]]]:
        """Rows, and q, k, v (1, heads, length, D) of every sequence."""
        k_ends = self.where["cu_seqlens_k"].tolist()
        q_ends = self.where["cu_seqlens_q"].tolist()
        sequences = []
        for b in range(len(LENGTHS)):
            rows, keys = slice(*q_ends[b : b + 2]), slice(*k_ends[b : b + 2])
            q, k, v = (x.transpose(0, 1)[None] for x in (self.q[rows], self.k[keys], self.v[keys]))
            sequences.append((rows, (q, k, v)))
        return sequences


def make_batch(device: str) -> Batch:
    q_lens, k_lens = ([pair[i] for pair in LENGTHS] for i in range(2))
    q, k, v = (
        torch.randn(sum(lengths), heads, HEAD_DIM)
        for lengths, heads in ((q_lens, Q_HEADS), (k_lens, KV_HEADS), (k_lens, KV_HEADS))
    )
    # Keys that differ from block to block: noise alone would keep nearly everything.
    k += torch.randn(len(k) // 64 + 1, KV_HEADS, HEAD_DIM).repeat_interleave(64, 0)[: len(k)]
    where = {
        "cu_seqlens_q": ends(q_lens, device),
        "cu_seqlens_k": ends(k_lens, device),
        "max_seqlen_q": max(q_lens),
        "max_seqlen_k": max(k_lens),
    }
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return Batch(*(x.to(device, dtype) for x in (q, k, v)), where)


@pytest.fixture
def batch() -> Batch:
    return make_batch("cpu")


def assert_same(got: Tensor, want: Tensor) -> None:
    low_precision = {} if got.device.type == "cpu" else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(got, want, **low_precision)


def assert_each_alone(batch: Batch, got: tuple[Tensor, ...], config: Any, **options: Any) -> None:
    out, lse, bits, counts = got
    sizes = dict(zip(("q_block_size", "k_block_size"), config.block_sizes, strict=True))
    attend = {name: x for name, x in options.items() if name != "causal"}
    sparse, differing, total = 0, 0, 0
    for b, (rows, tensors) in enumerate(batch.alone()):
        q_len, k_len = (x.shape[2] for x in tensors[:2])
        _, mask = prism_cuda.prefill(*tensors, config=config, return_mask=True, **options)
        blocks, words = mask.bits.shape[2:]
        own = BlockMask(
            bits[b : b + 1, :, :blocks, :words].contiguous(),
            counts[b : b + 1, :, :blocks].contiguous(),
            q_len, k_len, **sizes, causal=mask.causal,
        )  # fmt: skip
        assert (counts[b, :, blocks:] == 0).all() and (bits[b, :, blocks:] == 0).all()
        assert (bits[b, :, :, words:] == 0).all()
        assert torch.equal(own.to_dense().sum(-1, dtype=torch.int32), own.counts)
        differing += int((own.to_dense() != mask.to_dense()).sum())
        total += own.to_dense().numel()
        want, want_lse = prism_cuda.sparse_attention(*tensors, own, **attend, return_lse=True)
        assert_same(out[rows], want[0].transpose(0, 1))
        assert_same(lse[:, rows], want_lse[0])
        sparse += mask.density() < 1
    # Temperatures of a batch are summed in another order on the GPU: near ties may fall elsewhere.
    assert differing <= (0 if out.device.type == "cpu" else 0.01 * total)
    assert sparse or config.dense_below > 670, "no sequence leaves anything out"


@pytest.mark.parametrize("paged", [False, True], ids=["packed", "paged"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_sequence_is_what_it_is_alone(name: str, paged: bool, device: str) -> None:
    batch = make_batch(device)
    k, v, where = batch.paged() if paged else (batch.k, batch.v, batch.where)
    config = CONFIGS[name]
    if device == "cuda":  # the blocks of the Hopper kernel
        config = dataclasses.replace(config, block_size=(128, 64))
    got = prism_cuda.prefill_varlen(
        batch.q, k, v, **where, config=config, scale=0.3, return_lse=True, return_mask=True
    )
    assert_each_alone(batch, got, config, scale=0.3)
    # Without the mask it is not made exact; attention must not see the difference.
    out = prism_cuda.prefill_varlen(batch.q, k, v, **where, config=config, scale=0.3)
    assert torch.equal(out, got[0])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SCORES)
def test_scores(name: str, causal: bool, device: str) -> None:
    batch = make_batch(device)
    options = SCORES[name] | {"causal": causal, "config": CONFIG}
    if "sinks" in options:
        options["sinks"] = options["sinks"].to(device)
    got = prism_cuda.prefill_varlen(
        batch.q, batch.k, batch.v, **batch.where, return_lse=True, return_mask=True, **options
    )
    if "window" not in name and name != "all":
        assert_each_alone(batch, got, **options)
    else:
        # Alone, a sequence that the window covers is estimated; together none is.
        for rows, tensors in batch.alone():
            exact = options | {"config": dataclasses.replace(CONFIG, dense_below=1 << 40)}
            if name == "open_window":
                exact["config"] = CONFIG
            want, lse = prism_cuda.prefill(*tensors, return_lse=True, **exact)
            assert_same(got[0][rows], want[0].transpose(0, 1))
            assert_same(got[1][:, rows], lse[0])


def test_a_window_keeps_its_blocks_and_no_others(batch: Batch) -> None:
    _, bits, counts = prism_cuda.prefill_varlen(
        batch.q, batch.k, batch.v, **batch.where, config=CONFIG, window_left=90, return_mask=True
    )
    for b, (q_len, k_len) in enumerate(LENGTHS):
        mask = prism_cuda.BlockMask.full(
            1, Q_HEADS, q_len, k_len, q_block_size=64, k_block_size=64, window_left=90
        )
        blocks, words = mask.bits.shape[2:]
        assert torch.equal(bits[b, :, :blocks, :words], mask.bits[0])
        assert torch.equal(counts[b, :, :blocks], mask.counts[0])


@pytest.mark.parametrize("head_dim", [96, 256])
def test_other_head_sizes(head_dim: int) -> None:
    q, k, v = torch.randn(1, 4, head_dim), *torch.randn(2, 300, 2, head_dim).unbind()
    where: dict[str, Any] = {
        "cu_seqlens_q": ends([1]), "cu_seqlens_k": ends([300]), "max_seqlen_q": 1,
        "max_seqlen_k": 300,
    }  # fmt: skip
    out = prism_cuda.prefill_varlen(q, k, v, **where, config=CONFIG)
    keys, values = (x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
    weights = (q.transpose(0, 1) @ keys.transpose(1, 2) * head_dim**-0.5).softmax(-1)
    torch.testing.assert_close(out, (weights @ values).transpose(0, 1))
    where |= {"cu_seqlens_q": ends([200]), "max_seqlen_q": 200}
    q = torch.randn(200, 4, head_dim)
    for window in (30, None):
        got = prism_cuda.prefill_varlen(q, k, v, **where, config=CONFIG, window_left=window)
        alone = (x.transpose(0, 1)[None] for x in (q, k, v))
        want = prism_cuda.prefill(*alone, config=CONFIG, window_left=window)
        torch.testing.assert_close(got, want[0].transpose(0, 1))


@pytest.mark.parametrize("times", [False, True])
def test_every_sequence_is_recorded(times: bool, batch: Batch) -> None:
    with prism_cuda.record(masks=True, times=times) as recording:
        out = prism_cuda.prefill_varlen(batch.q, batch.k, batch.v, **batch.where, config=CONFIG)
    assert torch.equal(
        out, prism_cuda.prefill_varlen(batch.q, batch.k, batch.v, **batch.where, config=CONFIG)
    )
    calls = recording.calls
    assert [(call.q_len, call.k_len) for call in calls] == [pair for pair in LENGTHS if all(pair)]
    for call in calls:
        choice = prism_cuda.dispatch(call.q_len, call.k_len, HEAD_DIM, torch.float32, "cpu", CONFIG)
        assert (call.path, call.reason) == (choice.path, choice.reason)
        assert (call.mask is None) == (call.path == "dense")
        assert call.mask is None or call.mask.density() == call.density
    assert any(call.density < 1 for call in calls)
    assert set(calls[0].times) == ({"select", "attend"} if times else set())
    assert not any(call.times for call in calls[1:])


def test_recorded_windows_say_so(batch: Batch) -> None:
    with prism_cuda.record() as recording:
        prism_cuda.prefill_varlen(
            batch.q, batch.k, batch.v, **batch.where, config=CONFIG, window_left=90
        )
    reasons = {call.reason for call in recording.calls if call.path == "prism"}
    assert reasons == {"sliding window: every block in it"}


class Prefill(torch.nn.Module):
    def __init__(self, max_seqlen_q: int, max_seqlen_k: int, **options: Any) -> None:
        super().__init__()
        self.options = options | {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
    ) -> Any:
        return prism_cuda.prefill_varlen(
            q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **self.options
        )


@pytest.mark.parametrize("name", ["plain", "top_p_per_head", "window"])
def test_compiles_and_exports_for_all_batches(name: str, batch: Batch) -> None:
    torch._dynamo.reset()
    options: dict[str, Any] = {"config": CONFIGS.get(name, CONFIG)} | SCORES.get(name, {})
    prefill = Prefill(200, 670, **options)
    first = (batch.q, batch.k, batch.v, batch.where["cu_seqlens_q"], batch.where["cu_seqlens_k"])
    # Other lengths and another number of sequences.
    q_ends, k_ends = ends([150, 90]), ends([600, 300])
    second = (batch.q[:240], batch.k[:900], batch.v[:900], q_ends, k_ends)
    compiled = torch.compile(prefill, fullgraph=True, dynamic=True, backend="aot_eager")
    tokens, keys, sequences = (torch.export.Dim.AUTO for _ in range(3))
    program = torch.export.export(
        prefill,
        first,
        dynamic_shapes=[{0: tokens}, {0: keys}, {0: keys}, {0: sequences}, {0: sequences}],
    )
    for tensors in (first, second):
        want = prefill(*tensors)
        assert torch.equal(compiled(*tensors), want)
        assert torch.equal(program.module()(*tensors), want)


def test_wrong_calls(batch: Batch) -> None:
    tensors = (batch.q, batch.k, batch.v)
    with pytest.raises(ValueError, match="top_p has 3 values; expected one number or 4"):
        prism_cuda.prefill_varlen(
            *tensors, **batch.where, config=dataclasses.replace(CONFIG, top_p=(0.1, 0.2, 0.3))
        )
    per_head = dataclasses.replace(CONFIG, top_p=(0.1, 0.2, 0.3, 0.4))
    with pytest.raises(RuntimeError, match="q has 4 heads and k has 3"):
        prism_cuda.prefill_varlen(
            batch.q, *torch.zeros(2, 1000, 3, HEAD_DIM), **batch.where, config=per_head
        )
    k, v, where = batch.paged()
    for window in (None, 20):
        with pytest.raises(RuntimeError, match="seqused_k is None; expected the lengths"):
            prism_cuda.prefill_varlen(
                batch.q, k, v, **where | {"seqused_k": None}, config=CONFIG, window_left=window,
                return_mask=True,
            )  # fmt: skip
    with pytest.raises(RuntimeError, match="window_left is -1"):
        prism_cuda.prefill_varlen(*tensors, **batch.where, config=CONFIG, window_left=-1)
    with pytest.raises(RuntimeError, match="sinks has shape"):
        prism_cuda.prefill_varlen(*tensors, **batch.where, config=CONFIG, sinks=torch.zeros(3))
