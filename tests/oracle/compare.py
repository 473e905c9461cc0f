#!/usr/bin/env python3
"""Compares what the C program wrote with golden values. numpy and h5py only; exits 1 where something is too far off.

    compare.py grads CASE GRADS.safetensors    `qshard train --dump-grads`: every LoRA gradient, relative L2
    compare.py loss CASE METRICS.jsonl         the loss of the first step
    compare.py curve CASE METRICS.jsonl        loss, learning rate and gradient norm of every step
    compare.py eval CASE VALUE|METRICS.jsonl   the evaluation loss before the first step (--after: after the last)
    compare.py bytes A B                       two safetensors files hold the same names and the same bytes
    compare.py base BASE.h5 HF_DIR             every byte of a quantized base against nf4_reference.py
    compare.py weights BASE.h5 W.safetensors   the weights of a base against given ones, bit for bit
"""
import argparse
import json
import math
import os
import sys

import numpy as np

from tensors import is_linear, read_hf, read_safetensors, relative_l2

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "golden")
DEFAULT_TOLERANCE = {"grads": 1e-4, "loss": 1e-6, "curve": 1e-4, "eval": 1e-6}


def read_golden(folder, case):
    with open(os.path.join(folder, case + ".json"), encoding="utf-8") as file:
        return json.load(file)


def read_metrics(path):
    """The lines of a metrics.jsonl."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def relative(ours, theirs):
    """|ours - theirs| / |theirs|; anything that is not a number counts as infinitely far."""
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        return math.inf
    return abs(ours - theirs) / max(abs(theirs), 1e-300)


def verdict(what, distance, tolerance):
    good = distance <= tolerance
    print(f"{'ok  ' if good else 'FAIL'} {what}: {distance:.3e} (at most {tolerance:.1e})")
    return good


def sampled_distance(ours, norm, some):
    """The larger of the relative distances of the norm and of the entries that the golden file holds."""
    positions = (np.arange(some.size, dtype=np.int64) * ours.size) // some.size
    norm_distance = relative(float(np.linalg.norm(ours.astype(np.float64))), float(norm))
    return max(norm_distance, relative_l2(ours.reshape(-1)[positions], some))


def gradient_distances(ours, golden):
    """{name: relative L2} against whole gradients, or against the samples of a large model's."""
    sampled = "names" in golden
    names = [name.decode() for name in golden["names"]] if sampled else sorted(golden)
    if sorted(ours) != names:
        missing, extra = sorted(set(names) - set(ours)), sorted(set(ours) - set(names))
        raise SystemExit(f"FAIL names differ: missing {missing[:3]}, unknown {extra[:3]}")
    if sampled:
        rows = zip(names, golden["norms"], golden["some"])
        return {name: sampled_distance(ours[name], norm, some) for name, norm, some in rows}
    for name in names:
        if ours[name].shape != golden[name].shape:
            raise SystemExit(f"FAIL {name} has shape {ours[name].shape}, not {golden[name].shape}")
    return {name: relative_l2(ours[name], golden[name]) for name in names}


def report_distances(distances, tolerance):
    """Prints the worst gradients; True if all are near enough."""
    order = sorted(distances, key=lambda name: -distances[name])
    for name in order[:5]:
        print(f"     {distances[name]:.3e}  {name}")
    print(f"     median {np.median(list(distances.values())):.3e} of {len(order)} gradients")
    return verdict("worst gradient, relative L2", distances[order[0]], tolerance)


def compare_grads(options):
    with np.load(os.path.join(options.golden, options.case + ".npz")) as file:
        golden = {name: file[name] for name in file.files}
    return report_distances(gradient_distances(read_safetensors(options.file), golden), options.tol)


def steps_of(metrics):
    return [line for line in metrics if "loss" in line]


def compare_loss(options):
    golden, steps = read_golden(options.golden, options.case), steps_of(read_metrics(options.file))
    if not steps:
        raise SystemExit(f"FAIL {options.file}: no line has a loss")
    print(f"     {steps[0]['loss']:.9f}, golden {golden['first_loss']:.9f}")
    return verdict("first loss, relative", relative(steps[0]["loss"], golden["first_loss"]), options.tol)


def curve_is_near(steps, curve, tolerance):
    """Loss, rate and norm of each step; a curve that ends early is a failure."""
    if len(steps) != len(curve):
        raise SystemExit(f"FAIL {len(steps)} steps, not {len(curve)}")
    good = True
    for key, limit in (("lr", 1e-9), ("loss", tolerance), ("grad_norm", 10 * tolerance)):
        distances = [relative(mine[key], theirs[key]) for mine, theirs in zip(steps, curve)]
        worst = int(np.argmax(distances))
        good &= verdict(f"{key} of {len(curve)} steps, worst at the {worst + 1}.", distances[worst], limit)
    print(f"     last loss {steps[-1]['loss']:.9f}, golden {curve[-1]['loss']:.9f}")
    return good


def compare_curve(options):
    golden = read_golden(options.golden, options.case)
    return curve_is_near(steps_of(read_metrics(options.file)), golden["curve"], options.tol)


def compare_eval(options):
    golden = read_golden(options.golden, options.case)["eval_loss_after" if options.after else "eval_loss_before"]
    if os.path.exists(options.file):
        lines = [line for line in read_metrics(options.file) if "eval_loss" in line]
        value = lines[-1 if options.after else 0]["eval_loss"]
    else:
        value = float(options.file)
    print(f"     {value:.9f}, golden {golden:.9f}")
    return verdict("evaluation loss, relative", relative(value, golden), options.tol)


def compare_bytes(options):
    first, second = (read_safetensors(path, raw=True) for path in (options.case, options.file))
    if sorted(first) != sorted(second):
        raise SystemExit("FAIL the names differ")
    content = [{n: (dtype, a.shape, a.tobytes()) for n, (dtype, a) in tensors.items()} for tensors in (first, second)]
    wrong = [name for name in first if content[0][name] != content[1][name]]
    print(f"{'FAIL' if wrong else 'ok  '} {len(wrong)} of {len(first)} tensors differ {wrong[:3]}")
    return not wrong


def bits(array):
    """The array as comparable bytes; -0 and +0 differ, as do NaNs."""
    return np.ascontiguousarray(array).tobytes()


def compare_base(options):
    """Packed codes, both levels of absmax and the offset of every linear; everything else as the checkpoint has it."""
    from base_reader import Base
    from nf4_reference import quantize

    base, (_, weights), wrong, quantized = Base(options.case), read_hf(options.file), [], 0
    if sorted(base.tensors) != sorted(weights):
        raise SystemExit(f"FAIL names differ, for example {sorted(set(base.tensors) ^ set(weights))[:3]}")
    nested = base.index["nested"]
    fields = ["packed", *(["offset", "absmax8", "absmax32", "map"] if nested else ["absmax"])]
    for name, weight in weights.items():
        if not is_linear(name):
            wrong += [] if bits(base.read(name)) == bits(weight) else [name]
            continue
        ours, expected = base.nf4(name), quantize(weight, nested)
        wrong += [f"{name} {f}" for f in fields if bits(getattr(ours, f)) != bits(getattr(expected, f))]
        quantized += 1
    print(f"{'FAIL' if wrong else 'ok  '} {quantized} linears of {len(weights)} tensors, differences: {wrong[:5]}")
    return not wrong


def compare_weights(options):
    """The tensors named in the second file, dequantized, widened, bit for bit."""
    from base_reader import Base

    base, expected = Base(options.case), read_safetensors(options.file)
    wrong = [name for name, weight in expected.items() if bits(base.read(name)) != bits(weight)]
    print(f"{'FAIL' if wrong else 'ok  '} {len(wrong)} of {len(expected)} weights differ {wrong[:3]}")
    return not wrong


COMMANDS = {
    "grads": compare_grads,
    "loss": compare_loss,
    "curve": compare_curve,
    "eval": compare_eval,
    "bytes": compare_bytes,
    "base": compare_base,
    "weights": compare_weights,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("case", help="name of the case, or the first file")
    parser.add_argument("file", help="what to compare")
    parser.add_argument("--tol", type=float, help=f"largest relative distance {DEFAULT_TOLERANCE}")
    parser.add_argument("--golden", default=GOLDEN, help="folder of the golden files [tests/golden]")
    parser.add_argument("--after", action="store_true", help="eval: after the last step")
    options = parser.parse_args(argv)
    if options.tol is None:
        options.tol = DEFAULT_TOLERANCE.get(options.command, 0.0)
        if options.command == "eval" and options.after:
            options.tol = DEFAULT_TOLERANCE["curve"]
    return 0 if COMMANDS[options.command](options) else 1


if __name__ == "__main__":
    sys.exit(main())
