#!/usr/bin/env bash
# Tries, measures and tests on this machine's NVIDIA GPU, in eight minutes, and keeps the numbers.
#
#   scripts/gpu_check.sh [RESULTS] [--total SECONDS] [--only STEP,STEP] [--dry-run]
#
# RESULTS is the folder to leave (default: benchmarks/results/<device name>); it gets at most six
# files: rows.jsonl (each row at once, so a kill keeps it), table.md, tests.xml, log.txt,
# profile.txt and rest.tar.xz. Uses the Python (or $PYTHON) and the torch that are there, no network,
# and what scripts/gpu_prebuild.py has put into .gpu/; without that it builds and compiles here.
# Without a GPU it says so and ends well; --dry-run goes through all of it on a stand-in for a GPU,
# measures nothing and says so in every row. Every step has a limit, a share of --total (default 480).
# --only leaves out all steps but these of smoke, numbers, end_to_end, tests, decode, ncu,
# compute-sanitizer. Ends with 1 where a step failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
SECONDS=0

usage() { sed -n '2,14s/^# \{0,1\}//p' "$0"; }

python=${PYTHON:-python3}
results=
total=480
only=
reserve=8
dry=()
while [ $# -gt 0 ]; do
  case $1 in
    --total)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { echo "--total: expected seconds, got '${2:-}'" >&2; exit 2; }
      total=$2
      shift
      ;;
    --only)
      [[ ${2:-} =~ ^[a-z_,-]+$ ]] || { echo "--only: expected steps with commas, got '${2:-}'" >&2; exit 2; }
      only=,$2,unpack,build,info,table,
      shift
      ;;
    --dry-run) dry=(--dry-run) ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
    *) results=$1 ;;
  esac
  shift
done

device="dry run"
[ ${#dry[@]} -gt 0 ] || device=$(timeout 60 "$python" - <<'CODE' 2>/dev/null
import torch

print(torch.cuda.get_device_name() if torch.cuda.is_available() and torch.version.cuda else "")
CODE
)
if [ -z "$device" ]; then
  echo "no NVIDIA GPU that torch can use: nothing to check here (--dry-run needs none)"
  "$python" -c 'import torch' 2>/dev/null || echo "($python has no torch; PYTHON=... chooses another)"
  exit 0
fi
results=${results:-benchmarks/results/$(sed -E 's/[^A-Za-z0-9]+/-/g; s/-$//' <<<"${device,,}")}
mkdir -p "$results" && results=$(cd "$results" && pwd) || exit 1
work=$(mktemp -d) || exit 1
rows=$results/rows.jsonl
summary=$results/log.txt
rm -f "$results"/{rows.jsonl,table.md,tests.xml,log.txt,profile.txt,rest.tar.xz}
: >"$summary"
. scripts/gpu_steps.sh

export OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH=$PWD/.gpu/site:$PWD${PYTHONPATH:+:$PYTHONPATH}

# Whatever ends the script, what there is comes home.
finish() {
  for name in info smoke numbers end_to_end tests decode; do
    [ -s "$work/$name.txt" ] && printf '\n==== %s\n%s\n' "$name" "$(tail -n 60 "$work/$name.txt")"
  done >>"$summary"
  tar -C "$work" -cJf "$results/rest.tar.xz" . && rm -rf "$work"
}
trap finish EXIT
trap 'exit 1' INT TERM HUP

# Limits are for 480 seconds in all.
of() { echo $(($1 * total / 480)); }

kernels() { find "$TRITON_CACHE_DIR" -name '*.cubin' 2>/dev/null | wc -l; }

# Compiled modules and Triton's cache from .gpu/, if they were made for this Python and this Triton.
unpack() {
  local facts
  facts=$("$python" - <<'CODE'
import json
import sysconfig

import triton

with open(".gpu/facts.json") as file:
    made = json.load(file)
here = {"python": sysconfig.get_config_var("SOABI"), "triton": triton.__version__}
for name, value in here.items():
    if made[name] != value:
        raise SystemExit(f".gpu/ was made for {name} {made[name]}, here is {value}")
print(made["cache"])
CODE
  ) || return 1
  mkdir -p "$facts" && tar -xJf .gpu/triton-cache.tar.xz -C "$facts" || return 1
  cp .gpu/kernels/*.so collavo_kernels/ || return 1
  echo "$(find "$facts" -name '*.cubin' | wc -l) kernels, $(ls .gpu/kernels | wc -l) modules"
}

# The compiled modules beside the sources, in a copy, so that nothing else is left here.
build() {
  local folder
  folder=$(mktemp -d)
  cp -R setup.py csrc "$folder" && mkdir "$folder/collavo_kernels" &&
    (cd "$folder" && "$python" setup.py -q build_ext --inplace) &&
    cp "$folder"/collavo_kernels/*.so collavo_kernels/ && echo "built beside the sources"
  local status=$?
  rm -rf "$folder"
  return $status
}

# profile TOOL command...: what a profiler prints, into the one file for that.
profile() {
  local tool=$1
  shift
  command -v "$tool" >/dev/null || { say "$tool: absent"; return 0; }
  step "$tool" "$(of 55)" "$tool" "$@"
  [ -f "$work/$tool.txt" ] || return 0  # left out by --only
  printf '==== %s %s\n%s\n\n' "$tool" "$*" "$(cat "$work/$tool.txt")" >>"$results/profile.txt"
}

export python
export -f unpack build

say "device: $device; ${total} s in all"
nvidia-smi >"$work/nvidia-smi.txt" 2>&1 || true
export TRITON_CACHE_DIR=/var/tmp/collavo-triton
if [ ! -f .gpu/facts.json ] || ! step unpack "$(of 25)" bash -c unpack; then
  say "nothing prebuilt serves here (scripts/gpu_prebuild.py): building, and Triton compiles as it goes"
  failed=0
  step build "$(of 100)" bash -c build
fi
step info "$(of 20)" "$python" -m collavo_kernels
there=$(kernels)

step smoke "$(of 40)" "$python" scripts/gpu_smoke.py --limit "$(of 20)" "${dry[@]}"
step numbers "$(of 130)" "$python" -m pytest benchmarks/bench_qlora_linear.py benchmarks/bench_crayon_attention.py \
  benchmarks/bench_panoptic_lookup.py --benchmark-only --quick-gpu --rows "$rows" -q -p no:cacheprovider "${dry[@]}"
say "kernels: $there were there, $(($(kernels) - there)) were compiled for smoke and numbers"
there=$(kernels)
# Whole layers beside transformers, PEFT and bitsandbytes; a stand-in cannot run a model.
[ ${#dry[@]} -gt 0 ] || step end_to_end "$(of 60)" "$python" -m pytest benchmarks/bench_end_to_end.py \
  --benchmark-only --quick-gpu --rows "$rows" -q -p no:cacheprovider
[ -f "$rows" ] && step table "$(of 15)" "$python" -m benchmarks.report "$rows" && cp "$work/table.txt" "$results/table.md"

workers=()
timeout 20 "$python" -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) > 14 ? 14 : $(nproc)))" --dist worksteal)
OMP_NUM_THREADS=1 step tests "$(of 110)" "$python" -m pytest tests/ops -m gpu -q -p no:cacheprovider \
  "${workers[@]}" --maxfail 40 --junitxml "$results/tests.xml"
say "kernels: $there were there, $(($(kernels) - there)) were compiled for tests"

step decode "$(of 50)" "$python" scripts/gpu_decode.py "${dry[@]}"
# PyTorch's own kernels stay out of it.
ours='attend_kernel|gradients_kernel|linear_kernel|prepare_kernel|grad_x|factor_kernel|sum_|lookup|finish_rows|decode|shrink'
profile ncu --clock-control none --set basic -k "regex:$ours" "$python" scripts/gpu_profile.py "${dry[@]}"
profile compute-sanitizer --tool memcheck "$python" -m pytest tests/ops -m gpu -q -p no:cacheprovider \
  -k "bfloat16 and (few or padding_window)"
say "results: $results"
exit "$failed"
