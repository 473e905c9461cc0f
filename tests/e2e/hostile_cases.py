"""The table of bad inputs: a row is a command, what is wrong, the change that makes it so, the code that docs/troubleshooting.md
promises, and a pattern for the error line from its first letter on, which is the file's name. A row with `ranks` runs
under mpirun on so many. The good inputs and the commands are in test_hostile.py."""
import struct
from dataclasses import dataclass
from typing import Callable

import hostile_changes as to
import numpy as np
from hostile_changes import GONE

INT64 = 2**63
NAN_BF16, INF_BF16 = b"\xc0\x7f", b"\x80\x7f"
NAN_F32, INF_F32 = struct.pack("<f", float("nan")), struct.pack("<f", float("-inf"))
DEEP = b"[" * 100000
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1562824\n"


@dataclass
class Case:
    command: str
    what: str
    change: Callable
    code: int
    says: str
    ranks: int = None
    may_change: str = None  # names that are allowed to

    @property
    def name(self):
        return f"{self.command}: {self.what}" + (f" ({self.ranks} ranks)" if self.ranks else "")


CASES = []


def case(command, what, change, code, says, ranks=None, may_change=None):
    CASES.append(Case(command, what, change, code, says, ranks, may_change))


def not_a_file(command, name, empty=301, ranks=None, says=None):
    """Whatever can stand in a file's place. `says`: the line where it is missing does not name it."""
    case(command, f"{name} is missing", to.gone(name), 300, says or name, ranks)
    case(command, f"{name} is a directory", to.directory(name), 301, f"{name}: is (not a plain file|a folder)", ranks)
    case(command, f"{name} is a pipe", to.fifo(name), 301, f"{name}: is not a plain file", ranks)
    case(command, f"{name} is a device", to.endless(name), 301, f"{name}: is not a plain file")
    case(command, f"{name} is a link to itself", to.link_loop(name), 300, f"{name}: .*symbolic links")
    case(command, f"{name} is a link to nothing", to.link(name, "nowhere"), 300, name)
    case(command, f"{name} is empty", to.empty(name), empty, name, ranks)


# ---- config.json of a model: quantize ----

CONFIG = "model/config.json"


def config(key, value, code, says, command="quantize", ranks=None):
    case(command, f"config.json {key} = {str(value)[:40] if value is not GONE else 'gone'}", to.field(CONFIG, key, value), code,
         f"{CONFIG}: .*{says}", ranks)


not_a_file("quantize", CONFIG, ranks=2)
case("quantize", "config.json is HTML", to.put(CONFIG, HTML), 301, f"{CONFIG}: not valid JSON", 2)
case("quantize", "config.json is cut off", to.cut(CONFIG, 0.5), 301, f"{CONFIG}: not valid JSON: line", 2)
case("quantize", "config.json has text behind", to.longer(CONFIG, b"x"), 301, f"{CONFIG}: not valid JSON")
case("quantize", "config.json has a NUL", to.longer(CONFIG, b"\0"), 301, f"{CONFIG}: not valid JSON")
case("quantize", "config.json is nested 100000 deep", to.raw_field(CONFIG, "use_cache", DEEP.decode()), 301, f"{CONFIG}: .*deeper than 64", 2)
case("quantize", "config.json has a key twice", to.twice(CONFIG, "vocab_size"), 301, f"{CONFIG}: .*duplicate", 2)
case("quantize", "config.json is a list", to.put(CONFIG, b"[]"), 301, f"{CONFIG}: .*object")
case("quantize", "config.json is UTF-16", to.of_content(CONFIG, lambda data: data.decode().encode("utf-16")), 301, f"{CONFIG}: not valid JSON")
case("quantize", "config.json has bytes that are not UTF-8", to.raw_field(CONFIG, "model_type", '"\udcff"'), 301, f"{CONFIG}: not valid JSON: .*decode byte 0xff")
case("quantize", "config.json has NaN", to.raw_field(CONFIG, "rope_theta", "NaN"), 301, f"{CONFIG}: not valid JSON")
case("quantize", "config.json has a number of 5000 digits", to.raw_field(CONFIG, "vocab_size", "9" * 5000), 301, f"{CONFIG}: not valid JSON")
case("quantize", "config.json has 1e999", to.raw_field(CONFIG, "rope_theta", "1e999"), 301, f"{CONFIG}: not valid JSON")
case("quantize", "config.json is of 17 MiB", to.longer(CONFIG, b" " * (17 << 20)), 302, f"{CONFIG}: .*bytes")
for key, value in (("hidden_size", 0), ("hidden_size", -64), ("hidden_size", 2**40), ("hidden_size", "64"), ("hidden_size", 64.0),
                   ("hidden_size", 66), ("num_hidden_layers", 0), ("num_hidden_layers", 10**9), ("num_hidden_layers", INT64 - 1),
                   ("num_attention_heads", 0), ("num_attention_heads", 3), ("num_attention_heads", [4]),
                   ("num_key_value_heads", 3), ("num_key_value_heads", 8), ("intermediate_size", 0), ("intermediate_size", 2**40),
                   ("vocab_size", 0), ("vocab_size", 2**40), ("vocab_size", True), ("head_dim", 15), ("head_dim", 2**31),
                   ("rms_norm_eps", 0), ("rms_norm_eps", -1e-5), ("rms_norm_eps", 1), ("rope_theta", 0), ("rope_theta", "1e4"),
                   ("max_position_embeddings", 0), ("tie_word_embeddings", "true"), ("attention_bias", 1),
                   ("rope_scaling", 7), ("rope_scaling", {"rope_type": "linear", "factor": -1})):
    says = "factor" if isinstance(value, dict) else key
    config(key, value, 302, says, ranks=2 if value in (2**40, INT64 - 1) else None)
for key, value, says in (("model_type", "gpt2", "gpt2"), ("architectures", ["GPT2LMHeadModel"], "GPT2LMHeadModel"),
                         ("hidden_act", "gelu", "gelu"), ("torch_dtype", "float64", "float64"), ("sliding_window", 8, "sliding_window"),
                         ("rope_scaling", {"rope_type": "yarn", "factor": 2}, "yarn"), ("auto_map", {"a": "b.c"}, "auto_map"),
                         ("attention_dropout", 0.5, "attention_dropout"), ("quantization_config", {"quant_method": "gptq"}, "gptq"),
                         ("qk_norm\n", True, r"qk_norm")):
    config(key, value, 303, says, ranks=2 if key == "model_type" else None)
config("model_type", GONE, 302, "model_type")
# Believable by itself, and not what the tensors are.
TENSORS = "model/model.safetensors"
for key, value in (("num_hidden_layers", 1), ("num_hidden_layers", 3), ("intermediate_size", 97), ("vocab_size", 319),
                   ("num_key_value_heads", 4), ("tie_word_embeddings", False)):
    case("quantize", f"{key} = {value} is not the tensors'", to.field(CONFIG, key, value), 305, "model: .*tensor", 2)
for command in ("inspect model", "check model"):
    case(command, "config.json is cut off", to.cut(CONFIG, 0.5), 301, f"{CONFIG}: not valid JSON")
    case(command, "config.json is a pipe", to.fifo(CONFIG), 301, f"{CONFIG}: .*not a plain file")
    config("vocab_size", 2**40, 302, "vocab_size", command)

# ---- safetensors: quantize, check, inspect, merge --original ----

not_a_file("quantize", TENSORS, ranks=2, says="model")
UP, NORM, TABLE = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"


def file_of_tensors(what, change, code, says, ranks=None, command="quantize"):
    case(command, f"safetensors {what}", change, code, f"{TENSORS}: .*({says})", ranks)


for content, what in ((HTML, "HTML"), (LFS, "a Git LFS pointer"), (b"PK\3\4" + bytes(100), "a zip archive of pickles"),
                      (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"), (b"GGUF\3\0\0\0" + bytes(100), "a GGUF")):
    file_of_tensors(f"is {what}", to.put(TENSORS, content), 301, "", 2 if content is LFS else None)
for keep in (7, 8, 9, 200, 0.3, 0.9, -1):
    file_of_tensors(f"is cut at {keep}", to.cut(TENSORS, keep), 301, "", 2 if keep == 0.9 else None)
for length in (0, 1, 2**31, 2**32 + 8, INT64, INT64 - 1, 2**64 - 8, 2**64 - 1, 100_000_001):
    file_of_tensors(f"header of {length} bytes", to.header_length(TENSORS, length), 301, "header", 2 if length == INT64 else None)
file_of_tensors("has a byte behind", to.longer(TENSORS), 301, "end at byte")
file_of_tensors("header is a list", to.header_text(TENSORS, lambda text: b"[" + text + b"]"), 301, "header")
file_of_tensors("header begins with a space", to.header_text(TENSORS, lambda text: b" " + text), 301, "header")
file_of_tensors("header is nested 100000 deep", to.header_text(TENSORS, lambda text: b'{"a":' * 100000 + b"1" + b"}" * 100000), 301, "deeper than 64", 2)
file_of_tensors("header has a tensor twice", to.header_text(TENSORS, lambda text: text[:-1] + b', "' + NORM.encode() + b'": {}}'), 301, "duplicate", 2)
file_of_tensors("header has dtype twice", to.header_text(TENSORS, lambda text: text.replace(b'"dtype"', b'"dtype": "F32", "dtype"', 1)), 301, "duplicate")
file_of_tensors("header has a name that is not UTF-8", to.header_text(TENSORS, lambda text: text.replace(b"model.norm", b"model.n\xffrm", 1)), 301, "decode byte 0xff", 2)
file_of_tensors("header has a NUL in a name", to.header_text(TENSORS, lambda text: text.replace(b"model.norm", b"model.n\\u0000rm", 1)), 301, "")
file_of_tensors("has a name of 5000 letters", to.more_tensor(TENSORS, "x" * 5000), 301, "name has 5000 bytes")
file_of_tensors("has a tensor without a name", to.more_tensor(TENSORS, ""), 301, "name has 0 bytes")
file_of_tensors("metadata is a number", to.header_field(TENSORS, "__metadata__", 3), 301, "__metadata__")
file_of_tensors("metadata holds a number", to.header_field(TENSORS, "__metadata__", {"format": 3}), 301, "__metadata__")
for key, value, says in (("dtype", GONE, "entry"), ("dtype", 3, "dtype"), ("shape", "64", "shape"), ("shape", GONE, "entry"),
                         ("shape", [96, -64], "shape"), ("shape", [96.0, 64], "shape"), ("shape", [2**40, 2**40], "shape"),
                         ("shape", [2**40, 64], "data_offsets"), ("shape", [1] * 9 + [96, 64], "shape"), ("shape", [96, 63], "data_offsets"),
                         ("data_offsets", [0], "data_offsets"), ("data_offsets", [8, 4], "data_offsets"), ("data_offsets", [0, 2**40], "data_offsets"),
                         ("data_offsets", [-8, 8], "data_offsets"), ("data_offsets", [0.0, 8.0], "data_offsets"), ("data_offsets", [0, 12288], "overlap"),
                         ("extra", 1, "entry")):
    file_of_tensors(f"{key} = {'gone' if value is GONE else value}", to.header_field(TENSORS, f"{UP}|{key}", value), 301, f"{UP}.*{says}|overlap|a hole",
                    2 if value == [2**40, 2**40] or says == "overlap" else None)
file_of_tensors("has an unknown dtype", to.header_field(TENSORS, f"{UP}|dtype", "F7_E4M2"), 303, "F7_E4M2", 2)
file_of_tensors("is not covered by its tensors", to.header_field(TENSORS, NORM, GONE), 301, "a hole|end at byte")
case("quantize", "a tensor is missing", to.without_tensor(TENSORS, UP), 305, f"model: .*{UP}", 2)
case("quantize", "the norm is missing", to.without_tensor(TENSORS, NORM), 305, f"model: .*{NORM}")
case("quantize", "the table is missing", to.without_tensor(TENSORS, TABLE), 305, f"model: .*{TABLE}")
case("quantize", "a tensor too many", to.more_tensor(TENSORS, "model.layers.0.self_attn.q_norm.weight"), 305, "model: .*q_norm", 2)
case("quantize", "a tensor of a third layer", to.more_tensor(TENSORS, "model.layers.2.mlp.up_proj.weight"), 305, "model: .*layers.2")
case("quantize", "a tensor is transposed", to.changed_tensor(TENSORS, UP, shape=(64, 96)), 305, f"model: .*{UP}", 2)
case("quantize", "a tensor is flat", to.changed_tensor(TENSORS, UP, shape=(64 * 96,)), 305, f"model: .*{UP}")
case("quantize", "a tensor is empty", to.changed_tensor(TENSORS, UP, shape=(0, 64), content=b""), 305, f"model: .*{UP}")
case("quantize", "a tensor is I16", to.changed_tensor(TENSORS, UP, dtype="I16"), 303, f"model: .*{UP}", 2)
case("quantize", "a tensor is F64", to.changed_tensor(TENSORS, UP, dtype="F64", content=bytes(64 * 96 * 8)), 303, f"model: .*{UP}")
for bits, word in ((NAN_BF16, "NaN"), (INF_BF16, "infinity")):
    for tensor in (UP, NORM, TABLE, "model.layers.0.input_layernorm.weight"):
        case("quantize", f"{word} in {tensor}", to.number_in(TENSORS, tensor, bits, 7), 302, f"model: .*{tensor}", 2 if word == "NaN" else None)
        case("check model", f"{word} in {tensor}", to.number_in(TENSORS, tensor, bits, 7), 302, f"model: .*{tensor}.*element 7")
for command in ("inspect model", "check model", "merge original"):
    case(command, "safetensors is a pipe", to.fifo(TENSORS), 301, f"{TENSORS}: is not a plain file")
    case(command, "safetensors is cut off", to.cut(TENSORS, 0.9), 301, f"{TENSORS}: ")
    case(command, "safetensors header of 2^63 bytes", to.header_length(TENSORS, INT64), 301, f"{TENSORS}: .*header")
case("merge original", "a weight was changed", to.number_in(TENSORS, NORM, b"\1\2", 3), 304, f"model: .*{NORM}")
case("merge original", "a tensor is missing", to.without_tensor(TENSORS, UP), 305, f"model: .*{UP}")
case("merge original", "config.json is another's", to.field(CONFIG, "rms_norm_eps", 1e-3), 302, "model")

# ---- several files and their index: quantize ----

INDEX, FIRST, SECOND = "sharded/model.safetensors.index.json", "sharded/model-00001-of-00002.safetensors", "sharded/model-00002-of-00002.safetensors"


def index(what, change, code, says, ranks=None):
    case("quantize sharded", f"index {what}", change, code, f"{INDEX}: .*{says}", ranks)


for name in ("../model/model.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b.safetensors", "x\n../y"):
    index(f"names {name!r}", to.of_content(INDEX, lambda data, name=name: data.replace(b'"model-00002-of-00002.safetensors"', to.json.dumps(name).encode(), 1)),
          301, "weight_map", 2 if name.startswith("../") else None)
for value in (7, None, ["model-00001-of-00002.safetensors"], {"a": 1}):
    index(f"maps to {value}", to.of_content(INDEX, lambda data, value=value: data.replace(b'"model-00002-of-00002.safetensors"', to.json.dumps(value).encode(), 1)),
          301, "weight_map")
not_a_file("quantize sharded", INDEX, says="sharded")
index("is cut off", to.cut(INDEX, 0.5), 301, "not valid JSON", 2)
index("is a list", to.put(INDEX, b"[]"), 301, "object")
index("has no map", to.field(INDEX, "weight_map", GONE), 302, "weight_map")
index("has a list for a map", to.field(INDEX, "weight_map", []), 302, "weight_map")
case("quantize sharded", "index has an empty map", to.field(INDEX, "weight_map", {}), 305, "sharded: tensor .* is missing", 2)
index("has a tensor twice", to.of_content(INDEX, lambda data: data.replace(b'"model.norm.weight"', b'"model.norm.weight": "a", "model.norm.weight"', 1)), 301, "duplicate")
index("is nested 100000 deep", to.raw_field(INDEX, "metadata", DEEP.decode()), 301, "deeper than 64")
index("names a tensor that no file holds", to.field(INDEX, "weight_map/lm_head.weight", "model-00002-of-00002.safetensors"), 305, "lm_head", 2)
index("names another file for a tensor", to.of_content(INDEX, lambda data: data.replace(b"00002-of", b"00001-of", 1)), 305, "not in model-00001")
case("quantize sharded", "index lacks a tensor", to.of_content(INDEX, lambda data: data.replace(b'"model.norm.weight"', b'"model.norm.bias"', 1)), 305, "sharded.*model.norm", 2)
case("quantize sharded", "a file is missing", to.gone(SECOND), 300, SECOND, 2)
case("quantize sharded", "a file is a directory", to.directory(SECOND), 301, f"{SECOND}: .*not a plain file")
case("quantize sharded", "a file is a pipe", to.fifo(SECOND), 301, f"{SECOND}: .*not a plain file", 2)
case("quantize sharded", "a file is a link to itself", to.link_loop(SECOND), 300, SECOND)
case("quantize sharded", "a file is empty", to.empty(SECOND), 301, SECOND, 2)
case("quantize sharded", "a file is cut off", to.cut(SECOND, -2), 301, SECOND)
case("quantize sharded", "a file is the other", to.both(to.gone(SECOND), to.copied(FIRST, SECOND)), 305, "sharded", 2)
case("quantize sharded", "a tensor is in both files", to.more_tensor(FIRST, NORM, "BF16", (64,), bytes(128)), 305, f"{FIRST}|{SECOND}")

# ---- a bitsandbytes checkpoint: quantize ----

BNB = "bnb/model.safetensors"
LINEAR = "model.layers.0.mlp.up_proj.weight"
STATE = LINEAR + ".quant_state.bitsandbytes__nf4"


def state(what, change_text, code, says, ranks=None):
    """The JSON text that stands in a tensor of bytes."""
    def alter(held):
        text = change_text(held[STATE][2])
        held[STATE] = ["U8", [len(text)], text]
    case("quantize bnb", f"quant_state {what}", to.tensors(BNB, alter), code, f"bnb.*{says}", ranks)


def state_field(key, value):
    def alter(text):
        held = to.json.loads(text)
        to.set_in(held, key, value)
        return to.json.dumps(held).encode()
    return alter


for what, key, value, code in (("fp4", "quant_type", "fp4", 303), ("of blocks of 128", "blocksize", 128, 303), ("of blocks of -1", "blocksize", -1, 303),
                               ("of another shape", "shape", [248, 71], 305), ("of no shape", "shape", GONE, 302), ("of shape 2^40", "shape", [2**40, 2**40], 305),
                               ("of float64", "dtype", "float64", 303), ("nested by 64", "nested_blocksize", 64, 303),
                               ("with an offset of text", "nested_offset", "0.5", 302), ("with an offset of 1e300", "nested_offset", 1e300, 302),
                               ("with a key of its own", "quant_twice", True, 303), ("without a type", "quant_type", GONE, 302)):
    state(what, state_field(key, value), code, f"up_proj.*{'quant_twice' if 'own' in what else key}", 2 if key in ("quant_type", "shape") else None)
state("is cut off", lambda text: text[:20], 301, "up_proj.*JSON", 2)
state("is nested 30000 deep", lambda text: b"[" * 30000, 301, "up_proj.*deeper")
state("has NaN", lambda text: text.replace(b'"nested_offset": ', b'"nested_offset": NaN, "x": ', 1), 301, "up_proj.*JSON")
state("is a list", lambda text: b"[]", 301, "up_proj.*object")
state("is of 1 MiB", lambda text: text + b" " * (1 << 20), 305, "up_proj")
for suffix, dtype in (("absmax", "F32"), ("nested_absmax", "F16"), ("quant_map", "F16"), ("nested_quant_map", "BF16")):
    name = f"{LINEAR}.{suffix}"
    case("quantize bnb", f"{suffix} is missing", to.without_tensor(BNB, name), 305, f"bnb.*{name}", 2)
    case("quantize bnb", f"{suffix} is too short", to.changed_tensor(BNB, name, dtype="U8", shape=(1,), content=b"\0"), 305, f"bnb.*{name}")
for suffix in ("nested_absmax", "quant_map", "nested_quant_map"):
    for bits, word in ((NAN_F32, "NaN"), (INF_F32, "infinity")):
        case("quantize bnb", f"{word} in {suffix}", to.number_in(BNB, f"{LINEAR}.{suffix}", bits), 303 if suffix.endswith("quant_map") else 302,
             f"bnb.*{LINEAR}.*{suffix}", 2 if word == "NaN" else None)
case("quantize bnb", "NaN in a norm", to.number_in(BNB, "model.norm.weight", NAN_BF16), 302, "bnb.*model.norm.weight")
case("quantize bnb", "codes are too few", to.changed_tensor(BNB, LINEAR, shape=(8, 1), content=bytes(8)), 305, f"bnb.*{LINEAR}")
case("quantize bnb", "codes are missing", to.without_tensor(BNB, LINEAR), 305, f"bnb.*{LINEAR}", 2)
case("quantize bnb", "quant_state is missing", to.without_tensor(BNB, STATE), 305, f"bnb.*{LINEAR}")
case("quantize bnb", "8 bits", to.field("bnb/config.json", "quantization_config/load_in_8bit", True), 303, "bnb/config.json: .*load_in_")
case("quantize bnb", "FP4", to.field("bnb/config.json", "quantization_config/bnb_4bit_quant_type", "fp4"), 303, "bnb/config.json: .*fp4", 2)

# ---- base.h5: train, eval, sample, merge, inspect, check ----

BASE = "base.h5"
not_a_file("train", BASE, ranks=2)
for command in ("eval", "inspect base", "check base", "merge adapter"):
    case(command, "base.h5 is cut off", to.cut(BASE, 0.7), 301, BASE)
    case(command, "base.h5 is a pipe", to.fifo(BASE), 301, BASE)
for content, what in ((HTML, "HTML"), (LFS, "a Git LFS pointer"), (b"\x89HDF\r\n\x1a\n" + bytes(4000), "an HDF5 signature and zeros")):
    case("train", f"base.h5 is {what}", to.put(BASE, content), 301, BASE, 2 if content is LFS else None)
case("train", "base.h5 is a token file", to.both(to.gone(BASE), to.copied("train.h5", BASE)), 301, f"{BASE}: .*qshard-data", 2)
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
base_index("is compressed", to.dataset(BASE, "index", lambda data: data, chunks=(512,), compression="gzip"), 301, "index.*contiguous", 2)
for key, value, code, says in (("config", GONE, 302, "config"), ("config/vocab_size", 2**40, 302, "vocab_size"), ("config/vocab_size", 319, 301, "shape"),
                               ("config/num_hidden_layers", 1000, 301, "units"), ("config/hidden_size", 128, 301, "does not follow"),
                               ("config/model_type", "gpt2", 303, "gpt2"), ("head_chunk_rows", 0, 302, "head_chunk_rows"),
                               ("head_chunk_rows", 1, 301, "units"), ("head_chunk_rows", 2**40, 302, "head_chunk_rows"), ("nested", 1, 301, "nested"),
                               ("nested", False, 301, "absmax|hash"), ("units", {}, 302, "units"), ("units", [], 301, "units"),
                               ("units/0", 7, 302, "name"), ("units/0/nf4_quanta", 2**60, 301, "nf4_quanta"), ("units/0/nf4_quanta", -1, 302, "nf4_quanta"),
                               ("units/0/small_bytes", 2**40, 301, "small_bytes"), ("units/0/small_xxh3", "xyz", 301, "small_xxh3"),
                               ("units/0/raw_dtype", "f64", 301, "raw_dtype"),
                               ("units/0/tensors/0/shape", [64, 2**40], 301, "shape"), ("units/0/tensors/0/shape", [64.0, 64.0], 301, "shape"),
                               ("units/0/tensors/0/offset", 1e300, 302, "offset"), ("units/0/tensors/0/offset", "0", 302, "offset"),
                               ("units/0/tensors/0/map", 5, 302, "map"), ("units/0/tensors/0/map", -1, 302, "map"),
                               ("units/0/tensors/0/quantum", 1, 301, "quantum"), ("units/0/tensors/0/dtype", "u8", 301, "dtype"),
                               ("units/0/tensors/0/name", "../../etc/passwd", 301, "name"), ("units/0/tensors/0/kind", "raw", 301, "nf4_quanta"),
                               ("units/1/name", "layers.0", 301, "name"), ("zero_blocks", -1, 302, "zero_blocks"),
                               ("hashes_sha256", "0" * 64, 304, "hashes_sha256"), ("hashes_sha256", "0", 301, "hashes_sha256"),
                               ("source", None, 302, "source"), ("final", GONE, 302, "final")):
    base_index(f"{key} = {'gone' if value is GONE else value}", to.index_field(key, value), code, says,
               2 if value in (2**40, 2**60, "0" * 64) else None)
for key in ("packed", "absmax8", "absmax32", "small", "hash"):
    name = f"units/layers.0/{key}"
    case("train", f"base {key} is missing", to.dataset(BASE, name, GONE), 301, f"{BASE}: .*{name}", 2 if key == "packed" else None)
    case("train", f"base {key} is short", to.dataset(BASE, name, lambda data: data[:1]), 301, f"{BASE}: .*{name}")
    case("train", f"base {key} is of doubles", to.dataset(BASE, name, lambda data: data.astype("f8")), 301, f"{BASE}: .*{name}")
case("train", "base packed is a soft link", to.h5(BASE, lambda file: move_to_link(file, "soft")), 301, f"{BASE}: .*link", 2)
case("train", "base packed is in another file", to.h5(BASE, lambda file: move_to_link(file, "external")), 301, f"{BASE}: .*link")
case("train", "base packed is a group", to.h5(BASE, lambda file: make_group(file, "units/layers.0/packed")), 301, f"{BASE}: .*packed")


def move_to_link(file, kind):
    import h5py
    file.move("units/layers.0/packed", "elsewhere")
    file["units/layers.0/packed"] = h5py.SoftLink("/elsewhere") if kind == "soft" else h5py.ExternalLink("train.h5", "/tokens")


def make_group(file, name):
    del file[name]
    file.create_group(name)


for unit, key, at in (("layers.1", "packed", (-1, 100)), ("layers.1", "absmax8", (-1, 3)), ("layers.1", "absmax32", (-1, 0)), ("layers.0", "small", 5),
                      ("embed.0", "raw", (-1, 3)), ("layers.0", "hash", 0)):
    says = "hash" if key == "hash" else unit
    damaged = to.values(BASE, f"units/{unit}/{key}", at, 77)
    case("train", f"base {unit} {key} is damaged", damaged, 304, f"{BASE}: .*{says}", 2)
    case("check base", f"base {unit} {key} is damaged", damaged, 304, f"{BASE}: .*{says}")
case("sample", "base final norm is damaged", to.values(BASE, "final/small", 3, 77), 304, f"{BASE}: .*final", 2)
for value, word in ((np.nan, "NaN"), (np.inf, "infinity")):
    case("train", f"base {word} in a map", to.values(BASE, "maps", (0, 3), value), 302, f"{BASE}: .*map", 2)
    signed = to.signed_base(to.values(BASE, "units/layers.1/absmax32", (-1, 0), value))
    for command, ranks in (("train", 2), ("eval", None), ("check base", None), ("merge adapter", None)):
        case(command, f"base {word} in absmax32, hashed anew", signed, 302, f"{BASE}: .*layers.1.*absmax32", ranks)
case("train", "base NaN in a norm, hashed anew", to.signed_base(to.values(BASE, "units/layers.0/small", slice(2, 4), list(NAN_BF16))), 302,
     f"{BASE}: .*layers.0.*layernorm", 2)
case("check base", "base NaN in the table, hashed anew", to.signed_base(to.values(BASE, "units/embed.0/raw", (0, slice(2, 4)), list(NAN_BF16))), 302,
     f"{BASE}: .*embed_tokens")
case("eval", "base infinity in the final norm, hashed anew", to.signed_base(to.values(BASE, "final/small", slice(2, 4), list(INF_BF16))), 302,
     f"{BASE}: .*model.norm")
case("train", "base has a user block", to.of_content(BASE, lambda data: bytes(512) + data), 301, BASE)

# ---- token files: train, eval, sample, inspect, check ----

DATA = "train.h5"
not_a_file("train", DATA, ranks=2)
for command in ("inspect data", "check data"):
    case(command, "train.h5 is cut off", to.cut(DATA, 0.7), 301, DATA)
    case(command, "train.h5 is a pipe", to.fifo(DATA), 301, DATA)
    case(command, "train.h5 is HTML", to.put(DATA, HTML), 301, DATA)
case("train", "data.train is the base", to.both(to.gone(DATA), to.copied(BASE, DATA)), 301, f"{DATA}: .*qshard-base", 2)
case("train", "data.eval is missing", to.gone("eval.h5"), 300, "eval.h5", 2)
case("eval", "data.eval is cut off", to.cut("eval.h5", 0.5), 301, "eval.h5", 2)
case("eval", "data.eval is a pipe", to.fifo("eval.h5"), 301, "eval.h5")
for key, value, code in (("format", "qshard-dada", 301), ("format_version", 2, 303), ("vocab_size", 0, 302), ("vocab_size", 2**40, 302), ("vocab_size", 321, 302),
                         ("seq_len", 0, 302), ("seq_len", 2**40, 302), ("packed", 2, 302), ("n_sequences", 0, 302), ("n_sequences", 2**62, 302),
                         ("n_sequences", 5, 301), ("n_tokens", 0, 302), ("n_tokens", 2**62, 302), ("n_tokens", 10**6, 301), ("n_targets", -1, 302),
                         ("n_targets", 10**6, 302), ("n_targets", 1.5, 301), ("n_targets", GONE, 301)):
    says = "dataset" if (key, code) in (("n_sequences", 301), ("n_tokens", 301)) else key
    case("train", f"data {key} = {'gone' if value is GONE else value}", to.attribute(DATA, key, value), code, f"{DATA}: .*{says}",
         2 if value in (2**62, 321) else None)
for key in ("tokens", "labels", "seq_offsets", "doc_offsets", "seq_targets"):
    case("train", f"data {key} is missing", to.dataset(DATA, key, GONE), 301, f"{DATA}: .*{key}", 2 if key == "tokens" else None)
    case("train", f"data {key} is short", to.dataset(DATA, key, lambda data: data[:-1]), 302 if key == "doc_offsets" else 301, f"{DATA}: .*{key}")
    case("train", f"data {key} is of floats", to.dataset(DATA, key, lambda data: data.astype("f4")), 301, f"{DATA}: .*{key}")
    case("train", f"data {key} is compressed", to.dataset(DATA, key, lambda data: data, chunks=(8,), compression="gzip"), 301, f"{DATA}: .*{key}")
for what, key, at, value in (("first offset", "seq_offsets", 0, 1), ("falling offset", "seq_offsets", 1, 0), ("negative offset", "seq_offsets", 1, -INT64),
                             ("last offset", "doc_offsets", -1, 2**60), ("border of no document", "doc_offsets", 1, 5), ("sum of targets", "seq_targets", 0, 1),
                             ("targets past the sequence", "seq_targets", 0, 2**32 - 1)):
    case("train", f"data {what}", to.values(DATA, key, at, value), 302, f"{DATA}: .*(seq|doc|n)_", 2 if value == -INT64 else None)
case("train", "data ids above the vocabulary", to.signed_data(to.values(DATA, "tokens", slice(None), 4_000_000)), 302, f"{DATA}: .*4000000", 2)
case("train", "data labels of another token", to.signed_data(to.values(DATA, "labels", slice(None), 7)), 302, DATA, 2)
case("train", "data label of -1", to.signed_data(to.h5(DATA, lambda file: first_target(file, -1))), 302, DATA)
case("check data", "data tokens are damaged", to.values(DATA, "tokens", 3, 9), 304, f"{DATA}: .*tokens")
case("check data", "data labels are damaged", to.values(DATA, "labels", 0, 9), 304, f"{DATA}: .*labels")
case("check data", "data decode table is falling", to.values(DATA, "decode_offsets", 3, 0), 302, f"{DATA}: .*decode_offsets")
case("sample", "prompts are missing", to.gone("prompts.h5"), 300, "prompts.h5", 2)
case("sample", "prompts are cut off", to.cut("prompts.h5", 0.5), 301, "prompts.h5", 2)
case("sample", "prompts are a pipe", to.fifo("prompts.h5"), 301, "prompts.h5")
case("sample", "prompts have a falling decode table", to.values("prompts.h5", "decode_offsets", 3, INT64 - 1), 302, "prompts.h5: .*decode_offsets", 2)
case("sample", "prompts have ids above the vocabulary", to.signed_data(to.values("prompts.h5", "tokens", slice(None), 999), name="prompts.h5"), 302,
     "prompts.h5: .*999", 2)


def first_target(file, value):
    labels = file["labels"][()]
    file["labels"][int(np.argmax(labels >= 0))] = value


# ---- PEFT adapter: eval, lora.init, merge, inspect, check ----

SETTINGS, LORA = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
B_OF = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
case("eval adapter", "adapter is missing", to.gone("adapter"), 300, "adapter", 2)
case("eval adapter", "adapter is an empty directory", to.directory("adapter"), 300, "adapter", 2)
case("eval adapter", "adapter is a file", to.put("adapter", b"x"), 300, "adapter")
not_a_file("init", SETTINGS, says="adapter")
not_a_file("eval adapter", LORA, says="adapter")
for key, value, code in (("r", 0, 302), ("r", 2**40, 302), ("r", "8", 302), ("r", GONE, 302), ("lora_alpha", 0, 302), ("lora_alpha", -1, 302),
                         ("lora_alpha", "16", 302), ("lora_dropout", 2, 302), ("use_rslora", 1, 302), ("peft_type", "LOHA", 303), ("peft_type", GONE, 302),
                         ("bias", "all", 303), ("use_dora", True, 303), ("modules_to_save", ["lm_head"], 303), ("rank_pattern", {"q_proj": 4}, 303),
                         ("fan_in_fan_out", True, 303), ("target_modules", ".*proj", 303), ("target_modules", [], 303), ("target_modules", ["lm_head"], 303),
                         ("target_modules", ["../q_proj"], 303), ("target_modules", [7], 303), ("init_lora_weights", "pissa", 303)):
    case("eval adapter", f"adapter {key} = {'gone' if value is GONE else value}", to.field(SETTINGS, key, value), code, f"{SETTINGS}: .*{key}",
         2 if value in (2**40, "LOHA") else None)
for command, ranks in (("eval adapter", 2), ("init", 2), ("merge adapter", None), ("check adapter", None), ("inspect adapter", None)):
    case(command, "adapter r is not the tensors'" if command not in ("check adapter", "inspect adapter") else "adapter r is 2^40",
         to.field(SETTINGS, "r", 8 if command not in ("check adapter", "inspect adapter") else 2**40),
         305 if command not in ("check adapter", "inspect adapter") else 302, "adapter", ranks) if command != "init" else None
    case(command, "adapter_config.json is cut off", to.cut(SETTINGS, 0.5), 301, f"{SETTINGS}: not valid JSON", ranks)
    case(command, "adapter_config.json has NaN", to.raw_field(SETTINGS, "lora_alpha", "NaN"), 301, f"{SETTINGS}: not valid JSON")
    case(command, "adapter_config.json has a key twice", to.twice(SETTINGS, "r"), 301, f"{SETTINGS}: .*duplicate")
    case(command, "adapter_model.safetensors is a pipe", to.fifo(LORA), 301, f"{LORA}: .*not a plain file", ranks)
    case(command, "adapter_model.safetensors is cut off", to.cut(LORA, 0.8), 301, LORA, ranks)
case("init", "adapter of another rank", to.field(SETTINGS, "r", 8), 302, "adapter: .*lora.rank", 2)
case("init", "adapter of another scale", to.field(SETTINGS, "lora_alpha", 17), 302, "adapter: .*lora_alpha")
case("init", "adapter of fewer linears", to.field(SETTINGS, "target_modules", ["q_proj"]), 302, "adapter: .*target_modules")
for command, ranks in (("eval adapter", 2), ("init", 2), ("merge adapter", None)):
    case(command, "adapter lacks a tensor", to.without_tensor(LORA, B_OF), 305, f"adapter: .*{B_OF}", ranks)
    case(command, "adapter has a tensor too many", to.more_tensor(LORA, "base_model.model.lm_head.lora_A.weight"), 305, "adapter: .*holds", ranks)
    case(command, "adapter has a transposed tensor", to.changed_tensor(LORA, B_OF, shape=(16, 96)), 305, f"adapter: .*{B_OF}")
    case(command, "adapter has a tensor of I32", to.changed_tensor(LORA, B_OF, dtype="I32"), 303, f"adapter: .*{B_OF}")
for command, ranks in (("eval adapter", 2), ("init", 2), ("merge adapter", None), ("check adapter", None)):
    for bits, word in ((NAN_F32, "NaN"), (INF_F32, "infinity")):
        case(command, f"adapter {word}", to.number_in(LORA, B_OF, bits, 5), 302, f"adapter: .*{B_OF}.*element 5.*not finite", ranks if word == "NaN" else None)

# ---- YAML configuration: train, eval, check, inspect ----

YAML = "run.yaml"
for command, ranks in (("train", 2), ("check config", None)):
    case(command, "configuration is missing", to.gone(YAML), 300, YAML, ranks)
    case(command, "configuration is empty", to.empty(YAML), 202, f"{YAML}.*empty", ranks)
    case(command, "configuration is a link to itself", to.link_loop(YAML), 300, YAML)
    case(command, "configuration is a pipe", to.fifo(YAML), 301, YAML, ranks)
    case(command, "configuration is a device", to.endless(YAML), 301, YAML)
    case(command, "configuration is of 2 MiB", to.longer(YAML, b"# " + b"x" * (2 << 20)), 202, f"{YAML}: .*bytes", ranks)
    case(command, "configuration is HTML", to.put(YAML, HTML), 202, YAML)
    case(command, "configuration has a NUL", to.longer(YAML, b"\0\n"), 202, f"{YAML}: .*NUL", ranks)
    case(command, "configuration is UTF-16", to.of_content(YAML, lambda data: data.decode().encode("utf-16")), 202, f"{YAML}: .*(NUL|UTF-16)")
    case(command, "configuration is not UTF-8", to.longer(YAML, b"# \xff\xfe\n"), 202, f"{YAML}: .*UTF-8|{YAML}:\\d+: .*UTF-8")
    case(command, "configuration has tabs", to.longer(YAML, b"\tseed: 3\n"), 202, f"{YAML}:\\d+: ")
case("train", "configuration is a directory", to.directory(YAML), 301, YAML, 2)
BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9))
case("train", "configuration is a bomb of aliases", to.longer(YAML, BOMB), 201, f"{YAML}:\\d+: unknown key|anchor", 2)
case("train", "configuration has a bomb in a value", to.swap(YAML, b"betas: [0.9, 0.999]", b"betas: &a [*a, *a]"), 202, f"{YAML}:\\d+: .*(anchor|alias)", 2)
case("train", "configuration is nested 10000 deep", to.longer(YAML, b"cpu: " + b"[" * 10000 + b"\n"), 202, f"{YAML}:\\d+: ", 2)
case("train", "configuration has maps 10000 deep", to.longer(YAML, b"cpu: " + b"{a: " * 10000 + b"\n"), 201, f"{YAML}:\\d+: .*cpu.a")
for what, old, new, code, says in (
        ("key twice", b"seed: 42", b"seed: 42\nseed: 43", 201, "seed.*twice"), ("section twice", b"seed: 42", b"lora: {rank: 8}\nseed: 42", 201, "lora.*twice"),
        ("unknown key", b"steps: 2", b"stepz: 2", 201, "train.stepz.*did you mean \"train.steps\""), ("tag", b"seed: 42", b"seed: !!int 42", 202, "tag"),
        ("binary tag", b"seed: 42", b"seed: !!python/object:os.system 42", 202, "tag"), ("text for a number", b"seed: 42", b"seed: many", 202, "seed"),
        ("two documents", b"seed: 42", b"seed: 42\n---\nseed: 43", 202, "document"), ("list for a value", b"seed: 42", b"seed: [42]", 202, "seed"),
        ("mapping for a value", b"seed: 42", b"seed: {a: 1}", 202, "seed"), ("negative seed", b"seed: 42", b"seed: -1", 202, "seed"),
        ("seed of 2^63", b"seed: 42", b"seed: 9223372036854775808", 202, "seed"), ("no steps", b"steps: 2", b"steps: 0", 203, "train.steps"),
        ("steps of 2^40", b"steps: 2", b"steps: 1099511627776", 202, "train.steps"), ("seq_len of 2^40", b"seq_len: 64", b"seq_len: 1099511627776", 202, "train.seq_len"),
        ("lr NaN", b"lr: 5.0e-3", b"lr: .nan", 202, "optim.lr"), ("lr infinity", b"lr: 5.0e-3", b"lr: .inf", 202, "optim.lr"),
        ("lr nan as a word", b"lr: 5.0e-3", b"lr: nan", 202, "optim.lr"), ("lr 1e999", b"lr: 5.0e-3", b"lr: 1e999", 202, "optim.lr"),
        ("lr 0", b"lr: 5.0e-3", b"lr: 0", 202, "optim.lr"), ("lr quoted", b"lr: 5.0e-3", b'lr: "5.0e-3"', 202, "optim.lr"),
        ("clip NaN", b"clip: 1.0", b"clip: .NaN", 202, "optim.clip"), ("rank 0", b"rank: 16", b"rank: 0", 202, "lora.rank"),
        ("rank 2^31", b"rank: 16", b"rank: 2147483648", 202, "lora.rank"), ("dropout 1", b"dropout: 0.05", b"dropout: 1.0", 202, "lora.dropout"),
        ("dropout -0.1", b"dropout: 0.05", b"dropout: -0.1", 202, "lora.dropout"), ("another target", b"targets: all-linear", b"targets: [lm_head]", 202, "lm_head"),
        ("betas of one", b"betas: [0.9, 0.999]", b"betas: [0.9]", 202, "optim.betas"), ("betas NaN", b"betas: [0.9, 0.999]", b"betas: [.nan, 0.9]", 202, "optim.betas"),
        ("micro above global", b"micro_batch: 2", b"micro_batch: 64", 203, "micro_batch"), ("device", b"seed: 42", b"device: tpu\nseed: 42", 202, "device"),
        ("base is the output", b"output: out", b"output: base.h5", 203, "output"), ("unclosed list", b"betas: [0.9, 0.999]", b"betas: [0.9", 202, "YAML|betas"),
        ("control character", b"seed: 42", b"seed: 42 # \x01", 202, "YAML"), ("path of 5000 letters", b"base: base.h5", b"base: " + b"x" * 5000, 202, "base"),
        ("base of line breaks", b"base: base.h5", b'base: "no\\nsuch\\nfile"', 202, "base: .*control character")):
    case("train", f"configuration {what}", to.swap(YAML, old, new), code, f"{YAML}(:\\d+)?: .*({says})", 2 if code == 203 or what in ("lr NaN", "key twice", "base of line breaks") else None)
case("train", "seq_len below the data's", to.swap(YAML, b"seq_len: 64", b"seq_len: 8"), 302, f"{DATA}|eval.h5", 2)
case("eval", "configuration without data.eval", to.swap(YAML, b"  eval: eval.h5\n", b""), 202, f"{YAML}: .*data.eval")
case("train", "output is a file", to.put("out", b"x"), 204, "out", 2)
case("train", "output is another's directory", to.both(to.directory("out"), to.put("out/thesis.tex", b"x")), 204, "out: .*thesis.tex", 2)
case("train", "output is a link to itself", to.link_loop("out"), 204, "out", 2)

# ---- runs and checkpoints: resume, eval, export, merge, inspect, check ----

STEP = "run/step-00000002"
MANIFEST, RANK0, RANK1 = f"{STEP}/manifest.json", f"{STEP}/rank-00000.h5", f"{STEP}/rank-00001.h5"
RUN = "run/run.json"
for what, change, code, says in (
        ("is cut off", to.cut(RUN, 0.5), 301, "JSON"), ("is empty", to.empty(RUN), 301, "JSON"), ("is a directory", to.directory(RUN), 301, "plain file"),
        ("is a pipe", to.fifo(RUN), 301, "plain file"), ("is a list", to.put(RUN, b"[]"), 301, "object"), ("is another's", to.field(RUN, "format", "npm"), 204, "npm"),
        ("is of version 9", to.field(RUN, "format_version", 9), 302, "format_version"), ("has an id of 5000 letters", to.field(RUN, "run_id", "x" * 5000), 302, "run_id"),
        ("has no id", to.field(RUN, "run_id", GONE), 302, "run_id"), ("has finished = 7", to.field(RUN, "finished", 7), 302, "finished"),
        ("is nested 100000 deep", to.put(RUN, DEEP), 301, "deeper than 64")):
    case("resume", f"run.json {what}", change, code, f"{RUN}: .*{says}", 2 if code != 302 else None)
for command in ("inspect run", "check run"):
    case(command, "run.json is cut off", to.cut(RUN, 0.5), 301, f"{RUN}: .*JSON")
    case(command, "run.json is a pipe", to.fifo(RUN), 301, f"{RUN}: .*plain file")
    case(command, "run.json is another's", to.field(RUN, "format", "npm"), 301, f"{RUN}: .*npm")
OLD = "run/config.yaml"
case("resume", "config.yaml is a pipe", to.fifo(OLD), 301, f"{OLD}: is not a plain file", 2)
case("resume", "config.yaml is no YAML", to.put(OLD, HTML), 202, f"{OLD}:1: ", 2)
case("resume", "config.yaml is of another run", to.swap(OLD, b"seed: 42", b"seed: 41"), 802, "run: .*seed", 2)


def checkpoint(what, change, code, says, commands=("export step", "check step"), ranks=None):
    for command in commands:
        case(command, f"checkpoint {what}", change, code, says, ranks if command == "eval checkpoint" else None)


ALL = ("export step", "check step", "eval checkpoint", "merge step")
checkpoint("manifest is cut off", to.cut(MANIFEST, 0.9), 301, MANIFEST, ALL, 2)
checkpoint("manifest is empty", to.empty(MANIFEST), 301, MANIFEST, ALL)
checkpoint("manifest is a pipe", to.fifo(MANIFEST), 301, f"{MANIFEST}: .*plain file", ALL, 2)
checkpoint("manifest is a directory", to.directory(MANIFEST), 301, f"{MANIFEST}: .*plain file", ALL)
checkpoint("manifest is a link to itself", to.link_loop(MANIFEST), 300, "run/step-00000002")
checkpoint("manifest is edited", to.swap(MANIFEST, b'"step": 2', b'"step": 3'), 304, f"{MANIFEST}: .*self_sha256", ALL, 2)
for key, value, code in (("format", "qshard-manifold", 301), ("format_version", 2, 303), ("step", -1, 302), ("step", "2", 301), ("nranks", 0, 302), ("nranks", 2**40, 302),
                         ("run_id", "x" * 500, 302), ("files", [], 301), ("files", {}, 301), ("files/0/name", "../../../etc/passwd", 302),
                         ("files/0/name", "/etc/passwd", 302), ("files/0/name", "a\nb", 302), ("files/0/size", -1, 302), ("files/0/size", 2**62, 302),
                         ("files/0/size", 2**40, 302), ("files/0/sha256", "0", 302), ("files/0/xxh3", [], 302), ("files/0/xxh3", ["x"], 302)):
    checkpoint(f"manifest {key} = {value}", to.manifest_field(key, value, MANIFEST), code, f"{MANIFEST}: .*{'xxh3' if value == 2**40 and 'size' in key else key.split('/')[-1]}")
checkpoint("manifest names a file twice", to.manifest(lambda text: text.replace("rank-00001", "rank-00000"), MANIFEST), 302, f"{MANIFEST}: .*twice")
checkpoint("manifest has a key twice", to.manifest(lambda text: text.replace('"step": 2', '"step": 2,\n "step": 2'), MANIFEST), 301, f"{MANIFEST}: .*duplicate")
checkpoint("manifest is nested 3000 deep", to.manifest(lambda text: text.replace('"step": 2', '"x": ' + "[" * 3000 + "]" * 3000 + ',\n "step": 2'), MANIFEST), 301,
           f"{MANIFEST}: .*depth")
for key, value in (("config", 7), ("config", "base: [\n"), ("lora", GONE), ("lora/layers", 0), ("lora/layers", 2**40), ("lora/layers", 1), ("lora/shapes", {}),
                   ("lora/shapes/q_proj", [64, 2**40]), ("lora/shapes/q_proj", [64, 63]), ("base_sha256", "x" * 500), ("tokens_seen", -1)):
    says = "lora" if key == "lora/layers" and value == 1 or value == [64, 63] else key.split("/")[-1]
    case("export step", f"checkpoint record {key} = {'gone' if value is GONE else str(value)[:30]}", to.manifest_field(key, value, MANIFEST),
         202 if value == "base: [\n" else 301 if value == 1 else 302, f"{STEP}.*({says}|{'YAML' if key == 'config' else says})")
checkpoint("file is missing", to.gone(RANK1), 300, RANK1, ALL, 2)
checkpoint("file is empty", to.empty(RANK1), 304, RANK1, ALL)
checkpoint("file is cut off", to.cut(RANK1, -1), 304, RANK1, ALL, 2)
checkpoint("file is damaged", to.flip(RANK1, 20000), 304, RANK1, ALL, 2)
checkpoint("file is a pipe", to.fifo(RANK1), 301, f"{RANK1}: .*plain file", ALL, 2)
checkpoint("file is a directory", to.directory(RANK1), 301, f"{RANK1}: .*plain file", ALL)
checkpoint("files are exchanged", to.both(to.renamed(RANK0, STEP + "/x"), to.renamed(RANK1, RANK0), to.renamed(STEP + "/x", RANK1)), 304, STEP, ALL)


STARTED = r"run/(config\.yaml|run\.json)"  # a start is counted


def signed_shard(what, change, code, says, commands=("export step", "resume")):
    for command in commands:
        case(command, f"checkpoint {what}, hashed anew", to.signed_files(STEP, change), code, f"{RANK1}: .*{says}",
             *((2, STARTED) if command == "resume" else ()))


signed_shard("of another rank", to.attribute(RANK1, "rank", 0), 302, "rank")
signed_shard("of another step", to.attribute(RANK1, "step", 4), 302, "step")
signed_shard("of another format", to.attribute(RANK1, "format", "x"), 301, "format")
signed_shard("of version 2", to.attribute(RANK1, "format_version", 2), 303, "format_version")
signed_shard("without lora", to.dataset(RANK1, "lora", GONE), 301, "lora")
signed_shard("with a short lora", to.dataset(RANK1, "lora", lambda data: data[:-1]), 301, "lora")
signed_shard("with a lora of doubles", to.dataset(RANK1, "lora", lambda data: data.astype("f8")), 301, "lora")
signed_shard("that is HTML", to.put(RANK1, HTML), 301, "")
signed_shard("with NaN in lora", to.values(RANK1, "lora", 5, np.nan), 302, "lora.*not finite")
signed_shard("without m", to.dataset(RANK1, "m", GONE), 301, "\"m\"", ("resume",))
signed_shard("with NaN in m", to.values(RANK1, "m", 5, np.nan), 302, "m.*not finite", ("resume",))
signed_shard("with infinity in v", to.values(RANK1, "v", 5, np.inf), 302, "v.*not finite", ("resume",))
case("inspect step", "manifest is cut off", to.cut(MANIFEST, 0.9), 301, MANIFEST)
case("inspect step", "manifest is edited", to.swap(MANIFEST, b'"step": 2', b'"step": 3'), 304, f"{MANIFEST}: .*self_sha256")
case("inspect step", "record has no lora", to.manifest_field("lora", GONE, MANIFEST), 302, f"{STEP}.*lora")
case("inspect config", "a text for a number", to.swap(YAML, b"seed: 42", b"seed: many"), 202, f"{YAML}:\\d+: .*seed")
for what, change in (("is missing", to.gone(STEP)), ("manifest is cut off", to.cut(MANIFEST, 0.5)), ("manifest is a pipe", to.fifo(MANIFEST))):
    case("resume", f"checkpoint {what}", change, 403, "run: no checkpoint that verifies", 2)
    for command in ("export", "merge run"):
        case(command, f"checkpoint {what}", change, 403, "run: the run has no" if "missing" in what else "run: no checkpoint of the run verifies")
SET_ASIDE = r"run/(config\.yaml|run\.json|step-00000002(\.bad)?(/.*)?)"  # a start is counted, a bad checkpoint renamed
for what, change in (("file is damaged", to.flip(RANK1, 20000)), ("file is missing", to.gone(RANK0)), ("file is cut off", to.cut(RANK1, 0.5))):
    case("resume", f"checkpoint {what}", change, 403, "run: no checkpoint that verifies", 2, SET_ASIDE)
OTHER_BASE = to.signed_base(to.values(BASE, "units/layers.0/packed", (0, 0), 1))
case("resume", "run is missing", to.gone("run"), 403, "run", 2)
case("resume", "configuration has another seed", to.swap(YAML, b"seed: 42", b"seed: 43"), 802, "run.*seed", 2)
case("resume", "base of another model", OTHER_BASE, 802, "run.*base", 2, STARTED)
case("export", "a run without checkpoints", to.gone(STEP), 403, "run")
case("export", "a PEFT directory", to.both(to.gone("run"), to.directory("run"), to.put("run/adapter_config.json", b"{}")), 301, "run: .*neither")
case("export", "a directory of nothing", to.both(to.gone("run"), to.directory("run")), 301, "run: not a checkpoint")
case("export", "a file", to.both(to.gone("run"), to.put("run", HTML)), 301, "run")
case("export", "a pipe", to.fifo("run"), 301, "run")
case("export", "output is there", to.directory("out"), 204, "out")
case("merge run", "output is there", to.directory("out"), 204, "out")
case("export", "output is a link to nothing", to.link("out", "nowhere"), 204, "out")
case("merge run", "output is a link to nothing", to.link("out", "nowhere"), 204, "out")
case("train", "output is a link to nothing", to.link("out", "nowhere"), 204, "out", 2)
case("quantize", "output is there", to.put("out.h5", b"mine"), 204, "out.h5", 2)
case("quantize", "output is a link to nothing", to.link("out.h5", "nowhere"), 204, "out.h5")
case("merge run", "base of another model", OTHER_BASE, 304, f"{STEP}: was trained on a base with hash")
for kind, name in (("shard", RANK0), ("data", DATA), ("base", BASE)):
    case(f"inspect {kind}", "no format", to.attribute(name, "format", GONE), 301, name)
    case(f"inspect {kind}", "an unknown format", to.attribute(name, "format", "qshard-x"), 301, f"{name}: .*qshard-x")
    case(f"inspect {kind}", "is missing", to.gone(name), 300, name)
case("inspect shard", "no lora", to.dataset(RANK0, "lora", GONE), 301, f"{RANK0}: .*lora")

# ---- inputs of qshard-prep: records, tokenizer, template, Megatron ----

TEXT = "data.jsonl"
not_a_file("prep", TEXT, empty=302)
for what, content, code, says in (
        ("is cut off", b'{"text": "a', 302, ":1: "), ("has a NUL", b'{"text": "a\0"}\n', 302, ":1: .*NUL"), ("is not UTF-8", b'{"text": "\xff"}\n', 302, ":1: .*UTF-8"),
        ("has a key twice", b'{"text": "a", "text": "b"}\n', 302, ":1: .*twice"), ("has NaN", b'{"text": "a", "n": NaN}\n', 302, ":1: .*NaN"),
        ("is nested deep", b'{"text": "a", "n": ' + DEEP + b"}\n", 302, ":1: .*deeper"), ("has a number for text", b'{"text": 3}\n', 302, ":1: .*text"),
        ("is gzip", b"\x1f\x8b" + bytes(50), 301, ".*gzip"), ("is Parquet", b"PAR1" + bytes(50), 301, ".*Parquet"), ("is UTF-16", '{"text": "a"}'.encode("utf-16"), 301, ".*UTF-16"),
        ("has no record", b"\n\n", 302, ".*no usable record"), ("has a role of its own", b'{"messages": [{"role": "x\\ny", "content": "a"}]}\n', 302, ":1: .*role"),
        ("ids above the vocabulary", b'{"input_ids": [1, 2147483648]}\n', 302, ":1: .*input_ids")):
    case("prep", f"data.jsonl {what}", to.put(TEXT, content), code, TEXT + says)
TOKENIZER = "model/tokenizer.json"
for name, twice in ((TOKENIZER, "version"), (CONFIG, "vocab_size"), ("model/tokenizer_config.json", "eos_token")):
    case("prep", f"{name} is a directory", to.directory(name), 301, name)
    case("prep", f"{name} is a pipe", to.fifo(name), 301, name)
    case("prep", f"{name} is cut off", to.cut(name, 0.5), 301, name)
    case("prep", f"{name} is nested 100000 deep", to.put(name, DEEP), 301, name)
    case("prep", f"{name} is empty", to.empty(name), 301, name)
    case("prep", f"{name} has a key twice", to.twice(name, twice), 301, f"{name}: .*twice")
case("prep", "tokenizer.json is a link to itself", to.link_loop(TOKENIZER), 300, TOKENIZER)
case("prep", "vocab_size is 2^40", to.field(CONFIG, "vocab_size", 2**40), 302, f"{CONFIG}: vocab_size")
case("prep", "vocab_size is below the tokenizer's", to.field(CONFIG, "vocab_size", 100), 302, f"{TOKENIZER}: .*vocab_size")
case("prep", "an id of 2^31", to.field(TOKENIZER, "model/vocab/a", 2**31), 302, TOKENIZER)
case("prep", "an id of -1", to.field(TOKENIZER, "model/vocab/a", -1), 301, TOKENIZER)
case("prep", "an id twice", to.field(TOKENIZER, "model/vocab/a", 70), 302, f"{TOKENIZER}: .*70")
case("prep", "a merge of nothing", to.field(TOKENIZER, "model/merges", ["no such"]), 301, TOKENIZER)
case("prep", "a merge without a product", to.field(TOKENIZER, "model/merges", ["q x"]), 301, TOKENIZER)
case("prep", "an added token of id 2^40", to.field(TOKENIZER, "added_tokens/0/id", 2**40), 301, TOKENIZER)
TEMPLATE = "model/tokenizer_config.json"
for what, source in (("of 10^9 turns", "{% for a in range(999999999) %}{% endfor %}"), ("that reads classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
                     ("that divides by 0", "{{ 1 / 0 }}"), ("that calls itself", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
                     ("that includes a file", "{% include '/etc/passwd' %}")):
    case("prep chat", f"template {what}", to.field(TEMPLATE, "chat_template", source), 302, "chat.jsonl:1: ")
case("prep chat", "template that is no Jinja", to.field(TEMPLATE, "chat_template", "{% for %}"), 301, f"{TEMPLATE}: .*Jinja")
case("prep chat", "template that is a number", to.field(TEMPLATE, "chat_template", 7), 302, f"{TEMPLATE}: .*chat_template")
case("prep chat", "template file is a pipe", to.fifo("model/chat_template.jinja"), 301, "model/chat_template.jinja: is not a plain file")
case("prep chat", "template file is a link to nothing", to.link("model/chat_template.jinja", "nowhere"), 300, "model/chat_template.jinja")
IDX, BIN = "corpus.idx", "corpus.bin"
for name in (IDX, BIN):
    case("megatron", f"{name} is a pipe", to.fifo(name), 301, name)
    case("megatron", f"{name} is a directory", to.directory(name), 301, name)
    case("megatron", f"{name} is empty", to.empty(name), 301 if name == IDX else 302, name)
case("megatron", "corpus.idx is cut off", to.cut(IDX, -3), 302, f"{IDX}: .*cut off")
case("megatron", "corpus.idx is another file", to.put(IDX, HTML), 301, f"{IDX}: .*MMIDIDX")
case("megatron", "corpus.bin is cut off", to.cut(BIN, -2), 302, f"{BIN}: .*cut off")
case("megatron", "2^60 sequences", to.of_content(IDX, lambda data: data[:18] + struct.pack("<Q", 2**60) + data[26:]), 302, f"{IDX}: .*sequences")
case("megatron", "ids above the vocabulary", to.put(BIN, b"\xff" * 8), 302, f"{BIN}: .*65535")

# ---- GGUF: the converter ----

GGUF = "model.gguf"
case("gguf", "is missing", to.gone(GGUF), 300, GGUF)
case("gguf", "is a pipe", to.fifo(GGUF), 300, GGUF)
case("gguf", "is empty", to.empty(GGUF), 301, GGUF)
case("gguf", "is HTML", to.put(GGUF, HTML), 301, GGUF)
for keep in (4, 20, 100, 0.3, -1):
    case("gguf", f"is cut at {keep}", to.cut(GGUF, keep), 301, GGUF)
case("gguf", "2^62 tensors", to.of_content(GGUF, lambda data: data[:8] + struct.pack("<Q", 2**62) + data[16:]), 301, GGUF)
case("gguf", "2^62 keys", to.of_content(GGUF, lambda data: data[:16] + struct.pack("<Q", 2**62) + data[24:]), 301, GGUF)
case("gguf", "a key of 2^62 letters", to.of_content(GGUF, lambda data: data[:24] + struct.pack("<Q", 2**62) + data[32:]), 301, GGUF)
case("gguf", "no heads", to.of_content(GGUF, lambda data: number_of(data, b"llama.attention.head_count", 0)), 302, f"{GGUF}: .*head")
case("gguf", "3 heads", to.of_content(GGUF, lambda data: number_of(data, b"llama.attention.head_count", 3)), 302, f"{GGUF}: .*head")
case("gguf", "2^31 layers", to.of_content(GGUF, lambda data: number_of(data, b"llama.block_count", 2**31)), 302, f"{GGUF}: .*block_count")
case("gguf", "NaN in the norm", to.of_content(GGUF, lambda data: data[:-4] + NAN_F32), 302, f"{GGUF}: .*NaN")


def number_of(data, key, value):
    """A u32 of the metadata: behind the key stands its type."""
    at = data.index(key) + len(key) + 4
    return data[:at] + struct.pack("<I", value) + data[at + 4:]
