"""Several files: each of a format of its own, and each taken as often as --take says."""
import itertools
import json
import os
import struct
import unittest
from collections import Counter

import numpy as np
from support import CHATML, FolderTest, ids, make_model, prep

CHAT = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]} for i in range(3)]
ALPACA = [{"instruction": f"do{i}", "output": f"o{i}"} for i in range(2)]
TEXT = [{"text": f"the {i}"} for i in range(4)]


class Mix(FolderTest):
    def setUp(self):
        super().setUp()
        make_model(self.folder)
        self.chat, self.alpaca = self.write_records("chat.jsonl", CHAT), self.write_records("alpaca.jsonl", ALPACA)
        self.text = self.write_records("text.jsonl", TEXT)

    def mix(self, *arguments, expect=0):
        result = prep("--model", self.folder, "-o", self.path("out.h5"), "--overwrite", *arguments)
        if expect is not None:
            self.assertEqual(result.returncode, expect, result.stderr)
        return result

    def mixed(self, *arguments):
        self.mix(*arguments)
        return self.documents()

    def raw(self, name="out.h5"):
        with open(self.path(name), "rb") as file:
            return file.read()

    def numbered(self, name, count):
        """A file of texts that differ: `name`, then a number."""
        return self.write_records(f"{name}.jsonl", [{"text": f"{name}{i:04d}"} for i in range(count)])

    def counted(self, name="out.h5"):
        """How often each text is in a token file."""
        return Counter("".join(text.split("<|im_end|>")[0].split("⟦")) for text in self.documents(name))

    def write_megatron(self, name, texts):
        sizes = [len(ids(text)) for text in texts]
        pointers = [2 * n for n in itertools.accumulate(sizes, initial=0)][:-1]
        self.write(f"{name}.idx", b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1)
                   + np.array(sizes, "<i4").tobytes() + np.array(pointers, "<i8").tobytes()
                   + np.arange(len(sizes) + 1, dtype="<i8").tobytes())
        self.write(f"{name}.bin", np.array([t for text in texts for t in ids(text)], "<u2").tobytes())
        return self.path(name)

    # --- formats

    def test_the_first_record_of_each_file_tells_its_format(self):
        alone = [self.mixed(path) for path in (self.text, self.chat, self.alpaca)]
        result = self.mix(self.text, self.chat, self.alpaca)
        self.assertEqual(self.documents(), sum(alone, []))
        self.assertEqual(result.stdout.splitlines()[1:], [
            "9 records of 9 lines (0 empty, 0 bad skipped)",
            f'{self.text}: 4 records read as text, by the key "text" of line 1: 4 documents',
            f'{self.chat}: 3 records read as messages, by the key "messages" of line 1: 3 documents',
            f'{self.alpaca}: 2 records read as alpaca, by the key "instruction" of line 1: 2 documents'])
        attributes = self.load()[1]
        self.assertEqual((attributes["source"], attributes["chat_template"]), ("text.jsonl, chat.jsonl, alpaca.jsonl", CHATML))

    def test_files_of_one_format_are_told_of_by_the_first(self):
        result = self.mix(self.text, self.numbered("n", 3))
        self.assertTrue(result.stdout.startswith(f'{self.text}: read as text, by the key "text" of line 1; --format names another\n'))
        self.assertEqual(result.stdout.count("read as"), 1)

    def test_everything_that_gives_documents_goes_together(self):
        array = self.write("array.json", json.dumps([{"prompt": "p", "completion": "c"}]))
        tokens = self.write_records("tokens.jsonl", [{"input_ids": ids("abc")}])
        corpus, empty = self.write_megatron("corpus", ["xy", "z", "uvw"]), self.write("empty.jsonl", "\n")
        files = [self.text, corpus, array, tokens, empty, self.chat]
        alone = [self.mixed(path) for path in files if path != empty]
        for jobs in ("1", "2"):
            result = self.mix(*files, "--jobs", jobs)
            self.assertEqual(self.documents(), sum(alone, []))
            self.assertIn(f"{corpus}: 3 records read as megatron, by its .idx and .bin files: 2 documents\n", result.stdout)
            self.assertIn(f"{empty}: 0 records of no format: 0 documents\n", result.stdout)
            self.assertIn("12 records of 13 lines (1 empty, 0 bad skipped)", result.stdout)

    def test_any_number_of_processes_gives_the_same_bytes(self):
        many = self.numbered("n", 2500)
        chats = self.write_records("chats.jsonl", CHAT * 700)
        arguments = [many, chats, self.alpaca, "--take", f"{chats}=1.5", "--take", f"{many}=0.3", "--pack",
                     "--eval-out", self.path("eval.h5"), "--eval-fraction", "0.1"]
        self.mix(*arguments, "--jobs", "1")
        want = self.raw(), self.raw("eval.h5")
        self.mix(*arguments, "--jobs", "2")
        self.assertEqual((self.raw(), self.raw("eval.h5")), want)

    def test_an_error_names_the_file_and_the_record_that_chose_its_format(self):
        lines = [json.dumps(record) for record in ALPACA * 800]
        bad = self.write("bad.jsonl", "\n" + "\n".join(lines + [json.dumps(TEXT[0])]))
        for jobs in ("1", "2"):
            result = self.mix(self.chat, bad, self.text, "--jobs", jobs, expect=None)
            self.assert_one_error(result, 3, f'{bad}:1602: the field "instruction" is missing; add it',
                                  f"alpaca was taken from the first one ({bad} line 2), and this one looks like text")
            result = self.mix(self.chat, bad, self.text, "--jobs", jobs, "--on-bad-record=skip")
            self.assertIn(f"(first: {bad} line 1602)", result.stdout)
            self.assertIn(f'{bad}: 1600 records read as alpaca, by the key "instruction" of line 2: 1600 documents\n', result.stdout)

    def test_the_first_of_several_errors_counts_for_any_number_of_processes(self):
        first = self.write_records("first.jsonl", [*TEXT * 400, {"text": 1}])
        for jobs in ("1", "2"):
            result = self.mix(first, self.path("none.jsonl"), "--format", "text", "--jobs", jobs, expect=None)
            self.assert_one_error(result, 3, f"{first}:1601: ")

    def test_a_file_of_no_format_is_refused_or_left_out(self):
        words = self.write_records("words.jsonl", [{"words": "a"}])
        self.assert_one_error(self.mix(self.chat, words, expect=None), 3, f'{words}:1: no format has the keys "words"')
        result = self.mix(self.chat, words, "--on-bad-record=skip")
        self.assertIn('1 record is bad and left out: no format has the keys "words"', result.stdout)
        self.assertEqual(len(self.documents()), 3)

    def test_a_format_that_is_named_is_that_of_all(self):
        self.assert_one_error(self.mix(self.text, self.chat, "--format", "text", expect=None), 3, f"{self.chat}:1: ", '"text" is missing')

    # --- options

    def test_options_need_one_file_that_they_mean_something_for(self):
        turns = [{"messages": CHAT[0]["messages"] + CHAT[1]["messages"]}]
        talk = self.write_records("talk.jsonl", turns)
        pairs = self.write_records("pairs.jsonl", [{"prompt": "p", "completion": "c"}])
        alone = self.mixed(talk, "--turns", "last")
        self.assertEqual(self.mixed(talk, self.text, pairs, "--turns", "last"), alone + self.mixed(self.text) + self.mixed(pairs))
        chat = self.mixed(self.alpaca, "--chat")
        self.assertEqual(self.mixed(self.alpaca, self.text, talk, "--chat"), chat + self.mixed(self.text) + self.mixed(talk))
        asked = self.write_records("asked.jsonl", [{"question": "p", "completion": "c"}])
        corpus = self.write_megatron("corpus", ["xy"])
        self.assertEqual(self.mixed(asked, corpus, self.text, "--rename", "question=prompt"),
                         self.mixed(pairs) + self.mixed(corpus) + self.mixed(self.text))
        self.assert_one_error(self.mix(self.text, self.alpaca, "--turns", "last", expect=None), 2,
                              "--turns: is for conversations; the formats are text, alpaca")
        self.assert_one_error(self.mix(self.text, self.chat, "--chat", expect=None), 2, "--chat: ", "the formats are text, messages")

    def test_options_that_are_wrong_for_one_file_are_refused_with_its_name(self):
        corpus = self.write_megatron("corpus", ["xy"])
        tokens = self.write_records("tokens.jsonl", [{"input_ids": ids("abc")}])
        for files, option, words in (([self.text, self.chat], ["--long", "split"], f"the format of {self.chat} is messages"),
                                     ([self.chat, tokens], ["--train-on-inputs"], f"the format of {tokens} is tokens"),
                                     ([self.chat, corpus], ["--prompts"], f"the format of {corpus} is megatron")):
            self.assert_one_error(self.mix(*files, *option, expect=None), 2, f"error[E203] {option[0]}: ", words)
        self.assertEqual(self.mixed(self.text, corpus, "--long", "split", "--seq-len", "3")[-3:],
                         ["t⟦he ⟧", "3⟦<|im_end|>⟧", "x⟦y⟧"])

    def test_keys_of_a_conversation_beside_a_text_are_named(self):
        text = self.write_records("system.jsonl", [{"text": "a", "system": "s"}])
        self.assertIn("keys not used: system\n", self.mix(text, self.alpaca, "--chat").stdout)

    def test_prompts_and_previews_are_of_every_file(self):
        self.assertEqual(self.mixed(self.chat, self.text, "--prompts"),
                         self.mixed(self.chat, "--prompts") + self.mixed(self.text, "--prompts"))
        empty = self.write("empty.jsonl", "")
        for pack in ([], ["--pack"], ["--pack-by", "best-fit"]):
            shown = prep("--model", self.folder, self.chat, empty, self.text, "--preview", "1", *pack)
            self.assertEqual((shown.returncode, shown.stderr), (0, ""))
            for words in (f"=== {self.chat}: read as messages", "⟧a0<|im_end|>", f"=== {self.text}: read as text", "⟦t⟧he 0<|im_end|>"):
                self.assertIn(words, shown.stdout)
            self.assertEqual(shown.stdout.count("--- sequence 0"), 2)

    # --- weights

    def test_a_file_is_taken_as_often_as_asked_to_the_record(self):
        a, b = self.numbered("a", 40), self.numbered("b", 25)
        for times, want in (("1", {1: 40}), ("3", {3: 40}), ("0.1", {1: 4}), ("1.5", {1: 20, 2: 20}), ("2.25", {2: 30, 3: 10}),
                            ("0.001", {1: 1}), ("0.99", {1: 40}), ("1e0", {1: 40})):
            result = self.mix(a, b, "--take", f"{a}={times}")
            counted = self.counted()
            self.assertEqual(Counter(n for text, n in counted.items() if text[0] == "a"), want, times)
            self.assertEqual(Counter(n for text, n in counted.items() if text[0] == "b"), {1: 25})
            total = sum(n * many for n, many in want.items())
            self.assertIn(f'{a}: 40 records read as text, by the key "text" of line 1, taken {float(times):g} times: '
                          f"{total} document{'' if total == 1 else 's'}\n", result.stdout)
            self.assertIn(f'{b}: 25 records read as text, by the key "text" of line 1: 25 documents\n', result.stdout)

    def test_pass_follows_pass(self):
        self.assertEqual(self.mixed(self.alpaca, self.text, "--take", f"{self.text}=2"),
                         self.mixed(self.alpaca) + 2 * self.mixed(self.text))

    def test_which_records_a_part_is_of_depends_on_the_seed_and_the_file_alone(self):
        a, b = self.numbered("a", 200), self.numbered("b", 30)
        few = self.mixed(a, "--take", f"{a}=0.1")
        self.assertEqual(len(few), 20)
        self.assertEqual(self.mixed(b, a, self.chat, "--take", f"{a}=0.1", "--take", f"{b}=2")[60:80], few)
        self.assertNotEqual(self.mixed(a, "--take", f"{a}=0.1", "--seed", "1"), few)
        self.assertLess(set(few), set(self.mixed(a, "--take", f"{a}=0.2")))
        self.assertEqual(few, sorted(few))
        self.assertNotEqual(few, self.mixed(a)[:20])

    def test_all_documents_of_a_record_are_taken_together(self):
        talks = self.write_records("talks.jsonl", [{"messages": [
            turn for k in range(2) for turn in ({"role": "user", "content": f"q{i:02d}"}, {"role": "assistant", "content": f"a{k}"})]}
            for i in range(20)])
        self.mix(talks, "--turns", "each", "--take", f"{talks}=1.3")
        counted = Counter(text[17:20] for text in self.documents())
        self.assertEqual(Counter(counted.values()), {2: 14, 4: 6})

    def test_what_is_held_out_is_never_trained_on_and_is_the_same_for_any_weight(self):
        a, b = self.numbered("a", 100), self.numbered("b", 50)
        held = {}
        for times in (None, "1", "3", "0.2", "2.5"):
            take = ["--take", f"{a}={times}"] if times else []
            self.mix(a, b, *take, "--eval-out", self.path("eval.h5"), "--eval-fraction", "0.2")
            train, test = self.counted(), self.counted("eval.h5")
            self.assertEqual(set(train) & set(test), set())
            self.assertEqual(set(test.values()), {1})
            held[times] = set(test)
            of_a = sum(n for text, n in train.items() if text[0] == "a")
            kept = 100 - sum(text[0] == "a" for text in held[None])
            self.assertEqual(of_a, round(kept * float(times or 1)))
        self.assertEqual(len(held[None]), 30)
        self.assertEqual(held[None], held["1"])
        self.assertEqual(held[None], held["3"])
        self.assertEqual(held[None], held["2.5"])
        self.assertLess(held["0.2"], held[None])
        self.assertEqual({text for text in held["0.2"] if text[0] == "b"}, {text for text in held[None] if text[0] == "b"})

    def test_a_file_of_which_nothing_is_left_is_taken_no_times(self):
        long = self.write_records("long.jsonl", [{"text": "x" * 99}])
        result = self.mix(long, self.text, "--seq-len", "16", "--long", "drop", "--take", f"{long}=3")
        self.assertIn(f"{long}: 1 record read as text, by the key \"text\" of line 1, taken 3 times: 0 documents\n", result.stdout)
        self.assertEqual(self.documents(), self.mixed(self.text))

    def test_a_file_with_an_equals_sign_in_its_name(self):
        path = self.write_records("a=2.jsonl", TEXT)
        self.assertEqual(self.mixed(path, "--take", f"{path}=2"), 2 * self.mixed(self.text))

    def test_wrong_weights_are_one_line_and_code_2(self):
        a = self.text
        for given in (a, f"{a}=", f"{a}=0", f"{a}=-1", f"{a}=nan", f"{a}=inf", f"{a}=1001", f"{a}=x", "=2", f"{a}=1e-400"):
            self.assert_one_error(self.mix(a, "--take", given, expect=None), 2, "--take", "is not FILE=N with a number N above 0")
        self.assert_one_error(self.mix(a, "--take", "b.jsonl=2", expect=None), 2, "--take: b.jsonl is no DATA file",
                              f"as it stands there: {a}")
        self.assert_one_error(self.mix(a, "--take", f"{a}=2", "--take", f"{a}=3", expect=None), 2, "error[E203]", "given twice")
        for form in ("fsdp_qlora:sql", "fsdp_qlora:orca_math", "fsdp_qlora:alpaca_sample"):
            self.assert_one_error(self.mix(a, "--format", form, "--take", f"{a}=2", expect=None), 2, "--take: does not go with")
        self.assert_one_error(self.mix("--format", "fsdp_qlora:dummy", "--take", f"{a}=2", expect=None), 2, "--take: does not go with")
        self.assertFalse(os.path.exists(self.path("out.h5")))

    def test_a_file_that_is_there_twice_is_refused_where_it_would_be_trained_on_and_held_out(self):
        os.symlink(self.text, self.path("link.jsonl"))
        for again in (self.text, self.path("link.jsonl")):
            result = self.mix(self.text, again, "--eval-out", self.path("eval.h5"), "--eval-fraction", "0.2", expect=None)
            self.assert_one_error(result, 2, f"{self.text}: is there twice", "--eval-out", f"--take {self.text}=2")
        result = self.mix(self.text, self.text, "--take", f"{self.text}=2", expect=None)
        self.assert_one_error(result, 2, "is there twice, and --take does not say which")
        self.assertEqual(len(self.mixed(self.text, self.text)), 8)


if __name__ == "__main__":
    unittest.main()
