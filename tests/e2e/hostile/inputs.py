"""The good inputs that test_hostile.py spoils, all small and made from a seed, and the commands that read them. A command
runs in the folder of its case and names files relative to it."""
import json
import os
import shutil
import struct
import sys
from dataclasses import dataclass

import gguf
import numpy as np
import support

from hostile import changes as to

MODEL_OPTIONS = ("--hidden", "64", "--ffn", "96", "--layers", "2", "--examples", "16")

YAML = """\
base: base.h5
data:
  train: train.h5
  eval: eval.h5
output: out
seed: 42
train: {steps: 2, global_batch: 4, micro_batch: 2, seq_len: 64}
lora: {rank: 16, alpha: 16, dropout: 0.05, targets: all-linear}
optim:
  lr: 5.0e-3
  betas: [0.9, 0.999]
  clip: 1.0
"""

BASE, TRAIN = ("base.h5",), ("run.yaml", "base.h5", "train.h5", "eval.h5")
STEP = "run/step-00000002"


@dataclass
class Command:
    words: tuple  # of qshard, or of a Python tool where the first ends in .py
    needs: tuple  # names in the folder of the good inputs


def prep(*words):
    return Command(("qshard_prep.py", "--model", "model", *words, "-o", "out.h5"),
                   ("model", "data.jsonl", "chat.jsonl", "corpus.idx", "corpus.bin"))


def looking_at(kind, path, needs):
    return {f"{verb} {kind}": Command((verb, path), needs) for verb in ("inspect", "check")}


COMMANDS = {
    "quantize": Command(("quantize", "model", "-o", "out.h5", "--head-chunk-rows", "128"), ("model",)),
    "quantize sharded": Command(("quantize", "sharded", "-o", "out.h5"), ("sharded",)),
    "quantize wrapped": Command(("quantize", "wrapped", "-o", "out.h5", "--head-chunk-rows", "128"), ("wrapped",)),
    "inspect wrapped": Command(("inspect", "wrapped"), ("wrapped",)),
    "quantize bnb": Command(("quantize", "bnb", "-o", "out.h5"), ("bnb",)),
    "train": Command(("train", "run.yaml"), TRAIN),
    "eval": Command(("eval", "run.yaml"), TRAIN),
    "eval adapter": Command(("eval", "run.yaml", "--adapter", "adapter"), (*TRAIN, "adapter")),
    "eval checkpoint": Command(("eval", "run.yaml", "--adapter", STEP), (*TRAIN, "run")),
    "init": Command(("train", "run.yaml", "--set", "lora.init=adapter"), (*TRAIN, "adapter")),
    "resume": Command(("train", "run.yaml", "--set", "output=run", "--resume", "must"), (*TRAIN, "run")),
    "sample": Command(("sample", "run.yaml", "--prompts", "prompts.h5", "--tokens", "2"), (*TRAIN, "prompts.h5")),
    "export": Command(("export", "run", "-o", "out"), ("run", "base.h5")),
    "export step": Command(("export", STEP, "-o", "out"), ("run", "base.h5")),
    "merge run": Command(("merge", "run", "-o", "out"), ("run", "base.h5")),
    "merge step": Command(("merge", STEP, "-o", "out"), ("run", "base.h5")),
    "merge adapter": Command(("merge", "adapter", "-o", "out", "--base", "base.h5"), ("adapter", "base.h5")),
    "eval dora": Command(("eval", "run.yaml", "--adapter", "dora"), (*TRAIN, "dora")),
    "init dora": Command(("train", "run.yaml", "--set", "lora.init=dora", "--set", "lora.dora=true"), (*TRAIN, "dora")),
    "merge dora": Command(("merge", "dora", "-o", "out", "--base", "base.h5"), ("dora", "base.h5")),
    "merge original": Command(("merge", "adapter", "-o", "out", "--base", "base.h5", "--original", "model"),
                              ("adapter", "base.h5", "model")),
    **looking_at("model", "model", ("model",)), **looking_at("base", "base.h5", BASE),
            **looking_at("data", "train.h5", TRAIN),
    **looking_at("adapter", "adapter", ("adapter",)), **looking_at("dora", "dora", ("dora",)),
    **looking_at("config", "run.yaml", ("run.yaml",)),
    **looking_at("run", "run", ("run",)), **looking_at("step", STEP, ("run",)),
    "inspect shard": Command(("inspect", STEP + "/rank-00000.h5"), ("run",)),
    "prep": prep("data.jsonl"),
    "prep chat": prep("chat.jsonl"),
    "megatron": prep("--format", "megatron", "corpus"),
    "gguf": Command(("qshard_gguf.py", "model.gguf", "-o", "out"), ("model.gguf",)),
}


def command_line(command, ranks=None):
    """What is started; `ranks`: each rank says with which code it left, and a code of one does not end the others."""
    if command.words[0].endswith(".py"):
        return [sys.executable, os.path.join(support.PREP, command.words[0]), *command.words[1:]]
    if ranks is None:
        return [support.QSHARD, *command.words]
    say = '"$@"; code=$?; echo "rank left with $code" >&2; exit $code'
    return ["mpirun", "--mca", "orte_abort_on_non_zero_status", "0", "-np", str(ranks), "sh", "-c", say, "sh",
            support.QSHARD,
            *command.words]


# ---- making them ----

def make_all(folder):
    """Everything that COMMANDS name."""
    def path(name):
        return os.path.join(folder, name)

    def run(*words, **more):
        support.qshard(*words, cwd=folder, **more)

    tool = support.PREP + "/qshard_"
    support.python(tool + "tiny.py", path("model"), *MODEL_OPTIONS)
    for name, options in (("train", ()), ("eval", ()), ("prompts", ("--prompts",))):
        source = path("model/eval.jsonl" if name == "prompts" else f"model/{name}.jsonl")
        support.python(tool + "prep.py", "--model", path("model"), source, "-o", path(name + ".h5"), "--seq-len", "64",
                       *options)
    to.write(path("run.yaml"), YAML)
    to.write(path("data.jsonl"), '{"text": "add one and two"}\n{"text": "subtract one"}\n')
    shutil.copy(path("model/eval.jsonl"), path("chat.jsonl"))
    shutil.copytree(os.path.join(support.ROOT, "tests", "golden", "bnb_tiny"), path("bnb"))
    make_shards(path("model"), path("sharded"))
    support.python(tool + "tiny.py", path("mistral"), *MODEL_OPTIONS, "--arch", "mistral", "--untied")
    support.wrapped(path("mistral"), path("wrapped"))
    make_megatron(path("corpus"))
    make_gguf(path("model.gguf"))
    run("quantize", "model", "-o", "base.h5", "--head-chunk-rows", "128")
    run("train", "run.yaml", "--set", "output=run", ranks=2)
    to.field("run/run.json", "finished", False)(folder)  # killed between the last save and the end
    run("export", "run", "-o", "adapter")
    run("train", "run.yaml", "--set", "output=dora-run", "--set", "lora.dora=true")
    run("export", "dora-run", "-o", "dora")


def make_shards(model, target):
    """The model in two files with an index."""
    os.mkdir(target)
    shutil.copy(os.path.join(model, "config.json"), target)
    header, body = to.split_safetensors(to.read(os.path.join(model, "model.safetensors")))
    names = sorted(name for name in header if name != "__metadata__")
    halves = {"model-00001-of-00002.safetensors": names[: len(names) // 2],
              "model-00002-of-00002.safetensors": names[len(names) // 2:]}
    for file, held in halves.items():
        packed = {name: (header[name]["dtype"], header[name]["shape"],
                         body[slice(*header[name]["data_offsets"])]) for name in held}
        to.write(os.path.join(target, file), to.pack_tensors(packed))
    weight_map = {name: file for file, held in halves.items() for name in held}
    text = json.dumps({"metadata": {"total_size": len(body)}, "weight_map": weight_map}, indent=1)
    to.write(os.path.join(target, "model.safetensors.index.json"), text)


def make_megatron(prefix):
    """One document of four tokens."""
    tokens = np.array([5, 6, 7, 8], "<u2")
    to.write(prefix + ".bin", tokens.tobytes())
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 1, 2)
    to.write(prefix + ".idx", head + struct.pack("<iqqq", 4, 0, 0, 1))


def make_gguf(path):
    """A Llama of one layer; the final norm is its last tensor."""
    hidden, heads, ffn, tokens = 32, 2, 48, ["<s>", "</s>", "h", "e", "he"]
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in ((writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_embedding_length, hidden),
                       (writer.add_feed_forward_length, ffn), (writer.add_head_count, heads),
                       (writer.add_head_count_kv, heads),
                       (writer.add_rope_freq_base, 10000.0), (writer.add_layer_norm_rms_eps, 1e-5),
                       (writer.add_tokenizer_model, "gpt2"), (writer.add_tokenizer_pre, "gpt-2"),
                       (writer.add_token_list, tokens),
                       (writer.add_token_merges, ["h e"]), (writer.add_token_types, [3, 3, 1, 1, 1]),
                       (writer.add_bos_token_id, 0),
                       (writer.add_eos_token_id, 1)):
        add(value)
    shapes = {"token_embd": (len(tokens), hidden), "blk.0.attn_norm": (hidden,), "blk.0.ffn_norm": (hidden,),
              **{f"blk.0.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")},
              "blk.0.ffn_gate": (ffn, hidden), "blk.0.ffn_up": (ffn, hidden), "blk.0.ffn_down": (hidden, ffn),
              "output_norm": (hidden,)}
    for name, shape in shapes.items():
        writer.add_tensor(name + ".weight", np.full(shape, 0.5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
