"""Inputs: a checkpoint of TinyLlama's shape with made-up weights, and files of random tokens."""
import json
import os
import struct
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "src", "prep"))

from qprep.tokenfile import arrange, write_token_file  # noqa: E402  (needs the path)
from qprep.tokens import Documents  # noqa: E402

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 5632, "vocab_size": 32000,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    "torch_dtype": "bfloat16", "initializer_range": 0.02,
}
DEVIATION = 0.02
PIECE = 1 << 22  # numbers that are made at once


def shapes_of(config):
    """{name: shape} of a Llama checkpoint with a head of its own, in the order of the file."""
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    width = config["num_attention_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        shapes.update({f"model.layers.{layer}.{name}.weight": shape for name, shape in (
            ("input_layernorm", (hidden,)), ("self_attn.q_proj", (width, hidden)), ("self_attn.k_proj", (kv, hidden)),
            ("self_attn.v_proj", (kv, hidden)), ("self_attn.o_proj", (hidden, width)),
            ("post_attention_layernorm", (hidden,)), ("mlp.gate_proj", (inter, hidden)), ("mlp.up_proj", (inter, hidden)),
            ("mlp.down_proj", (hidden, inter)))})
    shapes.update({"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)})
    return shapes


def bf16(values):
    """float32 to the bits of bf16, nearest, ties to even; finite numbers only."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")


def write_checkpoint(folder, config):
    """config.json and model.safetensors in bf16, a few MiB at a time: normal weights, norms of ones."""
    shapes, header, at = shapes_of(config), {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(1)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "model.safetensors")
    with open(path + ".part", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            count = int(np.prod(shape))
            if len(shape) == 1:
                file.write(bf16(np.ones(count)).tobytes())
                continue
            for begin in range(0, count, PIECE):
                numbers = rng.standard_normal(min(PIECE, count - begin), dtype=np.float32)
                file.write(bf16(np.float32(DEVIATION) * numbers).tobytes())
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1)
    os.replace(path + ".part", path)


def llama_1b(folder):
    """The directory of the 1.1B checkpoint (2.2 GB), made unless it is there."""
    if not os.path.exists(os.path.join(folder, "model.safetensors")):
        write_checkpoint(folder, LLAMA_1B)
    return folder


def write_tokens(path, model, sequences, length):
    """A token file of `sequences` random sequences of `length` tokens, all of which are learned."""
    with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
        vocab = json.load(file)["vocab_size"]
    tokens = np.random.default_rng(length).integers(0, vocab, sequences * length).astype("<u4")
    documents = Documents(tokens, np.ones(tokens.size, dtype=bool), np.full(sequences, length), np.arange(sequences))
    no_text = np.zeros(vocab + 1, dtype=np.int64), np.zeros(0, dtype=np.uint8)  # ids that stand for no bytes
    write_token_file(path, arrange(documents, length), no_text,
                     {"vocab_size": vocab, "seq_len": length, "packed": 0, "tokenizer_sha256": "0" * 64,
                      "template_sha256": "0" * 64, "source": "random tokens"})
