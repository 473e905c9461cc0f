#!/usr/bin/env python3
"""Checks of a build against transformers, peft and bitsandbytes themselves. Needs torch (setup.sh).

    live.py grads RUN.yaml GRADS.safetensors     every gradient in full, for a step over all of data.train, or over the
                                                 first line of --order FILE
    live.py curve RUN_DIR --order FILE           the losses of RUN_DIR/metrics.jsonl, by RUN_DIR/config.yaml
    live.py nf4parity BASE.h5 HF_DIR             codes and absmax of every linear against bitsandbytes
    live.py peft-load ADAPTER HF_DIR --data EVAL.h5 --logits LOGITS.safetensors
                                                 peft loads ADAPTER over the model as bitsandbytes quantizes it (or has
                                                 it stored); its logits for the first sequence against those of
                                                 `qshard eval --dump-logits`
    live.py merge-load HF_DIR --data EVAL.h5 --logits LOGITS.safetensors
                                                 transformers loads what `qshard merge` wrote; its logits in fp32 against
                                                 those of the adapter over the base
    live.py make-bnb HF_DIR OUT [--plain] [--skip MODULE] [--weights FILE]
                                                 a bitsandbytes NF4 checkpoint, with or without double quantization
The run's lora.init must name an adapter, as nobody else can draw the initial A. Paths in it are relative to the working
directory. Exits 1 where something is further off than it may be.
"""
import argparse
import json
import os
import sys

import numpy as np
import torch
import yaml

from base_reader import Base, read_base
from cases import Settings
from compare import curve_is_near, read_metrics, report_distances, steps_of, verdict
from nf4_reference import BLOCK, bnb_quantize, quantize, quantize_absmax, quantize_blocks, ulps_to_threshold, unpack
from reference_model import Tokens, base_model, gradients, logits_of, read_order, train, with_adapter
from tensors import bf16_bits, is_linear, read_hf, read_safetensors, relative_l2, write_safetensors


# --- gradients and curves ---------------------------------------------------------------------------------------------
def read_run(path):
    """(config, model with the adapter of lora.init, tokens of data.train) of a run's YAML."""
    with open(path, encoding="utf-8") as file:
        config = yaml.safe_load(file)
    if not config["lora"].get("init"):
        raise SystemExit(f"{path}: lora.init is empty; start the run from an adapter")
    model = base_model(*read_base(config["base"]))
    return config, with_adapter(model, config["lora"]["init"]), Tokens(config["data"]["train"])


def settings_of(config):
    """The run's optimizer settings, with the program's defaults for what is not named."""
    optim = {k: v for k, v in config.get("optim", {}).items() if k != "name"}
    numbers = {k: v if k in ("schedule", "betas") else float(v) for k, v in optim.items()}
    return Settings(**{"lr": 2e-4, **numbers}, steps=int(config["train"]["steps"]))


def grads_command(options):
    _, model, tokens = read_run(options.run)
    first = read_order(options.order)[0] if options.order else range(len(tokens))
    loss, theirs = gradients(model, [tokens.sequences[i] for i in first])
    ours = read_safetensors(options.file)
    if sorted(ours) != sorted(theirs):
        raise SystemExit(f"FAIL names differ, for example {sorted(set(ours) ^ set(theirs))[:3]}")
    print(f"     loss of the step {loss:.9f}")
    return report_distances({name: relative_l2(ours[name], theirs[name]) for name in theirs}, options.tol or 1e-4)


def curve_command(options):
    config, model, tokens = read_run(os.path.join(options.run, "config.yaml"))
    order = read_order(options.order)
    steps = steps_of(read_metrics(os.path.join(options.run, "metrics.jsonl")))
    order = order[: options.steps or len(steps)]
    curve = train(model, settings_of(config), tokens, order)
    return curve_is_near(steps[: len(order)], curve, options.tol or 1e-4)


# --- NF4 --------------------------------------------------------------------------------------------------------------
def linear_parity(state, x, dtype):
    """Counts of differences between one NF4 tensor of a base.h5 and bitsandbytes' CPU result for the weight `x`."""
    plain, _ = bnb_quantize(x, False, dtype)
    mine, theirs = unpack(state.packed, x.size), unpack(plain.packed, x.size)
    zero = np.repeat(plain.absmax == 0, BLOCK)[: x.size]
    different = (mine != theirs) & ~zero
    counts = {
        "elements": x.size,
        "blocks": plain.absmax.size,
        "zero_blocks": int((plain.absmax == 0).sum()),
        "zero_blocks_not_0x77": int((mine[zero] != 7).sum()),
        "codes_differ": int(different.sum()),
        "codes_differ_not_tie": int((different & (ulps_to_threshold(x) > 2)).sum()),
    }
    if state.absmax8 is None:
        return {**counts, "absmax_differ": int((state.absmax != plain.absmax).sum())}
    # With double quantization the file has no first-level absmax. Given bitsandbytes' first level, the second is
    # defined by the reference; bitsandbytes' own CPU code for it misses the nearest entry now and then.
    nested, _ = bnb_quantize(x, True, dtype)
    expected, followed = quantize(x), quantize(x, offset=nested.offset)
    wide = np.float64(expected.offset)
    return {
        **counts,
        "absmax_differ": int((expected.absmax != plain.absmax).sum()),
        "offset_differ": int(state.offset != expected.offset),
        "absmax8_differ": int((state.absmax8 != expected.absmax8).sum()),
        "absmax32_differ": int((state.absmax32 != expected.absmax32).sum()),
        "offset_ulps_from_bnb": int(round(abs(wide - nested.offset) / np.spacing(expected.offset))),
        "absmax8_bnb_misses": int((followed.absmax8 != nested.absmax8).sum()),
        "absmax8_bnb_most": int(np.abs(followed.absmax8.astype(int) - nested.absmax8.astype(int)).max()),
        "absmax32_bnb_differ": int((followed.absmax32 != nested.absmax32).sum()),
    }


def nf4parity_command(options):
    """Prints totals over all linears; any difference that is not a tie or bitsandbytes' own fails."""
    base = Base(options.base)
    _, weights = read_hf(options.model)
    names = base.names("nf4")
    linears = [name for name in weights if is_linear(name)]
    if sorted(names) != sorted(linears):
        print(f"FAIL {len(names)} NF4 tensors in the file, {len(linears)} linears in the checkpoint")
        return False
    totals, largest = {}, {"offset_ulps_from_bnb", "absmax8_bnb_most"}
    for name in names:
        state = base.nf4(name)
        counts = linear_parity(state, weights[name], state.dtype)
        for key, value in counts.items():
            totals[key] = max(totals.get(key, 0), value) if key in largest else totals.get(key, 0) + value
        if counts["codes_differ_not_tie"] or counts["absmax_differ"] or counts.get("absmax8_differ"):
            print(f"     {name}: {counts}")
    for name in base.names():
        if name not in names and not np.array_equal(base.read(name), weights[name]):
            print(f"FAIL {name} is not what the checkpoint has")
            totals["others_differ"] = totals.get("others_differ", 0) + 1
    print(f"     {len(names)} linears")
    for key, value in totals.items():
        print(f"     {key:22s} {value}")
    must_be_zero = [
        "zero_blocks_not_0x77", "codes_differ_not_tie", "absmax_differ", "offset_differ", "absmax8_differ",
        "absmax32_differ", "absmax32_bnb_differ", "others_differ",
    ]  # fmt: skip
    return verdict("differences that are no ties", sum(totals.get(key, 0) for key in must_be_zero), 0)


# --- bitsandbytes checkpoints and adapters over them ------------------------------------------------------------------
def bnb_model(model_dir, nested=True, skip=None, quantized=False):
    """The checkpoint with its linears in bitsandbytes' NF4 (quant_state.dtype bf16), still in bf16 otherwise;
    `quantized`: it is stored so."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", *(skip or [])],
    )
    how = {"dtype": torch.bfloat16, "device_map": "cpu", "attn_implementation": "eager"}
    if not quantized:
        how["quantization_config"] = settings
    return AutoModelForCausalLM.from_pretrained(model_dir, **how).eval()


def widen_all_but_nf4(model):
    """Norms, embeddings and biases to fp32; NF4 weights stay packed and decode to bf16 values."""
    import bitsandbytes as bnb

    for parameter in model.parameters():
        if not isinstance(parameter, bnb.nn.Params4bit):
            parameter.data = parameter.data.float()
    model.config.dtype = torch.float32
    return model


def decoded_linears(model):
    """{HF name: float32 W} of a bitsandbytes model, by its plain PyTorch decoder (the AVX-512 one is wrong for
    widths divisible by 16 but not by 64)."""
    import bitsandbytes.functional as functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    weights = {}
    for name, module in nf4_modules(model):
        state = module.weight.quant_state
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        packed, absmax = module.weight.data.reshape(-1), absmax.float()
        decoded = _dequantize_4bit_compute(packed, absmax, state.code, state.blocksize, state.shape, state.dtype)
        weights[name + ".weight"] = decoded.reshape(state.shape).float().numpy()
    return weights


def nf4_modules(model):
    """(name, module) of every bitsandbytes linear."""
    import bitsandbytes as bnb

    return [(name, module) for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]


def nearest_second_level(model, model_dir):
    """Gives the absmax the codes that bitsandbytes' CUDA code finds, the nearest ones; its CPU code misses some."""
    _, weights = read_hf(model_dir)
    for name, module in nf4_modules(model):
        state = module.weight.quant_state
        _, absmax, _ = quantize_blocks(weights[name + ".weight"])
        codes, _ = quantize_absmax(absmax, np.float32(state.offset.item()), state.state2.code.numpy())
        state.absmax.copy_(torch.from_numpy(codes))


def plain_linears(model):
    """Replaces each bitsandbytes linear by an ordinary fp32 one that holds what it decodes to. bitsandbytes' own
    products use another W: its fused operation decodes to the compute type, so with fp32 nothing is rounded to bf16;
    and on a CPU with AVX512-BF16 it rounds the input to bf16 instead."""
    weights = decoded_linears(model)
    for name, module in nf4_modules(model):
        new = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        new.weight.data = torch.from_numpy(weights[name + ".weight"])
        if module.bias is not None:
            new.bias.data = module.bias.data.float()
        model.set_submodule(name, new)


def first_logits(model, data):
    """Logits [tokens, vocab] of the first sequence, document by document."""
    with torch.no_grad():
        return torch.cat([logits_of(model, ids).float() for ids, _ in Tokens(data).sequences[0]]).numpy()


def peft_load_command(options):
    """HF_DIR may be a bitsandbytes checkpoint; else it is quantized here, and the second level put right."""
    ours = read_safetensors(options.logits)["logits"]
    with open(os.path.join(options.model, "config.json"), encoding="utf-8") as file:
        stored = "quantization_config" in json.load(file)

    def distance(fp32_products, nearest):
        model = widen_all_but_nf4(bnb_model(options.model, quantized=stored))
        if nearest:
            nearest_second_level(model, options.model)
        if fp32_products:
            plain_linears(model)
        theirs = first_logits(with_adapter(model, options.adapter), options.data)
        if ours.shape != theirs.shape:
            raise SystemExit(f"FAIL logits have shape {ours.shape}, not {theirs.shape}")
        print(f"     largest difference {np.abs(ours - theirs).max():.3e} of {np.abs(theirs).max():.3f}")
        return relative_l2(ours, theirs)

    if options.all:
        if not stored:
            print(f"     with its CPU code's second level, relative L2: {distance(True, False):.3e}")
        print(f"     and its CPU products, relative L2: {distance(False, False):.3e}")
    reached = distance(True, not stored)
    return verdict("logits of the adapter over bitsandbytes, relative L2", reached, options.tol or 1e-3)


def merge_load_command(options):
    from transformers import AutoModelForCausalLM

    ours = read_safetensors(options.logits)["logits"]
    model, loading = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation="eager",
                                                          output_loading_info=True)
    wrong = {key: sorted(loading[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if loading[key]}
    if wrong:
        raise SystemExit(f"FAIL transformers finds {wrong}")
    theirs = first_logits(model.eval(), options.data)
    return verdict("logits of the merged model in transformers, relative L2", relative_l2(ours, theirs), options.tol or 1e-4)


def make_bnb_command(options):
    model = bnb_model(options.model, nested=not options.plain, skip=options.skip)
    model.save_pretrained(options.out)
    if options.weights:
        weights = decoded_linears(model)
        write_safetensors(options.weights, {name: bf16_bits(weight) for name, weight in weights.items()})
    with open(os.path.join(options.out, "config.json"), encoding="utf-8") as file:
        print(json.dumps(json.load(file)["quantization_config"]))
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name, run, *positional):
        sub = commands.add_parser(name)
        sub.set_defaults(run_command=run)
        for argument in positional:
            sub.add_argument(argument)
        sub.add_argument("--tol", type=float, help="largest relative distance [logits 1e-3, else 1e-4]")
        return sub

    add("grads", grads_command, "run", "file").add_argument("--order")
    curve = add("curve", curve_command, "run")
    curve.add_argument("--order", required=True)
    curve.add_argument("--steps", type=int, help="compare the first STEPS only")
    add("nf4parity", nf4parity_command, "base", "model")
    load = add("peft-load", peft_load_command, "adapter", "model")
    load.add_argument("--data", required=True)
    load.add_argument("--logits", required=True)
    load.add_argument("--all", action="store_true", help="also report what its CPU code gives as it is")
    merged = add("merge-load", merge_load_command, "model")
    merged.add_argument("--data", required=True)
    merged.add_argument("--logits", required=True)
    bnb = add("make-bnb", make_bnb_command, "model", "out")
    bnb.add_argument("--plain", action="store_true", help="without double quantization")
    bnb.add_argument("--skip", action="append", help="leave this module at 16 bits (may be repeated)")
    bnb.add_argument("--weights", help="also write the decoded linears, bf16, to this safetensors file")
    options = parser.parse_args()
    return 0 if options.run_command(options) else 1


if __name__ == "__main__":
    sys.exit(main())
