"""Reads JSON-lines files strictly.

A line is one JSON object in UTF-8; a file that is one JSON array of objects is accepted as well. What is wrong with a
record is a BadRecord, to which the caller adds FILE:LINE. A byte-order mark at the start of a file and CRLF are accepted.
"""

import json
import os
import re
from dataclasses import dataclass, field

from . import errors
from .errors import BadRecord, PrepError, quoted
from .files import open_input, unique_keys

LINE_LIMIT_BYTES = 64 << 20
ARRAY_LIMIT_BYTES = 2 << 30  # a JSON array is read whole
DEPTH_LIMIT = 64
SPACE = " \t\r\n"
SPACE_RUN = re.compile(f"[{SPACE}]*")
MARK = b"\xef\xbb\xbf"
REASONS_LIMIT = 1000  # that are told apart
NUMBERS = re.compile("[0-9]+")

# How files begin that people hand over although they are no text, and what to do with them.
OTHER_KINDS = (
    (b"\x1f\x8b", "is compressed with gzip; unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it with unzstd"),
    (b"BZh", "is compressed with bzip2; unpack it with bunzip2"),
    (b"\xfd7zXZ\0", "is compressed with xz; unpack it with unxz"),
    (b"PK\x03\x04", "is a zip archive; unpack it"),
    (b"PAR1", "is a Parquet file; convert it to JSON lines, as pandas.read_parquet and to_json do"),
    (b"ARROW1", "is an Arrow file; convert it to JSON lines"),
    (b"\xff\xff\xff\xff", "is an Arrow file; convert it to JSON lines, as datasets.load_from_disk and to_json do"),
    (b"\x89HDF", "is an HDF5 file; qshard-prep reads JSON lines"),
    (b"MMIDIDX", "is a Megatron index; give --format megatron and the name without .idx"),
    (b"\xff\xfe", "is UTF-16; convert it to UTF-8 with iconv"),
    (b"\xfe\xff", "is UTF-16; convert it to UTF-8 with iconv"),
)


# The same for files of text, by the end of their names, where they do not begin as JSON.
OTHER_NAMES = (
    ((".csv", ".tsv"), "is a table; convert it to JSON lines, as csv.DictReader and json.dumps do (docs/data.md, Other files)"),
    ((".txt", ".md"), 'is plain text; write {"text": ...} around each document, on one line (docs/data.md, Other files)'),
)


@dataclass
class Counts:
    """What happened to the lines of the input."""

    lines: int = 0
    empty: int = 0
    bad: int = 0
    records: int = 0
    reasons: dict = field(default_factory=dict)  # of bad records: [how many, why the first is, its place]

    def leave_out(self, reason, place):
        """Counts a bad record. Reasons that differ in numbers alone (of columns, of messages) are one."""
        self.bad += 1
        self.note(NUMBERS.sub("", reason), 1, reason, place)

    def note(self, key, count, reason, place):
        if key not in self.reasons and len(self.reasons) >= REASONS_LIMIT:
            key, reason = "", "other reasons"
        self.reasons.setdefault(key, [0, reason, place])[0] += count

    def add(self, other):
        self.lines += other.lines
        self.empty += other.empty
        self.bad += other.bad
        self.records += other.records
        for key, noted in other.reasons.items():
            self.note(key, *noted)


def raw_records(paths):
    """Yields (path, line number, bytes or text) of every line of `paths`, or of every element of an array, in order."""
    for path in paths:
        if starts_with_bracket(path):
            yield from array_elements(path)
        else:
            for number, line in enumerate(raw_lines(path), start=1):
                yield path, number, line


def starts_with_bracket(path):
    """Whether the file is a JSON array; refuses what is known to be no text."""
    with open_input(path) as file:
        try:
            head = file.read(4096)
        except OSError as error:
            raise PrepError(errors.INPUT_MISSING, path, f"cannot read: {error.strerror}") from error
    for magic, what in OTHER_KINDS:
        if head.startswith(magic):
            raise PrepError(errors.INPUT_FORMAT, path, what)
    text = head.removeprefix(MARK).lstrip(SPACE.encode())
    for ends, what in OTHER_NAMES:
        if path.lower().endswith(ends) and text and text[:1] not in b"{[":
            raise PrepError(errors.INPUT_FORMAT, path, what)
    return text.startswith(b"[")


def raw_lines(path):
    """The lines of a file as bytes, never more than the limit in memory. A longer line comes cut, one byte too long."""
    with open_input(path) as file:
        try:
            first = True
            while line := file.readline(LINE_LIMIT_BYTES + 1):
                yield line.removeprefix(MARK) if first else line
                first = False
                while len(line) > LINE_LIMIT_BYTES and not line.endswith(b"\n"):
                    line = file.readline(LINE_LIMIT_BYTES + 1)  # the rest of it
        except OSError as error:
            raise PrepError(errors.INPUT_MISSING, path, f"cannot read: {error.strerror}") from error


def array_elements(path):
    """The elements of a file that is one JSON array, as text with the line that they begin on."""
    size = os.path.getsize(path)
    if size > ARRAY_LIMIT_BYTES:
        raise PrepError(
            errors.INPUT_FORMAT,
            path,
            f"is a JSON array of {size} bytes, more than {ARRAY_LIMIT_BYTES}; "
            "convert it to JSON lines with jq -c '.[]'",
        )
    with open_input(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PrepError(
            errors.INPUT_VALUE,
            f"{path}:{data.count(10, 0, error.start) + 1}",
            f"not UTF-8 at byte {error.start + 1} of the file "
            f"(0x{data[error.start]:02x}); convert the file",
        ) from error
    del data
    scan = json.JSONDecoder().raw_decode
    at = skip_space(text, skip_space(text, 0) + 1)
    number, counted = 1, 0
    done = text.startswith("]", at)
    while not done:
        number += text.count("\n", counted, at)
        counted = at
        try:
            end = scan(text, at)[1]
        except (ValueError, RecursionError) as error:
            raise PrepError(
                errors.INPUT_VALUE,
                f"{path}:{number}",
                f"the file is a JSON array, and this element is not JSON: {reason(error)}; correct it",
            ) from error
        yield path, number, text[at:end]
        at = skip_space(text, end)
        done = not text.startswith(",", at)
        at = at if done else skip_space(text, at + 1)
    number += text.count("\n", counted, at)
    if not text.startswith("]", at) or skip_space(text, at + 1) != len(text):
        found = "its end" if at >= len(text) else quoted(text[at : at + 8])
        raise PrepError(
            errors.INPUT_VALUE,
            f"{path}:{number}",
            f"the file is a JSON array, but after an element comes {found} instead of , or ] and nothing more; "
            "correct it, or write one object a line",
        )


def skip_space(text, at):
    return SPACE_RUN.match(text, at).end()


def reason(error):
    if isinstance(error, RecursionError):
        return f"nested deeper than {DEPTH_LIMIT}"
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def parse_record(raw, names=None):
    """The object on a line, or None where the line is empty. `names`: new names of some of its keys."""
    text = clean_line(raw)
    return renamed(parse_object(text), names or {}) if text else None


def renamed(record, names):
    """The record with new names for some keys; one that it does not have is left out."""
    if not names:
        return record
    result = {names.get(key, key): value for key, value in record.items()}
    if len(result) < len(record):
        taken = next(new for old, new in names.items() if old in record and new in record)
        raise BadRecord(f'the field "{taken}" is there already; give --rename {taken}=OTHER for it as well')
    return result


def clean_line(raw):
    """A line to text without the line's end; BadRecord where it is not clean UTF-8."""
    if len(raw) > LINE_LIMIT_BYTES:
        raise BadRecord(f"the line is longer than {LINE_LIMIT_BYTES >> 20} MiB; cut the record")
    if isinstance(raw, bytes):
        raw = raw.strip(SPACE.encode())
        try:
            raw = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord(
                f"not UTF-8 at byte {error.start + 1} (0x{raw[error.start]:02x}); convert the file"
            ) from error
    if "\0" in raw:
        place = len(raw[: raw.index("\0")].encode("utf-8")) + 1
        raise BadRecord(
            f"NUL at byte {place}; the file is binary, UTF-16 or damaged: convert it to UTF-8"
        )
    return raw


def parse_object(text):
    """One JSON object: no duplicate keys, no NaN, no deep nesting, no text that is not Unicode."""
    if text.count("[") + text.count("{") > DEPTH_LIMIT and depth_of(text) > DEPTH_LIMIT:
        raise BadRecord(f"nested deeper than {DEPTH_LIMIT}; flatten the record")
    try:
        value, end = DECODER.raw_decode(text)
        if end != len(text):
            DECODER.decode(text)  # says what is wrong with the rest
    except BadRecord:
        raise
    except json.JSONDecodeError as error:
        hint = "write each record on one line, as jq -c . does" if text in ("{", "[") else "correct the line"
        hint = "remove the byte-order mark, which may begin a file alone" if text[:1] == "\ufeff" else hint
        raise BadRecord(f"not JSON at column {error.colno}: {error.msg}; {hint}") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise BadRecord("holds a number of thousands of digits; write it as text") from error
    if not isinstance(value, dict):
        hint = " (jq -c '.[]' does)" if isinstance(value, list) else ""
        raise BadRecord(f"a JSON {kind_of(value)}, not an object; write one object a line{hint}")
    if "\\u" in text:  # only an escape can write a NUL or half a surrogate pair
        check_strings(value, "")
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


def check_strings(value, name):
    """Every string of a record can be written as UTF-8 and holds no NUL."""
    if isinstance(value, str):
        if "\0" in value:
            raise BadRecord(f'the field "{name}" holds a NUL character; remove it')
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRecord(
                f'the field "{name}" holds half a surrogate pair (character {error.start + 1}); '
                "remove it"
            ) from error
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_strings(key, "a key")
            check_strings(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            check_strings(inner, f"{name}[{i}]")


def unique_keys_of_record(pairs):
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    try:
        return unique_keys(pairs)
    except ValueError as error:
        raise BadRecord(f"{error}; keep one") from error


def no_constant(name):
    raise BadRecord(f"{name} is not JSON; write null or leave the field out")


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys_of_record, parse_constant=no_constant)

JSON_KINDS = {
    dict: "object",
    list: "array",
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def kind_of(value):
    """The JSON name of a value's type."""
    return JSON_KINDS.get(type(value), type(value).__name__)


def need_field(record, key, name=None):
    if key not in record:
        raise BadRecord(f'the field "{name or key}" is missing; add it')


def text_field(record, key, name=None, default=None):
    """The string `record[key]`; `default`, if one is given, where it is missing or null."""
    value = record.get(key)
    if isinstance(value, str):
        return value
    name = name or key
    if value is None and default is not None:
        return default
    need_field(record, key, name)
    raise BadRecord(f'the field "{name}" is a JSON {kind_of(value)}, must be a string')
