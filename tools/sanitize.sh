#!/usr/bin/env bash
# Runs compute-sanitizer over the GPU op tests that carry the `sanitizer` marker.
#
#   tools/sanitize.sh [tool ...]      tools: memcheck racecheck synccheck initcheck
#                                     (default: memcheck racecheck)
#
# PYTHON                     the interpreter (default .venv/bin/python if there, else python3)
# COMPUTE_SANITIZER          the program (default: from PATH or /usr/local/cuda/bin)
# WORKERS                    processes, each with its share of the tests (default 5)
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
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

logs="$(mktemp -d)"
trap 'rm -rf "$logs"' EXIT
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider)
"${pytest[@]}" --collect-only -m sanitizer -k cuda tests/ops > "$logs/collected" \
  || { cat "$logs/collected" >&2; exit 2; }
grep '::' "$logs/collected" > "$logs/tests"
workers="${WORKERS:-5}"
split --number="r/$workers" --numeric-suffixes --elide-empty-files "$logs/tests" "$logs/share."

# check TOOL: every share in a process of its own; prints what failed, or each one's last line
check() {
  local options=(--tool "$1" --error-exitcode 99 --target-processes all --print-limit 20)
  # Our kernels live in namespace prism. initcheck follows writes, so it has to see all kernels.
  if [[ "$1" != initcheck && -z "${PRISM_SANITIZE_ALL_KERNELS:-}" ]]; then
    options+=(--kernel-name kernel_substring=prism)
  fi
  local share tests pids=() failed=0
  for share in "$logs"/share.*; do
    mapfile -t tests < "$share"
    "$sanitizer" "${options[@]}" "${pytest[@]}" -x "${tests[@]}" > "$logs/log.${share##*.}" 2>&1 &
    pids+=($!)
  done
  for i in "${!pids[@]}"; do
    log="$(printf '%s/log.%02d' "$logs" "$i")"
    if wait "${pids[i]}"; then
      tail -n 2 "$log"
    else
      failed=1
      cat "$log"
    fi
  done
  return "$failed"
}

failed=()
for tool in "${tools[@]}"; do
  echo "== $tool"
  started=$SECONDS
  check "$tool" || failed+=("$tool")
  echo "== $tool took $((SECONDS - started)) s"
done
if [[ ${#failed[@]} -gt 0 ]]; then
  echo "sanitize.sh: errors found by: ${failed[*]}" >&2
  exit 1
fi
echo "sanitize.sh: clean (${tools[*]}; $(wc -l < "$logs/tests") tests)"
