#!/usr/bin/env python3
"""Perplexity of a Hugging Face model directory on plain English, by transformers in fp32.

    check_perplexity.py HF_DIR

A wrong row order of q and k, a wrong RoPE base or a wrong tokenizer gives thousands; SmolLM2-135M-Instruct out of its
Q4_1 GGUF gives 17. Exits 1 above 30.
"""
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ENGLISH = (
    "The history of the steam engine begins long before the industrial revolution. In the first century, Hero of "
    "Alexandria described a device that used steam to turn a ball, although nobody knows whether it was ever used for "
    "practical work. It was not until the late seventeenth century that inventors began to build machines which could "
    "pump water out of mines. Thomas Newcomen built the first successful engine in 1712. It burned a great deal of "
    "coal, but because it stood at the mine itself, fuel was cheap. James Watt later noticed that most of the heat was "
    "wasted in warming the cylinder again after each stroke, and he added a separate condenser, which made the engine "
    "far more efficient. The new machines soon drove mills, ships and railways, and they changed the way people lived "
    "and worked."
)


def main(model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    ids = tokenizer(ENGLISH, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    print(f"{model_dir}: {ids.shape[1]} tokens, loss {loss.item():.6f}, perplexity {loss.exp().item():.2f}")
    return 0 if loss.exp().item() < 30 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
