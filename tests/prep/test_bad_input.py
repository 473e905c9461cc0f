"""Bad input of every format: one line with FILE:LINE and the field, exit code 3, and no output."""
import json
import os
import unittest

from support import FolderTest, make_model, prep

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
GOOD = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [HUMAN, GPT]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "completion": {"prompt": "q", "completion": "a"},
    "text": {"text": "qa"},
    "tokens": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    "fsdp_qlora:alpaca": {"instruction": "q", "input": "", "output": "a"},
    "fsdp_qlora:guanaco": {"text": "q### Assistant: a"},
    "fsdp_qlora:orca_math": {"question": "q", "answer": "a"},
}
# Values that no text field takes.
NO_TEXT = (5, 1.5, True, ["a"], {"a": "b"})


def but(form, **changes):
    """The good record with fields changed, or left out (...)."""
    record = {**GOOD[form], **changes}
    return {key: value for key, value in record.items() if value is not ...}


def second(message, **changes):
    return {key: value for key, value in {**message, **changes}.items() if value is not ...}


def chat_cases():
    for form, key, user, role, content in (("messages", "messages", USER, "role", "content"),
                                           ("sharegpt", "conversations", HUMAN, "from", "value")):
        answer = ANSWER if form == "messages" else GPT
        yield form, but(form, **{key: ...}), f'the field "{key}" is missing; add it'
        for value in (None, [], {}, "text", 3, True):
            yield form, but(form, **{key: value}), f'"{key}" must be a list of at least one'
        for value in ("a", 7, None, ["a"], True):
            yield form, {key: [user, value]}, f"{key}[1] is a JSON"
        for value in (..., None, "narrator", "", "User", 1, {"role": "user"}, ["user"]):
            yield form, {key: [user, second(answer, **{role: value})]}, f"{key}[1]"
        for value in (None, 5, True, {"a": 1}):
            yield form, {key: [user, second(answer, **{content: value})]}, f"{key}[1].{content}"
        yield form, {key: [user, second(answer, **{content: ...})]}, "is missing"
        for value in (2, -1, "yes", [1], 0.5):
            yield form, {key: [user, second(answer, weight=value)]}, f"{key}[1].weight"
        for value in (1, "no", []):
            yield form, {key: [user, second(answer, train=value)]}, f"{key}[1].train"
        for value in ("{", "3", 3, {"a": 1}, [1], ["a"], True):
            yield form, but(form, tools=value), '"tools"'
    for value in ("f", {"name": "f"}, ["f"], [1]):
        yield "messages", {"messages": [USER, second(ANSWER, tool_calls=value)]}, "tool_calls"
    for function in (3, {}, {"name": 3}, {"name": "f", "arguments": "{"}, {"name": "f", "arguments": "[1]"},
                     {"name": "f", "arguments": 3}, {"name": "f", "arguments": '{"a": 1, "a": 2}'}):
        yield "messages", {"messages": [USER, second(ANSWER, tool_calls=[{"function": function}])]}, "tool_calls[0].function"
    for part in ({"type": "image_url"}, {"text": "a"}, "a", {"type": "text"}, {"type": "text", "text": 3}):
        yield "messages", {"messages": [second(USER, content=[part]), ANSWER]}, "messages[0].content[0]"
    yield "messages", {"messages": [HUMAN, GPT]}, "--format sharegpt"
    yield "messages", {"messages": [USER, second(ANSWER, content=None)]}, "messages[1].content"
    for value in ("no JSON", "[1]", '"f"', '{"arguments": {}}', '{"name": "f", "arguments": 1}'):
        yield "sharegpt", {"conversations": [HUMAN, {"from": "function_call", "value": value}]}, "conversations[1]"
    for value in (3, ["s"], {"a": 1}):
        yield "sharegpt", but("sharegpt", system=value), '"system"'
    yield "sharegpt", {"conversations": [{"from": "system", "value": "t"}, HUMAN, GPT], "system": "s"}, "keep one"
    told = {"role": "system", "content": "t"}
    yield "messages", {"messages": [told, USER, ANSWER], "system": "s"}, 'in "system" and another one in "messages"'
    yield "messages", {"messages": [USER, told, ANSWER], "system_prompt": "s"}, 'in "system_prompt" and another one in "messages"'
    yield "messages", but("messages", system="s", system_prompt="t"), '"system" and "system_prompt" differ'
    for value in (3, ["s"], {"a": 1}):
        yield "messages", but("messages", system_prompt=value), '"system_prompt"'
    for value in (3, "s", [1]):
        yield "messages", but("messages", chat_template_kwargs=value), '"chat_template_kwargs"'
    for key in ("messages", "tools", "add_generation_prompt", "chat_template"):
        yield "messages", but("messages", chat_template_kwargs={key: "x"}), f"chat_template_kwargs.{key}"


def text_cases():
    for form, fields in (("alpaca", ("instruction", "output")), ("completion", ("prompt", "completion")), ("text", ("text",)),
                         ("fsdp_qlora:alpaca", ("instruction", "output")), ("fsdp_qlora:guanaco", ("text",)),
                         ("fsdp_qlora:orca_math", ("question", "answer"))):
        for field in fields:
            yield form, but(form, **{field: ...}), f'"{field}" is missing'
            for value in (None, *NO_TEXT):
                if form == "completion" and isinstance(value, list):
                    continue
                yield form, but(form, **{field: value}), f'"{field}" is a JSON'
    for value in NO_TEXT:
        yield "alpaca", but("alpaca", input=value), '"input" is a JSON'
    yield "alpaca", but("alpaca", context="x", input="y"), "mean the same"
    yield "alpaca", but("alpaca", response="x"), "mean the same"
    yield "alpaca", but("alpaca", system="s"), '"system" has no place'
    yield "alpaca", but("alpaca", system_prompt="s"), '"system_prompt" has no place'
    yield "completion", but("completion", system="s"), '"system" has no place'
    yield "completion", but("completion", system_prompt="s"), "give --chat"
    yield "alpaca", but("alpaca", history=[["q", "a"]]), '"history" has no place'
    yield "completion", {"prompt": [USER], "completion": "a"}, '"completion" is a JSON string, must be a list of messages'
    yield "completion", {"prompt": "q", "completion": [ANSWER]}, '"completion" is a JSON array'
    yield "completion", {"prompt": [], "completion": [ANSWER]}, '"prompt" must be a list of at least one'
    yield "completion", {"prompt": [USER], "completion": []}, '"completion" must be a list of at least one'
    yield "completion", {"prompt": [USER], "completion": [{"role": "x", "content": "a"}]}, "completion[0]"


def token_cases():
    def tokens(**changes):
        return "tokens", but("tokens", **changes)

    for value in (..., None):
        yield *tokens(input_ids=value, labels=None), '"input_ids" is missing'
    yield *tokens(input_ids=[], labels=[]), '"input_ids" is empty'
    for value in ("567", {"a": 1}, 5, True):
        yield *tokens(input_ids=value), '"input_ids" is a JSON'
    for value in (5.0, "5", None, True, [5], {"a": 5}):
        yield *tokens(input_ids=[5, value, 7]), "input_ids[1] is a JSON"
    for value in (-1, 260, 2**31, 2**32 + 5, 2**64, 10**30, -(2**63)):
        yield *tokens(input_ids=[5, 6, value]), f"input_ids[2] is "
    for value in ([-100, 6], [-100, 6, 7, 8], []):
        yield *tokens(labels=value), f'"labels" has {len(value)} entries, but input_ids has 3'
    yield *tokens(labels=[6, 7, -100]), "not shifted"
    yield *tokens(labels=[-100, 6, -1]), "labels[2] is -1"
    yield *tokens(labels=[-100, 6, 10**30]), "labels holds a number of more than 64 bits"
    for value in (5.0, "5", None, False):
        yield *tokens(labels=[-100, value, 7]), "labels[1] is a JSON"
    for key in ("attention_mask", "loss_mask", "label_mask", "completion_mask", "assistant_masks", "assistant_mask"):
        yield *tokens(**{key: [1, 1]}), f'"{key}" has 2 entries'
        yield *tokens(**{key: [1, 2, 1]}), f"{key}[1] is"
        yield *tokens(**{key: [1, -1, 1]}), f"{key}[1] is"
        yield *tokens(**{key: [1, "1", 1]}), f"{key}[1] is a JSON string"
        yield *tokens(**{key: "111"}), f'"{key}" is a JSON string'
    yield *tokens(attention_mask=[0, 0, 0]), "0 everywhere"
    yield *tokens(attention_mask=[1, 0, 1]), "attention_mask[1] is 0 between ones"
    for value in ([1, 2, 3], [0, 1, 1], [0, 2, 3], [0, 1, -1], [1, 0, 1]):
        yield *tokens(position_ids=value), "position_ids must count"
    yield *tokens(position_ids=[0, 1, 10**30]), "position_ids holds a number of more than 64 bits"
    yield *tokens(position_ids=[0, 1]), '"position_ids" has 2 entries'


RAW = (  # lines that are no record of any format
    (b"{", "not JSON at column 2"),
    (b"{", "write each record on one line"),
    (b'{"text": "a"', "not JSON at column 13"),
    (b'{"text": "a"}}', "not JSON at column 14"),
    (b'{"text": "a"} {"text": "b"}', "not JSON at column 15"),
    (b"{'text': 'a'}", "not JSON at column 2"),
    (b'{"text": "a",}', "not JSON at column"),
    (b'{"text": "a\tb"}', "control character"),
    (b'{"text": "a\\x"}', "Invalid \\escape"),
    (b"text", "not JSON at column 1"),
    (b'"text"', "a JSON string, not an object"),
    (b"3", "a JSON number, not an object"),
    (b"null", "a JSON null, not an object"),
    (b"true", "a JSON boolean, not an object"),
    (b'[{"text": "a"}]', "a JSON array, not an object"),
    (b'{"text": "a", "text": "b"}', 'the key "text" appears twice'),
    (b'{"a": {"b": 1, "b": 2}, "text": "a"}', 'the key "b" appears twice'),
    (b'{"text": "a", "n": NaN}', "NaN is not JSON"),
    (b'{"text": "a", "n": -Infinity}', "Infinity is not JSON"),
    (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "thousands of digits"),
    (b'{"text": "\xff"}', "not UTF-8 at byte 11 (0xff)"),
    (b'{"text": "\xc3"}', "not UTF-8 at byte 11"),
    (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
    (b'{"text": "\xc0\x80"}', "not UTF-8"),
    (b'{"text": "a\0b"}', "NUL at byte 12"),
    (b"\0", "NUL at byte 1"),
    (rb'{"text": "a\u0000b"}', '"text" holds a NUL character'),
    (rb'{"text": "a\ud800b"}', '"text" holds half a surrogate pair (character 2)'),
    (rb'{"text": "a", "x": {"y": ["\udc00"]}}', '"x.y[0]" holds half a surrogate pair'),
    (rb'{"text": "a", "\ud800": 1}', '"a key" holds half a surrogate pair'),
    (b'{"text": "a", "x": ' + b"[" * 65 + b"]" * 65 + b"}", "nested deeper than 64"),
    (b'{"text": "a", "x": ' + b'{"a":' * 100000, "nested deeper than 64"),
)
KINDS = (  # whole files
    (b"\x1f\x8b\x08\0", "gunzip"), (b"\x28\xb5\x2f\xfd", "unzstd"), (b"\xfd7zXZ\0", "unxz"), (b"PK\x03\x04", "zip archive"),
    (b"PAR1abc", "Parquet"), (b"ARROW1", "Arrow"), (b"\xff\xff\xff\xff\x10\0\0\0", "Arrow"), (b"BZh91AY", "bunzip2"),
    (b"\x89HDF\r\n", "HDF5"), (b"\xff\xfe{\0", "UTF-16"),
    (b"\xfe\xff\0{", "UTF-16"), (b"MMIDIDX\0\0", "--format megatron"), (b"", "no usable record in 0 lines"),
    (b"\n \n\r\n", "no usable record in 3 lines (3 empty"), (b"\xef\xbb\xbf", "no usable record"),
    (b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n', ":2: ", "byte-order mark"),
    (b"[", ":1: ", "not JSON: Expecting value"), (b"[]", "no usable record in 0 lines"), (b'[{"text": "a"}', ":1: ", "comes its end"),
    (b'[{"text": "a"}\n{"text": "b"}]', ":2: ", 'comes "{'), (b'[{"text": "a"}]\n{"text": "b"}', ":1: ", "and nothing more"),
    (b'[{"text": "a"},\n]', ":2: ", "not JSON"), (b'[{"text": "a"},\n\n{"text": 3}]', ":3: ", '"text" is a JSON number'),
    (b'[{"text": "a"},\n3]', ":2: ", "a JSON number, not an object"), (b'[{"text": "a"},\n{"text": "\xff"}]', ":2: ", "not UTF-8"),
    (b'[{"text": "a", "text": "b"}]', ":1: ", "appears twice"), (b"[" * 100000, ":1: ", "nested deeper"),
    (b'[{"text": "a\\u0000"}]', ":1: ", "NUL"), (b'{"words": "a"}', ":1: ", 'no format has the keys "words"'),
    (b'{"prompt": "q", "chosen": "a", "rejected": "b"}', ":1: ", "preference pairs"), (b"{}", ":1: ", "no format has the keys"),
    (b'{"data": [{"text": "a"}]}', ":1: ", "jq -c '.[\"data\"][]'"),
    (b'[{"role": "user", "content": "a"}]', ":1: ", 'is a turn, not a conversation; write {"messages":'),
)


class BadInput(FolderTest):
    def setUp(self):
        super().setUp()
        make_model(self.folder)

    def assert_nothing_written(self):
        self.assertEqual([name for name in os.listdir(self.folder) if "out" in name or "tmp" in name], [])

    def refused(self, form, line, *words):
        """The line is the third, behind a good one and an empty one; skipped, the good ones around it are left."""
        if os.path.exists(self.path("out.h5")):
            os.unlink(self.path("out.h5"))
        good = json.dumps(GOOD[form]).encode() + b"\n"
        path = self.write("data.jsonl", good + b"\n" + line + b"\n" + good)
        self.assert_one_error(self.prep(path, "--format", form, expect=None), 3, "data.jsonl:3: ", *words)
        self.assert_nothing_written()
        result = self.prep(path, "--format", form, "--on-bad-record", "skip")
        empty = 0 if form == "fsdp_qlora:orca_math" else 1  # whose rows are chosen among those that are not empty
        self.assertIn(f"2 records of {3 + empty} lines ({empty} empty, 1 bad skipped)", result.stdout)

    def test_the_good_records_are_good(self):
        for form, record in GOOD.items():
            self.prep([record], "--format", form, "--overwrite")

    def test_records(self):
        count = 0
        for form, record, words in (*chat_cases(), *text_cases(), *token_cases()):
            with self.subTest(form=form, record=record):
                self.refused(form, json.dumps(record).encode(), words)
            count += 1
        self.assertGreater(count, 200)

    def test_lines(self):
        for line, words in RAW:
            with self.subTest(line=line[:40]):
                self.refused("text", line, words)

    def test_files(self):
        for content, *words in KINDS:
            with self.subTest(content=content[:40]):
                path = self.write("data.jsonl", content)
                self.assert_one_error(self.prep(path, expect=None), 3, "data.jsonl", *words)
                self.assert_nothing_written()

    def test_tables_and_plain_text(self):
        for name, words in (("data.csv", "is a table"), ("data.TSV", "is a table"), ("data.txt", "is plain text")):
            for content in (b"a,b\n1,2\n", b"\xef\xbb\xbf\na\tb\n"):
                self.assert_one_error(self.prep(self.write(name, content), expect=None), 3, f"{name}: {words}", "docs/data.md")
                self.assert_nothing_written()
            path = self.write(name, b'\n {"text": "a"}\n')  # what counts is what it holds
            self.prep(path, "--overwrite")
            os.unlink(self.path("out.h5"))

    def test_names_that_collide(self):
        record = {"question": "q", "prompt": "p", "completion": "c"}
        self.assert_one_error(self.prep([record], "--rename", "question=prompt", expect=None), 3, "data.jsonl:1:",
                              '"prompt" is there already; give --rename prompt=OTHER')
        for options, words in ((("a",), "OLD=NEW"), (("=b",), "OLD=NEW"), (("a=b", "a=c"), "a is given twice as OLD"),
                               (("a=c", "b=c"), "c is given twice as NEW")):
            given = [word for option in options for word in ("--rename", option)]
            self.assert_one_error(self.prep([record], *given, expect=None), 2, "--rename", words)
        self.assert_one_error(self.prep([{"words": "a"}], expect=None), 3, "--rename question=prompt")

    def test_folders_and_missing_files(self):
        self.assert_one_error(self.prep(self.folder, expect=None), 3, "is a folder")
        self.assert_one_error(self.prep(self.path("none.jsonl"), expect=None), 3, "none.jsonl", "cannot read")

    def test_templates(self):
        for source, words in (
            ("{% for %}", "not valid Jinja"), ("{{ nothing.at.all }}", "refuses the messages"), ("{{ 1 / 0 }}", "refuses the messages"),
            ("{{ messages[9].content }}", "refuses the messages"), ("{{ ''.__class__.__mro__ }}", "refuses the messages"),
            ("{{ raise_exception('only users') }}", "only users"), ("{{ messages[0].content + 1 }}", "refuses the messages"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the messages"),
            ("{% include 'x' %}", "refuses the messages"),
        ):
            with self.subTest(source):
                template = self.write("t.jinja", source)
                result = self.prep([GOOD["messages"]], "--chat-template", template, expect=None)
                self.assert_one_error(result, 3, words)
        self.assert_one_error(self.prep([GOOD["messages"]], "--chat-template", self.path("no"), expect=None), 3, "cannot read")
        self.write("t.jinja", b"\xff")
        self.assert_one_error(self.prep([GOOD["messages"]], "--chat-template", self.path("t.jinja"), expect=None), 3)

    def test_model_directories(self):
        def config(name, **changes):
            with open(self.path(name), encoding="utf-8") as file:
                self.write(name, json.dumps({**json.load(file), **changes}))

        for name, changes, words in (
            ("config.json", {"vocab_size": None}, "vocab_size"), ("config.json", {"vocab_size": -1}, "vocab_size"),
            ("config.json", {"vocab_size": 1 << 40}, "vocab_size"), ("config.json", {"vocab_size": "300"}, "vocab_size"),
            ("config.json", {"vocab_size": True}, "vocab_size"),
            ("tokenizer_config.json", {"chat_template": 3}, "chat_template"), ("tokenizer.json", {"model": {}}, "usable tokenizer"),
            ("tokenizer.json", {"decoder": None}, "decoder"), ("tokenizer.json", {"model": None}, "usable tokenizer"),
        ):
            with self.subTest(name=name, changes=changes):
                make_model(self.folder)
                config(name, **changes)
                self.assert_one_error(self.prep([GOOD["messages"]], expect=None), 3, name, words)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            for content in (b"", b"{", b"[]", b"\xff", b'{"a": ' + b"[" * 100000):
                with self.subTest(name=name, content=content[:9]):
                    make_model(self.folder)
                    self.write(name, content)
                    self.assert_one_error(self.prep([GOOD["messages"]], expect=None), 3, name)
        data = self.write_records("data.jsonl", [GOOD["text"]])
        os.mkdir(self.path("cache"))
        for name, words in (("ORG/MODEL", "No such file or directory; nothing is downloaded: name a folder with config.json and "
                             "tokenizer.json, as hf download ORG/MODEL --local-dir FOLDER makes it"),
                            (data, "is a file; name the folder"),
                            (self.path("cache"), "holds no config.json; name the folder")):
            self.assert_one_error(prep("--model", name, data, "-o", self.path("out.h5")), 3, f"{name}: {words}")
        for name in ("config.json", "tokenizer.json"):
            make_model(self.folder)
            os.unlink(self.path(name))
            self.assert_one_error(self.prep([GOOD["messages"]], expect=None), 3, name)


if __name__ == "__main__":
    unittest.main()
