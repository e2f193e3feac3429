#!/usr/bin/env bash
# Runs scripts/check_transformers.py beside other versions of transformers, one environment each, and
# prints a line per version; with --suite the tests in its place. Torch and what else is installed are
# borrowed from this environment; transformers, its tokenizers and its hub client are installed as it
# asks for them.
#
#   scripts/check_versions.sh                  # the oldest one served, old ones in use, the pinned one
#   scripts/check_versions.sh 4.51.3 5.17.0    # others
#   scripts/check_versions.sh 4.37.2:numpy==1.26.4   # with a package of another version beside it
#   scripts/check_versions.sh --suite          # all tests, with the oldest that collavo serves and the pinned one
#   scripts/check_versions.sh --suite 5.14.1 tests/nn -x   # with others; the rest is pytest's
#
# PYTHON=... chooses the interpreter; environments stay in build/versions, deleting them is safe.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python}
pinned=$(sed -n 's/^transformers==//p' "$root/constraints.txt")
oldest=$(sed -n 's/^OLDEST_WITH_SEAMS = "\(.*\)"/\1/p' "$root/collavo_kernels/_requirements.py")
suite=false versions=() tests=()
for each in "$@"; do
  case $each in
  --suite) suite=true ;;
  [0-9]*) versions+=("$each") ;;
  *) tests+=("$each") ;;
  esac
done
if [ ${#tests[@]} -gt 0 ] && ! $suite; then
  echo "${tests[0]}: expected versions of transformers, or --suite before what is pytest's" >&2
  exit 2
fi
if [ ${#versions[@]} -eq 0 ]; then
  if $suite; then versions=("$oldest" "$pinned"); else versions=(4.37.2 4.45.2 4.57.6 "$oldest" "$pinned"); fi
fi
status=0

# check FOLDER LOG VERSION: what is run in an environment.
check() {
  if $suite; then
    (cd "$root" && PYTHONPATH=$root "$1/bin/python" -m pytest -q -p no:cacheprovider \
      ${tests[@]+"${tests[@]}"}) >>"$2" 2>&1
    local state=$?
    printf 'transformers %-7s %s\n' "$3" "$(grep -E '[0-9]+ (passed|failed|error)' "$2" | tail -1)"
    return $state
  fi
  PYTHONPATH=$root "$1/bin/python" -W ignore "$root/scripts/check_transformers.py" 2>>"$2"
}

for each in "${versions[@]}"; do
  IFS=: read -r version extra <<<"$each"
  folder=$root/build/versions/$version
  log=$folder.log
  mkdir -p "$root/build/versions"
  rm -rf "$folder"
  if ! {
    "$PYTHON" -m venv "$folder" &&
      "$PYTHON" -c 'import site; print("\n".join(site.getsitepackages()))' \
        >"$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth" &&
      "$folder/bin/pip" install --quiet "transformers==$version" ${extra:+"$extra"}
  } >"$log" 2>&1; then
    printf 'transformers %-7s not installed: %s\n' "$version" "$(tail -1 "$log")"
    status=1
    continue
  fi
  check "$folder" "$log" "$version" || {
    printf '               (%s)\n' "$log"
    status=1
  }
done
exit $status
