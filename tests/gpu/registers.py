#!/usr/bin/env python3
"""What ptxas says of the kernels of a file, for the lines "Registers" at the top of kernels/cuda/*.cu.

    registers.py kernels/cuda/FILE.cu [ARCHITECTURE...]     default 80 86 89 90a 100 120

One line a kernel: registers by architecture; behind them static shared memory and, where there are any, bytes of spill stores
and loads. Needs nvcc and c++filt, no GPU; a minute a file.
"""
import re
import subprocess
import sys

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
# As cmake/cuda.cmake compiles them.
COMMAND = ("nvcc", "-O3", "-DNDEBUG", "-std=c++17", "-fmad=false", "-Xptxas", "-v", "-Isrc", "-I.", "-cubin", "-o", "/dev/null")


def kernels_of(path, architecture):
    """{name: (registers, shared bytes, spill stores, spill loads)}"""
    done = subprocess.run([*COMMAND, f"-arch=sm_{architecture}", path], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    found, name = {}, None
    for line in done.stderr.splitlines():
        entry = re.search(r"Compiling entry function '(\w+)'", line)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        used = re.search(r"Used (\d+) registers", line)
        if entry is not None:
            name = entry[1]
        elif spills is not None:
            spilled = int(spills[1]), int(spills[2])
        elif used is not None and name is not None:
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] = (int(used[1]), int(shared[1]) if shared else 0, *spilled)
    return found


def readable(name):
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    text = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|^void ", "", text)
    return re.sub(r"\((int|bool|qs_glu)\)", "", text).split("(")[0]


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    path, architectures = sys.argv[1], sys.argv[2:] or ARCHITECTURES
    found = {architecture: kernels_of(path, architecture) for architecture in architectures}
    print("#", " ".join(architectures), " kernel")
    for name in sorted(found[architectures[0]]):
        each = [found[architecture][name] for architecture in architectures]
        words = [" ".join(f"{registers:3d}" for registers, *_ in each), readable(name)]
        shared = sorted({bytes_ for _, bytes_, *_ in each})
        if shared != [0]:
            words.append(f"shared {'/'.join(map(str, shared))}")
        words += [f"sm_{architecture} spills {stores}+{loads}"
                  for architecture, (_, _, stores, loads) in zip(architectures, each) if stores + loads > 0]
        print("  ".join(words))


if __name__ == "__main__":
    main()
