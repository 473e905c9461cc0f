"""NF4 to numbers, over and over: a matrix that caches hold, and one that they do not."""
from . import stats
from .context import SETTINGS
from .ours import operations
from .tables import AIMS, judged

SHAPES = {"cached": (1024, 1024), "DRAM": (14336, 4096)}
NF4_BYTES = 0.5 + 1 / 64 + 4 / 16384  # a weight: code, its share of absmax and of the nested absmax


def one_matrix(context, peer, where, shape):
    weights, wrong = shape[0] * shape[1], []

    def our_turn():
        return operations(context.program.bench("decode", "--shape", f"{shape[0]}x{shape[1]}"))

    def their_turn(dtype):
        return peer.ask("decode", out=shape[0], dtype=dtype, repeats=7, check=False, **{"in": shape[1]})

    for name, dtype in SETTINGS.items():  # equal bits first: both are compared with the format's definition
        off = peer.ask("decode", out=shape[0], dtype=dtype, repeats=0, check=True, **{"in": shape[1]})["wrong"]
        if off:
            wrong.append(f"{off} weights of the peer's {name} are not what the format says")
    results = stats.in_turns({"ours": our_turn, **{name: lambda dtype=dtype: their_turn(dtype)
                                                   for name, dtype in SETTINGS.items()}}, context.turns(5))
    row = {"what": f"{shape[0]}x{shape[1]}, {where}", "unit": "Gweights/s", "ours": {}, "theirs": {}, "ratios": {}, "facts": {},
           "wrong": wrong}
    paths = [path for kind, path in results["ours"][0] if kind == "decode"]
    rates = {path: [weights / turn["decode", path]["time"] / 1e6 for turn in results["ours"]] for path in paths}
    row["ours"] = {path: stats.figure(rates[path]) for path in paths}
    best = max(paths, key=lambda path: row["ours"][path]["median"])
    first = results["ours"][0]["decode", best]
    written = first["rate"] * first["time"] * 1e6 / weights - NF4_BYTES
    copy = stats.figure([turn["decode", best]["bound"] for turn in results["ours"]])["median"]
    row["facts"]["written by qshard"] = f"{written:.0f} bytes a weight"
    row["facts"]["a copy"] = f"{copy:.1f} GB/s: {copy / (NF4_BYTES + written):.1f} Gweights/s of qshard, " \
                             f"{copy / (NF4_BYTES + 2):.1f} of bf16"
    for name in SETTINGS:
        theirs = [weights / stats.figure(answer["seconds"])["median"] / 1e9 for answer in results[name]]
        row["theirs"][f"to {name}"] = stats.figure(theirs)
        row["ratios"][f"to {name}"] = judged(stats.ratio(rates[best], theirs, lower_is_better=False),
                                             AIMS["decode"][where] if name == "bf16" else None)
    return row


def run(context):
    rows = []
    shapes = {"cached": (1024, 1024), "DRAM": (2048, 2048)} if context.quick else SHAPES
    with context.peer() as peer:
        for where, shape in shapes.items():
            if not context.has_time(f"{shape[0]}x{shape[1]}, {where}"):
                continue
            context.log(f"decode {shape[0]}x{shape[1]}")
            rows.append(one_matrix(context, peer, where, shape))
    return rows
