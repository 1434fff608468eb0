#!/bin/bash
# Runs vLLM 0.26.0 with prism's backend on a GPU machine that has no network.
#
#   tools/vllm_gpu_run.sh pack PARTS          here: download what that machine lacks, in parts
#   tools/vllm_gpu_run.sh unpack PARTS SITE   there: join the parts; SITE is a folder for Python
#   tools/vllm_gpu_run.sh check SITE          there: does vLLM start and find the backend?
#   tools/vllm_gpu_run.sh equal|accuracy|speed SITE MODEL OUT    there: bench/vllm_bench.py
#
# The GPU machine has Python 3.12, torch 2.11 (cu130), transformers 5, numpy and an sm_90 GPU, and
# this repository with its library built. Order: check, equal (first with EAGER=1: no compilation,
# so a failure is the backend's), accuracy, speed. A part is at most PART bytes.
#
# Left out of vLLM: FlashAttention-2, MLA, mixture-of-experts and quantisation kernels, and sources
# that only Blackwell compiles. What is missing of its requirements, no dense model asks for.
set -euo pipefail
cd "$(dirname "$0")/.."

VERSION=0.26.0
PART=${PART:-58000000}
PYTHON=${PYTHON:-python3}
# Of vLLM's requirements: those that CUDA images with PyTorch do not have.
WHEELS="annotated_types==0.8.0 apache_tvm_ffi==0.1.11 cachetools==8.0.2 cbor2==6.3.0 distro==1.9.0
  fastapi==0.136.3 jiter==0.19.0 llguidance==1.7.6 msgspec==0.22.0 openai==2.54.0
  openai_harmony==0.0.8 opentelemetry_api==1.45.2 partial_json_parser pybase64==1.5.1
  pydantic==2.14.4 pydantic_core==2.50.5 pyzmq==27.3.0 sniffio==1.3.1 starlette==1.10.0
  typing_inspection==0.4.5 xgrammar==0.2.8"

pack() {
  local parts=$1
  mkdir -p "$parts/wheels"
  local platforms=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64) glibc
  for glibc in 12 17 24 26 27 28 31 34 35; do  # pip matches each by name alone
    platforms+=(--platform "manylinux_2_${glibc}_x86_64")
  done
  # shellcheck disable=SC2086
  "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" -d "$parts/wheels" $WHEELS
  local wheel
  wheel=$(ls "${VLLM_WHEEL:-$parts}"/vllm-$VERSION-*.whl 2>/dev/null | head -1 || true)
  if [ -z "$wheel" ]; then
    "$PYTHON" -m pip download -q --no-deps -d "$parts" vllm==$VERSION
    wheel=$(ls "$parts"/vllm-$VERSION-*.whl)
  fi
  "$PYTHON" - "$wheel" "$parts" <<'PY'
import sys, zipfile
from pathlib import Path

wheel, parts = sys.argv[1], Path(sys.argv[2])
SKIPPED = ("third_party/deep_gemm", "third_party/fmha_sm100", "fused_moe/configs",
           "quantization/utils/configs", "mamba/ops/configs", "_moe_C", "_vllm_fa2_C",
           "_flashmla", "_qutlass")
KEPT = ("third_party/deep_gemm/__init__.py",)
with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(parts / "site.zip", "w", zipfile.ZIP_DEFLATED) as out:
    for info in source.infolist():
        if not any(name in info.filename for name in SKIPPED) or info.filename.endswith(KEPT):
            out.writestr(info.filename, source.read(info))
    for path in sorted((parts / "wheels").glob("*.whl")):
        with zipfile.ZipFile(path) as own:
            for info in own.infolist():
                out.writestr(info.filename, own.read(info))
PY
  rm -f "$parts"/site.part.*
  split -b "$PART" -d "$parts/site.zip" "$parts/site.part."
  (cd "$parts" && sha256sum site.zip > site.sha256 && rm site.zip)
  ls -l "$parts"/site.part.*
}

unpack() {
  local parts=$1 site=$2
  mkdir -p "$site"
  cat "$parts"/site.part.* > "$site/site.zip"
  (cd "$site" && sha256sum --check --quiet "$(realpath --relative-to="$site" "$parts")/site.sha256")
  "$PYTHON" -m zipfile -e "$site/site.zip" "$site"
  rm "$site/site.zip"
  # The entry point by which vLLM finds the backend, as `pip install` would leave it.
  local info="$site/prism_cuda-0.dist-info"
  mkdir -p "$info"
  printf 'Metadata-Version: 2.1\nName: prism-cuda\nVersion: 0\n' > "$info/METADATA"
  printf '[vllm.general_plugins]\nprism = prism_cuda.integrations.vllm:register\n' \
    > "$info/entry_points.txt"
}

environment() {
  SITE=$(realpath "$1")
  export PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}"
  export VLLM_PLUGINS=prism VLLM_NO_USAGE_STATS=1 VLLM_DO_NOT_TRACK=1 HF_HUB_OFFLINE=1
  export VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-/tmp/vllm-cache} PYTHONUNBUFFERED=1
  # One process, so that layer calls can be counted; bench/vllm_bench.py has two for speed.
  EAGER=${EAGER:+--eager}
}

check() {
  environment "$1"
  VLLM_ENABLE_V1_MULTIPROCESSING=0 "$PYTHON" - <<'PY'
import vllm
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum

load_general_plugins()
backend = AttentionBackendEnum.CUSTOM.get_class()
print("vLLM", vllm.__version__, "CUSTOM is", backend, "of", backend.__mro__[1])
PY
}

equal() {
  environment "$1"
  local model=$2 out=$3 bench="$PYTHON bench/vllm_bench.py generate $2 ${EAGER}"
  mkdir -p "$out"
  $bench --backend FLASH_ATTN --out "$out/flash.json"
  $bench --backend FLASH_ATTN --batch 1 --out "$out/single.json"
  $bench --backend CUSTOM --prism '{"top_p": 1, "dense_below": 2304}' --out "$out/prism.json"
  "$PYTHON" bench/vllm_bench.py compare "$out"/{flash,single,prism}.json
}

accuracy() {
  environment "$1"
  local model=$2 out=$3
  mkdir -p "$out"
  for backend in FLASH_ATTN CUSTOM; do
    # shellcheck disable=SC2086
    "$PYTHON" bench/vllm_bench.py accuracy "$model" --backend $backend $EAGER \
      --out "$out/accuracy_$backend.json"
  done
}

speed() {
  environment "$1"
  mkdir -p "$3"
  # shellcheck disable=SC2086
  "$PYTHON" bench/vllm_bench.py speed "$2" $EAGER --out "$3/speed.json"
}

case "${1:-}" in
  pack | unpack | check | equal | accuracy | speed) "$@" ;;
  *) sed -n '2,16p' "$0" >&2; exit 2 ;;
esac
