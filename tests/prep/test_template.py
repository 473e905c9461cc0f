"""Chat templates: what the assistant said is found exactly, or the template is refused."""
import unittest

import support  # noqa: F401  (puts src/prep on the path)

from qprep.errors import BadRecord, PrepError
from qprep.template import ChatTemplate

ENDS = ["<|im_start|>", "<|im_end|>"]
TALK = [
    {"role": "user", "content": "assistant"},  # words of the frame as content must not confuse the search
    {"role": "assistant", "content": "user\n"},
    {"role": "user", "content": "user\n"},
    {"role": "assistant", "content": " two "},
]


def said(template, messages=TALK):
    text, spans = ChatTemplate(template, {}, ENDS).conversation(messages)
    return [text[begin:end] for begin, end in spans]


class Template(unittest.TestCase):
    def test_assistant_turns_with_their_closing_token_and_without_what_follows_it(self):
        self.assertEqual(said(support.CHATML), ["user\n<|im_end|>", " two <|im_end|>"])

    def test_without_an_assistant_there_is_nothing_to_learn(self):
        self.assertEqual(said(support.CHATML, TALK[:1]), [])

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


if __name__ == "__main__":
    unittest.main()
