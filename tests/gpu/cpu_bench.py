#!/usr/bin/env python3
"""Measures what the CPU's products are worth: stage cpu of tests/gpu.sh, on the cores that it was bound to.

    cpu_bench.py WORK --qshard PROGRAM --threads N --report DIR [--model HF_DIR] [--small] [--emulated] [--seconds S]

By `qshard bench`: products with NF4 matrices by everything that `cpu.gemm` can be here, then steps, attention and decode.
Prints lines of the report as soon as they are known. DIR gets cpu_gemm.csv and cpu_step.csv. Steps are of the model, or of
made-up weights of SmolLM2-135M's shape. --emulated: the figures say that the programs work, and no more. Products that do not
fit into S seconds, by the rate so far, are left out by name. Standard library alone.
"""
import argparse
import csv
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "benchmarks"))

from peers import ours, stats  # noqa: E402  (needs the path)

SHAPES, TOKENS = ((2048, 2048), (5632, 2048), (4096, 14336)), (512, 128, 2048)  # what says most first
SMALL = ((512, 512),), (48,)
REPEATS, WARM = {128: 7, 512: 3, 2048: 1}, 3  # one of the largest takes half a second; qshard bench warms up by three
FP16_GFLOPS, FP16_PEAK = 500.0, 750.0  # what fp16 is to reach on two cores, of which peak
LOSS_OFF = 2e-2  # of strict's, as in benchmarks/cpu_peers
LENGTH = {False: 512, True: 32}
DIRECTIONS = {"forward": "Y", "backward": "dX"}


def say(text=""):
    print(text, flush=True)


class Failed:
    """How many measurements failed; each is a line of the report."""

    def __init__(self):
        self.count = 0

    def __call__(self, what, error):
        self.count += 1
        say(f"- FAILED: {what}: {str(error)[:300]}")


def measured(options, program, failed, what, *words):
    """The report of `qshard bench WORDS`, None without one. Wrong results are a failure, and are in it all the same."""
    path = os.path.join(options.work, "bench.json")  # where Program.bench has it
    if os.path.exists(path):
        os.unlink(path)
    try:
        return program.bench(*words)
    except ours.RunError as error:
        failed(what, error)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


# ---- products ----
def cell_of(row):
    return f"{row['rate']:.0f}, {row['share']:.0f} %{', **WRONG**' if row.get('#wrong') else ''}" if row else ""


def print_product(what, rows, paths):
    """Two lines of the table. [{path: row}], one a direction."""
    found = []
    for direction, symbol in DIRECTIONS.items():
        ways = {path: rows.get((direction, path)) for path in paths}
        found.append({path: row for path, row in ways.items() if row})
        dense = rows.get(("dense", "strict")) if direction == "forward" else None
        say(f"| {symbol}, {what} | {' | '.join(map(cell_of, ways.values()))} | {cell_of(dense)} |")
    return found


def products(options, program, failed):
    """The table of products. [{path: row}] of each product and direction, and the names of all paths."""
    shapes, lengths = SMALL if options.small else (SHAPES, TOKENS)
    begin, found, paths, left_out, rate = time.monotonic(), [], [], [], 0.0
    with open(os.path.join(options.report, "cpu_gemm.csv"), "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("out", "in", "tokens", "direction", "kind", "gflops", "bound_gflops", "error"))
        for tokens, shape in itertools.product(lengths, shapes):
            text, repeats, started = f"{shape[0]}x{shape[1]}", REPEATS.get(tokens, 3), time.monotonic()
            what, work = f"{text}, M {tokens}", shape[0] * shape[1] * tokens * (WARM + repeats)
            if rate and started - begin + work / rate > options.seconds:
                left_out.append(what)
                continue
            report = measured(options, program, failed, what, "gemm", "--shape", text, "--tokens", tokens, "--repeats", repeats)
            if report is None:
                continue
            rows = ours.operations(report)  # "dense" is a direction of its own
            rate = max(rate, work / (time.monotonic() - started))
            table.writerows((*shape, tokens, *name, f"{row['rate']:.1f}", f"{row['bound']:.1f}", f"{row['error']:.2e}")
                            for name, row in rows.items())
            file.flush()
            if not paths:
                paths = [path for direction, path in rows if direction == "forward"]
                say(f"\n| GFLOP/s, of the bound | {' | '.join(paths)} | fp32 without NF4 |\n{'|---' * (len(paths) + 2)}|")
            found += print_product(what, rows, paths)
    say()
    if left_out:
        say(f"- not run: products {'; '.join(left_out)}: do not fit into {options.seconds:.0f} s")
    return found, paths


def name_missing(options, paths, failed):
    """Kinds that there should be rows of."""
    for kind in ours.gemm_settings(ours.this_cpu()):
        if kind not in paths:
            say(f"- not run: {kind}: this CPU has its instructions, and the program no products by them")
    for kind in ("bf16", "fp16", "amx"):
        if options.emulated and kind not in paths:
            failed(kind, "the program has no products by other instructions")
    say()


def gain(found, path):
    """How many times as fast as strict, the geometric mean over all products."""
    ratios = [ways[path]["rate"] / ways["strict"]["rate"] for ways in found if path in ways and "strict" in ways]
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else float("nan")


def summary(found, paths, emulated):
    """A table of the kinds, and whether fp16 reaches what it is to reach. The fastest kind."""
    say("| cpu.gemm | bound, GFLOP/s | median | lowest | highest | times strict | fastest in |")
    say("|---|---|---|---|---|---|---|")
    best = [max(ways, key=lambda path: ways[path]["rate"]) for ways in found]
    for path in paths:
        rows = [ways[path] for ways in found if path in ways]
        rates = [row["rate"] for row in rows]
        say(f"| {path} | {statistics.median(row['bound'] for row in rows):.0f} | {statistics.median(rates):.0f} | {min(rates):.0f} "
            f"| {max(rates):.0f} | {gain(found, path):.2f} | {best.count(path)} of {len(found)} |")
    say()
    if "fp16" in paths and not emulated:
        rows = [ways["fp16"] for ways in found if "fp16" in ways]
        reached = sum(row["rate"] >= FP16_GFLOPS for row in rows)
        near = sum(row["rate"] >= row["bound"] * FP16_GFLOPS / FP16_PEAK for row in rows)
        say(f"- fp16: {FP16_GFLOPS:.0f} GFLOP/s are reached in {reached} of {len(rows)} products, {FP16_GFLOPS / FP16_PEAK:.0%} of the "
            f"bound ({FP16_GFLOPS:.0f} of a peak of {FP16_PEAK:.0f}) in {near}\n")
    return max(paths, key=lambda path: gain(found, path))


# ---- steps ----
def make_base(options, program):
    """A base of the model, or of made-up weights. Its path, and what it is of."""
    model, what = options.model, os.path.basename(os.path.normpath(options.model or ""))
    if not model:
        model, what = os.path.join(options.work, "model"), "two narrow layers" if options.small else "SmolLM2-135M's shape"
        made = subprocess.run([sys.executable, os.path.join(HERE, "make_model.py"), model,
                               "--small" if options.small else "--smollm2"], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise ours.RunError((made.stderr.strip().splitlines() or ["no output"])[-1])
        what += ", made-up weights"
    base = os.path.join(options.work, "base.h5")
    program.quantize(model, base)
    return base, what


def step(options, program, failed, base, kind):
    """The report of a few steps of one sequence, None without one."""
    settings = {"device": "cpu", "cpu.gemm": kind, "train.seq_len": LENGTH[options.small], "train.micro_batch": 1,
                "train.global_batch": 1, "train.recompute": "none"}
    return measured(options, program, failed, f"steps by {kind}", "step", "--base", base,
                    *(f"--set={key}={value}" for key, value in settings.items()), "--warmup", 1, "--repeats", 3)


def steps(options, program, kinds, failed):
    """The table of steps. {kind: tokens/s}, and which kind `auto` takes."""
    speeds, losses, auto = {}, {}, None
    try:
        base, what = make_base(options, program)
    except ours.RunError as error:
        failed("a base for steps", error)
        return speeds, auto
    say(f"Steps of {what}, T {LENGTH[options.small]}, rank 16 on seven linears, no recompute:\n")
    say("| cpu.gemm | tokens/s | times strict | of its products' bound | loss |\n|---|---|---|---|---|")
    with open(os.path.join(options.report, "cpu_step.csv"), "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("kind", "tokens_per_s", "bound_tokens_per_s", "loss", "runs_as"))
        for kind in [*kinds, "auto"]:
            report = step(options, program, failed, base, kind)
            if report is None:
                continue
            runs_as, speed = report["host"]["backend"], report["speed"]
            table.writerow((kind, speed["tokens/s"], speed["bound tokens/s"], speed["loss"], runs_as))
            file.flush()
            if kind == "auto":
                auto = runs_as
                continue
            speeds[kind], losses[kind] = speed["tokens/s"], speed["loss"]
            against = f"{speeds[kind] / speeds['strict']:.2f}" if "strict" in speeds else ""
            say(f"| {kind} | {speed['tokens/s']:.0f} | {against} | {speed['tokens/s'] / speed['bound tokens/s']:.0%} "
                f"| {speed['loss']:.4f} |")
    say()
    for kind, loss in losses.items():
        off = stats.relative_off(loss, losses.get("strict", loss))
        if not off <= LOSS_OFF:
            failed(f"steps by {kind}", f"the loss is {off:.1e} off strict's")
    return speeds, auto


# ---- the rest ----
def others(options, program, failed):
    """Attention and decode."""
    attention = ("--tokens", 128, "--heads", 4) if options.small else ("--tokens", 2048)
    asked = [("attention", *attention)]
    asked += [("decode", "--shape", shape) for shape in (("512x512",) if options.small else ("1024x1024", "14336x4096"))]
    say("| | shape | figure | of the bound |\n|---|---|---|---|")
    for name, *words in asked:
        report = measured(options, program, failed, f"bench {name}", name, *words, "--repeats", 3)
        for row in report["tables"]["operations"]["rows"] if report else ():
            title = row["operation"] if name in row["operation"] else f"{name} {row['operation']}"
            say(f"| {title} | {row['shape']} | {row['rate']:.4g} {row['unit']} | {row['share']:.0f} % of {row['bound']:.4g} |")
    say()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("work")
    for name in ("--qshard", "--report"):
        parser.add_argument(name, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--emulated", action="store_true")
    options = parser.parse_args()
    program, failed = ours.Program(options.qshard, options.threads, options.work), Failed()
    found, paths = products(options, program, failed)
    name_missing(options, paths, failed)
    fastest = summary(found, paths, options.emulated) if found else "nothing"
    speeds, auto = steps(options, program, paths or ["strict"], failed)
    if speeds and not options.emulated:
        say(f"- fastest: {fastest} in products, {max(speeds, key=speeds.get)} in steps; `cpu.gemm: auto` is {auto or 'not known'} "
            "here\n")
    others(options, program, failed)
    return 1 if failed.count else 0


if __name__ == "__main__":
    sys.exit(main())
