// The ops as C++ functions; library.cpp registers them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace prism {

using torch::stable::Tensor;

Tensor block_pool(const Tensor& x, int64_t block_size, const std::optional<Tensor>& scale);

// Continues the block means of a growing sequence in place.
void pool_append_(const Tensor& x, Tensor means, Tensor sums, int64_t start, int64_t block_size,
                  const std::optional<Tensor>& scale);

std::tuple<Tensor, Tensor> select_blocks(const Tensor& q_means, const Tensor& k_means,
                                         int64_t q_len, int64_t k_len,
                                         const std::vector<int64_t>& high_band,
                                         const std::vector<int64_t>& low_band, double top_p,
                                         int64_t keep_sink, int64_t keep_recent,
                                         std::optional<double> keep_above, bool causal,
                                         int64_t q_block_size, int64_t k_block_size);

// block_pool of q and of k, and select_blocks, without the means in between.
std::tuple<Tensor, Tensor> estimate_blocks(const Tensor& q, const Tensor& k,
                                           const std::vector<int64_t>& high_band,
                                           const std::vector<int64_t>& low_band, double top_p,
                                           int64_t keep_sink, int64_t keep_recent,
                                           std::optional<double> keep_above, bool causal,
                                           int64_t q_block_size, int64_t k_block_size,
                                           const std::optional<Tensor>& k_scale);

// The same for sequences of different lengths, packed or in pages.
std::tuple<Tensor, Tensor> estimate_blocks_varlen(
    const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& seqused_k,
    const std::optional<Tensor>& block_table, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const std::vector<int64_t>& high_band, const std::vector<int64_t>& low_band, double top_p,
    int64_t keep_sink, int64_t keep_recent, std::optional<double> keep_above, bool causal,
    int64_t q_block_size, int64_t k_block_size, const std::optional<Tensor>& k_scale);

// Blocks by the masses of a grid of 16 x 16 tokens over the full width of the heads.
std::tuple<Tensor, Tensor> estimate_grid(const Tensor& q, const Tensor& k, double top_p,
                                         int64_t keep_sink, int64_t keep_recent,
                                         std::optional<double> keep_above,
                                         std::optional<double> scale, bool causal,
                                         int64_t q_block_size, int64_t k_block_size);

// The same for sequences of different lengths, packed or in pages.
std::tuple<Tensor, Tensor> estimate_grid_varlen(
    const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& seqused_k,
    const std::optional<Tensor>& block_table, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double top_p, int64_t keep_sink, int64_t keep_recent, std::optional<double> keep_above,
    std::optional<double> scale, bool causal, int64_t q_block_size, int64_t k_block_size);

// estimate_grid in two steps: cells of keys, written in place as they come, and a selection from
// them.
void pool_cells_(const Tensor& x, Tensor cells, Tensor factors, int64_t start);
std::tuple<Tensor, Tensor> select_grid(const Tensor& q, const Tensor& k_cells,
                                       const Tensor& k_factors, int64_t k_len, double top_p,
                                       int64_t keep_sink, int64_t keep_recent,
                                       std::optional<double> keep_above,
                                       std::optional<double> scale, bool causal,
                                       int64_t q_block_size, int64_t k_block_size);

std::tuple<Tensor, Tensor> sparse_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bits, const Tensor& counts,
    std::optional<double> scale, bool causal, int64_t q_block_size, int64_t k_block_size,
    const std::optional<Tensor>& sinks, std::optional<double> softcap,
    std::optional<int64_t> window_left, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale);

// The same for sequences of different lengths, packed or in pages.
std::tuple<Tensor, Tensor> sparse_attention_varlen(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bits, const Tensor& counts,
    const Tensor& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
    const std::optional<Tensor>& seqused_k, const std::optional<Tensor>& block_table,
    int64_t max_seqlen_q, int64_t max_seqlen_k, std::optional<double> scale, bool causal,
    int64_t q_block_size, int64_t k_block_size, const std::optional<Tensor>& sinks,
    std::optional<double> softcap, std::optional<int64_t> window_left,
    const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale);

std::tuple<Tensor, Tensor, Tensor, Tensor> prefill(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& high_band,
    const std::vector<int64_t>& low_band, double top_p, int64_t keep_sink, int64_t keep_recent,
    std::optional<double> keep_above, std::optional<double> scale, bool causal,
    int64_t q_block_size, int64_t k_block_size, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale);

// The attention kernel for a GPU of compute capability `sm` (10 * major + minor), or why none.
// `fp8` says that k and v are float8 e4m3, `score_options` that the call has softcap or a window.
std::string attention_kernel(int64_t sm, torch::headeronly::ScalarType dtype, int64_t head_dim,
                             int64_t q_block_size, int64_t k_block_size, bool fp8,
                             bool score_options);

// JSON: version, git hash, CUDA and CUTLASS versions, compiled architectures.
std::string build_config();

}  // namespace prism
