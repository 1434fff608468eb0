"""Named tables of shapes, layouts, values and masks."""

from __future__ import annotations

from dataclasses import dataclass

B128 = (128, 128)
B64 = (64, 64)
B128_64 = (128, 64)


@dataclass(frozen=True)
class Case:
    """The shape of a call."""

    name: str
    q_len: int
    k_len: int
    batch: int = 1
    q_heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    blocks: tuple[int, int] = B64
    causal: bool = True


@dataclass(frozen=True)
class AttentionCase(Case):
    layout: str = "contiguous"
    values: str = "normal"
    mask: str = "random"
    scale: float | None = None
    softcap: float | None = None
    window_left: int | None = None


ATTENTION_GROUPS: dict[str, tuple[AttentionCase, ...]] = {
    "regular": (
        AttentionCase("b64_d64", 256, 256),
        AttentionCase("b128_d128", 256, 256, head_dim=128, blocks=B128),
        AttentionCase("b128_64_d128", 256, 256, head_dim=128, blocks=B128_64),
        AttentionCase("b128_d64", 384, 384, blocks=B128),
        AttentionCase("b64_d128", 192, 192, head_dim=128),
        AttentionCase("full_attention", 256, 256, causal=False, blocks=B128_64),
        AttentionCase("batch_of_3", 128, 128, batch=3),
        AttentionCase("own_scale", 192, 192, scale=0.31),
    ),
    "ragged": (
        AttentionCase("one_over", 129, 129, blocks=B128),
        AttentionCase("one_short", 191, 191),
        AttentionCase("odd_d128", 301, 301, head_dim=128, blocks=B128_64),
        AttentionCase("bidirectional", 173, 201, causal=False),
        AttentionCase("past_one_word", 70, 33 * 64 + 5, q_heads=1, kv_heads=1),
    ),
    "strided": (
        AttentionCase("length_first", 150, 150, batch=2, layout="length_first"),
        AttentionCase("length_first_d128", 130, 130, head_dim=128, blocks=B128,
                      layout="length_first"),
        AttentionCase("packed_qkv", 150, 150, batch=2, layout="packed_qkv"),
        AttentionCase("odd_stride", 150, 150, layout="odd_stride"),
        AttentionCase("odd_stride_d128", 150, 150, head_dim=128, blocks=B128, layout="odd_stride"),
        AttentionCase("offset", 150, 150, layout="offset"),
    ),
    "gqa": (
        AttentionCase("ratio_4", 150, 150, q_heads=8, kv_heads=2),
        AttentionCase("ratio_3", 150, 150, batch=2, q_heads=6, kv_heads=2),
        AttentionCase("one_kv_head", 150, 150, q_heads=5, kv_heads=1, head_dim=128, blocks=B128),
    ),
    "empty": (
        AttentionCase("nothing_kept", 200, 200, mask="empty"),
        AttentionCase("one_row_empty", 300, 300, mask="one_row_empty"),
        AttentionCase("alternating_rows", 400, 400, mask="alternating_empty", head_dim=128,
                      blocks=B128),
        AttentionCase("last_only", 300, 300, mask="last_only"),
        AttentionCase("first_only", 300, 300, mask="first_only"),
        AttentionCase("first_only_bidirectional", 300, 300, mask="first_only", causal=False),
    ),
    "full": (
        AttentionCase("causal", 257, 257, mask="full"),
        AttentionCase("causal_d128", 300, 300, mask="full", head_dim=128, blocks=B128),
        AttentionCase("bidirectional", 200, 257, mask="full", causal=False, blocks=B128_64),
        AttentionCase("visible_only", 257, 257, mask="visible"),
    ),
    "extreme": (
        AttentionCase("large_logits", 200, 200, values="large_logits"),
        AttentionCase("large_logits_d128", 200, 200, values="large_logits", head_dim=128,
                      blocks=B128),
        AttentionCase("constant", 200, 200, values="constant"),
        AttentionCase("outlier", 200, 200, values="outlier"),
        AttentionCase("denormal", 200, 200, values="denormal"),
        AttentionCase("zero", 200, 200, values="zero"),
    ),
    "prefix": (
        AttentionCase("whole_blocks", 128, 320),
        AttentionCase("offset_1", 100, 101),
        AttentionCase("offset_37", 150, 187, mask="full"),
        AttentionCase("offset_63_d128", 200, 263, head_dim=128, blocks=B128),
        AttentionCase("offset_100_b128_64", 200, 300, blocks=B128_64, mask="full"),
        AttentionCase("decode", 1, 333, mask="full"),
        AttentionCase("decode_random", 1, 333),
        AttentionCase("last_only", 90, 333, mask="last_only"),
    ),
    "q_longer": (
        AttentionCase("by_one_block", 256, 192, mask="full"),
        AttentionCase("by_37", 200, 163, mask="full"),
        AttentionCase("by_a_lot", 300, 5, mask="full", head_dim=128, blocks=B128),
        AttentionCase("bidirectional", 200, 70, causal=False),
    ),
    "tiny": (
        AttentionCase("one_token", 1, 1, mask="full"),
        AttentionCase("two_tokens", 2, 2, mask="full", head_dim=128, blocks=B128),
        AttentionCase("three_tokens", 3, 3, mask="full"),
        AttentionCase("one_query_two_keys", 1, 2, mask="full"),
        AttentionCase("three_queries_one_key", 3, 1, mask="full"),
        AttentionCase("three_bidirectional", 3, 2, mask="full", causal=False),
    ),
    "head_dim_256": (
        AttentionCase("b128", 300, 300, head_dim=256, blocks=B128),
        AttentionCase("b128_64", 333, 401, head_dim=256, blocks=B128_64, q_heads=4),
        AttentionCase("b64", 200, 200, head_dim=256),
        AttentionCase("half_block", 192, 192, head_dim=256, blocks=B128, mask="full"),
        AttentionCase("past_the_middle", 200, 263, head_dim=256, blocks=B128, mask="full"),
        AttentionCase("odd_stride", 150, 150, head_dim=256, blocks=B128, layout="odd_stride"),
        AttentionCase("alternating_rows", 400, 400, head_dim=256, blocks=B128,
                      mask="alternating_empty"),
        AttentionCase("bidirectional", 200, 257, head_dim=256, blocks=B128, causal=False),
    ),
    "padded_head_dim": (
        AttentionCase("96", 300, 333, head_dim=96, blocks=B128, q_heads=4),
        AttentionCase("192", 300, 333, head_dim=192, blocks=B128_64),
        AttentionCase("8", 150, 150, head_dim=8, blocks=B128),
        AttentionCase("80_b64", 200, 200, head_dim=80),
        AttentionCase("248", 200, 200, head_dim=248, blocks=B128, mask="alternating_empty"),
        AttentionCase("96_packed_qkv", 200, 200, head_dim=96, blocks=B128, layout="packed_qkv"),
        AttentionCase("96_odd_stride", 150, 150, head_dim=96, blocks=B128, layout="odd_stride"),
    ),
    "scores": (
        AttentionCase("softcap", 300, 333, softcap=5.0, blocks=B128, head_dim=128),
        AttentionCase("softcap_large_logits", 200, 200, softcap=30.0, values="large_logits"),
        AttentionCase("window", 300, 333, window_left=100, blocks=B128, head_dim=128, mask="full"),
        AttentionCase("window_0", 200, 200, window_left=0, mask="full"),
        AttentionCase("window_of_all", 200, 200, window_left=200),
        AttentionCase("window_bidirectional", 300, 250, window_left=70, causal=False, mask="full"),
        AttentionCase("window_random", 500, 700, window_left=300, blocks=B128_64, q_heads=4),
        AttentionCase("window_softcap_d256", 200, 300, window_left=150, softcap=10.0, head_dim=256,
                      blocks=B128),
        # Within the cap, about it, far beyond it.
        AttentionCase("softcap_50_d64", 257, 257, softcap=50.0, blocks=B128, mask="full"),
        AttentionCase("softcap_1_d128", 300, 333, softcap=1.0, blocks=B128_64, head_dim=128),
        AttentionCase("softcap_large_logits_d128", 300, 333, softcap=30.0, values="large_logits",
                      blocks=B128, head_dim=128),
        AttentionCase("softcap_d256", 333, 401, softcap=3.0, blocks=B128_64, head_dim=256,
                      q_heads=4),
        AttentionCase("softcap_empty_rows", 400, 400, softcap=5.0, blocks=B128, head_dim=128,
                      mask="alternating_empty"),
    ),
    # At the edges of key blocks and of their halves, in rows that begin there and in between.
    "windows": (
        *(
            AttentionCase(f"{window}_d{dim}_{'b128_64' if blocks == B128_64 else 'b128'}", q, k,
                          q_heads=4, window_left=window, head_dim=dim, blocks=blocks, mask="full")
            for q, k, window, dim, blocks in (
                (300, 300, 0, 128, B128), (300, 333, 0, 256, B128_64),
                (300, 300, 1, 64, B128_64), (384, 384, 63, 128, B128_64),
                (384, 384, 64, 256, B128), (400, 463, 65, 128, B128), (512, 512, 127, 64, B128),
                (512, 512, 128, 128, B128), (512, 512, 128, 256, B128_64),
                (500, 563, 129, 128, B128_64), (500, 500, 191, 256, B128),
                (300, 300, 299, 128, B128), (200, 900, 256, 64, B128_64),
                (200, 900, 300, 128, B128), (200, 900, 450, 256, B128),
            )
        ),
        AttentionCase("sparse", 700, 900, q_heads=6, window_left=333, head_dim=128, blocks=B128),
        AttentionCase("sparse_b64_d64", 700, 900, window_left=200, blocks=B128_64),
        AttentionCase("past_one_word", 200, 33 * 128 + 5, q_heads=1, kv_heads=1, window_left=4100,
                      blocks=B128_64, head_dim=128, mask="full"),
        AttentionCase("first_only", 400, 400, window_left=150, blocks=B128, mask="first_only"),
        AttentionCase("q_longer", 400, 130, window_left=40, blocks=B128, head_dim=128, mask="full"),
        AttentionCase("bidirectional", 400, 463, window_left=70, causal=False, blocks=B128,
                      head_dim=128, mask="full"),
        AttentionCase("bidirectional_d256", 300, 300, window_left=64, causal=False, blocks=B128_64,
                      head_dim=256),
        AttentionCase("decode", 1, 333, window_left=100, blocks=B128, head_dim=128, mask="full"),
        AttentionCase("padded_d96", 300, 300, window_left=100, head_dim=96, blocks=B128,
                      mask="full"),
        AttentionCase("odd_stride", 300, 300, window_left=100, head_dim=128, blocks=B128,
                      layout="odd_stride", mask="full"),
        AttentionCase("softcap", 300, 333, q_heads=6, window_left=100, softcap=2.0, head_dim=128,
                      blocks=B128_64),
    ),
    "many_tiles": (
        AttentionCase("b128_d128", 2048, 2048, q_heads=12, kv_heads=3, head_dim=128, blocks=B128),
        AttentionCase("b128_64_d64", 1900, 1990, q_heads=12, kv_heads=4, blocks=B128_64),
        AttentionCase("every_other_empty", 2048, 2048, q_heads=12, kv_heads=4, head_dim=128,
                      blocks=B128, mask="alternating_empty"),
        AttentionCase("window_d128", 2048, 2048, q_heads=12, kv_heads=3, head_dim=128, blocks=B128,
                      window_left=300, softcap=4.0),
        AttentionCase("rising_d128", 512, 512, q_heads=4, head_dim=128, blocks=B128,
                      values="rising"),
        AttentionCase("rising_d256", 300, 300, head_dim=256, blocks=B128_64, values="rising"),
    ),
    "zero_length": (
        AttentionCase("no_query", 0, 100, mask="full"),
        AttentionCase("no_key", 100, 0, mask="full"),
        AttentionCase("no_key_bidirectional", 100, 0, mask="full", causal=False),
        AttentionCase("no_token", 0, 0, mask="full"),
        AttentionCase("no_batch", 64, 64, batch=0, mask="full"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PoolCase:
    name: str
    length: int
    batch: int = 1
    heads: int = 2
    head_dim: int = 64
    block_size: int = 64
    layout: str = "contiguous"
    values: str = "normal"


POOL_GROUPS: dict[str, tuple[PoolCase, ...]] = {
    "regular": (
        PoolCase("b64_d64", 256),
        PoolCase("b128_d128", 512, head_dim=128, block_size=128),
        PoolCase("b64_d128", 256, head_dim=128),
        PoolCase("b128_d64", 256, block_size=128),
        PoolCase("batch_of_3", 128, batch=3, heads=5),
    ),
    "ragged": (
        PoolCase("one_over", 129, block_size=128),
        PoolCase("one_short", 127, block_size=128, head_dim=128),
        PoolCase("odd", 301),
    ),
    "strided": tuple(
        PoolCase(f"{layout}_d{dim}", 150, batch=2, heads=3, head_dim=dim, layout=layout)
        for layout in ("length_first", "packed_qkv", "odd_stride", "offset")
        for dim in (64, 128)
    ),
    "head_dims": (
        *(PoolCase(f"d{dim}", 301, head_dim=dim) for dim in (8, 56, 80, 96, 120, 192, 256)),
        *(
            PoolCase(f"b128_{layout}_d{dim}", 200, 2, 3, dim, 128, layout)
            for layout in ("packed_qkv", "odd_stride")
            for dim in (40, 96, 200, 256)
        ),
    ),
    "extreme": tuple(
        PoolCase(kind, 200, values=kind, block_size=128)
        for kind in ("large_logits", "constant", "outlier", "denormal", "zero")
    ),
    "tiny": tuple(PoolCase(f"length_{n}", n) for n in (1, 2, 3)),
    "zero_length": (
        PoolCase("no_token", 0),
        PoolCase("no_batch", 100, batch=0),
        PoolCase("no_head", 100, heads=0),
    ),
}


@dataclass(frozen=True)
class SelectCase(Case):
    high: int | None = 32  # None: the band is empty
    low: int | None = 48
    top_p: float = 0.8
    keep_sink: int = 1
    keep_recent: int = 1
    keep_above: float | None = None


SELECT_GROUPS: dict[str, tuple[SelectCase, ...]] = {
    "regular": (
        SelectCase("b64_d64", 1280, 1280),
        SelectCase("b128_d128", 2560, 2560, head_dim=128, blocks=B128, high=64, low=96),
        SelectCase("b128_64", 1280, 1280, blocks=B128_64),
        SelectCase("bidirectional", 1280, 1280, causal=False),
        SelectCase("batch_of_3", 640, 640, batch=3),
        SelectCase("past_one_word", 640, 40 * 64),
    ),
    "ragged": (
        SelectCase("one_over", 1281, 1281),
        SelectCase("one_short", 1279, 1279, blocks=B128),
        SelectCase("b128_64_odd", 1201, 1201, blocks=B128_64),
        SelectCase("bidirectional", 701, 903, causal=False),
    ),
    "gqa": (
        SelectCase("ratio_4", 1280, 1280, q_heads=8, kv_heads=2),
        SelectCase("ratio_3", 640, 640, batch=2, q_heads=6, kv_heads=2),
        SelectCase("one_kv_head", 640, 640, q_heads=5, kv_heads=1, head_dim=128, high=64, low=96),
    ),
    "head_dims": (
        SelectCase("d8", 1280, 1280, head_dim=8, high=4, low=6),
        SelectCase("d40", 640, 640, head_dim=40, high=20, low=30),
        SelectCase("d72", 640, 2600, head_dim=72, high=36, low=54),
        SelectCase("d80_b128", 2560, 2560, head_dim=80, high=40, low=60, blocks=B128),
        SelectCase("d96_gqa", 1201, 1301, 2, 4, 1, head_dim=96, high=48, low=72),
        SelectCase("d96_full_width", 1280, 1280, head_dim=96, high=96, low=96),
        SelectCase("d192_b128_64", 1280, 1280, head_dim=192, high=96, low=144, blocks=B128_64),
        SelectCase("d200_only_low", 640, 640, head_dim=200, high=None, low=100),
        SelectCase("d256", 1280, 1311, 1, 4, 2, head_dim=256, high=128, low=192),
        SelectCase("d256_full_width", 640, 640, head_dim=256, high=256, low=256),
    ),
    "prefix": (
        SelectCase("whole_blocks", 640, 1280),
        SelectCase("offset_1", 640, 641),
        SelectCase("offset_37", 640, 1317),
        SelectCase("offset_100_b128_64", 640, 1300, blocks=B128_64),
        SelectCase("offset_70_b128", 640, 710, blocks=B128),
        SelectCase("decode", 1, 1281),
    ),
    "q_longer": (
        SelectCase("by_one_block", 640, 576),
        SelectCase("by_37", 640, 603),
        SelectCase("by_a_lot", 640, 5),
        SelectCase("bidirectional", 640, 200, causal=False),
    ),
    "tiny": (
        SelectCase("one_token", 1, 1),
        SelectCase("two_tokens", 2, 2, blocks=B128),
        SelectCase("three_queries_one_key", 3, 1),
        SelectCase("one_query_three_keys", 1, 3),
    ),
    "zero_length": (
        SelectCase("no_query", 0, 640),
        SelectCase("no_key", 640, 0),
        SelectCase("no_key_bidirectional", 640, 0, causal=False),
        SelectCase("no_token", 0, 0),
        SelectCase("no_batch", 640, 640, batch=0),
    ),
    "settings": (
        SelectCase("only_high", 1280, 1280, low=None),
        SelectCase("only_low", 1280, 1280, high=None),
        SelectCase("full_width", 1280, 1280, high=64, low=64),
        SelectCase("p_0", 1280, 1280, top_p=0.0),
        SelectCase("p_0_nothing_forced", 1280, 1280, top_p=0.0, keep_sink=0, keep_recent=0),
        SelectCase("p_1", 1280, 1280, top_p=1.0),
        SelectCase("p_small", 1280, 1280, top_p=0.05),
        SelectCase("p_large", 1280, 1280, top_p=0.999),
        SelectCase("nothing_forced", 1280, 1280, keep_sink=0, keep_recent=0),
        SelectCase("sink_3_recent_4", 1280, 1280, top_p=0.1, keep_sink=3, keep_recent=4),
        SelectCase("recent_4_offset_37", 640, 1317, top_p=0.0, keep_sink=0, keep_recent=4),
        SelectCase("recent_2_b128_64_offset_30", 640, 990, top_p=0.0, keep_sink=0, keep_recent=2,
                   blocks=B128_64),
        SelectCase("above_0.01", 1280, 1280, keep_above=0.01),
        SelectCase("above_0.05_p_0", 1280, 1280, top_p=0.0, keep_sink=0, keep_recent=0,
                   keep_above=0.05),
        SelectCase("above_0.02_past_one_word", 640, 40 * 64, top_p=0.2, keep_above=0.02),
        SelectCase("above_1e-30", 640, 640, top_p=0.1, keep_above=1e-30),
        SelectCase("above_1", 640, 640, top_p=0.1, keep_above=1.0),
        SelectCase("above_p_1", 640, 640, top_p=1.0, keep_above=0.5),
        SelectCase("more_than_there_are", 640, 640, keep_sink=99, keep_recent=99),
        SelectCase("recent_bidirectional", 640, 1280, top_p=0.0, keep_sink=0, keep_recent=3,
                   causal=False),
        SelectCase("recent_q_longer_bidirectional", 640, 300, top_p=0.0, keep_sink=0,
                   keep_recent=2, causal=False),
    ),
}  # fmt: skip
