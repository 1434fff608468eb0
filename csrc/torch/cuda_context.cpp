#include "torch/cuda_context.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

#ifdef PRISM_WITH_CUDA

#include <torch/csrc/stable/ops.h>

// A torch without CUDA does not define this symbol; the library has to load there all the same.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace prism {

namespace {

int32_t device_of(const char* op, const Tensor& tensor) {
  if (!tensor.is_cuda()) {
    fail_without_kernels(op, tensor);
  }
  return tensor.get_device_index();
}

}  // namespace

CudaContext::CudaContext(const char* op, const Tensor& tensor)
    : op_(op), guard_(device_of(op, tensor)) {
  PRISM_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op,
              "this torch has no CUDA support; install a CUDA build of torch");
  const int32_t device = tensor.get_device_index();
  void* stream = nullptr;
  PRISM_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == TORCH_SUCCESS, op,
              "torch has no current stream for cuda:", device);
  stream_ = static_cast<cudaStream_t>(stream);
  // Asked of the driver once a device: it takes a microsecond or two.
  constexpr int32_t kDevices = 64;
  static std::array<std::atomic<int>, kDevices> known{};
  sm_ = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (sm_ == 0) {
    int major = 0;
    int minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    sm_ = 10 * major + minor;
    if (device < kDevices) {
      known[device].store(sm_, std::memory_order_relaxed);
    }
  }
}

void CudaContext::check(cudaError_t error) const {
  if (error == cudaSuccess) {
    return;
  }
  cudaGetLastError();  // a launch error must not surface again in somebody else's call
  fail(op_, "CUDA error ", cudaGetErrorName(error), ": ", cudaGetErrorString(error),
       " (compute capability ", sm_ / 10, ".", sm_ % 10, ")");
}

namespace {

int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_bfloat16();
  }
}

Tensor empty_strided(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dim,
                     int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  const int32_t device = like.get_device_index();
  PRISM_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cuda(),
                                       device, &handle) == TORCH_SUCCESS,
              "new_empty", "torch could not allocate a tensor on cuda:", device,
              "; its message is above, most likely that memory is full");
  return Tensor(handle);
}

// Whether (batch, heads, rows, head_dim) lies in memory without gaps, as such or with the heads
// inside the rows: then empty_like keeps the strides.
bool is_dense(const Tensor& x) {
  if (x.numel() == 0) {
    return false;
  }
  return x.is_contiguous() ||
         (x.dim() == 4 && x.stride(3) == 1 && x.stride(1) == x.size(3) &&
          x.stride(2) == x.size(1) * x.stride(1) && x.stride(0) == x.size(2) * x.stride(2));
}

}  // namespace

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::array<int64_t, 5> strides{};
  const auto dim = static_cast<int64_t>(sizes.size());
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  return empty_strided(like, sizes.begin(), strides.data(), dim, dtype_code(dtype));
}

Tensor new_workspace(const Tensor& like, int64_t bytes) {
  return new_empty(like, {ceil_div(bytes, 4)}, ScalarType::Float);
}

Tensor new_output(const Tensor& q) {
  const auto sizes = q.sizes();
  if (is_dense(q)) {
    const auto strides = q.strides();
    return empty_strided(q, sizes.data(), strides.data(), q.dim(), dtype_code(q.scalar_type()));
  }
  Tensor out = torch::stable::empty_like(q);
  if (out.stride(out.dim() - 1) != 1) {  // an overlapping q can have another dimension innermost
    out = torch::stable::new_empty(q, {sizes.data(), sizes.size()}, q.scalar_type());
  }
  return out;
}

const float* float_data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->data_ptr()) : nullptr;
}

DType kernel_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Float8_e4m3fn:
      return DType::kFloat8E4M3;
    default:
      return DType::kBFloat16;
  }
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
