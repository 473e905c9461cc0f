#!/usr/bin/env bash
# Makes the small models and token files of the train stage, always with the same bytes, and SmolLM2's token files.
#
#   tests/gpu/make_inputs.sh FOLDER PYTHON       PYTHON has numpy, h5py, xxhash, tokenizers and jinja2
#
# QSHARD_SMOLLM2 is the folder of SmolLM2, of which only the tokenizer is read; without it a line says so.
set -euo pipefail
source=$(cd "$(dirname "$0")/../.." && pwd)
folder=$1 python=$2
smollm2=${QSHARD_SMOLLM2:-$source/build/smollm2}
export PYTHONDONTWRITEBYTECODE=1
mkdir -p "$folder"
cd "$folder"
"$python" "$source/src/prep/qshard_tiny.py" tiny --examples 160 >/dev/null
for split in train eval; do
    "$python" "$source/src/prep/qshard_prep.py" --model tiny "tiny/$split.jsonl" -o "tiny/$split.h5" --seq-len 64 >/dev/null
done
for case in tiny2 odd biases gemma3 olmo3; do
    "$python" "$source/tests/oracle/make_inputs.py" "$case" "$case"
done

rm -rf smollm2
if [ -e "$smollm2/config.json" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$python" "$source/tests/oracle/make_inputs.py" smollm2 "$work" --model "$smollm2" --bare
    mkdir smollm2
    mv "$work"/{train,eval}.h5 smollm2/
else
    echo "no SmolLM2 in $smollm2: its token files are not made" >&2
fi
