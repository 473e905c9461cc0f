"""Renders chat templates and finds what the assistant said.

A chat template is a Jinja program that a model brings along; it runs in Jinja's sandbox, without files or network. The
text that carries loss is found in one of two ways:
  {% generation %}  where the template marks it itself, the marks are taken;
  prefixes          otherwise the conversation is rendered up to each assistant turn, once without that turn but with
                    the generation prompt, once with it. What the second text has more is the turn.
Prefixes need a template that never changes what it has already said. That is checked, not assumed: a template which
does (some drop the reasoning of earlier turns) is refused with its reason instead of giving a wrong mask.
"""

import datetime
import json
import os

import jinja2
import jinja2.ext
import jinja2.sandbox

from . import errors
from .errors import BadRecord, PrepError, one_line
from .files import read_json


class Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}: notes where the enclosed text stands in the output.

    The enclosed text is wrapped in two marks that no text can hold, because NUL is refused when records are read.
    """

    tags = {"generation"}
    BEGIN, END = "\0<", "\0>"

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller):
        return self.BEGIN + caller() + self.END


def split_marks(marked):
    """The text without marks, and the [begin, end) spans that they enclosed."""
    pieces, spans, length, begin = [], [], 0, 0
    while marked:
        at = marked.find("\0")
        piece = marked if at < 0 else marked[:at]
        pieces.append(piece)
        length += len(piece)
        if at < 0:
            break
        if marked[at : at + 2] == Generation.BEGIN:
            begin = length
        else:
            spans.append((begin, length))
        marked = marked[at + 2 :]
    return "".join(pieces), spans


class ChatTemplate:
    """The chat template of a model directory, ready to render."""

    def __init__(self, source, special_tokens, end_tokens):
        """`special_tokens`: bos_token etc. for the template; `end_tokens`: literals that may close a turn."""
        self.source = source
        self.special_tokens = special_tokens
        self.end_tokens = end_tokens
        self.marks_itself = "{% generation %}" in source or "{%- generation" in source
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = run_date().strftime
        try:
            self.program = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise PrepError(
                errors.INPUT_FORMAT, "chat template", f"is not valid Jinja: {error}"
            ) from error

    def render(self, messages, tools=None, generation_prompt=False):
        """The conversation as text with Generation's marks in it."""
        try:
            return self.program.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=generation_prompt,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise BadRecord(
                f"the model's chat template refuses the messages: {one_line(error)}"
            ) from error

    def prompt(self, messages, tools=None):
        """The text that the model is to continue with an assistant turn."""
        return split_marks(self.render(messages, tools, generation_prompt=True))[0]

    def conversation(self, messages, tools=None):
        """(text, spans): the whole conversation and the [begin, end) characters of the assistant's turns."""
        text, spans = split_marks(self.render(messages, tools))
        if self.marks_itself:
            return text, [span for span in spans if span[0] < span[1]]
        return text, [
            self.turn_span(text, messages, i, tools)
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        ]

    def turn_span(self, text, messages, i, tools):
        before = self.render(messages[:i], tools, generation_prompt=True)
        last = i + 1 == len(messages)
        after = text if last else self.render(messages[: i + 1], tools)
        if not after.startswith(before) or not text.startswith(after):
            raise BadRecord(
                f"the chat template renders messages[{i}] differently once more follows, so its part cannot be told; "
                "use a template with {% generation %} or split the conversation"
            )
        return len(before), len(before) + self.closed_length(after[len(before) :])

    def closed_length(self, turn):
        """Length of a turn up to its closing token: what a template puts behind that (a line break) is not learned."""
        ends = [turn.rfind(token) + len(token) for token in self.end_tokens if token in turn]
        end = max(ends, default=len(turn))
        return end if not turn[end:].strip() else len(turn)


def raise_exception(message):
    raise jinja2.TemplateError(message)


def run_date():
    """Today, or SOURCE_DATE_EPOCH: a template that writes the date must not make the data irreproducible."""
    stamp = os.environ.get("SOURCE_DATE_EPOCH", "")
    if stamp.isdigit():
        return datetime.datetime.fromtimestamp(int(stamp), datetime.timezone.utc)
    return datetime.datetime.now()


def load_template(model_dir, override=None):
    """(source, special tokens) of a model directory; the source is None where the model has no template."""
    config_path = os.path.join(model_dir, "tokenizer_config.json")
    config = read_json(config_path) if os.path.exists(config_path) else {}
    specials = {
        key: token_text(value)
        for key, value in config.items()
        if key.endswith("_token") and token_text(value) is not None
    }
    path = override or os.path.join(model_dir, "chat_template.jinja")
    if override or os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                return file.read(), specials
        except (OSError, UnicodeDecodeError) as error:
            raise PrepError(errors.INPUT_MISSING, path, f"cannot read: {error}") from error
    source = config.get("chat_template")
    if isinstance(source, list):  # several named templates
        named = {
            entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)
        }
        source = named.get("default")
    if source is not None and not isinstance(source, str):
        raise PrepError(
            errors.INPUT_VALUE, config_path, 'the field "chat_template" must be a string'
        )
    return source, specials


def token_text(value):
    """A special token is written as a string or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
