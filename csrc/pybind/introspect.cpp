// What the compiled kernels cost, for profiling. The ops never depend on this module.
#include "kernels/introspect.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

PYBIND11_MODULE(_introspect, m) {
  m.doc() = "Kernels of the ops library as the CUDA runtime sees them on the current device.";
  pybind11::class_<prism::KernelInfo>(m, "KernelInfo")
      .def_readonly("name", &prism::KernelInfo::name)
      .def_readonly("tile", &prism::KernelInfo::tile, "What one thread block handles.")
      .def_readonly("threads", &prism::KernelInfo::threads, "Threads per block.")
      .def_readonly("registers", &prism::KernelInfo::registers, "Registers per thread.")
      .def_readonly("static_smem", &prism::KernelInfo::static_smem, "Bytes per block.")
      .def_readonly("dynamic_smem", &prism::KernelInfo::dynamic_smem, "Bytes per block.")
      .def_readonly("local_bytes", &prism::KernelInfo::local_bytes,
                    "Stack and spilled bytes per thread.")
      .def_readonly("blocks_per_sm", &prism::KernelInfo::blocks_per_sm,
                    "Resident blocks per multiprocessor.")
      .def_readonly("ptx_version", &prism::KernelInfo::ptx_version,
                    "10 * major + minor of the PTX the code came from.")
      .def_readonly("binary_version", &prism::KernelInfo::binary_version,
                    "10 * major + minor of the machine code that runs.")
      .def_readonly("error", &prism::KernelInfo::error,
                    "Why the runtime gave no answer; empty where it did.")
      .def("__repr__", [](const prism::KernelInfo& kernel) {
        return "<KernelInfo " + kernel.name + (kernel.error.empty() ? "" : ": " + kernel.error) +
               ">";
      });
  m.def("list_kernels", &prism::list_kernels,
        "Every kernel of the library, a KernelInfo each; needs no GPU, says so where there is "
        "none.");
}
