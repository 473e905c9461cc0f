"""Text to token ids with a mask of what is learned, by the model's own tokenizer.json.

The ids are those that the tokenizer gives for the whole text of an example, and the mask follows from each token's place
in the text. A token that reaches over the border of a learned part is not learned.

Most of the time goes into the tokenizer, so what it has encoded is kept. Byte-level BPE never joins what its pre-tokenizer
has cut, and that cuts a text at special tokens and before most words. Where that is certain (`cutter_of`), a text is taken
as chunks of about a word, and only chunks that have not come up yet are encoded. Other tokenizers encode whole texts. That
both ways give the same ids is tested, and checked again on the first texts of every run.
"""

import collections
import hashlib
import itertools
import json
import os
import re
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import tokenizers

from . import errors
from .errors import PrepError, quoted
from .files import read_json
from .template import token_text

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
        ids = self.rust.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        self.check_ids(model_dir)
        self.eos = self.find_eos(model_dir)
        whole = [i for i in self.rust.encode("", add_special_tokens=True).ids if i != self.eos]
        self.bos = whole
        # Special tokens are added here, and offsets must cover the whole text, spaces included.
        self.rust.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        self.cut = cutter_of(self.rust, self.description)  # text -> chunks, or None
        self.added = {t.content: i for i, t in self.rust.get_added_tokens_decoder().items()}
        self.known = Known()
        self.byte_lengths = None
        self.compared = 0  # texts that were encoded both ways

    def check_ids(self, model_dir):
        known = {}
        for token, number in self.rust.get_vocab(with_added_tokens=True).items():
            if known.setdefault(number, token) != token:
                raise PrepError(
                    errors.INPUT_VALUE,
                    self.path,
                    f"the id {number} belongs to two tokens, {quoted(known[number])} and {quoted(token)}",
                )
        config = os.path.join(model_dir, "config.json")
        model_vocab = read_json(config).get("vocab_size")
        if type(model_vocab) is not int or not 0 < model_vocab <= LARGEST_ID:
            raise PrepError(
                errors.INPUT_VALUE, config, f"vocab_size={model_vocab} must be 1..{LARGEST_ID}"
            )
        if not 0 < self.vocab_size <= model_vocab:
            raise PrepError(
                errors.INPUT_VALUE,
                self.path,
                f"the largest token id is {self.vocab_size - 1}, but the "
                f"model's vocab_size is {model_vocab}; the tokenizer belongs to another model",
            )

    def find_eos(self, model_dir):
        """The id that ends a document: eos_token of the tokenizer, else eos_token_id of the model."""
        config_path = os.path.join(model_dir, "tokenizer_config.json")
        if os.path.lexists(config_path):
            text = token_text(read_json(config_path).get("eos_token"))
            if text is not None and self.rust.token_to_id(text) is not None:
                return self.rust.token_to_id(text)
        eos = read_json(os.path.join(model_dir, "config.json")).get("eos_token_id")
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

    def encode(self, examples):
        """Documents of `examples`, all Example or all Encoded, and how many tokens reached over the border of a learned
        part."""
        groups = np.array([example.group for example in examples], dtype=np.int64)
        if examples and isinstance(examples[0], Encoded):
            lengths = np.array([len(example.tokens) for example in examples], dtype=np.int64)
            tokens = np.concatenate([example.tokens for example in examples]).astype("<u4")
            learned = np.concatenate([example.learned for example in examples])
            return Documents(tokens, learned, lengths, groups), 0
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
        if with_bos.any() and self.bos:
            at = np.repeat(begins[with_bos], len(self.bos))
            tokens = np.insert(tokens, at, np.tile(self.bos, int(with_bos.sum())))
            learned = np.insert(learned, at, False)
            lengths = lengths + len(self.bos) * with_bos
        return Documents(tokens.astype("<u4"), learned, lengths, groups), straddling

    def lengths(self):
        """Bytes that each id stands for."""
        if self.byte_lengths is None:
            self.byte_lengths = np.diff(self.decode_table()[0])
        return self.byte_lengths

    def decode_table(self):
        """(offsets, bytes): the bytes that each id stands for."""
        to_bytes = bytes_of_token(self.path, self.description.get("decoder"))
        pieces = [b""] * self.vocab_size
        for token, i in self.rust.get_vocab(with_added_tokens=False).items():
            pieces[i] = to_bytes(token)
        for i, token in self.rust.get_added_tokens_decoder().items():
            pieces[i] = token.content.encode("utf-8")
        offsets = np.zeros(self.vocab_size + 1, dtype=np.int64)
        np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
        return offsets, np.frombuffer(b"".join(pieces), dtype=np.uint8)


def covered(count, ranges):
    """An array of bool that is true inside the [begin, end) of `ranges`."""
    steps = np.bincount(ranges[:, 0], minlength=count + 1) - np.bincount(ranges[:, 1], minlength=count + 1)
    return np.cumsum(steps)[:count] > 0


class Known:
    """Texts that have been encoded, numbered as they came up: text k has the ids flat[starts[k] : starts[k + 1]]."""

    def __init__(self):
        self.number = collections.defaultdict(itertools.count().__next__)
        self.flat = np.zeros(1 << 12, dtype=np.uint32)
        self.starts = np.zeros(1 << 12, dtype=np.int64)
        self.chars = np.zeros(1 << 12, dtype=np.int64)  # characters of each text

    def numbers(self, texts):
        """(the numbers of `texts`, those of them that are new in the order of their numbers): the new ones are to be added."""
        first = len(self.number)
        numbers = np.fromiter(map(self.number.__getitem__, texts), np.int64, len(texts))
        return numbers, list(islice(reversed(self.number), len(self.number) - first))[::-1]

    def add(self, texts, ids):
        """The newest texts and the ids of each."""
        end = len(self.number)
        first = end - len(texts)
        self.chars = with_room(self.chars, end)
        self.chars[first:end] = list(map(len, texts))
        self.starts = with_room(self.starts, end + 1)
        begin = int(self.starts[first])
        self.starts[first + 1 : end + 1] = begin + np.cumsum(list(map(len, ids)), dtype=np.int64)
        self.flat = with_room(self.flat, int(self.starts[end]))
        self.flat[begin : self.starts[end]] = list(chain.from_iterable(ids))


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
        """Numbers the pieces of all texts and finds where their characters and tokens lie."""
        known = self.known
        self.flat = list(chain.from_iterable(cuts))
        self.numbers, new = known.numbers(self.flat)
        if new:
            known.add(new, self.learned(new, tokenizer))
        self.starts = known.starts[self.numbers]
        self.lengths = known.starts[self.numbers + 1] - self.starts
        # Tokens and characters before each piece of the batch, and before each text.
        self.before = sums(self.lengths)
        self.chars_before = sums(known.chars[self.numbers])
        first_pieces = sums(list(map(len, cuts)))
        self.text_borders = self.before[first_pieces]
        self.text_chars = self.chars_before[first_pieces]

    def learned(self, pieces, tokenizer):
        """The ids of each piece: of texts one by one, but of chunks many in one text, as a call each would cost more than
        the encoding. Words stand in a text as they do in any, and the lengths of its tokens tell which are whose; what is
        no word, or does not come out even, is kept apart by an added token."""
        if not tokenizer.cut:
            encodings = self.rust.encode_batch(pieces, add_special_tokens=False)
            self.encodings.update(zip(pieces, encodings))
            return [encoding.ids for encoding in encodings]
        added = tokenizer.added
        found = {piece: [added[piece]] for piece in pieces if piece in added}
        words = [piece for piece in pieces if PLAIN_WORD.fullmatch(piece)]
        others = [piece for piece in pieces if not PLAIN_WORD.fullmatch(piece) and piece not in added]
        groups = [words[i : i + JOINED_CHUNKS] for i in range(0, len(words), JOINED_CHUNKS)]
        for group, ids in zip(groups, self.encode_fast(["".join(group) for group in groups])):
            of_words = split_by_lengths(group, np.array(ids, dtype=np.int64), tokenizer.lengths())
            if of_words is None:
                others.extend(group)
            else:
                found.update(zip(group, of_words))
        separator, number = next(iter(added.items()))
        groups = [others[i : i + JOINED_CHUNKS] for i in range(0, len(others), JOINED_CHUNKS)]
        for group, ids in zip(groups, self.encode_fast([separator.join(group) for group in groups])):
            ends = [i for i, token in enumerate(ids) if token == number] + [len(ids)]
            begins = [0] + [end + 1 for end in ends[:-1]]
            if len(ends) == len(group):
                found.update((p, ids[b:e]) for p, b, e in zip(group, begins, ends))
            else:  # the separator was not taken as one
                found.update((p, self.rust.encode(p, add_special_tokens=False).ids) for p in group)
        return [found[piece] for piece in pieces]

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
        places = np.repeat(self.starts - self.before[:-1], self.lengths)[:count]
        return self.known.flat[places + np.arange(len(places))]

    def learned_ranges(self, examples):
        """([begin, end) in the tokens of all texts, how many tokens straddle); the texts begin with the examples'."""
        borders = self.text_borders
        prompts = [k for k, example in enumerate(examples) if example.prompt is not None]
        # Both texts begin with the same tokens of the tokenizer's own, so only the rest is counted.
        begins = borders[prompts] + np.diff(borders[len(examples) :])
        ranges = np.stack([begins, borders[1:][prompts]], axis=1)
        spans = [(k, *span) for k, example in enumerate(examples) if example.prompt is None for span in example.spans]
        texts, firsts, lasts = np.array(spans, dtype=np.int64).reshape(-1, 3).T
        first_before, first_until = self.places(self.text_chars[texts] + firsts)
        last_before, last_until = self.places(self.text_chars[texts] + lasts)
        straddling = (first_until - first_before).sum() + (last_until - last_before).sum()
        ranges = np.concatenate([ranges, np.stack([first_until, last_before], axis=1)])
        return ranges[ranges[:, 0] < ranges[:, 1]], int(straddling)

    def places(self, borders):
        """As `tokens_around`, for characters of all texts one after the other."""
        pieces = np.searchsorted(self.chars_before, borders)
        before = self.before[pieces]
        until = before.copy()
        for k in np.flatnonzero(self.chars_before[pieces] != borders).tolist():
            i = int(pieces[k]) - 1  # the border lies inside of this piece
            piece = self.flat[i]
            if piece not in self.encodings:
                self.encodings[piece] = self.rust.encode(piece, add_special_tokens=False)
            around = tokens_around(self.encodings[piece], int(borders[k] - self.chars_before[i]))
            before[k], until[k] = self.before[i] + around[0], self.before[i] + around[1]
        return before, until


def sums(values):
    """0 and the sums of the first 1, 2, ... of `values`."""
    return np.concatenate([[0], np.cumsum(values, dtype=np.int64)])


def split_by_lengths(words, ids, lengths):
    """The ids of each word of a text, from the bytes that its tokens stand for; None where they do not end with the words."""
    ends = np.cumsum([len(word.encode("utf-8")) for word in words])
    tokens_end = np.cumsum(lengths[ids])
    last = np.searchsorted(tokens_end, ends)
    if not len(ids) or last[-1] != len(ids) - 1 or (tokens_end[last] != ends).any():
        return None
    flat, borders = ids.tolist(), (last + 1).tolist()
    return [flat[begin:end] for begin, end in zip([0, *borders], borders)]


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
JOINED_CHUNKS = 256
COMPARED_TEXTS = 64

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
PLAIN_WORD = re.compile(f" {WORD}+")  # a chunk of both, wherever it stands behind a word
LLAMA3_CHUNKS = re.compile(
    rf" ?{WORD}+{BREAKS}|{SPACE}*[\r\n]+|{SPACE}+(?= {WORD})|{SPACE}+{WORD}*{BREAKS}"
)


# The same for texts of which the only white space is space and line break, as most are: `replace` takes a third of the time
# that `findall` does. It sets a NUL, which no text holds, where a text may be cut, and takes it away inside of white space.
# Here W stays with the word behind it unless it is one line break, and a piece may be empty.
def gpt2_pieces(text):
    text = text.replace("\n", "\0\n\0").replace(" ", "\0 ").replace("\0\0", "").replace(" \0", " ")
    return text.replace("\n\n\0", "\n\n").replace(" \n\0", " \n").split("\0")


def llama3_pieces(text):
    if " \n" in text:  # W is one up to its last line break
        return LLAMA3_CHUNKS.findall(text)
    text = text.replace("\n", "\n\0").replace("\0\n", "\n").replace(" ", "\0 ").replace(" \0", " ")
    return text.split("\0")


OTHER_SPACE = re.compile(SPACE.replace(r"\t-\r ", r"\t\x0b-\r"))
# Llama 3's and Qwen's regular expression, which differ only in how many digits make a token. GPT-2's is in ByteLevel.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def cutter_of(rust, description):
    """The function that cuts a text into chunks which can be encoded alone; None where that is not certain: added tokens
    that take in their neighbours, other pre-tokenizers than the known ones, merges left out at random."""
    added = list(rust.get_added_tokens_decoder().values())
    model = description.get("model")
    family = family_of(description.get("pre_tokenizer"))
    safe = (
        family
        and added
        and not any(t.lstrip or t.rstrip or t.single_word or t.normalized or not t.content for t in added)
        and isinstance(model, dict)
        and model.get("type") == "BPE"
        and not model.get("dropout")
        and kinds_of(description.get("normalizer"), "normalizers") <= {"NFC"}
    )
    if not safe:
        return None
    longest_first = sorted((token.content for token in added), key=len, reverse=True)
    split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split
    literals = frozenset(longest_first)
    chunks, quick_pieces = family
    before = frozenset()  # the parts of the text before

    def cut(text):
        nonlocal before
        find = chunks.findall if OTHER_SPACE.search(text) else quick_pieces
        parts, pieces = split(text), []  # text, added token, text, ...
        for part in parts:
            # What a chat template writes into each text is worth no cut.
            if part in before or part in literals:
                pieces.append(part)
            else:
                pieces.extend(find(part))
        before = frozenset(parts)
        return pieces

    return cut


def family_of(pre_tokenizer):
    """(regular expression that finds chunks, function that cuts texts of plain white space) for a pre-tokenizer, or None
    where it is not one of the known ones."""
    if not isinstance(pre_tokenizer, dict):
        return None
    steps = [pre_tokenizer]
    if pre_tokenizer.get("type") == "Sequence":
        steps = pre_tokenizer.get("pretokenizers", [])
    last = steps[-1] if steps else {}
    if len(steps) > 2 or last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        return (GPT2_CHUNKS, gpt2_pieces) if len(steps) == 1 or steps[0].get("type") == "Digits" else None
    first = steps[0]
    pattern = first.get("pattern", {})
    if first.get("type") != "Split" or not isinstance(pattern, dict):
        return None
    known = pattern.get("Regex", "").replace("{1,3}", "") == LLAMA3_PATTERN
    safe = known and first.get("behavior") == "Isolated" and not first.get("invert")
    return (LLAMA3_CHUNKS, llama3_pieces) if safe else None


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
