"""The formats of records: what each becomes, what of it is learned, and what the options change."""
import hashlib
import json
import unittest

import numpy as np
from support import CHATML, END, FolderTest, ids, make_model, tool

from test_template import QWEN

from qprep import packing
from qprep.formats import ALL_FORMATS

CHATML_Q = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def turn(question, answer):
    return CHATML_Q.format(question) + f"⟦{answer}<|im_end|>⟧\n"


def talk(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


class Formats(FolderTest):
    def setUp(self):
        super().setUp()
        make_model(self.folder)

    # --- conversations

    def test_sharegpt_in_its_spellings(self):
        system = "<|im_start|>system\ns<|im_end|>\n"
        for record, want in (
            ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, turn("q", "a")),
            ({"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}], "system": ""},
             turn("q", "a")),
            ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
             system + turn("q", "a")),
            ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"},
                                {"from": "chatgpt", "value": "a"}], "id": "x"}, system + turn("q", "a")),
            ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, turn("q", "a")),
            ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0},
                                {"from": "human", "value": "r"}, {"from": "gpt", "value": "b", "weight": 1}]},
             CHATML_Q.format("q") + "a<|im_end|>\n" + turn("r", "b")),
            ({"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "o"},
                                {"from": "gpt", "value": "a"}]},
             "<|im_start|>user\nq<|im_end|>\n<|im_start|>tool\no<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"),
        ):
            self.assertEqual(self.prepared([record]), [want])

    def test_a_system_text_beside_a_conversation_stands_first(self):
        system = "<|im_start|>system\ns<|im_end|>\n"
        plain = talk("q", "a")["messages"]
        pair = {"prompt": "q", "completion": "a"}
        for record, *options in (
            ({"messages": plain, "system": "s"},), ({"messages": plain, "system_prompt": "s"},),
            ({"messages": plain, "system_prompt": "s", "system": "s"},), ({"messages": plain, "system_prompt": "s", "system": ""},),
            ({"messages": [{"role": "system", "content": "s"}, *plain], "system": "s"},),
            ({"messages": [{"role": "system", "content": "s"}, *plain], "system": None},),
            ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system_prompt": "s"},),
            ({**pair, "system": "s"}, "--chat"), ({**pair, "system_prompt": "s"}, "--chat"),
            ({"prompt": plain[:1], "completion": plain[1:], "system": "s"},),
            ({"instruction": "q", "output": "a", "system": "s"}, "--chat"),
            ({"system_prompt": "s", "question": "q", "response": "a"}, "--rename", "question=prompt", "--chat"),
        ):
            self.assertEqual(self.prepared([record], *options), [system + turn("q", "a")], record)
        self.assertEqual(self.prepared([{**pair, "system": "s"}], "--chat", "--prompts"), [system + CHATML_Q.format("q")])

    def test_variables_of_a_record_reach_the_template(self):
        template = "{{ word }}{% for m in messages %}{{ m.content }}{% endfor %}"
        options = ["--chat-template", self.write("t.jinja", template), "--template-arg", "word=oh"]
        records = [talk("q", "a"), {**talk("q", "a"), "chat_template_kwargs": {"word": "my", "other": 1}},
                   {**talk("q", "a"), "chat_template_kwargs": {}}, {**talk("q", "a"), "chat_template_kwargs": None}]
        self.assertEqual(self.prepared(records, *options),
                         ["ohq⟦a<|im_end|>⟧", "myq⟦a<|im_end|>⟧", "ohq⟦a<|im_end|>⟧", "ohq⟦a<|im_end|>⟧"])
        # the same text, of which another part is the prompt
        records[1]["chat_template_kwargs"] = {"enable_thinking": False}
        head, none = CHATML_Q.format("q"), "<think>\n\n</think>\n\n"
        self.assertEqual(self.prepared(records[:3], "--chat-template", self.write("t.jinja", QWEN)),
                         [f"{head}⟦{none}a<|im_end|>⟧\n", f"{head}{none}⟦a<|im_end|>⟧\n", f"{head}⟦{none}a<|im_end|>⟧\n"])

    def test_keys_that_are_left_alone_are_named_once(self):
        for records, options, named in (
            ([{**talk("q", "a"), "source": 1, "id": 2}, {**talk("q", "a"), "score": 1, "id": 3}], [], "id, score, source"),
            ([{"conversations": [{"from": "human", "value": "q", "lang": "en"}, {"from": "gpt", "value": "a", "weight": 1}]}], [],
             "conversations[].lang"),
            ([{"prompt": "q", "completion": "a", "tools": [{"name": "f"}]}], [], "tools"),
            ([{"messages": [{"role": "user", "content": "q", "name": "Ann", "id": None},
                            {"role": "assistant", "content": "a", "reasoning_content": "r", "weight": 1, "calls": []}]}], [],
             "messages[].name, messages[].reasoning_content"),
            ([{"text": "ab", "system": "s"}], [], "system"),
            ([{"input_ids": ids("ab"), "token_type_ids": [0, 0], "labels": None}], [], "token_type_ids"),
            ([{"text": "q### Assistant: a", "x\n": 1}], ["--format", "fsdp_qlora:guanaco"], "x\\n"),
            ([{"text": "ab", **{f"k{i:02d}": 0 for i in range(30)}}], [], ", ".join(f"k{i:02d}" for i in range(20)) + " and 10 more"),
            ([{"question": "q", "completion": "a", "n": 1}], ["--rename", "question=prompt", "--jobs", "2"], "n"),
        ):
            out = self.prep(records, "--overwrite", *options).stdout.splitlines()
            self.assertEqual([line for line in out if "not used" in line], [f"keys not used: {named}"])
        for record, *options in (
            ({**talk("q", "a"), "tools": [], "system": "", "system_prompt": None, "chat_template_kwargs": {}},),
            ({"instruction": "q", "input": "", "output": "a", "history": [], "tools": None}, "--chat"),
            ({"prompt": talk("q", "a")["messages"][:1], "completion": talk("q", "a")["messages"][1:], "tools": None},),
            ({"messages": [*talk("q", "a")["messages"][:1], {"role": "assistant", "content": "a", "reasoning_content": "r"}]},
             "--chat-template", self.write("t.jinja", QWEN)),
            ({"input_ids": ids("ab"), "labels": None, "attention_mask": [1, 1], "loss_mask": [1, 1], "position_ids": [0, 1]},),
        ):
            self.assertNotIn("not used", self.prep([record], "--overwrite", *options).stdout)

    def test_an_assistants_opening_turn_is_not_learned_and_counted(self):
        hello = {"role": "assistant", "content": "Hi"}
        opening = "<|im_start|>assistant\nHi<|im_end|>\n"
        # as SmolLM2's does, with a system text of its own where there are messages; and one that looks at the first message
        own = CHATML.replace("{% for m in messages %}", "{% for m in messages %}{% if loop.first %}S{% endif %}")
        first = "{{ messages[0].role[:0] }}" + CHATML
        for template, head in ((CHATML, ""), (own, "S"), (first, "")):
            options = ["--chat-template", self.write("t.jinja", template)]
            records = [{"messages": [hello, *talk("q", "a")["messages"]]}] * 2 + [talk("q", "a")]
            result = self.prep(records, "--overwrite", *options)
            self.assertEqual(self.documents(), [head + opening + turn("q", "a")] * 2 + [head + turn("q", "a")])
            self.assertIn(": 2 opening assistant turns not learned\n", result.stdout)
            self.assertEqual(self.prepared(records[:1], "--turns", "each", *options), [head + opening + turn("q", "a")])
        result = self.prep([{"messages": [hello]}], "--overwrite", expect=None)
        self.assert_one_error(result, 3, "the assistant's messages have nothing before them")
        spoken = [{"messages": [{**hello, "train": False}, *talk("q", "a")["messages"]]}]
        self.assertNotIn("opening", self.prep(spoken, "--overwrite").stdout)
        self.assertEqual(self.prepared([records[0]], "--prompts"), [opening + CHATML_Q.format("q")])

    def test_a_template_that_refuses_an_opening_turn_says_what_to_do(self):
        template = self.write("t.jinja", "{% if messages[0].role != 'user' %}{{ raise_exception('must alternate') }}{% endif %}" + CHATML)
        records = [{"messages": [{"role": "assistant", "content": "Hi"}, *talk("q", "a")["messages"]]}, talk("q", "a")]
        result = self.prep(records, "--chat-template", template, expect=None)
        self.assert_one_error(result, 3, "data.jsonl:1:", "must alternate", "put a user's before it", "--on-bad-record=skip")
        self.assertEqual(self.prepared(records, "--chat-template", template, "--on-bad-record=skip"), [turn("q", "a")])

    def test_renamed_keys_are_read_as_the_formats_own(self):
        names = ("--rename", "question=prompt", "--rename", "answer=completion", "--rename", "prompt=id")
        record = {"question": "q", "answer": "a", "prompt": "of something else"}
        self.assertEqual(self.prepared([record], *names), ["q⟦a<|im_end|>⟧"])
        self.assertEqual(self.prepared([record, {"question": "r", "answer": "b"}], *names, "--chat"),
                         [turn("q", "a"), turn("r", "b")])
        self.assertEqual(self.prepared([record], *names, "--format", "completion", "--prompts"), ["q"])

    def test_sharegpt_and_messages_give_the_same(self):
        one = self.prepared([talk("q", "a"), talk("é", "日")])
        other = self.prepared([{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
                               for q, a in (("q", "a"), ("é", "日"))])
        self.assertEqual(one, other)

    def test_calls_of_tools_reach_the_template_with_arguments_as_objects(self):
        template = self.write("t.jinja", "{{ tools | tojson }}{% for m in messages %}|{% if m.tool_calls %}{% for c in "
                              "m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% else %}"
                              "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}|{% endif %}")
        call = {"type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
        tools = [{"name": "f"}]
        user = {"role": "user", "content": "q"}
        records = [{"messages": [user, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": tools}]
        want = ['[{"name": "f"}]|q|⟦f{"x": [1]}<|im_end|>⟧']
        self.assertEqual(self.prepared(records, "--chat-template", template), want)
        records = [{"conversations": [{"from": "human", "value": "q"},
                                      {"from": "function_call", "value": '{"name": "f", "arguments": {"x": [1]}}'}],
                    "tools": json.dumps(tools)}]
        self.assertEqual(self.prepared(records, "--chat-template", template), want)

    def test_content_in_parts_of_text_is_joined(self):
        record = talk("q", "a")
        record["messages"][0]["content"] = [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]
        self.assertEqual(self.prepared([record]), [turn("q!", "a")])

    def test_roles_and_turns_to_learn(self):
        record = {"messages": talk("q", "a")["messages"] + talk("r", "b")["messages"]}
        user = "<|im_start|>user\n⟦{}<|im_end|>⟧\n<|im_start|>assistant\n{}<|im_end|>\n"
        self.assertEqual(self.prepared([record], "--train-roles", "user"), [user.format("q", "a") + user.format("r", "b")])
        self.assertEqual(self.prepared([record], "--turns", "last"),
                         [CHATML_Q.format("q") + "a<|im_end|>\n" + turn("r", "b")])
        self.assertEqual(self.prepared([record], "--turns", "each"),
                         [turn("q", "a"), CHATML_Q.format("q") + "a<|im_end|>\n" + turn("r", "b")])

    def test_a_template_that_rewrites_gives_a_document_a_turn_and_says_so(self):
        template = self.write("t.jinja", "{% for m in messages %}{% if m.role == 'user' %}({{ m.content }}){% elif loop.last %}"
                              "think {{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}")
        record = {"messages": talk("q", "a")["messages"] + talk("r", "b")["messages"]}
        result = self.prep([record, talk("q", "c")], "--chat-template", template, "--eos", "never")
        self.assertEqual(self.documents(), ["(q)⟦think a⟧", "(q)a(r)⟦think b⟧", "(q)⟦think c⟧"])
        self.assertIn("1 separated into turns", result.stdout)
        self.assert_one_error(self.prep([record], "--chat-template", template, "--turns", "all", "--overwrite", expect=None),
                              3, "data.jsonl:1:", "--turns each")

    def test_all_documents_of_a_record_are_held_out_together(self):
        records = [{"messages": talk(f"q{i}", "a")["messages"] + talk("r", f"b{i}")["messages"]} for i in range(20)]
        self.prep(records, "--turns", "each", "--eval-out", self.path("eval.h5"), "--eval-fraction", "0.3")
        kept, held = self.documents(), self.documents("eval.h5")
        self.assertEqual((len(kept), len(held)), (28, 12))
        of = [{text.split("q")[1].split("<")[0] for text in part} for part in (kept, held)]
        self.assertEqual(of[0] & of[1], set())

    # --- pairs

    def test_alpaca_in_its_spellings(self):
        head = "Below is an instruction that describes a task"
        tail = ". Write a response that appropriately completes the request.\n\n### Instruction:\nDo\n\n"
        plain = head + tail + "### Response:⟦so<|im_end|>⟧"
        given = head + ", paired with an input that provides further context" + tail + "### Input:\nx\n\n" \
            "### Response:⟦so<|im_end|>⟧"
        for record, want in (
            ({"instruction": "Do", "output": "so"}, plain),
            ({"instruction": "Do", "input": "", "output": "so", "system": "", "history": []}, plain),
            ({"instruction": "Do", "input": None, "output": "so"}, plain),
            ({"instruction": "Do", "input": "x", "output": "so"}, given),
            ({"instruction": "Do", "context": "x", "response": "so", "category": "open"}, given),
            ({"instruction": "Do", "context": "", "response": "so"}, plain),
        ):
            self.assertEqual(self.prepared([record]), [want])

    def test_completion_learns_the_completion(self):
        self.assertEqual(self.prepared([{"prompt": "2+2=", "completion": " 4"}, {"prompt": "on", "response": "ex"}]),
                         ["2+2=⟦ 4<|im_end|>⟧", "on⟦ex<|im_end|>⟧"])

    def test_completion_of_messages_learns_the_completions_turns_alone(self):
        user, other = talk("q", "a")["messages"]
        record = {"prompt": [user, other, {"role": "user", "content": "r"}],
                  "completion": [{"role": "assistant", "content": "b"}]}
        self.assertEqual(self.prepared([record]), [CHATML_Q.format("q") + "a<|im_end|>\n" + turn("r", "b")])
        self.prep([record], "--prompts", "--overwrite")
        self.assertEqual(self.documents(), [CHATML_Q.format("q") + "a<|im_end|>\n" + CHATML_Q.format("r")])

    def test_chat_writes_pairs_with_the_template(self):
        self.assertEqual(self.prepared([{"instruction": "q", "output": "a"}], "--chat"), [turn("q", "a")])
        self.assertEqual(self.prepared([{"instruction": "q", "input": "x", "output": "a"}], "--chat"), [turn("q\n\nx", "a")])
        self.assertEqual(self.prepared([{"prompt": "q", "completion": "a"}], "--chat"), [turn("q", "a")])
        attributes = self.load()[1]
        self.assertNotEqual(attributes["template_sha256"], "")
        self.assertEqual(attributes["template_sha256"], hashlib.sha256(attributes["chat_template"].encode()).hexdigest())

    def test_the_template_that_shaped_the_data_is_kept(self):
        other = "{% for m in messages %}é{{ m.content }}<|im_end|>\r\n{% endfor %}"
        path = self.write("other.jinja", other)
        for records, options, want in (
            ([talk("q", "a")], ["--chat-template", path], other),
            ([talk("q", "a")], ["--chat-template", path, "--prompts"], other),
            ([{"prompt": "q", "completion": "a"}], ["--chat-template", path, "--chat"], other),
            ([{"text": "ab"}], [], None),
            ([{"input_ids": ids("ab")}], [], None),
        ):
            self.prep(records, *options, "--overwrite")
            self.assertEqual(self.load()[1].get("chat_template"), want, (records, options))
        many = [talk(f"q{i}", "a") for i in range(3000)]  # in several processes, and the records held out likewise
        result = tool("qshard_prep.py", "--model", self.folder, self.write_records("many.jsonl", many), "--chat-template", path,
                      "--jobs", "2", "--overwrite", "-o", self.path("out.h5"), "--eval-out", self.path("eval.h5"),
                      "--eval-fraction", "0.1")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(self.load()[1]["chat_template"], other)
        self.assertEqual(self.load("eval.h5")[1]["chat_template"], other)

    def test_a_template_that_no_file_can_keep_is_refused(self):
        for text, code, what in (("{{ messages[0].content }}\0", 301, "NUL"),
                                 ("{# " + "x" * (256 << 10) + " #}{{ messages[0].content }}", 302, "at most 262144")):
            path = self.write("other.jinja", text)
            result = self.prep([talk("q", "a")], "--chat-template", path, expect=None)
            self.assert_one_error(result, 3, f"error[E{code}]", "other.jinja", what)

    # --- what is learned besides

    def test_train_on_inputs_learns_everything_but_the_first_token(self):
        self.assertEqual(self.prepared([talk("q", "a")], "--train-on-inputs"),
                         ["<|im_start|>⟦user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n⟧"])
        self.assertEqual(self.prepared([{"prompt": "xy", "completion": "z"}], "--train-on-inputs"), ["x⟦yz<|im_end|>⟧"])

    def test_eos_rules(self):
        open_ended = self.write("open.jinja", "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
                                "{% if add_generation_prompt %}[assistant]{% endif %}")
        chat, opened = [talk("q", "a")], ["--chat-template", open_ended]
        for records, options, want in (
            (chat, [], turn("q", "a")),
            (chat, ["--eos", "never"], turn("q", "a")),
            (chat, ["--eos", "always"], turn("q", "a")),
            (chat, opened, "[user]q[assistant]⟦a<|im_end|>⟧"),
            (chat, [*opened, "--eos", "always"], "[user]q[assistant]⟦a<|im_end|>⟧"),
            (chat, [*opened, "--eos", "never"], "[user]q[assistant]⟦a⟧"),
            ([{"text": "ab"}], [], "a⟦b<|im_end|>⟧"),
            ([{"text": "ab"}], ["--eos", "never"], "a⟦b⟧"),
            ([{"text": "ab<|im_end|>"}], [], "a⟦b<|im_end|>⟧"),
            ([{"text": "ab<|im_end|>"}], ["--eos", "always"], "a⟦b<|im_end|>⟧"),
            ([{"prompt": "a", "completion": "b"}], ["--eos", "never"], "a⟦b⟧"),
            ([{"input_ids": ids("ab")}], [], "a⟦b⟧"),
            ([{"input_ids": ids("ab")}], ["--eos", "always"], "a⟦b<|im_end|>⟧"),
            ([{"input_ids": ids("ab") + [END]}], ["--eos", "always"], "a⟦b<|im_end|>⟧"),
        ):
            self.assertEqual(self.prepared(records, *options), [want], (records, options))

    def test_a_template_that_closes_turns_with_another_special_token_gets_no_second_end(self):
        template = self.write("t.jinja", "{% for m in messages %}{{ m.content + '<|endoftext|>\n' }}{% endfor %}")
        self.assertEqual(self.prepared([talk("q", "a")], "--chat-template", template), ["q<|endoftext|>\n⟦a<|endoftext|>⟧\n"])
        self.assertEqual(self.prepared([talk("q", "a")], "--chat-template", template, "--eos", "always"),
                         ["q<|endoftext|>\n⟦a<|endoftext|>⟧\n⟦<|im_end|>⟧"])

    def test_an_end_that_is_no_special_token_closes_a_turn_all_the_same(self):
        with open(self.path("tokenizer.json"), encoding="utf-8") as file:
            tokenizer = json.load(file)
        tokenizer["added_tokens"][END]["special"] = False
        self.write("tokenizer.json", json.dumps(tokenizer))
        self.assertEqual(self.prepared([talk("q", "a")]), [turn("q", "a")])

    def test_tokens_that_special_tokens_map_names_reach_the_template_and_end_documents(self):
        """As with transformers: the file is read where tokenizer_config.json has no added_tokens_decoder."""
        template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
        names = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "pad_token": None}
        self.write("special_tokens_map.json", json.dumps(names))
        with open(self.path("config.json"), encoding="utf-8") as file:
            self.assertNotIn("eos_token_id", json.load(file))
        for config in ({}, {"bos_token": None, "eos_token": "<|endoftext|>"}):
            self.write("tokenizer_config.json", json.dumps({"chat_template": template, **config}))
            self.assertEqual(self.prepared([talk("q", "a")]), ["<|im_start|>q<|im_end|>⟦a<|im_end|>⟧"])
            self.assertEqual(self.prepared([{"text": "ab"}]), ["a⟦b<|im_end|>⟧"])
        config = {"chat_template": template, "eos_token": "<|endoftext|>", "added_tokens_decoder": {}}
        self.write("tokenizer_config.json", json.dumps(config))
        self.assertEqual(self.prepared([talk("q", "a")]), ["q<|endoftext|>⟦a<|endoftext|>⟧"])

    def test_eos_is_needed_only_where_it_is_written(self):
        config = json.dumps({"chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"})
        self.write("tokenizer_config.json", config)
        self.prep([talk("a", "b")])
        self.assert_one_error(self.prep([{"text": "ab"}], "--overwrite", expect=None), 3, "eos_token", "--eos never")
        self.assertEqual(self.prepared([{"text": "ab"}], "--eos", "never"), ["a⟦b⟧"])

    def test_a_template_argument_reaches_the_template(self):
        template = self.write("t.jinja", "{{ word }}{% if flag %}!{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}")
        options = ["--chat-template", template, "--template-arg", "word=oh", "--template-arg", "flag=true"]
        self.assertEqual(self.prepared([talk("q", "a")], *options), ["oh!q⟦a<|im_end|>⟧"])

    # --- tokens

    def test_tokens_learn_what_labels_and_masks_say(self):
        abc = ids("abcd")
        for extra, want in (
            ({}, "a⟦bcd⟧"),
            ({"labels": [-100, -100, *abc[2:]]}, "ab⟦cd⟧"),
            ({"labels": [*abc[:2], -100, abc[3]]}, "a⟦b⟧c⟦d⟧"),
            ({"loss_mask": [0, 0, 1, 1]}, "ab⟦cd⟧"),
            ({"completion_mask": [False, False, False, True]}, "abc⟦d⟧"),
            ({"labels": [-100, *abc[1:]], "assistant_masks": [1, 1, 0, 1]}, "a⟦b⟧c⟦d⟧"),
            ({"attention_mask": [1, 1, 1, 0]}, "a⟦bc⟧"),
            ({"attention_mask": [0, 1, 1, 1], "labels": [-100, -100, *abc[2:]]}, "b⟦cd⟧"),
            ({"labels": None, "attention_mask": None, "words": "ignored"}, "a⟦bcd⟧"),
        ):
            self.assertEqual(self.prepared([{"input_ids": abc, **extra}]), [want], extra)

    def test_position_ids_that_begin_anew_are_borders_of_documents(self):
        record = {"input_ids": ids("abcde"), "position_ids": [0, 1, 0, 1, 2]}
        self.assertEqual(self.prepared([record]), ["a⟦b⟧", "c⟦de⟧"])
        self.assertEqual(self.prepared([record], "--pack"), ["a⟦b⟧", "c⟦de⟧"])

    def test_tokens_of_a_prepared_text_give_the_same_file(self):
        self.prep([{"text": "the end"}, {"text": "é"}])
        first, _ = self.load()
        records = [{"input_ids": ids(text) + [END]} for text in ("the end", "é")]
        self.prep(records, "--overwrite")
        for name, values in self.load()[0].items():
            np.testing.assert_array_equal(values, first[name], name)

    def test_prompts_of_tokens_end_before_what_is_learned(self):
        self.prep([{"input_ids": ids("abcd"), "labels": [-100, -100, *ids("cd")]}, {"input_ids": ids("xy")}], "--prompts")
        self.assertEqual(self.documents(), ["ab", "xy"])

    # --- arrays and detection

    def test_a_json_array_is_read_as_lines_are(self):
        records = [talk("q", "a"), talk("é [", "]")]
        want = self.prepared(records)
        for indent in (None, 1):
            path = self.write("a.json", json.dumps(records, indent=indent))
            self.assertEqual(self.prepared(path), want)
        self.assertEqual(self.prepared(self.write("b.json", b"\xef\xbb\xbf [\r\n" + json.dumps(records[0]).encode() + b"]")), want[:1])

    def test_the_format_is_told_and_said(self):
        for record, form, key in (
            (talk("q", "a"), "messages", "messages"),
            ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", "conversations"),
            ({"instruction": "q", "output": "a"}, "alpaca", "instruction"),
            ({"prompt": "q", "completion": "a"}, "completion", "prompt"),
            ({"text": "ab"}, "text", "text"),
            ({"input_ids": [7, 8], "text": "not this"}, "tokens", "input_ids"),
        ):
            path = self.write("d.jsonl", "\n" + json.dumps(record) + "\n")
            result = self.prep(path, "--overwrite")
            self.assertIn(f'd.jsonl: read as {form}, by the key "{key}" of line 2; --format names another\n', result.stdout)
            self.assertNotIn("read as", self.prep(path, "--overwrite", "--format", form).stdout)

    # --- packing

    def test_best_fit_packs_tighter_keeps_borders_and_is_deterministic(self):
        lengths = [3, 6, 5, 9, 2, 2, 10]  # with the end token 4 7 6 10 3 3 11
        records = [{"text": chr(97 + i) * n} for i, n in enumerate(lengths)]
        result = self.prep(records, "--pack-by", "best-fit", "--seq-len", "11")
        data, attributes = self.load()
        self.assertEqual(attributes["packed"], 1)
        self.assertEqual(np.diff(data["seq_offsets"]).tolist(), [11, 9, 10, 3, 11])
        self.assertEqual(np.diff(data["doc_offsets"]).tolist(), [4, 7, 6, 3, 10, 3, 11])
        self.assertEqual(data["seq_targets"].tolist(), [9, 7, 9, 2, 10])
        self.assertTrue((data["labels"][data["doc_offsets"][:-1]] == -100).all())
        self.assertIn("80% full", result.stdout)
        with open(self.path("out.h5"), "rb") as file:
            first = file.read()
        self.prep(records, "--pack-by", "best-fit", "--seq-len", "11", "--overwrite")
        with open(self.path("out.h5"), "rb") as file:
            self.assertEqual(file.read(), first)

    def test_every_packing_holds_every_document_once_and_no_sequence_is_too_long(self):
        rng = np.random.default_rng(3)
        for trial in range(60):
            limit = int(rng.integers(2, 40))
            lengths = rng.integers(1, limit + 1, rng.integers(1, 80))
            count = {}
            for method in packing.METHODS:
                order, counts = packing.packed(lengths, limit, method)
                self.assertEqual(sorted(order.tolist()), list(range(len(lengths))))
                self.assertEqual(counts.sum(), len(lengths))
                sums = [sum(part) for part in np.split(lengths[order], np.cumsum(counts)[:-1])]
                self.assertLessEqual(max(sums), limit)
                count[method] = len(counts)
            best = -(-int(lengths.sum()) // limit)
            self.assertLessEqual(count["best-fit"], 11 * best / 9 + 6 / 9 + 1, trial)  # the bound of best-fit decreasing
            self.assertLessEqual(count["best-fit"], count["order"])

    # --- several processes

    def test_any_number_of_processes_gives_the_same_bytes_and_the_first_error(self):
        records = [talk(f"question {i} the", "he " * (i % 7)) for i in range(3000)]
        self.prep(records, "--jobs", "1")
        with open(self.path("out.h5"), "rb") as file:
            first = file.read()
        self.prep(records, "--jobs", "2", "--overwrite")
        with open(self.path("out.h5"), "rb") as file:
            self.assertEqual(file.read(), first)
        records[1500] = {"messages": 1}
        records[2900] = {"messages": 2}
        self.assert_one_error(self.prep(records, "--jobs", "2", "--overwrite", expect=None), 3, "data.jsonl:1501:")

    def test_help_names_every_format(self):
        result = tool("qshard_prep.py", "--help")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        for form in ALL_FORMATS:
            self.assertIn(form.replace("fsdp_qlora:", ":" if "alpaca" not in form else ""), result.stdout)


if __name__ == "__main__":
    unittest.main()
