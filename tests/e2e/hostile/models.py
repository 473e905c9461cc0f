"""Rows for checkpoints of models: config.json, safetensors in one and in several files, bitsandbytes."""
import json

from hostile import changes as to
from hostile.case import CONFIG, DEEP, HTML, INF_BF16, INF_F32, INT64, LFS, NAN_BF16, NAN_F32, TENSORS, case, not_a_file
from hostile.changes import GONE

# ---- config.json of a model: quantize ----



def config(key, value, code, says, command="quantize", ranks=None):
    case(command, f"config.json {key} = {str(value)[:40] if value is not GONE else 'gone'}", to.field(CONFIG, key, value),
         code,
         f"{CONFIG}: .*{says}", ranks)


not_a_file("quantize", CONFIG, ranks=2, says="model: holds no config.json; name the folder")
case("quantize", "config.json is HTML", to.put(CONFIG, HTML), 301, f"{CONFIG}: not valid JSON", 2)
case("quantize", "config.json is cut off", to.cut(CONFIG, 0.5), 301, f"{CONFIG}: not valid JSON: line", 2)
case("quantize", "config.json has text behind", to.longer(CONFIG, b"x"), 301, f"{CONFIG}: not valid JSON")
case("quantize", "config.json has a NUL", to.longer(CONFIG, b"\0"), 301, f"{CONFIG}: not valid JSON")
case("quantize", "config.json is nested 100000 deep", to.raw_field(CONFIG, "use_cache", DEEP.decode()), 301,
     f"{CONFIG}: .*deeper than 64", 2)
case("quantize", "config.json has a key twice", to.twice(CONFIG, "vocab_size"), 301, f"{CONFIG}: .*duplicate", 2)
case("quantize", "config.json is a list", to.put(CONFIG, b"[]"), 301, f"{CONFIG}: .*object")
case("quantize", "config.json is UTF-16", to.utf16(CONFIG), 301, f"{CONFIG}: not valid JSON")
case("quantize", "config.json has bytes that are not UTF-8", to.raw_field(CONFIG, "model_type", '"\udcff"'), 301,
     f"{CONFIG}: not valid JSON: .*decode byte 0xff")
case("quantize", "config.json has NaN", to.raw_field(CONFIG, "rope_theta", "NaN"), 301, f"{CONFIG}: not valid JSON")
case("quantize", "config.json has a number of 5000 digits", to.raw_field(CONFIG, "vocab_size", "9" * 5000), 301,
     f"{CONFIG}: not valid JSON")
case("quantize", "config.json has 1e999", to.raw_field(CONFIG, "rope_theta", "1e999"), 301, f"{CONFIG}: not valid JSON")
case("quantize", "config.json is of 17 MiB", to.longer(CONFIG, b" " * (17 << 20)), 302, f"{CONFIG}: .*bytes")
for key, value in (("hidden_size", 0), ("hidden_size", -64), ("hidden_size", 2**40), ("hidden_size", "64"),
                   ("hidden_size", 64.0), ("hidden_size", 66), ("num_hidden_layers", 0), ("num_hidden_layers", 10**9),
                   ("num_hidden_layers", INT64 - 1), ("num_attention_heads", 0), ("num_attention_heads", 3),
                   ("num_attention_heads", [4]), ("num_key_value_heads", 3), ("num_key_value_heads", 8),
                   ("intermediate_size", 0), ("intermediate_size", 2**40), ("vocab_size", 0), ("vocab_size", 2**40),
                   ("vocab_size", True), ("head_dim", 15), ("head_dim", 2**31), ("rms_norm_eps", 0), ("rms_norm_eps", -1e-5),
                   ("rms_norm_eps", 1), ("rope_theta", 0), ("rope_theta", "1e4"), ("max_position_embeddings", 0),
                   ("tie_word_embeddings", "true"), ("attention_bias", 1), ("rope_scaling", 7),
                   ("rope_scaling", {"rope_type": "linear", "factor": -1}),
                   ("rope_scaling", {"rope_type": "dynamic", "factor": 0.5}),
                   ("rope_scaling", {"rope_type": "longrope", "factor": 2, "short_factor": [1, "2"], "long_factor": []})):
    says = "factor" if isinstance(value, dict) else key
    config(key, value, 302, says, ranks=2 if value in (2**40, INT64 - 1) else None)
for key, value, says in (("model_type", "gpt2", "gpt2"), ("architectures", ["GPT2LMHeadModel"], "GPT2LMHeadModel"),
                         ("hidden_act", "gelu", "gelu"), ("torch_dtype", "float64", "float64"),
                         ("sliding_window", 8, "sliding_window"),
                         ("rope_scaling", {"rope_type": "proportional", "factor": 2}, "proportional"),
                         ("rope_scaling", {"rope_type": "su", "factor": 2}, "su"),
                         ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
                         ("auto_map", {"a": "b.c"}, "auto_map"), ("attention_dropout", 0.5, "attention_dropout"),
                         ("quantization_config", {"quant_method": "gptq"}, "gptq"), ("qk_norm\n", True, r"qk_norm")):
    config(key, value, 303, says, ranks=2 if key == "model_type" else None)
config("model_type", GONE, 302, "model_type")
# The tensors are those of these two as well.
for model_type, name, key, value, code in (
        ("smollm3", "SmolLM3", "no_rope_layers", [1], 302), ("smollm3", "SmolLM3", "no_rope_layers", "10", 302),
        ("smollm3", "SmolLM3", "no_rope_layers", [[0]] + [0] * 300, 302),
        ("smollm3", "SmolLM3", "no_rope_layers", [1, None, 1, 0], 302),
        ("smollm3", "SmolLM3", "no_rope_layer_interval", 0, 302), ("smollm3", "SmolLM3", "no_rope_layer_interval", INT64 - 1, 302),
        ("smollm3", "SmolLM3", "layer_types", ["sliding_attention"] * 2, 303),
        ("smollm3", "SmolLM3", "logits_scaling", 8.0, 303), ("granite", "Granite", "no_rope_layers", [1, 0], 303),
        ("granite", "Granite", "residual_multiplier", 0, 302), ("granite", "Granite", "residual_multiplier", -0.22, 302),
        ("granite", "Granite", "residual_multiplier", 1e-200, 302), ("granite", "Granite", "embedding_multiplier", 1e300, 302),
        ("granite", "Granite", "attention_multiplier", [0.1], 302), ("granite", "Granite", "logits_scaling", "8", 302),
        ("granite", "Granite", "logits_scaling", True, 302)):
    case("quantize", f"config.json of {model_type} {key} = {str(value)[:40]}",
         to.both(to.field(CONFIG, "model_type", model_type), to.field(CONFIG, "architectures", [name + "ForCausalLM"]),
                 to.field(CONFIG, "pretraining_tp", GONE), to.field(CONFIG, key, value)), code, f"{CONFIG}: .*{key}")
# Believable by itself, and not what the tensors are.
for key, value in (("num_hidden_layers", 1), ("num_hidden_layers", 3), ("intermediate_size", 97), ("vocab_size", 319),
                   ("num_key_value_heads", 4), ("tie_word_embeddings", False)):
    case("quantize", f"{key} = {value} is not the tensors'", to.field(CONFIG, key, value), 305, "model: .*tensor", 2)
# Another architecture's, whose norms stand elsewhere.
for name, type_name in (("Olmo2", "olmo2"), ("Olmo3", "olmo3"), ("Qwen3", "qwen3")):
    case("quantize", f"config.json is {name}'s, the tensors are not",
         to.both(to.field(CONFIG, "model_type", type_name), to.field(CONFIG, "architectures", [f"{name}ForCausalLM"]),
                 to.field(CONFIG, "rope_theta", 500000.0)), 305, "model: .*norm", 2 if name == "Olmo2" else None)
config("model_type", "olmo3", 303, "architectures")
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
    file_of_tensors(f"header of {length} bytes", to.header_length(TENSORS, length), 301, "header",
                    2 if length == INT64 else None)
file_of_tensors("has a byte behind", to.longer(TENSORS), 301, "end at byte")
file_of_tensors("header is a list", to.header_text(TENSORS, lambda text: b"[" + text + b"]"), 301, "header")
file_of_tensors("header begins with a space", to.header_text(TENSORS, lambda text: b" " + text), 301, "header")
file_of_tensors("header is nested 100000 deep", to.header_text(TENSORS,
                                                               lambda text: b'{"a":' * 100000 + b"1" + b"}" * 100000), 301,
                "deeper than 64", 2)
file_of_tensors("header has a tensor twice", to.header_text(TENSORS,
                                                            lambda text: text[:-1] + b', "' + NORM.encode() + b'": {}}'),
                301, "duplicate", 2)
file_of_tensors("header has dtype twice", to.header_swap(TENSORS, b'"dtype"', b'"dtype": "F32", "dtype"'), 301, "duplicate")
file_of_tensors("header has a name that is not UTF-8", to.header_swap(TENSORS, b"model.norm", b"model.n\xffrm"), 301,
                "decode byte 0xff", 2)
file_of_tensors("header has a NUL in a name", to.header_swap(TENSORS, b"model.norm", b"model.n\\u0000rm"), 301, "")
file_of_tensors("has a name of 5000 letters", to.more_tensor(TENSORS, "x" * 5000), 301, "name has 5000 bytes")
file_of_tensors("has a tensor without a name", to.more_tensor(TENSORS, ""), 301, "name has 0 bytes")
file_of_tensors("metadata is a number", to.header_field(TENSORS, "__metadata__", 3), 301, "__metadata__")
file_of_tensors("metadata holds a number", to.header_field(TENSORS, "__metadata__", {"format": 3}), 301, "__metadata__")
for key, value, says in (("dtype", GONE, "entry"), ("dtype", 3, "dtype"), ("shape", "64", "shape"), ("shape", GONE, "entry"),
                         ("shape", [96, -64], "shape"), ("shape", [96.0, 64], "shape"), ("shape", [2**40, 2**40], "shape"),
                         ("shape", [2**40, 64], "data_offsets"), ("shape", [1] * 9 + [96, 64], "shape"),
                         ("shape", [96, 63], "data_offsets"), ("data_offsets", [0], "data_offsets"),
                         ("data_offsets", [8, 4], "data_offsets"), ("data_offsets", [0, 2**40], "data_offsets"),
                         ("data_offsets", [-8, 8], "data_offsets"), ("data_offsets", [0.0, 8.0], "data_offsets"),
                         ("data_offsets", [0, 12288], "overlap"), ("extra", 1, "entry")):
    file_of_tensors(f"{key} = {'gone' if value is GONE else value}", to.header_field(TENSORS, f"{UP}|{key}", value), 301,
                    f"{UP}.*{says}|overlap|a hole",
                    2 if value == [2**40, 2**40] or says == "overlap" else None)
file_of_tensors("has an unknown dtype", to.header_field(TENSORS, f"{UP}|dtype", "F7_E4M2"), 303, "F7_E4M2", 2)
file_of_tensors("is not covered by its tensors", to.header_field(TENSORS, NORM, GONE), 301, "a hole|end at byte")
case("quantize", "a tensor is missing", to.without_tensor(TENSORS, UP), 305, f"model: .*{UP}", 2)
case("quantize", "the norm is missing", to.without_tensor(TENSORS, NORM), 305, f"model: .*{NORM}")
case("quantize", "the table is missing", to.without_tensor(TENSORS, TABLE), 305, f"model: .*{TABLE}")
case("quantize", "a tensor too many", to.more_tensor(TENSORS, "model.layers.0.self_attn.q_norm.weight"), 305,
     "model: .*q_norm", 2)
case("quantize", "a name that paints the terminal", to.more_tensor(TENSORS, "x\x1b[2J\nerror[E999] y"), 305,
     "model: tensor .x")
case("quantize", "a tensor of a third layer", to.more_tensor(TENSORS, "model.layers.2.mlp.up_proj.weight"), 305,
     "model: .*layers.2")
case("quantize", "a tensor is transposed", to.changed_tensor(TENSORS, UP, shape=(64, 96)), 305, f"model: .*{UP}", 2)
case("quantize", "a tensor is flat", to.changed_tensor(TENSORS, UP, shape=(64 * 96,)), 305, f"model: .*{UP}")
case("quantize", "a tensor is empty", to.changed_tensor(TENSORS, UP, shape=(0, 64), content=b""), 305, f"model: .*{UP}")
case("quantize", "a tensor is I16", to.changed_tensor(TENSORS, UP, dtype="I16"), 303, f"model: .*{UP}", 2)
case("quantize", "a tensor is F64", to.changed_tensor(TENSORS, UP, dtype="F64", content=bytes(64 * 96 * 8)), 303,
     f"model: .*{UP}")
for bits, word in ((NAN_BF16, "NaN"), (INF_BF16, "infinity")):
    for tensor in (UP, NORM, TABLE, "model.layers.0.input_layernorm.weight"):
        case("quantize", f"{word} in {tensor}", to.number_in(TENSORS, tensor, bits, 7), 302, f"model: .*{tensor}",
             2 if word == "NaN" else None)
        case("check model", f"{word} in {tensor}", to.number_in(TENSORS, tensor, bits, 7), 302,
             f"model: .*{tensor}.*element 7")
for command in ("inspect model", "check model", "merge original"):
    case(command, "safetensors is a pipe", to.fifo(TENSORS), 301, f"{TENSORS}: is not a plain file")
    case(command, "safetensors is cut off", to.cut(TENSORS, 0.9), 301, f"{TENSORS}: ")
    case(command, "safetensors header of 2^63 bytes", to.header_length(TENSORS, INT64), 301, f"{TENSORS}: .*header")
case("merge original", "a weight was changed", to.number_in(TENSORS, NORM, b"\1\2", 3), 304, f"model: .*{NORM}")
case("merge original", "a tensor is missing", to.without_tensor(TENSORS, UP), 305, f"model: .*{UP}")
for key, value in (("rms_norm_eps", 1e-3), ("rope_theta", 20000.0), ("rope_scaling", {"rope_type": "linear", "factor": 2})):
    case("merge original", f"{key} is another's", to.field(CONFIG, key, value), 302, f"{CONFIG}: rms_norm_eps, RoPE")
case("merge original", "a size is another's", to.field(CONFIG, "num_key_value_heads", 4), 302, f"{CONFIG}: num_key_value_heads")

# ---- several files and their index: quantize ----

INDEX = "sharded/model.safetensors.index.json"
FIRST, SECOND = "sharded/model-00001-of-00002.safetensors", "sharded/model-00002-of-00002.safetensors"


def index(what, change, code, says, ranks=None):
    case("quantize sharded", f"index {what}", change, code, f"{INDEX}: .*{says}", ranks)


for name in ("../model/model.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b.safetensors", "x\n../y"):
    index(f"names {name!r}", to.swap(INDEX, b'"model-00002-of-00002.safetensors"', json.dumps(name).encode()),
          301, "weight_map", 2 if name.startswith("../") else None)
for value in (7, None, ["model-00001-of-00002.safetensors"], {"a": 1}):
    index(f"maps to {value}", to.swap(INDEX, b'"model-00002-of-00002.safetensors"', json.dumps(value).encode()),
          301, "weight_map")
not_a_file("quantize sharded", INDEX, says="sharded")
index("is cut off", to.cut(INDEX, 0.5), 301, "not valid JSON", 2)
index("is a list", to.put(INDEX, b"[]"), 301, "object")
index("has no map", to.field(INDEX, "weight_map", GONE), 302, "weight_map")
index("has a list for a map", to.field(INDEX, "weight_map", []), 302, "weight_map")
case("quantize sharded", "index has an empty map", to.field(INDEX, "weight_map", {}), 305, "sharded: tensor .* is missing",
     2)
index("has a tensor twice", to.swap(INDEX, b'"model.norm.weight"', b'"model.norm.weight": "a", "model.norm.weight"'), 301,
      "duplicate")
index("is nested 100000 deep", to.raw_field(INDEX, "metadata", DEEP.decode()), 301, "deeper than 64")
index("names a tensor that no file holds", to.field(INDEX, "weight_map/lm_head.weight", "model-00002-of-00002.safetensors"),
      305, "lm_head", 2)
index("names another file for a tensor", to.swap(INDEX, b"00002-of", b"00001-of"), 305, "not in model-00001")
case("quantize sharded", "index lacks a tensor", to.swap(INDEX, b'"model.norm.weight"', b'"model.norm.bias"'), 305,
     "sharded.*model.norm", 2)
case("quantize sharded", "a file is missing", to.gone(SECOND), 300, SECOND, 2)
case("quantize sharded", "a file is a directory", to.directory(SECOND), 301, f"{SECOND}: .*not a plain file")
case("quantize sharded", "a file is a pipe", to.fifo(SECOND), 301, f"{SECOND}: .*not a plain file", 2)
case("quantize sharded", "a file is a link to itself", to.link_loop(SECOND), 300, SECOND)
case("quantize sharded", "a file is empty", to.empty(SECOND), 301, SECOND, 2)
case("quantize sharded", "a file is cut off", to.cut(SECOND, -2), 301, SECOND)
case("quantize sharded", "a file is the other", to.both(to.gone(SECOND), to.copied(FIRST, SECOND)), 305, "sharded", 2)
case("quantize sharded", "a tensor is in both files", to.more_tensor(FIRST, NORM, "BF16", (64,), bytes(128)), 305,
     f"{FIRST}|{SECOND}")

# ---- a model of text and images: quantize, inspect ----

WRAPPED, PARTS = "wrapped/config.json", "wrapped/model.safetensors"
INNER = "language_model.model.norm.weight"


def wrapped(what, change, code, says, ranks=None):
    case("quantize wrapped", what, change, code, says, ranks)


for key, value, code, says in (("text_config", GONE, 302, "text_config"), ("text_config", 7, 302, "text_config"),
                               ("text_config", {"model_type": "llama"}, 303, "text_config: .*llama"),
                               ("text_config/model_type", "ministral3", 303, "text_config: .*ministral3"),
                               ("text_config/model_type", [], 302, "text_config: .*model_type"),
                               ("text_config/hidden_size", -1, 302, "text_config: .*hidden_size"),
                               ("text_config/hidden_size", 2**40, 302, "text_config: .*hidden_size"),
                               ("text_config/logit_scale", 2, 303, "text_config: .*logit_scale"),
                               ("text_config/quantization_config", {"quant_method": "bitsandbytes"}, 303, "text_config: .*quantization"),
                               ("quantization_config", {"quant_method": "gptq"}, 303, "gptq"),
                               ("logit_scale", 2, 303, "logit_scale"), ("hidden_size", 64, 303, "hidden_size"),
                               ("architectures", ["MistralForCausalLM"], 303, "MistralForCausalLM"),
                               ("model_type", "paligemma", 303, "paligemma is a model of text and more"),
                               ("model_type", "mistral", 303, "architectures")):
    wrapped(f"{key} = {str(value)[:40] if value is not GONE else 'gone'}", to.field(WRAPPED, key, value), code, f"{WRAPPED}: .*{says}",
            2 if value is GONE else None)
wrapped("the head is tied inside alone", to.both(to.field(WRAPPED, "tie_word_embeddings", False),
                                                 to.field(WRAPPED, "text_config/tie_word_embeddings", True)), 302,
        f"{WRAPPED}: .*tie_word_embeddings")
for command in ("quantize wrapped", "inspect wrapped"):
    case(command, "a tensor is in both spellings", to.more_tensor(PARTS, "model.language_model.norm.weight", "BF16", (64,), bytes(128)),
         305, "wrapped: .*one spelling")
    case(command, "a tensor of no known part", to.more_tensor(PARTS, "audio_tower.weight"), 305, f"{PARTS}: .*audio_tower")
    case(command, "a head in the other spelling", to.more_tensor(PARTS, "lm_head.weight"), 305, f"{PARTS}: .*lm_head")
    case(command, "text_config is another's", to.field(WRAPPED, "text_config/model_type", "llama"), 303, f"{WRAPPED}: text_config: .*llama")
wrapped("nothing of the text part", to.tensors(PARTS, lambda held: [held.pop(name) for name in list(held) if "language_model" in name]),
        305, "wrapped: has no tensor of the text part of mistral3", 2)
wrapped("a tensor of the text part is missing", to.without_tensor(PARTS, INNER), 305, "wrapped: tensor model.norm.weight is missing", 2)
wrapped("a third layer", to.more_tensor(PARTS, "language_model.model.layers.2.mlp.up_proj.weight"), 305, "wrapped: .*layers.2")
wrapped("NaN in the text part", to.number_in(PARTS, INNER, NAN_BF16, 7), 302, "wrapped: .*model.norm.weight")

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
        held = json.loads(text)
        to.set_in(held, key, value)
        return json.dumps(held).encode()
    return alter


for what, key, value, code in (("fp4", "quant_type", "fp4", 303), ("of blocks of 128", "blocksize", 128, 303),
                               ("of blocks of -1", "blocksize", -1, 303), ("of another shape", "shape", [248, 71], 305),
                               ("of no shape", "shape", GONE, 302), ("of shape 2^40", "shape", [2**40, 2**40], 305),
                               ("of float64", "dtype", "float64", 303), ("nested by 64", "nested_blocksize", 64, 303),
                               ("with an offset of text", "nested_offset", "0.5", 302),
                               ("with an offset of 1e300", "nested_offset", 1e300, 302),
                               ("with a key of its own", "quant_twice", True, 303),
                               ("without a type", "quant_type", GONE, 302)):
    state(what, state_field(key, value), code, f"up_proj.*{'quant_twice' if 'own' in what else key}",
          2 if key in ("quant_type", "shape") else None)
state("is cut off", lambda text: text[:20], 301, "up_proj.*JSON", 2)
state("is nested 30000 deep", lambda text: b"[" * 30000, 301, "up_proj.*deeper")
state("has NaN", lambda text: text.replace(b'"nested_offset": ', b'"nested_offset": NaN, "x": ', 1), 301, "up_proj.*JSON")
state("is a list", lambda text: b"[]", 301, "up_proj.*object")
state("is of 1 MiB", lambda text: text + b" " * (1 << 20), 305, "up_proj")
for suffix, dtype in (("absmax", "F32"), ("nested_absmax", "F16"), ("quant_map", "F16"), ("nested_quant_map", "BF16")):
    name = f"{LINEAR}.{suffix}"
    case("quantize bnb", f"{suffix} is missing", to.without_tensor(BNB, name), 305, f"bnb.*{name}", 2)
    case("quantize bnb", f"{suffix} is too short", to.changed_tensor(BNB, name, dtype="U8", shape=(1,), content=b"\0"), 305,
         f"bnb.*{name}")
for suffix in ("nested_absmax", "quant_map", "nested_quant_map"):
    for bits, word in ((NAN_F32, "NaN"), (INF_F32, "infinity")):
        case("quantize bnb", f"{word} in {suffix}", to.number_in(BNB, f"{LINEAR}.{suffix}", bits),
             303 if suffix.endswith("quant_map") else 302,
             f"bnb.*{LINEAR}.*{suffix}", 2 if word == "NaN" else None)
case("quantize bnb", "NaN in a norm", to.number_in(BNB, "model.norm.weight", NAN_BF16), 302, "bnb.*model.norm.weight")
case("quantize bnb", "codes are too few", to.changed_tensor(BNB, LINEAR, shape=(8, 1), content=bytes(8)), 305,
     f"bnb.*{LINEAR}")
case("quantize bnb", "codes are missing", to.without_tensor(BNB, LINEAR), 305, f"bnb.*{LINEAR}", 2)
case("quantize bnb", "quant_state is missing", to.without_tensor(BNB, STATE), 305, f"bnb.*{LINEAR}")
case("quantize bnb", "8 bits", to.field("bnb/config.json", "quantization_config/load_in_8bit", True), 303,
     "bnb/config.json: .*load_in_")
case("quantize bnb", "FP4", to.field("bnb/config.json", "quantization_config/bnb_4bit_quant_type", "fp4"), 303,
     "bnb/config.json: .*fp4", 2)
