#!/usr/bin/env python3
"""A table of finished runs on different numbers of ranks, for strong or weak scaling: a line a run, the fewest ranks first.

    benchmarks/scaling_table.py RUN... [--skip 2] [--finished] [-o TABLE.csv]

RUN is a run directory; slurm/scaling.sbatch makes a row of them. Runs of one number of nodes and ranks are repetitions: a line
each. Needs nothing but Python.

    step_s, tokens_per_s       median over the steps that count, all but the first --skip of the run; p25, p75: of the time
    compute_s, wait_s, ...     medians as well, of rank 0: wait_s is what compute stood still for gathers, reduce_s for sums of gradients
    speedup                    tokens_per_s over that of the first line (of its repetitions the median)
    efficiency                 speedup over the ratio of ranks: right for a fixed global batch (strong) and one per rank (weak)
    shard_group, gather_group, keep_resident, keep_decoded
                               what the settings stood for: where they differ between lines, so does the algorithm, and a note
                               says so. Fix them for a curve: --set shard.group=world --set train.gather_group=1 ...
    peak_bytes                 the most that any rank held
    loss                       of the last step: the same bits in every line of a strong scaling
"""

import argparse
import csv
import json
import os
import statistics
import sys

SETTINGS = ("shard_group", "gather_group", "keep_resident", "keep_decoded")
TIMES = ("compute_s", "wait_s", "reduce_s", "optimizer_s", "lora_s")


def read(run, name, parse):
    path = os.path.join(run, name)
    try:
        with open(path, encoding="utf-8") as file:
            return parse(file)
    except (OSError, ValueError) as error:
        sys.exit(f"scaling_table.py: {path}: {error}; a run directory of qshard train is wanted")


def lines_of(run, name):
    return read(run, name, lambda file: [json.loads(line) for line in file])


def object_of(run, name):
    return read(run, name, json.load)


def median(values):
    """Of those that are numbers: a GPU's queue does not tell how long a gather was under way."""
    values = [value for value in values if value is not None]
    return statistics.median(values) if values else None


def quartiles(values):
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def is_finished(run):
    """One that has not written run.json yet is not."""
    return os.path.exists(os.path.join(run, "run.json")) and object_of(run, "run.json").get("finished", False)


def row_of(run, skip):
    about = object_of(run, "run.json")
    if about.get("starts", 1) != 1:
        sys.exit(f"scaling_table.py: {run}: was started {about['starts']} times; a run without interruption is wanted")
    steps = [line for line in lines_of(run, "metrics.jsonl") if "step_time_s" in line]
    counted = steps[skip:]
    if not counted:
        sys.exit(f"scaling_table.py: {run}: has {len(steps)} steps, of which --skip {skip} leaves none")
    ranks = lines_of(run, "ranks.jsonl")
    last = [line for line in ranks if line["step"] == ranks[-1]["step"]]
    low, high = quartiles([line["step_time_s"] for line in counted])
    return {
        "nodes": len(set(about["hosts"])), "ranks": about["nranks"], "steps": len(counted),
        "global_tokens": median([line["all_tokens"] for line in counted]),
        "step_s": median([line["step_time_s"] for line in counted]), "step_p25_s": low, "step_p75_s": high,
        "tokens_per_s": median([line["tokens_per_s"] for line in counted]), "speedup": None, "efficiency": None,
        **{name: median([line.get(name) for line in counted]) for name in TIMES},
        **{name: last[0].get(name) for name in SETTINGS},
        "peak_bytes": max(line["peak_bytes"] for line in last), "loss": repr(steps[-1]["loss"]),
        "build": about.get("build"), "hosts": " ".join(sorted(set(about["hosts"]))), "run": run,
    }


def compare(rows):
    """Speed-up and efficiency against the fewest ranks."""
    rows.sort(key=lambda row: (row["ranks"], row["nodes"], row["run"]))
    first = rows[0]["ranks"]
    base = median([row["tokens_per_s"] for row in rows if row["ranks"] == first])
    for row in rows:
        row["speedup"] = row["tokens_per_s"] / base
        row["efficiency"] = row["speedup"] * first / row["ranks"]


def warn(rows):
    for name in (*SETTINGS, "build"):
        values = sorted({str(row[name]) for row in rows})
        # a group of all ranks is the same on paper, and grows with them
        if len(values) > 1 and not (name == "shard_group" and all(row[name] == row["ranks"] for row in rows)):
            print(f"scaling_table.py: {name} differs between the lines ({', '.join(values)}): they do not run the same", file=sys.stderr)


def written(value):
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def write(rows, file):
    table = csv.writer(file, lineterminator="\n")
    table.writerow(rows[0])
    for row in rows:
        table.writerow([written(value) for value in row.values()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+")
    parser.add_argument("--skip", type=int, default=2, metavar="N", help="steps at the beginning of each run that do not count (default 2)")
    parser.add_argument("--finished", action="store_true", help="leave out runs that are not finished")
    parser.add_argument("-o", "--output", metavar="TABLE.csv", help="written when it is complete; else to the terminal")
    options = parser.parse_args()
    finished = [run for run in options.runs if is_finished(run)]
    if len(finished) < (1 if options.finished else len(options.runs)):
        sys.exit("scaling_table.py: not finished: " + ", ".join(run for run in options.runs if run not in finished))
    rows = [row_of(run, options.skip) for run in finished]
    compare(rows)
    warn(rows)
    if options.output is None:
        write(rows, sys.stdout)
        return
    temporary = f"{options.output}.tmp-{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            write(rows, file)
        os.replace(temporary, options.output)
    except OSError as error:
        sys.exit(f"scaling_table.py: {options.output}: {error}")


if __name__ == "__main__":
    main()
