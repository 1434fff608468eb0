#!/usr/bin/env bash
# Tests a wheel as installed, in a fresh environment for each Python, and writes what came out.
#
#   tools/wheel_check.sh WHEEL RESULT.json PYTHON ...     PYTHON: interpreters with venv
#
# PAIR         torch and transformers: a name of matrix.sh's table (middle)
# MATRIX_ARGS  what pytest is asked for, as for matrix.sh, whose short suite is the default
# Logs go to build/wheel_check.
set -euo pipefail
cd "$(dirname "$0")/.."

usage='usage: tools/wheel_check.sh WHEEL RESULT.json PYTHON ...'
wheel="$(realpath "${1:?$usage}")" result="$(realpath "${2:?$usage}")"
shift 2
pair="${PAIR:-middle}"
logs="$PWD/build/wheel_check"
mkdir -p "$logs"

failed=0
rows=()
for python in "$@"; do
  version="$("$python" -c 'import platform; print(platform.python_version())')"
  echo "== Python $version"
  started=$SECONDS
  status=0
  PYTHON="$python" WHEEL="$wheel" MATRIX_DIR="$logs/$version" tools/matrix.sh "$pair" || status=1
  rows+=("$version" "$status" "$((SECONDS - started))")
  failed=$((failed | status))
done

python3 - "$wheel" "$result" "$logs" "$pair" "${rows[@]}" <<'PY'
import hashlib, json, os, pathlib, re, subprocess, sys

wheel, result, logs = map(pathlib.Path, sys.argv[1:4])
pair, rows = sys.argv[4], sys.argv[5:]
libraries = (
    "import torch, transformers, platform;"
    "print(torch.__version__, transformers.__version__, platform.libc_ver()[1])"
)
pythons = {}
for version, status, seconds in zip(*[iter(rows)] * 3, strict=True):
    folder = logs / version
    python = folder / pair / "venv/bin/python"
    asked = subprocess.run([python, "-c", libraries], capture_output=True, text=True)
    torch, transformers, glibc = asked.stdout.split() or [None] * 3
    log = (folder / f"{pair}.log").read_text(errors="replace")
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", log.strip().split("\n")[-1])
    pythons[version] = {
        "torch": torch,
        "transformers": transformers,
        "glibc": glibc,
        "ok": status == "0",
        "seconds": int(seconds),
        **{word: int(count) for count, word in counts},
        "failures": re.findall(r"^FAILED (\S+)", log, re.MULTILINE),
    }
about = {
    "name": wheel.name,
    "bytes": wheel.stat().st_size,
    "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
}
suite = os.environ.get("MATRIX_ARGS", "matrix.sh's short suite")
content = {"wheel": about, "suite": suite, "pythons": pythons}
result.write_text(json.dumps(content, indent=1) + "\n")
PY
exit "$failed"
