"""What the end-to-end tests share: the seed-made model, and running the program as a user does, under mpirun or alone."""
import atexit
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
QSHARD = os.path.join(os.environ.get("QSHARD_BINARY_DIR", os.path.join(ROOT, "build", "ci")), "qshard")
PREP = os.path.join(ROOT, "src", "prep")
ORACLE = os.path.join(ROOT, "tests", "oracle")
TIMEOUT_S = 240 * int(os.environ.get("QSHARD_TEST_SLOWDOWN", "1"))  # more under sanitizers

sys.path.insert(0, ORACLE)
from tensors import read_safetensors, write_safetensors  # noqa: E402

OMPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none", "OMPI_MCA_mpi_yield_when_idle": "1",
}


def scratch(prefix="qshard-e2e-"):
    """A folder that goes away with the test process."""
    folder = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def environment(threads=1, **more):
    return {**os.environ, **OMPI, "OMP_NUM_THREADS": str(threads), **more}


def preload(library):
    """For the environment; the library comes before a sanitizer's, if there is one."""
    return {"LD_PRELOAD": library, "ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0"}


def command(arguments, ranks=None):
    """The command line: alone without ranks, else under mpirun."""
    launcher = [] if ranks is None else ["mpirun", "-np", str(ranks)]
    return [*launcher, QSHARD, *map(str, arguments)]


def qshard(*arguments, ranks=None, threads=1, expect=0, cwd=None, **more):
    """Runs the program to its end; asserts the exit code and returns the finished process (text)."""
    done = subprocess.run(["timeout", "-k", "5", str(TIMEOUT_S), *command(arguments, ranks)], cwd=cwd,
                          env=environment(threads, **more), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          errors="backslashreplace")  # a sample may be no UTF-8
    if expect is not None and done.returncode != expect:
        raise AssertionError(f"{' '.join(map(str, arguments))} on {ranks} ranks: exit {done.returncode}, not {expect}\n"
                             f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def start(*arguments, ranks=None, threads=1, **more):
    """Starts the program in a session of its own, so that all its processes can be killed together."""
    return subprocess.Popen(command(arguments, ranks), env=environment(threads, **more), stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, text=True)


def ranks_of(process):
    """Pids of the ranks that a started mpirun has made: each is in a process group of its own."""
    found = subprocess.run(["pgrep", "-P", str(process.pid), "-x", "qshard"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def kill_all(process):
    """The whole job at once, as when a machine loses power."""
    for pid in [process.pid, *ranks_of(process)]:
        kill(pid)
    process.communicate()


def python(script, *arguments):
    done = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    if done.returncode != 0:
        raise AssertionError(f"{script} {arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


_tiny = None


def tiny():
    """The files of inputs/tiny.yaml, made once per test process: model/, base.h5, train.h5, eval.h5."""
    global _tiny
    if _tiny is None:
        folder = scratch()
        model = os.path.join(folder, "model")
        python(os.path.join(PREP, "qshard_tiny.py"), model, "--examples", "160")
        for name in ("train", "eval"):
            python(os.path.join(PREP, "qshard_prep.py"), "--model", model, os.path.join(model, name + ".jsonl"), "-o",
                   os.path.join(folder, name + ".h5"), "--seq-len", "64")
        qshard("quantize", model, "-o", os.path.join(folder, "base.h5"), "--head-chunk-rows", "128")
        _tiny = folder
    return _tiny


_bases = {}


def base_of(*options):
    """A base.h5 of a model of other options of qshard_tiny.py, for the data of tiny()."""
    if options not in _bases:
        folder = scratch()
        python(os.path.join(PREP, "qshard_tiny.py"), os.path.join(folder, "model"), "--examples", "8", *options)
        qshard("quantize", os.path.join(folder, "model"), "-o", os.path.join(folder, "base.h5"), "--head-chunk-rows", "128")
        _bases[options] = os.path.join(folder, "base.h5")
    return _bases[options]


# Layers of Gemma keep more than others, and each kind of layer turns by its own angles.
GEMMA3 = ("--arch", "gemma3_text", "--window", "9", "--window-pattern", "2", "--query-scalar", "20")

GEMMA2 = ("--arch", "gemma2", "--window", "9", "--attention-cap", "2", "--final-cap", "5")

# q, k and v in rows of one matrix, and so gate and up; a part of each head turns, by long factors.
PHI3 = ("--arch", "phi3", "--window", "9", "--rope-scaling", "longrope", "--original-position", "32", "--partial-rotary", "0.75")

# Each second layer is without RoPE and sees a window; the rest of the layers do not.
SMOLLM3 = ("--arch", "smollm3", "--no-rope-interval", "2", "--window", "9", "--attention-bias")

# A stream that is divided by the branches' factor, biases on the way into it.
GRANITE = ("--arch", "granite", "--attention-bias", "--mlp-bias", "--logits-scaling", "2.5")


# Norms behind the branches alone, and over all heads; full layers scale their angles.
OLMO3 = ("--arch", "olmo3", "--window", "9", "--window-pattern", "2", "--rope-scaling", "yarn")


WRAPPERS = {"gemma3_text": ("gemma3", "Gemma3ForConditionalGeneration"), "mistral": ("mistral3", "Mistral3ForConditionalGeneration")}
# Prefixes of the text part, of its head, and of other parts: as on the Hub, and as the modules of the class are called.
SPELLINGS = {"hub": ("language_model.model.", "language_model.lm_head.", ""), "modules": ("model.language_model.", "lm_head.", "model.")}


def wrapped(model, target, spelling="hub"):
    """The checkpoint in `model` as the text part of one of text and images, in `target`; tests/oracle/text_part.py makes them with
    transformers."""
    with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
        text = json.load(file)
    kind, name = WRAPPERS[text["model_type"]]
    outer = {key: text.pop(key) for key in ("torch_dtype", "eos_token_id")}
    del text["architectures"]
    config = {"architectures": [name], "model_type": kind, "text_config": text, "image_token_index": 7, "mm_tokens_per_image": 4,
              "vision_config": {"hidden_size": 32}, **outer}
    body, head, other = SPELLINGS[spelling]
    tensors = {name.replace("lm_head.", head) if name.startswith("lm_head.") else body + name.removeprefix("model."): tensor
               for name, (_, tensor) in read_safetensors(os.path.join(model, "model.safetensors"), raw=True).items()}
    for name in ("vision_tower.encoder.layers.0.self_attn.q_proj.weight", "multi_modal_projector.norm.weight"):
        tensors[other + name] = np.full((4, 8), np.nan, dtype=np.float32)  # nobody looks at them
    shutil.copytree(model, target)
    with open(os.path.join(target, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file)
    write_safetensors(os.path.join(target, "model.safetensors"), tensors)


def plan_and_peak(log):
    """MiB of rank 0 that the run planned and that it reached, class by class, from what it printed."""
    table = re.search(r"memory of rank 0.*?\n(.*?\n\s*total[^\n]*)", log, re.S)
    rows = re.findall(r"^\s*(\w[\w ]*?)\s+([\d.]+)\s+([\d.]+)$", table[1], re.M)
    return {name: (float(plan), float(peak)) for name, plan, peak in rows}


def settings(folder, output, **more):
    """--set options for a run of the tiny model; keys with dots replaced by __."""
    values = {"base": f"{folder}/base.h5", "data.train": f"{folder}/train.h5", "data.eval": f"{folder}/eval.h5",
              "output": output}
    values.update({key.replace("__", "."): value for key, value in more.items()})
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


TINY_YAML = os.path.join(ROOT, "inputs", "tiny.yaml")


def train(output, ranks=None, threads=1, expect=0, options=(), environment=None, **more):
    """Trains inputs/tiny.yaml with changes into `output`."""
    return qshard("train", TINY_YAML, *settings(tiny(), output, **more), *options, ranks=ranks, threads=threads,
                  expect=expect, **(environment or {}))


def metrics(output, name="metrics.jsonl"):
    with open(os.path.join(output, name), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


NUMBERS = re.compile(r'"(step|loss|eval_loss|lr|grad_norm)": ([^,}]+)')


def curve(output):
    """Everything in metrics.jsonl that must not depend on ranks and threads, as printed (17 digits: the bits)."""
    with open(os.path.join(output, "metrics.jsonl"), encoding="utf-8") as file:
        return [tuple(NUMBERS.findall(line)) for line in file]


def adapter_digest(output, ranks=None):
    """SHA-256 of the exported adapter's weights."""
    target = scratch() + "/adapter"
    qshard("export", output, "-o", target)
    with open(os.path.join(target, "adapter_model.safetensors"), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def slopes(folder, adapter, options=(), step=0.02):
    """Of the loss of the case in `folder` as a function of all adapter weights at once: yields (central difference of
    the printed loss, what the gradient says) along the gradient and two random directions. Writes to `adapter`."""
    grads_path, weights = os.path.join(folder, "slopes.safetensors"), os.path.join(adapter, "adapter_model.safetensors")

    def loss_at(tensors):
        write_safetensors(weights, {name: tensor.astype(np.float32) for name, tensor in tensors.items()})
        done = qshard("train", os.path.join(folder, "run.yaml"), "--dump-grads", grads_path, "--set",
                      f"lora.init={adapter}", *options)
        return float(done.stdout.split()[1])

    start = read_safetensors(weights)
    loss_at(start)
    grads = read_safetensors(grads_path)
    if sorted(grads) != sorted(start):
        raise AssertionError(f"gradients of {sorted(set(grads) ^ set(start))[:3]}")
    draw = np.random.default_rng(5)
    signs = [{name: draw.choice([-1.0, 0.5, 2.0], size=grad.shape) for name, grad in grads.items()} for _ in range(2)]
    for direction in [grads, *({name: grads[name] * sign[name] for name in grads} for sign in signs)]:
        size = np.sqrt(sum(np.sum(d.astype(np.float64) ** 2) for d in direction.values()))
        losses = [loss_at({name: start[name] + h * direction[name] / size for name in start}) for h in (step, -step)]
        expected = sum(np.sum(grads[name].astype(np.float64) * direction[name]) for name in grads) / size
        yield (losses[0] - losses[1]) / (2 * step), expected
