// Which kernel serves which call; needs no GPU.
#include "kernels/attention/dispatch.h"

#include <cstdio>
#include <initializer_list>
#include <string>

using prism::AttentionKernel;
using prism::choose_attention_kernel;

// The choice is made at compile time as well.
static_assert(prism::block_sizes_supported(128, 128) && prism::block_sizes_supported(64, 64) &&
              prism::block_sizes_supported(128, 64) && !prism::block_sizes_supported(64, 128));
static_assert(prism::head_dim_supported(64) && prism::head_dim_supported(128) &&
              prism::head_dim_supported(256) && prism::head_dim_supported(96) &&
              prism::head_dim_supported(8) && !prism::head_dim_supported(0) &&
              !prism::head_dim_supported(100) && !prism::head_dim_supported(264));

int main() {
  int failures = 0;
  const auto expect = [&](bool ok, const char* what) {
    if (!ok) {
      std::printf("FAILED: %s\n", what);
      ++failures;
    }
  };
  // A Hopper call that the fastest kernel serves; each case changes what it names.
  const prism::AttentionTraits hopper = {/*sm=*/90,
                                         /*head_dim=*/128,
                                         /*q_block_size=*/128,
                                         /*k_block_size=*/128,
                                         /*has_sm90=*/true,
                                         /*tma=*/true};
  const auto kernel = [](const prism::AttentionTraits& traits) {
    return std::string(choose_attention_kernel(traits).name);
  };
  const auto refuses = [&](const prism::AttentionTraits& traits, const char* word) {
    const std::string name = kernel(traits);
    return choose_attention_kernel(traits).kernel == AttentionKernel::kUnsupported &&
           name.rfind("unsupported: ", 0) == 0 && name.find(word) != std::string::npos;
  };
  expect(kernel(hopper) == "sm90", "Hopper has its own kernel");
  for (int sm : {80, 86, 89, 100, 120}) {
    prism::AttentionTraits traits = hopper;
    traits.sm = sm;
    expect(kernel(traits) == "sm80", "every other GPU from 8.0 on runs the portable kernel");
  }
  prism::AttentionTraits traits = hopper;
  traits.has_sm90 = false;
  expect(kernel(traits) == "sm80", "a build without sm_90a code falls back");
  traits = hopper;
  traits.tma = false;
  expect(kernel(traits) == "sm80", "tensors that TMA cannot describe fall back");
  traits = hopper;
  traits.q_block_size = traits.k_block_size = 64;
  expect(kernel(traits) == "sm80", "query blocks of 64 fall back");
  for (int64_t head_dim : {8, 96, 192}) {
    traits = hopper;
    traits.head_dim = head_dim;
    expect(kernel(traits) == "sm90", "a head_dim in between is padded");
  }
  traits = hopper;
  traits.score_options = true;
  expect(kernel(traits) == "sm90", "softcap and windows have a Hopper kernel");
  traits = hopper;
  traits.fp8 = true;
  expect(kernel(traits) == "sm90", "fp8 keys and values have a Hopper kernel");
  traits.head_dim = 136;
  expect(kernel(traits) == "sm80", "not beyond head_dim 128");
  traits = hopper;
  traits.fp8 = traits.score_options = true;
  expect(kernel(traits) == "sm80", "nor with softcap or windows");
  traits = hopper;
  traits.sm = 75;
  expect(refuses(traits, "capability"), "an old GPU is refused by its capability");
  traits = hopper;
  traits.head_dim = 100;
  expect(refuses(traits, "head_dim"), "an unknown head_dim is refused by name");
  traits = hopper;
  traits.q_block_size = 64;
  expect(refuses(traits, "block_size"), "unknown block sizes are refused by name");

  alignas(16) static char memory[16];
  prism::TensorView view = {memory, 1024, 512, 128};
  expect(prism::tma_compatible(view), "aligned strides suit TMA");
  view.row_stride = 132;
  expect(!prism::tma_compatible(view), "rows that are not 16-byte aligned do not");
  view.row_stride = 128;
  view.data = memory + 2;
  expect(!prism::tma_compatible(view), "an unaligned start does not");

  view = {memory, 1024, 512, 72};
  expect(prism::tma_compatible(view, 2), "rows of 72 elements suit TMA if they are 16-bit");
  expect(!prism::tma_compatible(view, 1), "and do not if they are fp8");
  view.row_stride = 80;
  expect(prism::tma_compatible(view, 1), "80 bytes do");

  prism::RaggedBatch ragged;
  const int32_t table[1] = {};
  ragged.block_table = table;
  ragged.pages = 10;
  ragged.page_shift = 4;
  prism::TensorView pool = {memory, 16 * 256, 128, 256};
  expect(prism::tma_pages_compatible(pool, pool, ragged), "pages of 16 rows suit TMA");
  prism::TensorView apart = pool;
  apart.batch_stride *= 2;
  expect(prism::tma_pages_compatible(apart, apart, ragged), "pages of k and v may alternate");
  expect(!prism::tma_pages_compatible(pool, apart, ragged), "k's and v's must lie alike");
  apart.batch_stride = 16 * 256 + 8;
  expect(!prism::tma_pages_compatible(apart, apart, ragged), "whole rows lie between pages");
  ragged.page_shift = 2;
  expect(!prism::tma_pages_compatible(pool, pool, ragged), "pages of 4 rows fall back");

  prism::SparseAttentionParams params = {};
  params.batch = 3;
  params.q_heads = 4;
  params.q_len = 300;
  expect(prism::count_tiles(params, 128) == 3 * 4 * 3, "tiles of a batch");
  const int32_t ends[4] = {};
  params.ragged.cu_seqlens_q = ends;
  params.ragged.total_q = 130;  // for example 1, 1 and 128
  expect(prism::count_tiles(params, 128) == 4 * 3, "a ragged batch counts the worst case");

  constexpr int64_t kL2 = 60 << 20;
  expect(prism::kv_section(8192, 128, 16, kL2) == 8, "ten heads of 4 MB fit: two sections of 8");
  expect(prism::kv_section(4096, 128, 8, kL2) == 8, "a section has no more heads than there are");
  expect(prism::kv_section(131072, 128, 8, kL2) == 1, "a head that does not fit runs alone");
  expect(prism::kv_section(8192, 128, 16, kL2, 1) == 16, "fp8 takes half the room");
  expect(prism::kv_section(0, 128, 8, kL2) == 8, "no keys take no room");
  std::printf("%s\n", failures == 0 ? "dispatch: all as expected" : "dispatch: failures");
  return failures == 0 ? 0 : 1;
}
