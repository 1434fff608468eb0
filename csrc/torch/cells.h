// Pooled cells of keys as tensors: what pool_cells_ writes and select_grid reads.
#pragma once

#include <cstdint>

#include "torch/checks.h"

namespace prism {

struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};

// cells: float16 (batch, heads, any, 2 estimation_width(head_dim)), rows contiguous; factors:
// float32 (batch, heads, as many), unit last stride. Batch, head_dim and device are those of
// `like`; heads -1: any.
void check_cells(const char* op, NamedTensor cells, NamedTensor factors, const char* like_name,
                 const Tensor& like, int64_t heads);

CellStats cell_stats(const Tensor& cells, const Tensor& factors);

}  // namespace prism
