"""Models of text and images whose text part is that of a case: quantize and the adapters of their text part, live.

    text_part.py QSHARD [CASE...]        in the oracle's environment; CASE: gemma3, mistral [both]

transformers makes a Gemma3ForConditionalGeneration or Mistral3ForConditionalGeneration with a tiny vision tower around the case's
model, saved under the names of the Hub and under those of its modules. Then, for both: base.h5 has the same weights as that
of the text model, gradients and loss are the same bits; the exported adapter, loaded by peft over the whole model, gives our logits, and
what merge writes gives them as a model of text alone; adapters by peft, under today's names and older ones, are read. Exit 1 if one is
not as said. With VLLM_SITE and LLAMA_CPP, as for interop.sh, vLLM's check of the exported adapter and llama.cpp's converter, too.
"""
import json
import os
import re
import subprocess
import sys
import tempfile

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig, Gemma3Config,
                          Gemma3ForConditionalGeneration, Mistral3Config, Mistral3ForConditionalGeneration, PixtralVisionConfig,
                          SiglipVisionConfig)

from base_reader import Base, read_base
from live import first_logits
from tensors import read_safetensors, relative_l2

HERE = os.path.dirname(os.path.abspath(__file__))
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
WRAPPERS = {  # case: class, its config with a vision tower
    "gemma3": (Gemma3ForConditionalGeneration,
               lambda text: Gemma3Config(text_config=text, vision_config=SiglipVisionConfig(vision_use_head=False, **VISION),
                                         mm_tokens_per_image=4, image_token_index=text.vocab_size - 1,
                                         tie_word_embeddings=text.tie_word_embeddings)),
    "mistral": (Mistral3ForConditionalGeneration,
                lambda text: Mistral3Config(text_config=text, vision_config=PixtralVisionConfig(head_dim=16, **VISION),
                                            image_token_index=text.vocab_size - 1,
                                            tie_word_embeddings=text.tie_word_embeddings)),
}
SPELLINGS = {"hub": True, "modules": False}  # what save_pretrained is told of save_original_format
failed = 0


def check(name, good, says=""):
    global failed
    failed += not good
    print(f"{'ok' if good else 'WRONG':6} {name}{': ' if says else ''}{says}", flush=True)


def run(*arguments):
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{arguments}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def wrap(case, spellings):
    """Saves the whole model once per spelling."""
    text = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16)
    model_class, config = WRAPPERS[case]
    torch.manual_seed(5)
    whole = model_class(config(text.config)).to(torch.bfloat16)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    if not text.config.tie_word_embeddings:
        whole.lm_head.load_state_dict(text.lm_head.state_dict())
    for name, original in spellings.items():
        whole.save_pretrained(name, save_original_format=original)
    shorten("hub/config.json", type(text.config)().to_dict())


def shorten(path, defaults):
    """As on the Hub: text_config holds what is not the default of its class, and nothing says whether the head is tied."""
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    del config["tie_word_embeddings"]
    text = config["text_config"]
    config["text_config"] = {key: value for key, value in text.items() if key == "model_type"
                             or key not in ("architectures", "dtype", "tie_word_embeddings") and value != defaults.get(key)}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)


def plain(tensors):
    return {name.replace(".language_model.", "."): value for name, value in tensors.items()}


def same(a, b):
    return sorted(a) == sorted(b) and all(np.array_equal(a[name], b[name]) for name in a)


def whole_model(folder, base):
    """The whole model in fp32, its text part with the weights of base.h5."""
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                                 output_loading_info=True)
    _, weights = read_base(base)
    state = {re.sub("^model\\.", "model.language_model.", name): torch.from_numpy(np.array(w)) for name, w in weights.items()}
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected or loading["missing_keys"] or loading["unexpected_keys"]:
        sys.exit(f"{folder}: {unexpected} {loading}")
    return model.eval()


def adapters_of_peft(folder, base):
    """Logits of an adapter that peft made over the whole model, and where it is: under today's names and under older ones."""
    torch.manual_seed(7)
    settings = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)")
    model = get_peft_model(whole_model(folder, base), settings)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    model.save_pretrained("peft")
    tensors = load_file("peft/adapter_model.safetensors")
    os.makedirs("peft_old", exist_ok=True)
    save_file({name.replace("model.model.language_model.", "model.language_model.model."): value for name, value in tensors.items()},
              "peft_old/adapter_model.safetensors")
    with open("peft/adapter_config.json", encoding="utf-8") as file, open("peft_old/adapter_config.json", "w", encoding="utf-8") as old:
        old.write(file.read())
    return first_logits(model.eval(), "eval.h5")


def check_bitsandbytes(qshard, case):
    """The whole model as bitsandbytes quantizes it, its vision tower, too, against the text model so quantized."""
    how = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                                     llm_int8_skip_modules=["lm_head"]),
           "dtype": torch.bfloat16, "device_map": "cpu"}
    for auto, folder in ((AutoModelForCausalLM, "model"), (AutoModelForImageTextToText, "hub")):
        auto.from_pretrained(folder, **how).save_pretrained(f"{folder}.bnb")
        run(qshard, "quantize", f"{folder}.bnb", "-o", f"{folder}.bnb.h5", "--head-chunk-rows", 128)
    vision = [name for name in load_file("hub.bnb/model.safetensors") if "vision" in name and "quant_state" in name]
    text, part = Base("model.bnb.h5").index, Base("hub.bnb.h5").index
    check(f"{case}, from bitsandbytes", part["hashes_sha256"] == text["hashes_sha256"] and part["units"] == text["units"] and vision != [],
          f"{len(vision)} linears of the vision tower left out")


def check_logits(name, ours, theirs, most):
    distance = relative_l2(read_safetensors(ours)["logits"], theirs)
    check(name, distance <= most, f"relative L2 {distance:.1e} (at most {most:g})")


def check_others(where, adapter, model):
    for variable, script, first in (("VLLM_SITE", "vllm_check.py", ()), ("LLAMA_CPP", "llama_cpp_check.py", (os.environ.get("LLAMA_CPP"),))):
        if variable in os.environ:
            environment = {**os.environ, **({"PYTHONPATH": os.environ[variable]} if variable == "VLLM_SITE" else {})}
            done = subprocess.run([sys.executable, os.path.join(HERE, script), *first, adapter, model], env=environment,
                                  capture_output=True, text=True)
            check(f"{where}: exported, {script}", done.stdout.startswith("ok"), (done.stdout or done.stderr).strip().splitlines()[-1])


def check_case(qshard, case):
    run(sys.executable, os.path.join(HERE, "make_inputs.py"), case, ".")
    run(qshard, "quantize", "model", "-o", "base.h5", "--head-chunk-rows", 128)
    run(qshard, "train", "run.yaml", "--set", "base=base.h5", "--dump-grads", "grads.safetensors")
    wrap(case, SPELLINGS)
    check_bitsandbytes(qshard, case)
    text, grads = Base("base.h5"), read_safetensors("grads.safetensors")
    for spelling in SPELLINGS:
        base, where = f"{spelling}.h5", f"{case}, names of the {spelling}"
        names = {name.split(".layers.")[0] for name in load_file(f"{spelling}/model.safetensors")}
        check(f"{where}: are those", ("language_model.model" in names) == (spelling == "hub"))
        said = run(qshard, "quantize", spelling, "-o", base, "--head-chunk-rows", 128)
        part = Base(base)
        check(f"{where}: quantized", part.index["hashes_sha256"] == text.index["hashes_sha256"]
              and part.index["units"] == text.index["units"], said.strip())
        settings = ("--set", f"base={base}")
        run(qshard, "train", "run.yaml", *settings, "--dump-grads", f"{spelling}.grads")
        check(f"{where}: gradients", same(plain(read_safetensors(f"{spelling}.grads")), grads))
        run(qshard, "train", "run.yaml", *settings, "--set", "train.steps=20", "--set", f"output={spelling}.run")
        run(qshard, "export", f"{spelling}.run", "-o", f"{spelling}.adapter")
        run(qshard, "eval", "run.yaml", *settings, "--adapter", f"{spelling}.run", "--dump-logits", f"{spelling}.logits")
        model = PeftModel.from_pretrained(whole_model(spelling, base), f"{spelling}.adapter").eval()
        adapted = {name.split(".lora_A")[0] for name, _ in model.named_modules() if ".lora_A." in name}
        check(f"{where}: peft adapts", 2 * len(adapted) == len(grads) and all(".language_model." in name for name in adapted), str(len(adapted)))
        check_logits(f"{where}: exported, in peft", f"{spelling}.logits", first_logits(model, "eval.h5"), 1e-4)
        check_others(where, f"{spelling}.adapter", "modules")  # llama.cpp asks for more than defaults of a Mistral
        for name, options in (("merged", ()), ("over", ("--original", spelling))):
            run(qshard, "merge", f"{spelling}.run", "-o", f"{spelling}.{name}", "--dtype", "f32", *options)
        merged, loading = AutoModelForCausalLM.from_pretrained(f"{spelling}.merged", dtype=torch.float32, attn_implementation="eager",
                                                               output_loading_info=True)
        check(f"{where}: merged is a model of text", "ForCausalLM" in type(merged).__name__ and not loading["missing_keys"]
              and not loading["unexpected_keys"], type(merged).__name__)
        check_logits(f"{where}: merged", f"{spelling}.logits", first_logits(merged.eval(), "eval.h5"), 1e-4)
        over = read_safetensors(f"{spelling}.over/model.safetensors")
        check(f"{where}: merged over the original", sorted(over) == sorted(read_safetensors(f"{spelling}.merged/model.safetensors")))
        theirs = adapters_of_peft(spelling, base)
        for adapter in ("peft", "peft_old"):
            run(qshard, "eval", "run.yaml", *settings, "--adapter", adapter, "--dump-logits", "read.logits")
            check_logits(f"{where}: {adapter}, read", "read.logits", theirs, 1e-4)
            run(qshard, "eval", "run.yaml", "--set", "base=base.h5", "--adapter", adapter, "--dump-logits", "plain.logits")
            check(f"{where}: {adapter}, over the text model", same(read_safetensors("plain.logits"), read_safetensors("read.logits")))


def main():
    qshard = os.path.realpath(sys.argv[1])
    for case in sys.argv[2:] or WRAPPERS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            check_case(qshard, case)
            os.chdir("/")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
