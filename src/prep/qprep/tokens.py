"""Text to token ids with a mask of what is learned, by the model's own tokenizer.json.

The ids are those that the tokenizer gives for the whole text of an example, and the mask follows from each token's place
in the text. A token that reaches over the border of a learned part is not learned.

Most of the time goes into the tokenizer, so what it has encoded is kept. Byte-level BPE never joins what its pre-tokenizer
has cut, and that cuts a text at special tokens and before most words. Where that is certain (`cutter_of`), a text is taken
as chunks of about a word, and only chunks that have not come up yet are encoded, by the parts that they share with others: a
word and the mark behind it are two. A whole stretch between added tokens that comes again, as a system prompt does, is one
chunk. Other tokenizers encode whole texts. That both ways give the same ids is tested, and checked again on the first texts
of every run.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from itertools import chain

import numpy as np
import tokenizers

from . import errors
from .errors import BadRecord, PrepError, quoted
from .files import read_json
from .model_config import read_model_config
from .template import special_tokens

LARGEST_ID = 1 << 22


@dataclass
class Example:
    """One document before it is encoded."""

    text: str
    spans: list  # [begin, end) characters that are learned
    with_bos: bool  # put the tokenizer's own first token in front: chat templates write theirs, plain text does not
    with_eos: bool  # end the document with a learned end-of-text token
    prompt: str = None  # learned is what comes after as many tokens as this text has, instead of `spans`
    group: int = 0  # number of the record that it was made of


@dataclass
class Encoded:
    """One document that was tokens from the start."""

    tokens: np.ndarray  # uint32
    learned: np.ndarray  # bool, per token
    group: int = 0


@dataclass
class Documents:
    """Encoded documents, back to back."""

    tokens: np.ndarray  # uint32
    learned: np.ndarray  # bool, per token
    lengths: np.ndarray  # int64, tokens of each document
    groups: np.ndarray  # int64, number of the record that a document was made of

    def __len__(self):
        return len(self.lengths)


def joined(parts):
    """Documents one after the other as one Documents; `parts` may be empty."""
    return Documents(
        np.concatenate([part.tokens for part in parts] or [np.zeros(0, "<u4")]),
        np.concatenate([part.learned for part in parts] or [np.zeros(0, bool)]),
        np.concatenate([part.lengths for part in parts] or [np.zeros(0, np.int64)]),
        np.concatenate([part.groups for part in parts] or [np.zeros(0, np.int64)]),
    )


class Tokenizer:
    """tokenizer.json of a model directory, checked against the model's vocabulary."""

    def __init__(self, model_dir):
        self.path = os.path.join(model_dir, "tokenizer.json")
        if not os.path.lexists(self.path):
            raise PrepError(
                errors.INPUT_MISSING,
                self.path,
                "no such file; --model takes a Hugging Face directory "
                "with tokenizer.json (a SentencePiece tokenizer.model must be converted first)",
            )
        self.description = read_json(self.path, limit_bytes=256 << 20)
        with open(self.path, "rb") as file:
            content = file.read()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self.rust = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the Rust core raises a bare Exception
            raise PrepError(
                errors.INPUT_FORMAT, self.path, f"is not a usable tokenizer: {error}"
            ) from error
        self.rust.no_truncation()
        self.rust.no_padding()
        self.added = {t.content: i for i, t in self.rust.get_added_tokens_decoder().items()}
        self.check_ids(model_dir)
        self.eos = self.find_eos(model_dir)
        whole = [i for i in self.rust.encode("", add_special_tokens=True).ids if i != self.eos]
        self.bos = whole
        # Special tokens are added here, and offsets must cover the whole text, spaces included.
        self.rust.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        self.cut = cutter_of(self.rust, self.description)
        self.known = Known()
        self.compared = 0  # texts that were encoded both ways

    def check_ids(self, model_dir):
        """Sets `vocab_size`, one more than the largest id, and `outside`, the added tokens that the model's vocabulary does
        not reach: Gemma 3 has one for images, which its models without images do not know."""
        known = {}
        for token, number in self.rust.get_vocab(with_added_tokens=True).items():
            if known.setdefault(number, token) != token:
                raise PrepError(
                    errors.INPUT_VALUE,
                    self.path,
                    f"the id {number} belongs to two tokens, {quoted(known[number])} and {quoted(token)}",
                )
        config = os.path.join(model_dir, "config.json")
        model_vocab = read_model_config(model_dir).get("vocab_size")
        if type(model_vocab) is not int or not 0 < model_vocab <= LARGEST_ID:
            raise PrepError(
                errors.INPUT_VALUE, config, f"vocab_size={model_vocab} must be 1..{LARGEST_ID}"
            )
        self.outside = {text: i for text, i in self.added.items() if i >= model_vocab}
        largest = max(known.keys() - self.outside.values(), default=-1)
        if not 0 <= largest < model_vocab:
            raise PrepError(
                errors.INPUT_VALUE,
                self.path,
                f"the largest token id is {largest}, but the "
                f"model's vocab_size is {model_vocab}; the tokenizer belongs to another model",
            )
        self.vocab_size, self.model_vocab = largest + 1, model_vocab

    def find_eos(self, model_dir):
        """The id that ends a document: eos_token of the tokenizer, else eos_token_id of the model."""
        text = special_tokens(model_dir).get("eos_token")
        number = None if text is None else self.rust.token_to_id(text)
        if number is not None and number < self.vocab_size:
            return number
        eos = read_model_config(model_dir).get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        return eos if isinstance(eos, int) and 0 <= eos < self.vocab_size else None

    def eos_text(self):
        """The literal text of the token that ends a document; None where there is no such token."""
        return None if self.eos is None else self.rust.id_to_token(self.eos)

    def special_texts(self):
        """Literal texts of the special tokens."""
        return [
            token.content
            for token in self.rust.get_added_tokens_decoder().values()
            if token.special
        ]

    def check_text(self, example):
        """BadRecord where an example holds an added token that the model does not know."""
        text = example.text if isinstance(example, Example) else ""  # ids are compared where they are read
        token = next((token for token in self.outside if token in text), None)
        if token:
            raise BadRecord(f"the text {self.beyond(token)}")

    def beyond(self, token):
        """What is wrong with a text or an id that is one of `outside`."""
        return (
            f"holds {quoted(token)}, which is token {self.outside[token]}, but the model's vocab_size is "
            f"{self.model_vocab}; remove it, or enlarge the model's vocabulary"
        )

    def check_documents(self, documents):
        """The same by the ids: a normalizer may make such a token of other characters."""
        if self.outside and documents.tokens.max(initial=0) >= self.vocab_size:
            raise PrepError(
                errors.INPUT_VALUE,
                self.path,
                f"makes the token {documents.tokens.max()} of a text, but the model's vocab_size is {self.model_vocab}; "
                "leave out of the records what it writes as that",
            )

    def encode(self, examples):
        """(Documents of `examples`, all Example or all Encoded; how many tokens of each reach over the border of a learned
        part)."""
        groups = np.array([example.group for example in examples], dtype=np.int64)
        if examples and isinstance(examples[0], Encoded):
            lengths = np.array([len(example.tokens) for example in examples], dtype=np.int64)
            tokens = np.concatenate([example.tokens for example in examples]).astype("<u4")
            learned = np.concatenate([example.learned for example in examples])
            return Documents(tokens, learned, lengths, groups), np.zeros(len(examples), dtype=np.int64)
        prompts = [example.prompt for example in examples if example.prompt is not None]
        pieces = Pieces(self, [example.text for example in examples] + prompts)
        ranges, straddling = pieces.learned_ranges(examples)
        borders = pieces.text_borders[: len(examples) + 1]
        tokens, begins, ends = pieces.tokens(borders[-1]), borders[:-1], borders[1:]
        learned = covered(len(tokens), ranges)
        with_bos = np.array([example.with_bos for example in examples], dtype=bool)
        with_eos = np.array([example.with_eos for example in examples], dtype=bool)
        lengths = ends - begins
        if with_eos.any():
            at = ends[with_eos]
            tokens, learned = np.insert(tokens, at, self.eos), np.insert(learned, at, True)
            begins = begins + np.cumsum(with_eos) - with_eos
            lengths = lengths + with_eos
        if self.bos:
            with_bos &= ~begins_with(self.bos, tokens, begins, lengths)
        if with_bos.any() and self.bos:
            at = np.repeat(begins[with_bos], len(self.bos))
            tokens = np.insert(tokens, at, np.tile(self.bos, int(with_bos.sum())))
            learned = np.insert(learned, at, False)
            lengths = lengths + len(self.bos) * with_bos
        return Documents(tokens.astype("<u4"), learned, lengths, groups), straddling

    def decode_table(self):
        """(offsets, bytes): the bytes that each id stands for."""
        to_bytes = bytes_of_token(self.path, self.description.get("decoder"))
        pieces = [b""] * self.vocab_size
        for token, i in self.rust.get_vocab(with_added_tokens=False).items():
            pieces[i] = to_bytes(token)
        for text, i in self.added.items():
            if i < self.vocab_size:
                pieces[i] = text.encode("utf-8")
        offsets = np.zeros(self.vocab_size + 1, dtype=np.int64)
        np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
        return offsets, np.frombuffer(b"".join(pieces), dtype=np.uint8)


def begins_with(head, tokens, begins, lengths):
    """Which documents begin with the ids `head` already: text that was decoded has the tokenizer's first token in it."""
    same = lengths >= len(head)
    for k, number in enumerate(head):
        same[same] = tokens[begins[same] + k] == number
    return same


def covered(count, ranges):
    """An array of bool that is true inside the [begin, end) of `ranges`, an array of two columns."""
    steps = np.bincount(ranges[:, 0], minlength=count + 1) - np.bincount(ranges[:, 1], minlength=count + 1)
    return np.cumsum(steps)[:count] > 0


class Numbers(dict):
    """The number of each text. One that is asked for the first time gets the next number and is noted in `new`."""

    def __init__(self):
        super().__init__()
        self.new = []

    def __missing__(self, text):
        self[text] = number = len(self)
        self.new.append(text)
        return number


class Known:
    """Texts that have been encoded: the ids of the text with number k are flat[starts[k] : starts[k + 1]]."""

    def __init__(self):
        self.number = Numbers()
        self.parts = {}  # ids of what chunks are made of
        self.flat = np.zeros(1 << 12, dtype=np.uint32)
        self.starts = np.zeros(1 << 12, dtype=np.int64)
        self.chars = np.zeros(1 << 12, dtype=np.int64)  # characters of each text

    def add(self, ids):
        """Takes the ids of every new text."""
        new, count = self.number.new, len(self.number)
        first = count - len(new)
        begin = int(self.starts[first])
        ends = begin + np.cumsum([len(some) for some in ids], dtype=np.int64)
        self.starts = with_room(self.starts, count + 1)
        self.starts[first + 1 : count + 1] = ends
        self.chars = with_room(self.chars, count)
        self.chars[first:count] = [len(text) for text in new]
        self.flat = with_room(self.flat, int(ends[-1]))
        self.flat[begin : ends[-1]] = list(chain.from_iterable(ids))
        new.clear()


def with_room(array, count):
    """`array`, or a longer copy, so that it has `count` elements."""
    if count <= len(array):
        return array
    longer = np.zeros(max(count, 2 * len(array)), dtype=array.dtype)
    longer[: len(array)] = array
    return longer


class Pieces:
    """The texts of a batch, cut into pieces whose ids one after the other are the text's."""

    def __init__(self, tokenizer, texts):
        self.rust = tokenizer.rust
        self.encodings = {}
        if tokenizer.cut:
            if len(tokenizer.known.number) > KNOWN_LIMIT:
                tokenizer.known = Known()
            self.known = tokenizer.known
            self.lay_out([tokenizer.cut(text) for text in texts], tokenizer)
            self.compare(tokenizer, texts)
        if not tokenizer.cut:
            self.known = Known()
            self.lay_out([[text] for text in texts], tokenizer)

    def lay_out(self, cuts, tokenizer):
        """Numbers the pieces of all texts and finds where their tokens and characters lie."""
        self.pieces = list(chain.from_iterable(cuts))
        number = self.known.number
        self.numbers = np.fromiter(map(number.__getitem__, self.pieces), np.int64, len(self.pieces))
        if number.new:
            self.known.add(self.encode(number.new, tokenizer))
        starts = self.known.starts
        self.lengths = starts[self.numbers + 1] - starts[self.numbers]
        # Tokens and characters before each piece of the batch, and before each text.
        first_pieces = sums([len(pieces) for pieces in cuts])
        self.before, self.chars_before = sums(self.lengths), sums(self.known.chars[self.numbers])
        self.text_borders, self.text_chars = self.before[first_pieces], self.chars_before[first_pieces]

    def encode(self, pieces, tokenizer):
        """The ids of each piece: of texts one by one, of chunks by their parts, of which few are new."""
        if not tokenizer.cut:
            encodings = self.rust.encode_batch(pieces, add_special_tokens=False)
            self.encodings.update(zip(pieces, encodings))
            return [encoding.ids for encoding in encodings]
        parts = [tokenizer.cut.parts(piece) for piece in pieces]
        known = self.known.parts
        self.learn(sorted(set(chain.from_iterable(parts)).difference(known)), tokenizer)
        return [list(chain.from_iterable(map(known.__getitem__, some))) for some in parts]

    def learn(self, parts, tokenizer):
        """Encodes parts of chunks: many in one text, as a call each would cost more than the encoding. An added token keeps
        them apart."""
        known, added = self.known.parts, tokenizer.added
        known.update((part, [added[part]]) for part in parts if part in added)
        parts = [part for part in parts if part not in added]
        separator, number = next(iter(added.items()))
        groups = [parts[i : i + JOINED_PARTS] for i in range(0, len(parts), JOINED_PARTS)]
        for group, ids in zip(groups, self.encode_fast([separator.join(group) for group in groups])):
            ends = [i for i, token in enumerate(ids) if token == number] + [len(ids)]
            begins = [0] + [end + 1 for end in ends[:-1]]
            found = [ids[b:e] for b, e in zip(begins, ends)]
            if len(found) != len(group):  # the separator was not taken as one
                found = [self.rust.encode(part, add_special_tokens=False).ids for part in group]
            known.update(zip(group, found))

    def encode_fast(self, texts):
        encodings = self.rust.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def compare(self, tokenizer, texts):
        """Gives up cutting, for good, if it changed the ids of one of the first texts."""
        sample = texts[: max(COMPARED_TEXTS - tokenizer.compared, 0)]
        if not sample:
            return
        tokenizer.compared += len(sample)
        whole = self.rust.encode_batch(sample, add_special_tokens=False)
        want = list(chain.from_iterable([encoding.ids for encoding in whole]))
        lengths = np.diff(self.text_borders)[: len(sample)].tolist()
        same = lengths == [len(encoding.ids) for encoding in whole]
        if not same or self.tokens(len(want)).tolist() != want:
            tokenizer.cut = None

    def tokens(self, count):
        """The first `count` tokens of all texts."""
        starts = self.known.starts[self.numbers]
        places = np.repeat(starts - self.before[:-1], self.lengths)[:count]
        return self.known.flat[places + np.arange(len(places))]

    def learned_ranges(self, examples):
        """([begin, end) in the tokens of all texts, how many tokens of each example straddle); the texts begin with the
        examples'."""
        spans = [(k, *span) for k, example in enumerate(examples) for span in example.spans]
        texts, first, last = np.array(spans, dtype=np.int64).reshape(-1, 3).T
        begin_before, begin_until = self.places(self.text_chars[texts] + first)
        end_before, end_until = self.places(self.text_chars[texts] + last)
        straddling = begin_until - begin_before + end_until - end_before
        straddling = np.bincount(texts, straddling, len(examples)).astype(np.int64)
        # Behind a prompt: both texts begin with the same tokens of the tokenizer's own, so only the rest is counted.
        prompted = np.array([example.prompt is not None for example in examples], dtype=bool).nonzero()[0]
        prompts = np.diff(self.text_borders[len(examples) :])
        begins = np.concatenate([begin_until, self.text_borders[prompted] + prompts])
        ends = np.concatenate([end_before, self.text_borders[prompted + 1]])
        return np.stack([begins, ends], axis=1)[begins < ends], straddling

    def places(self, borders):
        """As `tokens_around`, for characters of all texts, with the tokens before their pieces counted."""
        pieces = np.searchsorted(self.chars_before, borders, side="right") - 1
        before, inside = self.before[pieces], borders - self.chars_before[pieces]
        until = before.copy()
        for i in np.flatnonzero(inside).tolist():
            piece = self.pieces[pieces[i]]
            if piece not in self.encodings:
                self.encodings[piece] = self.rust.encode(piece, add_special_tokens=False)
            around = tokens_around(self.encodings[piece], int(inside[i]))
            before[i] += around[0]
            until[i] += around[1]
        return before, until


def sums(counts):
    """The sums of the first 0, 1, 2, ... `counts`."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def tokens_around(encoding, border):
    """(number of tokens that end at or before the character `border`, number of those that begin before it). Where the
    numbers differ, a token reaches over the border."""
    k = encoding.char_to_token(border)
    if k is None:  # no token stands for this character
        offsets = encoding.offsets
        return sum(end <= border for _, end in offsets), sum(begin < border for begin, _ in offsets)
    until = k
    while until < len(encoding) and encoding.token_to_chars(until)[0] < border:
        until += 1
    return k, until


KNOWN_LIMIT = 1 << 20  # chunks that are kept
JOINED_PARTS = 256
COMPARED_TEXTS = 64
STRETCHES_LIMIT = 4096
STRETCH_LIMIT_CHARS = 1 << 13

# Where the two families of byte-level BPE cut in any case, written for `findall`. A run of white space W before a word S
# is what has to be looked at. GPT-2 takes the last space of W to S, or else sets its last character apart, and W never
# joins what comes before it. Before digits, some cut first, so there W and S stay together.
# Llama 3 and Qwen end a token behind the last line break of W, and marks take the line breaks behind them in.
SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
WORD = SPACE.replace("[", "[^", 1)
NO_DIGIT = "[!-/:-~]"
GPT2_CHUNKS = re.compile(
    f" ?{WORD}+|{SPACE}+(?= {NO_DIGIT})|{SPACE}+(?={SPACE}{NO_DIGIT})|{SPACE}(?={NO_DIGIT})|{SPACE}+{WORD}*"
)
BREAKS = rf"(?:(?<=[^A-Za-z0-9]){SPACE}*[\r\n]+)?"
LLAMA3_CHUNKS = re.compile(
    rf" ?{WORD}+{BREAKS}|{SPACE}*[\r\n]+|{SPACE}+(?= {WORD})|{SPACE}+{WORD}*{BREAKS}"
)
# The regular expressions of the pre-tokenizers themselves. Llama 3's and Qwen's differ in how many digits make a token.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Cutter:
    """Cuts a text into chunks that can be encoded alone, and a chunk into parts that can."""

    def __init__(self, added, chunks, pattern):
        longest_first = sorted(added, key=len, reverse=True)
        self.split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split
        self.added = frozenset(added)
        self.find = chunks.findall
        self.find_parts = in_ascii(pattern).findall
        self.stretches = set()  # the first ones between added tokens
        self.common = set()  # those that came again, as a system prompt: each is one chunk

    def __call__(self, text):
        stretches = self.split(text)  # text, added token, text, ...
        if len(stretches) == 1:
            return self.find(text)
        pieces = []
        for i, stretch in enumerate(stretches):
            if i % 2 or stretch in self.common:
                pieces.append(stretch)
            elif stretch:
                pieces.extend(self.find(stretch))
                if len(self.stretches) < STRETCHES_LIMIT and len(stretch) < STRETCH_LIMIT_CHARS:
                    self.note(stretch)
        return pieces

    def note(self, stretch):
        if stretch in self.stretches:
            self.common.add(stretch)
        self.stretches.add(stretch)

    def parts(self, chunk):
        """What the pre-tokenizer cuts a chunk into. That is known of ASCII alone: what is a letter elsewhere, each version of
        Unicode decides anew."""
        return self.find_parts(chunk) if chunk.isascii() and chunk not in self.added else [chunk]


def in_ascii(pattern):
    """A pre-tokenizer's regular expression for texts of ASCII."""
    pattern = pattern.replace(r"\p{L}\p{N}]", "A-Za-z0-9]")
    return re.compile(pattern.replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]"), re.ASCII)


def cutter_of(rust, description):
    """The Cutter of a tokenizer; None where what it does is not certain: added tokens that take in their neighbours, other
    pre-tokenizers than the known ones, merges left out at random."""
    added = list(rust.get_added_tokens_decoder().values())
    model = description.get("model")
    known = patterns_of(description.get("pre_tokenizer"))
    safe = (
        known
        and added
        and not any(t.lstrip or t.rstrip or t.single_word or t.normalized or not t.content for t in added)
        and isinstance(model, dict)
        and model.get("type") == "BPE"
        and not model.get("dropout")
        and kinds_of(description.get("normalizer"), "normalizers") <= {"NFC"}
    )
    return Cutter([token.content for token in added], *known) if safe else None


def patterns_of(pre_tokenizer):
    """(the regular expression that finds chunks, the pattern of the pre-tokenizer), or None where it is not a known one."""
    if not isinstance(pre_tokenizer, dict):
        return None
    steps = [pre_tokenizer]
    if pre_tokenizer.get("type") == "Sequence":
        steps = pre_tokenizer.get("pretokenizers", [])
    last = steps[-1] if steps else {}
    if len(steps) > 2 or last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    first = steps[0]
    if last.get("use_regex", True):
        if len(steps) == 1:
            return GPT2_CHUNKS, GPT2_PATTERN
        if first.get("type") != "Digits":
            return None
        # Digits are set apart before the pattern sees the text, so white space ends before them.
        digits = r"\p{N}" if first.get("individual_digits") else r"\p{N}+"
        return GPT2_CHUNKS, GPT2_PATTERN.replace(r" ?\p{N}+", digits).replace(r"(?!\S)", r"(?![^\s0-9])")
    pattern = first.get("pattern", {})
    if first.get("type") != "Split" or not isinstance(pattern, dict):
        return None
    regex = pattern.get("Regex", "")
    known = regex.replace("{1,3}", "") == LLAMA3_PATTERN
    known = known and first.get("behavior") == "Isolated" and not first.get("invert")
    return (LLAMA3_CHUNKS, regex) if known else None


def kinds_of(step, key):
    """The types of a step of tokenizer.json, or of the steps that it is a sequence of."""
    if not isinstance(step, dict):
        return set()
    if step.get("type") != "Sequence":
        return {step.get("type")}
    return set().union(*(kinds_of(inner, key) for inner in step.get(key, [])))


def bytes_of_token(path, decoder):
    """The function from a vocabulary entry to its bytes, by the kind of decoder in tokenizer.json."""
    kinds = decoder_kinds(decoder)
    if "ByteLevel" in kinds:
        return byte_level_bytes
    if kinds & {"Metaspace", "ByteFallback", "Replace"}:
        return metaspace_bytes
    raise PrepError(
        errors.INPUT_UNKNOWN,
        path,
        f"the decoder {json.dumps(decoder)[:80]} is not known; known are "
        "byte-level BPE and SentencePiece-like tokenizers",
    )


def decoder_kinds(decoder):
    if not isinstance(decoder, dict):
        return set()
    return {decoder.get("type")} | {step.get("type") for step in decoder.get("decoders", [])}


def byte_level_table():
    """Byte-level BPE writes each byte as a printable character: itself where printable, else 256, 257, ... This is the
    table for str.translate, from these characters to those of Latin-1, and from all other of Latin-1 to none of it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{byte: byte for byte in printable},
        **{byte: 0x2603 for byte in others},
        **{256 + i: byte for i, byte in enumerate(others)},
    }


BYTE_LEVEL = byte_level_table()


def byte_level_bytes(token):
    """The bytes of a token of byte-level BPE; of one that is not written in its alphabet, the text."""
    try:
        return token.translate(BYTE_LEVEL).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8")


def metaspace_bytes(token):
    """SentencePiece: U+2581 stands for a space, <0xHH> for a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace("\u2581", " ").encode("utf-8")
