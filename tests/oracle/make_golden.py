#!/usr/bin/env python3
"""Computes the golden values of the oracle's cases with transformers and peft: tests/golden/CASE.json and CASE.npz.

    make_golden.py CASE... [--model HF_DIR] [--base BASE.h5] [--out DIR] [--work DIR]

With dropout the masks, and with them the order of samples, are the program's own (counter_random.py).
W is what the C program computes with, NF4 rounded to bf16, then fp32: from nf4_reference.py, or from a base.h5. A
case's step takes its whole training set, so the values hold for any order of samples.
"""
import argparse
import hashlib
import json
import os
import sys
import tempfile

import numpy as np

from base_reader import read_base
from cases import CASES
from make_inputs import RUN_SEED, make_inputs
from nf4_reference import dequantize, quantize
from reference_model import (
    Tokens, add_dropout, base_model, gradients, program_order, remove_dropout, step_loss, train, versions, with_adapter,
)
from tensors import is_linear, read_hf

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "golden")
SAMPLES = 64  # entries kept of each gradient of a large model


def dequantized(model_dir):
    """(config, weights) of a checkpoint whose linears went through NF4."""
    config, weights = read_hf(model_dir)
    return config, {n: dequantize(quantize(w)) if is_linear(n) else w for n, w in weights.items()}


def sample_positions(count):
    """The flat positions that are kept of a large gradient."""
    return (np.arange(SAMPLES, dtype=np.int64) * count) // SAMPLES


def pack_gradients(grads, whole):
    """Arrays for the .npz: whole gradients by name, or `names`, `norms` [n] and `some` [n, SAMPLES] of the entries."""
    if whole:
        return {name: grad.astype(np.float32) for name, grad in grads.items()}
    names = sorted(grads)
    flat = [grads[name].reshape(-1) for name in names]
    return {
        "names": np.array([name.encode() for name in names]),
        "norms": np.array([np.linalg.norm(grad.astype(np.float64)) for grad in flat]),
        "some": np.array([grad[sample_positions(grad.size)] for grad in flat], dtype=np.float32),
    }


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def make_golden(case, model_dir, base, inputs, out):
    model_dir = make_inputs(case.name, inputs, model_dir)
    config, weights = read_base(base) if base else dequantized(model_dir)
    model = with_adapter(base_model(config, weights), os.path.join(inputs, "adapter"))
    tokens, held_out = Tokens(os.path.join(inputs, "train.h5")), Tokens(os.path.join(inputs, "eval.h5"))
    eval_before = step_loss(model, held_out.sequences, backward=False)
    place, order = None, [range(len(tokens))] * case.settings.steps
    if case.dropout > 0:  # masks go by the place in the step
        place = add_dropout(model, case.dropout, RUN_SEED)
        order = program_order(RUN_SEED, len(tokens), case.settings.steps, len(tokens))
    first_loss, grads = gradients(model, [tokens.sequences[i] for i in order[0]], place)
    curve = train(model, case.settings, tokens, order, place)
    remove_dropout(model)
    golden = {
        "case": case.name,
        "made_with": versions(),
        "model_sha256": sha256_of(os.path.join(model_dir, "model.safetensors")),
        "targets": int(tokens.seq_targets.sum()),
        "first_loss": first_loss,
        "eval_loss_before": eval_before,
        "eval_loss_after": step_loss(model, held_out.sequences, backward=False),
        "curve": curve,
    }
    assert golden["curve"][0]["loss"] == first_loss
    with open(os.path.join(out, case.name + ".json"), "w", encoding="utf-8") as file:
        json.dump(golden, file, indent=1)
        file.write("\n")
    np.savez_compressed(
        os.path.join(out, case.name + ".npz"), **pack_gradients(grads, whole=case.model is not None)
    )
    print(
        f"{case.name}: first loss {first_loss:.6f}, last {curve[-1]['loss']:.6f}, "
        f"eval {eval_before:.6f} -> {golden['eval_loss_after']:.6f}, gradient norm {curve[0]['grad_norm']:.4g}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("cases", nargs="+", choices=sorted(CASES))
    parser.add_argument("--model", help="checkpoint directory, for smollm2")
    parser.add_argument("--base", help="take W from this base.h5 (then one case only)")
    parser.add_argument("--out", default=GOLDEN, help="where the golden files go [tests/golden]")
    parser.add_argument("--work", help="where the inputs go [a temporary folder]")
    options = parser.parse_args()
    if options.base and len(options.cases) != 1:
        parser.error("--base goes with one case")
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.cases:
            inputs = os.path.join(options.work or temporary, name)
            make_golden(CASES[name], options.model, options.base, inputs, options.out)


if __name__ == "__main__":
    sys.exit(main())
