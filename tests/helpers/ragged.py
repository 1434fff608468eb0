"""Ragged batches: sequences of different lengths, packed or in pages, and what they should give."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from helpers import fp8, inputs, oracle
from helpers.cases import B128, B128_64
from helpers.oracle import Attention
from helpers.poison import poisoned_allocations

# (queries, keys): one token, around a block, nothing, a prefix, more queries than keys.
LENGTHS = (
    (1, 1),
    (127, 127),
    (0, 0),
    (129, 200),
    (5, 0),
    (0, 70),
    (128, 128),
    (33, 300),
    (200, 64),
)


@dataclass(frozen=True)
class RaggedCase:
    name: str
    lengths: tuple[tuple[int, int], ...] = LENGTHS
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    blocks: tuple[int, int] = B128
    causal: bool = True
    page_size: int | None = None  # None: packed
    shared: bool = False  # sequences begin with the same pages
    heads_first: bool = False  # a page's memory is (heads, slots)
    unused: int = 0  # rows at the end of every packed sequence that do not count
    slack: tuple[int, int] = (0, 0)  # by which max_seqlen_q and max_seqlen_k are too large
    mask: str = "random"
    odd_stride: bool = False
    sinks: bool = False
    softcap: float | None = None
    window_left: int | None = None
    drift: bool = False  # keys differ from block to block, or from page to page


RAGGED_GROUPS: dict[str, tuple[RaggedCase, ...]] = {
    "packed": (
        RaggedCase("b128_d64"),
        RaggedCase("b128_64_d128", head_dim=128, blocks=B128_64),
        RaggedCase("b128_d128_full", head_dim=128, mask="full"),
        RaggedCase("b64_d128", head_dim=128, blocks=(64, 64)),
        RaggedCase("b128_d256", head_dim=256, q_heads=2),
        RaggedCase("bidirectional", causal=False, blocks=B128_64),
        RaggedCase("unused_rows", unused=37, head_dim=128),
        RaggedCase("slack", slack=(700, 5000)),
        RaggedCase("odd_stride", odd_stride=True),
        RaggedCase("sinks", sinks=True, head_dim=128),
        RaggedCase("padded_d96", head_dim=96, q_heads=2),
        RaggedCase("window_softcap", window_left=50, softcap=5.0, sinks=True),
        RaggedCase("window_d128", window_left=64, head_dim=128, blocks=B128_64, mask="full"),
        RaggedCase("window_0_d256", window_left=0, head_dim=256, q_heads=2, mask="full"),
        RaggedCase("window_bidirectional", window_left=40, causal=False, sinks=True, head_dim=128),
        RaggedCase("one_kv_head", q_heads=5, kv_heads=1),
        RaggedCase("many_sequences", lengths=((3, 40), (0, 9), (17, 17)) * 23, q_heads=2),
        RaggedCase("empty_rows", mask="alternating_empty", head_dim=128, sinks=True),
    ),
    "paged": (
        *(RaggedCase(f"page_{n}", page_size=n) for n in (1, 8, 16, 64, 128, 256)),
        RaggedCase("page_4_d128", page_size=4, head_dim=128, blocks=B128_64),
        RaggedCase("page_16_d128", page_size=16, head_dim=128, blocks=B128_64),
        RaggedCase("page_32_d128", page_size=32, head_dim=128, mask="full"),
        RaggedCase("page_256_d256", page_size=256, head_dim=256, q_heads=2),
        RaggedCase("page_16_b64", page_size=16, blocks=(64, 64)),
        RaggedCase("shared_prefix", page_size=16, shared=True, head_dim=128),
        RaggedCase("heads_first", page_size=32, heads_first=True, head_dim=128),
        RaggedCase("bidirectional", page_size=16, causal=False),
        RaggedCase("padded_d192", page_size=32, head_dim=192, q_heads=2),
        RaggedCase("window_softcap", page_size=32, window_left=50, softcap=5.0),
        RaggedCase(
            "window_page_16_d128",
            page_size=16,
            window_left=127,
            head_dim=128,
            sinks=True,
            mask="full",
        ),
        RaggedCase(
            "window_page_256_d256",
            page_size=256,
            window_left=70,
            head_dim=256,
            q_heads=2,
            softcap=1.0,
            blocks=B128_64,
        ),
        RaggedCase("slack", page_size=64, slack=(300, 900)),
        RaggedCase("sinks", page_size=64, sinks=True),
    ),
}


@dataclass
class RaggedInputs:
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor  # (B, Hq, Nq, Nk) bool
    tensors: dict[str, Any]  # the op's other tensors and lengths, by name
    settings: dict[str, Any]  # scale, causal, block sizes: the op's and the oracle's names
    scales: dict[str, Any] = field(default_factory=dict)  # k_scale and v_scale of fp8
    keys: list[Tensor] = field(default_factory=list)  # (Hkv, k_len, D) of every sequence
    values: list[Tensor] = field(default_factory=list)

    def op_arguments(self) -> dict[str, Any]:
        bits, counts = oracle.pack_bits(self.mask)
        arguments = {"q": self.q, "k": self.k, "v": self.v, "bits": bits, "counts": counts}
        return arguments | self.tensors | self.settings | self.scales

    def where(self) -> dict[str, Any]:
        """What says where the sequences are."""
        return {name: x for name, x in self.tensors.items() if name != "sinks"}

    def run(self) -> tuple[Tensor, Tensor]:
        with poisoned_allocations():
            return torch.ops.prism.sparse_attention(**self.op_arguments())

    def expected(self) -> tuple[Attention, Tensor]:
        """(1, Hq, total_q, ...) float64 results, and the same in plain PyTorch."""
        results, plains = [], []
        q_size, k_size = self.settings["q_block_size"], self.settings["k_block_size"]
        attend = fp8.attention if self.k.dtype == fp8.FP8 else oracle.attention_and_plain
        for b, rows in enumerate(self.rows()):
            q = self.q[rows].transpose(0, 1)[None]
            k, v = self.keys[b][None], self.values[b][None]
            q_blocks = oracle.ceil_div(q.shape[2], q_size)
            k_blocks = oracle.ceil_div(k.shape[2], k_size)
            mask = self.mask[b : b + 1, :, :q_blocks, :k_blocks]
            result, plain = attend(q, k, v, mask, **self.scales, **self.settings)
            results.append(result)
            plains.append(plain)
        names = (field.name for field in fields(Attention))
        want = Attention(*(torch.cat([getattr(r, name) for r in results], 2) for name in names))
        plain = torch.cat(plains, dim=2)
        sinks = self.tensors["sinks"]
        return (want, plain) if sinks is None else add_sinks(want, plain, sinks)

    def by_head(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Results in the shape of the expected ones."""
        return out.transpose(0, 1)[None], lse[None]

    def rows(self) -> list[slice]:
        ends = self.tensors["cu_seqlens_q"].tolist()
        return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def _cumulative(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def _packed(case: RaggedCase, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """k, v with NaN in the rows that do not count."""
    lengths = [k_len + case.unused for _, k_len in case.lengths]
    shape = (sum(lengths), case.kv_heads, case.head_dim)
    made: dict[str, Any] = {"cu_seqlens_k": _cumulative(lengths, device)}
    if case.unused:
        used = [k_len for _, k_len in case.lengths]
        made["seqused_k"] = torch.tensor(used, device=device, dtype=torch.int32)
    ends = made["cu_seqlens_k"].tolist()
    for i, name in enumerate("kv"):
        x = _rows(shape, dtype, device, seed + i, case.odd_stride)
        if case.drift:
            x += _drift(len(x) // 64 + 1, shape, seed).repeat_interleave(64, 0)[: len(x)].to(x)
        parts = []
        for start, (_, k_len) in zip(ends, case.lengths, strict=False):
            parts.append(x[start : start + k_len].transpose(0, 1).clone())
            x[start + k_len : start + k_len + case.unused] = torch.nan
        made[name], made[name + "_parts"] = x, parts
    return made


def _paged(case: RaggedCase, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Pools with shuffled pages, NaN in the slots that hold no token; page numbers past a
    sequence's end would crash whoever follows them."""
    size = case.page_size or 1
    pages = [oracle.ceil_div(k_len, size) for _, k_len in case.lengths]
    width = oracle.ceil_div(max(k for _, k in case.lengths) + case.slack[1], size)
    order = torch.randperm(sum(pages) + 3, generator=inputs.generator(seed + 9)).tolist()
    rows = [[order.pop() for _ in range(n)] for n in pages]
    if case.shared:
        longest = max(rows, key=len)
        # Whole pages only: the last one of a sequence is its own.
        rows = [[*longest[: max(len(row) - 1, 0)], *row[-1:]] for row in rows]
    table = torch.full((len(rows), width + 2), 1 << 30, dtype=torch.int32)
    filled = torch.zeros(sum(pages) + 3, size, dtype=torch.bool)
    for b, (row, (_, k_len)) in enumerate(zip(rows, case.lengths, strict=True)):
        table[b, : len(row)] = torch.tensor(row, dtype=torch.int32)
        for i, page in enumerate(row):
            filled[page, : k_len - i * size] = True
    used = [k_len for _, k_len in case.lengths]
    made: dict[str, Any] = {
        "block_table": table.to(device)[:, : width + 1],  # rows of another stride
        "seqused_k": torch.tensor(used, device=device, dtype=torch.int32),
    }
    for i, name in enumerate("kv"):
        shape = (len(filled), size, case.kv_heads, case.head_dim)
        x = inputs.values(shape, "normal", dtype, seed + i).float()
        if case.drift:
            x += _drift(len(x), shape[1:], seed)[:, None]
        x[~filled] = torch.nan
        x = x.to(dtype)
        if case.heads_first:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        made[name + "_parts"] = [
            x[row].flatten(0, 1)[:k_len].transpose(0, 1).to(device)
            for row, (_, k_len) in zip(rows, case.lengths, strict=True)
        ]
        made[name] = torch.empty_like(x, device=device).copy_(x)
    return made


def _drift(count: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(count, *shape[1:], generator=inputs.generator(seed + 8))


def _rows(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int, odd_stride: bool
) -> Tensor:
    layout = "odd_stride" if odd_stride else "contiguous"
    return inputs.tensor((1, *shape), dtype, device, seed=seed, layout=layout)[0]


def ragged_inputs(
    case: RaggedCase,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    kv_dtype: torch.dtype | None = None,
) -> RaggedInputs:
    """q in `dtype`, k and v in `kv_dtype` if it is given: fp8 ones get scales."""
    q_lengths = [q_len for q_len, _ in case.lengths]
    max_q = max(q_lengths) + case.slack[0]
    max_k = max(k_len for _, k_len in case.lengths) + case.slack[1]
    shape = (sum(q_lengths), case.q_heads, case.head_dim)
    make = _packed if case.page_size is None else _paged
    made = make(case, kv_dtype or dtype, device, seed + 1)
    has_scales = kv_dtype == fp8.FP8
    mask = inputs.block_mask(
        case.mask, len(case.lengths), case.q_heads, max_q, max_k, case.blocks, False, device, seed
    )
    sinks = torch.randn(case.q_heads, generator=inputs.generator(seed + 5)) * 3
    return RaggedInputs(
        q=_rows(shape, dtype, device, seed + 3, case.odd_stride),
        k=made["k"],
        v=made["v"],
        mask=mask,
        tensors={
            "cu_seqlens_q": _cumulative(q_lengths, device),
            "cu_seqlens_k": made.get("cu_seqlens_k"),
            "seqused_k": made.get("seqused_k"),
            "block_table": made.get("block_table"),
            "max_seqlen_q": max_q,
            "max_seqlen_k": max_k,
            "sinks": sinks.to(device) if case.sinks else None,
        },
        settings={
            "scale": None,
            "causal": case.causal,
            "q_block_size": case.blocks[0],
            "k_block_size": case.blocks[1],
            "softcap": case.softcap,
            "window_left": case.window_left,
        },
        scales=fp8.scales(case.kv_heads, device, seed) if has_scales else {},
        keys=made["k_parts"],
        values=made["v_parts"],
    )


def selected_alone(op: Any, case: RaggedInputs, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Bits and counts that `op` gives the sequences one by one, in the shape of the batch."""
    max_q, max_k = case.tensors["max_seqlen_q"], case.tensors["max_seqlen_k"]
    q_blocks = oracle.ceil_div(max_q, case.settings["q_block_size"])
    words = oracle.ceil_div(oracle.ceil_div(max_k, case.settings["k_block_size"]), 32)
    rows_of = case.rows()
    counts = torch.zeros(len(rows_of), case.q.shape[1], q_blocks, dtype=torch.int32)
    bits = torch.zeros(*counts.shape, words, dtype=torch.int32)
    for b, rows in enumerate(rows_of):
        q = case.q[rows].transpose(0, 1)[None]
        own, own_counts = op(q=q, k=case.keys[b][None], **settings)
        bits[b, :, : own.shape[2], : own.shape[3]] = own[0].cpu()
        counts[b, :, : own.shape[2]] = own_counts[0].cpu()
    return bits, counts


def add_sinks(want: Attention, plain: Tensor, sinks: Tensor) -> tuple[Attention, Tensor]:
    """What one more logit in the denominators of the heads makes of (B, Hq, L, D) results."""
    lse = torch.logaddexp(want.lse, sinks.double()[:, None])
    share = torch.exp(want.lse - lse)[..., None]
    return (
        replace(want, out=want.out * share, magnitude=want.magnitude * share, lse=lse),
        (plain * share).to(plain.dtype),
    )
