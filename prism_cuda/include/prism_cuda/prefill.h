// prism_cuda from C++: typed calls of torch.ops.prism through libtorch's dispatcher, with Python's
// defaults. Load the ops library first: dlopen(".../prism_cuda/_C.abi3.so") or the CMake build's
// libprism_ops.so registers its ops. Tensors are on CUDA; CPU tensors are served by Python.
//
// The folder that holds prism_cuda/prefill.h is `python -c "import prism_cuda, os;
// print(os.path.join(os.path.dirname(prism_cuda.__file__), 'include'))"`.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace prism_cuda {

// Sequences of different lengths, as for prism_cuda.prefill_varlen; without cu_seqlens_q the batch
// is dense, (batch, heads, length, head_dim).
struct Sequences {
  std::optional<at::Tensor> cu_seqlens_q;
  std::optional<at::Tensor> cu_seqlens_k;
  std::optional<at::Tensor> seqused_k;
  std::optional<at::Tensor> block_table;
  std::optional<int64_t> max_seqlen_q;
  std::optional<int64_t> max_seqlen_k;
};

// What attention does with the blocks that are kept.
struct AttentionOptions {
  std::optional<double> scale;  // none: head_dim^-1/2
  bool causal = true;
  int64_t q_block_size = 128;
  int64_t k_block_size = 64;
  std::optional<at::Tensor> sinks;  // float32 (q_heads)
  std::optional<double> softcap;
  std::optional<int64_t> window_left;
  std::optional<at::Tensor> k_scale;  // float32 (kv_heads), of float8 keys
  std::optional<at::Tensor> v_scale;
  Sequences sequences;
};

// Which blocks are kept, and how they are attended to. Unlike Python's, a call is never dense by
// its length; "all" keeps every block.
struct PrefillOptions : AttentionOptions {
  std::string estimator = "grid";  // "grid", "bands" or "all"
  std::vector<int64_t> high_band;  // flattened ranges of dimensions, for "bands"
  std::vector<int64_t> low_band;
  std::vector<double> top_p{0.95};                // one, or one per query head
  std::optional<std::vector<double>> keep_above;  // none: the grid's (1 - top_p) / 10
  int64_t keep_sink = 1;
  int64_t keep_recent = 1;
  int64_t dense_below = 0;  // ragged batches only: sequences of fewer keys keep every block
};

struct Attended {
  at::Tensor out;
  at::Tensor lse;
};

struct Prefilled {
  at::Tensor out;
  at::Tensor lse;
  at::Tensor bits;
  at::Tensor counts;
};

namespace detail {

using MaybeTensor = const std::optional<at::Tensor>&;
using MaybeInt = std::optional<c10::SymInt>;

inline MaybeInt symbolic(std::optional<int64_t> value) {
  return value ? MaybeInt(*value) : std::nullopt;
}

template <typename Function>
c10::TypedOperatorHandle<Function> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

// Of the grid, by default: a block that a tenth of what top_p leaves out would need is kept.
inline std::optional<std::vector<double>> thresholds(const PrefillOptions& options) {
  if (options.keep_above || options.estimator != "grid") {
    return options.keep_above;
  }
  std::vector<double> values;
  for (const double top_p : options.top_p) {
    values.push_back(top_p < 1.0 ? (1.0 - top_p) / 10 : 1.0);  // where all are kept, any will do
  }
  return values;
}

}  // namespace detail

inline Attended sparse_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const at::Tensor& bits, const at::Tensor& counts,
                                 const AttentionOptions& options = {}) {
  using namespace detail;
  using Function = std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
      std::optional<double>, bool, int64_t, int64_t, MaybeTensor, std::optional<double>, MaybeInt,
      MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeInt,
      MaybeInt);
  static const auto op = find<Function>("prism::sparse_attention");
  const auto& [cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, max_q, max_k] =
      options.sequences;
  auto [out, lse] =
      op.call(q, k, v, bits, counts, options.scale, options.causal, options.q_block_size,
              options.k_block_size, options.sinks, options.softcap, symbolic(options.window_left),
              options.k_scale, options.v_scale, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table,
              symbolic(max_q), symbolic(max_k));
  return {out, lse};
}

inline Prefilled prefill(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const PrefillOptions& options = {}) {
  using namespace detail;
  using Function = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, c10::string_view, at::IntArrayRef,
      at::IntArrayRef, at::ArrayRef<double>, std::optional<at::ArrayRef<double>>, int64_t, int64_t,
      std::optional<double>, bool, int64_t, int64_t, MaybeTensor, std::optional<double>, MaybeInt,
      MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeInt,
      MaybeInt, c10::SymInt);
  static const auto op = find<Function>("prism::prefill");
  const auto keep_above = thresholds(options);
  const auto& [cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, max_q, max_k] =
      options.sequences;
  auto [out, lse, bits, counts] = op.call(
      q, k, v, options.estimator, options.high_band, options.low_band, options.top_p, keep_above,
      options.keep_sink, options.keep_recent, options.scale, options.causal, options.q_block_size,
      options.k_block_size, options.sinks, options.softcap, symbolic(options.window_left),
      options.k_scale, options.v_scale, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table,
      symbolic(max_q), symbolic(max_k), options.dense_below);
  return {out, lse, bits, counts};
}

}  // namespace prism_cuda
