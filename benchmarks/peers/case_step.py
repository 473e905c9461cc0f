"""A whole QLoRA step: ours against transformers + peft + bitsandbytes, the same model, adapter, tokens and threads.

The peer's process stays, ours starts anew for each turn, so ours has a step of warm-up in each. Steps of the longest workload
take so long that the first one counts, for both. bf16 first has to finish a step within a limit that shows the aim.
"""
import time

from . import stats
from .client import PeerError
from .context import SETTINGS
from .ours import aimed_at, gemm_settings, require_products
from .tables import AIMS, by_path, judged, versus

LOSS_OFF = {"float32": 1e-3, "bfloat16": 2e-2}  # the latter where either side multiplies in less than fp32
COMPILE_S = 90.0
STEP_S = 600.0  # a step of the peer that takes longer is left out
HURRIED_S = 90.0  # the shortest step with both sides' models, twice what it takes on a quiet machine
HELPS = 1.05


class Workload:
    """A model and a length; `warm` steps that do not count, `turns`. Ours is run with everything that `cpu.gemm` can be."""

    def __init__(self, context, model, length, warm, turns):
        self.context, self.model, self.length, self.warm = context, model, length, warm
        self.turns = context.turns(turns)
        self.adapter = context.path("adapter-" + model["name"].split()[-1])
        self.for_peer = context.quantized_for_peer(model)["folder"]
        self.settings = context.workload(model, length, 4, adapter=self.adapter)
        self.runs = {path: [] for path in gemm_settings(context.cpu)}

    def our_turn(self):
        """{path: seconds of the step that counts}."""
        for path, runs in self.runs.items():
            runs.append(self.context.program.train({**self.settings, "gemm": path}, self.warm + 1))
        return {path: runs[-1]["seconds"][-1] for path, runs in self.runs.items()}

    def seconds(self, path):
        return [run["seconds"][-1] for run in self.runs[path]]

    def off(self, losses):
        """{path: largest relative distance to the peer's losses}, of the steps that both did from the same start."""
        return {path: stats.worst_off(runs[0]["losses"], losses) for path, runs in self.runs.items()}


def measure(context, workload, dtype, limit_s, compiled):
    """The peer with that dtype in turns with ours, the peer first.

    {"theirs": seconds of each turn, "ours": {path: seconds} of each turn, "mib", "losses"}. Gone if its first step takes
    longer than the limit, or does not fit into memory.
    """
    with context.peer() as peer:
        peer.ask("load", model=workload.for_peer, adapter=workload.adapter, dtype=dtype, recompute="none",
                 compiled=compiled)
        order, done, losses = context.program.order(workload.settings, workload.warm + 1), 0, []
        theirs, ours = [], []

        def step():
            nonlocal done
            answer = peer.ask("step", limit_s=limit_s, data=workload.settings["tokens"], length=workload.length,
                              sequence=order[done % len(order)])
            done += 1
            losses.append(answer["loss"])
            return answer["seconds"]

        for _ in range(workload.warm):
            step()
        for _ in range(workload.turns):
            theirs.append(step())
            ours.append(workload.our_turn())
        return {"theirs": theirs, "ours": ours, "mib": peer.ask("peak")["mib"], "losses": losses}


def compile_helps(context, workload):
    """Whether torch.compile makes the peer's fp32 step faster: tried once, in a process of its own, within COMPILE_S."""
    seconds = {}
    with context.peer() as peer:
        for compiled in (False, True):
            begin = time.monotonic()
            try:
                peer.ask("load", model=workload.for_peer, adapter=workload.adapter, dtype="float32", recompute="none",
                         compiled=compiled)
                for _ in range(3):
                    left = max(1.0, COMPILE_S - (time.monotonic() - begin))
                    seconds[compiled] = peer.ask("step", limit_s=left, data=workload.settings["tokens"],
                                                 length=workload.length, sequence=0)["seconds"]
            except (stats.Gone, PeerError) as error:
                context.log(f"torch.compile is not used: {error}")
                return False
    gain = seconds[False] / seconds[True]
    context.log(f"torch.compile has {gain:.2f} times eager's speed: {'used' if gain > HELPS else 'not used'}")
    return gain > HELPS


def compare(workload, name, side, row):
    """The peer's figures in that setting, beside each of ours, into the row. How far the losses are off, as texts."""
    cut_off, offs = "over" in side, []
    for path in workload.runs:
        pair = ((workload.seconds(path), [side["over"]]) if cut_off else
                ([turn[path] for turn in side["ours"]], side["theirs"]))
        aim = AIMS["step"][name] if path == aimed_at(workload.runs) else None
        row["ratios"][versus(path, name)] = judged(stats.ratio(*pair), aim, more=cut_off)
    if not cut_off:
        row["theirs"][name] = {**stats.figure([workload.length / seconds for seconds in side["theirs"]]), "mib": side["mib"]}
        for path, off in workload.off(side["losses"]).items():
            offs.append(f"{versus(path, name)} {off:.1e}")
            if not off <= LOSS_OFF[SETTINGS[name] if path == "strict" else "bfloat16"]:
                row["wrong"].append(f"the loss of {path} and that of the peer's {name} differ by {off:.1e}")
    return offs


def bound_of(context, workload):
    """What a step would take if it were its products alone, all of them at a path's own rate."""
    bounds, facts = context.bounds(), {}
    for path in workload.runs:
        gflop = workload.runs[path][0]["gflop"]
        rate = bounds["products GFLOP/s" if path == "strict" else f"{path} products GFLOP/s"]
        reached = gflop / rate / stats.figure(workload.seconds(path))["median"]
        facts[path] = (f"{workload.length * rate / gflop:.0f} tokens/s: {gflop:.0f} GFLOP at {rate:.0f} GFLOP/s, "
                       f"{100 * reached:.0f} %")
    return by_path(facts)


def one_workload(context, workload, hopeless, compiled):
    """A row. `hopeless`: settings that were over their limit with shorter sequences; those of this row are added."""
    length = workload.length
    row = {"what": f"{workload.model['name']}, T {length}", "unit": "tokens/s", "ours": {}, "theirs": dict.fromkeys(SETTINGS),
           "ratios": {}, "facts": {}, "wrong": []}
    found, offs = {}, []
    for name, dtype in SETTINGS.items():
        if name in hopeless:
            row["theirs"][name] = {"note": f"left out: {hopeless[name]}"}
            continue
        limit_s = STEP_S
        if name == "bf16" and any(workload.runs.values()):  # the aim is shown when it takes longer than that
            limit_s = max(30.0, 1.1 * AIMS["step"][name] * stats.figure(workload.seconds(aimed_at(workload.runs)))["median"])
        context.log(f"step {row['what']}: the peer in {name}")
        try:
            found[name] = measure(context, workload, dtype, limit_s, compiled and name == "fp32")
        except stats.Gone as gone:
            row["theirs"][name] = {"note": str(gone)}
            hopeless[name] = f"{gone} at T {length}"
            if str(gone).startswith("over"):
                found[name] = {"over": limit_s}
    if not any(workload.runs.values()):
        workload.our_turn()
    for path in workload.runs:
        row["ours"][path] = {**stats.figure([length / seconds for seconds in workload.seconds(path)]),
                             "mib": max(run["mib"] for run in workload.runs[path])}
    for name, side in found.items():
        offs += compare(workload, name, side, row)
    row["facts"]["bound"] = bound_of(context, workload)
    row["facts"]["loss off by"] = ", ".join(offs)
    return row


def workloads(context):
    """Longer steps have fewer turns; the longest is not warmed up, on either side."""
    small = context.small_model()
    if context.quick:
        return [Workload(context, small, 128, 1, 1)]
    if context.hurried:
        return [Workload(context, small, 512, 1, 1)]
    big = context.big_model()
    return [Workload(context, small, 512, 1, 3), Workload(context, small, 2048, 1, 3), Workload(context, big, 512, 1, 2),
            Workload(context, big, 2048, 0, 2)]


def run(context):
    require_products(context.program, context.cpu)
    if not context.has_time("SmolLM2-135M, T 512", HURRIED_S):
        return []
    rows, hopeless, compiled = [], {}, False if context.hurried else None
    for workload in workloads(context):
        if compiled is None:
            compiled = compile_helps(context, workload)
        rows.append(one_workload(context, workload, hopeless.setdefault(workload.model["name"], {}), compiled))
    return rows
