// Plain parameter structs: the only thing that crosses from csrc/torch into the kernels.
//
// Words for extents, here and in the kernels:
//   block  the tokens that a row of the mask (queries) or a bit of it (keys) stands for
//   cell   16 tokens, whose mean and spread stand for them on the grid
//   tile   rows, keys or cells that a CTA, or a tensor core, takes at a time
//   chunk  blocks that a CTA pools
//   slice  dimensions that a tensor core takes at a time
//   span   the rows of a sequence in a packed tensor
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PRISM_HOST_DEVICE __host__ __device__
#else
#define PRISM_HOST_DEVICE
#endif

namespace prism {

// NaN codes of e4m3 are read as +-480: telling them from numbers would cost as much as the rest of
// the conversion.
enum class DType : int32_t { kFloat16, kBFloat16, kFloat8E4M3 };

constexpr int kMaxBandRanges = 8;
constexpr int kMaxHeadDim = 256;
// The widths that estimation has kernels for; rows of fewer dimensions are padded with zeros there.
PRISM_HOST_DEVICE constexpr int64_t estimation_width(int64_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : kMaxHeadDim;
}
// Limited by tests, not by memory: longer rows only take more passes.
constexpr int64_t kMaxSelectKeyBlocks = 16384;

// A (batch, heads, rows, head_dim) tensor whose last stride is 1. Strides count elements.
struct TensorView {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

struct BlockPoolParams {
  TensorView x;  // (batch, heads, length, head_dim), dtype
  float* means;  // (batch, heads, ceil(length / block_size), head_dim), contiguous
  int64_t batch;
  int64_t heads;
  int64_t length;  // tokens
  int head_dim;
  int block_size;  // tokens
  DType dtype;
  const float* scale = nullptr;  // (heads): what means of e4m3 are multiplied by; null: 1
};

// Rows of partial sums that continue the mean of an unfinished block, of one head.
PRISM_HOST_DEVICE constexpr int64_t running_sums(int64_t head_dim) {
  return 1024 / estimation_width(head_dim);
}

struct AppendMeansParams {
  TensorView x;  // (batch, heads, length, head_dim), dtype: tokens from position `start` on
  float* means;  // (batch, heads, capacity, head_dim), contiguous
  float* sums;   // (batch, heads, running_sums(head_dim), head_dim), contiguous
  int64_t batch;
  int64_t heads;
  int64_t start;     // tokens before x
  int64_t length;    // tokens
  int64_t capacity;  // blocks
  int head_dim;
  int block_size;  // tokens
  DType dtype;
  const float* scale = nullptr;  // (heads): what means, not sums, of e4m3 are multiplied by
};

// The dimensions of one RoPE frequency band, one bit a dimension.
struct Band {
  uint64_t dims[kMaxHeadDim / 64] = {};
  int size = 0;  // number of dimensions; 0: the band takes no part
};

// Sequences of different lengths in one call. Lengths and pages are read by the kernels only.
struct RaggedBatch {
  const int32_t* cu_seqlens_q = nullptr;  // (batch + 1); null: the batch is not ragged
  const int32_t* cu_seqlens_k = nullptr;  // (batch + 1); null: there are pages
  const int32_t* seqused_k = nullptr;     // (batch); null: all rows of cu_seqlens_k
  const int32_t* block_table = nullptr;   // (batch, max_pages), unit last stride; null: no pages
  int64_t table_stride = 0;               // elements
  int total_q = 0;                        // rows of q
  int total_k = 0;                        // rows of k and v; with pages 0
  int pages = 0;                          // of the pools
  int page_shift = 0;                     // log2 of a page's tokens

  PRISM_HOST_DEVICE bool is_ragged() const { return cu_seqlens_q != nullptr; }
  PRISM_HOST_DEVICE bool is_paged() const { return block_table != nullptr; }
  PRISM_HOST_DEVICE int page_size() const { return 1 << page_shift; }
};

// Heads that may have rules of their own, in one call.
constexpr int kMaxRuleHeads = 128;

// What a row of query blocks keeps of the key blocks that it sees.
struct KeepRules {
  bool per_head = false;             // else entry 0 is that of all heads
  double top_p[kMaxRuleHeads];       // (q_heads) or (1), in [0, 1]
  double keep_above[kMaxRuleHeads];  // (q_heads) or (1), in (0, 1], or infinite: the rule is off
  int64_t keep_sink = 1;
  int64_t keep_recent = 1;

  PRISM_HOST_DEVICE double top_p_of(int q_head) const { return top_p[per_head ? q_head : 0]; }
  PRISM_HOST_DEVICE double keep_above_of(int q_head) const {
    return keep_above[per_head ? q_head : 0];
  }
  // Whether some of the heads from `first` on keep less than everything.
  PRISM_HOST_DEVICE bool any_selects(int first, int heads) const {
    bool any = false;
    for (int i = 0; i < (per_head ? heads : 1); ++i) {
      any |= top_p_of(first + i) < 1.0;
    }
    return any;
  }
};

// Shape, rules and outputs of a selection.
struct SelectParams {
  void* workspace;  // of the estimator's ..._workspace_bytes, 128-byte aligned
  uint32_t* bits;   // (batch, q_heads, q_blocks, ceil(k_blocks / 32)), contiguous
  int32_t* counts;  // (batch, q_heads, q_blocks), contiguous
  int64_t batch;
  int q_heads;
  int kv_heads;
  int64_t q_len;  // tokens; of a ragged batch the most that a sequence has
  int64_t k_len;  // tokens; of a ragged batch the most that a sequence has
  int64_t q_blocks;
  int64_t k_blocks;
  int head_dim;
  int q_block_size;  // tokens
  int k_block_size;  // tokens
  KeepRules rules;
  bool causal;         // bottom-right aligned
  RaggedBatch ragged;  // rows and words past a sequence's end become 0
};

// Selection from the block means of two RoPE bands, see kernels/bands. Of a ragged batch, q and k
// are laid out as for attention.
struct BandsParams {
  TensorView q;        // (batch, q_heads, q_len, head_dim), dtype
  TensorView k;        // (batch, kv_heads, k_len, head_dim), dtype or e4m3; not read if k_means is
  TensorView k_means;  // (batch, kv_heads, k_blocks, head_dim), float: pooled before; data null: no
  SelectParams select;
  Band high;
  Band low;
  DType dtype;
  bool k_is_fp8 = false;           // k is float8 e4m3
  const float* k_scale = nullptr;  // (kv_heads): what means of e4m3 are multiplied by; null: 1
};

constexpr int kCellTokens = 16;  // queries, or keys, of a cell of the grid

// Statistics of cells, see kernels/grid. Strides count elements.
struct CellStats {
  void* vectors = nullptr;   // (batch, heads, cells, 2 estimation_width(head_dim)), float16
  float* factors = nullptr;  // (batch, heads, cells)
  int64_t vector_batch_stride = 0;
  int64_t vector_head_stride = 0;
  int64_t factor_batch_stride = 0;
  int64_t factor_head_stride = 0;

  PRISM_HOST_DEVICE char* vectors_of(int64_t batch, int64_t head) const {
    return static_cast<char*>(vectors) +
           2 * (batch * vector_batch_stride + head * vector_head_stride);
  }
  PRISM_HOST_DEVICE float* factors_of(int64_t batch, int64_t head) const {
    return factors + batch * factor_batch_stride + head * factor_head_stride;
  }
};

struct PoolCellsParams {
  TensorView x;  // (batch, heads, length, head_dim), dtype: tokens of cells `first_cell` and on
  CellStats cells;
  int64_t batch;
  int64_t heads;
  int64_t first_cell;
  int64_t length;  // tokens
  int head_dim;    // up to 128
  DType dtype;
};

// Selection from the masses of a grid of cells, see kernels/grid. Ragged as in BandsParams.
struct GridParams {
  TensorView q;       // (batch, q_heads, q_len, head_dim), dtype
  TensorView k;       // (batch, kv_heads, k_len, head_dim), dtype; not read if k_cells is set
  CellStats k_cells;  // pooled before; null: k is pooled in the call
  SelectParams select;
  float scale;  // softmax scale, > 0
  DType dtype;
};

// Every block that some row of a query block sees, estimated by nothing. The workspace, head_dim
// and rules of `select` are not read.
struct KeepBlocksParams {
  SelectParams select;
  int window_left = -1;     // keys before its own position that a row sees; -1: all
  int64_t dense_below = 0;  // tokens, see launch_keep_blocks
  bool all = true;          // of all sequences; else of short ones, and the others are left alone
};

// Of a ragged batch, q and out are (q_heads, total_q, head_dim), without a batch stride, and so are
// k and v, or with pages (pages, kv_heads, page_size, head_dim); lse is (q_heads, total_q).
struct SparseAttentionParams {
  TensorView q;                  // (batch, q_heads, q_len, head_dim), dtype
  TensorView k;                  // (batch, kv_heads, k_len, head_dim), dtype or e4m3
  TensorView v;                  // (batch, kv_heads, k_len, head_dim), as k
  TensorView out;                // (batch, q_heads, q_len, head_dim), dtype, rows 16-byte aligned
  float* lse;                    // (batch, q_heads, q_len), contiguous, natural logarithm
  const float* sinks = nullptr;  // (q_heads): logits added to the softmax denominator; null: none
  const uint32_t* bits;          // (batch, q_heads, q_blocks, ceil(k_blocks / 32)), contiguous
  const int32_t* counts;         // (batch, q_heads, q_blocks), contiguous; set bits of each row
  int32_t* tile_counter;  // workspace of one element, for kernels that draw their tiles from it
  int64_t batch;
  int q_heads;
  int kv_heads;
  int q_len;  // tokens; of a ragged batch the most that a sequence has
  int k_len;  // tokens; of a ragged batch the most that a sequence has
  int head_dim;
  int q_block_size;      // tokens
  int k_block_size;      // tokens
  float scale;           // softmax scale, > 0
  float softcap = 0.f;   // scores become softcap * tanh(score / softcap); 0: they do not
  int window_left = -1;  // keys before its own position that a row sees; -1: all
  bool causal;           // bottom-right aligned
  DType dtype;
  RaggedBatch ragged;
  bool kv_is_fp8 = false;          // k and v are float8 e4m3
  const float* k_scale = nullptr;  // (kv_heads): what fp8 keys are multiplied by; null: 1
  const float* v_scale = nullptr;  // (kv_heads): what fp8 values are multiplied by; null: 1
};

}  // namespace prism
