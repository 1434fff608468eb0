// Schemas and registrations of the ops: the one place that defines their interface.
#include <torch/csrc/stable/library.h>

#include <string>

#include "torch/boxing.h"
#include "torch/ops.h"

// Where the ops are registered. A copy in a kernel repository has a name of its own, so that
// several versions may be loaded by one process.
#ifndef PRISM_NAMESPACE
#define PRISM_NAMESPACE prism
#endif
#define PRISM_CHECK_NAMESPACE PRISM_JOIN(PRISM_NAMESPACE, _check)
#define PRISM_JOIN(first, second) PRISM_PASTE(first, second)
#define PRISM_PASTE(first, second) first##second
// Torch's macros paste their argument as it is written; these have it replaced before.
#define PRISM_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define PRISM_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

namespace {

using Kernel = void (*)(StableIValue*, uint64_t, uint64_t);

struct Op {
  const char* name;
  const char* arguments;
  const char* returns;
  Kernel check;
  Kernel run;
};

// Groups of arguments, see torch/arguments.h.
#define PRISM_BANDS "int[] high_band, int[] low_band"
#define PRISM_RULES "float[] top_p, float[]? keep_above=None, int keep_sink=1, int keep_recent=1"
#define PRISM_BLOCKS "bool causal=True, int q_block_size=128, int k_block_size=64"
#define PRISM_SCORES                                                    \
  "Tensor? sinks=None, float? softcap=None, SymInt? window_left=None, " \
  "Tensor? k_scale=None, Tensor? v_scale=None"
#define PRISM_SEQUENCES                                                            \
  "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_k=None, " \
  "Tensor? block_table=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None"

#define PRISM_KERNELS(check) prism::boxed_check<&prism::check>, prism::boxed<&prism::check>

const Op kOps[] = {
    {"block_pool", "Tensor x, int block_size, Tensor? scale=None", "Tensor",
     PRISM_KERNELS(check_block_pool)},
    {"append_means_",
     "Tensor x, Tensor(a!) means, Tensor(b!) sums, SymInt start, int block_size, "
     "Tensor? scale=None",
     "()", PRISM_KERNELS(check_append_means)},
    {"pool_cells_", "Tensor x, Tensor(a!) cells, Tensor(b!) factors, SymInt start", "()",
     PRISM_KERNELS(check_pool_cells)},
    {"select_bands",
     "Tensor q, Tensor? k, " PRISM_BANDS ", " PRISM_RULES ", " PRISM_BLOCKS
     ", *, Tensor? k_means=None, SymInt? k_len=None, Tensor? k_scale=None, " PRISM_SEQUENCES
     ", SymInt dense_below=0",
     "(Tensor bits, Tensor counts)", PRISM_KERNELS(check_select_bands)},
    {"select_grid",
     "Tensor q, Tensor? k, " PRISM_RULES ", float? scale=None, " PRISM_BLOCKS
     ", *, Tensor? k_cells=None, Tensor? k_factors=None, SymInt? k_len=None, " PRISM_SEQUENCES
     ", SymInt dense_below=0",
     "(Tensor bits, Tensor counts)", PRISM_KERNELS(check_select_grid)},
    {"sparse_attention",
     "Tensor q, Tensor k, Tensor v, Tensor bits, Tensor counts, float? scale=None, " PRISM_BLOCKS
     ", *, " PRISM_SCORES ", " PRISM_SEQUENCES,
     "(Tensor out, Tensor lse)", PRISM_KERNELS(check_sparse_attention)},
    {"prefill",
     "Tensor q, Tensor k, Tensor v, str estimator, " PRISM_BANDS ", " PRISM_RULES
     ", float? scale=None, " PRISM_BLOCKS ", *, " PRISM_SCORES ", " PRISM_SEQUENCES
     ", SymInt dense_below=0",
     "(Tensor out, Tensor lse, Tensor bits, Tensor counts)", PRISM_KERNELS(check_prefill)},
};

std::string schema(const Op& op, const char* returns) {
  return std::string(op.name) + "(" + op.arguments + ") -> " + returns;
}

void register_kernels(torch::stable::detail::StableLibrary& m) {
  for (const Op& op : kOps) {
    m.impl(op.name, op.run);
  }
}

}  // namespace

PRISM_LIBRARY(PRISM_NAMESPACE, m) {
  for (const Op& op : kOps) {
    m.def(schema(op, op.returns).c_str());
  }
  m.def(
      "attention_kernel(int sm, ScalarType dtype, int head_dim, int q_block_size=128, "
      "int k_block_size=64, bool fp8=False, bool score_options=False) -> str");
  m.def("build_config() -> str");
}

// The checks of each op alone. The CPU kernels, which the Python package registers, begin with
// them; kernels in Python because an exception that crosses a boxed call becomes a mere message.
PRISM_LIBRARY(PRISM_CHECK_NAMESPACE, m) {
  for (const Op& op : kOps) {
    m.def(schema(op, "()").c_str());
  }
}

PRISM_LIBRARY_IMPL(PRISM_CHECK_NAMESPACE, CompositeExplicitAutograd, m) {
  for (const Op& op : kOps) {
    m.impl(op.name, op.check);
  }
}

PRISM_LIBRARY_IMPL(PRISM_NAMESPACE, CUDA, m) { register_kernels(m); }

// Every other device, and the CPU without the Python package: refused after the checks.
PRISM_LIBRARY_IMPL(PRISM_NAMESPACE, CompositeExplicitAutograd, m) {
  register_kernels(m);
  m.impl("attention_kernel", TORCH_BOX(&prism::attention_kernel));
  m.impl("build_config", TORCH_BOX(&prism::build_config));
}
