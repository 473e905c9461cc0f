#!/usr/bin/env python3
"""Would vLLM take this adapter? Its own checks of a PEFT directory, run on the CPU.

    vllm_check.py ADAPTER MODEL        ADAPTER: a directory by `qshard export`; MODEL: the Hugging Face directory of its base

vLLM reads adapter_config.json (PEFTHelper), refuses what it does not implement (validate_legal), and loads the weights
with the linears of the model as the names that it expects (LoRAModel.from_local_checkpoint). Then every matrix must be the
one in adapter_model.safetensors, and its scale that of the adapter. Prints one line, "ok ...", "refused ..." or "wrong ...";
exit 1 but for the first. Needs vLLM's Python files and what they import, without its compiled parts: vllm_env.sh.
"""
import json
import math
import os
import sys

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from vllm.config.lora import LoRAConfig  # noqa: E402
from vllm.lora.lora_model import LoRAModel  # noqa: E402
from vllm.lora.peft_helper import PEFTHelper  # noqa: E402


def linears_of(model):
    """Last names of the linears of an architecture, as vLLM collects them from its own model."""
    config = transformers.AutoConfig.from_pretrained(model)
    whole = hasattr(config, "text_config")
    with torch.device("meta"):
        network = (transformers.AutoModelForImageTextToText if whole else transformers.AutoModelForCausalLM).from_config(config)
    return {name.rsplit(".", 1)[-1] for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}


def differences(adapter, loaded, helper):
    """What of the file did not arrive as it is written."""
    with open(os.path.join(adapter, "adapter_config.json"), encoding="utf-8") as file:
        config = json.load(file)
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    if helper.vllm_lora_scaling_factor != config["lora_alpha"] / root:
        yield "the scale"
    tensors = load_file(os.path.join(adapter, "adapter_model.safetensors"))
    for name, tensor in tensors.items():
        module, side, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        layer = loaded.get_lora(module)
        got = None if layer is None else layer.lora_a if side == "lora_A" else layer.lora_b
        if got is None or not torch.equal(got, tensor):
            yield name
    if 2 * len(loaded.loras) != len(tensors):
        yield f"{len(loaded.loras)} modules of {len(tensors)} tensors"


def main(adapter, model):
    try:
        helper = PEFTHelper.from_local_dir(adapter, max_position_embeddings=None)
        helper.validate_legal(LoRAConfig(max_lora_rank=64))
        # "cpu:0": for "cpu" it would pin the memory, which takes a GPU's driver
        loaded = LoRAModel.from_local_checkpoint(adapter, linears_of(model), helper, device="cpu:0")
    except ValueError as error:
        print(f"refused {' '.join(str(error).split())}")
        return 1
    wrong = list(differences(adapter, loaded, helper))
    print(f"wrong {', '.join(wrong[:3])}" if wrong else f"ok {len(loaded.loras)} modules, rank {loaded.rank}")
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__.split("\n")[2].strip())
    sys.exit(main(*sys.argv[1:]))
