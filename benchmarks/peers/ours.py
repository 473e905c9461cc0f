"""Our side: short runs of the program, and what they print or write, as Python values."""
import ctypes
import json
import os
import platform
import re
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
# A rank a process on one machine: as root, in containers, without a core bound to each rank (cmake/deps.sh says the same).
MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1",
       "OMPI_MCA_hwloc_base_binding_policy": "none", "OMPI_MCA_btl_base_warn_component_unused": "0"}
STEP_YAML = """base: {base}
data: {{train: {tokens}}}
output: {out}
device: cpu
train: {{steps: {steps}, global_batch: {batch}, micro_batch: 1, seq_len: {length}, recompute: {recompute}, save_every: 0}}
lora: {{rank: 16, alpha: 32, dropout: 0.0, targets: all-linear, init: "{adapter}"}}
optim: {{lr: 1.0e-4, schedule: constant, warmup: 0, clip: 0}}
cpu: {{gemm: {gemm}}}
"""
# The products beside strict that a step is measured with, the faster below: the CPU's flag, whose CPUs alone (None: all makers'),
# and the value of `cpu.gemm`, which names their rows in `qshard bench gemm`, too. For bf16 Intel's CPUs have AMX.
PRODUCTS = (("avx512_fp16", None, "fp16"), ("avx512_bf16", "AuthenticAMD", "bf16"), ("amx_bf16", None, "amx"))


class RunError(Exception):
    """A run that failed: its command and its last line."""


def run_process(command, environment=None):
    """(stdout, largest resident set in MiB). RunError if it fails."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                   env=environment, text=True)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode != 0:
            lines = [line for line in (err.read() + out.read()).splitlines() if line.strip()] or ["no output"]
            said = next((line for line in lines if line.startswith("error[")), lines[-1])
            raise RunError(f"{' '.join(map(str, command[:3]))} ...: exit {process.returncode}: {said}")
        return out.read(), usage.ru_maxrss / 1024


# --- qshard bench -----------------------------------------------------------------------------------------------------
def operations(report):
    """{(operation, path): row} of a `qshard bench gemm` or `decode` report.

    The operation is "dense", "forward", "backward" or "decode"; the path is what else stands in its name ("strict" where
    nothing does), so that rows of further paths are taken as they come. RunError for anything that is no such report.
    """
    if not isinstance(report, dict) or report.get("format") != "qshard-bench":
        raise RunError("not a report of qshard bench")
    try:
        rows, found = report["tables"]["operations"]["rows"], {}
        for row in rows:
            words = [word for word in re.split(r"[ ,]+", row["operation"]) if word and word != "nf4"]
            kind = next((word for word in words if word in ("dense", "forward", "backward", "decode")), None)
            if kind is not None:
                words.remove(kind)
                found[kind, " ".join(words) or "strict"] = row
    except (KeyError, TypeError) as error:
        raise RunError(f"a report of qshard bench without {error}") from None
    if not found:
        raise RunError("a report of qshard bench without rows")
    return found


class Program:
    """The program with a number of threads; its files are made in `work`."""

    def __init__(self, path, threads, work):
        self.path, self.threads, self.work = os.path.abspath(path), threads, work
        self.environment = {**os.environ, **MPI, "OMP_NUM_THREADS": str(threads)}
        self.runs = 0

    def bench(self, name, *options):
        """The report of one `qshard bench`. A wrong result is a RunError: the program leaves with code 5."""
        path = os.path.join(self.work, "bench.json")
        run_process([self.path, "bench", name, *options, "--threads", self.threads, "--json", path], self.environment)
        with open(path, encoding="utf-8") as file:
            return json.load(file)

    def quantize(self, model, base):
        """The largest resident set in MiB of making a fresh base."""
        if os.path.exists(base):
            os.unlink(base)
        _, mib = run_process([self.path, "quantize", model, "-o", base, "--threads", self.threads], self.environment)
        return mib

    def _write_yaml(self, workload, steps):
        self.runs += 1
        folder = os.path.join(self.work, f"run-{self.runs}")
        with open(folder + ".yaml", "w", encoding="utf-8") as file:
            file.write(STEP_YAML.format(out=folder, steps=steps, **workload))
        return folder, folder + ".yaml"

    def order(self, workload, steps):
        """Numbers of the sequences that `train` takes, one after the other."""
        folder, yaml = self._write_yaml(workload, steps)
        if os.path.exists(folder + ".order"):  # of another repeat; the program replaces nothing
            os.remove(folder + ".order")
        run_process([self.path, "train", yaml, "--dump-order", folder + ".order"], self.environment)
        with open(folder + ".order", encoding="utf-8") as file:
            return [int(word) for word in file.read().split()]

    def train(self, workload, steps, ranks=1, threads=None):
        """Runs `steps` steps in a fresh directory. `threads`: of each rank.

        {"losses", "seconds": of each step, "mib": largest resident set of a rank, "gflop": of a step, all ranks together,
        "memory": {class: (plan, peak) MiB} of rank 0}
        """
        folder, yaml = self._write_yaml(workload, steps)
        threads = threads or self.threads
        if os.path.isdir(folder):
            remove(folder)
        launch = ["mpirun", "-np", ranks] if ranks > 1 else []
        said, _ = run_process([*launch, self.path, "train", yaml, "--set", f"cpu.threads={threads}"],
                              {**self.environment, "OMP_NUM_THREADS": str(threads)})
        with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
            rows = [row for row in map(json.loads, file) if "step_time_s" in row]
        with open(os.path.join(folder, "ranks.jsonl"), encoding="utf-8") as file:
            last = [json.loads(line) for line in file][-ranks:]
        remove(folder)
        return {"losses": [row["loss"] for row in rows], "seconds": [row["step_time_s"] for row in rows],
                "mib": max(row["rss_bytes"] for row in last) / 2**20, "memory": memory_table(said),
                "gflop": sum(row["flops"] for row in last) / steps / 1e9}


def remove(folder):
    """A run directory; only what runs write into it."""
    for where, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(where, name))
        for name in folders:
            os.rmdir(os.path.join(where, name))
    os.rmdir(folder)


def memory_table(said):
    """{class: (plan MiB, peak MiB)} of the table that `train` ends with, "total" among them."""
    lines = said.splitlines()
    at = max((i for i, line in enumerate(lines) if line.startswith("memory of rank 0") and "peak MiB" in line), default=None)
    if at is None:
        raise RunError("the run printed no table of its memory")
    table = {}
    for line in lines[at + 1:]:
        match = re.fullmatch(r"  (\S.*?) +([0-9.]+) +([0-9.]+)", line)
        if match is None:
            break
        table[match[1]] = float(match[2]), float(match[3])
    return table


# --- this machine -----------------------------------------------------------------------------------------------------
def cpu_of(cpuinfo):
    """{"name", "maker", "flags" of those that matter here} of the text of /proc/cpuinfo."""
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.M)
    maker = re.search(r"^vendor_id\s*:\s*(.+)$", cpuinfo, re.M)
    flags = re.search(r"^flags\s*:\s*(.+)$", cpuinfo, re.M)
    words = set(flags[1].split()) if flags else set()
    matter = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
    return {"name": name[1] if name else "unknown", "maker": maker[1] if maker else "unknown",
            "flags": [flag for flag in matter if flag in words]}


def kernel_lends_tiles():
    """Linux gives AMX's registers to processes that ask for them, as the program does; a sandbox may know no such call."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return platform.machine() == "x86_64" and ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def this_cpu():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = cpu_of(file.read())
    if "amx_bf16" in cpu["flags"] and not kernel_lends_tiles():
        cpu["flags"] = [flag for flag in cpu["flags"] if not flag.startswith("amx")] + ["amx refused by the kernel"]
    return cpu


def gemm_settings(cpu):
    """What `cpu.gemm` can be on that CPU: a step is measured with each."""
    return ["strict", *(value for flag, maker, value in PRODUCTS if flag in cpu["flags"] and maker in (None, cpu["maker"]))]


def aimed_at(paths):
    """The one that the aims are for: the fastest products, strict where there are no others."""
    return next((value for _, _, value in reversed(PRODUCTS) if value in paths), "strict")


def require_products(program, cpu):
    """RunError where the program lacks products that this CPU is measured with: their rows would be missing in silence."""
    found = operations(program.bench("gemm", "--shape", "64x64", "--tokens", 32, "--repeats", 1))
    for flag, _, value in PRODUCTS:
        if value in gemm_settings(cpu) and ("forward", value) not in found:
            raise RunError(f"this CPU has {flag}, and qshard bench gemm has no rows of {value}: an old program, or built by a "
                           "compiler or an assembler without the instructions?")


def fail(text):
    sys.exit(f"cpu_peers: {text}")
