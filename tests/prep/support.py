"""What the tests of src/prep share: a byte-level toy model directory, and running a tool as a user does."""
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import types
import unittest

with contextlib.suppress(ImportError):  # the tests that need it are skipped without it, the others not
    import h5py

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PREP = os.path.join(ROOT, "src", "prep")
sys.path.insert(0, PREP)

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_alphabet():
    """The 256 characters of byte-level BPE in byte order, written down independently of src/prep."""
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
    extra = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(extra)) for b in range(256)]


BYTE = 3  # id of byte 0 in the toy model
END = 2  # <|im_end|>
HE = 259


def ids(text):
    """Ids of plain text in the toy model, which has one merge."""
    out = []
    for byte in text.encode("utf-8"):
        if out and out[-1] == BYTE + ord("h") and byte == ord("e"):
            out[-1] = HE
        else:
            out.append(BYTE + byte)
    return out


def make_model(folder, template=CHATML, vocab_size=300, merges=(), pre_tokenizer=None, **config):
    """A model directory whose tokenizer has the ids 0..2 special, 3..258 the bytes, 259 the merge `he`, then `merges`."""
    merges = ["h e", *merges]
    tokens = SPECIALS + byte_alphabet() + [merge.replace(" ", "") for merge in merges]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True} for i, text in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer or {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                           "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": template},
        "config.json": {"vocab_size": vocab_size, "max_position_embeddings": 4096, **config},
    }
    if template is None:
        del files["tokenizer_config.json"]["chat_template"]
    for name, value in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(value, file)
    return folder


def tool(name, *arguments, **environment):
    """Runs src/prep/NAME; the result has returncode, stdout and stderr as text."""
    return subprocess.run([sys.executable, os.path.join(PREP, name), *map(str, arguments)], capture_output=True,
                          encoding="utf-8", errors="replace", check=False, timeout=300,
                          env={**os.environ, "PYTHONUTF8": "1", **environment})


def prep(*arguments):
    """Runs qshard-prep in this process, which costs no start: the result is like that of `tool`."""
    from qprep.errors import run  # not at the top, where its modules may be missing
    from qshard_prep import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(main, list(map(str, arguments)))
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


class FolderTest(unittest.TestCase):
    """A test with a folder of its own, `self.path(name)`."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="qshard-test-")
        self.addCleanup(__import__("shutil").rmtree, self.folder, ignore_errors=True)

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, content):
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        with open(self.path(name), "wb") as file:
            file.write(data)
        return self.path(name)

    def write_records(self, name, records):
        return self.write(name, "".join(json.dumps(record) + "\n" for record in records))

    def prep(self, records, *options, expect=0):
        """Runs qshard-prep on records, or on a file's name, to out.h5 with the toy model in the test's folder."""
        data = records if isinstance(records, str) else self.write_records("data.jsonl", records)
        result = prep("--model", self.folder, data, "-o", self.path("out.h5"), *options)
        if expect is not None:
            self.assertEqual(result.returncode, expect, result.stderr)
        return result

    def load(self, name="out.h5"):
        """(datasets, attributes) of a token file."""
        with h5py.File(self.path(name), "r") as file:
            return ({key: file[key][()] for key in file},
                    {key: v.decode() if isinstance(v, bytes) else v for key, v in file.attrs.items()})

    def documents(self, name="out.h5"):
        """The documents as text in which what is learned stands in ⟦⟧."""
        data, _ = self.load(name)
        offsets, raw = data["decode_offsets"], data["decode_bytes"]
        texts = []
        for begin, end in zip(data["doc_offsets"][:-1], data["doc_offsets"][1:]):
            text, inside = b"", False
            for t, label in zip(data["tokens"][begin:end], data["labels"][begin:end]):
                if (label != -100) != inside:
                    text += "⟧".encode() if inside else "⟦".encode()
                    inside = not inside
                text += raw[offsets[t]:offsets[t + 1]].tobytes()
            texts.append((text + ("⟧".encode() if inside else b"")).decode("utf-8", "replace"))
        return texts

    def prepared(self, records, *options):
        """`documents` of records."""
        self.prep(records, "--overwrite", *options)
        return self.documents()

    def assert_one_error(self, result, exit_code, *parts):
        """Exactly one line, beginning `error[E...]` with the class of the exit code, that holds all `parts`."""
        self.assertEqual(result.returncode, exit_code, result.stderr)
        lines = result.stderr.splitlines()
        self.assertEqual(len(lines), 1, result.stderr)
        self.assertRegex(lines[0], rf"^error\[E{exit_code}\d\d\] ")
        for part in parts:
            self.assertIn(part, lines[0])
