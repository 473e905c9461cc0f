#!/usr/bin/env python3
"""What qshard does on this machine's CPU beside bitsandbytes, torch, transformers and peft, case by case, in turns.

    cpu_peers.py --qshard PROGRAM --peer-python PYTHON --model HF_DIR [CASE]...      measures: gemm decode step ranks quantize
    cpu_peers.py --json FILE --render                                                 tables of what was measured before

benchmarks/cpu_peers makes what it needs and calls it. Both sides get all cores, one after the other, in turns; a ratio is
taken turn by turn, its median counts, its spread is printed. Results are compared first. The peer runs in fp32 and in bf16,
with torch.compile and sleeping threads where that helps, and with a malloc that keeps memory. Bounds are measured in the
same run: products by a register tile in the L1 cache, and a copy. --json FILE keeps cases that are not measured now, so that
a run may be continued. Exit code 5: a result is wrong; aims that are not met are printed, and are no failure.
--seconds S is for a machine that is at hand for minutes: one turn, no torch.compile, of steps the shortest alone, and what
does not fit into S seconds is left out by name.
"""
import argparse
import datetime
import importlib.util
import json
import os
import sys

from peers import client, ours, tables

CASES = ("gemm", "decode", "step", "ranks", "quantize")
ABOUT = {
    "gemm": "Products with NF4 matrices; `of` is the ratio that products at the bound would have.",
    "decode": "NF4 to numbers. qshard writes what its products read, the peer bf16 or fp32.",
    "step": "A QLoRA step of one sequence: rank 16 on seven linears, AdamW, no recompute.",
    "ranks": "Two ranks with half of the threads each against one with all: the same step, the same bits.",
    "quantize": "A bf16 checkpoint to NF4 with double quantization, file to file.",
}
WRONG = 5
NO_MODEL = {"gemm", "decode"}


def read_json(path):
    """What an earlier run left, or an empty report. An end with one line where it is something else."""
    if not path or not os.path.exists(path):
        return {"format": "cpu-peers", "cases": {}}
    try:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        if report["format"] != "cpu-peers" or not isinstance(report["cases"], dict):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        ours.fail(f"{path}: is not what --json writes")
    return report


def write_json(path, report):
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
        file.write("\n")
    os.replace(path + ".part", path)


def markdown(report):
    """All tables, the aims first."""
    cases = {name: report["cases"][name] for name in CASES if name in report["cases"]}
    parts = [tables.summary_of({name: case["rows"] for name, case in cases.items()})]
    for name, case in cases.items():
        about = case["about"]
        where = (f"{about['cpu']} ({', '.join(about['flags'])}), {about['threads']} threads, qshard {about['commit']}, "
                 f"{about['date']}, load {about['load']:.1f} before{', a smoke run' if about['quick'] else ''}")
        parts += [f"### {name}", f"{ABOUT[name]} {where}; {about['peers']}", tables.markdown_of(case["rows"])]
        if about.get("left_out"):
            parts.append(f"Left out for want of time: {'; '.join(about['left_out'])}.")
    return "\n\n".join(parts) + "\n"


def measure(options, report):
    """Runs the cases; each is written as soon as it is there. The texts of what is wrong."""
    from peers.context import Context

    context, wrong = Context(options), []
    versions = context.choose_peer_settings()
    peers = (f"torch {versions['torch']} ({versions['cpu_capability']}, bf16 "
             f"{'by oneDNN' if versions['bf16_in_onednn'] else 'without oneDNN'}), transformers {versions['transformers']}, "
             f"peft {versions['peft']}, bitsandbytes {versions['bitsandbytes']}"
             f"{', OMP_WAIT_POLICY=PASSIVE' if context.peer_settings else ''}.")
    commit = context.program.bench("decode", "--shape", "64x64", "--repeats", "1")["commit"]
    for name in options.cases or CASES:
        about = {"cpu": context.cpu["name"], "flags": context.cpu["flags"], "threads": context.threads, "commit": commit,
                 "date": datetime.date.today().isoformat(), "load": os.getloadavg()[0], "peers": peers,
                 "quick": options.quick}
        context.left_out = []
        rows = importlib.import_module(f"peers.case_{name}").run(context)
        about["left_out"] = context.left_out
        if not rows:
            continue
        report["cases"][name] = {"about": about, "rows": rows}
        if options.json:
            write_json(options.json, report)
        print(f"\n{tables.markdown_of(rows)}\n", flush=True)
        wrong += [f"{name}: {text}" for text in tables.wrong_of(rows)]
    return wrong


def show(options, report):
    if options.markdown:
        text = markdown(report)
        if os.path.exists(options.markdown):
            with open(options.markdown, encoding="utf-8") as file:
                try:
                    text = tables.between_marks(file.read(), text)
                except ValueError as error:
                    ours.fail(f"{options.markdown}: {error}")
        with open(options.markdown, "w", encoding="utf-8") as file:
            file.write(text)
    if options.plot:
        from peers import plot

        about = next(iter(report["cases"].values()))["about"]
        try:
            plot.draw({name: case["rows"] for name, case in report["cases"].items()}, options.plot,
                      f"qshard {about['commit']} on {about['cpu']}, {about['threads']} threads")
        except ImportError:
            ours.fail(f"{options.plot} is not drawn: {sys.executable} has no matplotlib")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)} [all]")
    parser.add_argument("--qshard", help="the program")
    parser.add_argument("--peer-python", help="Python of the peers' environment (tests/oracle/setup.sh)")
    parser.add_argument("--model", help="directory of SmolLM2-135M")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side [all cores]")
    parser.add_argument("--turns", type=int, default=0, help="of each side [as a case needs: 2 to 5]")
    parser.add_argument("--limit", type=float, default=20.0,
                        help="seconds of a peer's product; what takes longer is left out [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="a turn of small shapes: does it work?")
    parser.add_argument("--seconds", type=float, default=0.0,
                        help="what fits into so many, a turn each, without torch.compile; of steps the shortest [no limit]")
    parser.add_argument("--work", default="build/cpu_peers", help="checkpoints and bases are kept there, 4 GB [%(default)s]")
    parser.add_argument("--json", help="keep the results there, with those of cases that are not measured now")
    parser.add_argument("--plot", help="draw the ratios there (PNG, needs matplotlib)")
    parser.add_argument("--markdown", help="write the tables there, between the marks of a file that has them")
    parser.add_argument("--render", action="store_true", help="measure nothing: tables and plot of --json FILE")
    options = parser.parse_args(argv)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]}: there are {', '.join(CASES)}")
    if options.threads < 1 or options.turns < 0 or options.limit <= 0 or options.seconds < 0:
        parser.error("--threads and --limit are above 0, --turns and --seconds not below")
    if options.render and not options.json:
        parser.error("--render needs --json FILE")
    wants_model = not set(options.cases or CASES) <= NO_MODEL
    if not options.render and not (options.qshard and options.peer_python and (options.model or not wants_model)):
        parser.error("--qshard, --peer-python and --model: benchmarks/cpu_peers gives them")
    check_outputs(parser, options)
    return options


def check_outputs(parser, options):
    """That all can be written is found out now, not after twenty minutes."""
    for path in (options.json, options.markdown, options.plot):
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            parser.error(f"{path}: there is no such folder")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error(f"{options.plot}: {sys.executable} has no matplotlib")
    if options.markdown and os.path.exists(options.markdown):
        with open(options.markdown, encoding="utf-8") as file:
            try:
                tables.between_marks(file.read(), "")
            except ValueError as error:
                parser.error(f"{options.markdown}: {error}")


def main(argv):
    options = parse(argv)
    report = read_json(options.json)
    if options.render:
        wrong = [f"{name}: {text}" for name, case in report["cases"].items() for text in tables.wrong_of(case["rows"])]
    else:
        try:
            wrong = measure(options, report)
        except (ours.RunError, client.PeerError) as error:
            ours.fail(error)
    if not report["cases"]:
        ours.fail(f"{options.json}: there is nothing to show" if options.json else "nothing was measured")
    print(tables.summary_of({name: case["rows"] for name, case in report["cases"].items()}))
    show(options, report)
    for text in wrong:
        print(f"cpu_peers: WRONG {text}", file=sys.stderr)
    return WRONG if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
