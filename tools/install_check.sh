#!/usr/bin/env bash
# Installs from source on a GPU machine, runs every check there and writes what came out.
#
#   tools/install_check.sh RESULT.json       logs go beside it, into RESULT.logs/
#
# Needs torch for CUDA, setuptools, ninja, pytest and cmake; no network. PYTHON names the
# interpreter (python3), CUTLASS_PATH the CUTLASS headers, WORKERS the processes of the tests (8),
# TRANSFORMERS_WHEEL another transformers, with which continuous batching is tested as well.
# STEPS="install tests …" runs only these of: install doctor tests cpp sanitizers batching, and
# keeps what others left. All but install and doctor run side by side: about 5 minutes on 16 cores.
set -uo pipefail
cd "$(dirname "$0")/.."

result="$(realpath -m "${1:?usage: tools/install_check.sh RESULT.json}")"
logs="${result%.json}.logs"
PYTHON="${PYTHON:-python3}"
archs="$("$PYTHON" -c 'from third_party import find_cuda; print(";".join(find_cuda.gpu_archs()))')"
export PRISM_CUDA_ARCHS="${PRISM_CUDA_ARCHS:-$archs}" OMP_NUM_THREADS=1
root="$PWD"
mkdir -p "$logs"
[[ -n "${STEPS:-}" ]] || rm -f "$logs"/*

# step NAME COMMAND …: its log, exit status and seconds
step() {
  local name="$1" started=$SECONDS status
  [[ " ${STEPS:-$name} " == *" $name "* || " ${STEPS:-}" == *" ${name%%-*} "* ]] || return 0
  shift
  "$@" > "$logs/$name.log" 2>&1
  status=$?
  echo "== $name"
  tail -n 3 "$logs/$name.log"
  echo "$status $((SECONDS - started))" > "$logs/$name.status"
}

# From here on the tests import the installed package and not this tree's.
use_installed() {
  local site
  site="$(cd / && "$PYTHON" -c 'import os, prism_cuda; print(os.path.dirname(prism_cuda.__path__[0]))')"
  export PYTHONSAFEPATH=1 PYTHONPATH="$site:$root" PYTEST_ADDOPTS='-p no:cacheprovider -o pythonpath='
}

# What `make test` runs.
whole_suite() (
  workers="$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n ${WORKERS:-8}")"
  # shellcheck disable=SC2086
  "$PYTHON" -m pytest tests -q -m 'not slow and not models' $workers
)

cpp() (
  set -e
  prefix="$root/build/install_check"
  python="-DPython3_EXECUTABLE=$(command -v "$PYTHON")"
  cmake -S . -B build/cmake_gpu "$python"
  cmake --build build/cmake_gpu -j "${MAX_JOBS:-$(nproc --all)}" # nproc alone heeds OMP_NUM_THREADS
  ctest --test-dir build/cmake_gpu --output-on-failure
  cmake --install build/cmake_gpu --prefix "$prefix"
  cmake -S examples/cpp -B build/cmake_gpu_example "$python" -DCMAKE_PREFIX_PATH="$prefix"
  cmake --build build/cmake_gpu_example
  ctest --test-dir build/cmake_gpu_example --output-on-failure
)

batching() (
  set -e
  "$PYTHON" -m pip install -q --no-deps --no-index --target build/newer "$TRANSFORMERS_WHEEL"
  PYTHONPATH="$root/build/newer:$PYTHONPATH" "$PYTHON" -m pytest tests/test_continuous_batching.py -q
)

step install "$PYTHON" -m pip install --no-build-isolation --no-deps --force-reinstall .
use_installed
step doctor "$PYTHON" -m prism_cuda doctor
step tests whole_suite &
step cpp cpp &
for tool in memcheck racecheck synccheck initcheck; do
  step "sanitizers-$tool" env PYTHON="$PYTHON" tools/sanitize.sh "$tool" &
done
[[ -z "${TRANSFORMERS_WHEEL:-}" ]] || step batching batching &
wait

"$PYTHON" - "$logs" "$result" <<'PY'
import importlib.metadata, json, pathlib, platform, re, subprocess, sys

logs, result = map(pathlib.Path, sys.argv[1:])


def line(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip().split("\n")[-1]
    except OSError:
        return "not found"


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


steps = {}
for file in sorted(logs.glob("*.status"), key=lambda f: f.stat().st_mtime):
    status, seconds = map(int, file.read_text().split())
    log = file.with_suffix(".log").read_text(errors="replace")
    counts = re.findall(r"^.*\b(?:passed|failed|tests? passed|clean)\b.*$", log, re.MULTILINE)
    steps[file.stem] = {
        "passed": status == 0,
        "seconds": seconds,
        "summary": (counts or log.strip().split("\n"))[-1].strip(),
        "failed": re.findall(r"^FAILED (\S+)", log, re.MULTILINE),
    }
versions = {name: version(name) for name in ("torch", "transformers", "pytest", "prism-cuda")}
versions |= {
    "os": next(
        (s[13:-1] for s in open("/etc/os-release").read().split("\n") if s.startswith("PRETTY_NAME=")),
        platform.platform(),
    ),
    "python": platform.python_version(),
    "gcc": line("gcc", "-dumpfullversion"),
    "nvcc": line("nvcc", "--version"),
    "gpu": line("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
    "commit": line("git", "describe", "--always", "--dirty"),
}
result.write_text(json.dumps({"versions": versions, "steps": steps}, indent=1) + "\n")
print(json.dumps(steps, indent=1))
sys.exit(not all(step["passed"] for step in steps.values()))
PY
