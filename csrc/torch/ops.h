// The ops as C++: what a checked call holds, and what runs it on CUDA. library.cpp has the schemas.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "torch/arguments.h"
#include "torch/batch.h"
#include "torch/checks.h"

namespace prism {

// Every checked call names its op, and a tensor on the device where it is to run.

struct BlockPoolCall {
  const char* op;
  Tensor on;  // x
  int64_t block_size;
  std::optional<Tensor> scale;
};
BlockPoolCall check_block_pool(const Tensor& x, int64_t block_size,
                               const std::optional<Tensor>& scale);

struct AppendMeansCall {
  const char* op;
  Tensor on;  // x
  Tensor means;
  Tensor sums;
  int64_t start;
  int64_t block_size;
  std::optional<Tensor> scale;
};
AppendMeansCall check_append_means(const Tensor& x, const Tensor& means, const Tensor& sums,
                                   int64_t start, int64_t block_size,
                                   const std::optional<Tensor>& scale);

struct PoolCellsCall {
  const char* op;
  Tensor on;  // x
  Tensor cells;
  Tensor factors;
  int64_t start;
};
PoolCellsCall check_pool_cells(const Tensor& x, const Tensor& cells, const Tensor& factors,
                               int64_t start);

// What selections have in common.
struct SelectCall {
  const char* op;
  Tensor on;  // q
  std::optional<Tensor> k;
  Shape shape;
  KeepRules rules;
  BlockArguments blocks;
  SequenceArguments sequences;
  int64_t dense_below;
};

struct BandsCall : SelectCall {
  SelectionBands bands;
  std::optional<Tensor> k_means;
  std::optional<Tensor> k_scale;
};
BandsCall check_select_bands(const Tensor& q, const std::optional<Tensor>& k,
                             const BandArguments& bands, const RuleArguments& rules,
                             const BlockArguments& blocks, const KeyMeansArguments& pooled,
                             const std::optional<Tensor>& k_scale,
                             const SequenceArguments& sequences, int64_t dense_below);

struct GridCall : SelectCall {
  double scale;
  std::optional<Tensor> k_cells;
  std::optional<Tensor> k_factors;
};
GridCall check_select_grid(const Tensor& q, const std::optional<Tensor>& k,
                           const RuleArguments& rules, std::optional<double> scale,
                           const BlockArguments& blocks, const KeyCellsArguments& pooled,
                           const SequenceArguments& sequences, int64_t dense_below);

struct AttentionCall {
  const char* op;
  Tensor on;  // q
  Tensor k;
  Tensor v;
  Shape shape;
  double scale;
  BlockArguments blocks;
  ScoreArguments scores;
  SequenceArguments sequences;
};
AttentionCall check_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                              std::optional<double> scale, const BlockArguments& blocks,
                              const ScoreArguments& scores, const SequenceArguments& sequences);

struct MaskedAttentionCall : AttentionCall {
  Tensor bits;
  Tensor counts;
};
MaskedAttentionCall check_sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const Tensor& bits, const Tensor& counts,
                                           std::optional<double> scale,
                                           const BlockArguments& blocks,
                                           const ScoreArguments& scores,
                                           const SequenceArguments& sequences);

enum class Estimator { kAll, kBands, kGrid };

struct PrefillCall : AttentionCall {
  Estimator estimator;
  KeepRules rules;
  SelectionBands bands;
  int64_t dense_below;
};
PrefillCall check_prefill(const Tensor& q, const Tensor& k, const Tensor& v,
                          const std::string& estimator, const BandArguments& bands,
                          const RuleArguments& rules, std::optional<double> scale,
                          const BlockArguments& blocks, const ScoreArguments& scores,
                          const SequenceArguments& sequences, int64_t dense_below);

#ifdef PRISM_WITH_CUDA

Tensor run(const BlockPoolCall& call);
void run(const AppendMeansCall& call);
void run(const PoolCellsCall& call);
std::tuple<Tensor, Tensor> run(const BandsCall& call);
std::tuple<Tensor, Tensor> run(const GridCall& call);
std::tuple<Tensor, Tensor> run(const MaskedAttentionCall& call);
std::tuple<Tensor, Tensor, Tensor, Tensor> run(const PrefillCall& call);

#else

template <typename Call>
void run(const Call& call) {
  fail_without_kernels(call.op, call.on);
}

#endif

// The attention kernel for a GPU of compute capability `sm` (10 * major + minor), or why none.
// `fp8` says that k and v are float8 e4m3, `score_options` that the call has softcap or a window.
std::string attention_kernel(int64_t sm, ScalarType dtype, int64_t head_dim, int64_t q_block_size,
                             int64_t k_block_size, bool fp8, bool score_options);

// JSON: version, git hash, CUDA and CUTLASS versions, compiled architectures.
std::string build_config();

}  // namespace prism
