#!/usr/bin/env bash
# Builds for the CPU and runs a short test suite in fresh environments: with the oldest and newest
# torch and transformers that pyproject.toml allows, and with pairs in between.
#
#   tools/matrix.sh [name ...]     names of the table below; default: all of them
#
# PYTHON       the interpreter (python3)
# MATRIX_DIR   where environments, sources and logs go (build/matrix)
# MATRIX_ARGS  what pytest is asked for (default: the short suite below)
# WHEEL        test this wheel, as installed, instead of a build of the tree
set -euo pipefail
cd "$(dirname "$0")/.."

# A release that is newer than "newest" belongs there; tests/test_build.py compares with pyproject.
#      name     torch   transformers
TABLE='oldest   2.10.0  5.17.0
       gpu      2.11.0  5.17.0
       middle   2.12.1  5.20.0
       newest   2.15.0  5.24.0'
# What a release of either can break: loading, registration, compile and export, whole models.
shopt -s nullglob
SHORT_SUITE=(-m 'not slow and not models'
  tests/test_*.py tests/models*/ tests/ops/test_op_registration.py)

PYTHON="${PYTHON:-python3}"
mkdir -p "${MATRIX_DIR:=build/matrix}"
DIR="$(cd "$MATRIX_DIR" && pwd)"
[[ -z "${WHEEL:-}" ]] || WHEEL="$(realpath "$WHEEL")"
# A machine's own constraints may hide what is newest.
export PIP_CONSTRAINT=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1
export OMP_NUM_THREADS=1 PRISM_CPU_ONLY=1

# environment NAME TORCH TRANSFORMERS: a new virtual environment
environment() {
  local python="$DIR/$1/venv/bin/python"
  rm -rf "${DIR:?}/$1"
  mkdir -p "$DIR/$1"
  "$PYTHON" -m venv "$DIR/$1/venv"
  # PyPI's torch wants gigabytes of NVIDIA's packages; a CPU needs none of them.
  "$python" -m pip install -q --no-compile --no-deps "torch==$2"
  "$python" tools/torch_without_cuda.py
  "$python" -m pip install -q --no-compile filelock typing-extensions sympy networkx jinja2 fsspec \
    'setuptools>=77,<82' "transformers==$3" ninja numpy pytest pytest-xdist hypothesis
}

# suite NAME: build in a copy of the tree, as the environments' libraries must not mix
suite() {
  local python="$DIR/$1/venv/bin/python" args=("${SHORT_SUITE[@]}")
  [[ -z "${MATRIX_ARGS:-}" ]] || read -ra args <<<"$MATRIX_ARGS"
  mkdir "$DIR/$1/src"
  git ls-files -z | xargs -0 cp --parents -t "$DIR/$1/src"
  cd "$DIR/$1/src"
  if [[ -n "${WHEEL:-}" ]]; then
    "$python" -m pip install -q --no-deps "$WHEEL"
    # The tests find their helpers here, but prism_cuda where it is installed.
    PYTHONPATH="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'):$PWD"
    export PYTHONPATH
    args+=(-o pythonpath=)
  else
    "$python" setup.py -q build_ext --inplace
  fi
  "$DIR/$1/venv/bin/pytest" -q -n "$(nproc)" -p no:cacheprovider "${args[@]}"
}

names=("$@")
[[ ${#names[@]} -gt 0 ]] || read -ra names <<<"$(awk '{print $1}' <<<"$TABLE" | xargs)"
failed=()
for name in "${names[@]}"; do
  read -r _ torch transformers <<<"$(awk -v name="$name" '$1 == name' <<<"$TABLE")"
  if [[ -z "$torch" ]]; then
    echo "matrix.sh: no pair is called '$name'; there are:" $(awk '{print $1}' <<<"$TABLE") >&2
    exit 2
  fi
  echo "== $name: torch $torch, transformers $transformers"
  started=$SECONDS
  set +e  # for this shell; behind || the subshell's own -e would not count
  (set -e; environment "$name" "$torch" "$transformers"; suite "$name") > "$DIR/$name.log" 2>&1
  status=$?
  set -e
  [[ $status -eq 0 ]] || failed+=("$name")
  tail -n 25 "$DIR/$name.log" | grep -E '^(FAILED|ERROR|E  |error|[0-9]+ (passed|failed))|Error' || true
  echo "== $name took $((SECONDS - started)) s, log in $DIR/$name.log"
done
if [[ ${#failed[@]} -gt 0 ]]; then
  echo "matrix.sh: failed: ${failed[*]}" >&2
  exit 1
fi
echo "matrix.sh: all pass (${names[*]})"
