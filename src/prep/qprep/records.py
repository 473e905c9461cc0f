"""Reads JSON-lines files strictly and tells what kind of example a record is.

A line is one JSON object in UTF-8. What is wrong with a line is an error with FILE:LINE, or, with `--on-bad-record=skip`,
is counted. Empty lines are counted and never an error; a byte-order mark at the start of a file and CRLF are accepted.
"""

import json
import os
from dataclasses import dataclass

from . import errors
from .errors import BadRecord, PrepError, quoted

LINE_LIMIT_BYTES = 64 << 20
DEPTH_LIMIT = 64
FORMATS = ("messages", "alpaca", "text")
ROLES = ("system", "user", "assistant", "tool")


@dataclass
class Counts:
    """What happened to the lines of the input."""

    lines: int = 0
    empty: int = 0
    bad: int = 0
    records: int = 0


def read_records(paths, form, skip_bad, counts, build):
    """Yields build(format, record) for every usable line of `paths`, in order; build may raise BadRecord as well.

    With form "auto" the first usable record decides, and the others must be of the same kind: a file of mixed kinds is
    more often a mistake than meant.
    """
    for path in paths:
        for number, line in enumerate(raw_lines(path), start=1):
            counts.lines += 1
            try:
                text = clean_line(line, first=number == 1)
                if not text:
                    counts.empty += 1
                    continue
                record = parse_object(text)
                kind = recognise(record) if form == "auto" else form
                check_record(record, kind)
                built = build(kind, record)
            except BadRecord as error:
                if not skip_bad:
                    raise PrepError(
                        errors.INPUT_VALUE,
                        f"{path}:{number}",
                        f"{error} (or give --on-bad-record=skip)",
                    ) from error
                counts.bad += 1
                continue
            form = kind
            counts.records += 1
            yield built


def raw_lines(path):
    """The lines of a file as bytes, never more than the limit in memory. A longer line comes cut, one byte too long."""
    try:
        with open(path, "rb") as file:
            while line := file.readline(LINE_LIMIT_BYTES + 1):
                yield line
                while len(line) > LINE_LIMIT_BYTES and not line.endswith(b"\n"):
                    line = file.readline(LINE_LIMIT_BYTES + 1)  # the rest of it
    except OSError as error:
        hint = (
            "is a folder; name a file" if os.path.isdir(path) else f"cannot read: {error.strerror}"
        )
        raise PrepError(errors.INPUT_MISSING, path, hint) from error


def clean_line(line, first):
    """Bytes of a line to text without the line's end; BadRecord where it is not clean UTF-8."""
    if len(line) > LINE_LIMIT_BYTES:
        raise BadRecord(f"the line is longer than {LINE_LIMIT_BYTES >> 20} MiB; cut the record")
    if first and line.startswith(b"\xef\xbb\xbf"):
        line = line[3:]
    line = line.strip(b" \t\r\n")
    if b"\0" in line:
        raise BadRecord(
            f"NUL at byte {line.index(0) + 1}; the file is binary, UTF-16 or damaged: convert it to UTF-8"
        )
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"not UTF-8 at byte {error.start + 1} (0x{line[error.start]:02x}); convert the file"
        ) from error


def parse_object(text):
    """One JSON object: no duplicate keys, no NaN, no deep nesting."""
    if text.count("[") + text.count("{") > DEPTH_LIMIT and depth_of(text) > DEPTH_LIMIT:
        raise BadRecord(f"nested deeper than {DEPTH_LIMIT}; flatten the record")
    try:
        value = json.loads(text, object_pairs_hook=unique_keys, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        if text.startswith("["):
            raise BadRecord(
                "a JSON array, not one object a line; convert it with jq -c '.[]'"
            ) from error
        raise BadRecord(
            f"not JSON at column {error.colno}: {error.msg}; correct the line"
        ) from error
    if not isinstance(value, dict):
        raise BadRecord(f"a JSON {type(value).__name__}, not an object; write one object a line")
    return value


def depth_of(text):
    """Deepest nesting of brackets outside strings. Written as a scan because a parser would recurse."""
    depth = deepest = 0
    inside = escaped = False
    for char in text:
        if inside:
            inside = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            inside = True
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    return deepest


def unique_keys(pairs):
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise BadRecord(f"the key {quoted(twice)} appears twice; keep one")
    return value


def no_constant(name):
    raise BadRecord(f"{name} is not JSON; write null or leave the field out")


def recognise(record):
    """The format of a record, by its keys."""
    if "messages" in record:
        return "messages"
    if "instruction" in record:
        return "alpaca"
    if "text" in record:
        return "text"
    raise BadRecord(
        f"no format has the keys {quoted(', '.join(map(str, record)))}; known: messages, "
        "instruction+output, text (or convert the file)"
    )


def check_record(record, form):
    """The fields that `form` needs are there and are usable text."""
    if form == "messages":
        check_messages(record.get("messages"))
    elif form == "alpaca":
        check_text(record, "instruction", needed=True)
        check_text(record, "input", needed=False)
        check_text(record, "output", needed=True)
    else:
        check_text(record, "text", needed=True)


def check_messages(messages):
    if not isinstance(messages, list) or not messages:
        raise BadRecord('the field "messages" must be a list of at least one message')
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRecord(f"messages[{i}] is not an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise BadRecord(
                f'messages[{i}]: role is {quoted(role)}, must be one of {", ".join(ROLES)}'
            )
        # An assistant that calls a tool may have nothing to say.
        silent = (
            role == "assistant" and message.get("tool_calls") and message.get("content") is None
        )
        if not silent:
            check_text(message, "content", needed=True, name=f"messages[{i}].content")


def check_text(record, key, needed, name=None):
    value = record.get(key)
    if value is None and not needed:
        return
    name = name or key
    if key not in record:
        raise BadRecord(f'the field "{name}" is missing; add it')
    if not isinstance(value, str):
        raise BadRecord(f'the field "{name}" is a JSON {type(value).__name__}, must be a string')
    if "\0" in value:
        raise BadRecord(f'the field "{name}" holds a NUL character; remove it')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(
            f'the field "{name}" holds half a surrogate pair (character {error.start + 1}); '
            "remove it"
        ) from error
