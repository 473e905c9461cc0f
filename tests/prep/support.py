"""What the tests of src/prep share: a byte-level toy model directory, and running a tool as a user does."""
import json
import os
import subprocess
import sys
import tempfile
import unittest

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


def make_model(folder, template=CHATML, vocab_size=300, **config):
    """A model directory whose tokenizer has the ids 0..2 special, 3..258 the bytes, 259 the merge `he`."""
    tokens = SPECIALS + byte_alphabet() + ["he"]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True} for i, text in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": ["h e"]},
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

    def assert_one_error(self, result, exit_code, *parts):
        """Exactly one line, beginning `error[E...]` with the class of the exit code, that holds all `parts`."""
        self.assertEqual(result.returncode, exit_code, result.stderr)
        lines = result.stderr.splitlines()
        self.assertEqual(len(lines), 1, result.stderr)
        self.assertRegex(lines[0], rf"^error\[E{exit_code}\d\d\] ")
        for part in parts:
            self.assertIn(part, lines[0])
