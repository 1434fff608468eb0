#!/bin/bash
# Compares ways to choose blocks on a real model on one GPU, within given minutes, without network.
#
#   bash bench/quality/gpu_screen.sh MODEL PARTS CARRY OUT MINUTES_8K MINUTES_32K [SETTING ...]
#
# MODEL: qwen or qwen15. PARTS: folder of its part.00, ... CARRY: folder with get_model.py, lib/gguf
# and texts/*.txt.gz. OUT: folder for the JSON files.
set -eu
model=$1 parts=$2 carry=$3 out=$4 minutes_8k=$5 minutes_32k=$6
shift 6
folder=${MODELS:-/tmp/models}/$model
here=$(cd "$(dirname "$0")" && pwd)
if [ ! -e "$folder/model.safetensors" ]; then
  PYTHONPATH=$carry/lib python3 "$carry/get_model.py" "$model" "$folder" --from-parts "$parts"
fi
mkdir -p "$out"
PYTHONUNBUFFERED=1 python3 "$here/real/run.py" --model "$folder" --texts "$carry/texts" \
  --out "$out/$model.json" --lengths ${LENGTHS:-8192 32768} --minutes "$minutes_8k" "$minutes_32k" \
  --settings "$@" ${ARGS:-}
