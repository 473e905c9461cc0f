#!/usr/bin/env python3
"""What a run on the device does beside training right: stage features of tests/gpu.sh.

    feature_checks.py WORK --log FILE

In WORK the stage has put what stands in for a profiler (nvtx_log.so) and for a driver (no-driver/, old-driver/). Prints one line a
check, for the report; the programs' own output goes to FILE. Needs the standard library alone.
"""
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

from runs import (EMULATED, SEED_MADE_LIMIT, SHORT, Case, Failed, NotHere, bench_of, lines_of, losses, oracle_case, quantize, same_run,
                  several_ranks, tiny_case)

OTHERS = 0.25  # of the continuations, or one, may not be the CPU's: bf16 may turn two tokens that are nearly as likely


def the_case(bench):
    """Short runs that are evaluated at their end; in five slots a step, or in four."""
    if SHORT:
        folder = os.path.join(bench.inputs, "tiny2")
        case = oracle_case(bench, "tiny2", folder, os.path.join(folder, "model"))
    else:
        case = tiny_case(bench)
    steps = case.settings["train.steps"]
    return Case(case.name, case.model, case.yaml, {**case.settings, "train.save_every": 0, "train.eval_every": steps})


def reference(bench, case):
    output, _ = bench.train(case, f"{case.name}-cuda", "cuda")
    return f"{len(losses(output))} steps"


def reference_of(bench, case):
    return os.path.join(bench.work, f"{case.name}-cuda")


# --- several ranks ------------------------------------------------------------------------------------------------------
def across_hosts(bench, case, group):
    """Four ranks on two hosts: sums inside of each, then between them."""
    output, text = bench.train(case, f"hosts-{group}", "cuda", ranks=4, hosts=True, options=("--allow-shared-device",),
                               shard__group=group)
    if "between 2 hosts of 2 ranks" not in text:
        raise Failed("the run did not see two hosts of two ranks")
    return same_run(bench, reference_of(bench, case), output)


def rows_ahead(bench, case):
    """Passes of several micro-batches, so that rows of the embedding are asked for within a pass and across passes."""
    output, _ = bench.train(case, "rows", "cuda", ranks=2, options=("--allow-shared-device",), train__micro_batch=1,
                            train__gather_group=2)
    alone, _ = bench.train(case, "rows-alone", "cuda", train__micro_batch=1)
    return same_run(bench, alone, output)


# --- evaluation, samples --------------------------------------------------------------------------------------------------
def loss_of(bench, case, device, *adapter, **how):
    settings = {"cpu__gemm": "strict"} if device == "cpu" else {}
    text = bench.qshard("eval", *case.words("none", device=device, **settings), *adapter, **how)
    found = re.search(r"^eval_loss +([0-9.e+-]+)", text, re.MULTILINE)
    if found is None:
        raise Failed("no eval_loss is printed")
    return float(found.group(1))


def evaluation(bench, case):
    """From the checkpoint: what the run said at its end, near the CPU's, and not the base's."""
    adapter = ("--adapter", reference_of(bench, case))
    ours, cpus = (loss_of(bench, case, device, *adapter) for device in ("cuda", "cpu"))
    ended = losses(reference_of(bench, case), "eval_loss")[-1]
    if ours != ended:
        raise Failed(f"{ours}, the run ended with {ended}")
    if not 0 < abs(ours - cpus) <= SEED_MADE_LIMIT:
        raise Failed(f"{ours}, on the CPU {cpus}; the limit is {SEED_MADE_LIMIT}, and the same bits were the CPU's own")
    if loss_of(bench, case, "cuda") == ours:
        raise Failed("the loss without the adapter is the same")
    return f"{ours:.4f}, on the CPU {cpus:.4f}"


def continuations(bench, case, device, *adapter, **how):
    settings = {"cpu__gemm": "strict"} if device == "cpu" else {}
    text = bench.qshard("sample", *case.words("none", device=device, **settings), "--quiet", "--tokens", "8", "--prompts",
                        case.settings["data.eval"], *adapter, **how)
    return re.split(r"^--- prompt \d+$", text, flags=re.MULTILINE)[1:]


def samples(bench, case):
    """The same text again, and most of it the CPU's."""
    adapter = ("--adapter", reference_of(bench, case))
    ours, again, cpus = (continuations(bench, case, device, *adapter) for device in ("cuda", "cuda", "cpu"))
    if ours != again:
        raise Failed("the same command says something else")
    if not ours or len(ours) != len(cpus):
        raise Failed(f"{len(ours)} continuations, on the CPU {len(cpus)}")
    equal = sum(a == b for a, b in zip(ours, cpus))
    if len(cpus) - equal > max(1, math.floor(OTHERS * len(cpus))):
        raise Failed(f"{equal} of {len(cpus)} continuations are the CPU's")
    if continuations(bench, case, "cuda") == ours:
        raise Failed("without the adapter the text is the same")
    return f"{equal} of {len(cpus)} continuations are the CPU's"


def samples_of_ranks(bench, case):
    adapter = ("--adapter", reference_of(bench, case))
    shared = continuations(bench, case, "cuda", *adapter, "--allow-shared-device", ranks=2)
    if shared != continuations(bench, case, "cuda", *adapter):
        raise Failed("one rank says something else")
    return f"{len(shared)} continuations"


# --- a rank that is stopped -----------------------------------------------------------------------------------------------
def second_rank(output):
    """Its process, among all; None until it is there."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as command, open(f"/proc/{pid}/environ", "rb") as environment:
                if (f"output={output}".encode() in command.read() and b"OMPI_COMM_WORLD_RANK=1\0" in environment.read() and
                        os.path.basename(os.readlink(f"/proc/{pid}/exe")) == "qshard"):
                    return int(pid)
        except OSError:
            pass  # gone by now
    return None


def stopped_rank(bench, case):
    """NCCL waits for it for ever; the other rank does not."""
    output = os.path.join(bench.work, "stopped")
    words = case.words(output, device="cuda", train__steps=100000, train__stall_limit=5, train__eval_every=0, train__micro_batch=1)
    with open(output + ".log", "w+", encoding="utf-8") as log:
        job = subprocess.Popen(bench.command(["train", *words, "--allow-shared-device"], 2), cwd=bench.work, env=bench.environment(2),
                               stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + 60
            while not os.path.exists(f"{output}/metrics.jsonl") or len(lines_of(output)) < 2:
                if job.poll() is not None or time.monotonic() > end:
                    raise Failed(f"no two steps: {log.seek(0) or log.read()[-300:]}")
                time.sleep(0.05)
            second = second_rank(output)
            if second is None:
                raise Failed("no process of rank 1 is found")
            os.kill(second, signal.SIGSTOP)
            code = job.wait(60)
        finally:
            job.kill()
            for pid in filter(None, [second_rank(output)]):
                os.kill(pid, signal.SIGKILL)  # mpirun was, and could not
        log.seek(0)
        said = [line for line in log.read().splitlines() if line.startswith("error[")]
    # The other rank's NCCL may notice, before mpirun ends it, that its peer has gone.
    others = [line for line in said[1:] if not line.startswith("error[E600] NCCL: ")]
    if code != 6 or not said or others or not said[0].startswith("error[E601] step "):
        raise Failed(f"exit {code}: {said}")
    return said[0].split(";")[0]


# --- what is said -------------------------------------------------------------------------------------------------------
def cpus_products(bench, case):
    output, text = bench.train(case, "gemm", "cuda", train__steps=1, train__eval_every=0, cpu__gemm="bf16")
    said = [line for line in text.splitlines() if "cpu.gemm: bf16 is for the CPU and has no effect with device: cuda" in line]
    if len(said) != 1:
        raise Failed(f"{len(said)} warnings")
    with open(os.path.join(output, "config.yaml"), encoding="utf-8") as file:
        if re.search(r"(?m)^ *gemm: strict  #", file.read()) is None:
            raise Failed("config.yaml does not say strict")
    return "a warning, and strict in config.yaml"


def refusal(bench, case, words, environment):
    """device: cuda is one line, exit 8, and nothing is written; the line."""
    output = os.path.join(bench.work, "refused")
    text = bench.qshard("train", *case.words(output, device="cuda"), expect=8, environment=environment)
    errors = [line for line in text.splitlines() if line.startswith("error[")]
    if len(errors) != 1 or not errors[0].startswith("error[E801]") or words not in errors[0]:
        raise Failed(f"{len(errors)} error lines: {errors[0] if errors else 'none'}")
    if os.path.exists(output):
        raise Failed("the run's folder was made")
    return errors[0]


def no_device(bench, case):
    environment = {"QSHARD_EMULATOR_DEVICES": "0"} if EMULATED else {"CUDA_VISIBLE_DEVICES": ""}
    said = refusal(bench, case, "no GPU is visible", environment)
    _, text = bench.train(case, "auto", "auto", environment=environment, train__steps=1, train__eval_every=0)
    if "device: cpu, since" not in text:
        raise Failed("device: auto does not say why it takes the CPU")
    return said


def driver(bench, case, kind, words):
    """Another libcuda.so.1 before the machine's."""
    folder = os.path.join(bench.work, f"{kind}-driver")
    if EMULATED:
        raise NotHere("the emulator has no driver")
    if not os.path.exists(os.path.join(folder, "libcuda.so.1")):
        raise NotHere("its library does not compile: see features.libraries.log")
    before = os.environ.get("LD_LIBRARY_PATH")
    return refusal(bench, case, words, {"LD_LIBRARY_PATH": folder + (f":{before}" if before else "")})


def ranges(bench, case):
    """Ranges as a profiler sees them, and a profile that changes nothing."""
    injection = os.path.join(bench.work, "nvtx_log.so")
    if not EMULATED and not os.path.exists(injection):
        raise NotHere("nvtx_log.c does not compile: see features.libraries.log")
    log = os.path.join(bench.work, "ranges")
    output, _ = bench.train(case, "profiled", "cuda", options=("--profile-steps", "2:3"),
                            environment={"NVTX_INJECTION64_PATH": injection, "QSHARD_NVTX_LOG": log})
    if not os.path.exists(log):
        raise Failed("no range was seen")
    with open(log, encoding="utf-8") as file:
        lines = file.read().splitlines()
    count, open_now = {}, 0
    for line in lines:
        open_now += 1 if line.startswith("+") else -1
        if line.startswith("+"):
            count[line[1:]] = count.get(line[1:], 0) + 1
        if open_now < 0:
            raise Failed("a range ends that has not begun")
    steps = case.settings["train.steps"]
    for name in ("update", "sums"):
        if count.get(name) != steps:
            raise Failed(f"{count.get(name, 0)} ranges \"{name}\", not {steps}")
    with open(os.path.join(case.model, "config.json"), encoding="utf-8") as file:
        layers = json.load(file)["num_hidden_layers"]
    for name in ("embedding", "head", *(f"layer {i} {way}" for i in range(layers) for way in ("forward", "backward"))):
        if count.get(name, 0) < steps:
            raise Failed(f"{count.get(name, 0)} ranges \"{name}\" in {steps} steps")
    if open_now != 0:
        raise Failed(f"{open_now} ranges do not end")
    same_run(bench, reference_of(bench, case), output)
    return f"{sum(count.values())} of {len(count)} names"


def main():
    bench = bench_of(__doc__)
    case = the_case(bench)
    if not bench.check(f"base of {case.name}", quantize, bench, case) or \
            not bench.check("a run to compare with", reference, bench, case):
        bench.cannot("everything else", "the first run failed")
        return 1
    bench.check("evaluation of a checkpoint: the run's own, near the CPU's", evaluation, bench, case)
    bench.check("samples: the same again, the CPU's", samples, bench, case)
    if several_ranks(bench, case):
        bench.check("samples: the same on 2 ranks of one GPU", samples_of_ranks, bench, case)
        for group in ("node",) if SHORT else ("node", "world"):
            bench.check(f"the same bits on 2 hosts of 2 ranks, shard.group: {group}", across_hosts, bench, case, group)
        bench.check("a rank that is stopped ends the job: one line, exit 6", stopped_rank, bench, case)
        bench.check("rows of the embedding ahead, 2 micro-batches a pass: the same bits on 2 ranks", rows_ahead, bench, case)
    bench.check("cpu.gemm has no effect, and says so", cpus_products, bench, case)
    bench.check("no visible GPU: one line, exit 8; auto takes the CPU", no_device, bench, case)
    bench.check("no driver: one line, exit 8", driver, bench, case, "no", "no NVIDIA driver is loaded")
    bench.check("a driver that says 11.4 (a stand-in): one line, exit 8", driver, bench, case, "old", "it is for CUDA 11.4")
    bench.check("NVTX ranges and --profile-steps", ranges, bench, case)
    bench.cannot("a card without code in the plugin", "the plugin is built for this one")
    bench.cannot("NCCL between several cards", "one card is looked at")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
