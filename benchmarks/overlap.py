#!/usr/bin/env python3
"""Step time against the rate of the link between two hosts, with one base over both and with a copy each.

    benchmarks/overlap.py --qshard build/ci/qshard [--rates MBIT...] [--steps N] [--repeats N] [--json FILE] [--plot FILE.png]

The hosts are network namespaces of this machine (root; tests/e2e/two_hosts.sh), joined by tests/support/slow_link.c, which the
tests build beside the program; a rank of one thread on each. The model is made here: 8 layers, 512 wide, no vocabulary to speak
of. Beside each time stands what the formula says: every layer that has to be gathered, up or down, takes the longer of its gather
and the compute of the one before,

    step = step without waiting + passes (U max(0, g - f) + D max(0, g - b))

g: bytes of a layer that a rank receives / rate; f: forward of a layer, which the program measures at its start (T* = g / f per
token); b: the rest of a layer's share of the step; U, D: layers gathered upwards and downwards (the buffers keep some). The
bend is where g = f, at T* = the tokens of a pass. Rates take turns, so that a noisy machine is noisy to all; medians.
"""
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

TOP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
HOSTS = os.path.join(TOP, "tests", "e2e", "two_hosts.sh")
PREP = os.path.join(TOP, "src", "prep")
LAYERS, TOKENS, BUFFERS, PASSES = 8, 256, 2, 4
MODEL = ("--layers", LAYERS, "--hidden", 512, "--heads", 8, "--kv-heads", 4, "--ffn", 1408, "--examples", 4000)
SETTINGS = {"train.seq_len": TOKENS, "train.global_batch": 2 * PASSES, "train.micro_batch": 1, "train.recompute": "full",
            "train.gather_group": 1, "train.eval_every": 0, "train.save_every": 0, "data.eval": "", "lora.dropout": 0}
ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1",
               "OMPI_MCA_rmaps_base_oversubscribe": "1", "QSHARD_HOSTS_TAG": f"qo{os.getpid()}"}
SKIPPED = 3  # steps of a run: algorithms, caches, the first gathers


def run(command, qshard):
    slow_link = os.path.join(os.path.dirname(os.path.abspath(qshard)), "tests", "slow_link")
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          env={**os.environ, **ENVIRONMENT, "QSHARD_SLOW_LINK": slow_link}, check=False)
    if done.returncode != 0:
        sys.exit(f"overlap.py: {' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    return done.stdout + done.stderr


def make_files(qshard, folder):
    model = os.path.join(folder, "model")
    run([sys.executable, os.path.join(PREP, "qshard_tiny.py"), model, *MODEL], qshard)
    run([sys.executable, os.path.join(PREP, "qshard_prep.py"), "--model", model, os.path.join(model, "train.jsonl"),
         "-o", os.path.join(folder, "train.h5"), "--seq-len", TOKENS, "--pack"], qshard)
    run([qshard, "quantize", model, "-o", os.path.join(folder, "base.h5")], qshard)


def measure(qshard, folder, rate, group, steps):
    """One run: seconds of its steps, what of them was waiting for gathers, and what the program said of its links."""
    output = os.path.join(folder, "run")
    shutil.rmtree(output, ignore_errors=True)
    settings = {**SETTINGS, "base": f"{folder}/base.h5", "data.train": f"{folder}/train.h5", "output": output,
                "train.steps": steps, "shard.group": group}
    run([HOSTS, "down"], qshard)
    run([HOSTS, "up", rate], qshard)
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    said = run([HOSTS, "run", 2, qshard, "train", os.path.join(TOP, "inputs", "tiny.yaml"), *words], qshard)
    run([HOSTS, "down"], qshard)
    with open(os.path.join(output, "metrics.jsonl"), encoding="utf-8") as file:
        lines = [line for line in map(json.loads, file) if "loss" in line][SKIPPED:]
    with open(os.path.join(output, "ranks.jsonl"), encoding="utf-8") as file:
        foreign = max(json.loads(line)["foreign_bytes"] for line in file)
    found = re.search(r"takes (\S+) ms \((\S+) MB from .* forward (\S+) ms a token; .* T\* = (\d+)", said)
    return {"step_s": [line["step_time_s"] for line in lines], "wait_s": [line["wait_s"] for line in lines],
            "foreign_bytes": foreign / steps, **({} if found is None else {
                "gather_s": float(found[1]) / 1e3, "received_bytes": float(found[2]) * 1e6,
                "token_s": float(found[3]) / 1e3, "hidden_from": int(found[4])})}


def collect(options, folder):
    """{group: {rate: runs}}; rates and groups take turns."""
    runs = {group: {rate: [] for rate in options.rates} for group in ("world", "node")}
    for _ in range(options.repeats):
        for rate in options.rates:
            for group, of_group in runs.items():
                of_group[rate].append(measure(options.qshard, folder, rate, group, options.steps))
    return runs


def median_of(runs, what):
    values = [value for one in runs for value in (one[what] if isinstance(one[what], list) else [one[what]])]
    return statistics.median(values)


def predicted(free_s, gather_s, forward_s):
    """The formula above, for a step that takes free_s when nothing waits."""
    backward_s = free_s / PASSES / LAYERS - forward_s
    return free_s + PASSES * ((LAYERS - BUFFERS) * max(0.0, gather_s - forward_s)
                              + (LAYERS - 1) * max(0.0, gather_s - backward_s))


def summarize(runs, rates):
    """A line a rate. The free step is the fastest link's, its waits taken off."""
    world = runs["world"]
    free_s = min(median_of(of_rate, "step_s") - median_of(of_rate, "wait_s") for of_rate in world.values())
    forward_s = TOKENS * statistics.median(median_of(of_rate, "token_s") for of_rate in world.values())
    received = median_of(world[rates[0]], "received_bytes")
    lines = []
    for rate in rates:
        gather_s = 8 * received / (rate * 1e6) if rate > 0 else 0.0
        lines.append({"mbit": rate, "gather_s": gather_s, "gather_over_forward": gather_s / forward_s,
                      "world_s": median_of(world[rate], "step_s"), "waited_s": median_of(world[rate], "wait_s"),
                      "predicted_s": predicted(free_s, gather_s, forward_s),
                      "node_s": median_of(runs["node"][rate], "step_s"),
                      "hidden_from": median_of(world[rate], "hidden_from"),
                      "world_bytes": median_of(world[rate], "foreign_bytes"),
                      "node_bytes": median_of(runs["node"][rate], "foreign_bytes")})
    return {"free_s": free_s, "forward_s": forward_s, "received_bytes": received, "tokens": TOKENS, "lines": lines}


def show(summary):
    print(f"a step without waiting {summary['free_s']:.3f} s; a layer: forward {1e3 * summary['forward_s']:.1f} ms, "
          f"{summary['received_bytes'] / 1e6:.3f} MB received; bend expected at "
          f"{8e-6 * summary['received_bytes'] / summary['forward_s']:.0f} Mbit/s, where T* = {summary['tokens']} tokens")
    print("Mbit/s  gather/forward      T*   world s  formula s  waited s    node s   MB a step between hosts: world, node")
    for line in summary["lines"]:
        print(f"{line['mbit'] or 'any':>6}  {line['gather_over_forward']:>14.2f}  {line['hidden_from']:>6.0f}  {line['world_s']:>8.3f}  "
              f"{line['predicted_s']:>9.3f}  {line['waited_s']:>8.3f}  {line['node_s']:>8.3f}   "
              f"{line['world_bytes'] / 1e6:.2f}, {line['node_bytes'] / 1e6:.2f}")


def plot(summary, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    lines = [line for line in summary["lines"] if line["mbit"] > 0]
    rates = [line["mbit"] for line in lines]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    axes.plot(rates, [line["world_s"] for line in lines], "o-", label="one base over both hosts")
    axes.plot(rates, [line["predicted_s"] for line in lines], "--", label="formula")
    axes.plot(rates, [line["node_s"] for line in lines], "s-", label="a copy on each host")
    axes.axvline(8e-6 * summary["received_bytes"] / summary["forward_s"], color="gray", linestyle=":", label="T* = tokens of a pass")
    axes.set(xscale="log", xlabel="link, Mbit/s", ylabel="step, s", ylim=(0, None))
    axes.set_xticks(rates, map(str, rates))
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--qshard", required=True, help="the program; tests/slow_link beside it")
    parser.add_argument("--rates", type=int, nargs="+", default=[0, 1600, 800, 400, 200, 100, 50], help="Mbit/s, 0: no limit")
    parser.add_argument("--steps", type=int, default=8, help="of a run; the first three are left out [%(default)s]")
    parser.add_argument("--repeats", type=int, default=3, help="of every rate, in turns [%(default)s]")
    parser.add_argument("--json", help="write what was measured")
    parser.add_argument("--plot", help="write a picture (needs matplotlib)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_files(options.qshard, folder)
        summary = summarize(collect(options, folder), options.rates)
    show(summary)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=1)
    if options.plot:
        plot(summary, options.plot)


if __name__ == "__main__":
    main()
