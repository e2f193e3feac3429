#!/usr/bin/env bash
# Fuzzes the native CPU code, built with AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   scripts/fuzz_native.sh [--examples N] [--seed S] [--again FILE]
#
# Runs the random calls of tests/fuzz, N of each kind (default 600, about two minutes beside the
# first build; bare pytest runs a few of them), drawn from seed S (default: another one every time).
# A crash leaves the call it happened in; --again runs that one alone. Works on a copy of the tree in
# build/fuzz with a module of its own and touches nothing else. Needs g++ with libasan and libubsan,
# and the Python of the environment (or $PYTHON); where they are absent it says so and ends well.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }

python=${PYTHON:-python3}
examples=600
seed=$RANDOM
again=
while [ $# -gt 0 ]; do
  case $1 in
    --examples | --seed)
      [[ ${2:-} =~ ^[0-9]+$ ]] || { echo "$1: expected a number, got '${2:-}'" >&2; exit 2; }
      [ "$1" = --seed ] && seed=$2 || examples=$2
      shift
      ;;
    --again)
      [ -f "${2:-}" ] || { echo "--again: expected a file, got '${2:-}'" >&2; exit 2; }
      again=$(realpath "$2")
      shift
      ;;
    -h | --help) usage; exit 0 ;;
    *) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
[ "$examples" -gt 0 ] || { echo "--examples: expected at least 1, got 0" >&2; exit 2; }

skip() { echo "fuzz_native: skipped: $*"; exit 0; }

[ "$(uname -s)" = Linux ] || skip "sanitizers are preloaded as Linux does it, and this is $(uname -s)"
command -v g++ >/dev/null || skip "no g++"
preload=
for library in libasan.so libubsan.so libstdc++.so.6; do
  path=$(g++ -print-file-name="$library")
  [ -e "$path" ] || skip "g++ has no $library"
  preload+="${preload:+:}$(realpath "$path")"
done

SECONDS=0
tree=build/fuzz
mkdir -p "$tree" || exit 1
rm -rf "$tree"/{csrc,collavo_kernels,tests}
mkdir -p "$tree/tests"
# Times are kept, so that only what changed is compiled again.
cp -pR csrc collavo_kernels setup.py pyproject.toml README.md LICENSE "$tree" || exit 1
cp -pR tests/fuzz tests/conftest.py "$tree/tests" || exit 1
rm -f "$tree"/collavo_kernels/*.so
cd "$tree" || exit 1

# -O1: sanitizers look at every access in either case, and -O3 compiles for ten times as long.
# In CXX, since the link needs it too.
echo "fuzz_native: building into $tree with -fsanitize=address,undefined"
if ! CXX="g++ -fsanitize=address,undefined" COLLAVO_BUILD_CUDA=0 \
  CXXFLAGS="-O1 -g1 -fno-sanitize-recover=undefined -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS" \
  "$python" setup.py build_ext --inplace >build.txt 2>&1; then
  cat build.txt
  echo "fuzz_native: FAILED: the build"
  exit 1
fi
echo "fuzz_native: built after $SECONDS s; fuzzing with seed $seed, $examples examples of each kind"

# Leaks are Python's own, and its allocator would hide an object's ends.
export ASAN_OPTIONS=detect_leaks=0:exitcode=99:strict_init_order=1:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1
export COLLAVO_FUZZ_EXAMPLES=$examples COLLAVO_FUZZ_SANITIZED=1
export COLLAVO_FUZZ_NOTE=$PWD/case.json COLLAVO_FUZZ_AGAIN=$again
export COLLAVO_BACKEND= PYTHONPATH=$PWD PYTHONMALLOC=malloc OMP_WAIT_POLICY=passive
rm -f "$COLLAVO_FUZZ_NOTE"
# Not captured: a sanitizer's report would be lost with the process.
LD_PRELOAD=$preload "$python" -m pytest tests/fuzz/test_fuzz_{native,setup}.py -p no:cacheprovider -p no:faulthandler -q -rs -s \
  --hypothesis-seed="$seed" ${again:+-k again}
status=$?
if [ $status -ne 0 ]; then
  if [ $status -gt 1 ] && [ -s "$COLLAVO_FUZZ_NOTE" ]; then
    echo "the call under way, also in $COLLAVO_FUZZ_NOTE (scripts/fuzz_native.sh --again FILE):"
    cat "$COLLAVO_FUZZ_NOTE"
  fi
  echo "fuzz_native: FAILED after $SECONDS s, seed $seed"
  exit 1
fi
echo "fuzz_native: nothing found in $SECONDS s, seed $seed"
