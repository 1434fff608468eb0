// The groups of arguments that several ops share, in the order of their schemas (library.cpp).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "torch/boxing.h"

namespace prism {

using torch::stable::Tensor;

struct RuleArguments {
  std::vector<double> top_p;                      // one, or one per query head
  std::optional<std::vector<double>> keep_above;  // the same; none: the rule is off
  int64_t keep_sink;
  int64_t keep_recent;

  static RuleArguments take(Stack& stack) {
    return {stack.take<std::vector<double>>(), stack.take<std::optional<std::vector<double>>>(),
            stack.take<int64_t>(), stack.take<int64_t>()};
  }
};

struct BandArguments {
  std::vector<int64_t> high;
  std::vector<int64_t> low;

  static BandArguments take(Stack& stack) {
    return {stack.take<std::vector<int64_t>>(), stack.take<std::vector<int64_t>>()};
  }
};

struct BlockArguments {
  bool causal;
  int64_t q_block_size;
  int64_t k_block_size;

  static BlockArguments take(Stack& stack) {
    return {stack.take<bool>(), stack.take<int64_t>(), stack.take<int64_t>()};
  }
};

// What changes scores and values in attention.
struct ScoreArguments {
  std::optional<Tensor> sinks;
  std::optional<double> softcap;
  std::optional<int64_t> window_left;
  std::optional<Tensor> k_scale;
  std::optional<Tensor> v_scale;

  static ScoreArguments take(Stack& stack) {
    return {stack.take<std::optional<Tensor>>(), stack.take<std::optional<double>>(),
            stack.take<std::optional<int64_t>>(), stack.take<std::optional<Tensor>>(),
            stack.take<std::optional<Tensor>>()};
  }
};

// Sequences of different lengths, packed or in pages; without cu_seqlens_q a dense batch.
struct SequenceArguments {
  std::optional<Tensor> cu_seqlens_q;
  std::optional<Tensor> cu_seqlens_k;
  std::optional<Tensor> seqused_k;
  std::optional<Tensor> block_table;
  std::optional<int64_t> max_seqlen_q;
  std::optional<int64_t> max_seqlen_k;

  bool ragged() const { return cu_seqlens_q.has_value(); }

  static SequenceArguments take(Stack& stack) {
    return {stack.take<std::optional<Tensor>>(),  stack.take<std::optional<Tensor>>(),
            stack.take<std::optional<Tensor>>(),  stack.take<std::optional<Tensor>>(),
            stack.take<std::optional<int64_t>>(), stack.take<std::optional<int64_t>>()};
  }
};

// Keys that were pooled before, instead of k.
struct KeyMeansArguments {
  std::optional<Tensor> k_means;
  std::optional<int64_t> k_len;

  static KeyMeansArguments take(Stack& stack) {
    return {stack.take<std::optional<Tensor>>(), stack.take<std::optional<int64_t>>()};
  }
};

struct KeyCellsArguments {
  std::optional<Tensor> k_cells;
  std::optional<Tensor> k_factors;
  std::optional<int64_t> k_len;

  static KeyCellsArguments take(Stack& stack) {
    return {stack.take<std::optional<Tensor>>(), stack.take<std::optional<Tensor>>(),
            stack.take<std::optional<int64_t>>()};
  }
};

}  // namespace prism
