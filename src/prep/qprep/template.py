"""Renders chat templates and finds what each turn said.

A chat template is a Jinja program that a model brings along; it runs in Jinja's sandbox, without files or network. The
text that carries loss is found in one of three ways:
  {% generation %}  where the template marks every assistant turn itself, the marks are taken;
  prefixes          otherwise the conversation is rendered up to each assistant turn, once without that turn but with
                    the generation prompt, once with it. What the second text has more is the turn.
  stand-ins         of users, systems and tools the words are learned, not the frame: the words are replaced by others,
                    and what differs in the rendered text is theirs.
Prefixes need a template that never changes what it has already said. That is checked, not assumed. A template which
does (Qwen3's drops the reasoning of earlier turns) gets one document a turn instead, each rendered as the model will see
it when it has to say that turn; where even that is contradictory, the record is refused instead of giving a wrong mask.

Rendering is most of the work, so what was found for one conversation is kept as a plan for all that have the same
sequence of roles: the constant text around the contents, and where in it the learned parts lie. A plan is used only if
the text that it gives is the text that the template gives.

A template that has no place for tools passes over them in silence, and the model would learn an empty answer where the
record has a call. Records with tools are therefore rendered without them as well, and calls under other names.
"""

import contextlib
import datetime
import json
import os
import re

import jinja2
import jinja2.ext
import jinja2.sandbox

from . import errors
from .chat import is_trained
from .errors import BadRecord, PrepError, one_line, quoted
from .files import open_input, read_json

PLANS_LIMIT = 4096
TURNS = ("auto", "all", "each", "last")
DEFAULT, TOOL_USE = "default", "tool_use"  # names of a model's templates
CALL_MARK = "qshard_call_{}_{}_"  # in place of a function's name; ASCII, as a template may write it as JSON


class Inconsistent(BadRecord):
    """The template writes a turn differently, depending on what follows."""


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


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which asks anew at every use whether an attribute is safe. The answer depends on the type of the
    object and on the attribute's name alone, so it is kept."""

    KEPT_LIMIT = 4096

    def __init__(self, **options):
        super().__init__(**options)
        self.kept = {}

    def is_safe_attribute(self, obj, attr, value):
        key = type(obj), attr
        safe = self.kept.get(key)
        if safe is None:
            safe = super().is_safe_attribute(obj, attr, value)
            if len(self.kept) < self.KEPT_LIMIT:
                self.kept[key] = safe
        return safe


class ChatTemplate:
    """The chat template of a model directory, ready to render."""

    def __init__(
        self,
        source,
        special_tokens,
        end_tokens,
        roles=("assistant",),
        turns="auto",
        variables=None,
        path="chat template",
    ):
        """`special_tokens`: bos_token etc. for the template; `end_tokens`: literals that may close a turn; `roles`: who
        is learned; `turns`: one of TURNS; `variables`: further variables of the template, as enable_thinking; `path`:
        the file that it came from."""
        self.path = path
        self.variables = {**special_tokens, **(variables or {})}
        self.end_tokens = tuple(token for token in end_tokens if token)
        self.roles = roles
        self.turns = turns
        self.names = frozenset(re.findall(r"\w+", source))  # all that it may read of a message, and much else
        self.plans = {}
        environment = Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = run_date().strftime
        try:
            self.program = environment.from_string(source)
            self.context = self.program.new_context(dict(self.variables))
        except (jinja2.TemplateError, RecursionError) as error:
            raise PrepError(
                errors.INPUT_FORMAT, path, f"the chat template is not valid Jinja: {error}"
            ) from error

    def marked(self, messages, tools=None, generation_prompt=False):
        """The conversation as text with Generation's marks in it."""
        context = self.context  # one for all renderings: a new one each takes a third of the time
        context.parent["messages"] = messages
        context.parent["tools"] = tools
        context.parent["add_generation_prompt"] = generation_prompt
        context.vars.clear()
        context.exported_vars.clear()
        try:
            return "".join(self.program.root_render_func(context))
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise BadRecord(
                f"the model's chat template refuses the messages: {one_line(error)}{advice(messages)}"
            ) from error

    @contextlib.contextmanager
    def given(self, variables):
        """Inside, the template has further variables, those of one record. `documents` has plans of other records: use
        `found`."""
        own = dict(self.context.parent)
        self.context.parent.update(variables)
        try:
            yield
        finally:
            self.context.parent.clear()
            self.context.parent.update(own)

    def check_tools(self, messages, tools):
        """Refuses a record whose tools or calls the template passes over."""
        remedy = "give one that does by --chat-template FILE"
        if tools is not None and not self.writes_tools(messages, tools):
            raise BadRecord(
                f'the chat template in {self.path} does not write the field "tools", so the model would not see '
                f"what it can call; {remedy}, or remove the field"
            )
        if any(message.get("tool_calls") for message in messages):
            unwritten = self.unwritten_call(messages, tools)
            if unwritten:
                i, name = unwritten
                raise BadRecord(
                    f"messages[{i}] calls {quoted(name)}, but the chat template in {self.path} does not write the call, "
                    f"so the turn would be without it; {remedy}"
                )

    def writes_tools(self, messages, tools):
        text = self.render(messages, tools)
        try:
            return text != self.render(messages)
        except BadRecord:  # it cannot do without them
            return True

    def unwritten_call(self, messages, tools):
        """(i, name of the function) of the first call in messages[i] that the template does not write, or None. Calls
        have marks for names here, as the name alone may stand in the text for another reason."""
        marked = [with_marked_calls(message, i) for i, message in enumerate(messages)]
        text = self.render(marked, tools)
        for i, message in enumerate(messages):
            for k, call in enumerate(message.get("tool_calls") or ()):
                mark = CALL_MARK.format(i, k)
                # A template may drop it from earlier turns; that is what the model will see.
                if mark not in text and mark not in self.render(marked[: i + 1], tools):
                    return i, call.get("function", call)["name"]
        return None

    def render(self, messages, tools=None, generation_prompt=False):
        text = self.marked(messages, tools, generation_prompt)
        return split_marks(text)[0] if "\0" in text else text

    def prompt(self, messages, tools=None):
        """The text that the model is to continue with an assistant turn."""
        return self.render(messages, tools, generation_prompt=True)

    def documents(self, messages, tools=None):
        """[(text, spans), ...]: the conversation as one document, or as one for each learned turn, with the
        [begin, end) characters that are learned."""
        if tools is not None or any(len(message) != 2 for message in messages):
            return self.found(messages, tools)
        key = tuple([message["role"] for message in messages])
        plan = self.plans.get(key, False)
        if plan is False:
            plan = self.make_plan(key)
            if len(self.plans) < PLANS_LIMIT:
                self.plans[key] = plan
        if plan is not None:
            planned = [fill(document, messages) for document in plan]
            if all(
                self.render(messages[: document[0]]) == text
                for document, (text, _) in zip(plan, planned)
            ):
                return planned
        return self.found(messages, tools)

    def make_plan(self, roles):
        """The plan for conversations of these roles, or None where stand-ins do not show it. See `fill`."""
        contents = [f"\ue000{i}\ue001" for i in range(len(roles))]
        try:
            found = self.found([{"role": r, "content": c} for r, c in zip(roles, contents)], None)
        except BadRecord:
            return None
        plan = []
        for text, spans in found:
            pieces, rest, starts, at = [], text, [0], 0
            for content in contents:
                before, mark, after = rest.partition(content)
                if not mark:
                    break
                pieces.append(before)
                at += len(before) + len(mark)
                starts.append(at)
                rest = after
            pieces.append(rest)
            if "\ue000" in "".join(pieces):
                return None
            borders = [place(border, pieces, starts) for span in spans for border in span]
            if None in borders:
                return None
            plan.append((len(pieces) - 1, pieces, borders))
        return plan

    def found(self, messages, tools):
        """As `documents`, by rendering as often as it takes."""
        learned = self.learned(messages)
        if not learned:
            return [(self.render(messages, tools), [])]
        if self.turns != "each":
            try:
                return [self.conversation(messages, tools, learned)]
            except Inconsistent:
                if self.turns == "all":
                    raise
        return [self.conversation(messages[: i + 1], tools, [i]) for i in learned]

    def learned(self, messages):
        """The numbers of the messages that are learned."""
        learned = [
            i
            for i, message in enumerate(messages)
            if message["role"] in self.roles and is_trained(message) and not is_opening(messages, i)
        ]
        return learned[-1:] if self.turns == "last" else learned

    def conversation(self, messages, tools=None, learned=None):
        """(text, spans): the whole conversation and the [begin, end) characters of the turns `learned`."""
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if learned is None:
            learned = assistants
        text, marks = split_marks(self.marked(messages, tools))
        marks = [mark for mark in marks if mark[0] < mark[1]]
        # Marks count only if there is one for every assistant turn: a template that marks some has its reasons, but
        # the others would stay unlearned without a word.
        marks = dict(zip(assistants, marks)) if len(marks) == len(assistants) else {}
        spans = []
        for i in learned:
            if i in marks:
                spans.append(marks[i])
            elif messages[i]["role"] == "assistant":
                spans.append(self.turn_span(text, messages, i, tools))
            else:
                spans.append(self.words_span(text, messages, i, tools))
        return text, [span for span in spans if span[0] < span[1]]

    def turn_span(self, text, messages, i, tools):
        """What an assistant turn adds to the text behind the generation prompt."""
        before = self.render(messages[:i], tools, generation_prompt=True)
        last = i + 1 == len(messages)
        after = text if last else self.render(messages[: i + 1], tools)
        if not after.startswith(before):
            raise Inconsistent(
                f"the chat template writes messages[{i}] differently from what its generation prompt announces, so the "
                "part to learn cannot be told; give --chat-template FILE, a template that marks it with {% generation %}"
            )
        if not text.startswith(after):
            after = self.without_end(after, text)
        if after is None:
            raise Inconsistent(
                f"the chat template writes messages[{i}] differently once more follows, so its part cannot be told; "
                "give --turns each or last, or a template with {% generation %} by --chat-template"
            )
        return len(before), len(before) + self.closed_length(after[len(before) :])

    def without_end(self, after, text):
        """`after` without the token that a template puts behind the last message, whatever it is, as Phi-3's does; None where
        that is not all in which `after` differs from the beginning of `text`, or where nothing else would close the turn."""
        for token in self.end_tokens:
            rest = after.removesuffix(token)
            if rest != after and text.startswith(rest) and text.endswith(token) and rest.rstrip().endswith(self.end_tokens):
                return rest
        return None

    def closed_length(self, turn):
        """Length of a turn up to its closing token: what a template puts behind that (a line break) is not learned."""
        ends = [turn.rfind(token) + len(token) for token in self.end_tokens if token in turn]
        end = max(ends, default=len(turn))
        return end if not turn[end:].strip() else len(turn)

    def words_span(self, text, messages, i, tools):
        """The content of a message as it stands in the text, and the special token right behind it."""
        before = self.without(messages, i, tools, "\ue002")
        if before is None or not text.startswith(before[0]) or not text.endswith(before[1]):
            raise Inconsistent(
                f"the chat template does not write the content of messages[{i}], or not just once, so the "
                f"role {messages[i]['role']} cannot be learned; leave it out of --train-roles"
            )
        begin, end = len(before[0]), len(text) - len(before[1])
        if begin > end:
            raise Inconsistent(f"the chat template drops words of messages[{i}]; leave the role out of --train-roles")
        for token in self.end_tokens:
            if text.startswith(token, end):
                return begin, end + len(token)
        return begin, end

    def without(self, messages, i, tools, stand_in):
        """(before, after) the content of messages[i], which is rendered as `stand_in`; None where that is ambiguous."""
        changed = [*messages[:i], {**messages[i], "content": stand_in}, *messages[i + 1 :]]
        pieces = self.render(changed, tools).split(stand_in)
        return pieces if len(pieces) == 2 else None

    def is_closed(self, text, end):
        """Whether a turn that ends at `end` is closed by a special token, there or right behind it."""
        if text.endswith(self.end_tokens, 0, end):
            return True
        behind = text[end:].lstrip()
        return behind.startswith(self.end_tokens)


def is_opening(messages, i):
    """Whether messages[i] is an assistant turn with nothing before it: no answer, but what the conversation goes on from."""
    return i == 0 and messages[0]["role"] == "assistant"


def advice(messages):
    """What to do about messages that the template refuses."""
    first = next((message["role"] for message in messages if message["role"] != "system"), None)
    if first == "assistant":  # many templates ask for turns of user and assistant, one after the other
        return "; the first turn is the assistant's: put a user's before it, or leave it out"
    return "; correct them, or give another template by --chat-template FILE"


def with_marked_calls(message, i):
    """The message, messages[i], with CALL_MARKs for the names of the functions that it calls."""
    calls = []
    for k, call in enumerate(message.get("tool_calls") or ()):
        function = {**call.get("function", call), "name": CALL_MARK.format(i, k)}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls} if calls else message


def place(border, pieces, starts):
    """(k, offset): the border lies `offset` characters into pieces[k]; None where it lies inside a content."""
    for k, (start, piece) in enumerate(zip(starts, pieces)):
        if start <= border <= start + len(piece):
            return k, border - start
    return None


def fill(document, messages):
    """(text, spans) of one document of a plan, (number of messages, pieces around contents, borders of spans)."""
    count, pieces, borders = document
    parts, starts, at = [pieces[0]], [0], len(pieces[0])
    for k in range(count):
        content = messages[k]["content"]
        at += len(content)
        starts.append(at)
        parts.append(content)
        parts.append(pieces[k + 1])
        at += len(pieces[k + 1])
    ends = iter([starts[k] + offset for k, offset in borders])
    return "".join(parts), list(zip(ends, ends))


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Jinja's own `tojson` escapes for HTML; templates are written for this one."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def raise_exception(message):
    raise jinja2.TemplateError(message)


def run_date():
    """Today, or SOURCE_DATE_EPOCH: a template that writes the date must not make the data irreproducible."""
    stamp = os.environ.get("SOURCE_DATE_EPOCH", "")
    if stamp.isdigit():
        return datetime.datetime.fromtimestamp(int(stamp), datetime.timezone.utc)
    return datetime.datetime.now()


def load_templates(model_dir, override=None):
    """{name: (source, where it stands)} of a model directory, as transformers finds them: DEFAULT, and TOOL_USE where there
    is one for records with tools. Files of their own come before tokenizer_config.json."""
    if override:
        return {DEFAULT: (read_template(override), override)}
    files = {
        DEFAULT: os.path.join(model_dir, "chat_template.jinja"),
        TOOL_USE: os.path.join(model_dir, "additional_chat_templates", f"{TOOL_USE}.jinja"),
    }
    found = {name: (read_template(path), path) for name, path in files.items() if os.path.lexists(path)}
    return found if DEFAULT in found else {**listed_templates(model_dir), **found}


def read_template(path):
    try:
        with open_input(path) as file:
            return file.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PrepError(errors.INPUT_MISSING, path, f"cannot read: {error}") from error


def listed_templates(model_dir):
    """The templates in tokenizer_config.json: one text, or a list of named ones."""
    path = os.path.join(model_dir, "tokenizer_config.json")
    source = read_optional(path).get("chat_template")
    if not isinstance(source, list):
        named, places = {DEFAULT: source}, {DEFAULT: path}
    else:
        entries = [entry for entry in source if isinstance(entry, dict)]
        named = {name: e.get("template") for name in (DEFAULT, TOOL_USE) for e in entries if e.get("name") == name}
        places = {name: f"{path} ({name})" for name in named}
    for value in named.values():
        if value is not None and not isinstance(value, str):
            raise PrepError(errors.INPUT_VALUE, path, 'the field "chat_template" must be a string')
    return {name: (value, places[name]) for name, value in named.items() if value is not None}


def special_tokens(model_dir):
    """bos_token, eos_token etc. of a model directory. special_tokens_map.json counts only beside a tokenizer_config.json
    without added_tokens_decoder, as with transformers: newer directories say everything in the latter."""
    config = read_optional(os.path.join(model_dir, "tokenizer_config.json"))
    if "added_tokens_decoder" not in config:
        config = {**config, **read_optional(os.path.join(model_dir, "special_tokens_map.json"))}
    texts = {key: token_text(value) for key, value in config.items() if key.endswith("_token")}
    return {key: text for key, text in texts.items() if text is not None}


def read_optional(path):
    return read_json(path) if os.path.lexists(path) else {}


def token_text(value):
    """A special token is written as a string or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
