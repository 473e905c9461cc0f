"""Chat templates: what the assistant said is found exactly, or the template is refused."""
import unittest

import support  # noqa: F401  (puts src/prep on the path)

from qprep.errors import BadRecord, PrepError
from qprep.template import ChatTemplate

ENDS = ["<|im_start|>", "<|im_end|>", "<eos>"]
TALK = [
    {"role": "user", "content": "assistant"},  # words of the frame as content must not confuse the search
    {"role": "assistant", "content": "user\n"},
    {"role": "user", "content": "user\n"},
    {"role": "assistant", "content": " two "},
]


# What Llama 3.1's template does: a system part in any case, contents trimmed, tools' calls and answers in words of its own,
# no {% generation %}.
LLAMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set told = '' %}{% endif %}"
    "{{ '<|im_start|>system\n\nToday: ' + date + '\n' + told + '<|im_end|>' }}"
    "{% for m in messages %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call only') }}{% endif %}"
    "{{ '<|im_start|>assistant\n\n' }}"
    "{{ '{\"name\": \"' + m.tool_calls[0].function.name + '\", \"parameters\": ' }}"
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}<|im_end|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>ipython\n\n' }}{{ m.content | tojson }}{{ '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)

# What Phi-3's does: no tools, and the end-of-text token behind everything, whatever the last message is.
PHI = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<eos>' }}{% endif %}"
)

# What Qwen3's does: an answer behind the last question begins with its reasoning, even an empty one; of earlier answers
# the reasoning is dropped.
QWEN = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set words = m.content %}{% set why = '' %}"
    "{% if m.reasoning_content is string %}{% set why = m.reasoning_content %}{% elif '</think>' in words %}"
    "{% set why = words.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set words = words.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or why) %}{{ '<think>\n' + why.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ words + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def shown(template, messages=TALK, tools=None, **options):
    """Documents with what is learned in brackets."""
    found = ChatTemplate(template, {"bos_token": "<s>"}, ENDS, **options).documents(messages, tools)
    texts = []
    for text, spans in found:
        for begin, end in reversed(spans):
            text = text[:begin] + "[" + text[begin:end] + "]" + text[end:]
        texts.append(text)
    return texts


def talk(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def said(template, messages=TALK):
    text, spans = ChatTemplate(template, {}, ENDS).conversation(messages)
    return [text[begin:end] for begin, end in spans]


class Template(unittest.TestCase):
    def test_assistant_turns_with_their_closing_token_and_without_what_follows_it(self):
        self.assertEqual(said(support.CHATML), ["user\n<|im_end|>", " two <|im_end|>"])

    def test_without_an_assistant_there_is_nothing_to_learn(self):
        self.assertEqual(said(support.CHATML, TALK[:1]), [])
        self.assertEqual(shown(support.CHATML, TALK[:1]), ["<|im_start|>user\nassistant<|im_end|>\n"])

    def test_a_template_that_marks_the_assistant_itself_is_believed(self):
        template = ("{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
                    "{% generation %}{{ m.content }};{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}")
        self.assertEqual(said(template), ["user\n;", " two ;"])

    def test_marks_and_prefixes_agree(self):
        marked = ("{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
                  "{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}"
                  "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}")
        a = ChatTemplate(support.CHATML, {}, ENDS).conversation(TALK)
        # trim_blocks eats a line break after a block, so the marked template writes them as expressions
        b = ChatTemplate(marked.replace("assistant\n{%", "assistant{{ '\n' }}{%").replace("%}\n{% else", "%}{{ '\n' }}"
                         "{% else"), {}, ENDS).conversation(TALK)
        self.assertEqual(a, b)

    def test_a_template_that_rewrites_earlier_turns_is_refused(self):
        template = ("{% for m in messages %}<{{ m.role }}>{% if loop.last or m.role == 'user' %}{{ m.content }}"
                    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
        with self.assertRaisesRegex(BadRecord, r"messages\[1\] differently once more follows"):
            said(template)

    def test_a_template_can_refuse_messages(self):
        with self.assertRaisesRegex(BadRecord, "only users"):
            said("{% if messages[0].role != 'user' %}{{ raise_exception('only users') }}{% endif %}", TALK[1:])

    def test_bad_jinja_is_an_input_error(self):
        with self.assertRaises(PrepError) as caught:
            said("{% for %}")
        self.assertEqual(caught.exception.exit_code, 3)

    def test_a_template_cannot_reach_python(self):
        with self.assertRaises(BadRecord):
            said("{{ ''.__class__.__mro__[1].__subclasses__() }}")

    def test_special_tokens_and_the_generation_prompt_reach_the_template(self):
        template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}",
                                {"bos_token": "<s>"}, [])
        self.assertEqual(template.prompt([{"role": "user", "content": "q"}]), "<s>q>")

    # --- templates of the kinds that the field has, whose own mask is missing or empty

    def test_a_llama_like_template_without_marks(self):
        head = "<s><|im_start|>system\n\nToday: May\n"
        date = {"variables": {"date": "May"}}
        self.assertEqual(
            shown(LLAMA, talk(" q ", " a\n", "r", "b"), **date),
            [head + "<|im_end|><|im_start|>user\n\nq<|im_end|><|im_start|>assistant\n\n[a<|im_end|>]"
             "<|im_start|>user\n\nr<|im_end|><|im_start|>assistant\n\n[b<|im_end|>]"])
        self.assertEqual(
            shown(LLAMA, [{"role": "system", "content": "be brief "}, *talk("q", "a")], **date),
            [head + "be brief<|im_end|><|im_start|>user\n\nq<|im_end|><|im_start|>assistant\n\n[a<|im_end|>]"])
        calls = [talk("q")[0],
                 {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
                 {"role": "tool", "content": "2"}, {"role": "assistant", "content": "two"}]
        self.assertEqual(
            shown(LLAMA, calls, **date),
            [head + "<|im_end|><|im_start|>user\n\nq<|im_end|><|im_start|>assistant\n\n"
             '[{"name": "f", "parameters": {"x": 1}}<|im_end|>]<|im_start|>ipython\n\n"2"<|im_end|>'
             "<|im_start|>assistant\n\n[two<|im_end|>]"])

    def test_a_qwen_like_template_gets_a_document_a_turn_as_the_model_sees_it(self):
        q, r = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
        self.assertEqual(shown(QWEN, talk("q", "a")), [q + "[<think>\n\n</think>\n\na<|im_end|>]\n"])
        first = q + "[<think>\n\n</think>\n\na<|im_end|>]\n"
        second = q + "a<|im_end|>\n" + r + "[<think>\n\n</think>\n\nb<|im_end|>]\n"
        self.assertEqual(shown(QWEN, talk("q", "a", "r", "b")), [first, second])
        self.assertEqual(shown(QWEN, talk("q", "a", "r", "b"), turns="each"), [first, second])
        self.assertEqual(shown(QWEN, talk("q", "a", "r", "b"), turns="last"), [second])
        with self.assertRaisesRegex(BadRecord, r"messages\[1\] differently once more follows.*--turns"):
            shown(QWEN, talk("q", "a", "r", "b"), turns="all")

    def test_a_token_behind_the_last_message_alone_leaves_the_conversation_whole(self):
        q, a, r = "<|im_start|>user\nq<|im_end|>\n", "<|im_start|>assistant\n[a<|im_end|>]\n", "<|im_start|>user\nr<|im_end|>\n"
        last = "<|im_start|>assistant\n[b<|im_end|>\n<eos>]"
        self.assertEqual(shown(PHI, talk("q", "a", "r", "b")), [q + a + r + last])
        self.assertEqual(shown(PHI, talk("q", "a", "r", "b"), turns="all"), [q + a + r + last])
        self.assertEqual(shown(PHI, talk("q", "a", "r")), [q + a + r + "<eos>"])
        # Where it is all that closes a turn, the earlier turns would be learned without an end.
        bare = PHI.replace("m.content + '<|im_end|>\n'", "m.content + '\n'")
        first = "<|im_start|>user\nq\n<|im_start|>assistant\n"
        self.assertEqual(shown(bare, talk("q", "a", "r", "b")),
                         [first + "[a\n<eos>]",
                          first + "a\n<|im_start|>user\nr\n<|im_start|>assistant\n[b\n<eos>]"])

    def test_reasoning_is_learned_where_it_is_shown(self):
        q, r = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
        messages = talk("q", "<think>\nhm\n</think>\n\na", "r", "b")
        messages[3]["reasoning_content"] = "well"
        self.assertEqual(
            shown(QWEN, messages),
            [q + "[<think>\nhm\n</think>\n\na<|im_end|>]\n",
             q + "a<|im_end|>\n" + r + "[<think>\nwell\n</think>\n\nb<|im_end|>]\n"])

    def test_a_variable_of_the_template_moves_the_empty_reasoning_into_the_prompt(self):
        q = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        self.assertEqual(shown(QWEN, talk("q", "a"), variables={"enable_thinking": False}), [q + "[a<|im_end|>]\n"])

    def test_marks_that_come_out_empty_do_not_leave_the_turn_unlearned(self):
        never = support.CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
        self.assertEqual(said(never), said(support.CHATML))
        some = ("{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}{% generation %}"
                "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}<assistant>{% endif %}")
        self.assertEqual(said(some), ["user\n", " two "])

    def test_a_generation_prompt_that_the_turn_does_not_begin_with_is_refused(self):
        thinking = support.CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
        self.assertNotEqual(thinking, support.CHATML)
        for turns in ("auto", "all", "each", "last"):
            with self.assertRaisesRegex(BadRecord, "generation prompt announces.*--chat-template"):
                shown(thinking, turns=turns)

    # --- who is learned

    def test_of_other_roles_the_words_and_their_closing_token_are_learned(self):
        messages = [{"role": "system", "content": "s"}, *talk("q", "a", "q", "b")]
        want = ("<|im_start|>system\n[s<|im_end|>]\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[a<|im_end|>]\n"
                "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]\n")
        self.assertEqual(shown(support.CHATML, messages, roles=("assistant", "system")), [want])
        self.assertEqual(shown(support.CHATML, talk("q", "a"), roles=("user",)),
                         ["<|im_start|>user\n[q<|im_end|>]\n<|im_start|>assistant\na<|im_end|>\n"])

    def test_a_role_whose_words_the_template_leaves_out_cannot_be_learned(self):
        silent = support.CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
        with self.assertRaisesRegex(BadRecord, r"messages\[0\].*--train-roles"):
            shown(silent, [{"role": "system", "content": "s"}, *talk("q", "a")], roles=("system",))

    def test_messages_can_say_that_they_are_not_learned(self):
        for mark in ({"weight": 0}, {"train": False}):
            messages = talk("q", "a", "r", "b")
            messages[1].update(mark)
            self.assertEqual(said_by_documents(support.CHATML, messages), ["b<|im_end|>"])
            messages[1] = {**messages[1], "weight": 1, "train": True}
            self.assertEqual(said_by_documents(support.CHATML, messages), ["a<|im_end|>", "b<|im_end|>"])

    def test_turns_last_learns_the_last_answer(self):
        self.assertEqual(said_by_documents(support.CHATML, talk("q", "a", "r", "b"), turns="last"), ["b<|im_end|>"])

    # --- plans

    def test_plans_give_what_rendering_turn_by_turn_gives(self):
        """Each conversation twice: the second time, and for others of the same roles, by the plan."""
        texts = ["q", "", " a\n", "<|im_end|>", "<think>\nx\n</think>\n\ny", "\ue0000\ue001", "</think>", "é日", "x" * 50]
        for template in (support.CHATML, LLAMA, QWEN):
            for options in ({}, {"turns": "each"}, {"turns": "last"}, {"roles": ("user", "assistant")}):
                planning = ChatTemplate(template, {"bos_token": "<s>"}, ENDS, variables={"date": "May"}, **options)
                for i in range(120):
                    messages = talk(*[texts[(i * 7 + k * k * 3 + k) % len(texts)] for k in range(1 + i % 5)])
                    try:
                        want = planning.found(messages, None)
                    except BadRecord:
                        with self.assertRaises(BadRecord):
                            planning.documents(messages)
                        continue
                    self.assertEqual(planning.documents(messages), want, (template[:40], options, messages))

    def test_a_plan_is_used(self):
        planning = ChatTemplate(support.CHATML, {}, ENDS)
        planning.documents(TALK)
        planning.found = None  # the slow way would fail now
        text, spans = planning.documents(TALK)[0]
        self.assertEqual([text[begin:end] for begin, end in spans], ["user\n<|im_end|>", " two <|im_end|>"])


def said_by_documents(template, messages, **options):
    found = ChatTemplate(template, {}, ENDS, **options).documents(messages)
    return [text[begin:end] for text, spans in found for begin, end in spans]


if __name__ == "__main__":
    unittest.main()
