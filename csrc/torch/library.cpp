// Schemas and registrations of the ops: the one place that defines their interface.
#include <torch/csrc/stable/library.h>

#include "torch/ops.h"

STABLE_TORCH_LIBRARY(prism, m) {
  m.def("block_pool(Tensor x, int block_size, Tensor? scale=None) -> Tensor");
  m.def(
      "pool_append_(Tensor x, Tensor(a!) means, Tensor(b!) sums, SymInt start, int block_size, "
      "Tensor? scale=None) -> ()");
  m.def(
      "select_blocks(Tensor q_means, Tensor k_means, SymInt q_len, SymInt k_len, int[] high_band, "
      "int[] low_band, float top_p, int keep_sink=1, int keep_recent=1, float? keep_above=None, "
      "bool causal=True, "
      "int q_block_size=128, int k_block_size=128) -> (Tensor bits, Tensor counts)");
  m.def(
      "estimate_blocks(Tensor q, Tensor k, int[] high_band, int[] low_band, float top_p, "
      "int keep_sink=1, int keep_recent=1, float? keep_above=None, bool causal=True, int "
      "q_block_size=128, "
      "int k_block_size=128, Tensor? k_scale=None) -> (Tensor bits, Tensor counts)");
  m.def(
      "estimate_blocks_varlen(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, "
      "Tensor? seqused_k, Tensor? block_table, SymInt max_seqlen_q, SymInt max_seqlen_k, "
      "int[] high_band, int[] low_band, float top_p, int keep_sink=1, int keep_recent=1, "
      "float? keep_above=None, bool causal=True, int q_block_size=128, int k_block_size=128, "
      "Tensor? k_scale=None) -> (Tensor bits, Tensor counts)");
  m.def(
      "estimate_grid(Tensor q, Tensor k, float top_p, int keep_sink=1, int keep_recent=1, "
      "float? keep_above=None, float? scale=None, bool causal=True, int q_block_size=128, "
      "int k_block_size=128) -> (Tensor bits, Tensor counts)");
  m.def(
      "estimate_grid_varlen(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, "
      "Tensor? seqused_k, Tensor? block_table, SymInt max_seqlen_q, SymInt max_seqlen_k, "
      "float top_p, int keep_sink=1, int keep_recent=1, float? keep_above=None, "
      "float? scale=None, bool causal=True, int q_block_size=128, int k_block_size=128) "
      "-> (Tensor bits, Tensor counts)");
  m.def("pool_cells_(Tensor x, Tensor(a!) cells, Tensor(b!) factors, SymInt start) -> ()");
  m.def(
      "select_grid(Tensor q, Tensor k_cells, Tensor k_factors, SymInt k_len, float top_p, "
      "int keep_sink=1, int keep_recent=1, float? keep_above=None, float? scale=None, "
      "bool causal=True, int q_block_size=128, int k_block_size=128) "
      "-> (Tensor bits, Tensor counts)");
  m.def(
      "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor bits, Tensor counts, "
      "float? scale=None, bool causal=True, int q_block_size=128, int k_block_size=128, "
      "Tensor? sinks=None, float? softcap=None, int? window_left=None, Tensor? k_scale=None, "
      "Tensor? v_scale=None) -> (Tensor out, Tensor lse)");
  m.def(
      "sparse_attention_varlen(Tensor q, Tensor k, Tensor v, Tensor bits, Tensor counts, "
      "Tensor cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? block_table, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, float? scale=None, bool causal=True, "
      "int q_block_size=128, int k_block_size=128, Tensor? sinks=None, float? softcap=None, "
      "int? window_left=None, Tensor? k_scale=None, Tensor? v_scale=None) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "prefill(Tensor q, Tensor k, Tensor v, int[] high_band, int[] low_band, float top_p, "
      "int keep_sink=1, int keep_recent=1, float? keep_above=None, float? scale=None, bool "
      "causal=True, "
      "int q_block_size=128, int k_block_size=128, Tensor? k_scale=None, Tensor? v_scale=None) "
      "-> (Tensor out, Tensor lse, Tensor bits, Tensor counts)");
  m.def(
      "attention_kernel(int sm, ScalarType dtype, int head_dim, int q_block_size=128, "
      "int k_block_size=128, bool fp8=False, bool score_options=False) -> str");
  m.def("build_config() -> str");
}

// One implementation serves both devices: it checks, then calls the device's kernel.
static void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("block_pool", TORCH_BOX(&prism::block_pool));
  m.impl("pool_append_", TORCH_BOX(&prism::pool_append_));
  m.impl("select_blocks", TORCH_BOX(&prism::select_blocks));
  m.impl("estimate_blocks", TORCH_BOX(&prism::estimate_blocks));
  m.impl("estimate_blocks_varlen", TORCH_BOX(&prism::estimate_blocks_varlen));
  m.impl("estimate_grid", TORCH_BOX(&prism::estimate_grid));
  m.impl("estimate_grid_varlen", TORCH_BOX(&prism::estimate_grid_varlen));
  m.impl("pool_cells_", TORCH_BOX(&prism::pool_cells_));
  m.impl("select_grid", TORCH_BOX(&prism::select_grid));
  m.impl("sparse_attention", TORCH_BOX(&prism::sparse_attention));
  m.impl("sparse_attention_varlen", TORCH_BOX(&prism::sparse_attention_varlen));
  m.impl("prefill", TORCH_BOX(&prism::prefill));
}

STABLE_TORCH_LIBRARY_IMPL(prism, CPU, m) { register_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(prism, CUDA, m) { register_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(prism, CompositeExplicitAutograd, m) {
  m.impl("attention_kernel", TORCH_BOX(&prism::attention_kernel));
  m.impl("build_config", TORCH_BOX(&prism::build_config));
}
