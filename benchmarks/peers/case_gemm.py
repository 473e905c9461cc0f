"""Products with an NF4 matrix, forward and dX: ours against bitsandbytes' decode and torch's product."""
import time

from . import stats
from .client import PeerError
from .context import SETTINGS
from .ours import aimed_at, gemm_settings, operations, require_products
from .tables import AIMS, FP16_SHARE, by_path, judged, versus

SHAPES, TOKENS = ((2048, 2048), (5632, 2048), (4096, 14336)), (128, 512, 2048)
DIRECTIONS = ("forward", "backward")
OFF_AT_MOST = {"float32": 1e-5, "bfloat16": 2e-2}  # of the peer, over the largest of a row: inputs and result are rounded
COMPILE_S = 90.0
HELPS = 1.05


def flops(shape, tokens):
    return 2.0 * shape[0] * shape[1] * tokens


def compile_helps(context, shape, tokens):
    """Whether torch.compile makes fp32's forward faster: tried once, in a process of its own, within COMPILE_S."""
    with context.peer() as peer:
        asked = {"direction": "forward", "out": shape[0], "in": shape[1], "tokens": tokens, "dtype": "float32", "repeats": 3,
                 "slow_s": COMPILE_S}
        try:
            eager, compiled = (min(peer.ask("gemm", limit_s=COMPILE_S, compiled=way, **asked)["seconds"])
                               for way in (False, True))
        except (stats.Gone, PeerError) as error:  # no C++ compiler, for one
            context.log(f"torch.compile is not used: {error}")
            return False
    context.log(f"torch.compile has {eager / compiled:.2f} times eager's speed: "
                f"{'used' if eager / compiled > HELPS else 'not used'}")
    return eager / compiled > HELPS


class Peers:
    """The peer's settings. Slow ones are not asked for what would take longer than the limit, by their rate so far."""

    def __init__(self, context, peer, compiled):
        self.context, self.peer, self.rates, self.compiled = context, peer, {}, compiled

    def ask(self, dtype, direction, shape, tokens):
        """The answer, or Gone with what it would have taken."""
        rate, limit_s = self.rates.get((dtype, direction)), self.context.options.limit
        if rate is not None and flops(shape, tokens) / rate > limit_s:
            raise stats.Gone(f"left out: about {flops(shape, tokens) / rate:.0f} s at its {rate / 1e9:.2g} GFLOP/s")
        answer = self.peer.ask("gemm", direction=direction, out=shape[0], tokens=tokens, dtype=dtype, repeats=3,
                               compiled=self.compiled, slow_s=limit_s / 4, **{"in": shape[1]})
        self.rates[dtype, direction] = flops(shape, tokens) / min(answer["seconds"])
        return answer


def one_product(context, peers, shape, tokens):
    """Two rows, forward and backward."""
    work, notes = flops(shape, tokens), {}

    def our_turn():
        return operations(context.program.bench("gemm", "--shape", f"{shape[0]}x{shape[1]}", "--tokens", tokens,
                                                "--repeats", 3))

    def their_turn(dtype, direction):
        try:
            return peers.ask(dtype, direction, shape, tokens)
        except stats.Gone as gone:
            notes[dtype, direction] = str(gone)
            raise

    sides = {"ours": our_turn}
    for dtype in SETTINGS.values():
        for direction in DIRECTIONS:
            sides[dtype, direction] = lambda dtype=dtype, direction=direction: their_turn(dtype, direction)
    results = stats.in_turns(sides, context.turns(3))
    rows = []
    for direction in DIRECTIONS:
        row = {"what": f"{'Y' if direction == 'forward' else 'dX'}, {shape[0]}x{shape[1]}, M {tokens}", "unit": "GFLOP/s",
               "ours": {}, "theirs": {}, "ratios": {}, "facts": {}, "wrong": []}
        paths = [path for kind, path in results["ours"][0] if kind == direction]
        rates = {path: [work / turn[direction, path]["time"] / 1e6 for turn in results["ours"]] for path in paths}
        for path in paths:
            row["ours"][path] = {**stats.figure(rates[path]), "error": results["ours"][0][direction, path]["error"]}
        aimed = aimed_at(gemm_settings(context.cpu))  # bf16 has rows on any CPU, and is no faster on most
        bounds = {path: stats.figure([turn[direction, path]["bound"] for turn in results["ours"]])["median"] for path in paths}
        row["facts"]["bound"] = by_path({path: f"{bound:.0f} GFLOP/s, {100 * row['ours'][path]['median'] / bound:.0f} % reached"
                                         for path, bound in bounds.items()})
        for path in paths:
            if "fp16" in path:
                shares = [rate / turn[direction, path]["bound"] for rate, turn in zip(rates[path], results["ours"])]
                row["ratios"][f"{path} of its peak"] = judged(stats.figure(shares), FP16_SHARE)
        for name, dtype in SETTINGS.items():
            answers = results[dtype, direction]
            if not answers:
                row["theirs"][name] = {"note": notes[dtype, direction]}
                continue
            theirs = [work / stats.figure(answer["seconds"])["median"] / 1e9 for answer in answers]
            row["theirs"][name] = {**stats.figure(theirs), "error": answers[0]["error"]}
            if not answers[0]["error"] <= OFF_AT_MOST[dtype]:
                row["wrong"].append(f"{name} of the peer is off by {answers[0]['error']:.1e}")
            for path in paths:
                row["ratios"][versus(path, name)] = judged(stats.ratio(rates[path], theirs, lower_is_better=False),
                                                           AIMS["gemm"][name] if path == aimed else None,
                                                           ceiling=bounds[path] / row["theirs"][name]["median"])
        rows.append(row)
    return rows


def expected(done, work):
    """Seconds of a product of so many FLOPs: the smallest took what each takes to begin, the last one says what is added.

    `done`: (FLOPs, seconds) of those before it, the smallest first."""
    if len(done) < 2:
        return done[0][1] if done else 0.0
    (first, begin), (last, seconds) = done[0], done[-1]
    return begin + max(0.0, seconds - begin) / (last - first) * (work - first)


def run(context):
    require_products(context.program, context.cpu)
    shapes, tokens = (((1024, 1024),), (128,)) if context.quick else (SHAPES, TOKENS)
    compiled = not context.hurried and compile_helps(context, shapes[0], tokens[-1])
    products, rows, done = [(shape, count) for shape in shapes for count in tokens], {}, []
    with context.peer() as peer:
        peers = Peers(context, peer, compiled)
        for product in sorted(products, key=lambda it: flops(*it)) if context.hurried else products:
            (out, columns), count = product
            if not context.has_time(f"{out}x{columns}, M {count}", expected(done, flops(*product))):
                continue
            context.log(f"gemm {out}x{columns}, M {count}")
            begin = time.monotonic()
            rows[product] = one_product(context, peers, *product)
            done.append((flops(*product), time.monotonic() - begin))
    return [row for product in products for row in rows.get(product, [])]
