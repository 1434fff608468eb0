// How the tensor memory accelerator finds the rows of q, k, v and out.
//
// A map has the dimensions (column, x, head, y, z), moved a box of some x at a time. Rows
// whose x lies outside the map are zeros when read and left out when written.
//
// Batched: x is the row, y the batch element, z is 0.
//
// Ragged: a sequence, or the filled part of a page, is a slice of rows whose offset and size only
// the device knows; rows past its end must count as outside although other sequences go on there.
// The map's x ends at kSliceEnd = 2^30, and row i of a slice has
//
//   x = kSliceEnd - size + i,   y = offset + size,   z = kSliceEnd.
//
// x and y advance by one row, z by 2^34 bytes less one row. So the address is that of row
// offset + i, plus 2^30 * 2^34 bytes, which 64-bit addresses do not see.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/attention/sparse_attention.h"
#include "kernels/params.h"

namespace prism::sm90 {

constexpr int kSliceEnd = 1 << 30;

struct MapShape {
  int head_dim;
  int rows;  // of a batch element; unused if ragged
  int heads;
  int64_t batch;  // unused if ragged
  bool ragged;
};

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, which is not linked to; null: there is no driver that has it. Looked up
// once, since a look-up takes longer than making a map.
inline EncodeTiled find_encode_tiled() {
  static const EncodeTiled encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    constexpr unsigned kSinceCuda = 12000;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &function, kSinceCuda, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return found ? reinterpret_cast<EncodeTiled>(function) : nullptr;
  }();
  return encode;
}

// Rows of 64 16-bit elements are swizzled, those of fp8 are plain and of any length.
inline cudaError_t encode_tensor_map(CUtensorMap& map, const TensorView& x, DType dtype,
                                     const MapShape& shape, int box_rows, int box_columns = 64) {
  const bool fp8 = dtype == DType::kFloat8E4M3;
  const uint64_t bytes = fp8 ? 1 : 2;  // of an element
  const uint64_t row_bytes = static_cast<uint64_t>(x.row_stride) * bytes;
  const uint64_t head_bytes = static_cast<uint64_t>(x.head_stride) * bytes;
  const uint64_t batch_bytes = static_cast<uint64_t>(x.batch_stride) * bytes;
  const auto columns = static_cast<uint64_t>(shape.head_dim);
  const auto heads = static_cast<uint64_t>(shape.heads);
  uint64_t sizes[5] = {columns, static_cast<uint64_t>(shape.rows), heads,
                       static_cast<uint64_t>(shape.batch), 1};
  uint64_t strides[4] = {row_bytes, head_bytes, batch_bytes, 16};
  if (shape.ragged) {
    sizes[1] = kSliceEnd;
    sizes[3] = kMaxSliceRows;
    sizes[4] = kMaxSliceRows;
    strides[2] = row_bytes;
    strides[3] = (uint64_t{1} << 34) - row_bytes;
  }
  const uint32_t box[5] = {static_cast<uint32_t>(box_columns), static_cast<uint32_t>(box_rows), 1,
                           1, 1};
  const uint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUtensorMapDataType type = fp8                        ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const EncodeTiled encode = find_encode_tiled();
  if (encode == nullptr) {
    return cudaErrorInsufficientDriver;
  }
  const CUresult result = encode(
      &map, type, 5u, x.data, &sizes[0], &strides[0], &box[0], &steps[0],
      CU_TENSOR_MAP_INTERLEAVE_NONE, fp8 ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : kTensorMapRefused;
}

}  // namespace prism::sm90
