#!/usr/bin/env python3
"""Writes a model of Llama-3-8B's shape with made-up weights, already quantized, as bitsandbytes stores it: 5.7 GB in
seconds, from which `qshard quantize` makes a base. For benchmarks: the numbers mean nothing, but they are random (zeros
run faster) and of a trained model's size, so that nothing overflows.

    make_model.py OUT [--small | --smollm2]     two narrow layers, to try it; SmolLM2-135M's shape with a head, 170 MB

Needs the standard library alone; the codebook and the second-level map are those of tests/golden/bnb_tiny.
"""
import argparse
import json
import os
import random
import struct

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
GOLDEN = os.path.join(ROOT, "tests", "golden", "bnb_tiny", "model.safetensors")
SHAPES = {
    "llama": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
    "small": {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152},
}
CHUNK = 16 << 20
NESTED_ABSMAX, OFFSET = 0.01, 0.028  # absmax near 1 / sqrt(4096) times the largest of 64 normal numbers


def config_of(shape):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "rms_norm_eps": 1e-05,
        "max_position_embeddings": 16384, "rope_theta": 500000.0, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": False, "initializer_range": 0.02, **SHAPES[shape],
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
                                "bnb_4bit_quant_storage": "uint8"},
    }


def golden_maps():
    """Bytes of the 16 codes and of the 256-entry map."""
    with open(GOLDEN, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        maps = []
        for ending in (".quant_map", ".nested_quant_map"):
            begin, end = next(v["data_offsets"] for name, v in header.items() if name.endswith(ending))
            file.seek(8 + length + begin)
            maps.append(file.read(end - begin))
    return maps


def bf16_like(chunk):
    """Random bytes as bf16 numbers of either sign between 0.0078 and 0.031."""
    out = bytearray(chunk)
    out[1::2] = bytes(chunk[1::2]).translate(bytes(0x3C | (byte & 0x80) for byte in range(256)))
    return bytes(out)


def linears_of(config):
    hidden, ffn, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    return {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn)}


def tensors_of(config):
    """(name, dtype, shape, contents): contents are the bytes, or which random bytes to repeat."""
    code, second = golden_maps()
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", "BF16", [vocab, hidden], "bf16"
    yield "lm_head.weight", "BF16", [vocab, hidden], "bf16"
    yield "model.norm.weight", "BF16", [hidden], b"\x80\x3f" * hidden
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", "BF16", [hidden], b"\x80\x3f" * hidden
        for name, (out, columns) in linears_of(config).items():
            weight, count = f"{prefix}{name}.weight", out * columns
            blocks, groups = -(-count // 64), -(-count // 16384)
            state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [out, columns],
                                "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": OFFSET}).encode()
            yield weight, "U8", [(count + 1) // 2, 1], "bytes"
            yield weight + ".absmax", "U8", [blocks], "bytes"
            yield weight + ".nested_absmax", "F32", [groups], struct.pack("<f", NESTED_ABSMAX) * groups
            yield weight + ".nested_quant_map", "F32", [256], second
            yield weight + ".quant_map", "F32", [16], code
            yield weight + ".quant_state.bitsandbytes__nf4", "U8", [len(state)], state


def header_of(tensors):
    sizes, header, at = {"U8": 1, "BF16": 2, "F32": 4}, {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape, _ in tensors:
        count = 1
        for side in shape:
            count *= side
        end = at + sizes[dtype] * count
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return header, struct.pack("<Q", len(text) + -len(text) % 8) + text + b" " * (-len(text) % 8)


def write_model(out, shape):
    os.makedirs(out, exist_ok=True)
    config = config_of(shape)
    with open(os.path.join(out, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1)
    tensors = list(tensors_of(config))
    header, start = header_of(tensors)
    noise = random.Random(7).randbytes(1 << 16 if shape == "small" else CHUNK)
    chunks = {"bytes": noise, "bf16": bf16_like(noise)}
    with open(os.path.join(out, "model.safetensors"), "wb") as file:
        file.write(start)
        for name, _, _, contents in tensors:
            begin, end = header[name]["data_offsets"]
            if isinstance(contents, bytes):
                file.write(contents)
                continue
            chunk = chunks[contents]
            for at in range(begin, end, len(chunk)):
                file.write(chunk[: min(len(chunk), end - at)])
    return header[tensors[-1][0]]["data_offsets"][1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("out")
    parser.add_argument("--small", dest="shape", action="store_const", const="small", default="llama")
    parser.add_argument("--smollm2", dest="shape", action="store_const", const="smollm2")
    options = parser.parse_args()
    print(f"{options.out}: {write_model(options.out, options.shape) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
