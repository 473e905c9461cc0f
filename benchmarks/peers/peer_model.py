"""The peers' step: transformers + peft + bitsandbytes on the CPU, AdamW. One model a process."""
import os
import time

import numpy as np

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

loaded = {}  # "model", "optimizer", and "tokens" by path


def base_model(folder, dtype, checkpointing=False):
    """The 4-bit model of a bf16 or a bitsandbytes checkpoint, all of it but W in `dtype`."""
    import bitsandbytes
    import torch
    from peft import prepare_model_for_kbit_training
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    kind, more = getattr(torch, dtype), {}
    if getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) is None:
        more["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                         bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", attn_implementation="sdpa",
                                                 **more)
    if checkpointing:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(kind)
    for module in model.modules():  # a checkpoint says what it was made for
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = kind, True
    model.config.use_cache = False
    return model


def with_adapter(model, folder):
    """The model with the adapter of `folder`; where there is none yet, a fresh one (rank 16, all linears), saved there."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    if not os.path.exists(os.path.join(folder, "adapter_config.json")):
        torch.manual_seed(1)
        config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        model.save_pretrained(folder)
        return model
    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def load(request):
    """{"model", "adapter", "dtype", "recompute", "compiled"}: makes the model that `step` trains."""
    import torch

    loaded.clear()
    model = base_model(request["model"], request["dtype"], request["recompute"] == "full")
    model = with_adapter(model, request["adapter"]).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    loaded["optimizer"] = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    loaded["model"] = torch.compile(model, dynamic=False) if request.get("compiled") else model
    return {}


def sequence_of(path, length, number):
    """Tokens [1, length] of a token file of sequences of equal length."""
    import h5py
    import torch

    if path not in loaded:
        with h5py.File(path, "r") as file:
            loaded[path] = torch.from_numpy(file["tokens"][()].astype(np.int64)).view(-1, length)
    return loaded[path][number][None]


def step(request):
    """{"data", "length", "sequence"}: forward, backward, optimizer -> {"loss", "seconds"}."""
    ids = sequence_of(request["data"], request["length"], request["sequence"])
    begin = time.perf_counter()
    loss = loaded["model"](input_ids=ids, labels=ids).loss
    loss.backward()
    loaded["optimizer"].step()
    loaded["optimizer"].zero_grad(set_to_none=True)
    return {"seconds": time.perf_counter() - begin, "loss": loss.item()}
