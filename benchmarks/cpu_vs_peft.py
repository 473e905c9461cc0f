#!/usr/bin/env python3
"""Times QLoRA steps of qshard and of transformers + peft + bitsandbytes on this machine's CPU, in turns.

    cpu_vs_peft.py --model HF_DIR --qshard PROGRAM [--tokens T]... [--recompute none|full]... [--json FILE]

Both sides get the same model, the same adapter to begin with (rank 16 on the seven linears, dropout 0), the same random
tokens (one sequence of T a step), the same micro-batch, AdamW, threads and recompute setting (the peer's "full" is its
gradient checkpointing). First their losses over the same steps must agree: fp32 within 1e-3, bf16 within 2e-2, relative.
Then each is started in turn, --repeats times, as a process of its own with a step of warm-up, and the median over the
repeats of each run's median step counts. Memory is the largest resident set of that process. ratio_bf16 and ratio_fp32
are our tokens/s over the peer's. Threads wait asleep on both sides (OMP_WAIT_POLICY): the peer's two OpenMP libraries
spin in each other's way otherwise. benchmarks/cpu_peers has the other cases.

Runs in the oracle's environment (tests/oracle/setup.sh): benchmarks/cpu_vs_peft makes it.
"""
import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time

import h5py
import numpy as np

from peers import models, peer_model
from peers.client import WAITS_ASLEEP
from peers.ours import STEP_YAML, RunError, run_process
from peers.stats import worst_off

WARM = 1
LIMITS = {"float32": 1e-3, "bfloat16": 2e-2}

# --- the peer: a process of its own ---------------------------------------------------------------------------------------
def peer(options):
    """Prints a JSON line: the losses and the seconds of each step."""
    import torch

    torch.set_num_threads(options.threads)
    if options.make_adapter:
        peer_model.with_adapter(peer_model.base_model(options.model, options.dtype), options.adapter)
        return
    model = peer_model.base_model(options.model, options.dtype, options.recompute == "full")
    model = peer_model.with_adapter(model, options.adapter).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    with h5py.File(options.data, "r") as file:
        tokens = torch.from_numpy(file["tokens"][()].astype(np.int64)).view(-1, options.length)
    with open(options.order, encoding="utf-8") as file:
        order = [int(line) for line in file if line.strip()]
    losses, seconds = [], []
    for sequence in order[:options.steps]:
        ids = tokens[sequence][None]
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begin)
        losses.append(loss.item())
    print(json.dumps({"losses": losses, "seconds": seconds, "versions": torch.__version__}))


# --- runs -----------------------------------------------------------------------------------------------------------------
class Bench:
    def __init__(self, options, work):
        self.options, self.work = options, work
        self.base, self.adapter = os.path.join(work, "base.h5"), os.path.join(work, "adapter")
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false",
                            **WAITS_ASLEEP}
        self.number = 0

    def prepare(self):
        run_process([self.options.qshard, "quantize", self.options.model, "-o", self.base], self.environment)
        self.peer_run("float32", 512, "none", 0, more=["--make-adapter"])
        for length in self.options.tokens:
            self.write_tokens(length)

    def tokens_path(self, length):
        return os.path.join(self.work, f"tokens-{length}.h5")

    def order_path(self, length):
        return os.path.join(self.work, f"order-{length}")

    def write_tokens(self, length):
        models.write_tokens(self.tokens_path(length), self.options.model, WARM + self.options.steps, length)

    def ours(self, length, recompute, steps):
        """(losses, seconds of each step, MiB)."""
        self.number += 1
        out, yaml = os.path.join(self.work, f"run-{self.number}"), os.path.join(self.work, f"run-{self.number}.yaml")
        with open(yaml, "w", encoding="utf-8") as file:
            file.write(STEP_YAML.format(base=self.base, tokens=self.tokens_path(length), out=out, steps=steps, batch=1,
                                        length=length, recompute=recompute, adapter=self.adapter, gemm="auto"))
        if os.path.exists(self.order_path(length)):  # of another recompute mode: the same; the program replaces nothing
            os.remove(self.order_path(length))
        run_process([self.options.qshard, "train", yaml, "--dump-order", self.order_path(length)], self.environment)
        _, mib = run_process([self.options.qshard, "train", yaml], self.environment)
        with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as file:
            rows = [row for row in map(json.loads, file) if "step_time_s" in row]
        shutil.rmtree(out)
        return [row["loss"] for row in rows], [row["step_time_s"] for row in rows], mib

    def peer_run(self, dtype, length, recompute, steps, more=()):
        text, mib = run_process(
            [sys.executable, os.path.abspath(__file__), "--peer", "--model", self.options.model, "--adapter", self.adapter,
             "--data", self.tokens_path(length), "--order", self.order_path(length), "--dtype", dtype, "--length", length,
             "--steps", steps, "--recompute", recompute, "--threads", self.options.threads, *more], self.environment)
        if more:
            return None
        row = json.loads(text.splitlines()[-1])
        return row["losses"], row["seconds"], mib


# --- the comparison ---------------------------------------------------------------------------------------------------------
def one_case(bench, length, recompute):
    """A row: medians of the repeats, in turns."""
    options = bench.options
    sides = {"qshard": lambda steps: bench.ours(length, recompute, steps)}
    for dtype in ("bfloat16", "float32"):
        sides[dtype] = lambda steps, dtype=dtype: bench.peer_run(dtype, length, recompute, steps)
    rows = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, side in sides.items():
            rows[name].append(side(WARM + options.steps))
    row = {"tokens": length, "recompute": recompute}
    for name, runs in rows.items():
        rates = [length / statistics.median(seconds[WARM:]) for _, seconds, _ in runs]
        row[name] = {"tokens_per_s": statistics.median(rates), "lowest": min(rates), "highest": max(rates),
                     "peak_mib": max(mib for _, _, mib in runs)}
    for name, limit in LIMITS.items():
        row[name]["loss_off"] = worst_off(rows["qshard"][0][0], rows[name][0][0])
        row[name]["loss_agrees"] = row[name]["loss_off"] <= limit
    row["ratio_bf16"] = row["qshard"]["tokens_per_s"] / row["bfloat16"]["tokens_per_s"]
    row["ratio_fp32"] = row["qshard"]["tokens_per_s"] / row["float32"]["tokens_per_s"]
    return row


def print_row(row):
    cells = [str(row["tokens"]), row["recompute"]]
    for name in ("qshard", "bfloat16", "float32"):
        side = row[name]
        cells.append(f"{side['tokens_per_s']:.0f} ({side['lowest']:.0f} to {side['highest']:.0f}), {side['peak_mib']:.0f} MiB")
    cells += [f"{row['ratio_bf16']:.2f}", f"{row['ratio_fp32']:.2f}"]
    cells.append(", ".join(f"{row[name]['loss_off']:.1e}{'' if row[name]['loss_agrees'] else ' DIFFERS'}"
                           for name in LIMITS))
    print(f"| {' | '.join(cells)} |", flush=True)


def compare(options):
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        bench = Bench(options, work)
        bench.prepare()
        print(f"{options.model}, one sequence a step, {options.threads} threads, {options.repeats} repeats of "
              f"{options.steps} steps in turns, load {os.getloadavg()[0]:.1f} before")
        print()
        print("| T | recompute | qshard: tokens/s, peak | peer bf16 | peer fp32 | ratio bf16 | ratio fp32 | loss off by |")
        print("|---|---|---|---|---|---|---|---|")
        rows = []
        for length in options.tokens:
            for recompute in options.recompute:
                rows.append(one_case(bench, length, recompute))
                print_row(rows[-1])
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"model": options.model, "threads": options.threads, "repeats": options.repeats, "rows": rows}, file,
                      indent=1)
    return 0 if all(row[name]["loss_agrees"] for row in rows for name in LIMITS) else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--qshard", help="the program")
    parser.add_argument("--tokens", type=int, action="append", help="length of a sequence [512]")
    parser.add_argument("--recompute", action="append", choices=["none", "full"], help="[none]")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side [all cores]")
    parser.add_argument("--steps", type=int, default=3, help="that count, of each run [%(default)s]")
    parser.add_argument("--repeats", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--work", help="where runs happen [the temporary folder]")
    parser.add_argument("--json", help="write the rows there")
    for name in ("--peer", "--make-adapter"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    for name in ("--adapter", "--data", "--order", "--dtype"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        options.recompute = options.recompute[0]
        peer(options)
        return 0
    options.tokens, options.recompute = options.tokens or [512], options.recompute or ["none"]
    if not options.qshard:
        parser.error("--qshard: where is the program?")
    try:
        return compare(options)
    except RunError as error:
        sys.exit(f"cpu_vs_peft: {error}")


if __name__ == "__main__":
    sys.exit(main())
