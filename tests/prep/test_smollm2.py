"""The tokenizer and the template of the real SmolLM2-135M-Instruct, where its directory is there (QSHARD_SMOLLM2, or
build/smollm2, or quickstart/smollm2)."""
import gzip
import json
import os
import unittest

import tokenizers
from support import ROOT, FolderTest, prep

PLACES = [os.path.join(ROOT, folder, "smollm2") for folder in ("build", "quickstart")]
MODEL = os.environ.get("QSHARD_SMOLLM2") or next(filter(os.path.isdir, PLACES), PLACES[0])


MISSING = f"no {MODEL}: convert the model with src/prep/qshard_gguf.py, or run ./quickstart.sh"


@unittest.skipUnless(os.path.exists(os.path.join(MODEL, "tokenizer.json")),
                     MISSING)
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


@unittest.skipUnless(os.path.exists(os.path.join(MODEL, "tokenizer.json")), MISSING)
class Prepared(FolderTest):
    SYSTEM = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n")

    def prepared(self, records, *options):
        data = self.write_records("data.jsonl", records)
        result = prep("--model", MODEL, data, "-o", self.path("out.h5"), "--overwrite", *options)
        self.assertEqual(result.returncode, 0, result.stderr)
        return self.documents()

    def test_its_own_template_and_the_assistants_turns(self):
        turns = [("Say “Größe”.", "Größe 👍🏽"), ("And 2+2?", "It is 4, isn't it?\n\n    x = 4\n")]
        messages = [{"role": role, "content": text} for pair in turns for role, text in zip(("user", "assistant"), pair)]
        want = self.SYSTEM + "".join(
            f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n⟦{a}<|im_end|>⟧\n" for q, a in turns)
        self.assertEqual(self.prepared([{"messages": messages}]), [want])
        self.assertEqual(self.prepared([{"conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in messages]}]), [want])

    def test_an_opening_turn_is_context_and_calls_that_its_template_leaves_out_are_refused(self):
        talk = [{"role": role, "content": text} for role, text in (("assistant", "Hi"), ("user", "q"), ("assistant", "a"))]
        self.assertEqual(self.prepared([{"messages": talk}]),
                         [self.SYSTEM + "<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
                          "<|im_start|>assistant\n⟦a<|im_end|>⟧\n"])
        call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
        for record in ({"messages": [talk[1], call]}, {"messages": talk[1:], "tools": [{"name": "add"}]}):
            data = self.write_records("data.jsonl", [record])
            result = prep("--model", MODEL, data, "-o", self.path("out.h5"), "--overwrite")
            self.assert_one_error(result, 3, "data.jsonl:1:", "tokenizer_config.json does not write", "--chat-template")

    def test_the_ids_are_those_of_the_rendered_text(self):
        records = [{"messages": [{"role": "user", "content": f"What is {i} + {i}?"},
                                 {"role": "assistant", "content": f"{2 * i}, the sum of\n{i}  and {i}."}]} for i in range(50)]
        texts = [text.replace("⟦", "").replace("⟧", "") for text in self.prepared(records)]
        encoded = tokenizers.Tokenizer.from_file(os.path.join(MODEL, "tokenizer.json")).encode_batch(
            texts, add_special_tokens=False)
        self.assertEqual(self.load()[0]["tokens"].tolist(), [i for encoding in encoded for i in encoding.ids])

    def test_fsdp_qloras_alpaca_by_its_own_steps(self):
        """Prompt and text tokenized separately, the end appended, as many labels masked as the prompt has tokens."""
        record = {"instruction": "Name a colour.", "input": "", "output": "Red\nor blue"}
        self.prepared([record], "--format", "fsdp_qlora:alpaca")
        prompt = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
                  "\n\n### Instruction:\nName a colour.\n\n### Response:")
        tokenizer = tokenizers.Tokenizer.from_file(os.path.join(MODEL, "tokenizer.json"))
        ids = tokenizer.encode(prompt + record["output"]).ids + [tokenizer.token_to_id("<|im_end|>")]
        masked = len(tokenizer.encode(prompt).ids)
        data, _ = self.load()
        self.assertEqual(data["tokens"].tolist(), ids)
        self.assertEqual(data["labels"].tolist(), [-100] * masked + ids[masked:])


if __name__ == "__main__":
    unittest.main()
