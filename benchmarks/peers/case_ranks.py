"""Two ranks with half of the threads each against one rank with all: the same step, the base shared."""
from . import stats
from .tables import AIMS, judged

SHARED = ("base shard", "gathered units", "optimizer state")  # what N ranks are to hold less of
LENGTH, SEQUENCES = 512, 2


def mib(run, names=None):
    """Peak MiB of rank 0: of some classes, or in all."""
    table = run["memory"]
    return sum(table[name][1] for name in names) if names else table["total"][1]


def run(context):
    model = context.big_model()
    length = 128 if context.quick else LENGTH
    settings = context.workload(model, length, 4, batch=SEQUENCES)
    each = max(1, context.threads // 2)
    context.log(f"ranks {model['name']}, T {SEQUENCES} x {length}")
    sides = {"one": lambda: context.program.train(settings, 2), "two": lambda: context.program.train(settings, 2, 2, each)}
    results = stats.in_turns(sides, context.turns(2))
    one, two = results["one"], results["two"]
    seconds = {name: [turn["seconds"][-1] for turn in turns] for name, turns in results.items()}
    row = {"what": f"{model['name']}, {SEQUENCES} x {length} tokens", "unit": "s", "theirs": {}, "wrong": [],
           "ours": {f"1 rank, {context.threads} threads": {**stats.figure(seconds["one"]), "mib": mib(one[0])},
                    f"2 ranks, {each} threads": {**stats.figure(seconds["two"]), "mib": mib(two[0])}}}
    plan, peak = two[0]["memory"]["total"]
    bytes_of = {name: mib(turns[0], SHARED) for name, turns in results.items()}
    row["ratios"] = {"time": judged(stats.ratio(seconds["one"], seconds["two"]), AIMS["ranks"]["time"], most=True),
                     "bytes": judged(stats.figure([bytes_of["two"] / bytes_of["one"]]), AIMS["ranks"]["bytes"], most=True),
                     "plan": judged(stats.figure([max(peak / plan, plan / peak)]), AIMS["ranks"]["plan"], most=True)}
    row["facts"] = {"base, gathered units, optimizer: MiB": f"{bytes_of['one']:.0f} and {bytes_of['two']:.0f}",
                    "plan and peak of 2 ranks: MiB": f"{plan:.0f} and {peak:.0f}",
                    "largest resident set: MiB": f"{one[0]['mib']:.0f} and {two[0]['mib']:.0f}"}
    if {tuple(turn["losses"]) for turn in one + two} != {tuple(one[0]["losses"])}:
        row["wrong"].append("the losses of one rank and of two are not the same bits")
    return [row]
