"""The tokenizer of the real SmolLM2-135M-Instruct, where its directory is there (QSHARD_SMOLLM2, or quickstart/smollm2)."""
import gzip
import json
import os
import unittest

import tokenizers
from support import ROOT

MODEL = os.environ.get("QSHARD_SMOLLM2") or os.path.join(ROOT, "quickstart", "smollm2")


@unittest.skipUnless(os.path.exists(os.path.join(MODEL, "tokenizer.json")),
                     f"no {MODEL}: convert the model with src/prep/qshard_gguf.py, or run ./quickstart.sh")
class SmolLM2(unittest.TestCase):
    def setUp(self):
        self.tokenizer = tokenizers.Tokenizer.from_file(os.path.join(MODEL, "tokenizer.json"))
        with gzip.open(os.path.join(ROOT, "tests", "golden", "smollm2_tokens.json.gz")) as file:
            self.cases = json.load(file)["cases"]

    def test_ids_equal_those_of_an_independent_tokenizer(self):
        self.assertEqual(len(self.cases), 1000)
        encoded = self.tokenizer.encode_batch([text for text, _ in self.cases], add_special_tokens=False)
        wrong = [repr(text) for (text, ids), got in zip(self.cases, encoded) if got.ids != ids]
        self.assertEqual(wrong, [])

    def test_every_text_comes_back_from_its_ids(self):
        texts = [text for text, _ in self.cases]
        ids = [ids for _, ids in self.cases]
        self.assertEqual(self.tokenizer.decode_batch(ids, skip_special_tokens=False), texts)


if __name__ == "__main__":
    unittest.main()
