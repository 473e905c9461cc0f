#!/usr/bin/env python3
"""What more ranks cost: start-up, CPU time and messages of a step of the tiny model on 1, 2, 4, ... ranks of this machine.

    benchmarks/scaling.py --qshard build/release/qshard [--base BASE.h5] [--ranks N]... [--json FILE] [--plot FILE.png]

The work of a step is the same for every N (a micro-batch a sequence, 64 of them), so that what grows is what ranks cost. A
machine with fewer cores than ranks says nothing by its clock: the CPU seconds of all ranks together do (waiting ranks give
their core away), less those of one rank: the overhead, all of it. Messages and bytes are the program's own counters
(`qshard bench step`). Where ranks outnumber cores, overhead = waiting + cost * messages of all ranks: polling while others
compute keeps the cores busy, however many ranks there are. The cost of a message is then taken to larger N and another model,
with assumed latency and bandwidth: an extrapolation, printed as such. Without --base the tiny model is made (needs numpy).
The plot needs matplotlib.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time

TOP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none", "OMPI_MCA_mpi_yield_when_idle": "1", "OMP_NUM_THREADS": "1",
}
PURPOSES = ("units", "embedding", "gradients", "lora", "agreement")
STEP = ("device=cpu", "train.seq_len=64", "train.global_batch=64", "train.micro_batch=1", "lora.rank=8")

# What is extrapolated to: Llama-2-70B's shape with LoRA of rank 16 on all linears, a micro-batch of 4,096 tokens a rank and step.
MODEL = {"layers": 80, "chunks": 8, "layer_bytes": 0.4414e9, "chunk_bytes": 67.1e6, "lora_layer_chunks": 632,
         "row_bytes": 16384, "tokens": 4096}
CHUNK_BYTES = 16384  # 4,096 floats of the LoRA vector: the least that a rank owns


def run(command):
    done = subprocess.run([str(word) for word in command], env={**os.environ, **ENVIRONMENT}, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"scaling.py: {' '.join(map(str, command))}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return done


def make_base(qshard, folder):
    model, base = os.path.join(folder, "model"), os.path.join(folder, "base.h5")
    run([sys.executable, os.path.join(TOP, "src", "prep", "qshard_tiny.py"), model, "--examples", 8])
    run([qshard, "quantize", model, "-o", base, "--head-chunk-rows", 128])
    return base


def launch_seconds(qshard, ranks):
    """From mpirun to its end for a program that starts MPI and prints a line: the best of three."""
    times = []
    for _ in range(3):
        started = time.monotonic()
        run(["mpirun", "-np", ranks, qshard, "--version"])
        times.append(time.monotonic() - started)
    return min(times)


def measure(qshard, base, ranks, repeats, folder):
    """One row of the table."""
    path = os.path.join(folder, f"step-{ranks}.json")
    sets = [word for value in STEP for word in ("--set", value)]
    run(["mpirun", "-np", ranks, qshard, "bench", "step", "--base", base, *sets, "--threads", 1, "--repeats", repeats, "--json",
         path])
    with open(path, encoding="utf-8") as file:
        report = json.load(file)
    parts = {row["part"]: row["time"] for row in report["tables"]["parts"]["rows"]}
    traffic = {row["traffic"]: row for row in report["tables"]["traffic"]["rows"]}
    speed = report["speed"]
    return {"ranks": ranks, "launch_s": launch_seconds(qshard, ranks), "startup_s": speed["startup s"],
            "startup_cpu_s": speed["startup CPU s a rank"], "step_ms": parts["total"], "loss": speed["loss"],
            "cpu_ms": 1e3 * speed["step CPU s a rank"] * ranks, "commit": report["commit"], "cpu": report["host"]["cpu"],
            "calls": {name: traffic[name]["calls"] for name in PURPOSES},
            "messages": {name: traffic[name]["messages"] for name in PURPOSES},
            "bytes": {name: traffic[name]["bytes"] for name in PURPOSES}}


def messages(row):
    return sum(count or 0 for count in row["messages"].values())


def overhead_ms(row, rows):
    """CPU time of all ranks that one rank alone does not need for the same work."""
    return row["cpu_ms"] - rows[0]["cpu_ms"]


def fit(rows):
    """(ms of waiting, ms a message): a line through the overheads over all ranks' messages, of ranks that outnumber the cores."""
    cores = len(os.sched_getaffinity(0))
    points = [(row["ranks"] * messages(row), overhead_ms(row, rows)) for row in rows if row["ranks"] > cores]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x, slope


def print_measured(rows):
    print("| ranks | launch s | start-up s | CPU s a rank until then | step ms | CPU ms of all ranks | overhead ms | a rank | messages a rank |")
    print("|---" * 9 + "|")
    for row in rows:
        print(f"| {row['ranks']} | {row['launch_s']:.2f} | {row['startup_s']:.3f} | {row['startup_cpu_s']:.3f} "
              f"| {row['step_ms']:.0f} | {row['cpu_ms']:.0f} | {overhead_ms(row, rows):.0f} "
              f"| {overhead_ms(row, rows) / row['ranks']:.1f} | {messages(row)} |")
    print()
    for what in ("calls", "messages", "bytes"):
        print(f"| ranks | {what} of " + " | ".join(PURPOSES) + " |")
        print("|---" * (len(PURPOSES) + 1) + "|")
        for row in rows:
            print(f"| {row['ranks']} | " + " | ".join("" if row[what][name] is None else str(row[what][name])
                                                      for name in PURPOSES) + " |")
        print()


def forecast(ranks, group, cost, options):
    """A step's communication of MODEL for one rank, not hidden behind compute: seconds by what they are for."""
    m = MODEL
    units = 2 * m["layers"] + m["chunks"]
    owners = min(ranks, m["lora_layer_chunks"])
    width = math.ceil(m["lora_layer_chunks"] / ranks) * CHUNK_BYTES
    sent = {"units": (units * (group - 1), (2 * m["layers"] * m["layer_bytes"] + m["chunks"] * m["chunk_bytes"]) * (group - 1) / group),
            "embedding": (2 * (group - 1), m["tokens"] * m["row_bytes"] * (group - 1) / group),
            "gradients": (m["layers"] * (ranks - 1), m["layers"] * (ranks - 1) * width),
            "lora": (m["layers"] * (owners - 1), m["layers"] * (owners - 1) * width / 2)}
    seconds = {}
    for name, (count, size) in sent.items():
        seconds[name] = count * cost[1] * 1e-3 + size / (options.gbps * 1e9)
    agreements = 4  # calls of a step with one pass and one micro-batch, as counted
    seconds["agreement"] = agreements * math.ceil(math.log2(ranks)) * options.latency_us * 1e-6
    return sent, seconds


def print_forecast(cost, options):
    print(f"Extrapolated, not measured: Llama-2-70B's shape, LoRA rank 16, one micro-batch of {MODEL['tokens']} tokens a rank and step;")
    print(f"{1e3 * cost[1]:.2f} us of CPU a message (fitted above, beside {cost[0]:.0f} ms of waiting), {options.latency_us:g} us latency, "
          f"{options.gbps:g} GB/s a rank, nothing hidden behind compute.\n")
    print("| ranks | shard.group | messages a rank | units s | embedding s | gradients s | lora s | agreement ms | of it messages s |")
    print("|---" * 9 + "|")
    for ranks in (64, 128, 256, 512, 1024):
        for name, group in (("world", ranks), ("8", 8)):
            sent, seconds = forecast(ranks, group, cost, options)
            count = sum(number for number, _ in sent.values())
            print(f"| {ranks} | {name} | {count} | {seconds['units']:.2f} | {seconds['embedding']:.3f} | {seconds['gradients']:.3f} "
                  f"| {seconds['lora']:.3f} | {1e3 * seconds['agreement']:.2f} | {count * cost[1] * 1e-3:.3f} |")


def draw(rows, cost, path):
    try:
        import matplotlib
    except ImportError:
        sys.exit(f"scaling.py: {path} is not drawn: matplotlib is not installed for {sys.executable}")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    ranks = [row["ranks"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.plot(ranks, [row["launch_s"] for row in rows], "o-", label="launch (mpirun, MPI)")
    left.plot(ranks, [row["startup_s"] for row in rows], "s-", label="start-up (base, buffers)")
    left.set(xscale="log", yscale="log", xlabel="ranks", ylabel="seconds", title="until the first step")
    right.plot(ranks, [overhead_ms(r, rows) for r in rows], "o", label="measured")
    right.plot(ranks[1:], [cost[0] + r["ranks"] * messages(r) * cost[1] for r in rows[1:]], "-",
               label=f"{cost[0]:.0f} ms + {1e3 * cost[1]:.1f} us a message")
    right.set(xscale="log", xlabel="ranks", ylabel="CPU ms a step, all ranks", title="overhead")
    for axes in (left, right):
        axes.set_xticks(ranks, [str(n) for n in ranks])
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--qshard", default=os.path.join(TOP, "build", "release", "qshard"), help="the program")
    parser.add_argument("--base", help="a base of the tiny model; default: made")
    parser.add_argument("--ranks", type=int, action="append", help="numbers of ranks, from 1 on; default 1, 2, 4, ... 64")
    parser.add_argument("--repeats", type=int, default=10, help="steps that are measured")
    parser.add_argument("--latency-us", type=float, default=5.0, help="of a message, for the extrapolation")
    parser.add_argument("--gbps", type=float, default=20.0, help="10^9 bytes a second that a rank receives, likewise")
    parser.add_argument("--json", help="write the measured rows there")
    parser.add_argument("--plot", help="draw them there (PNG)")
    options = parser.parse_args()
    counts = sorted(set(options.ranks or (1, 2, 4, 8, 16, 32, 64)) | {1})
    with tempfile.TemporaryDirectory() as folder:
        base = options.base or make_base(options.qshard, folder)
        rows = [measure(options.qshard, base, ranks, options.repeats, folder) for ranks in counts]
    if len({row["loss"] for row in rows}) != 1:
        sys.exit(f"scaling.py: the loss depends on the ranks: {[row['loss'] for row in rows]}")
    print(f"qshard {rows[0]['commit']}, {rows[0]['cpu']}, {len(os.sched_getaffinity(0))} cores\n")
    print_measured(rows)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)
            file.write("\n")
    cost = fit(rows)
    if cost is None:
        print("no extrapolation: it needs two counts of ranks above that of the cores", file=sys.stderr)
    else:
        print_forecast(cost, options)
    if options.plot and cost is not None:
        draw(rows, cost, options.plot)


if __name__ == "__main__":
    main()
