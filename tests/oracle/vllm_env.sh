#!/usr/bin/env bash
# Fetch what tests/oracle/vllm_check.py needs of vLLM: its Python files and what they import, beside the oracle's torch.
# vLLM's compiled parts, which want a GPU, stay away. About 700 MB.
#
#   tests/oracle/vllm_env.sh DIR        then: PYTHONPATH=DIR build/oracle/bin/python tests/oracle/vllm_check.py ADAPTER MODEL
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 DIR" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
python=${ORACLE_PYTHON:-$here/../../build/oracle/bin/python}
# What the imports of vLLM 0.33.0 ask for on the way to vllm.lora; torch, transformers and numpy are the oracle's.
imported=(aiohappyeyeballs aiohttp aiosignal apache-tvm-ffi attrs cachetools cbor2 certifi cloudpickle einops fastapi frozenlist idna
    llguidance msgspec multidict openai openai-harmony opentelemetry-api opentelemetry-sdk opentelemetry-semantic-conventions
    partial-json-parser pillow prometheus-client propcache py-cpuinfo pybase64 pyzmq requests sniffio starlette typing-extensions urllib3
    uvloop xgrammar yarl)
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$1" vllm==0.33.0 "${imported[@]}"
PYTHONPATH=$1 VLLM_LOGGING_LEVEL=ERROR "$python" -c 'import vllm.lora.lora_model; print("vLLM\u2019s adapter checks can be imported")'
