#include <cstdint>

#include "torch/checks.h"
#include "torch/cuda_context.h"
#include "torch/key_cells.h"
#include "torch/ops.h"
#include "torch/reference.h"

#ifdef PRISM_WITH_CUDA
#include "kernels/grid/estimate_grid.h"
#endif

namespace prism {

namespace {
constexpr const char* kOp = "pool_cells_";
}

void pool_cells_(const Tensor& x, Tensor cells, Tensor factors, int64_t start) {
  check_activation(kOp, "x", x);
  check_grid_head_dim(kOp, "x", x);
  check_key_cells(kOp, {"cells", cells}, {"factors", factors}, "x", x, x.size(1));
  PRISM_CHECK(cells.is_contiguous(), kOp, "cells is not contiguous; expected contiguous");
  PRISM_CHECK(factors.is_contiguous(), kOp, "factors is not contiguous; expected contiguous");
  PRISM_CHECK(start >= 0 && start % kCellTokens == 0, kOp, "start is ", start,
              "; allowed: 0 or more tokens, a multiple of ", kCellTokens);
  PRISM_CHECK(ceil_div(x.size(2), kCellTokens) <= cells.size(2) - start / kCellTokens, kOp,
              "cells has ", cells.size(2), " cells; expected at least (start + length of x) / ",
              kCellTokens, ", rounded up, = ceil((", start, " + ", x.size(2), ") / ", kCellTokens,
              ")");
  if (x.is_cpu()) {
    call_reference<0>(kOp, x, cells, factors, start);
    return;
  }
#ifdef PRISM_WITH_CUDA
  const CudaContext context(kOp, x);
  const NvtxRange range("prism.pool_cells");
  PoolCellsParams params;
  params.x = view(x);
  params.cells = cell_stats(cells, factors);
  params.batch = x.size(0);
  params.heads = x.size(1);
  params.first_cell = start / kCellTokens;
  params.length = x.size(2);
  params.head_dim = static_cast<int>(x.size(3));
  params.dtype = kernel_dtype(x);
  context.check(launch_pool_cells(params, context.stream()));
#else
  fail_without_cuda(kOp);
#endif
}

}  // namespace prism
