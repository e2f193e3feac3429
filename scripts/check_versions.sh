#!/usr/bin/env bash
# Runs scripts/check_transformers.py beside other versions of transformers, one environment each, and
# prints a line per version. Torch and what else is installed are borrowed from this environment;
# transformers, its tokenizers and its hub client are installed as it asks for them.
#
#   scripts/check_versions.sh                  # the oldest one served, old ones in use, the pinned one
#   scripts/check_versions.sh 4.51.3 5.17.0    # others
#   scripts/check_versions.sh 4.37.2:numpy==1.26.4   # with a package of another version beside it
#
# PYTHON=... chooses the interpreter; environments stay in build/versions, deleting them is safe.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python}
pinned=$(sed -n 's/^transformers==//p' "$root/constraints.txt")
[ $# -gt 0 ] || set -- 4.37.2 4.45.2 4.57.6 5.17.0 "$pinned"
status=0

for each in "$@"; do
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
  PYTHONPATH=$root "$folder/bin/python" -W ignore "$root/scripts/check_transformers.py" 2>>"$log" || {
    printf '               (%s)\n' "$log"
    status=1
  }
done
exit $status
