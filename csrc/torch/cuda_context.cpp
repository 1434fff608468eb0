#include "torch/cuda_context.h"

#ifdef PRISM_WITH_CUDA

// A torch without CUDA does not define this symbol; the library has to load there all the same.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace prism {

CudaContext::CudaContext(const char* op, const Tensor& tensor)
    : op_(op), guard_(tensor.get_device_index()) {
  PRISM_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op,
              "this torch has no CUDA support; install a CUDA build of torch");
  const int32_t device = tensor.get_device_index();
  void* stream = nullptr;
  PRISM_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == TORCH_SUCCESS, op,
              "torch has no current stream for cuda:", device);
  stream_ = static_cast<cudaStream_t>(stream);
  int major = 0;
  int minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  sm_ = 10 * major + minor;
}

void CudaContext::check(cudaError_t error) const {
  if (error == cudaSuccess) {
    return;
  }
  cudaGetLastError();  // a launch error must not surface again in somebody else's call
  fail(op_, "CUDA error ", cudaGetErrorName(error), ": ", cudaGetErrorString(error),
       " (compute capability ", sm_ / 10, ".", sm_ % 10, ")");
}

DType kernel_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
}

TensorView view(const Tensor& tensor) { return view(tensor, 0, 1, 2); }

TensorView view(const Tensor& tensor, int64_t batch, int64_t head, int64_t row) {
  // The stride of a dimension of size 1 means nothing, but would decide about alignment.
  const int64_t head_dim = tensor.size(tensor.dim() - 1);
  const auto stride = [&](int64_t dim) {
    return tensor.size(dim) > 1 ? tensor.stride(dim) : head_dim;
  };
  const int64_t row_stride = stride(row);
  // A single batch element, or page, could be followed by another at any multiple of a row.
  const int64_t batch_stride = batch < 0                ? 0
                               : tensor.size(batch) > 1 ? tensor.stride(batch)
                                                        : row_stride;
  return {tensor.data_ptr(), batch_stride, stride(head), row_stride};
}

}  // namespace prism

#endif  // PRISM_WITH_CUDA
