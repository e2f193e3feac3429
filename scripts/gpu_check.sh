#!/usr/bin/env bash
# Builds, tests and measures on this machine's NVIDIA GPU, in under ten minutes.
#
#   scripts/gpu_check.sh [RESULTS] [--wheels DIR]
#
# RESULTS is the folder to leave (default: benchmarks/results/<device name>). Uses the Python (or
# $PYTHON) and the torch that are there, and no network: what is missing is taken from DIR, a folder
# of wheels, and named where it is not there either. Without a GPU it says so and ends well.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }

python=${PYTHON:-python3}
results=
wheels=
while [ $# -gt 0 ]; do
  case $1 in
    --wheels)
      [ -d "${2:-}" ] || { echo "--wheels: expected a folder, got '${2:-}'" >&2; exit 2; }
      wheels=$2
      shift
      ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
    *) results=$1 ;;
  esac
  shift
done

device=$("$python" - <<'CODE' 2>/dev/null
import torch

print(torch.cuda.get_device_name() if torch.cuda.is_available() and torch.version.cuda else "")
CODE
)
if [ -z "$device" ]; then
  echo "no NVIDIA GPU that torch can use: nothing to check here"
  "$python" -c 'import torch' 2>/dev/null || echo "($python has no torch; PYTHON=... chooses another)"
  exit 0
fi
results=${results:-benchmarks/results/$(tr -c 'a-zA-Z0-9\n' '-' <<<"$device" | tr 'A-Z' 'a-z')}
mkdir -p "$results" || exit 1
summary=$results/summary.txt
SECONDS=0
failed=0
export OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1

say() { printf '[%4ds] %s\n' "$SECONDS" "$*" | tee -a "$summary"; }

# run NAME LIMIT command...: the output goes to RESULTS/NAME.txt, its last line to the summary.
run() {
  local name=$1 limit=$2 status
  shift 2
  timeout "$limit" "$@" >"$results/$name.txt" 2>&1
  status=$?
  case $status in
    0) say "$name: ok: $(tail -n 1 "$results/$name.txt")" ;;
    5) say "$name: nothing to run (no test is marked so)" ;;
    124) say "$name: STOPPED after $limit seconds" ;;
    *) say "$name: FAILED ($status): $(tail -n 1 "$results/$name.txt")" ;;
  esac
  if [ "$status" != 0 ] && [ "$status" != 5 ]; then failed=1; fi
}

# Distributions that pyproject.toml names for building, running and testing and that are not there.
missing() {
  "$python" - <<'CODE'
import importlib.metadata
import re
import tomllib

with open("pyproject.toml", "rb") as file:
    pyproject = tomllib.load(file)
project = pyproject["project"]
wanted = pyproject["build-system"]["requires"] + project["dependencies"]
for requirement in wanted + project["optional-dependencies"]["test"]:
    name = re.match(r"[\w.-]+", requirement).group()
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        print(name)
CODE
}

: >"$summary"
say "device: $device"
nvidia-smi >"$results/nvidia-smi.txt" 2>&1 || true
for name in $(missing); do
  if [ -n "$wheels" ] &&
    "$python" -m pip install --quiet --no-deps --no-index --find-links "$wheels" "$name" \
      >>"$results/install.txt" 2>&1; then
    say "installed $name from $wheels"
  else
    say "absent: $name (tests and benchmarks that need it are skipped)"
  fi
done

run build 120 "$python" -m pip install --no-build-isolation --no-deps -e .
if [ "$failed" != 0 ]; then
  failed=0
  say "the package cannot be installed here; building beside the sources instead"
  run build_inplace 120 "$python" setup.py build_ext --inplace
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi
run info 30 "$python" -m collavo_kernels
"$python" -m collavo_kernels --json >"$results/info.json" 2>/dev/null
sed -n '/^peers/,/^$/s/^  \(.*[^ ]\)  *absent$/\1/p' "$results/info.txt" |
  while read -r peer; do say "absent peer: $peer (no comparison with it)"; done

run tests_gpu 180 "$python" -m pytest tests -m gpu -q -p no:cacheprovider
run tests_operators 110 "$python" -m pytest tests/ops tests/nn -m 'not gpu' -q -p no:cacheprovider
run benchmarks 150 "$python" -m pytest benchmarks --benchmark-only -q -p no:cacheprovider \
  --benchmark-json "$results/benchmarks.json"
say "results: $results"
exit "$failed"
