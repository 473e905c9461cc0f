#!/usr/bin/env python3
"""How fast qshard-prep makes token files, on data of its own.

    benchmarks/bench_prep.py --model HF_DIR [--examples N] [--jobs N] [--kind NAME]...

For each kind of data the whole program runs on one process and one core: reading, checking, template, tokenizer, masks and
the written file. `tokenizer_us` is the tokenizer alone on the whole texts; qshard-prep takes less where it can encode in
chunks. `start_s` is the cost of loading the tokenizer, once a run, which the other columns leave out. The words are common
English ones, drawn by a seed, so nothing but the model directory is needed. Times are those of the process's CPU, the best
of three.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import sys
import sysconfig
import tempfile
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "src", "prep"))

import qshard_prep  # noqa: E402  (needs the path)
from qprep import errors, pipeline  # noqa: E402
from qprep.tokens import Tokenizer  # noqa: E402

def prose():
    """The docstrings of Python's own library as lists of words: some megabytes of English that are everywhere."""
    texts = []
    for folder, names, files in os.walk(sysconfig.get_path("stdlib")):
        names[:] = sorted(set(names) - {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"})
        for name in sorted(files):
            if name.endswith(".py"):
                with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
                    texts.extend(DOCSTRING.findall(file.read()))
    return [word for text in texts for word in text.split(" ") if word]


DOCSTRING = re.compile(r'"""(.{40,}?)"""', re.DOTALL)
PROSE = prose()


def sentence(rng, words):
    """That many words from a random place."""
    begin = rng.randrange(len(PROSE) - words)
    return " ".join(PROSE[begin : begin + words])


def chat(rng, question, answer, turns=1):
    messages = []
    for _ in range(turns):
        messages.append({"role": "user", "content": sentence(rng, question)})
        messages.append({"role": "assistant", "content": sentence(rng, answer)})
    return {"messages": messages}


KINDS = {
    "messages, short": lambda rng: chat(rng, 10, 20),
    "messages, long": lambda rng: chat(rng, 30, 150),
    "messages, 4 turns": lambda rng: chat(rng, 12, 40, 4),
    "alpaca": lambda rng: {"instruction": sentence(rng, 12), "input": "", "output": sentence(rng, 40)},
    "text": lambda rng: {"text": sentence(rng, 100)},
    "tokens": lambda rng: (lambda n: {"input_ids": n, "labels": n})([rng.randrange(256) for _ in range(100)]),
}


def best(action, repeats=3):
    """Least CPU time of `action`, and its result."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        result = action()
        times.append(time.process_time() - began)
    return min(times), result


def measure(kind, options, folder, tokenizer):
    rng = random.Random(7)
    data, out = os.path.join(folder, "data.jsonl"), os.path.join(folder, "out.h5")
    with open(data, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(KINDS[kind](rng)) + "\n" for _ in range(options.examples))
    arguments = ["--model", options.model, data, "-o", out, "--overwrite", "--seq-len", "2048", "--jobs", options.jobs]
    with contextlib.redirect_stdout(io.StringIO()):
        start, _ = best(lambda: Tokenizer(options.model).decode_table())
        clock, whole = time.perf_counter(), best(lambda: qshard_prep.main(list(map(str, arguments))))[0]
        wall = (time.perf_counter() - clock) / 3
    texts = rendered(data, options, tokenizer)
    alone, encoded = best(lambda: tokenizer.rust.encode_batch(texts, add_special_tokens=False))
    seconds = (wall if options.jobs > 1 else whole) - start
    tokens = sum(len(encoding) for encoding in encoded) / max(len(texts), 1) or 100
    return seconds / options.examples, tokens, alone / options.examples, start


def rendered(data, options, tokenizer):
    """The texts that the tokenizer sees."""
    worker = pipeline.Worker(
        qshard_prep.parse_options(["--model", options.model, data, "--preview", "1"]), [], tokenizer
    )
    texts = []
    with open(data, "rb") as file:
        for line in file:
            record = pipeline.parse_record(line)
            built = worker.builder(pipeline.recognise(record)[0], record)
            texts.extend(example.text for example in built if hasattr(example, "text"))
    return texts


def main(argv):
    parser = errors.OneLineParser(prog="bench_prep.py", description="speed of qshard-prep")
    parser.add_argument("--model", required=True, metavar="HF_DIR")
    parser.add_argument("--examples", type=int, default=10000, metavar="N")
    parser.add_argument("--kind", choices=KINDS, action="append", help="measure these alone")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes; above 1 wall-clock time is shown")
    options = parser.parse_args(argv)
    tokenizer = Tokenizer(options.model)
    print(f"# bench_prep  model={os.path.basename(os.path.abspath(options.model))} examples={options.examples} "
          f"jobs={options.jobs}")
    print(f"# {'kind':<20} {'tokens':>7} {'us':>8} {'examples_per_s':>15} {'tokens_per_s':>13} {'tokenizer_us':>13} "
          f"{'start_s':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kind or KINDS:
            seconds, tokens, alone, start = measure(kind, options, folder, tokenizer)
            print(f"  {kind:<20} {tokens:7.1f} {seconds * 1e6:8.1f} {1 / seconds:15.0f} {tokens / seconds:13.0f} "
                  f"{alone * 1e6:13.1f} {start:8.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
