"""JSON lines: every way of being bad has its line number, and nothing bad passes."""
import unittest

from support import FolderTest, make_model, prep  # noqa: F401  (puts src/prep on the path)

from qprep import pipeline, records
from qprep.errors import PrepError
from qprep.tokens import Tokenizer
from qshard_prep import parse_options

GOOD = b'{"text": "fine"}\n'


class Records(FolderTest):
    def setUp(self):
        super().setUp()
        self.tokenizer = Tokenizer(make_model(self.folder))

    def read(self, content, form="auto", skip=False):
        """The texts of the documents, without the token that ends them."""
        return self.read_files([self.write("data.jsonl", content)], form, skip)

    def read_files(self, paths, form="auto", skip=False):
        options = parse_options(["--model", self.folder, *paths, "--preview", "1", "--format", form, "--seq-len", "4096",
                                 "--on-bad-record", "skip" if skip else "stop"])
        outcome, _ = pipeline.read_documents(options, self.tokenizer)
        self.counts = outcome.counts
        offsets, data = self.tokenizer.decode_table()
        ends = outcome.documents.lengths.cumsum()
        return [b"".join(data[offsets[t]:offsets[t + 1]].tobytes() for t in outcome.documents.tokens[end - n:end - 1])
                .decode() for end, n in zip(ends, outcome.documents.lengths)]

    def refused(self, line, expected):
        """The bad line is line 3: a good one and an empty one come first."""
        content = GOOD + b"\n" + line + b"\n" + GOOD
        with self.assertRaises(PrepError) as caught:
            self.read(content)
        self.assertEqual(caught.exception.exit_code, 3)
        self.assertIn("data.jsonl:3: ", str(caught.exception))
        self.assertIn(expected, str(caught.exception))
        self.assertEqual(len(self.read(content, skip=True)), 2)
        self.assertEqual((self.counts.bad, self.counts.empty, self.counts.records, self.counts.lines), (1, 1, 2, 4))

    def test_bytes_that_are_no_utf8_are_refused_with_their_place(self):
        self.refused(b'{"text": "\xff"}', "not UTF-8 at byte 11 (0xff)")

    def test_nul_bytes_are_refused(self):
        self.refused(b'{"text": "a\0b"}', "NUL at byte 12")

    def test_escaped_nul_is_refused(self):
        self.refused(rb'{"text": "a\u0000b"}', "NUL character")

    def test_half_a_surrogate_pair_is_refused(self):
        self.refused(rb'{"text": "a\ud800b"}', "surrogate pair (character 2)")

    def test_broken_json_is_refused_with_its_column(self):
        self.refused(b'{"text": "a"', "column 13")

    def test_duplicate_keys_are_refused(self):
        self.refused(b'{"text": "a", "text": "b"}', 'key "text" appears twice')

    def test_nan_is_refused(self):
        self.refused(b'{"text": "a", "score": NaN}', "NaN is not JSON")

    def test_deep_nesting_is_refused_without_recursion(self):
        self.refused(b'{"text": "a", "x": ' + b"[" * 100000 + b"]" * 100000 + b"}", "nested deeper than 64")

    def test_brackets_inside_strings_are_not_nesting(self):
        self.assertEqual(len(self.read(b'{"text": "' + b"[{" * 100 + b'\\""}\n')), 1)

    def test_a_value_that_is_no_object_is_refused(self):
        self.refused(b'"just text"', "JSON string, not an object")

    def test_a_json_array_names_the_way_to_convert_it(self):
        self.refused(b'[{"text": "a"}]', "jq -c")

    def test_missing_fields_are_named(self):
        self.refused(b'{"words": "a"}', 'the field "text" is missing')
        with self.assertRaisesRegex(PrepError, 'data.jsonl:1: no format has the keys "words"'):
            self.read(b'{"words": "a"}')
        with self.assertRaisesRegex(PrepError, 'data.jsonl:1: the field "output" is missing'):
            self.read(b'{"instruction": "a"}')

    def test_mistyped_fields_are_named(self):
        self.refused(b'{"text": 5}', 'the field "text" is a JSON number')

    def test_unknown_roles_are_named(self):
        with self.assertRaisesRegex(PrepError, 'role is "human", must be one of system, user'):
            self.read(b'{"messages": [{"role": "human", "content": "a"}]}')

    def test_kinds_of_records_are_not_mixed(self):
        self.refused(b'{"instruction": "a", "output": "b"}', 'the field "text" is missing')

    def test_too_long_a_line_is_refused_and_the_next_one_read(self):
        self.addCleanup(setattr, records, "LINE_LIMIT_BYTES", records.LINE_LIMIT_BYTES)
        records.LINE_LIMIT_BYTES = 64
        self.refused(b'{"text": "' + b"a" * 200 + b'"}', "longer than 0 MiB")

    def test_mark_crlf_and_missing_last_newline_are_accepted(self):
        got = self.read(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
        self.assertEqual(got, ["a", "b"])
        self.assertEqual(self.counts.empty, 1)

    def test_a_file_that_is_not_there_is_an_input_error(self):
        with self.assertRaises(PrepError) as caught:
            self.read_files([self.path("none")])
        self.assertEqual(caught.exception.code, 300)

    def test_line_numbers_count_from_one_in_every_file(self):
        first, second = self.write("a", GOOD * 5), self.write("b", b"bad\n")
        with self.assertRaisesRegex(PrepError, "/b:1: "):
            self.read_files([first, second])


if __name__ == "__main__":
    unittest.main()
