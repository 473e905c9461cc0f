"""What qshard-prep says of a run beside its closing line: records left out and why, documents cut, answers that are empty."""
import json
import unittest

from support import CHATML, FolderTest, make_model, prep

GOOD = {"text": "the"}


class Reports(FolderTest):
    def setUp(self):
        super().setUp()
        make_model(self.folder)

    def skipped(self, records, *options):
        return self.prep(records, "--overwrite", "--on-bad-record=skip", *options)

    # --- bad records that are left out

    def test_each_reason_of_bad_records_is_told_once_with_the_first_line(self):
        records = [GOOD, {"text": 1}] + [GOOD] * 60 + [{"words": "a"}, {"text": 2.5}, {"words": "b"}, {"words": "c"}]
        for jobs in ("1", "2"):
            result = self.skipped(records, "--jobs", jobs)
            path = self.path("data.jsonl")
            self.assertEqual(result.stdout.splitlines()[2:], [
                "61 records of 66 lines (0 empty, 5 bad skipped)",
                f'3 records are bad and left out: the field "text" is missing; add it, or choose the format of all '
                f"records by --format NAME: text was taken from the first one ({path} line 1) (first: {path} line 63)",
                f'2 records are bad and left out: the field "text" is a JSON number, must be a string (first: {path} line 2)',
                "60 documents repeat others word for word"])

    def test_the_first_line_counts_over_batches_and_processes(self):
        records = [GOOD] * 1500 + [{"text": 1}] + [GOOD] * 1500 + [{"text": 1}, {"words": "a"}]
        for jobs in ("1", "2"):
            result = self.skipped(records, "--jobs", jobs)
            self.assertIn(f"2 records are bad and left out: the field \"text\" is a JSON number, must be a string "
                          f"(first: {self.path('data.jsonl')} line 1501)\n1 record is bad and left out: ", result.stdout)
            self.assertEqual(result.stderr, "")

    def test_reasons_that_differ_in_a_number_alone_are_one(self):
        lines = [json.dumps(GOOD)] + ['{"text": "' + "a" * n + '"' for n in range(30)]
        result = self.skipped(self.write("d.jsonl", "\n".join(lines)))
        self.assertEqual(result.stdout.count("left out"), 1)
        self.assertIn("30 records are bad and left out: not JSON at column 12: ", result.stdout)

    def test_of_many_reasons_the_commonest_ten_are_told(self):
        talk = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
        strange = [{"messages": [{"role": "x" + "y" * n, "content": "a"}]} for n in range(14)]
        result = self.skipped(talk + strange + strange[-1:])
        told = [line for line in result.stdout.splitlines() if "left out" in line]
        self.assertEqual(len(told), 11)
        self.assertRegex(told[0], f'^2 records are bad .*"x{"y" * 13}".* line 15\\)$')
        self.assertEqual(told[-1], "4 records are bad and left out for other reasons")

    def test_control_characters_of_the_data_do_not_reach_the_terminal(self):
        result = self.skipped([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
                               {"messages": [{"role": "\x1b[2J\n", "content": "a"}]}])
        self.assertNotIn("\x1b", result.stdout)
        self.assertIn('role is "\\x1b[2J\\n"', result.stdout)

    def test_more_than_a_twentieth_left_out_is_warned_of(self):
        for good, warned in ((18, "warning: 1 of 19 records (5%) are left out as bad"), (19, ""), (20, "")):
            result = self.skipped([GOOD] * good + [{"text": 1}])
            self.assertEqual(result.stderr.splitlines() != [], bool(warned), result.stderr)
            self.assertIn(warned, result.stderr)

    def test_where_nothing_is_left_the_error_says_the_reason(self):
        result = self.prep([{"words": "a"}] * 3, "--format", "text", "--on-bad-record=skip", expect=None)
        self.assert_one_error(result, 3, "no usable record in 3 lines (0 empty, 3 bad); 3 records are bad and left out: "
                              'the field "text" is missing', "data.jsonl line 1)")

    # --- records of another format than the first

    def test_a_record_of_another_format_is_told_which_record_chose_and_how_to_choose(self):
        good = {"messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
                "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
                "alpaca": {"instruction": "q", "output": "a"}, "completion": {"prompt": "q", "completion": "a"}, "text": GOOD,
                "tokens": {"input_ids": [5, 6]}}
        keys = {form: next(iter(record)) for form, record in good.items()}
        for first, record in good.items():
            for second, other in good.items():
                if first == second:
                    continue
                with self.subTest(first=first, second=second):
                    path = self.write_records("data.jsonl", [record, other])
                    chosen = (f"choose the format of all records by --format NAME: {first} was taken from the first one "
                              f"({path} line 1), and this one looks like {second}; a file of its own may have that format")
                    self.assert_one_error(self.prep(path, "--overwrite", expect=None), 3, f'data.jsonl:2: the field "{keys[first]}" is missing; '
                                          f"add it, or {chosen} (or give --on-bad-record=skip)")
                    self.assertIn(f"{chosen} (first: {path} line 2)", self.skipped(path).stdout)
                    result = self.prep(path, "--overwrite", "--format", first, expect=None)
                    self.assert_one_error(result, 3, f'data.jsonl:2: the field "{keys[first]}" is missing; add it (or give')

    def test_a_record_of_no_format_and_one_in_another_process_are_told_the_same(self):
        path = self.write_records("data.jsonl", [GOOD] * 1500 + [{"words": "a"}])
        for jobs in ("1", "2"):
            self.assert_one_error(self.prep(path, "--jobs", jobs, expect=None), 3, f'data.jsonl:1501: the field "text" is missing; '
                                  f"add it, or choose the format of all records by --format NAME: text was taken from the first one "
                                  f"({path} line 1) (or give")

    # --- answers that are empty

    def told_of_empty(self, records, *options):
        result = self.prep(records, "--overwrite", *options)
        return [line for line in result.stdout.splitlines() if "empty:" in line]

    def test_answers_without_words_are_learned_and_counted(self):
        def talk(*contents, **more):
            roles = ("user", "assistant") * len(contents)
            return {"messages": [{"role": role, "content": text, **(more if role == "assistant" else {})}
                                 for role, text in zip(roles, contents)]}

        def want(count, line):
            place = f"(first: {self.path('data.jsonl')} line {line})"
            return [f"{count} answer{' is' if count == 1 else 's are'} empty: what is learned there is to stop at once {place}"]

        records = [talk("q", "a"), talk("q", ""), talk("q", " \n", "q", "")]
        for jobs in ("1", "2"):
            self.assertEqual(self.told_of_empty(records, "--jobs", jobs), want(3, 2))
        self.assertTrue(self.documents()[1].endswith("assistant\n⟦<|im_end|>⟧\n"), self.documents()[1])
        self.assertEqual(self.told_of_empty(records, "--turns", "last"), want(2, 2))
        self.assertEqual(self.told_of_empty(records, "--train-on-inputs"), want(3, 2))
        self.assertEqual(self.told_of_empty([records[0]] * 1500 + [records[1]], "--jobs", "2"), want(1, 1501))
        for silent in (talk("", "a"), talk("q", "", weight=0), talk("q", "", train=False), talk("q", "", reasoning_content="r"),
                       {"messages": [{"role": "assistant", "content": ""}, *talk("q", "a")["messages"]]}):
            self.assertEqual(self.told_of_empty([records[0], silent]), [], silent)
        template = self.write("t.jinja", "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}" + CHATML)
        self.assertEqual(self.told_of_empty([talk("bad", ""), talk("q", "a")], "--chat-template", template, "--on-bad-record=skip"), [])
        self.assertEqual(self.told_of_empty(records, "--prompts"), [])
        self.assertEqual(self.told_of_empty(records, "--train-roles", "user"), [])

    def test_empty_outputs_are_counted_where_the_end_is_learned(self):
        for good in ({"instruction": "q", "output": "a"}, {"prompt": "q", "completion": "a"}):
            empty = {**good, list(good)[1]: ""}
            self.assertEqual(len(self.told_of_empty([good, empty])), 1)
            self.assertEqual(len(self.told_of_empty([good, empty], "--chat")), 1)
            self.assertEqual(self.told_of_empty([good, empty], "--eos", "never"), [])
            self.assertEqual(self.told_of_empty([good]), [])

    # --- documents that are there more than once

    def test_documents_that_repeat_others_are_counted_and_those_on_both_sides_warned_of(self):
        texts = [{"text": f"{i}"} for i in range(20)]
        self.assertNotIn("repeat", self.prep(texts, "--overwrite").stdout)
        for jobs in ("1", "2"):
            self.assertIn("\n1 document repeats another word for word\n", self.prep(texts + texts[:1], "--overwrite", "--jobs", jobs).stdout)
        # the same tokens of which another part is learned are another document
        masks = [{"input_ids": [5, 6, 7], "loss_mask": [1, a, b]} for a, b in ((0, 1), (1, 0), (1, 1))]
        self.assertNotIn("repeat", self.prep(masks, "--overwrite").stdout)

        apart = ("--eval-out", self.path("eval.h5"), "--eval-fraction", "0.5", "--overwrite")
        self.assertEqual(self.prep(texts, *apart).stderr, "")
        result = self.prep(texts[:1] * 20, *apart, "--take", f"{self.path('data.jsonl')}=3")
        self.assertIn("\n19 documents repeat others word for word\n", result.stdout)
        self.assertIn("warning: 10 of 10 held-out documents stand in the training part as well", result.stderr)

    # --- documents that lose their end

    def cut(self, lengths, *options):
        """What is warned of for texts of these lengths, the end-of-text token included."""
        result = self.prep([{"text": "a" * (n - 1)} for n in lengths], "--overwrite", *options)
        return result.stderr

    def test_documents_that_lose_their_end_are_warned_of_with_their_lengths(self):
        want = ("warning: documents longer than --seq-len=512 lose their end, and so the token that says where to stop: 3 of 5 "
                "(their median length 600, the longest 1801); --seq-len 1856 keeps all\n")
        for jobs in ("1", "2"):
            self.assertEqual(self.cut([600, 5, 1801, 512, 513], "--jobs", jobs), want)
        self.assertEqual(self.cut([600, 5, 1801, 512, 513], "--seq-len", "1856"), "")
        self.assertIn("3 truncated\n", self.prep([{"text": "a" * 600}] * 3, "--overwrite").stdout)

    def test_no_end_is_lost_where_documents_are_left_out_or_cut_in_pieces(self):
        for options in (("--long", "drop"), ("--long", "split"), ("--prompts",)):
            self.assertEqual(self.cut([600, 5], *options), "", options)

    def test_no_length_is_suggested_that_the_model_does_not_know(self):
        for positions, lengths, remedy in (
            (1856, [600, 1801], "; --seq-len 1856 keeps all"), (1850, [600, 1801], "; --seq-len 1850 keeps all"),
            (1801, [600, 1801], "; --seq-len 1801 keeps all"), (None, [600, 1801], "; --seq-len 1856 keeps all"),
            (1800, [600, 1801], "; --seq-len 1800 keeps all but 1, more than 1800 positions the model does not know: "
             "cut those where a part ends"),
            (512, [600, 1801], "; more than 512 positions the model does not know: cut those where a part ends")):
            make_model(self.folder, max_position_embeddings=positions)
            self.assertTrue(self.cut(lengths).endswith(remedy + "\n"), self.cut(lengths))

    def test_the_predecessors_rows_that_are_made_to_be_cut_are_not_warned_of(self):
        result = prep("--model", self.folder, "--format", "fsdp_qlora:dummy", "--samples", "2", "-o", self.path("out.h5"))
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertIn("2 truncated", result.stdout)


if __name__ == "__main__":
    unittest.main()
