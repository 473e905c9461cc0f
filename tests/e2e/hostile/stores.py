"""Rows for the HDF5 files: the quantized base and the token files."""
import hashlib

import h5py
import numpy as np

from hostile import changes as to
from hostile.case import BASE, DATA, DEEP, HTML, INF_BF16, INT64, LFS, NAN_BF16, case, missing, not_a_file
from hostile.changes import GONE


def move_to_link(file, kind):
    file.move("units/layers.0/packed", "elsewhere")
    file["units/layers.0/packed"] = h5py.SoftLink("/elsewhere") if kind == "soft" else h5py.ExternalLink("train.h5",
                                                                                                         "/tokens")


def make_group(file, name):
    del file[name]
    file.create_group(name)


def first_target(file, value):
    labels = file["labels"][()]
    file["labels"][int(np.argmax(labels >= 0))] = value


def flip_lowest_bit(data):
    """Of one number: an id becomes another id."""
    at = int(np.argmax(data[()] >= 2))
    data[at] = data[at] ^ 1


def move_border(file):
    """The first sequence has one token less, the second one more: still what a token file may hold."""
    for key in ("seq_offsets", "doc_offsets"):
        file[key][1] -= 1


def unallocated(name, shape, dtype):
    """A dataset whose bytes lie nowhere, so that its size costs nothing."""
    def alter(file):
        if name in file:
            del file[name]
        file.create_dataset(name, shape=shape, dtype=dtype)
    return alter


def outside(name):
    """A dataset whose bytes lie in another file."""
    def alter(file):
        data = file[name][()]
        del file[name]
        file.create_dataset(name, shape=data.shape, dtype=data.dtype, external=[("run.yaml", 0, data.nbytes)])
    return alter


# ---- base.h5: train, eval, sample, merge, inspect, check ----

not_a_file("train", BASE, ranks=2, key="base")
for command in ("eval", "inspect base", "check base", "merge adapter"):
    case(command, "base.h5 is cut off", to.cut(BASE, 0.7), 301, BASE)
    case(command, "base.h5 is a pipe", to.fifo(BASE), 301, BASE)
for content, what in ((HTML, "HTML"), (LFS, "a Git LFS pointer"),
                      (b"\x89HDF\r\n\x1a\n" + bytes(4000), "an HDF5 signature and zeros")):
    case("train", f"base.h5 is {what}", to.put(BASE, content), 301, BASE, 2 if content is LFS else None)
case("train", "base.h5 is a token file", to.both(to.gone(BASE), to.copied("train.h5", BASE)), 301, f"{BASE}: .*qshard-data",
     2)
for part in (0.1, 0.5, -1):
    case("train", f"base.h5 is cut at {part}", to.cut(BASE, part), 301, BASE, 2 if part == 0.5 else None)
case("train", "base.h5 of a killed quantize", to.attribute(BASE, "complete", 0), 301, f"{BASE}: .*complete", 2)
case("train", "base.h5 without complete", to.attribute(BASE, "complete", GONE), 301, f"{BASE}: .*complete")
case("train", "base.h5 of version 2", to.attribute(BASE, "format_version", 2), 303, f"{BASE}: .*format_version", 2)
case("train", "base.h5 of version -1", to.attribute(BASE, "format_version", -1), 303, f"{BASE}: .*format_version")
case("train", "base.h5 of a version in text", to.attribute(BASE, "format_version", "1"), 301, f"{BASE}: .*format_version")
case("train", "base.h5 of another format", to.attribute(BASE, "format", "qshard-bass"), 301, f"{BASE}: .*format")
case("train", "base.h5 without format", to.attribute(BASE, "format", GONE), 301, f"{BASE}: .*format")


def base_index(what, change, code, says, ranks=None):
    case("train", f"base index {what}", change, code, f"{BASE}: .*{says}", ranks)


base_index("is missing", to.dataset(BASE, "index", GONE), 301, "index", 2)
base_index("is a list", to.index_text(b"[1, 2]"), 301, "object")
base_index("is no JSON", to.index_text(b"{" * 40), 301, "JSON", 2)
base_index("is nested 100000 deep", to.index_text(DEEP), 301, "deeper than 64")
base_index("is of floats", to.dataset(BASE, "index", lambda data: data.astype("f4")), 301, "index")
base_index("is two-dimensional", to.dataset(BASE, "index", lambda data: data.reshape(1, -1)), 301, "index")
base_index("is in chunks", to.dataset(BASE, "index", lambda data: data, chunks=(512,)), 301, "index.*contiguous")
base_index("is compressed", to.dataset(BASE, "index", lambda data: data, chunks=(512,), compression="gzip"), 301,
           "index.*contiguous", 2)
for key, value, code, says in (("config", GONE, 302, "config"), ("config/vocab_size", 2**40, 302, "vocab_size"),
                               ("config/vocab_size", 319, 301, "shape"), ("config/num_hidden_layers", 1000, 301, "units"),
                               ("config/hidden_size", 128, 301, "does not follow"),
                               ("config/model_type", "gpt2", 303, "gpt2"), ("head_chunk_rows", 0, 302, "head_chunk_rows"),
                               ("head_chunk_rows", 1, 301, "units"), ("head_chunk_rows", 2**40, 302, "head_chunk_rows"),
                               ("nested", 1, 301, "nested"), ("nested", False, 301, "absmax|hash"),
                               ("units", {}, 302, "units"), ("units", [], 301, "units"), ("units/0", 7, 302, "name"),
                               ("units/0/nf4_quanta", 2**60, 301, "nf4_quanta"),
                               ("units/0/nf4_quanta", -1, 302, "nf4_quanta"),
                               ("units/0/small_bytes", 2**40, 301, "small_bytes"),
                               ("units/0/small_xxh3", "xyz", 301, "small_xxh3"),
                               ("units/0/raw_dtype", "f64", 301, "raw_dtype"),
                               ("units/0/tensors/0/shape", [64, 2**40], 301, "shape"),
                               ("units/0/tensors/0/shape", [64.0, 64.0], 301, "shape"),
                               ("units/0/tensors/0/offset", 1e300, 302, "offset"),
                               ("units/0/tensors/0/offset", "0", 302, "offset"), ("units/0/tensors/0/map", 5, 302, "map"),
                               ("units/0/tensors/0/map", -1, 302, "map"), ("units/0/tensors/0/quantum", 1, 301, "quantum"),
                               ("units/0/tensors/0/dtype", "u8", 301, "dtype"),
                               ("units/0/tensors/0/name", "../../etc/passwd", 301, "name"),
                               ("units/0/tensors/0/kind", "raw", 301, "nf4_quanta"),
                               ("units/1/name", "layers.0", 301, "name"), ("zero_blocks", -1, 302, "zero_blocks"),
                               ("eos_token_ids", [2, 2**32], 302, "eos_token_ids"), ("eos_token_ids", 2, 301, "eos_token_ids"),
                               ("eos_token_ids", [2] * 10**6, 301, "eos_token_ids"), ("eos_token_ids", ["2"], 302, "eos_token_ids"),
                               ("hashes_sha256", "0" * 64, 304, "hashes_sha256"),
                               ("hashes_sha256", "0", 301, "hashes_sha256"), ("source", None, 302, "source"),
                               ("final", GONE, 302, "final")):
    base_index(f"{key} = {'gone' if value is GONE else value}", to.index_field(key, value), code, says,
               2 if value in (2**40, 2**60, "0" * 64) else None)
for key in ("packed", "absmax8", "absmax32", "small", "hash"):
    name = f"units/layers.0/{key}"
    case("train", f"base {key} is missing", to.dataset(BASE, name, GONE), 301, f"{BASE}: .*{name}",
         2 if key == "packed" else None)
    case("train", f"base {key} is short", to.dataset(BASE, name, lambda data: data[:1]), 301, f"{BASE}: .*{name}")
    case("train", f"base {key} is of doubles", to.dataset(BASE, name, lambda data: data.astype("f8")), 301,
         f"{BASE}: .*{name}")
case("train", "base packed is a soft link", to.h5(BASE, lambda file: move_to_link(file, "soft")), 301, f"{BASE}: .*link", 2)
case("train", "base packed is in another file", to.h5(BASE, lambda file: move_to_link(file, "external")), 301,
     f"{BASE}: .*link")
case("train", "base packed is a group", to.h5(BASE, lambda file: make_group(file, "units/layers.0/packed")), 301,
     f"{BASE}: .*packed")


case("train", "base packed is outside the file", to.h5(BASE, outside("units/layers.0/packed")), 301,
     f"{BASE}: .*packed.*inside the file", 2)
case("train", "base packed is nowhere", to.h5(BASE, unallocated("units/layers.0/packed", (7, 8192), "u1")), 301,
     f"{BASE}: .*packed")
case("train", "base index is of 2^40 bytes", to.h5(BASE, unallocated("index", (2**40,), "u1")), 301, f"{BASE}: .*index")
case("train", "base maps are of 2^40 rows", to.h5(BASE, unallocated("maps", (2**40, 256), "<f4")), 301, f"{BASE}: .*maps")


for unit, key, at in (("layers.1", "packed", (-1, 100)), ("layers.1", "absmax8", (-1, 3)), ("layers.1", "absmax32", (-1, 0)),
                      ("layers.0", "small", 5), ("embed.0", "raw", (-1, 3)), ("layers.0", "hash", 0)):
    says = "hash" if key == "hash" else unit
    damaged = to.values(BASE, f"units/{unit}/{key}", at, 77)
    case("train", f"base {unit} {key} is damaged", damaged, 304, f"{BASE}: .*{says}", 2)
    case("check base", f"base {unit} {key} is damaged", damaged, 304, f"{BASE}: .*{says}")
case("sample", "base final norm is damaged", to.values(BASE, "final/small", 3, 77), 304, f"{BASE}: .*final", 2)
for command in ("train", "check base"):
    case(command, "base map is damaged", to.values(BASE, "maps", (0, 100), 0.25), 304, f"{BASE}: .*index_xxh3")
for value, word in ((np.nan, "NaN"), (np.inf, "infinity")):
    case("train", f"base {word} in a map", to.values(BASE, "maps", (0, 3), value), 302, f"{BASE}: .*map", 2)
    signed = to.signed_base(to.values(BASE, "units/layers.1/absmax32", (-1, 0), value))
    for command, ranks in (("train", 2), ("eval", None), ("check base", None), ("merge adapter", None)):
        taken = to.both(signed, to.gone("adapter/qshard.json")) if command == "merge adapter" else signed  # which names the base
        case(command, f"base {word} in absmax32, hashed anew", taken, 302, f"{BASE}: .*layers.1.*absmax32", ranks)
case("train", "base NaN in a norm, hashed anew", to.signed_base(to.values(BASE, "units/layers.0/small", slice(2, 4),
                                                                          list(NAN_BF16))), 302,
     f"{BASE}: .*layers.0.*layernorm", 2)
case("check base", "base NaN in the table, hashed anew", to.signed_base(to.values(BASE, "units/embed.0/raw",
                                                                                  (0, slice(2, 4)), list(NAN_BF16))), 302,
     f"{BASE}: .*embed_tokens")
case("eval", "base infinity in the final norm, hashed anew", to.signed_base(to.values(BASE, "final/small", slice(2, 4),
                                                                                      list(INF_BF16))), 302,
     f"{BASE}: .*model.norm")
case("train", "base has a user block", to.of_content(BASE, lambda data: bytes(512) + data), 301, BASE)

# ---- token files: train, eval, sample, inspect, check ----

not_a_file("train", DATA, ranks=2, key="data.train")
for command in ("inspect data", "check data"):
    case(command, "train.h5 is cut off", to.cut(DATA, 0.7), 301, DATA)
    case(command, "train.h5 is a pipe", to.fifo(DATA), 301, DATA)
    case(command, "train.h5 is HTML", to.put(DATA, HTML), 301, DATA)
case("train", "data.train is the base", to.both(to.gone(DATA), to.copied(BASE, DATA)), 301, f"{DATA}: .*qshard-base", 2)
for command, ranks in (("train", 2), ("eval", None)):
    case(command, "data.eval is missing", to.gone("eval.h5"), 300, missing("data.eval", "eval.h5"), ranks)
for command in ("eval", "sample"):
    case(command, "base is missing", to.gone(BASE), 300, missing("base", BASE), 2)
case("eval", "data.eval is cut off", to.cut("eval.h5", 0.5), 301, "eval.h5", 2)
case("eval", "data.eval is a pipe", to.fifo("eval.h5"), 301, "eval.h5")
for key, value, code in (("format", "qshard-dada", 301), ("format_version", 2, 303), ("vocab_size", 0, 302),
                         ("vocab_size", 2**40, 302), ("vocab_size", 321, 302), ("seq_len", 0, 302), ("seq_len", 2**40, 302),
                         ("packed", 2, 302), ("n_sequences", 0, 302), ("n_sequences", 2**62, 302), ("n_sequences", 5, 301),
                         ("n_tokens", 0, 302), ("n_tokens", 2**62, 302), ("n_tokens", 10**6, 301), ("n_targets", -1, 302),
                         ("n_targets", 10**6, 302), ("n_targets", 1.5, 301), ("n_targets", GONE, 301)):
    says = "dataset" if (key, code) in (("n_sequences", 301), ("n_tokens", 301)) else key
    case("train", f"data {key} = {'gone' if value is GONE else value}", to.attribute(DATA, key, value), code,
         f"{DATA}: .*{says}",
         2 if value in (2**62, 321) else None)
for key in ("tokens", "labels", "seq_offsets", "doc_offsets", "seq_targets"):
    case("train", f"data {key} is missing", to.dataset(DATA, key, GONE), 301, f"{DATA}: .*{key}",
         2 if key == "tokens" else None)
    case("train", f"data {key} is short", to.dataset(DATA, key, lambda data: data[:-1]),
         302 if key == "doc_offsets" else 301, f"{DATA}: .*{key}")
    case("train", f"data {key} is of floats", to.dataset(DATA, key, lambda data: data.astype("f4")), 301, f"{DATA}: .*{key}")
    case("train", f"data {key} is compressed", to.dataset(DATA, key, lambda data: data, chunks=(8,), compression="gzip"),
         301, f"{DATA}: .*{key}")
for what, key, at, value in (("first offset", "seq_offsets", 0, 1), ("falling offset", "seq_offsets", 1, 0),
                             ("negative offset", "seq_offsets", 1, -INT64), ("last offset", "doc_offsets", -1, 2**60),
                             ("border of no document", "doc_offsets", 1, 5), ("sum of targets", "seq_targets", 0, 1),
                             ("targets past the sequence", "seq_targets", 0, 2**32 - 1)):
    case("train", f"data {what}", to.values(DATA, key, at, value), 302, f"{DATA}: .*(seq|doc|n)_",
         2 if value == -INT64 else None)
case("train", "data ids above the vocabulary", to.signed_data(to.values(DATA, "tokens", slice(None), 4_000_000)), 302,
     f"{DATA}: .*4000000", 2)
case("train", "data labels of another token", to.signed_data(to.values(DATA, "labels", slice(None), 7)), 302, DATA, 2)
case("train", "data label of -1", to.signed_data(to.h5(DATA, lambda file: first_target(file, -1))), 302, DATA)
case("check data", "data tokens are damaged", to.values(DATA, "tokens", 3, 9), 304, f"{DATA}: .*tokens")
case("check data", "data labels are damaged", to.values(DATA, "labels", 0, 9), 304, f"{DATA}: .*labels")
for command, name in (("train", DATA), ("train", "eval.h5"), ("eval", "eval.h5"), ("sample", "prompts.h5")):
    for key in ("tokens", "labels"):
        case(command, f"{name} {key} are damaged", to.h5(name, lambda file, key=key: flip_lowest_bit(file[key])), 304,
             f"{name}: {key} hashes to", 2)
for command in ("train", "check data"):
    case(command, "data border is moved", to.h5(DATA, move_border), 304, f"{DATA}: .*layout_xxh3", 2 if command == "train" else None)
case("check data", "data decode table is falling", to.values(DATA, "decode_offsets", 3, 0), 302, f"{DATA}: .*decode_offsets")
def template(text):
    """The chat template as bytes, with its own hash."""
    return to.both(to.attribute(DATA, "chat_template", text),
                   to.attribute(DATA, "template_sha256", hashlib.sha256(text).hexdigest()))


for command, ranks in (("train", 2), ("check data", None), ("inspect data", None)):
    case(command, "data chat template is another", to.attribute(DATA, "chat_template", "{{ messages }}"), 304,
         f"{DATA}: .*template_sha256", ranks)
for what, change, code, says in (("is of 256 KiB and a byte", template(b"x" * ((256 << 10) + 1)), 301, "chat_template.*at most"),
                                 ("is of 2 MiB", template(b"x" * (2 << 20)), 301, "chat_template"),
                                 ("is not UTF-8", template(b"{{ m }}\xff"), 302, "chat_template.*UTF-8"),
                                 ("is a number", to.attribute(DATA, "chat_template", 7), 301, "chat_template"),
                                 ("holds a NUL", template(b"a\0b"), 304, "template_sha256"),
                                 ("has no hash", to.attribute(DATA, "template_sha256", GONE), 301, "template_sha256"),
                                 ("has a long hash", to.attribute(DATA, "template_sha256", "0" * 500), 301, "template_sha256")):
    case("train", f"data chat template {what}", change, code, f"{DATA}: .*{says}")
case("sample", "prompts are missing", to.gone("prompts.h5"), 300, missing("--prompts", "prompts.h5"), 2)
case("sample", "prompts are cut off", to.cut("prompts.h5", 0.5), 301, "prompts.h5", 2)
case("sample", "prompts are a pipe", to.fifo("prompts.h5"), 301, "prompts.h5")
case("sample", "prompts have a falling decode table", to.values("prompts.h5", "decode_offsets", 3, INT64 - 1), 302,
     "prompts.h5: .*decode_offsets", 2)
case("sample", "prompts have ids above the vocabulary", to.signed_data(to.values("prompts.h5", "tokens", slice(None), 999),
                                                                       name="prompts.h5"), 302,
     "prompts.h5: .*999", 2)


for key, kind in (("tokens", "<u4"), ("doc_offsets", "<i8")):
    case("train", f"data {key} are of 2^40 elements", to.both(to.attribute(DATA, "n_tokens", 2**40),
                                                              to.h5(DATA, unallocated(key, (2**40,), kind))), 301, DATA, 2)
case("train", "data tokens are outside the file", to.h5(DATA, outside("tokens")), 301, f"{DATA}: .*tokens.*inside the file")
case("train", "data format is of 2^15 letters", to.attribute(DATA, "format", "x" * 2**15), 301, f"{DATA}: .*format")
case("train", "data n_tokens is a list", to.attribute(DATA, "n_tokens", np.arange(4)), 301, f"{DATA}: .*n_tokens")


