"""Megatron's IndexedDataset: its documents come in as they are, and nothing damaged passes."""
import itertools
import struct
import unittest

import numpy as np
from support import END, FolderTest, ids, make_model

CODES = {"u1": 1, "i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<f8": 6, "<f4": 7, "<u2": 8}


class Megatron(FolderTest):
    def setUp(self):
        super().setUp()
        make_model(self.folder)
        self.prefix = self.path("corpus")

    def write_dataset(self, sequences, documents, dtype="<u2", **changes):
        """PREFIX.idx and .bin of token sequences; `changes` replaces parts of the index."""
        sizes = [len(sequence) for sequence in sequences]
        width = np.dtype(dtype).itemsize
        part = {
            "magic": b"MMIDIDX\0\0", "version": struct.pack("<Q", 1), "code": struct.pack("<B", CODES[dtype]),
            "counts": struct.pack("<QQ", len(sizes), len(documents)), "sizes": np.array(sizes, "<i4").tobytes(),
            "pointers": np.array([width * n for n in itertools.accumulate(sizes, initial=0)][:-1], "<i8").tobytes(),
            "borders": np.array(documents, "<i8").tobytes(), "modes": b"",
        }
        part.update(changes)
        bin_bytes = part.pop("bin", np.array([t for s in sequences for t in s], dtype).tobytes())
        self.write("corpus.idx", b"".join(part.values()))
        self.write("corpus.bin", bin_bytes)

    def test_documents_of_one_and_of_several_sequences_in_every_integer_type(self):
        for dtype in ("u1", "<i2", "<i4", "<i8", "<u2"):
            self.write_dataset([ids("ab"), ids("cd"), ids("xyz")], [0, 2, 3], dtype)
            self.prep(self.prefix, "--format", "megatron", "--overwrite")
            self.assertEqual(self.documents(), ["a⟦bcd⟧", "x⟦yz⟧"], dtype)
            self.assertEqual(self.load()[1]["n_tokens"], 7)

    def test_every_spelling_of_the_name_is_told_from_records(self):
        self.write_dataset([ids("ab")], [0, 1])
        for name in (self.prefix, self.prefix + ".bin", self.prefix + ".idx"):
            result = self.prep(name, "--overwrite")
            self.assertIn("read as megatron", result.stdout)
            self.assertEqual(self.documents(), ["a⟦b⟧"])

    def test_long_documents_are_split_and_short_ones_packed(self):
        self.write_dataset([ids("abcdefgh"), ids("ij"), ids("k")], [0, 1, 2, 3])
        self.prep(self.prefix, "--seq-len", "5", "--long", "split", "--pack")
        self.assertEqual(self.documents(), ["a⟦bcde⟧", "f⟦gh⟧", "i⟦j⟧"])
        self.assertEqual(np.diff(self.load()[0]["seq_offsets"]).tolist(), [5, 5])

    def test_an_end_is_written_where_it_is_missing_if_asked(self):
        self.write_dataset([ids("ab"), ids("cd") + [END], []], [0, 1, 2, 3])
        self.prep(self.prefix, "--eos", "always")
        self.assertEqual(self.documents(), ["a⟦b<|im_end|>⟧", "c⟦d<|im_end|>⟧"])

    def test_documents_over_several_chunks(self):
        from qprep import megatron
        self.addCleanup(setattr, megatron, "CHUNK_TOKENS", megatron.CHUNK_TOKENS)
        megatron.CHUNK_TOKENS = 5
        texts = ["ab", "cdefghij", "kl", "mn", "op", "qrs"]
        self.write_dataset([ids(text) for text in texts], range(7))
        self.prep(self.prefix, "--eval-fraction", "0.2", "--eval-out", self.path("eval.h5"))
        both = self.documents() + self.documents("eval.h5")
        self.assertEqual(sorted(text.replace("⟦", "").replace("⟧", "") for text in both), texts)

    def test_damaged_files_are_refused_by_the_field(self):
        good = [ids("ab"), ids("cde")]
        for name, changes, words in (
            ("magic", {"magic": b"TNTIDX\0\0\0"}, ["corpus.idx", "MMIDIDX"]),
            ("version", {"version": struct.pack("<Q", 2)}, ["version=2, must be 1"]),
            ("float", {"code": b"\x07"}, ["type code 7 is a floating-point type"]),
            ("unknown type", {"code": b"\x09"}, ["type code 9 is unknown"]),
            ("too many sequences", {"counts": struct.pack("<QQ", 1 << 60, 3)}, ["sequences", "cut off"]),
            ("too few sequences", {"counts": struct.pack("<QQ", 1, 3)}, ["sequences", "damaged"]),
            ("no sequence", {"counts": struct.pack("<QQ", 0, 0), "sizes": b"", "pointers": b"", "borders": b""},
             ["holds no sequence"]),
            ("cut index", {"borders": b""}, ["cut off"]),
            ("long index", {"modes": b"1234567"}, ["damaged or cut off"]),
            ("modes", {"modes": b"\0\1"}, ["multimodal"]),
            ("negative size", {"sizes": np.array([2, -3], "<i4").tobytes()}, ["sizes[1]=-3 is negative"]),
            ("wrong pointer", {"pointers": np.array([0, 5], "<i8").tobytes()}, ["pointers[1]=5, must be 4"]),
            ("far pointer", {"pointers": np.array([1 << 62, 4], "<i8").tobytes()}, ["pointers[0]"]),
            ("first border", {"borders": np.array([1, 1, 2], "<i8").tobytes()}, ["run over 1..2, must run from 0"]),
            ("last border", {"borders": np.array([0, 1, 3], "<i8").tobytes()}, ["run over 0..3"]),
            ("descending borders", {"counts": struct.pack("<QQ", 2, 4), "borders": np.array([0, 2, 1, 2], "<i8").tobytes()},
             ["document border 2 is 1, below"]),
            ("one border", {"counts": struct.pack("<QQ", 2, 1), "borders": np.array([0], "<i8").tobytes()},
             ["document borders run over 0..0"]),
            ("short bin", {"bin": b"\0\0"}, ["corpus.bin", "is 2 bytes", "5 tokens"]),
            ("long bin", {"bin": b"\0" * 11}, ["corpus.bin", "is 11 bytes"]),
            ("empty bin", {"bin": b""}, ["corpus.bin"]),
            ("large id", {"bin": np.array([7, 8, 260, 8, 9], "<u2").tobytes()}, ["token 2 is 260, must be 0..259"]),
        ):
            with self.subTest(name):
                self.write_dataset(good, [0, 1, 2], **changes)
                result = self.prep(self.prefix, "--format", "megatron", expect=None)
                self.assert_one_error(result, 3, *words)

    def test_negative_ids_are_refused(self):
        self.write_dataset([[5, -1]], [0, 1], "<i4")
        self.assert_one_error(self.prep(self.prefix, "--format", "megatron", expect=None), 3, "token 1 is -1")

    def test_headers_cut_anywhere_are_refused(self):
        self.write_dataset([ids("ab"), ids("cde")], [0, 1, 2])
        with open(self.path("corpus.idx"), "rb") as file:
            whole = file.read()
        for length in range(len(whole)):
            self.write("corpus.idx", whole[:length])
            self.assert_one_error(self.prep(self.prefix, "--format", "megatron", expect=None), 3, "corpus.idx")

    def test_missing_parts_are_named(self):
        self.assert_one_error(self.prep(self.prefix, "--format", "megatron", expect=None), 3, "corpus.idx", "cannot read")
        self.write_dataset([ids("ab")], [0, 1])
        import os
        os.unlink(self.path("corpus.bin"))
        self.assert_one_error(self.prep(self.prefix, "--format", "megatron", expect=None), 3, "corpus.bin", "cannot read")
        self.assert_one_error(self.prep(self.prefix + ".idx", expect=None), 3, "--format megatron")

    def test_its_files_are_not_overwritten(self):
        self.write_dataset([ids("ab")], [0, 1])
        import os
        os.symlink("corpus.bin", self.path("out.h5"))
        self.assert_one_error(self.prep(self.prefix, "--overwrite", expect=None), 2, "both input and output")

    def test_it_has_no_prompts(self):
        self.write_dataset([ids("ab")], [0, 1])
        self.assert_one_error(self.prep(self.prefix, "--prompts", expect=None), 2, "--prompts")


if __name__ == "__main__":
    unittest.main()
