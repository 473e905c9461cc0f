#!/usr/bin/env bash
# Makes the small models and token files of the train stage, always with the same bytes.
#
#   tests/gpu/make_inputs.sh FOLDER PYTHON       PYTHON has numpy, h5py, xxhash, tokenizers and jinja2
set -euo pipefail
source=$(cd "$(dirname "$0")/../.." && pwd)
folder=$1 python=$2
export PYTHONDONTWRITEBYTECODE=1
mkdir -p "$folder"
cd "$folder"
"$python" "$source/src/prep/qshard_tiny.py" tiny --examples 160 >/dev/null
for split in train eval; do
    "$python" "$source/src/prep/qshard_prep.py" --model tiny "tiny/$split.jsonl" -o "tiny/$split.h5" --seq-len 64 >/dev/null
done
for case in tiny2 odd biases; do
    "$python" "$source/tests/oracle/make_inputs.py" "$case" "$case"
done
