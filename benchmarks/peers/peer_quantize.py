"""The peers' quantization of a checkpoint on the CPU: a lean loop over its tensors, and transformers' own way."""
import os
import time


def linear(name):
    return name.endswith("_proj.weight") and ".layers." in name


def lean(request):
    """{"model", "out"}: a tensor at a time from the file into NF4, all of it then into one file -> seconds of the parts."""
    import bitsandbytes.functional as bnb
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    begin, inside, done = time.perf_counter(), 0.0, {}
    with safe_open(os.path.join(request["model"], "model.safetensors"), framework="pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            if not linear(name):
                done[name] = tensor
                continue
            at = time.perf_counter()
            packed, state = bnb.quantize_4bit(tensor, blocksize=64, compress_statistics=True, quant_type="nf4")
            inside += time.perf_counter() - at
            done[name] = packed
            done.update({f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()
                         if isinstance(value, torch.Tensor)})
    save_file(done, request["out"])
    return {"seconds": time.perf_counter() - begin, "quantize_s": inside, "bytes": os.path.getsize(request["out"])}


def transformers_way(request):
    """{"model", "out"}: from_pretrained(load_in_4bit) and save_pretrained, as most users do."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    begin = time.perf_counter()
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(request["model"], quantization_config=config, dtype=torch.bfloat16,
                                                 device_map="cpu")
    model.save_pretrained(request["out"])
    return {"seconds": time.perf_counter() - begin}
