#!/usr/bin/env python3
"""Writes the inputs of one oracle case, always with the same bytes, from numpy, h5py and xxhash alone.

    make_inputs.py CASE OUT [--model HF_DIR] [--bare | --token-files DIR]

OUT then holds
    model/         the checkpoint (not for smollm2, whose directory is given with --model)
    adapter/       a PEFT adapter whose B is not zero
    train.h5, eval.h5
    run.yaml       the settings that the golden values belong to; the base is expected as OUT/base.h5

--bare leaves the decode table out of the token files, which only `qshard inspect` reads: a large vocabulary's is 50 times as large as
the tokens. --token-files takes both files from a folder where they were made before: then numpy alone is enough.
"""
import argparse
import hashlib
import json
import os
import shutil
import sys

import numpy as np

from cases import CASES, TEXT
from tensors import qshard_tiny, read_hf, write_safetensors

IGNORED = -100
SPLITS = ("train", "eval")
RUN_SEED = 1  # of the run: the order of samples, and dropout


def integers(seed, name, count, limit):
    """Whole numbers in [0, limit): the upper 32 bits of random words, scaled."""
    words = qshard_tiny.raw_words(seed, name, count) >> np.uint64(32)
    return (words * np.uint64(limit) >> np.uint64(32)).astype(np.int64)


# --- token files ------------------------------------------------------------------------------------------------------
def random_documents(seed, name, lengths, vocab):
    """Documents in which a token follows from the one before it two times out of three: something can be learned."""
    documents = []
    for i, length in enumerate(lengths):
        ids = integers(seed, f"{name}/{i}/ids", length, vocab)
        follows = integers(seed, f"{name}/{i}/follows", length, 3) > 0
        for t in range(1, length):
            if follows[t]:
                ids[t] = (ids[t - 1] * 7 + 13) % vocab
        documents.append(ids)
    return documents


def vocabulary_of(model_dir):
    """Bytes of each id of a byte-level tokenizer.json; added tokens as their text."""
    with open(os.path.join(model_dir, "tokenizer.json"), encoding="utf-8") as file:
        tokenizer = json.load(file)
    to_byte = {letter: byte for byte, letter in qshard_tiny.byte_alphabet().items()}
    added = {token["id"]: token["content"].encode() for token in tokenizer["added_tokens"]}
    vocab = tokenizer["model"]["vocab"]
    table = {i: bytes(to_byte[c] for c in text) for text, i in vocab.items() if i not in added}
    table.update(added)
    return [table.get(i, b"") for i in range(max(table) + 1)]


def text_documents(lengths, table):
    """TEXT in tokens, the longest that fits each time, cut into documents. (A tokenizer may give others.)"""
    id_of = {text: i for i, text in reversed(list(enumerate(table))) if text}
    longest = max(len(text) for text in id_of)
    ids, at, text = [], 0, TEXT.encode()
    while len(ids) < sum(lengths):
        rest = text[at : at + longest]
        token = next(rest[:n] for n in range(len(rest), 0, -1) if rest[:n] in id_of)
        ids.append(id_of[token])
        at = (at + len(token)) % len(text)
    ends = np.cumsum(lengths)
    return [np.array(ids[end - length : end]) for end, length in zip(ends, lengths)]


def token_arrays(rows, documents):
    """The datasets of a token file, from rows of (length, ignored) and the documents in order."""
    tokens = np.concatenate(documents).astype(np.uint32)
    labels = tokens.astype(np.int32)
    doc_offsets, seq_offsets, seq_targets, at = [0], [0], [], 0
    for row in rows:
        targets = 0
        for length, ignored in row:
            labels[at : at + ignored] = IGNORED
            targets += int(np.count_nonzero(labels[at + 1 : at + length] != IGNORED))
            at += length
            doc_offsets.append(at)
        seq_offsets.append(at)
        seq_targets.append(targets)
    return {
        "tokens": tokens,
        "labels": labels,
        "seq_offsets": np.array(seq_offsets, dtype=np.int64),
        "doc_offsets": np.array(doc_offsets, dtype=np.int64),
        "seq_targets": np.array(seq_targets, dtype=np.uint32),
    }


def decode_arrays(table):
    """The decode table: offsets and bytes."""
    ends = np.cumsum([0] + [len(text) for text in table], dtype=np.int64)
    return {"decode_offsets": ends, "decode_bytes": np.frombuffer(b"".join(table), dtype=np.uint8)}


def write_dataset(file, name, array):
    """Contiguous and allocated at once, as docs/file-formats.md asks."""
    import h5py  # not where the files are there already
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_obj_track_times(False)
    array = np.ascontiguousarray(array)
    little = array.dtype.newbyteorder("<")
    space = h5py.h5s.create_simple(array.shape)
    dataset = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(little), space, dcpl=properties)
    dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, array.astype(little))


def write_token_file(path, arrays, attributes):
    """One token file; strings become fixed-length, the rest int64."""
    import h5py
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        for name, value in attributes.items():
            file.attrs.create(name, np.bytes_(value) if isinstance(value, str) else np.int64(value))
        for name, array in arrays.items():
            write_dataset(file, name, array)


def make_token_file(case, split, path, table, vocab, tokenizer_sha256, bare):
    import xxhash
    rows = case.sequences if split == "train" else case.eval_sequences
    lengths = [length for row in rows for length, _ in row]
    if case.model is None:
        documents = text_documents(lengths if split == "train" else [97, *lengths], table)[-len(lengths) :]
    else:
        documents = random_documents(case.seed, split, lengths, vocab)
    arrays = token_arrays(rows, documents)
    attributes = {
        "format": "qshard-data",
        "format_version": 1,
        "vocab_size": len(table),
        "seq_len": case.seq_len,
        "packed": 1,
        "n_sequences": len(rows),
        "n_tokens": arrays["tokens"].size,
        "n_targets": int(arrays["seq_targets"].sum()),
        "tokenizer_sha256": tokenizer_sha256,
        "template_sha256": hashlib.sha256(qshard_tiny.CHAT_TEMPLATE.encode()).hexdigest(),
        "source": f"oracle case {case.name}, {split}",
        "tokens_xxh3": xxhash.xxh3_128_hexdigest(arrays["tokens"].astype("<u4").tobytes()),
        "labels_xxh3": xxhash.xxh3_128_hexdigest(arrays["labels"].astype("<i4").tobytes()),
    }
    write_token_file(path, arrays if bare else {**arrays, **decode_arrays(table)}, attributes)


def make_token_files(case, out, model_dir, vocab, bare):
    with open(os.path.join(model_dir, "tokenizer.json"), "rb") as file:
        tokenizer_sha256 = hashlib.sha256(file.read()).hexdigest()
    table = vocabulary_of(model_dir)
    table += [b""] * (vocab - len(table))  # ids up to the model's last one are used, beyond the tokenizer's
    for split in SPLITS:
        make_token_file(case, split, os.path.join(out, split + ".h5"), table, vocab, tokenizer_sha256, bare)


# --- adapter ----------------------------------------------------------------------------------------------------------
def make_magnitudes(case, name, weight):
    """DoRA's: the lengths of the rows of the checkpoint's W, each off by a tenth or so."""
    lengths = np.sqrt(np.sum(weight.astype(np.float64) ** 2, axis=1))
    return (lengths * (1.0 + 0.1 * qshard_tiny.normals(case.seed, name + ".m", lengths.size))).astype(np.float32)


def make_adapter(case, config, model_dir):
    """{PEFT name: array}: A as LoRA starts it, uniform in +-1/sqrt(in); B normal instead of zero."""
    weights = read_hf(model_dir)[1] if case.dora else None
    shapes, tensors = qshard_tiny.tensor_shapes(config), {}
    for layer in range(config["num_hidden_layers"]):
        for linear in qshard_tiny.linear_shapes(config):
            module = f"model.layers.{layer}.{linear}"
            out_features, in_features = shapes[module + ".weight"]
            name = f"base_model.model.{module}"
            words = qshard_tiny.raw_words(case.seed, name + ".A", case.lora_rank * in_features)
            uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
            a = (uniform / np.sqrt(float(in_features))).astype(np.float32)
            b = qshard_tiny.normals(case.seed, name + ".B", out_features * case.lora_rank) * case.b_deviation
            tensors[name + ".lora_A.weight"] = a.reshape(case.lora_rank, in_features)
            tensors[name + ".lora_B.weight"] = b.astype(np.float32).reshape(out_features, case.lora_rank)
            if case.dora:
                tensors[name + ".lora_magnitude_vector"] = make_magnitudes(case, name, weights[module + ".weight"])
    return tensors


def adapter_config(case, config):
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": case.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": case.lora_alpha,
        "lora_dropout": case.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": case.lora_rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": [linear.split(".")[1] for linear in qshard_tiny.linear_shapes(config)],
        "task_type": "CAUSAL_LM",
        "use_dora": case.dora,
        "use_rslora": False,
    }


# --- the settings -----------------------------------------------------------------------------------------------------
def run_yaml(case, out):
    """The run that the golden values belong to: every step takes the whole training set."""
    s = case.settings
    batch, micro, length = len(case.sequences), case.micro_batch, case.seq_len
    dora = ", dora: true" if case.dora else ""
    return f"""# Oracle case {case.name}: {s.steps} steps over the whole training set, for tests/oracle/compare.py.
base: {out}/base.h5
data: {{train: {out}/train.h5, eval: {out}/eval.h5}}
output: {out}/run
seed: {RUN_SEED}
device: cpu
train: {{steps: {s.steps}, global_batch: {batch}, micro_batch: {micro}, seq_len: {length}}}
lora: {{rank: {case.lora_rank}, alpha: {case.lora_alpha}, dropout: {case.dropout}, targets: all-linear, init: {out}/adapter{dora}}}
optim: {{lr: {s.lr}, betas: {list(s.betas)}, eps: {s.eps}, weight_decay: {s.weight_decay}, clip: {s.clip},
        schedule: {s.schedule}, warmup: {s.warmup}, min_lr_ratio: {s.min_lr_ratio}}}
cpu: {{gemm: strict}}
"""


def make_inputs(name, out, model_dir=None, bare=False, token_files=None):
    """Writes all inputs of a case; returns the model directory."""
    case = CASES[name]
    os.makedirs(os.path.join(out, "adapter"), exist_ok=True)
    if case.model is not None:
        model_dir = os.path.join(out, "model")
        options = qshard_tiny.make_parser().parse_args([model_dir, *case.model])
        qshard_tiny.check(options)
        os.makedirs(model_dir, exist_ok=True)
        qshard_tiny.write_checkpoint(model_dir, qshard_tiny.make_config(options), options.seed)
    elif model_dir is None:
        raise SystemExit(f"case {name} needs --model HF_DIR")
    with open(os.path.join(model_dir, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    config = {"attention_bias": False, "mlp_bias": False, **config}
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if token_files is None:
        make_token_files(case, out, model_dir, config["vocab_size"], bare)
    else:
        for split in SPLITS:
            shutil.copyfile(os.path.join(token_files, split + ".h5"), os.path.join(out, split + ".h5"))
    write_safetensors(os.path.join(out, "adapter", "adapter_model.safetensors"), make_adapter(case, config, model_dir))
    with open(os.path.join(out, "adapter", "adapter_config.json"), "w", encoding="utf-8") as file:
        json.dump(adapter_config(case, config), file, indent=2)
        file.write("\n")
    with open(os.path.join(out, "run.yaml"), "w", encoding="utf-8") as file:
        file.write(run_yaml(case, out))
    return model_dir


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("case", choices=sorted(CASES))
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--model", help="checkpoint directory, for smollm2")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--bare", action="store_true", help="no decode table in the token files")
    files.add_argument("--token-files", metavar="DIR", help="take train.h5 and eval.h5 from here")
    options = parser.parse_args()
    make_inputs(options.case, options.out, options.model, options.bare, options.token_files)


if __name__ == "__main__":
    sys.exit(main())
