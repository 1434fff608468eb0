#!/usr/bin/env bash
# Profiles a prefill with nsys and its attention with ncu, whichever is there; see docs/diagnose.md.
#
#   tools/profile.sh OUT      on a GPU machine with prism_cuda built; PYTHON names the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:?usage: tools/profile.sh OUT}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$out"

if command -v nsys > /dev/null; then
  nsys profile -f true -t cuda,nvtx -o "$out/prefill" \
    "$PYTHON" bench/prefill.py --lengths 32768
  nsys stats --force-export=true -r nvtx_sum,cuda_gpu_kern_sum "$out/prefill.nsys-rep" \
    > "$out/nsys.txt"
else
  echo "nsys is not on PATH: skipped"
fi
if command -v ncu > /dev/null; then
  ncu -f --nvtx --nvtx-include "prism.attention/" --set full --launch-count 2 -o "$out/attention" \
    "$PYTHON" bench/attention.py --suite quick --masks random --impls prism --modes eager
  ncu --import "$out/attention.ncu-rep" --page details > "$out/ncu.txt"
else
  echo "ncu is not on PATH: skipped"
fi
