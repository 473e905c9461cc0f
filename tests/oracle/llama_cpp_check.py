#!/usr/bin/env python3
"""Does llama.cpp's converter take this adapter, and write the same matrices?

    llama_cpp_check.py LLAMA_CPP ADAPTER MODEL

LLAMA_CPP: a checkout, or vendor/llama.cpp of llama-cpp-python's source package on PyPI; ADAPTER: a directory by
`qshard export`; MODEL: the Hugging Face directory of its base. convert_lora_to_gguf.py writes a GGUF file in fp32, which is
read again: A and B must be those of adapter_model.safetensors, and alpha that of the configuration. For the llama
architecture, and Mistral's, the converter puts the rows of q and k in another order (halves of a head's rotation are interleaved); here
the same is done to ours. Prints one line; exit 1 unless it begins with "ok". Runs in the oracle's environment.
"""
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.torch import load_file

NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "self_attn.qkv_proj": "attn_qkv", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
         "mlp.gate_up_proj": "ffn_up"}
ROTATED = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}


def read_json(*path):
    with open(os.path.join(*path), encoding="utf-8") as file:
        return json.load(file)


def expected(adapter, config):
    """GGUF's names and matrices of an adapter."""
    config = config.get("text_config", config)
    for name, tensor in load_file(os.path.join(adapter, "adapter_model.safetensors")).items():
        layer, module = name.replace(".language_model.", ".").removeprefix("base_model.model.model.layers.").split(".", 1)
        module, side, _ = module.rsplit(".", 2)
        matrix = tensor.float().numpy()
        if side == "lora_B" and module in ROTATED and config["model_type"] in ("llama", "mistral"):
            heads = config[ROTATED[module]]
            matrix = matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)
        yield f"blk.{layer}.{NAMES[module]}.weight.{side.lower()}", matrix


def main(llama_cpp, adapter, model):
    sys.path.insert(0, os.path.join(llama_cpp, "gguf-py"))
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "adapter.gguf")
        done = subprocess.run(
            [sys.executable, os.path.join(llama_cpp, "convert_lora_to_gguf.py"), "--base", model, "--outtype", "f32", "--outfile", path,
             adapter], env={**os.environ, "PYTHONPATH": sys.path[0]}, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(f"refused {done.stderr.strip().splitlines()[-1]}")
            return 1
        reader = gguf.GGUFReader(path)
        got = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    want = dict(expected(adapter, read_json(model, "config.json")))
    wrong = [name for name in want if name not in got or not np.array_equal(got[name], want[name])]
    wrong += [name for name in got if name not in want]
    if alpha != read_json(adapter, "adapter_config.json")["lora_alpha"]:
        wrong.append("alpha")
    print(f"wrong {', '.join(wrong[:3])}" if wrong else f"ok {len(want)} matrices")
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__.split("\n")[2].strip())
    sys.exit(main(*map(os.path.abspath, sys.argv[1:])))
