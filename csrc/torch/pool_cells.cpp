#include <cstdint>

#include "torch/cells.h"
#include "torch/cuda_context.h"
#include "torch/ops.h"

#ifdef PRISM_WITH_CUDA
#include "kernels/grid/select_grid.h"
#endif

namespace prism {

void check_cells(const char* op, NamedTensor cells, NamedTensor factors, const char* like_name,
                 const Tensor& like, int64_t heads) {
  check_same_device(op, cells.name, cells.tensor, like_name, like);
  check_same_device(op, factors.name, factors.tensor, like_name, like);
  check_dtype(op, cells.name, cells.tensor, ScalarType::Half, "Half (float16)");
  check_dtype(op, factors.name, factors.tensor, ScalarType::Float, "Float (float32)");
  const Tensor& x = cells.tensor;
  const int64_t width = 2 * estimation_width(like.size(3));
  PRISM_CHECK(x.dim() == 4 && x.size(0) == like.size(0) && (heads < 0 || x.size(1) == heads) &&
                  x.size(3) == width,
              op, cells.name, " has shape ", shape_string(x), "; expected (", like.size(0),
              ", key heads, cells, ", width, ") for ", like_name, " of head_dim ", like.size(3));
  check_shape(op, factors.name, factors.tensor, {x.size(0), x.size(1), x.size(2)}, cells.name);
  const bool dense_rows = x.stride(3) == 1 && (x.size(2) <= 1 || x.stride(2) == width);
  PRISM_CHECK(x.numel() == 0 || dense_rows, op, cells.name, " has last strides (", x.stride(2),
              ", ", x.stride(3), "); expected (", width, ", 1)");
  PRISM_CHECK(x.size(2) <= 1 || factors.tensor.stride(2) == 1, op, factors.name,
              " has last stride ", factors.tensor.stride(2), "; expected 1");
  PRISM_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && x.stride(0) % 8 == 0 &&
                  x.stride(1) % 8 == 0,
              op, cells.name, " is not aligned; expected its start and strides to be multiples of ",
              "16 bytes");
}

CellStats cell_stats(const Tensor& cells, const Tensor& factors) {
  CellStats stats;
  stats.vectors = cells.data_ptr();
  stats.factors = static_cast<float*>(factors.data_ptr());
  stats.vector_batch_stride = cells.stride(0);
  stats.vector_head_stride = cells.stride(1);
  stats.factor_batch_stride = factors.stride(0);
  stats.factor_head_stride = factors.stride(1);
  return stats;
}

PoolCellsCall check_pool_cells(const Tensor& x, const Tensor& cells, const Tensor& factors,
                               int64_t start) {
  constexpr const char* kOp = "pool_cells_";
  check_activation(kOp, "x", x);
  check_grid_head_dim(kOp, "x", x);
  check_cells(kOp, {"cells", cells}, {"factors", factors}, "x", x, x.size(1));
  check_contiguous(kOp, "cells", cells);
  check_contiguous(kOp, "factors", factors);
  PRISM_CHECK(start >= 0 && start % kCellTokens == 0, kOp, "start is ", start,
              "; allowed: 0 or more tokens, a multiple of ", kCellTokens);
  PRISM_CHECK(ceil_div(x.size(2), kCellTokens) <= cells.size(2) - start / kCellTokens, kOp,
              "cells has ", cells.size(2), " cells; expected at least (start + length of x) / ",
              kCellTokens, ", rounded up, = ceil((", start, " + ", x.size(2), ") / ", kCellTokens,
              ")");
  return {kOp, x, cells, factors, start};
}

#ifdef PRISM_WITH_CUDA
void run(const PoolCellsCall& call) {
  const Tensor& x = call.on;
  const CudaContext context(call.op, x);
  const NvtxRange range("prism.pool_cells");
  PoolCellsParams params;
  params.x = view(x);
  params.cells = cell_stats(call.cells, call.factors);
  params.batch = x.size(0);
  params.heads = x.size(1);
  params.first_cell = call.start / kCellTokens;
  params.length = x.size(2);
  params.head_dim = static_cast<int>(x.size(3));
  params.dtype = kernel_dtype(x);
  context.check(launch_pool_cells(params, context.stream()));
}
#endif

}  // namespace prism
