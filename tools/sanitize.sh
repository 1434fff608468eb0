#!/usr/bin/env bash
# Runs compute-sanitizer over the GPU op tests that carry the `sanitizer` marker.
#
#   tools/sanitize.sh [tool ...]      tools: memcheck racecheck synccheck initcheck
#                                     (default: memcheck racecheck)
#
# PYTHON                     the interpreter (default .venv/bin/python if there, else python3)
# COMPUTE_SANITIZER          the program (default: from PATH or /usr/local/cuda/bin)
# PRISM_SANITIZE_ALL_KERNELS=1   also instrument PyTorch's kernels (much slower)
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
sanitizer="${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || true)}"
[[ -n "$sanitizer" ]] || sanitizer=/usr/local/cuda/bin/compute-sanitizer
if [[ ! -x "$sanitizer" ]]; then
  echo "sanitize.sh: compute-sanitizer not found; install the CUDA toolkit or set" \
    "COMPUTE_SANITIZER" >&2
  exit 2
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "sanitize.sh: needs a CUDA GPU and a PyTorch built for it" >&2
  exit 2
fi

tools=("$@")
[[ ${#tools[@]} -gt 0 ]] || tools=(memcheck racecheck)

# Every tensor gets its own cudaMalloc, so that reads past its end are errors.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# racecheck aborts in cuBLAS's bfloat16 products, which the tests' yardstick consists of.
export PRISM_YARDSTICK_ON_CPU=1
failed=()
for tool in "${tools[@]}"; do
  options=(--tool "$tool" --error-exitcode 99 --target-processes all)
  options+=(--print-limit 20)
  # Our kernels live in namespace prism. initcheck follows writes, so it has to see all kernels.
  if [[ "$tool" != initcheck && -z "${PRISM_SANITIZE_ALL_KERNELS:-}" ]]; then
    options+=(--kernel-name kernel_substring=prism)
  fi
  echo "== $tool"
  started=$SECONDS
  if ! "$sanitizer" "${options[@]}" \
    "$PYTHON" -m pytest -q -x -p no:cacheprovider -m sanitizer -k cuda tests/ops; then
    failed+=("$tool")
  fi
  echo "== $tool took $((SECONDS - started)) s"
done
if [[ ${#failed[@]} -gt 0 ]]; then
  echo "sanitize.sh: errors found by: ${failed[*]}" >&2
  exit 1
fi
echo "sanitize.sh: clean (${tools[*]})"
