"""safetensors and bf16 with numpy alone, so that what compares needs no torch."""
import glob
import json
import os
import struct
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "src", "prep"))

import qshard_tiny  # noqa: E402  (the folder of the tools is on the path from here on)

bf16_bits = qshard_tiny.bf16_bits
STORED = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "U8": np.uint8}


def widen_bf16(bits):
    """bf16 bits to float32, exactly."""
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to(values, dtype):
    """float32 rounded to `dtype` ("bf16", "f16", "f32") and widened again."""
    if dtype == "bf16":
        return widen_bf16(bf16_bits(values))
    if dtype == "f16":
        return np.asarray(values, dtype=np.float32).astype(np.float16).astype(np.float32)
    return np.asarray(values, dtype=np.float32)


def read_safetensors(path, raw=False):
    """{name: float32 array} of one file; `raw`: {name: (dtype, array as stored)}, where bf16 is uint16."""
    with open(path, "rb") as file:
        header_bytes = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(header_bytes))
        data = file.read()
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        array = np.frombuffer(data[begin:end], dtype=STORED[entry["dtype"]]).reshape(entry["shape"])
        if raw:
            tensors[name] = (entry["dtype"], array)
        else:
            tensors[name] = widen_bf16(array) if entry["dtype"] == "BF16" else array.astype(np.float32)
    return tensors


def write_safetensors(path, tensors):
    """`tensors`: {name: array}; uint16 stands for bf16."""
    with open(path, "wb") as file:
        file.write(qshard_tiny.safetensors_bytes(tensors))


def read_hf(folder):
    """(config, {name: float32 array}) of a checkpoint directory."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    tensors = {}
    for path in sorted(glob.glob(os.path.join(folder, "model*.safetensors"))):
        tensors.update(read_safetensors(path))
    return config, tensors


def is_linear(name):
    """Whether a tensor is one of the weights of a layer that are quantized."""
    return name.endswith("_proj.weight") and ".layers." in name


def relative_l2(ours, theirs):
    """|ours - theirs| / |theirs| in double; 0 when both are 0, infinite when anything is not a number."""
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    distance, size = np.linalg.norm(ours - theirs), np.linalg.norm(theirs)
    if not np.isfinite(distance) or size == 0.0:
        return 0.0 if distance == 0.0 else float("inf")
    return float(distance / size)
