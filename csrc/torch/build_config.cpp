#include "torch/ops.h"

#ifdef PRISM_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include <sstream>

// The build passes these as string literals; PRISM_ARCHS is a list separated by semicolons.
#ifndef PRISM_VERSION
#define PRISM_VERSION "unknown"
#endif
#ifndef PRISM_GIT_HASH
#define PRISM_GIT_HASH "unknown"
#endif
#ifndef PRISM_ARCHS
#define PRISM_ARCHS ""
#endif
#ifndef PRISM_CUTLASS_VERSION
#define PRISM_CUTLASS_VERSION ""
#endif

namespace prism {

std::string build_config() {
  std::ostringstream json;
  json << R"({"version": ")" << PRISM_VERSION << R"(", "git": ")" << PRISM_GIT_HASH << '"';
#ifdef PRISM_WITH_CUDA
  json << R"(, "cuda": ")" << CUDART_VERSION / 1000 << '.' << CUDART_VERSION % 1000 / 10
       << R"(", "cutlass": ")" << PRISM_CUTLASS_VERSION << '"';
#else
  json << R"(, "cuda": null, "cutlass": null)";
#endif
  json << R"(, "archs": [)";
  std::istringstream archs(PRISM_ARCHS);
  std::string arch;
  for (bool first = true; std::getline(archs, arch, ';'); first = false) {
    json << (first ? "\"" : ", \"") << arch << '"';
  }
  json << R"(], "torch_target": "2.10"})";
  return json.str();
}

}  // namespace prism
