"""Runs of the program, on the device and on the CPU, as the checks of stages train and features of tests/gpu.sh make them. The
stages set QSHARD (the program), QSHARD_INPUTS (small models and token files, made by tests/gpu_deps.sh) and, under emulation,
QSHARD_PLUGIN. Needs the standard library alone.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
EMULATED = os.environ.get("QSHARD_GPU_MODE") == "emulated"
SHORT = os.environ.get("QSHARD_GPU_SHORT", "0") != "0"
# How far losses may be off the CPU's fp32 ones (docs/decisions.md, "How far is bf16 from fp32?"): the aim; a residual stream in
# bf16, with which PyTorch is off by 1.4e-2; small seed-made models, whose curves rounding the products' operands alone moves by 6e-3.
LOSS_LIMIT, BF16_LIMIT, SEED_MADE_LIMIT = 5e-3, 1.4e-2, 1e-2
PLAN_LIMIT = 0.03
RUN_LIMIT_S = 300
NUMBERS = re.compile(r'"(step|loss|eval_loss|lr|grad_norm)": ([^,}]+)')
TOTAL = re.compile(r"^device memory of rank 0.*?^  total +([0-9.]+) +([0-9.]+)$", re.MULTILINE | re.DOTALL)

# Ranks that share a card must look like different hosts to NCCL, which refuses two ranks on one GPU otherwise; then
# only the network carries what they say, and the loopback device will do.
SHARED = ["bash", "-c", 'export NCCL_HOSTID="rank$OMPI_COMM_WORLD_RANK"; exec "$@"', "rank"]
SHARED_ENVIRONMENT = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}


class Failed(Exception):
    """A check that did not hold; the text says how."""


class NotHere(Exception):
    """A check that cannot be made; the text says why."""


# Two hosts out of one: mpirun starts a daemon on each, by this instead of ssh, whose ranks are each other's neighbours and
# reach the others over TCP. Shared memory would be mixed up: both daemons call it by the machine's one name.
AGENT = os.path.join(ROOT, "tests", "gpu", "local_agent.sh")


def two_hosts(ranks):
    """Options of mpirun, those of Open MPI 4."""
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False).stdout
    if "(Open MPI) 4." not in version:
        raise NotHere(f"the way to make hosts is Open MPI 4's, this is {(version.splitlines() or ['another'])[0]}")
    first = (ranks + 1) // 2
    return ["--host", f"one:{first},two:{ranks - first}", "--map-by", "slot", "--bind-to", "none",
            "--mca", "rtc", "^hwloc", "--mca", "plm", "rsh", "--mca", "plm_rsh_agent", AGENT, "--mca", "btl", "tcp,self",
            "--mca", "btl_tcp_if_include", "lo", "--mca", "oob_tcp_if_include", "lo"]


class Bench:
    """Where runs happen, and what became of the checks."""

    def __init__(self, work, log):
        self.work, self.log = work, open(log, "w", encoding="utf-8")
        self.program, self.inputs = os.environ["QSHARD"], os.environ["QSHARD_INPUTS"]
        self.checks = self.failures = 0

    def say(self, text):
        print(text, flush=True)

    def cannot(self, name, reason):
        self.say(f"- not run: {name}: {reason}")

    def check(self, name, function, *arguments, **settings):
        """Runs the function, whose text is the detail of the line; True if it did not fail."""
        self.checks += 1
        started = time.monotonic()
        try:
            detail = function(*arguments, **settings)
        except NotHere as why:
            self.checks -= 1
            self.cannot(name, why)
            return False
        except (Failed, OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
            self.failures += 1
            self.say(f"- FAILED: {name}: {type(error).__name__ if not isinstance(error, Failed) else ''}{error}")
            return False
        self.say(f"- ok: {name}{': ' + detail if detail else ''} ({time.monotonic() - started:.0f} s)")
        return True

    # --- runs ---------------------------------------------------------------------------------------------------------
    def command(self, arguments, ranks, hosts=False):
        words = [self.program, *map(str, arguments)]
        return words if ranks is None else ["mpirun", "-np", str(ranks), *(two_hosts(ranks) if hosts else []), *SHARED, *words]

    def environment(self, ranks, **more):
        return {**os.environ, **(SHARED_ENVIRONMENT if ranks is not None else {}), **more}

    def qshard(self, *arguments, ranks=None, expect=0, hosts=False, environment=None):
        """Runs the program; its output. Failed if it does not leave with `expect`."""
        command = self.command(arguments, ranks, hosts)
        done = subprocess.run(command, cwd=self.work, env=self.environment(ranks, **(environment or {})),
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              errors="replace", timeout=RUN_LIMIT_S)
        self.log.write(f"$ {' '.join(command)}\n{done.stdout}\n")
        self.log.flush()
        if done.returncode != expect:
            lines = [line for line in done.stdout.splitlines() if line.startswith("error[")] or done.stdout.splitlines()
            raise Failed(f"exit {done.returncode}, not {expect}: {lines[-1] if lines else 'no output'}"[:400])
        return done.stdout

    def train(self, case, name, device, ranks=None, options=(), hosts=False, environment=None, **settings):
        """One run into WORK/name; returns (folder, output)."""
        output = os.path.join(self.work, name)
        shutil.rmtree(output, ignore_errors=True)
        words = case.words(output, device=device, **settings)
        return output, self.qshard("train", *words, *options, ranks=ranks, hosts=hosts, environment=environment)


def bench_of(description):
    """What the command line of a program of checks asks for."""
    parser = argparse.ArgumentParser(description=description.split("\n", maxsplit=1)[0])
    parser.add_argument("work")
    parser.add_argument("--log", required=True)
    options = parser.parse_args()
    return Bench(options.work, options.log)


def several_ranks(bench, case):
    """Whether several ranks can run on the device; says why not."""
    if shutil.which("mpirun") is None:
        bench.cannot("several ranks on one GPU", "no mpirun")
        return False
    words = case.words(os.path.join(bench.work, "no-nccl"), device="cuda")
    done = subprocess.run(bench.command(["train", *words, "--allow-shared-device", "--dry-run"], 2), cwd=bench.work,
                          env=bench.environment(2), capture_output=True, text=True, timeout=RUN_LIMIT_S, check=False)
    if "built without NCCL" in done.stdout + done.stderr:
        bench.cannot("several ranks on one GPU", "the plugin was built without NCCL")
        return False
    return True


class Case:
    """A model with its data and settings."""

    def __init__(self, name, model, yaml, settings):
        self.name, self.model, self.yaml, self.settings = name, model, yaml, settings

    def words(self, output, **more):
        values = {**self.settings, "output": output}
        values.update({key.replace("__", "."): value for key, value in more.items()})
        return [self.yaml, *(word for key, value in values.items() for word in ("--set", f"{key}={value}"))]


def tiny_case(bench):
    folder = os.path.join(bench.inputs, "tiny")
    steps = 4 if EMULATED else 40
    return Case("tiny", folder, os.path.join(ROOT, "inputs", "tiny.yaml"), {
        "base": os.path.join(bench.work, "tiny.h5"), "data.train": os.path.join(folder, "train.h5"),
        "data.eval": os.path.join(folder, "eval.h5"), "train.steps": steps, "train.save_every": steps // 4,
        "train.eval_every": 0})


def oracle_case(bench, name, folder, model):
    base = os.path.join(bench.work, name + ".h5")
    steps = (4 if SHORT else 10) if EMULATED else 50
    return Case(name, model, os.path.join(folder, "run.yaml"), {
        "base": base, "data.train": os.path.join(folder, "train.h5"), "data.eval": os.path.join(folder, "eval.h5"),
        "lora.init": os.path.join(folder, "adapter"), "train.steps": steps, "train.save_every": max(1, steps // 4)})


def quantize(bench, case):
    rows = ["--head-chunk-rows", "128"] if case.name != "smollm2" else []
    out = bench.qshard("quantize", case.model, "-o", case.settings["base"], *rows)
    return out.splitlines()[-1].split(": ", 1)[1].split(",")[0]


# --- what runs leave ----------------------------------------------------------------------------------------------------
def lines_of(output):
    with open(os.path.join(output, "metrics.jsonl"), encoding="utf-8") as file:
        return file.read().splitlines()


def curve(output):
    """What must not depend on how it was computed, as printed: 17 digits, so the bits."""
    return [tuple(NUMBERS.findall(line)) for line in lines_of(output)]


def losses(output, key="loss"):
    return [line[key] for line in map(json.loads, lines_of(output)) if key in line]


def same_curve(first, second):
    one, two = curve(first), curve(second)
    if one != two:
        at = next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))
        raise Failed(f"lines {at + 1} differ: {one[at:at + 1]} and {two[at:at + 1]}"[:400])
    return len(one)


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def adapter_sha256(bench, output):
    target = output + "-adapter"
    shutil.rmtree(target, ignore_errors=True)
    bench.qshard("export", output, "-o", target)
    return sha256_of(os.path.join(target, "adapter_model.safetensors"))


def same_run(bench, reference, output):
    """The same bits: every number of every step, and the adapter."""
    steps = same_curve(reference, output)
    if adapter_sha256(bench, output) != adapter_sha256(bench, reference):
        raise Failed("the adapters differ")
    return f"{steps} lines and the adapter"


def planned_and_peak(text):
    match = TOTAL.search(text)
    if match is None:
        raise Failed("the output has no table of the device's memory")
    return float(match.group(1)), float(match.group(2))
