#!/usr/bin/env bash
# Make the oracle's Python environment: torch, transformers, peft and bitsandbytes at pinned versions.
# Only who makes or checks goldens needs it; the tests that CI runs use numpy and h5py alone.
# About 6 GB of disk (torch's wheel brings the CUDA libraries, which are not used).
#
#   tests/oracle/setup.sh DIR        then: DIR/bin/python tests/oracle/make_golden.py --help
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 DIR" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
dir=$1

if [ ! -x "$dir/bin/python" ]; then
    python3 -m venv "$dir"
fi
"$dir/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
"$dir/bin/python" - <<'PY'
import bitsandbytes, h5py, numpy, peft, torch, transformers
for module in (torch, transformers, peft, bitsandbytes, numpy, h5py):
    print(f"{module.__name__} {module.__version__}")
PY
