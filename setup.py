"""Build of prism_cuda/_C.abi3.so (the ops) and prism_cuda/_introspect; see docs/building.md."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

os.chdir(Path(__file__).resolve().parent)
sys.path.insert(0, os.getcwd())  # PEP 517 front ends leave the project out

from third_party import find_cuda, find_cutlass  # noqa: E402

INCLUDE_ROOT = os.path.abspath("csrc")
EXPORTS = Path("csrc/pybind/exports.map").resolve()
CXX_FLAGS = [
    *("-std=c++17", "-O2", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"),
    *(f"-isystem{path}" for path in cpp_extension.include_paths()),  # pybind11 is in there too
]
# The ops use nothing newer than torch 2.10's stable ABI. For them alone: the pybind11 headers of
# some torch versions refuse to be included where this is defined.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# torch.ops.<this> instead of torch.ops.prism, for tools/kernel_repo.py.
OWN_NAMESPACE = os.environ.get("PRISM_NAMESPACE")
NAMESPACE = [f"-DPRISM_NAMESPACE={OWN_NAMESPACE}"] if OWN_NAMESPACE else []
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "--compiler-options=-Wall",
    "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage",
    # cpp_extension defines these; the CMake build has to see the same headers.
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
]


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).rglob(f"*{suffix}"))


def extensions(with_cuda: bool) -> list[Extension]:
    ops = Extension(
        "prism_cuda._C",
        # ninja starts them in this order: kernels take minutes, the rest fills the gaps at the end
        (sources("csrc/kernels", ".cu") if with_cuda else []) + sources("csrc/torch", ".cpp"),
        include_dirs=[INCLUDE_ROOT],
        library_dirs=cpp_extension.library_paths(),
        extra_compile_args={"cxx": [*CXX_FLAGS, STABLE_ABI, *NAMESPACE], "nvcc": list(NVCC_FLAGS)},
        # torch is loaded by whoever loads this library, so there is no run path to it.
        extra_link_args=[
            *("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"),
            f"-Wl,--version-script={EXPORTS}",
        ],
        py_limited_api=True,
        language="c++",
    )
    introspect = Extension(
        "prism_cuda._introspect",
        ["csrc/pybind/introspect.cpp"],
        include_dirs=[INCLUDE_ROOT],
        library_dirs=cpp_extension.library_paths(),
        extra_compile_args={"cxx": list(CXX_FLAGS)},
        extra_link_args=["-l:_C.abi3.so", "-Wl,-rpath,$ORIGIN"],
        language="c++",
    )
    return [ops, introspect] if with_cuda else [ops]


class BuildOps(cpp_extension.BuildExtension):
    """cpp_extension's ninja build, on any torch >= 2.10, with or without CUDA."""

    def build_extensions(self) -> None:
        ops = self.extensions[0]
        defines = {"PRISM_VERSION": self.distribution.get_version(), "PRISM_GIT_HASH": git_hash()}
        if WITH_CUDA:
            defines |= self.set_up_cuda(ops)
        self.write_build_config(ops, defines)
        super().build_extensions()

    def set_up_cuda(self, ops: Extension) -> dict[str, str]:
        nvcc = find_cuda.find_nvcc()
        version = find_cuda.check_nvcc(nvcc)
        archs = find_cuda.wanted_archs()
        cutlass = find_cutlass.find()
        home = find_cuda.toolkit_root(nvcc)

        # A torch without CUDA names no toolkit. Its CUDA version decides whether header
        # dependencies of .cu files are tracked, and is compared with nvcc's: neither torch's
        # runtime nor its CUDA ABI is used here, so nvcc's own version is the right one.
        cpp_extension.CUDA_HOME = str(home)
        torch.version.cuda = version
        launcher = [sys.executable, os.path.abspath("tools/nvcc_with_report.py")]
        compiler = os.environ.get("PYTORCH_NVCC", shlex.quote(str(nvcc)))
        os.environ["PYTORCH_NVCC"] = f"{shlex.join(launcher)} {compiler}"

        threads = os.environ.get("NVCC_THREADS", "1")
        ops.extra_compile_args["nvcc"] += [
            *find_cuda.gencode_flags(archs), *find_cuda.size_flags(version),
            f"--threads={threads}", f"-I{cutlass}",
        ]  # fmt: skip
        ops.extra_compile_args["cxx"] += ["-DUSE_CUDA", "-DPRISM_WITH_CUDA"]
        for extension in self.extensions:
            extension.include_dirs.append(str(home / "include"))
        ops.library_dirs += [str(home / "lib64"), str(home / "lib")]
        ops.extra_link_args += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        return {"PRISM_ARCHS": ";".join(archs), "PRISM_CUTLASS_VERSION": find_cutlass.VERSION}

    def write_build_config(self, ops: Extension, defines: dict[str, str]) -> None:
        """Wrap build_config.cpp with its macros: no other object depends on the git hash."""
        original = "csrc/torch/build_config.cpp"
        wrapper = Path(self.build_temp) / "build_config.cpp"
        lines = [f'#define {name} "{value}"' for name, value in defines.items()]
        text = "\n".join([*lines, '#include "torch/build_config.cpp"', ""])
        if not wrapper.is_file() or wrapper.read_text() != text:
            wrapper.parent.mkdir(parents=True, exist_ok=True)
            wrapper.write_text(text)
        ops.sources[ops.sources.index(original)] = str(wrapper)

    def build_extension(self, ext: Extension) -> None:
        # One ninja file each; _introspect links against the library built before it.
        folder = self.build_temp
        self.build_temp = os.path.join(folder, ext.name)
        if ext.name == "prism_cuda._introspect":
            ext.library_dirs.append(os.path.join(self.build_lib, "prism_cuda"))
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = folder


def git_hash() -> str:
    """Return the commit, marked where the tree differs from it, or "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


try:
    WITH_CUDA = not find_cuda.cpu_only()
    setup(
        ext_modules=extensions(WITH_CUDA),
        cmdclass={"build_ext": BuildOps},
        # The ops run on any Python; only the optional _introspect is tied to this one.
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
except (find_cuda.CudaError, find_cutlass.CutlassError) as error:
    sys.exit(f"error: {error}")
