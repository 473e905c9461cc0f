#!/usr/bin/env python3
"""Whole runs on the device against whole runs on the CPU: stage train of tests/gpu.sh.

    train_checks.py WORK --log FILE

Prints one line a check, for the report; the programs' own output goes to FILE. Needs the standard library alone.
"""
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

from runs import (BF16_LIMIT, EMULATED, LOSS_LIMIT, PLAN_LIMIT, ROOT, RUN_LIMIT_S, SEED_MADE_LIMIT, SHORT, Case,
                  Failed, NotHere, bench_of, losses, oracle_case, planned_and_peak, quantize,
                  same_curve, same_run, several_ranks, sha256_of, tiny_case)

# --- checks -------------------------------------------------------------------------------------------------------------
def same_base(bench, case):
    """Quantized on the device, with and without double quantization: the CPU's file, byte for byte."""
    rows = ["--head-chunk-rows", "128"] if case.name != "smollm2" else []
    details = []
    for options in ([], ["--no-double-quant"]):
        digests = {}
        for device in ("cpu", "cuda"):
            output = os.path.join(bench.work, f"{case.name}-{device}.h5")
            text = bench.qshard("quantize", case.model, "-o", output, "--device", device, *rows, *options)
            digests[device] = sha256_of(output)
            os.remove(output)
        if len(set(digests.values())) > 1:
            raise Failed(f"{' '.join(options) or 'double quantization'}: {digests}")
        details.append(re.search(r"([0-9.]+ s), peak", text).group(1))
    return f"the same file twice, in {' and '.join(details)}"


def cpu_run(bench, case):
    """The folder of the case on the CPU, run once: strict products are what the kernels are compared with, too."""
    output = os.path.join(bench.work, f"{case.name}-cpu")
    if not os.path.exists(os.path.join(output, "summary.csv")):
        bench.train(case, f"{case.name}-cpu", "cpu", cpu__gemm="strict")
    return output


def near_cpu(bench, case, limit, name="cuda", **settings):
    cpu = cpu_run(bench, case)
    try:
        device, _ = bench.train(case, f"{case.name}-{name}", "cuda", **settings)
    except Failed as error:
        if "head_dim" in str(error) and not str(error).startswith("exit 70"):  # 70 is a bug, not a refusal
            raise NotHere(f"refused: {error}") from error
        raise
    parts = []
    for key in ("loss", "eval_loss"):
        ours, theirs = losses(device, key), losses(cpu, key)
        if len(ours) != len(theirs) or not ours:
            raise Failed(f"{len(ours)} values of {key}, the CPU has {len(theirs)}")
        worst = max(abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in zip(ours, theirs))
        parts.append(f"{key} off by {worst:.2e} at most in {len(ours)}")
        if not worst <= limit:
            raise Failed(f"{parts[-1]}; the limit is {limit}")
    moved = abs(losses(cpu)[-1] - losses(cpu)[0])
    return f"{', '.join(parts)}; the CPU's loss moves by {moved:.3f}"


def same_bits(bench, case, name, ranks=None, options=(), **settings):
    """The same bits as the first run of the case on the device."""
    output, _ = bench.train(case, name, "cuda", ranks=ranks, options=options, **settings)
    return same_run(bench, os.path.join(bench.work, f"{case.name}-cuda"), output)


def plan_is_kept(bench, case, name, **settings):
    _, text = bench.train(case, name, "cuda", **settings)
    plan, peak = planned_and_peak(text)
    if not abs(peak - plan) <= PLAN_LIMIT * plan + 0.05:  # printed to 0.1 MiB
        raise Failed(f"peak {peak} MiB, plan {plan} MiB")
    return f"plan {plan} MiB, peak {peak} MiB"


def killed_and_resumed(bench, case):
    """SIGKILL as soon as the first checkpoint stands, then again from there."""
    output = os.path.join(bench.work, "killed")
    shutil.rmtree(output, ignore_errors=True)
    words = case.words(output, device="cuda")
    process = subprocess.Popen(bench.command(["train", *words], None), cwd=bench.work, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + RUN_LIMIT_S
    while process.poll() is None and not any_checkpoint(output) and time.monotonic() < limit:
        time.sleep(0.002)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not any_checkpoint(output):
        raise Failed("no checkpoint appeared")
    text = bench.qshard("train", *words)
    steps = same_curve(os.path.join(bench.work, f"{case.name}-cuda"), output)
    resumed = re.search(r"resuming after step (\d+)", text)
    if not alive or resumed is None:
        raise Failed("the run ended before it could be killed" if not alive else "it did not resume")
    return f"{steps} lines, resumed after step {resumed.group(1)}"


def any_checkpoint(output):
    return os.path.isdir(output) and any(
        re.fullmatch(r"step-\d+", name) is not None for name in os.listdir(output))


def too_small(bench, case):
    output = os.path.join(bench.work, "limited")
    text = bench.qshard("train", *case.words(output, device="cuda", memory__device_limit=100000), expect=7)
    errors = [line for line in text.splitlines() if line.startswith("error[")]
    if len(errors) != 1:
        raise Failed(f"{len(errors)} error lines")
    if "plan MiB" not in text:
        raise Failed("the table is not shown")
    return "exit 7 with the table and one line"


def make_smollm2(bench, model):
    """Its token files come with the inputs, or are made here, which takes h5py and xxhash."""
    folder, brought = os.path.join(bench.work, "smollm2-inputs"), os.path.join(bench.inputs, "smollm2")
    files = ["--token-files", brought] if os.path.exists(os.path.join(brought, "train.h5")) else []
    done = subprocess.run([sys.executable, os.path.join(ROOT, "tests", "oracle", "make_inputs.py"), "smollm2", folder,
                           "--model", model, *files], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed((done.stderr.strip().splitlines() or ["make_inputs.py failed"])[-1])
    return folder


# --- all of it ----------------------------------------------------------------------------------------------------------
def check_losses(bench):
    """Returns the case that the other checks vary, None if it does not run. The tiny one has dropout."""
    cases = [] if SHORT else [tiny_case(bench)]
    for name in ("tiny2",) if SHORT else ("tiny2", "odd", "biases", "gemma3", "olmo3"):
        folder = os.path.join(bench.inputs, name)
        cases.append(oracle_case(bench, name, folder, os.path.join(folder, "model")))
    for case in cases:
        if bench.check(f"base of {case.name}", quantize, bench, case):
            bench.check(f"base of {case.name} quantized on the device", same_base, bench, case)
            if bench.check(f"losses of {case.name} near the CPU's", near_cpu, bench, case, SEED_MADE_LIMIT):
                bench.check(f"losses of {case.name} with a residual stream in bf16 near the CPU's", near_cpu, bench, case,
                            SEED_MADE_LIMIT, "bf16", train__residual_fp32="false")
    ran = os.path.exists(os.path.join(bench.work, f"{cases[0].name}-cuda", "metrics.jsonl"))
    return cases[0] if ran else None


def check_smollm2(bench):
    model = os.environ.get("QSHARD_SMOLLM2", "")
    if EMULATED:
        bench.cannot("SmolLM2", "emulated kernels would take hours")
    elif not os.path.exists(os.path.join(model, "config.json")):
        bench.cannot("SmolLM2", "QSHARD_SMOLLM2 names no folder with the model")
    else:
        try:
            folder = make_smollm2(bench, model)
        except Failed as error:
            bench.cannot("SmolLM2", f"its inputs cannot be made: {error}")
            return
        case = oracle_case(bench, "smollm2", folder, model)
        if bench.check("base of SmolLM2", quantize, bench, case):
            bench.check("base of SmolLM2 quantized on the device", same_base, bench, case)
            bench.check("losses of SmolLM2 near the CPU's", near_cpu, bench, case, LOSS_LIMIT)
            bench.check("SmolLM2 again", same_bits, bench, case, "smollm2-again")
            bench.check("losses of SmolLM2 with a residual stream in bf16 near the CPU's", near_cpu, bench, case, BF16_LIMIT,
                        "bf16", train__residual_fp32="false")


def check_variants(bench, case):
    bench.check("the same bits again", same_bits, bench, case, "again")
    modes = ("none",) if SHORT else ("selective", "none")
    for mode in modes:
        bench.check(f"the same bits with recompute: {mode}", same_bits, bench, case, f"recompute-{mode}",
                    train__recompute=mode)
    offloads = ("[activations, weights, embedding]",) if SHORT else (
        "[activations]", "[weights]", "[embedding]", "[activations, weights, embedding]")
    for what in offloads:
        bench.check(f"the same bits with memory.offload: {what}", same_bits, bench, case, "offload",
                    memory__offload=what)
    bench.check("the same bits with layers that stay decoded", same_bits, bench, case, "decoded", memory__keep_decoded="auto",
                train__recompute="none")
    bench.check("peak memory beside the plan, layers that stay decoded", plan_is_kept, bench, case, "plan",
                memory__keep_decoded=1)
    for mode in ("full", *modes):
        bench.check(f"peak memory beside the plan, recompute: {mode}", plan_is_kept, bench, case, "plan",
                    train__recompute=mode)
    bench.check("peak memory beside the plan, residual stream in bf16", plan_is_kept, bench, case, "plan",
                train__residual_fp32="false")
    bench.check("too little memory is said before loading", too_small, bench, case)
    bench.check("killed and resumed", killed_and_resumed, bench, case)


def check_dora(bench, case):
    """The same model with DoRA, from adapters of its own."""
    settings = {**case.settings, "lora.dora": "true", "lora.init": "", "lora.dropout": 0.1}
    dora = Case(f"{case.name}-dora", case.model, case.yaml, settings)
    if bench.check("losses with DoRA near the CPU's", near_cpu, bench, dora, SEED_MADE_LIMIT):
        bench.check("DoRA: the same bits again", same_bits, bench, dora, "dora-again")
        bench.check("DoRA: the same bits with recompute: none", same_bits, bench, dora, "dora-none", train__recompute="none")
        bench.check("DoRA: peak memory beside the plan", plan_is_kept, bench, dora, "dora-plan")
        bench.check("losses with DoRA and a residual stream in bf16 near the CPU's", near_cpu, bench, dora, SEED_MADE_LIMIT, "bf16",
                    train__residual_fp32="false")
        bench.check("DoRA without dropout near the CPU's", near_cpu, bench,
                    Case(f"{dora.name}-0", case.model, case.yaml, {**settings, "lora.dropout": 0}), SEED_MADE_LIMIT)


def check_ranks(bench, case):
    if not several_ranks(bench, case):
        return
    for ranks in (2,) if SHORT else (2, 3):
        bench.check(f"the same bits on {ranks} ranks of one GPU", same_bits, bench, case, f"ranks-{ranks}", ranks,
                    ("--allow-shared-device",))
    if not SHORT:
        bench.check("the same bits on 4 ranks, a copy of the base on each 2", same_bits, bench, case, "groups", 4,
                    ("--allow-shared-device",), shard__group=2)
        bench.check("the same bits on 2 ranks, gathers 3 ahead, one layer kept", same_bits, bench, case, "ahead", 2,
                    ("--allow-shared-device",), shard__prefetch=3, shard__keep_resident=1)


def main():
    bench = bench_of(__doc__)
    case = check_losses(bench)
    if case is None:
        bench.cannot("bits, memory, offload, ranks, resume", "the first model did not train")
    else:
        check_variants(bench, case)
        check_dora(bench, case)
        check_ranks(bench, case)
    check_smollm2(bench)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
