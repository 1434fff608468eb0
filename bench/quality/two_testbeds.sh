#!/usr/bin/env bash
# Train two testbeds at once, each on its own GPU, and compare the methods on them, in ten minutes:
#   standard: RoPE of base 1e6 throughout, as in docs/quality.md
#   yarn:     base 1e4 up to 8K tokens, then YaRN by 4: other bands, and another scale of logits
#
#   bash bench/quality/two_testbeds.sh OUT [END]
#
# OUT gets NAME/frontier.json after every piece and NAME.log of each; the standard testbed in parts,
# restored by `cat OUT/testbed.tar.xz.* | tar xJ`. END: seconds after which no piece is started.
set -euo pipefail
out=$1 end=${2:-565}
export PYTHONPATH=. PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
train=${TRAIN:-"--minutes 3.6 --total-minutes 4.4 --no-compile --no-eval"}
suite=${SUITE:-"--lengths 32768 16384 --windows 12 --samples 4 --instances 32"}
settings="0.8 0.87 0.9 0.95 0.97 0.98 0.99"

# The most important first: time ends the list.
first="prism fine sharp_by5 peak each_by20 xattention mixed_by20 sharp_more prism_64 sharper_by5"
rest="sharp_128 fine_by20 peak_more sharp_8_16 sharp_by10 mixed_by10 peak_16_16v peak_8_8"
rest+=" peak_8_16 mixed_by40 mixed_more peak_128 fine_by5 fine_by40 fine_spread peak_by20 mixed_8_8"
rest+=" peak_half mixed_v peak_antidiagonal fine_both fine_rows fine_p mean_pool oracle_e"

testbed() { # NAME GPU "training options" "methods"
  export CUDA_VISIBLE_DEVICES=$2
  local model=build/testbeds/$1
  # shellcheck disable=SC2086  # words, not one string
  python3 bench/quality/train_longrange.py $train $3 --out "$model"
  echo "trained after $SECONDS s"
  cat "$model/training.json"
  if [ "$1" = standard ]; then
    tar c -C "$model" . | xz -1 -T8 | split -b 15m - "$out/testbed.tar.xz." &
  fi
  # shellcheck disable=SC2086
  python3 bench/quality/frontier.py --passes model --model "$model" $suite --top-p $settings \
    --no-plots --minutes "$(python3 -c "print(max($end - $SECONDS, 0) / 60)")" \
    --out "$out/$1" --methods $4
  wait
  echo "done after $SECONDS s"
}

mkdir -p "$out"
testbed standard 0 "" "$first $rest" > "$out/standard.log" 2>&1 &
testbed yarn 1 "--yarn 4 --rope-theta 1e4" "prism auto ${first#prism } auto_64 $rest" \
  > "$out/yarn.log" 2>&1 &
wait
for name in standard yarn; do
  grep -v "it/s\]\|run/s" "$out/$name.log" | tail -n 80
done
