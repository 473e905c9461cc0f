"""Adapters whose linears peft was told in every way that it takes, for `qshard eval --adapter` and `lora.init`.

    peft_forms.py QSHARD [CASE]        in the oracle's environment; CASE of cases.py, tiny2 by default

Each is made by peft over the case's model with B not zero, read by qshard, and its logits are compared with those of the
same adapter in peft (live.py peft-load). Those that qshard cannot hold must be refused by name. Exit 1 if one is not as said.
"""
import os
import re
import subprocess
import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))

FORMS = {  # name: settings of LoraConfig, and what the refusal says
    "list": ({"target_modules": ["q_proj", "v_proj"]}, None),
    "pattern": ({"target_modules": r".*self_attn\.(q|v)_proj"}, None),
    "all_linear": ({"target_modules": "all-linear"}, None),  # full names, on a model with few modules
    "full_names": ({"target_modules": [f"model.layers.{i}.mlp.up_proj" for i in range(64)]}, None),
    "exclude_list": ({"target_modules": "all-linear", "exclude_modules": ["k_proj", "o_proj"]}, None),
    "exclude_pattern": ({"target_modules": ["q_proj", "down_proj", "up_proj"], "exclude_modules": r".*\.up_proj"}, None),
    "dora": ({"target_modules": r".*_proj", "use_dora": True}, None),
    "differ": ({"target_modules": r".*layers\.1\..*q_proj|.*v_proj"}, "layer 0 has no adapter of self_attn.q_proj"),
    "one_layer": ({"target_modules": r".*layers\.0\..*_proj"}, "layers.1.*is missing"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.*belongs to no linear of a layer"),
    "ranks": ({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 4}}, "rank_pattern is set"),
}


def make(model_dir, target, settings):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    model.save_pretrained(target)


def run(*arguments):
    return subprocess.run(list(map(str, arguments)), capture_output=True, text=True)


def main():
    qshard, case = os.path.realpath(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "tiny2"
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for command in ((sys.executable, os.path.join(HERE, "make_inputs.py"), case, "."),
                        (qshard, "quantize", "model", "-o", "base.h5", "--head-chunk-rows", "128")):
            done = run(*command)
            if done.returncode != 0:
                sys.exit(done.stdout + done.stderr)
        for name, (settings, refusal) in FORMS.items():
            make("model", name, settings)
            done = run(qshard, "eval", "run.yaml", "--set", "base=base.h5", "--adapter", name, "--dump-logits", f"{name}.logits")
            if refusal is not None:
                good = done.returncode == 3 and re.search(refusal, done.stderr) is not None
                says = done.stderr.strip().splitlines()[-1]
            elif done.returncode != 0:
                good, says = False, done.stderr.strip().splitlines()[-1]
            else:
                data = run(sys.executable, os.path.join(HERE, "live.py"), "peft-load", name, "model", "--data", "eval.h5", "--logits",
                           f"{name}.logits")
                good, says = data.returncode == 0, (data.stdout or data.stderr).strip().splitlines()[-1]
            wrong += not good
            print(f"{name:16} {'ok' if good else 'WRONG'}  {says}", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
