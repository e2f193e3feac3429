#!/usr/bin/env bash
# Runs scripts/check_llava.py beside LLaVA's own code: the package llava-torch 1.2.2 with the
# transformers 4.37.2 that it asks for, in an environment of their own. Torch and what else is
# installed are borrowed from this environment.
#
#   scripts/check_llava.sh
#
# PYTHON=... chooses the interpreter; the environment stays in build/llava, deleting it is safe.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python}
folder=$root/build/llava

if ! [ -e "$folder/ready" ]; then
  rm -rf "$folder"
  "$PYTHON" -m venv "$folder"
  "$PYTHON" -c 'import site; print("\n".join(site.getsitepackages()))' \
    >"$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
  "$folder/bin/pip" install --quiet "transformers==4.37.2"
  # Its other requirements pin a torch of 2023 and a web server.
  "$folder/bin/pip" install --quiet --no-deps "llava-torch==1.2.2"
  touch "$folder/ready"
fi
PYTHONPATH=$root exec "$folder/bin/python" -W ignore "$root/scripts/check_llava.py"
