"""The build: settings, finders, the layering of the sources, and what the built library needs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prism_cuda
from third_party import find_cuda, find_cutlass, get_cuda
from tools import build_settings, check_includes, nvcc_with_report, ptxas_report

ROOT = Path(__file__).parents[1]
SETTINGS = ("PRISM_CPU_ONLY", "PRISM_CUDA_ARCHS")
LIBRARY = Path(prism_cuda.__file__).with_name("_C.abi3.so")


def build_config() -> dict:
    return json.loads(torch.ops.prism.build_config())


def fake_nvcc(folder: Path, version: str) -> Path:
    """Create a CUDA toolkit whose compiler only knows its version."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.0'\n")
    nvcc.chmod(0o755)
    return nvcc


def fake_cutlass(folder: Path, major: int, minor: int) -> Path:
    for name, text in {
        "cutlass/version.h": f"#define CUTLASS_MAJOR {major}\n#define CUTLASS_MINOR {minor}\n",
        "cute/tensor.hpp": "",
    }.items():
        header = folder / "include" / name
        header.parent.mkdir(parents=True)
        header.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("80+PTX;90a", ["80+PTX", "90a"]),
        (" 80, 86 ;90a ", ["80", "86", "90a"]),
        ("80;80", ["80"]),
        ("120f", ["120f"]),
    ],
)
def test_archs_are_parsed(text, archs):
    assert find_cuda.parse_archs(text) == archs


@pytest.mark.parametrize("text", ["", ";", "8.0", "sm_80", "80+ptx", "75", "90b", "hopper"])
def test_bad_archs_are_refused(text):
    with pytest.raises(find_cuda.CudaError, match="PRISM_CUDA_ARCHS"):
        find_cuda.parse_archs(text)


def test_gencode_flags():
    assert find_cuda.gencode_flags(["80+PTX", "90a"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-DPRISM_HAS_SM90A",
    ]
    assert "-DPRISM_HAS_SM90A" not in find_cuda.gencode_flags(["80+PTX", "90"])


@pytest.mark.parametrize(("value", "expected"), [("", False), ("0", False), ("1", True)])
def test_cpu_only(monkeypatch, value, expected):
    monkeypatch.setenv("PRISM_CPU_ONLY", value)
    assert find_cuda.cpu_only() is expected


def test_cpu_only_refuses_other_values(monkeypatch):
    monkeypatch.setenv("PRISM_CPU_ONLY", "yes")
    with pytest.raises(find_cuda.CudaError, match="'yes'"):
        find_cuda.cpu_only()


def test_missing_nvcc_says_every_way_to_have_it(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    if Path("/usr/local/cuda/bin/nvcc").is_file():
        pytest.skip("this machine has a toolkit where none can be hidden")
    with pytest.raises(find_cuda.CudaError) as caught:
        find_cuda.find_nvcc()
    for way in ("CUDA_HOME", "get_cuda.py", "PRISM_CPU_ONLY=1"):
        assert way in str(caught.value)


def test_packages_of_the_toolkit_are_of_one_release():
    versions = {package.partition("==")[2].rpartition(".")[0] for package in get_cuda.PACKAGES}
    assert versions == {"13.0"}


def fake_nvidia_smi(monkeypatch: pytest.MonkeyPatch, folder: Path, answer: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("answer", "archs"),
    [
        ("9.0\\n9.0\\n", ["90a"]),
        ("8.6\\n8.0\\n", ["80", "86"]),
        ("12.0\\n", ["120"]),
        ("7.5\\n", []),
        ("", []),
    ],
)
def test_gpu_archs(monkeypatch, tmp_path, answer, archs):
    fake_nvidia_smi(monkeypatch, tmp_path, answer)
    assert find_cuda.gpu_archs() == archs


@pytest.mark.parametrize(
    ("gpu", "wish", "expected"),
    [
        ("", {}, {"PRISM_CPU_ONLY": "1"}),
        ("9.0", {}, {"PRISM_CUDA_ARCHS": "90a"}),
        ("9.0", {"CUDA": "1"}, {"PRISM_CUDA_ARCHS": find_cuda.DEFAULT_ARCHS}),
        ("", {"CUDA": "1"}, {"PRISM_CUDA_ARCHS": find_cuda.DEFAULT_ARCHS}),
        ("", {"PRISM_CUDA_ARCHS": "80"}, {"PRISM_CUDA_ARCHS": "80"}),
        ("9.0", {"PRISM_CPU_ONLY": "1"}, {"PRISM_CPU_ONLY": "1"}),
    ],
)
def test_what_make_compiles(monkeypatch, tmp_path, capsys, gpu, wish, expected):
    for name in ("CUDA", "CUDA_HOME", "CUTLASS_PATH", "PRISM_LINEINFO", *SETTINGS):
        monkeypatch.delenv(name, raising=False)
    fake_nvidia_smi(monkeypatch, tmp_path, gpu)
    for name, value in wish.items():
        monkeypatch.setenv(name, value)
    assert build_settings.settings() == expected
    said = capsys.readouterr().err
    assert ("make test CUDA=1" in said) == (not gpu and not wish)


@pytest.mark.parametrize(("value", "flags"), [("", []), ("0", []), ("1", ["-lineinfo"])])
def test_line_info_is_for_profilers(monkeypatch, value, flags):
    monkeypatch.setenv("PRISM_LINEINFO", value)
    assert find_cuda.size_flags("12.9") == flags
    assert find_cuda.size_flags("13.0") == [*flags, "--compress-mode=size"]


def test_hopper_kernels_are_compiled_for_hopper_alone():
    flags = find_cuda.gencode_flags(["80+PTX", "90a"])
    portable = ["nvcc", *flags, "-c", "csrc/kernels/grid/select_grid.cu", "-o", "x.o"]
    assert nvcc_with_report.for_one_file(portable) == portable
    hopper = ["nvcc", *flags, "-c", "csrc/kernels/attention/sm90/instantiations/x.cu"]
    assert nvcc_with_report.for_one_file(hopper) == ["nvcc", *flags[2:], *hopper[-2:]]
    # Without sm_90a the file has to compile as it is, empty kernels and all.
    ampere = ["nvcc", *flags[:2], *hopper[-2:]]
    assert nvcc_with_report.for_one_file(ampere) == ampere


def test_portable_kernels_are_translated_for_hopper_from_ptx_of_ampere():
    flags = find_cuda.gencode_flags(["80+PTX", "90a"])
    rest = ["-c", "csrc/kernels/attention/sm80/instantiations/x.cu"]
    from_ampere = "-gencode=arch=compute_80,code=sm_90"
    both = ["nvcc", *flags, *rest]
    assert nvcc_with_report.for_one_file(both) == ["nvcc", *flags[:2], from_ampere, *both[4:]]
    alone = ["nvcc", *find_cuda.gencode_flags(["90a"]), *rest]
    assert nvcc_with_report.for_one_file(alone) == alone


def test_portable_kernels_use_nothing_that_only_hopper_compiles():
    """Made from PTX of sm_80 they would lose it without a word, and run ahead of what they read."""
    files = [*(ROOT / "csrc/kernels/attention/sm80").rglob("*.*")]
    assert files
    for file in files:
        assert not re.search("wait_for_producer|let_consumer_start|__CUDA_ARCH__", file.read_text())


def test_an_include_that_is_missing_is_found(tmp_path):
    """gcc 12's headers bring <cstdint>, gcc 13's do not: no compiler here shows that it is gone."""
    header = (ROOT / "csrc/kernels/params.h").read_text()
    complete, broken = tmp_path / "complete.h", tmp_path / "broken.h"
    complete.write_text(header)
    broken.write_text(header.replace("#include <cstdint>\n", ""))
    assert check_includes.missing(complete) == []
    assert check_includes.missing(broken) == ["cstdint"]


def test_the_matrix_has_the_versions_that_pyproject_names():
    (table,) = re.findall(r"TABLE='(.*?)'", (ROOT / "tools/matrix.sh").read_text(), re.DOTALL)
    versions = {name: pair for name, *pair in map(str.split, table.splitlines())}
    text = (ROOT / "pyproject.toml").read_text()
    oldest = [re.findall(rf'"{name}>=([\d.]+)', text)[0] for name in ("torch", "transformers")]
    assert [version.removesuffix(".0") for version in versions["oldest"]] == oldest
    assert list(versions)[0] == "oldest"
    assert list(versions)[-1] == "newest"


def test_toolkit_without_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(find_cuda.CudaError, match="PRISM_CPU_ONLY=1"):
        find_cuda.find_nvcc()


def test_old_nvcc_is_refused(tmp_path):
    with pytest.raises(find_cuda.CudaError, match=r"is CUDA 12\.2.*needs 12\.3"):
        find_cuda.check_nvcc(fake_nvcc(tmp_path, "12.2"))


def test_nvcc_is_taken_from_cuda_home(monkeypatch, tmp_path):
    nvcc = fake_nvcc(tmp_path, "12.3")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_cuda.find_nvcc() == nvcc
    assert find_cuda.check_nvcc(nvcc) == "12.3"


def test_incomplete_toolkit_is_refused(tmp_path):
    with pytest.raises(find_cuda.CudaError, match="cuda_runtime_api.h"):
        find_cuda.toolkit_root(fake_nvcc(tmp_path, "13.0"))


def test_cutlass_path_without_headers(monkeypatch, tmp_path):
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    with pytest.raises(find_cutlass.CutlassError, match=f"CUTLASS_PATH={tmp_path}.*pip install"):
        find_cutlass.find()


def test_other_cutlass_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("CUTLASS_PATH", str(fake_cutlass(tmp_path, 3, 9)))
    with pytest.raises(find_cutlass.CutlassError, match=r"is CUTLASS 3\.9.*needs 4\.2"):
        find_cutlass.find()


@pytest.mark.parametrize("inside", ["", "include"])
def test_cutlass_path(monkeypatch, tmp_path, inside):
    checkout = fake_cutlass(tmp_path, 4, 2)
    monkeypatch.setenv("CUTLASS_PATH", str(checkout / inside))
    assert find_cutlass.find() == checkout / "include"


def test_missing_cutlass_says_what_to_install(monkeypatch):
    monkeypatch.delenv("CUTLASS_PATH", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(find_cutlass.CutlassError, match="pip install nvidia-cutlass==4.2.0.0"):
        find_cutlass.find()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"CUDA_HOME": "/nonexistent"}, "has no bin/nvcc"),
        ({"CUTLASS_PATH": "/nonexistent"}, "holds no CUTLASS headers"),
        ({"PRISM_CUDA_ARCHS": "hopper"}, "'hopper' is not an architecture"),
    ],
)
def test_build_fails_with_a_sentence(tmp_path, setting, sentence):
    """setup.py stops before it compiles, without a traceback, and never falls back to the CPU."""
    if "CUDA_HOME" not in setting and build_config()["cuda"] is None:
        pytest.skip("needs a CUDA toolkit: this build has none")
    environment = {k: v for k, v in os.environ.items() if k != "PRISM_CPU_ONLY"} | setting
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-temp={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.o"))


def test_kernels_know_no_torch():
    pattern = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|caffe2)/')
    files = [path for path in (ROOT / "csrc" / "kernels").rglob("*") if path.is_file()]
    assert files
    assert [str(path) for path in files if pattern.search(path.read_text())] == []


def test_build_config():
    config = build_config()
    assert config["version"] == prism_cuda.__version__
    assert config["torch_target"] == "2.10"
    assert re.fullmatch(r"unknown|[0-9a-f]{7,40}(-dirty)?", config["git"])
    if config["cuda"] is None:
        assert config["archs"] == []
    else:
        assert config["cutlass"] == find_cutlass.VERSION
        assert find_cuda.parse_archs(";".join(config["archs"])) == config["archs"]


def dynamic_symbols(*options: str) -> list[str]:
    command = ["nm", "--dynamic", "--demangle", *options, str(LIBRARY)]
    try:
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        pytest.skip("needs nm")
    return output.splitlines()


def test_library_needs_only_the_stable_abi():
    undefined = [line.split(maxsplit=1) for line in dynamic_symbols("--undefined-only")]
    names = [name for _, name in undefined]
    assert any(name.startswith("aoti_torch_") for name in names)
    unstable = ("c10::", "at::", "torch::", "caffe2::", "Py", "_Py", "cuda", "cu")
    assert [name for name in names if name.startswith(unstable)] == []


def test_library_loads_without_a_cuda_torch():
    """The one symbol that a torch without CUDA lacks must not be required."""
    if build_config()["cuda"] is None:
        pytest.skip("this build has no CUDA")
    kinds = {}
    for line in dynamic_symbols("--undefined-only"):
        kind, name = line.split(maxsplit=1)
        kinds[name.split("@")[0]] = kind
    assert kinds["aoti_torch_get_current_cuda_stream"] == "w"


def test_library_exports_nothing_but_the_introspection():
    exported = [line.split(maxsplit=2)[2] for line in dynamic_symbols("--defined-only")]
    assert all(name.startswith("prism::list_kernels") for name in exported), exported


def test_introspection_lists_the_kernels():
    if build_config()["cuda"] is None:
        pytest.skip("this build has no CUDA")
    introspect = pytest.importorskip("prism_cuda._introspect")
    kernels = introspect.list_kernels()
    assert {kernel.name.split("<")[0] for kernel in kernels} >= {"block_pool"}
    for kernel in kernels:
        if torch.cuda.is_available():
            hopper_only = kernel.name.startswith("sparse_attention_sm90")
            if hopper_only and torch.cuda.get_device_capability() != (9, 0):
                continue
            assert kernel.error == ""
            assert kernel.registers > 0
            assert kernel.blocks_per_sm > 0
        else:
            assert kernel.error != ""


PTXAS = """\
ptxas info    : Compiling entry function '_Z4fastv' for 'sm_80'
ptxas info    : Function properties for _Z4fastv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem
ptxas info    : Compiling entry function '_Z4slowv' for 'sm_90a'
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def test_ptxas_report(tmp_path, capsys):
    report = tmp_path / "x.o.ptxas.txt"
    report.write_text(PTXAS)
    kernels, warnings = ptxas_report.parse(PTXAS)
    assert [(k.arch, k.registers, k.static_smem, k.spills) for k in kernels] == [
        ("sm_80", 40, 4096, 0),
        ("sm_90a", 255, 0, 20),
    ]
    assert warnings == []
    assert ptxas_report.main(tmp_path) == 1
    assert "1 with spills" in capsys.readouterr().out
    report.write_text(PTXAS.split("ptxas info    : Compiling entry function '_Z4slowv'")[0])
    assert ptxas_report.main(tmp_path) == 0
    report.write_text("ptxas info    : (C7510) Potential Performance Loss: wgmma serialized\n")
    assert ptxas_report.main(tmp_path) == 1
