#!/usr/bin/env python3
"""Reads base.h5 (docs/file-formats.md) with h5py and numpy: an independent witness of what the C program wrote.

    base_reader.py BASE.h5           list the tensors with their kind, shape and size of numbers
"""
import json
import sys

import h5py
import numpy as np

from nf4_reference import BLOCK, GROUP, QUANTUM, Quantized, dequantize
from tensors import widen_bf16

SIZES = {"bf16": 2, "f16": 2, "f32": 4}


def widen(stored, dtype):
    """Bytes of stored numbers as float32."""
    if dtype == "bf16":
        return widen_bf16(stored.view("<u2"))
    return stored.view("<f2" if dtype == "f16" else "<f4").astype(np.float32)


class Base:
    """An open base.h5. `tensors` maps each name to its pieces (unit, entry) in file order: embeddings have several."""

    def __init__(self, path):
        self.file = h5py.File(path, "r")
        self.index = json.loads(self.file["index"][()].tobytes().rstrip(b"\0"))
        self.config = self.index["config"]
        self.maps = self.file["maps"][()]
        self.tensors = {}
        for unit in [*self.index["units"], {**self.index["final"], "name": "final"}]:
            for entry in unit["tensors"]:
                self.tensors.setdefault(entry["name"], []).append((unit, entry))

    def close(self):
        self.file.close()

    def names(self, kind=None):
        return [n for n, pieces in self.tensors.items() if kind is None or pieces[0][1]["kind"] == kind]

    def _dataset(self, unit, name):
        group = "final" if unit["name"] == "final" else "units/" + unit["name"]
        return self.file[f"{group}/{name}"]

    def nf4(self, name):
        """The tensor as Quantized; padding is cut off after a check that it is what the format says."""
        ((unit, entry),) = self.tensors[name]
        count = int(np.prod(entry["shape"]))
        quanta, blocks = -(-count // QUANTUM), -(-count // BLOCK)
        rows = slice(entry["quantum"], entry["quantum"] + quanta)
        packed = self._dataset(unit, "packed")[rows].reshape(-1)
        absmax32 = self._dataset(unit, "absmax32")[rows].reshape(-1)
        if not np.all(packed[(count + 1) // 2 :] == 0x77):
            raise ValueError(f"{name}: the padding of `packed` is not 0x77")
        packed = packed[: (count + 1) // 2]
        if not self.index["nested"]:
            return Quantized(tuple(entry["shape"]), packed, absmax32[:blocks], dtype=entry["dtype"])
        absmax8 = self._dataset(unit, "absmax8")[rows].reshape(-1)
        if np.any(absmax8[blocks:] != 0):
            raise ValueError(f"{name}: the padding of `absmax8` is not 0")
        return Quantized(
            tuple(entry["shape"]),
            packed,
            None,
            offset=np.float32(entry["offset"]),
            absmax8=absmax8[:blocks],
            absmax32=absmax32[: -(-blocks // GROUP)],
            map=self.maps[entry["map"]],
            dtype=entry["dtype"],
        )

    def _piece(self, unit, entry):
        """A small or raw tensor, or one chunk of rows, as float32."""
        count, dtype = int(np.prod(entry["shape"])), entry["dtype"]
        if entry["kind"] == "small":
            stored = self._dataset(unit, "small")[entry["byte"] : entry["byte"] + count * SIZES[dtype]]
        else:
            quanta = -(-count // unit["raw_quantum_elems"])
            stored = self._dataset(unit, "raw")[entry["quantum"] : entry["quantum"] + quanta]
            stored = stored.reshape(-1)[: count * SIZES[dtype]]
        return widen(np.ascontiguousarray(stored), dtype).reshape(entry["shape"])

    def read(self, name):
        """The weight W as float32: dequantized where it is NF4, chunks put together."""
        pieces = self.tensors[name]
        if pieces[0][1]["kind"] == "nf4":
            return dequantize(self.nf4(name))
        parts = [self._piece(unit, entry) for unit, entry in pieces]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def read_base(path):
    """(config, {name: float32 array}) of a whole base.h5."""
    base = Base(path)
    try:
        return base.config, {name: base.read(name) for name in base.tensors}
    finally:
        base.close()


def main():
    base = Base(sys.argv[1])
    for name, pieces in base.tensors.items():
        weight = base.read(name)
        kind, dtype = pieces[0][1]["kind"], pieces[0][1]["dtype"]
        print(f"{name:55s} {kind:5s} {dtype:4s} {str(weight.shape):16s} deviation {weight.std():.4g}")
    base.close()


if __name__ == "__main__":
    main()
