#!/usr/bin/env python3
"""The oracle's inputs are the ones that its golden values were computed from, and its tools notice what is wrong."""
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

SKIPPED = 77
MISSING = [name for name in ("numpy", "h5py", "xxhash") if importlib.util.find_spec(name) is None]
if MISSING:
    print(f"skipped: this Python has no {', '.join(MISSING)}")
    sys.exit(SKIPPED)

ORACLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "oracle")
sys.path.insert(0, ORACLE)

import h5py  # noqa: E402
import numpy as np  # noqa: E402
from compare import main as compare  # noqa: E402
from compare import read_golden  # noqa: E402
from make_inputs import make_inputs  # noqa: E402
from nf4_reference import CODE, THRESHOLD, dequantize, pack, quantize, quantize_blocks, unpack  # noqa: E402
from tensors import qshard_tiny, read_safetensors, round_to, write_safetensors  # noqa: E402

GOLDEN = os.path.join(ORACLE, "..", "golden")
PINNED = {
    "tiny2": "c41d4b871712f680a64ea72c36142f641e2ca23a47cac784646d5ac68e4156bb",
    "odd": "7c618962821b5d03eb849c99b460f2a8e12d47020730e43d35bbcf891e87eed4",
    "biases": "5af21bbfe25128fa651f1654073fd3266af51dc55dd7634e1b7172533052291e",
    "mistral": "c068cc803dffc26d94a2137b35149ca924142b21f06f359d0a73af10e518c5d5",
    "qwen2": "1e76b83f564e9a9d03d5bec5d5bf5844fcfc1fa09e83655782d015c8e2613c3c",
    "qwen3": "16003bce7cd8a759e23b821eb6bcc2e822ab4f68706b8cae7caf91ac2575c44b",
    "gemma2": "4e1d733056ada4cb1f279dedb1f8bcefc9dc4b5aeaf3cd77403d9a0e0283cc0f",
    "gemma3": "e4620c935f0d6d29af43c7535c598a4e8e0a23b7f86a59a1dc5bfee2945c8f0b",
    "phi3": "3a38cb7df60fe4e46d4973583ccfd46e5e04077e90c046d4d9d68f4e6a809fe2",
    "olmo2": "26663aed7643aa237abe0896f08a8803fe4f77391e74dc083daf0f819855afad",
    "olmo3": "ac355edb885600e95af82b4a7621a5eee81321a361e912d667e0cbd56635605e",
    "longrope": "c57009c0e774d66f3c9ada13ef469cd40cf4a665ccf2e8d0e323fcf66fef37b3",
    "longrope_short": "3359823474e27182c66affc1d046c2ab54e6cd757630563e3fb514dee43bec3b",
    "dynamic": "04c3579beefad8006f2cab4e74565405f6aa4c8d2a7586f8d5ef2429db467f7e",
    "smollm3": "3d59d7684d754f6773cabe96d13e79f30deda50ddc31c54244c8c53dd851db23",
    "smollm3_window": "066803e7682d00312e4df922c498cc6a6f95809c663c3d8fe223e503f7246b3c",
    "granite": "bd43509e722d82ae54c0a55ec69c7362cc86220767a76e0a5d79ffcfdf2d0488",
    "dora_granite": "4cae14a4291373e278a911b00b0968f27b24c3391c02cae1b78b141afeeef98c",
    "dora": "6f7c7b26730075b23a57fbe839b7fd1c6aa55867b9e1d524049da667487aa05d",
    "dora_dropout": "bdaa995f2513048d7f9ef87ec307a635ff51b886e05935e7663ca5912669aa9f",
    "dropout": "056472e5d36ba350c9a4dc26c2f3fd68d169bfe5e1065c7a3c9596af4b645573",
    "bnb_plain": "48a2a07e1bf8143b4d72578b2fdaf8e77040c3139d5919ef253119bf9e826887",
}


def content_digest(folder):
    """SHA-256 over the files of an input folder. Of HDF5 files the content counts: another version of the library may
    arrange the same file differently. run.yaml, which holds the folder's name, is left out."""
    digest = hashlib.sha256()
    for where, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = os.path.join(where, name)
            if name == "run.yaml":
                continue
            digest.update(os.path.relpath(path, folder).encode())
            if not name.endswith(".h5"):
                with open(path, "rb") as file:
                    digest.update(file.read())
                continue
            with h5py.File(path, "r") as file:
                for key in sorted(file.attrs):
                    digest.update(f"{key}={file.attrs[key]!s}".encode())
                for key in sorted(file):
                    digest.update(f"{key} {file[key].dtype.str} {file[key].shape}".encode() + file[key][()].tobytes())
    return digest.hexdigest()


def file_bytes(folder):
    """{relative path: bytes} of every file but run.yaml."""
    found = {}
    for where, _, files in os.walk(folder):
        for name in files:
            if name != "run.yaml":
                with open(os.path.join(where, name), "rb") as file:
                    found[os.path.relpath(os.path.join(where, name), folder)] = file.read()
    return found


class Inputs(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def test_content_is_pinned(self):
        for case, pinned in PINNED.items():
            with self.subTest(case=case):
                make_inputs(case, self.path(case))
                self.assertEqual(content_digest(self.path(case)), pinned)

    def test_two_runs_give_the_same_bytes(self):
        for case in PINNED:
            with self.subTest(case=case):
                make_inputs(case, self.path("a", case))
                make_inputs(case, self.path("b", case))
                self.assertEqual(file_bytes(self.path("a", case)), file_bytes(self.path("b", case)))

    def test_from_token_files_with_numpy_alone(self):
        """As on a machine with a GPU: bare token files are brought, the rest is made there."""
        case = next(iter(PINNED))
        make_inputs(case, self.path("whole"))
        make_inputs(case, self.path("bare"), bare=True)
        with h5py.File(self.path("whole", "train.h5"), "r") as whole, h5py.File(self.path("bare", "train.h5"), "r") as bare:
            self.assertEqual(set(whole) - set(bare), {"decode_offsets", "decode_bytes"})
            self.assertEqual(dict(whole.attrs), dict(bare.attrs))
            for key in bare:
                self.assertEqual(whole[key][()].tobytes(), bare[key][()].tobytes())
        with mock.patch.dict(sys.modules, {"h5py": None, "xxhash": None}):
            make_inputs(case, self.path("made"), token_files=self.path("bare"))
        self.assertEqual(file_bytes(self.path("made")), file_bytes(self.path("bare")))

    def test_goldens_belong_to_these_checkpoints(self):
        for case in PINNED:
            with self.subTest(case=case):
                make_inputs(case, self.path(case))
                with open(self.path(case, "model", "model.safetensors"), "rb") as file:
                    digest = hashlib.sha256(file.read()).hexdigest()
                self.assertEqual(read_golden(GOLDEN, case)["model_sha256"], digest)

    def test_token_file_counts_agree(self):
        for case in PINNED:
            with self.subTest(case=case):
                make_inputs(case, self.path(case))
                with h5py.File(self.path(case, "train.h5"), "r") as file:
                    labels, docs = file["labels"][()], file["doc_offsets"][()]
                    borders, targets = file["seq_offsets"][()], file["seq_targets"][()]
                    counted = [
                        sum(
                            labels[t + 1] != -100
                            for begin, end in zip(docs[:-1], docs[1:])
                            if first <= begin < last
                            for t in range(begin, end - 1)
                        )
                        for first, last in zip(borders[:-1], borders[1:])
                    ]
                    self.assertEqual(counted, targets.tolist())
                    self.assertEqual(file.attrs["n_targets"], sum(counted))
                    self.assertIn(0, counted if case not in ("biases", "mistral") else [0])
                    self.assertTrue(set(borders.tolist()) <= set(docs.tolist()))
                    self.assertLess(file["tokens"][()].max(), file.attrs["vocab_size"])

    def test_tiny_data_set_has_no_example_twice(self):
        examples = qshard_tiny.make_examples(1, 600)
        questions = [example["messages"][0]["content"] for example in examples]
        self.assertEqual(len(set(questions)), 600)

    def test_tiny_tokenizer_covers_every_byte(self):
        table = qshard_tiny.token_bytes()
        self.assertEqual(len(set(table)), len(table))
        self.assertTrue({bytes([byte]) for byte in range(256)} <= set(table))


class Reference(unittest.TestCase):
    def test_a_threshold_takes_the_lower_code(self):
        x = np.zeros(64, dtype=np.float32)
        x[:15], x[15] = THRESHOLD, 1.0
        codes, _, _ = quantize_blocks(x)
        self.assertEqual(codes[:15].tolist(), list(range(15)))
        x[:15] = np.nextafter(THRESHOLD, np.float32(2))
        codes, _, _ = quantize_blocks(x)
        self.assertEqual(codes[:15].tolist(), list(range(1, 16)))

    def test_codes_decode_to_themselves(self):
        x = np.resize(CODE, (5, 80))
        state = quantize(x, nested=False, dtype="f32")
        self.assertEqual(dequantize(state).tobytes(), x.tobytes())

    def test_a_zero_block_is_0x77(self):
        x = np.ones((2, 64), dtype=np.float32)
        x[1] = 0
        state = quantize(x)
        self.assertEqual(state.zero_blocks, 1)
        self.assertTrue((state.packed[32:] == 0x77).all())
        self.assertTrue((dequantize(state)[1] == 0).all())

    def test_packing_keeps_odd_counts(self):
        codes = np.arange(7, dtype=np.uint8)
        self.assertEqual(unpack(pack(codes), 7).tolist(), codes.tolist())
        self.assertEqual(pack(codes)[-1], 0x67)

    def test_bf16_rounds_to_even(self):
        halfway = np.array([1 + 2**-8, 1 + 3 * 2**-8], dtype=np.float32)
        self.assertEqual(round_to(halfway, "bf16").tolist(), [1.0, 1 + 2**-6])

    def test_bitsandbytes_checkpoints_decode_to_the_goldens(self):
        for name in ("bnb_tiny", "bnb_tiny_plain"):
            stored = read_safetensors(os.path.join(GOLDEN, name, "model.safetensors"), raw=True)
            goldens = read_safetensors(os.path.join(GOLDEN, name + "_weights.safetensors"))
            for weight, golden in goldens.items():
                with self.subTest(checkpoint=name, weight=weight):
                    self.assertEqual(dequantize(bnb_state(stored, weight)).tobytes(), golden.tobytes())


def bnb_state(stored, weight):
    """A bitsandbytes tensor as the reference's Quantized."""
    import json

    from nf4_reference import Quantized

    settings = json.loads(stored[weight + ".quant_state.bitsandbytes__nf4"][1].tobytes())
    packed, absmax = stored[weight][1].reshape(-1), stored[weight + ".absmax"][1]
    if "nested_offset" not in settings:
        return Quantized(tuple(settings["shape"]), packed, absmax)
    return Quantized(
        tuple(settings["shape"]),
        packed,
        None,
        offset=np.float32(settings["nested_offset"]),
        absmax8=absmax,
        absmax32=stored[weight + ".nested_absmax"][1],
        map=stored[weight + ".nested_quant_map"][1],
    )


class Compare(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.file = os.path.join(folder.name, "grads.safetensors")
        with np.load(os.path.join(GOLDEN, "odd.npz")) as golden:
            self.grads = {name: golden[name].copy() for name in golden.files}

    def result(self, grads):
        write_safetensors(self.file, grads)
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            stdout, sys.stdout = sys.stdout, nowhere
            try:
                return compare(["grads", "odd", self.file])
            except SystemExit:
                return 1
            finally:
                sys.stdout = stdout

    def test_golden_gradients_pass(self):
        self.assertEqual(self.result(self.grads), 0)

    def test_one_gradient_half_a_percent_off_fails(self):
        name = sorted(self.grads)[5]
        self.grads[name] *= np.float32(1.005)
        self.assertEqual(self.result(self.grads), 1)

    def test_a_missing_gradient_fails(self):
        del self.grads[sorted(self.grads)[0]]
        self.assertEqual(self.result(self.grads), 1)

    def test_not_a_number_fails(self):
        self.grads[sorted(self.grads)[0]][0, 0] = np.nan
        self.assertEqual(self.result(self.grads), 1)


class TinyCommand(unittest.TestCase):
    def run_tiny(self, folder, *options):
        tool = os.path.join(ORACLE, "..", "..", "src", "prep", "qshard_tiny.py")
        return subprocess.run([sys.executable, tool, folder, *options], capture_output=True, text=True, check=False)

    def test_bad_sizes_are_one_error_line_and_leave_nothing(self):
        bad = [["--heads", "3"], ["--vocab", "100"], ["--head-dim", "5"], ["--examples", "0"], ["--seed", "-1"]]
        for options in bad:
            with self.subTest(options=options), tempfile.TemporaryDirectory() as folder:
                done = self.run_tiny(os.path.join(folder, "x"), *options)
                self.assertEqual(done.returncode, 2)
                self.assertRegex(done.stderr, r"\Aerror\[E2\d\d\] --[^\n]+\n\Z")
                self.assertEqual(os.listdir(folder), [])

    def test_it_writes_a_checkpoint_and_examples(self):
        with tempfile.TemporaryDirectory() as folder:
            self.assertEqual(self.run_tiny(folder, "--examples", "16").returncode, 0)
            names = ["config.json", "eval.jsonl", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
            self.assertEqual(sorted(os.listdir(folder)), sorted([*names, "train.jsonl"]))
            with open(os.path.join(folder, "train.jsonl"), encoding="utf-8") as file:
                self.assertEqual(len(file.readlines()), 16)


if __name__ == "__main__":
    unittest.main()
