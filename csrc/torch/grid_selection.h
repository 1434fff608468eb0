// What the ops that select on the grid share: settings in, outputs and launches.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "torch/checks.h"

namespace prism {

// Settings of a selection on the grid, checked.
struct GridSettings {
  double top_p;
  int64_t keep_sink;
  int64_t keep_recent;
  std::optional<double> keep_above;
  double scale;
  bool causal;
  int64_t q_block_size;
  int64_t k_block_size;
};

GridSettings check_grid_settings(const char* op, int64_t head_dim, double top_p, int64_t keep_sink,
                                 int64_t keep_recent, std::optional<double> keep_above,
                                 std::optional<double> scale, bool causal, int64_t q_block_size,
                                 int64_t k_block_size);

#ifdef PRISM_WITH_CUDA

// Lengths are those of the longest sequence of a ragged batch.
struct GridSizes {
  int64_t batch;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t q_len;
  int64_t k_len;
  int64_t head_dim;
};

// Bits and counts. `params` says where q and the keys are, k or k_cells, and if the batch is
// ragged; `keys` names what may be too long.
std::tuple<Tensor, Tensor> select_on_grid(const char* op, const char* keys, const Tensor& q,
                                          const GridSizes& sizes, EstimateGridParams params,
                                          const GridSettings& settings);

#endif  // PRISM_WITH_CUDA

}  // namespace prism
