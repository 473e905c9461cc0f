"""The formats of records: how each becomes the text of documents, and which part of it is learned.

A format is told by the keys of a record (`recognise`) or by --format. `Builder` makes the documents of a record: Examples
of text for the tokenizer, or Encoded where the record holds tokens.
"""

from collections import Counter

import numpy as np

from . import errors, predecessor
from .chat import (
    CONVERSATION_KEYS,
    MARKED_KEYS,
    SYSTEM_KEYS,
    TURN_KEYS,
    from_sharegpt,
    is_empty,
    is_trained,
    messages_of,
    system_of,
    tools_of,
    variables_of,
    with_system,
)
from .errors import BadRecord, PrepError, quoted
from .records import kind_of, need_field, text_field
from .template import DEFAULT, TOOL_USE, ChatTemplate, is_opening, load_templates, special_tokens
from .tokenfile import IGNORED, check_template
from .tokens import Encoded, Example

MEGATRON = "megatron"
OPENING = "opening assistant turns not learned"  # for the closing line
TALKS = ("messages", "sharegpt")
PAIRS = ("alpaca", "completion")  # --chat makes conversations of them
FORMATS = (*TALKS, *PAIRS, "text", "tokens")
ALL_FORMATS = (*FORMATS, MEGATRON, *predecessor.FORMATS)

# The wording of Stanford Alpaca's training data, which models tuned on it expect.
ALPACA_HEAD = "Below is an instruction that describes a task"
ALPACA_INPUT = ", paired with an input that provides further context"
ALPACA_TAIL = ". Write a response that appropriately completes the request.\n\n"

# Masks of pre-tokenized records: 1 where a token is learned.
LOSS_MASKS = ("loss_mask", "label_mask", "completion_mask", "assistant_masks", "assistant_mask")

# The keys of a record that each format reads; where it becomes a conversation, CONVERSATION_KEYS as well.
READ = {
    "messages": frozenset(("messages",)),
    "sharegpt": frozenset(("conversations",)),
    "alpaca": frozenset(("instruction", "input", "context", "output", "response", "history", *SYSTEM_KEYS)),
    "completion": frozenset(("prompt", "completion", "response", *SYSTEM_KEYS)),
    "text": frozenset(("text",)),
    "tokens": frozenset(("input_ids", "labels", "attention_mask", "position_ids", *LOSS_MASKS)),
    **predecessor.READ,
}


def recognise(record):
    """(format, the key that told it) of a record."""
    for key, form in (
        ("messages", "messages"),
        ("conversations", "sharegpt"),
        ("input_ids", "tokens"),
        ("instruction", "alpaca"),
    ):
        if key in record:
            return form, key
    if "chosen" in record or "rejected" in record:
        raise BadRecord(
            "preference pairs (chosen, rejected) are not for supervised training; keep the chosen answers as completion"
        )
    if "prompt" in record:
        return "completion", "prompt"
    if "text" in record:
        return "text", "text"
    if "content" in record and ("role" in record or "from" in record):
        raise BadRecord('is a turn, not a conversation; write {"messages": [all turns of one]} on each line')
    key, value = next(iter(record.items()), (None, None))
    if len(record) == 1 and isinstance(value, list) and value and isinstance(value[0], dict):
        raise BadRecord(
            f"holds its records in a list under {quoted(key)}; write each on a line, as jq -c '.[{quoted(key)}][]' does"
        )
    raise BadRecord(
        f"no format has the keys {quoted(', '.join(map(str, record)))}; known: messages, conversations, "
        "instruction+output, prompt+completion, text, input_ids; --rename gives keys these names, as in "
        "--rename question=prompt --rename answer=completion"
    )


def alpaca_prompt(instruction, given):
    prompt = ALPACA_HEAD + (ALPACA_INPUT if given else "") + ALPACA_TAIL
    prompt += f"### Instruction:\n{instruction}\n\n"
    return prompt + (f"### Input:\n{given}\n\n" if given else "") + "### Response:"


def either(record, first, second, default=None):
    """The text of one of two names of a field."""
    if record.get(first) is not None and record.get(second) is not None:
        raise BadRecord(f'has the fields "{first}" and "{second}", which mean the same; keep one')
    return text_field(record, second if record.get(second) is not None else first, default=default)


class Builder:
    """Makes the documents of a record."""

    def __init__(self, options, tokenizer):
        self.options = options
        self.tokenizer = tokenizer
        self.roles = tuple(options.train_roles or ("assistant",))
        self.sources = load_templates(options.model, options.chat_template)
        self.templates = {}  # those of `sources` that were needed
        self.eos_text = tokenizer.eos_text()
        self.talks = False  # whether a file is of conversations
        self.begin()

    def begin(self):
        """Sets to nothing what is noted of the records to come."""
        self.done = Counter()
        self.unused = set()  # keys that nothing was made of
        self.used = set()  # names of the templates that shaped the data
        self.empty = 0  # answers without words

    def __call__(self, form, record):
        """The documents of a record; BadRecord where it is not usable."""
        if form in predecessor.FORMATS:
            built = [self.of_predecessor(form, record)]
        else:
            built = getattr(self, form)(record)
        if self.tokenizer.outside:
            for example in built:
                self.tokenizer.check_text(example)
        if not record.keys() <= READ[form]:
            self.note_unused(form, record)
        return built

    def note_unused(self, form, record):
        unused = record.keys() - READ[form]
        if form in TALKS or form in PAIRS and (self.options.chat or isinstance(record.get("prompt"), list)):
            unused -= CONVERSATION_KEYS
        self.unused |= unused

    def check_forms(self, sources):
        """Refuses options that mean nothing for the format of any file, and those that are wrong for the format of one, before
        the first record is built."""
        options = self.options
        paths = {}  # of the first file of each format
        for source in sources:
            if source.form:
                paths.setdefault(source.form, source.path)
        self.talks = not paths.keys().isdisjoint(TALKS)
        for name, given, forms, why in (
            ("--chat", options.chat, PAIRS, "writes alpaca and completion records with the chat template"),
            ("--train-roles", options.train_roles and not options.chat, (*TALKS, "completion"), "is for conversations"),
            ("--turns", options.turns and not options.chat, (*TALKS, "completion"), "is for conversations"),
            ("--rename", options.rename, READ, "is for records with keys"),
            ("--samples", options.samples is not None, predecessor.FORMATS, "is for the fsdp_qlora formats"),
        ):
            if given and paths and paths.keys().isdisjoint(forms):
                what = "format is" if len(paths) == 1 else "formats are"
                raise PrepError(errors.CONFIG_PAIR, name, f"{why}; the {what} {', '.join(paths)}")
        answers, ready = (*TALKS, *PAIRS, *predecessor.FORMATS), (*predecessor.FORMATS, MEGATRON, "tokens")
        for name, given, forms, why in (
            ("--long", options.long == "split", answers, "split is for text and tokens: a piece of an answer is none"),
            ("--train-on-inputs", options.train_on_inputs, ready, "does not go with a format that says itself what is learned"),
            ("--eos", options.eos != "auto", predecessor.FORMATS, "is fixed to what the predecessor did"),
            ("--prompts", options.prompts, (MEGATRON,), "cannot be cut out of documents of tokens"),
        ):
            wrong = next((form for form in paths if form in forms), None)
            if given and wrong:
                place = "" if len(paths) == 1 else f" of {paths[wrong]}"
                raise PrepError(errors.CONFIG_PAIR, name, f"{why}; the format{place} is {wrong}")
        if self.talks or options.chat:
            self.need_template()

    def need_template(self):
        if not self.sources:
            raise PrepError(
                errors.INPUT_MISSING,
                self.options.model,
                "the model has no chat template, which conversations need; give --chat-template FILE",
            )

    def template_for(self, tools):
        """The chat template for a record: as transformers chooses it, the one for tools where it has some and there is one."""
        name = TOOL_USE if tools is not None and TOOL_USE in self.sources else DEFAULT
        if name not in self.templates:
            if name not in self.sources:
                raise PrepError(
                    errors.INPUT_MISSING,
                    self.options.model,
                    f"the model has a chat template for tools alone, none of the name {DEFAULT}; give --chat-template FILE",
                )
            source, path = self.sources[name]
            check_template(path, source)
            self.templates[name] = ChatTemplate(
                source,
                special_tokens(self.options.model),
                (*self.tokenizer.special_texts(), self.eos_text),
                self.roles,
                self.options.turns or "auto",
                dict(self.options.template_arg),
                path,
            )
        self.used.add(name)
        return self.templates[name]

    def need_eos(self):
        if self.tokenizer.eos is None:
            raise PrepError(
                errors.INPUT_VALUE,
                self.options.model,
                "names no eos_token, which has to end a document; add it to tokenizer_config.json, "
                "or give --eos never",
            )
        return True

    # --- conversations

    def messages(self, record):
        need_field(record, "messages")
        return self.conversation(record, messages_of(record["messages"]), "messages")

    def sharegpt(self, record):
        messages = from_sharegpt(record)
        for turn in record["conversations"]:
            if "from" in turn and not turn.keys() <= TURN_KEYS:
                self.unused.update(f"conversations[].{key}" for key in turn.keys() - TURN_KEYS)
        return self.conversation(record, messages, "conversations")

    def conversation(self, record, messages, name):
        """The documents of the messages that were the record's field `name`, and of what stands beside them."""
        messages, tools = with_system(record, messages, name), tools_of(record)
        template, variables = self.template_for(tools), variables_of(record)
        if not variables:
            built = self.written(template, messages, tools, template.documents)
        else:
            with template.given(variables):
                built = self.written(template, messages, tools, template.found)
        for message in messages:
            if len(message) > 2:
                self.note_unnamed(template, message, name)
        return built

    def note_unnamed(self, template, message, name):
        """Notes what stands in a message that the template does not name: a reasoning, where it knows none."""
        filled = {key for key, value in message.items() if value}
        self.unused.update(f"{name}[].{key}" for key in filled - template.names - MARKED_KEYS)

    def written(self, template, messages, tools, find):
        """The documents of a conversation; `find` gives their texts and what is learned of them."""
        if self.options.prompts:
            while messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]  # the answer that the model is asked for
            if not messages:
                raise BadRecord("no message to answer; a prompt needs a user message")
        template.check_tools(messages, tools)
        if self.options.prompts:
            return [Example(template.prompt(messages, tools), [], False, False)]
        if any(map(is_empty, messages)):
            self.empty += sum(is_empty(messages[i]) for i in template.learned(messages) if messages[i]["role"] == "assistant")
        if self.options.train_on_inputs:
            text = template.render(messages, tools)
            spoken = [(0, len(text.rstrip()))]
            return [Example(text, [(0, len(text))], False, self.chat_eos(template, text, spoken, True))]
        found = find(messages, tools)
        if len(found) > 1 and self.options.turns != "each":
            self.done["separated into turns"] += 1
        if is_opening(messages, 0) and "assistant" in self.roles and is_trained(messages[0]):
            self.done[OPENING] += 1
        ends_open = messages[-1]["role"] in self.roles
        return [
            Example(text, spans, False, self.chat_eos(template, text, spans, ends_open))
            for text, spans in found
        ]

    def chat_eos(self, template, text, spans, ends_with_learned):
        """Whether the end-of-text token is put behind a rendered conversation: by default where the template does not
        close the last learned turn with any special token."""
        rule = self.options.eos
        if rule == "never" or not spans:
            return False
        if rule == "always":
            return self.need_eos() and not text.rstrip().endswith(self.eos_text)
        end = spans[-1][1]
        if template.is_closed(text, end) or text[end:].strip() or not ends_with_learned:
            return False
        return self.need_eos()

    # --- plain text

    def plain_eos(self, text):
        """Whether the end-of-text token is put behind plain text: unless it stands there already."""
        if self.options.eos == "never" or self.options.prompts:
            return False
        return self.need_eos() and not text.endswith(self.eos_text)

    def answered(self, prompt, answer):
        """A document of a prompt and its learned answer."""
        if self.options.prompts:
            return [Example(prompt, [], True, False)]
        text = prompt + answer
        begin, ended = 0 if self.options.train_on_inputs else len(prompt), self.plain_eos(text)
        self.empty += ended and not answer.strip()
        return [Example(text, [(begin, len(text))], True, ended)]

    def alpaca(self, record):
        instruction = text_field(record, "instruction")
        given = either(record, "input", "context", default="")
        output = either(record, "output", "response")
        if record.get("history"):
            raise BadRecord(
                'the field "history" has no place in the alpaca prompt; convert the record to messages, or remove it'
            )
        if self.options.chat:
            question = f"{instruction}\n\n{given}" if given else instruction
            return self.conversation(record, exchange(question, output), "instruction")
        refuse_system(record, "the alpaca prompt")
        return self.answered(alpaca_prompt(instruction, given), output)

    def completion(self, record):
        prompt = record.get("prompt")
        answer = "response" if record.get("completion") is None and "response" in record else "completion"
        if isinstance(prompt, list):
            return self.completed_messages(record, answer)
        prompt = text_field(record, "prompt")
        output = "" if self.options.prompts else text_field(record, answer)
        if self.options.chat:
            return self.conversation(record, exchange(prompt, output), "prompt")
        refuse_system(record, "a plain prompt")
        for name, given in (("--train-roles", self.options.train_roles), ("--turns", self.options.turns)):
            if given and not self.talks:
                raise PrepError(
                    errors.CONFIG_PAIR, name, "is for conversations; the prompts are plain text (or give --chat)"
                )
        return self.answered(prompt, output)

    def completed_messages(self, record, answer):
        """A prompt and a completion that are lists of messages: only the completion is learned."""
        self.need_template()
        before = [{**message, "train": False} for message in messages_of(record["prompt"], "prompt")]
        if self.options.prompts:
            return self.conversation(record, messages_of(record["prompt"], "prompt"), "prompt")
        if not isinstance(record.get(answer), list):
            raise BadRecord(
                f'the field "{answer}" is a JSON {kind_of(record.get(answer))}, must be a list of messages as "prompt" is'
            )
        return self.conversation(record, before + messages_of(record[answer], answer), "prompt")

    def text(self, record):
        text = text_field(record, "text")
        if self.options.prompts:
            return [Example(text, [], True, False)]
        return [Example(text, [(0, len(text))], True, self.plain_eos(text))]

    def of_predecessor(self, form, record):
        prompt, text = predecessor.build(form, record)
        if self.options.prompts:
            return Example(prompt, [], True, False)
        self.need_eos()
        return Example(text, [], True, True, prompt=prompt)

    # --- tokens

    def tokens(self, record):
        ids = self.ids_of(record)
        count = len(ids)
        learned = np.ones(count, dtype=bool)
        labels = numbers_of(record, "labels", count)
        if labels is not None:
            labels = as_array(labels, "labels")
            wrong = np.flatnonzero((labels != IGNORED) & (labels != ids))
            if len(wrong):
                i = int(wrong[0])
                raise BadRecord(
                    f"labels[{i}] is {labels[i]}, must be {IGNORED} or input_ids[{i}], which is {ids[i]}; "
                    "labels stand at their own token, they are not shifted"
                )
            learned = labels != IGNORED
        for key in LOSS_MASKS:
            mask = mask_of(record, key, count)
            learned = learned if mask is None else learned & mask
        ids, learned, borders = self.without_padding(record, ids, learned)
        pieces = []
        for begin, end in zip(borders[:-1], borders[1:]):
            pieces.append(self.with_end(ids[begin:end], learned[begin:end]))
        if self.options.prompts:
            first = int(np.argmax(learned)) if labels is not None and learned.any() else len(ids)
            return [Encoded(ids[:first], np.zeros(first, dtype=bool))]
        return pieces

    def ids_of(self, record):
        ids = numbers_of(record, "input_ids", None)
        if ids is None:
            raise BadRecord('the field "input_ids" is missing; add it')
        if not ids:
            raise BadRecord('the field "input_ids" is empty; leave the record out')
        size = self.tokenizer.vocab_size
        if min(ids) < 0 or max(ids) >= size:
            i = next(i for i, value in enumerate(ids) if not 0 <= value < size)
            token = next((token for token, number in self.tokenizer.outside.items() if number == ids[i]), None)
            if token:
                raise BadRecord(f"input_ids[{i}] {self.tokenizer.beyond(token)}")
            raise BadRecord(
                f"input_ids[{i}] is {quoted(ids[i], 24)}, must be 0..{size - 1}, the tokenizer's ids; "
                "the record was made with another tokenizer"
            )
        return np.array(ids, dtype=np.int64)

    def without_padding(self, record, ids, learned):
        """(ids, learned, borders): padding removed, and the borders of documents where position_ids begin anew."""
        count = len(ids)
        positions = numbers_of(record, "position_ids", count)
        kept = mask_of(record, "attention_mask", count)
        begin, end = 0, count
        if kept is not None:
            where = np.flatnonzero(kept)
            if not len(where):
                raise BadRecord('the field "attention_mask" is 0 everywhere; leave the record out')
            begin, end = int(where[0]), int(where[-1]) + 1
            if not kept[begin:end].all():
                i = begin + int(np.argmin(kept[begin:end]))
                raise BadRecord(
                    f"attention_mask[{i}] is 0 between ones; only padding at an end can be left out"
                )
        borders = [0, end - begin]
        if positions is not None:
            positions = as_array(positions, "position_ids")[begin:end]
            fresh = np.flatnonzero(positions == 0)
            expected = np.arange(end - begin) - np.repeat(
                fresh, np.diff(np.append(fresh, end - begin))
            ) if len(fresh) and fresh[0] == 0 else None
            if expected is None or (positions != expected).any():
                raise BadRecord(
                    "position_ids must count 0, 1, 2, ... and begin anew at every document of the record"
                )
            borders = [*fresh.tolist(), end - begin]
        return ids[begin:end].astype("<u4"), learned[begin:end], borders

    def with_end(self, ids, learned):
        """The document as it is, or with the end-of-text token that --eos always asks for."""
        if self.options.eos == "always" and self.need_eos() and ids[-1] != self.tokenizer.eos:
            ids, learned = np.append(ids, np.uint32(self.tokenizer.eos)), np.append(learned, True)
        return Encoded(ids, learned)

    def template_texts(self, used):
        """The texts of the templates of these names, the default first; and the one to keep for whoever serves the model: the
        default, where no other was used."""
        texts = [self.sources[name][0] for name in sorted(used)]
        return texts, texts[0] if used == {DEFAULT} else None


def refuse_system(record, place):
    key, system = system_of(record)
    if system:
        raise BadRecord(
            f'the field "{key}" has no place in {place}; give --chat, convert the record to messages, or remove it'
        )


def exchange(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def numbers_of(record, key, count):
    """The list of whole numbers `record[key]`, None where it is missing or null."""
    values = record.get(key)
    if values is None:
        return None
    if not isinstance(values, list):
        raise BadRecord(f'the field "{key}" is a JSON {kind_of(values)}, must be a list of numbers')
    if set(map(type, values)) - {int}:
        i = next(i for i, value in enumerate(values) if type(value) is not int)
        raise BadRecord(f"{key}[{i}] is a JSON {kind_of(values[i])}, must be a whole number")
    if count is not None and len(values) != count:
        raise BadRecord(f'the field "{key}" has {len(values)} entries, but input_ids has {count}')
    return values


def mask_of(record, key, count):
    """A list of 0 and 1 (or false and true) as an array of bool, None where it is missing or null."""
    values = record.get(key)
    if isinstance(values, list) and values and set(map(type, values)) == {bool}:
        record = {key: list(map(int, values))}
    values = numbers_of(record, key, count)
    if values is None:
        return None
    if set(values) - {0, 1}:
        i = next(i for i, value in enumerate(values) if value not in (0, 1))
        raise BadRecord(f"{key}[{i}] is {quoted(values[i], 24)}, must be 0 or 1")
    return np.array(values, dtype=bool)


def as_array(values, key):
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError as error:
        raise BadRecord(f"{key} holds a number of more than 64 bits; correct it") from error
