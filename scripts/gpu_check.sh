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
results=${results:-benchmarks/results/$(sed -E 's/[^A-Za-z0-9]+/-/g; s/-$//' <<<"${device,,}")}
mkdir -p "$results" || exit 1
summary=$results/summary.txt
SECONDS=0
failed=0
export OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1

say() { printf '[%4ds] %s\n' "$SECONDS" "$*" | tee -a "$summary"; }

last_line() { grep -v '^ *$' "$1" | tail -n 1; }

# run NAME LIMIT command...: the output goes to RESULTS/NAME.txt, its last line to the summary.
run() {
  local name=$1 limit=$2 status
  shift 2
  timeout "$limit" "$@" >"$results/$name.txt" 2>&1
  status=$?
  case $status in
    0) say "$name: ok: $(last_line "$results/$name.txt")" ;;
    5) say "$name: nothing to run (no test is marked so)" ;;
    124) say "$name: STOPPED after $limit seconds" ;;
    *) say "$name: FAILED ($status): $(last_line "$results/$name.txt")" ;;
  esac
  if [ "$status" != 0 ] && [ "$status" != 5 ]; then failed=1; fi
}

# What pyproject.toml asks for to build, run and test and what is not there, or is too old. torch and
# triton stay what they are.
missing() {
  "$python" - <<'CODE'
import importlib.metadata
import tomllib

from pip._vendor.packaging.requirements import Requirement

with open("pyproject.toml", "rb") as file:
    pyproject = tomllib.load(file)
project = pyproject["project"]
wanted = pyproject["build-system"]["requires"] + project["dependencies"]
for requirement in map(Requirement, wanted + project["optional-dependencies"]["test"]):
    if requirement.marker is not None and not requirement.marker.evaluate():
        continue
    try:
        there = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        there = None
    fits = there is not None and requirement.specifier.contains(there, prereleases=True)
    if not fits and not (there and requirement.name in ("torch", "triton")):
        print(f"{requirement.name}{requirement.specifier}")
CODE
}

# The kernels beside the sources, without the package's metadata, which an old setuptools refuses.
build_in_place() {
  local folder
  folder=$(mktemp -d)
  cp -R setup.py csrc "$folder" && mkdir "$folder/collavo_kernels" &&
    (cd "$folder" && timeout 120 "$python" setup.py build_ext --inplace) &&
    cp "$folder"/collavo_kernels/*.so collavo_kernels/ && echo "built beside the sources"
  local status=$?
  rm -rf "$folder"
  return $status
}

: >"$summary"
say "device: $device"
nvidia-smi >"$results/nvidia-smi.txt" 2>&1 || true
for name in $(missing | sort -u); do
  if [ -n "$wheels" ] &&
    "$python" -m pip install --quiet --no-deps --no-index --find-links "$wheels" "$name" \
      >>"$results/install.txt" 2>&1; then
    say "installed $name from $wheels"
  else
    say "absent: $name (what needs it is skipped)"
  fi
done

run build 120 "$python" -m pip install --no-build-isolation --no-deps -e .
if [ "$failed" != 0 ]; then
  failed=0
  say "the package cannot be installed here; building beside the sources instead"
  export python
  export -f build_in_place
  run build_in_place 130 bash -c build_in_place
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi
run info 30 "$python" -m collavo_kernels
"$python" -m collavo_kernels --json >"$results/info.json" 2>/dev/null
sed -n '/^peers/,/^$/s/^  \(.*[^ ]\)  *absent$/\1/p' "$results/info.txt" |
  while read -r peer; do say "absent peer: $peer (no comparison with it)"; done

run tests_gpu 210 "$python" -m pytest tests -m gpu -q -p no:cacheprovider
# Not what stands in for a GPU: interpreters, emulation, compiling for GPUs that are not there.
run tests_operators 60 "$python" -m pytest tests/ops tests/nn -m 'not gpu' -q -p no:cacheprovider \
  -k 'not interpreted and not compiled and not aot and not emulated'
run benchmarks 170 "$python" -m pytest benchmarks --benchmark-only -q -p no:cacheprovider \
  --benchmark-json "$results/benchmarks.json"
say "results: $results"
exit "$failed"
