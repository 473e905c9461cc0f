#!/usr/bin/env python3
"""Times whole steps of `qshard train` at Llama-3-8B's shape: stage bench of tests/gpu.sh.

    bench_step.py WORK --base BASE.h5 --build DIR --csv STEP.csv --ops OPS.csv --log FILE [--small] [--tokens T]...

A run a row: tokens of the one sequence of a step, recompute mode (+decoded: with the layers that fit decoded; +bf16: with the residual
stream in bf16), tokens/s (median of the steps behind the first two), share of the large matrix product that bench_ops measured, planned
and reached device memory. Standard library alone.
"""
import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys

from make_model import config_of, linears_of

RANK, STEPS, WARM = 16, 7, 2
LONG, LONG_STEPS = 16384, 5  # long steps are few and even
LENGTHS = {False: (512, 4096, 16384), True: (24,)}
# recompute; with memory.keep_decoded: auto, without train.residual_fp32
MODES = ("none", "none+bf16", "none+decoded", "none+decoded+bf16", "selective", "full", "full+bf16")
TOTAL = re.compile(r"^device memory of rank 0.*?^  total +([0-9.]+) +([0-9.]+)$", re.MULTILINE | re.DOTALL)
PLANNED = re.compile(r"^device memory of rank 0.*?^  total +([0-9.]+)", re.MULTILINE | re.DOTALL)

YAML = """base: {base}
data: {{train: {tokens}}}
output: {out}
device: cuda
train: {{steps: {steps}, global_batch: 1, micro_batch: 1, seq_len: {length}, recompute: {mode}, residual_fp32: {fp32}}}
memory: {{keep_decoded: {decoded}}}
lora: {{rank: {rank}, alpha: 32, dropout: 0.0, targets: all-linear}}
optim: {{lr: 1.0e-4}}
"""


def model_flops(config, length):
    """A token's, by the usual formula: 4 P + 4 h V + 6 T hq L + 6 r (in + out) L."""
    linears, layers = linears_of(config).values(), config["num_hidden_layers"]
    weights, sides = sum(o * i for o, i in linears), sum(o + i for o, i in linears)
    hq = config["num_attention_heads"] * config["head_dim"]
    return (4 * weights * layers + 4 * config["hidden_size"] * config["vocab_size"] + 6 * length * hq * layers
            + 6 * RANK * sides * layers)


def measured_matmul(path):
    """FLOP/s of the large product of bench_ops, None without."""
    try:
        with open(path, encoding="utf-8") as file:
            return next(float(line.split(",")[3]) * 1e12 for line in file if line.startswith("bound matmul"))
    except (OSError, StopIteration, ValueError):
        return None


def run(command, log):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          check=False)
    log.write(f"$ {' '.join(command)}\n{done.stdout}\n")
    log.flush()
    return done


def one_case(options, config, length, mode, log):
    """A row's cells, or an exception's text."""
    steps = LONG_STEPS if length >= LONG else STEPS
    tokens, out = os.path.join(options.work, f"tokens-{length}.h5"), os.path.join(options.work, f"run-{length}-{mode}")
    if not os.path.exists(tokens):
        made = run([os.path.join(options.build, "make_tokens"), tokens, str(config["vocab_size"]), str(steps),
                    str(length)], log)
        if made.returncode != 0:
            raise RuntimeError("make_tokens: " + made.stdout.strip()[-200:])
    yaml = os.path.join(options.work, f"{length}-{mode}.yaml")
    with open(yaml, "w", encoding="utf-8") as file:
        file.write(YAML.format(base=options.base, tokens=tokens, out=out, steps=steps, length=length, mode=mode.split("+")[0],
                               fp32=str("bf16" not in mode).lower(), decoded="auto" if "decoded" in mode else "none",
                               rank=RANK))
    done = run([os.path.join(options.build, "qshard"), "train", yaml], log)
    if done.returncode == 7:
        planned = PLANNED.search(done.stdout)
        return None, f"does not fit: {float(planned.group(1)) / 1024:.1f} GiB are planned" if planned else "does not fit"
    if done.returncode != 0:
        errors = [line for line in done.stdout.splitlines() if line.startswith("error[")]
        raise RuntimeError(f"exit {done.returncode}: {(errors or done.stdout.splitlines() or ['no output'])[-1][:200]}")
    with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as file:
        seconds = [line["step_time_s"] for line in map(json.loads, file) if "step_time_s" in line]
    seconds = statistics.median(seconds[WARM:])
    plan, peak = map(float, TOTAL.search(done.stdout).groups())
    return (length / seconds, seconds, plan, peak), None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("work")
    for name in ("--base", "--build", "--csv", "--ops", "--log"):
        parser.add_argument(name, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--tokens", type=int, action="append", help="lengths T, instead of the usual ones")
    options = parser.parse_args()
    config, matmul, failed = config_of("small" if options.small else "llama"), measured_matmul(options.ops), 0
    print("| T | recompute | tokens/s | ms a step | share of matmul | plan GiB | peak GiB | |")
    print("|---|---|---|---|---|---|---|---|")
    with open(options.log, "w", encoding="utf-8") as log, open(options.csv, "w", encoding="utf-8") as csv:
        csv.write("tokens,recompute,tokens_per_s,step_s,matmul_share,plan_mib,peak_mib\n")
        for length, mode in itertools.product(options.tokens or LENGTHS[options.small], MODES):
            try:
                cells, why = one_case(options, config, length, mode, log)
            except (RuntimeError, OSError, AttributeError, statistics.StatisticsError) as error:
                failed += 1
                print(f"| {length} | {mode} | | | | | | FAILED: {error} |", flush=True)
                continue
            if cells is None:
                print(f"| {length} | {mode} | | | | | | {why} |", flush=True)
                continue
            rate, seconds, plan, peak = cells
            share = rate * model_flops(config, length) / matmul if matmul else float("nan")
            near = abs(peak - plan) <= 0.03 * plan + 0.05
            failed += not near
            print(f"| {length} | {mode} | {rate:.0f} | {seconds * 1e3:.1f} | {share:.1%} | {plan / 1024:.2f} | "
                  f"{peak / 1024:.2f} | {'ok' if near else 'FAILED: peak is not within 3 % of the plan'} |", flush=True)
            csv.write(f"{length},{mode},{rate:.2f},{seconds:.6f},{share:.4f},{plan},{peak}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
