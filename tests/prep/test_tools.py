"""Tools and their calls: written by the template that transformers would take, or the record is refused."""
import hashlib
import json
import os
import unittest

from support import CHATML, FolderTest, make_model

WITH_TOOLS = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}|{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ (c.function or c).name }}{{ (c.function or c).arguments | tojson }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}|{% endif %}"
)
TOOLS_ALONE = "{% if tools %}[{{ tools | tojson }}]{% endif %}" + CHATML
TOOLS = [{"type": "function", "function": {"name": "add"}}]
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]}
RESULT = {"role": "tool", "content": "add says 2"}
TALK = {"messages": [USER, CALL, RESULT, ANSWER]}
SHARED = [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'}]
CALLED = '|q|⟦add{"x": 1}⟧|add says 2|⟦a<|im_end|>⟧'


class Tools(FolderTest):
    def setUp(self):
        super().setUp()
        make_model(self.folder)

    def config(self, **changes):
        with open(self.path("tokenizer_config.json"), encoding="utf-8") as file:
            config = {**json.load(file), **changes}
        self.write("tokenizer_config.json", json.dumps(config))

    def assert_refused(self, record, *words):
        good = {"messages": [USER, ANSWER]}
        self.assert_one_error(self.prep([good, record], "--overwrite", expect=None), 3, "data.jsonl:2:", "--chat-template", *words)
        result = self.prep([good, record], "--on-bad-record=skip", "--overwrite")
        self.assertIn("1 records of 2 lines (0 empty, 1 bad skipped)", result.stdout)

    # --- what a template passes over

    def test_calls_that_the_template_does_not_write_are_refused(self):
        self.assert_refused(TALK, 'messages[1] calls "add"', "tokenizer_config.json does not write the call")
        flat = {**CALL, "tool_calls": [{"name": "add", "arguments": {}}]}
        self.assert_refused({"messages": [USER, flat]}, 'messages[1] calls "add"')
        said = {**CALL, "content": "I add."}  # the name alone is no call
        self.assert_refused({"messages": [USER, said]}, 'messages[1] calls "add"')
        self.assert_refused({"messages": [USER, {**CALL, "weight": 0}, RESULT, ANSWER]}, 'messages[1] calls "add"')

    def test_the_same_of_sharegpt(self):
        result = self.prep([{"conversations": SHARED}], expect=None)
        self.assert_one_error(result, 3, "data.jsonl:1:", 'messages[1] calls "add"')

    def test_tools_that_the_template_does_not_write_are_refused(self):
        record = {"messages": [USER, ANSWER], "tools": TOOLS}
        self.assert_refused(record, "tokenizer_config.json", 'does not write the field "tools"')
        for options in (["--prompts"], ["--train-on-inputs"]):
            self.assert_one_error(self.prep([record], *options, "--overwrite", expect=None), 3, 'does not write the field "tools"')
        record = {"prompt": "q", "completion": "a", "tools": TOOLS}
        self.assert_one_error(self.prep([record], "--chat", "--overwrite", expect=None), 3, 'does not write the field "tools"')

    def test_tools_written_without_their_calls_are_refused(self):
        self.config(chat_template=TOOLS_ALONE)
        self.assertEqual(len(self.prepared([{"messages": [USER, ANSWER], "tools": TOOLS}])), 1)
        self.assert_refused({**TALK, "tools": TOOLS}, 'messages[1] calls "add"')

    def test_one_call_of_several_that_is_dropped_is_refused(self):
        self.config(chat_template=WITH_TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"))
        two = [*CALL["tool_calls"], {"function": {"name": "sub", "arguments": {}}}]
        self.assert_refused({"messages": [USER, {**CALL, "tool_calls": two}]}, 'messages[1] calls "sub"')

    def test_a_call_that_the_template_drops_later_is_written_in_its_turn(self):
        self.config(chat_template=WITH_TOOLS.replace("m.tool_calls or []", "((m.tool_calls or []) if loop.last else [])"))
        self.assertEqual(self.prepared([TALK]), ['|q|⟦add{"x": 1}<|im_end|>⟧', "|q||add says 2|⟦a<|im_end|>⟧"])

    def test_a_template_that_cannot_do_without_tools_writes_them(self):
        self.config(chat_template="{{ tools[0].function.name.upper() }}" + WITH_TOOLS)
        self.assertEqual(self.prepared([{**TALK, "tools": TOOLS}]), ["ADD[" + json.dumps(TOOLS) + "]" + CALLED])

    def test_a_template_may_write_calls_as_escaped_json(self):
        self.config(chat_template=WITH_TOOLS.replace(".name }}", ".name | tojson(ensure_ascii=true) }}"))
        self.assertEqual(self.prepared([TALK]), [CALLED.replace("⟦add", '⟦"add"')])

    def test_the_older_function_call_is_refused(self):
        for content in ("a", None):
            record = {"messages": [USER, {**ANSWER, "content": content, "function_call": {"name": "add", "arguments": "{}"}}]}
            self.assert_one_error(self.prep([record], expect=None), 3, 'messages[1] has "function_call"', '"tool_calls"')

    # --- which template

    def test_the_template_of_the_name_tool_use_writes_records_with_tools(self):
        """As transformers: a list in tokenizer_config.json, or files; a chat_template.jinja replaces the whole list."""
        record, plain = {**TALK, "tools": TOOLS}, {"messages": [USER, ANSWER]}
        want = ["[" + json.dumps(TOOLS) + "]" + CALLED, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"]
        self.config(chat_template=[{"name": name, "template": text} for name, text in
                                   (("rag", "{{ no.thing }}"), ("default", CHATML), ("tool_use", WITH_TOOLS))])
        self.assertEqual(self.prepared([record, plain]), want)
        self.assertEqual(self.load()[1]["template_sha256"], hashlib.sha256((CHATML + WITH_TOOLS).encode()).hexdigest())
        self.assertNotIn("chat_template", self.load()[1])  # neither alone would serve the model
        for records, used in (([record], WITH_TOOLS), ([plain], CHATML)):
            self.prep(records, "--overwrite")
            self.assertEqual(self.load()[1]["template_sha256"], hashlib.sha256(used.encode()).hexdigest())
            self.assertEqual(self.load()[1].get("chat_template"), CHATML if used is CHATML else None)
        self.assert_refused(TALK, "tokenizer_config.json (default)")  # calls without tools: the default one, there as well
        self.write("chat_template.jinja", CHATML)
        self.assert_refused(record, "chat_template.jinja does not write")
        os.mkdir(self.path("additional_chat_templates"))
        self.write("additional_chat_templates/tool_use.jinja", WITH_TOOLS)
        self.config(chat_template=CHATML)
        self.assertEqual(self.prepared([record, plain]), want)
        os.unlink(self.path("chat_template.jinja"))
        self.assertEqual(self.prepared([record, plain]), want)
        own = self.write("own.jinja", TOOLS_ALONE)  # takes the place of all
        self.assert_one_error(self.prep([record], "--chat-template", own, "--overwrite", expect=None), 3, "own.jinja")

    def test_a_broken_or_lonely_template_for_tools_is_named_when_it_is_needed(self):
        plain = {"messages": [USER, ANSWER]}
        for text, words in ((3, "must be a string"), ("{% for %}", "tokenizer_config.json (tool_use): the chat template is not")):
            self.config(chat_template=[{"name": "default", "template": CHATML}, {"name": "tool_use", "template": text}])
            self.assert_one_error(self.prep([{**TALK, "tools": TOOLS}], "--overwrite", expect=None), 3, words)
        self.config(chat_template=[{"name": "tool_use", "template": WITH_TOOLS}, {"name": ["x"]}, "y"])
        self.assertEqual(len(self.prepared([{**TALK, "tools": TOOLS}])), 1)
        self.assert_one_error(self.prep([plain], "--overwrite", expect=None), 3, "for tools alone", "--chat-template FILE")


if __name__ == "__main__":
    unittest.main()
