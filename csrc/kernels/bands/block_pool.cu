#include "kernels/bands/block_pool.h"

#include <cstdint>

#include "kernels/bands/pool_blocks.h"
#include "kernels/common/load_rows.cuh"

namespace prism {

cudaError_t launch_block_pool(const BlockPoolParams& params, cudaStream_t stream) {
  const int64_t blocks = (params.length + params.block_size - 1) / params.block_size;
  PoolArguments arguments = {};
  arguments.tasks[0] = {params.x,          params.means,
                        params.heads,
                        /*ctas=*/blocks,   {params.length, blocks, /*chunk=*/1, /*chunks=*/blocks},
                        params.block_size,
                        /*is_key=*/false,  params.scale};
  arguments.batch = params.batch;
  arguments.head_dim = params.head_dim;
  return launch_dtype<Elements>(params.dtype, [&](auto element) {
    return launch_pool<decltype(element), PoolMode::kMeans>(arguments, stream);
  });
}

}  // namespace prism
