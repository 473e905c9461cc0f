"""fsdp_qlora's data sets: text, mask, end token and choice of samples are its own, pinned by small literal examples."""
import unittest

import numpy as np
from support import END, FolderTest, ids, make_model

from qprep import predecessor

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
    "that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nGreet {x}\n\n### Response:"
)


class Predecessor(FolderTest):
    def setUp(self):
        super().setUp()
        make_model(self.folder)

    def assert_documents(self, form, records, pairs, *options):
        """Documents are (what is not learned, what is), and the end token, exactly, token for token."""
        self.prep(records, "--format", f"fsdp_qlora:{form}", "--overwrite", *options)
        data, attributes = self.load()
        documents = [(ids(prompt) + ids(answer) + [END], len(ids(prompt))) for prompt, answer in pairs]
        self.assertEqual(data["tokens"].tolist(), [token for tokens, _ in documents for token in tokens])
        labels = [label for tokens, n in documents for label in [-100] * n + tokens[n:]]
        self.assertEqual(data["labels"].tolist(), labels)
        self.assertEqual(len(data["doc_offsets"]) - 1, len(pairs))
        self.assertEqual(attributes["template_sha256"], "")

    def test_alpaca_has_two_prompts_and_no_line_break_before_the_answer(self):
        records = [{"instruction": "Add.", "input": "1 2", "output": "3"},
                   {"instruction": "Greet {x}", "input": "", "output": "Hey, the end"},
                   {"instruction": "Greet {x}", "output": " {y}"}]
        self.assert_documents("alpaca", records, [(WITH_INPUT, "3"), (WITHOUT_INPUT, "Hey, the end"),
                                                  (WITHOUT_INPUT, " {y}")])

    def test_alpaca_sample_takes_the_first_ones(self):
        records = [{"instruction": "Greet {x}", "output": str(i)} for i in range(600)]
        want = [(WITHOUT_INPUT, str(i)) for i in range(600)]
        self.assert_documents("alpaca_sample", records, want[:512])
        self.assert_documents("alpaca_sample", records, want[:3], "--samples", "3")

    def test_guanaco_learns_the_mark_and_everything_after_it_later_questions_included(self):
        text = "### Human: Hi### Assistant: Hey### Human: Why?### Assistant: Because"
        self.assert_documents("guanaco", [{"text": text}],
                              [("### Human: Hi", "### Assistant: Hey### Human: Why?### Assistant: Because")])

    def test_guanaco_without_an_assistant_learns_the_end_alone(self):
        self.assert_documents("guanaco", [{"text": "### Human: Hi"}], [("### Human: Hi", "")])

    def test_sql_has_a_context_and_leaves_the_first_thousand_of_the_shuffled_out(self):
        records = [{"context": f"T{i}", "question": "the?", "answer": f"SELECT {i}"} for i in range(1003)]
        left = np.random.default_rng(42).permutation(1003)[1000:].tolist()
        want = {i: (f"###Context:\nT{i}\n###Question:\nthe?\n###Answer:\n", f"SELECT {i}") for i in left}
        self.assert_documents("sql", records, [want[i] for i in left])
        other = np.random.default_rng(7).permutation(1003)[1000:].tolist()
        self.assertNotEqual(left, other)
        self.prep(records, "--format", "fsdp_qlora:sql", "--seed", "7", "--overwrite")
        self.assertIn(f"SELECT {other[0]}", self.documents()[0])
        self.assert_one_error(self.prep(records[:1000], "--format", "fsdp_qlora:sql", "--overwrite", expect=None), 3,
                              "1000 records")

    def test_orca_math_is_shuffled_by_its_own_seed(self):
        records = [{"question": f"{i}?", "answer": f"the {i}"} for i in range(10)]
        taken = [5, 6, 0, 7]  # what numpy's generator gives for the seed 42, written down
        want = [(f"###Question:\n{i}?\n###Answer:\n", f"the {i}") for i in taken]
        self.assert_documents("orca_math", records, want, "--samples", "4", "--seed", "9")

    def test_dummy_fills_every_sequence_without_a_file(self):
        from support import prep
        result = prep("--model", self.folder, "--format", "fsdp_qlora:dummy", "--seq-len", "300", "--samples", "3", "-o",
                      self.path("out.h5"))
        self.assertEqual(result.returncode, 0, result.stderr)
        data, _ = self.load()
        prompt = WITH_INPUT.replace("Add.", "instruction").replace("1 2", "input")
        tokens = (ids(prompt) + ids("output" * 600))[:300]
        self.assertEqual(data["tokens"].tolist(), tokens * 3)
        labels = [-100] * len(ids(prompt)) + tokens[len(ids(prompt)):]
        self.assertEqual(data["labels"].tolist(), labels * 3)

    def test_the_prompt_is_masked_by_the_number_of_its_tokens_alone(self):
        """A token that joins prompt and answer shifts the mask into the answer: a quirk that is kept."""
        make_model(self.folder, merges=["- #", "( -#"])  # the prompt (- has two tokens, (-# in the text is one
        self.assertEqual(self.prepared([{"text": "### Human: (-### Assistant: Hey"}], "--format", "fsdp_qlora:guanaco"),
                         ["### Human: (-##⟦# Assistant: Hey<|im_end|>⟧"])

    def test_the_tokenizers_first_token_stands_before_and_counts_to_the_prompt(self):
        import json
        with open(self.path("tokenizer.json"), encoding="utf-8") as file:
            tokenizer = json.load(file)
        single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing", "single": single, "pair": single + [{"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}}
        self.write("tokenizer.json", json.dumps(tokenizer))
        self.assertEqual(self.prepared([{"text": "Q### Assistant: A"}], "--format", "fsdp_qlora:guanaco"),
                         ["<|endoftext|>Q⟦### Assistant: A<|im_end|>⟧"])

    def test_long_rows_keep_their_beginning_and_lose_the_end_token(self):
        records = [{"text": "Q### Assistant: " + "A" * 50}, {"text": "Q" * 40 + "### Assistant: A"}]
        result = self.prep(records, "--format", "fsdp_qlora:guanaco", "--seq-len", "30")
        self.assertEqual(self.documents(), ["Q⟦### Assistant: " + "A" * 14 + "⟧"])
        self.assertIn("1 dropped, nothing to learn", result.stdout)

    def test_options_that_it_did_not_have_are_refused(self):
        for option in (["--eos", "never"], ["--train-on-inputs"], ["--turns", "last"], ["--chat"]):
            self.assert_one_error(self.prep([{"text": "a"}], "--format", "fsdp_qlora:guanaco", *option, expect=None), 2)

    def test_prompts_are_the_part_that_is_not_learned(self):
        self.prep([{"question": "the?", "answer": "no"}], "--format", "fsdp_qlora:orca_math", "--prompts")
        self.assertEqual(self.documents(), ["###Question:\nthe?\n###Answer:\n"])

    def test_the_shuffle_is_that_of_datasets(self):
        self.assertEqual(predecessor.shuffled(10, 42), [5, 6, 0, 7, 3, 2, 4, 9, 1, 8])


if __name__ == "__main__":
    unittest.main()
