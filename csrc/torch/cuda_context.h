// The current device and stream as torch sees them, and CUDA errors as exceptions.
#pragma once

#include "torch/checks.h"

#ifdef PRISM_WITH_CUDA

#include <cuda_runtime_api.h>
#include <nvtx3/nvToolsExt.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

namespace prism {

// Makes `tensor`'s device current for its lifetime.
class CudaContext {
 public:
  CudaContext(const char* op, const Tensor& tensor);

  cudaStream_t stream() const { return stream_; }
  int sm() const { return sm_; }  // 10 * major + minor

  void check(cudaError_t error) const;

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int sm_ = 0;
};

// A named range in Nsight Systems' timeline.
class NvtxRange {
 public:
  explicit NvtxRange(const char* name) { nvtxRangePushA(name); }
  ~NvtxRange() { nvtxRangePop(); }
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;
};

// Bytes as an uninitialised tensor, 128-byte aligned and more as torch's allocator gives them.
Tensor new_workspace(const Tensor& like, int64_t bytes);

// An uninitialised contiguous tensor on the device of `like`. Eager calls are counted in
// microseconds: the stable new_empty passes two boxed calls of the dispatcher, this none or one.
Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);

// An output like q: strides as torch's empty_like gives them, but the last is 1.
Tensor new_output(const Tensor& q);

DType kernel_dtype(const Tensor& tensor);

// Of a tensor that may be missing: null then.
const float* float_data(const std::optional<Tensor>& tensor);

TensorView view(const Tensor& tensor);  // of (batch, heads, length, head_dim)

// Of a tensor whose batch elements, heads and rows lie along other dimensions; -1: there is none.
TensorView view(const Tensor& tensor, int64_t batch, int64_t head, int64_t row);

}  // namespace prism

#endif  // PRISM_WITH_CUDA
