#!/bin/bash
# Compares ways to choose blocks on a real model on one GPU, without network.
#
#   bash bench/quality/gpu_screen.sh MODEL PARTS CARRY OUT
#
# From a checkout, nothing built. MODEL: qwen or qwen15. PARTS: folder of its part.00, ... CARRY:
# folder with get_model.py, lib/gguf and texts/*.txt.gz. OUT: folder for the JSON files. M0 to M3:
# minutes of tuning and of three stages: many settings at 8K, few at 32K, a few at 8K with greedy
# answers. S1 to S3: their settings. What fails or runs out of time leaves what it has measured, and
# the next stage begins.
set -eu
model=$1 parts=$2 carry=$3 out=$4
folder=${MODELS:-/tmp/models}/$model
here=$(cd "$(dirname "$0")" && pwd)
if [ ! -e "$folder/model.safetensors" ]; then
  PYTHONPATH=$carry/lib python3 "$carry/get_model.py" "$model" "$folder" --from-parts "$parts"
fi
mkdir -p "$out"
run() { PYTHONUNBUFFERED=1 python3 "$@"; }
for method in ${TUNE:-grid t8_16_raw}; do # knobs per head, at 8K
  file=$out/$model.tune.$method.json
  [ -e "$file" ] || run "$here/real/tune.py" --model "$folder" --texts "$carry/texts" \
    --method "$method" --out "$file" --length ${L0:-8192} --minutes "${M0:-0.7}" ${TUNE_ARGS:-} ||
    echo "FAILED: tuning of $method"
done
tuned=$out/$model.tune
grid=grid@$tuned.grid.json fine=t8_16_raw@$tuned.t8_16_raw.json
S1=${S1:-grid:.95 grid:.98 $grid:.2 $grid:.25 $grid:.3 $fine:.15 $fine:.2 $fine:.25 t8_16_raw:.0125
  g8_16:.95 t4_16_raw:.015 xattention:.95 true:.8}
S2=${S2:-grid:.95 grid:.98 $grid:.2 $grid:.25 $fine:.2 $fine:.25 t8_16_raw:.0125 xattention:.95}
S3=${S3:-grid:.95 $grid:.25 $fine:.25 xattention:.95}
stage() { # NAME LENGTH MINUTES SETTINGS ARGUMENTS
  local name=$1 length=$2 minutes=$3 settings=$4
  shift 4
  # shellcheck disable=SC2086
  run "$here/real/run.py" --model "$folder" --texts "$carry/texts" --out "$out/$model.$name.json" \
    --lengths "$length" --minutes "$minutes" --settings $settings "$@" || echo "FAILED: $name"
}
stage 8k ${L1:-8192} "${M1:-2.5}" "$S1" --no-greedy ${ARGS:-}
stage 32k ${L2:-32768} "${M2:-1.8}" "$S2" --no-greedy ${ARGS:-}
stage greedy ${L3:-8192} "${M3:-0.6}" "$S3" --seed 1 ${ARGS:-}
