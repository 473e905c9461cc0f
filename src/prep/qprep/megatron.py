"""Reads Megatron's IndexedDataset: PREFIX.idx and PREFIX.bin, as its preprocess_data.py writes them.

    idx   "MMIDIDX\0\0"  version u64 = 1  type code u8  S u64  D u64
          sizes i32[S]  pointers i64[S]  document borders i64[D]
    bin   the tokens of all sequences, one after the other

A document is a run of sequences (its sentences); the borders are numbers of sequences, from 0 to S. Everything is checked
against the size of both files before anything is used.
"""

import os
import struct

import numpy as np

from . import errors
from .errors import PrepError
from .files import open_input
from .tokens import Documents

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FLOATS = (6, 7)
CHUNK_TOKENS = 1 << 24


def is_prefix(path):
    """Whether `path` names a Megatron data set rather than a file of records."""
    prefix = prefix_of(path)
    return all(os.path.isfile(prefix + end) for end in (".idx", ".bin")) and (
        prefix != path or not os.path.exists(path)
    )


def prefix_of(path):
    return path[:-4] if path.endswith((".idx", ".bin")) else path


def bad(path, what):
    return PrepError(errors.INPUT_VALUE, path, what)


class IndexedDataset:
    """The checked index of a data set and its tokens, mapped."""

    def __init__(self, path, vocab_size):
        self.prefix = prefix_of(path)
        self.idx, self.bin = self.prefix + ".idx", self.prefix + ".bin"
        self.vocab_size = vocab_size
        self.read_index()
        self.map_tokens()

    def read_index(self):
        with open_input(self.idx) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(HEADER.size)
            if head[: len(MAGIC)] != MAGIC:
                raise PrepError(
                    errors.INPUT_FORMAT,
                    self.idx,
                    "does not begin with MMIDIDX; it is no index of Megatron's IndexedDataset (an older TNTIDX one must "
                    "be converted)",
                )
            if len(head) < HEADER.size:
                raise bad(self.idx, f"is cut off in its header of {HEADER.size} bytes; copy it again")
            _, version, code, sequences, borders = HEADER.unpack(head)
            if version != VERSION:
                raise bad(self.idx, f"version={version}, must be {VERSION}")
            if code not in TYPES:
                kind = "a floating-point type" if code in FLOATS else "unknown"
                raise bad(self.idx, f"type code {code} is {kind}, must be one of {sorted(TYPES)}")
            expected = HEADER.size + 12 * sequences + 8 * borders
            if size not in (expected, expected + sequences):  # the latter with a mode a sequence
                raise bad(
                    self.idx,
                    f"is {size} bytes, but {sequences} sequences and {borders} document borders take {expected}; "
                    "it is damaged or cut off, copy it again",
                )
            if size != expected and sequences:
                raise bad(self.idx, "has modes, so the data set is multimodal; only text can be read")
            self.dtype = np.dtype(TYPES[code])
            self.sizes = np.frombuffer(file.read(4 * sequences), "<i4").astype(np.int64)
            pointers = np.frombuffer(file.read(8 * sequences), "<i8")
            self.borders = np.frombuffer(file.read(8 * borders), "<i8")
        self.check_index(pointers)

    def check_index(self, pointers):
        if len(self.sizes) == 0:
            raise bad(self.idx, "holds no sequence")
        if self.sizes.min() < 0:
            i = int(np.argmin(self.sizes))
            raise bad(self.idx, f"sizes[{i}]={self.sizes[i]} is negative; the file is damaged")
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        wrong = np.flatnonzero(pointers != self.starts[:-1] * self.dtype.itemsize)
        if len(wrong):
            i = int(wrong[0])
            raise bad(
                self.idx,
                f"pointers[{i}]={pointers[i]}, must be {self.starts[i] * self.dtype.itemsize}, the bytes of the "
                "sequences before it; the file is damaged",
            )
        borders = self.borders
        if len(borders) < 2 or borders[0] != 0 or borders[-1] != len(self.sizes):
            shown = f"{borders[0]}..{borders[-1]}" if len(borders) else "none"
            raise bad(
                self.idx,
                f"document borders run over {shown}, must run from 0 to the {len(self.sizes)} sequences; "
                "the file is damaged",
            )
        down = np.flatnonzero(np.diff(borders) < 0)
        if len(down):
            i = int(down[0]) + 1
            raise bad(
                self.idx, f"document border {i} is {borders[i]}, below the one before it ({borders[i - 1]})"
            )

    def map_tokens(self):
        total = int(self.starts[-1])
        with open_input(self.bin) as file:
            size = os.fstat(file.fileno()).st_size
        if size != total * self.dtype.itemsize:
            raise bad(
                self.bin,
                f"is {size} bytes, but its index tells of {total} tokens of {self.dtype.itemsize} bytes; "
                "the files do not belong together, or one is cut off",
            )
        self.tokens = np.memmap(self.bin, self.dtype, "r") if total else np.zeros(0, self.dtype)

    def documents(self):
        """Yields the documents in order, as Documents of about 16 million tokens at most, all learned, each numbered from 0."""
        ends = self.starts[self.borders]  # in tokens
        first = 0
        while first < len(ends) - 1:
            last = int(np.searchsorted(ends, ends[first] + CHUNK_TOKENS, side="right")) - 1
            last = min(max(last, first + 1), len(ends) - 1)
            begin, end = int(ends[first]), int(ends[last])
            tokens = np.asarray(self.tokens[begin:end])
            self.check_tokens(tokens, begin)
            yield Documents(
                tokens.astype("<u4"),
                np.ones(end - begin, dtype=bool),
                np.diff(ends[first : last + 1]),
                np.arange(last - first),
            )
            first = last

    def check_tokens(self, tokens, begin):
        if tokens.size == 0:
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            value = low if low < 0 else high
            i = begin + int(np.flatnonzero(tokens == value)[0])
            raise bad(
                self.bin,
                f"token {i} is {value}, must be 0..{self.vocab_size - 1}, the tokenizer's ids; "
                "the data set was made with another tokenizer",
            )
