#!/usr/bin/env python3
"""transformers + peft (+ bitsandbytes) at the shape and lengths of stage bench, on the same card: stage peer of tests/gpu.sh.

    peer.py [--step STEP.csv] [--small] [--tokens T]... [--seconds S]

LoRA of rank 16 on the seven linears of Llama-3-8B's shape with made-up weights, one sequence a step, AdamW on the adapter,
PyTorch's own attention, gradient checkpointing on and off. The base is NF4 with double quantization where bitsandbytes is
there, else plain bf16, and the table says which. STEP.csv is what stage bench measured for qshard; the last column is the
ratio of the best mode of each side at that length.
"""
import argparse
import csv
import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from make_model import SHAPES

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = {False: (512, 4096, 16384), True: (24,)}
WARM, STEPS = 2, 5


def quantized_linear(bnb, linear, device):
    """The linear as bitsandbytes holds it; `to` quantizes."""
    out = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16,
                            compress_statistics=True, quant_type="nf4", device="meta")
    out.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
    return out.to(device)


def quantize_layers(model, device):
    """Replaces the linears of all layers by 4-bit ones; False if bitsandbytes is not here."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return False
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(block, name, quantized_linear(bnb, child, device))
    model.is_loaded_in_4bit = True  # how peft knows
    return True


def make_model(small, device):
    shape = {key: value for key, value in SHAPES["small" if small else "llama"].items()}
    config = LlamaConfig(**shape, max_position_embeddings=16384, rms_norm_eps=1e-5, tie_word_embeddings=False,
                         use_cache=False)
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    in_4bit = quantize_layers(model, device)
    model.requires_grad_(False)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora), in_4bit, shape["vocab_size"]


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def one_step(model, optimizer, ids):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def time_steps(model, optimizer, vocab, length, device):
    """Median seconds of a step, and the peak of allocated memory in GiB."""
    times = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(WARM + STEPS):
        ids = torch.randint(0, vocab, (1, length), device=device)
        synchronize(device)
        start = time.perf_counter()
        loss = one_step(model, optimizer, ids)
        synchronize(device)
        times.append(time.perf_counter() - start)
        if not torch.isfinite(loss):
            raise RuntimeError(f"loss {loss.item()} in step {step}")
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    return statistics.median(times[WARM:]), peak


def best_of_ours(path):
    """{tokens: (tokens/s, mode)} of stage bench."""
    best = {}
    try:
        with open(path, encoding="utf-8") as file:
            for row in csv.DictReader(file):
                best.setdefault(int(row["tokens"]), []).append((float(row["tokens_per_s"]), row["recompute"]))
    except (OSError, TypeError):
        return {}
    return {tokens: max(rows) for tokens, rows in best.items()}


def set_checkpointing(model, on):
    if on:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def measure(options, device):
    model, in_4bit, vocab = make_model(options.small, device)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    base = "NF4 by bitsandbytes" if in_4bit else "bf16: no bitsandbytes here, so no decoding"
    print(f"torch {torch.__version__}, base in {base}, on {torch.cuda.get_device_name() if device == 'cuda' else 'a CPU'}")
    print()
    print("| T | checkpointing | tokens/s | ms a step | peak GiB | |")
    print("|---|---|---|---|---|---|")
    started, best = time.monotonic(), {}
    for length in options.tokens or LENGTHS[options.small]:
        for checkpointing in (False, True):
            name = "on" if checkpointing else "off"
            if time.monotonic() - started > options.seconds:
                print(f"| {length} | {name} | | | | not run: no time left |", flush=True)
                continue
            set_checkpointing(model, checkpointing)
            try:
                seconds, peak = time_steps(model, optimizer, vocab, length, device)
            except torch.OutOfMemoryError:
                optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                print(f"| {length} | {name} | | | | does not fit |", flush=True)
                continue
            best[length] = max(best.get(length, 0.0), length / seconds)
            print(f"| {length} | {name} | {length / seconds:.0f} | {seconds * 1e3:.1f} | {peak:.2f} | |", flush=True)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--step", help="what stage bench measured")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--tokens", type=int, action="append", help="lengths T, instead of the usual ones")
    parser.add_argument("--seconds", type=float, default=400.0, help="start no case after this long")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        print("not run: torch sees no GPU")
        return 77
    theirs, ours = measure(options, device), best_of_ours(options.step)
    print()
    print("| T | qshard, best mode | peer, best mode | ratio |")
    print("|---|---|---|---|")
    for length, rate in theirs.items():
        if length in ours:
            print(f"| {length} | {ours[length][0]:.0f} tokens/s ({ours[length][1]}) | {rate:.0f} tokens/s | "
                  f"{ours[length][0] / rate:.2f} |")
        else:
            print(f"| {length} | not measured: stage bench | {rate:.0f} tokens/s | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
