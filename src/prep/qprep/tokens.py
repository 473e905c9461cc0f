"""Text to token ids with a mask of what is learned, by the model's own tokenizer.json.

The whole text of an example is encoded at once and the mask follows from each token's place in the text, so the ids are
those that any other program gets for that text. A token that reaches over the border of a learned part is not learned.
"""

import hashlib
import json
import os
from dataclasses import dataclass

import numpy as np
import tokenizers

from . import errors
from .errors import PrepError
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


@dataclass
class Document:
    """One encoded document."""

    tokens: np.ndarray  # uint32
    learned: np.ndarray  # bool, per token


class Tokenizer:
    """tokenizer.json of a model directory, checked against the model's vocabulary."""

    def __init__(self, model_dir):
        self.path = os.path.join(model_dir, "tokenizer.json")
        if not os.path.isfile(self.path):
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
        self.bos = np.array(whole, dtype=np.uint32)
        # Special tokens are added here, and offsets must cover the whole text, spaces included.
        self.rust.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)

    def check_ids(self, model_dir):
        config = os.path.join(model_dir, "config.json")
        model_vocab = read_json(config).get("vocab_size")
        if not isinstance(model_vocab, int) or not 0 < model_vocab <= LARGEST_ID:
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
        if os.path.exists(config_path):
            text = token_text(read_json(config_path).get("eos_token"))
            if text is not None and self.rust.token_to_id(text) is not None:
                return self.rust.token_to_id(text)
        eos = read_json(os.path.join(model_dir, "config.json")).get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        return eos if isinstance(eos, int) and 0 <= eos < self.vocab_size else None

    def special_texts(self):
        """Literal texts of the special tokens."""
        return [
            token.content
            for token in self.rust.get_added_tokens_decoder().values()
            if token.special
        ]

    def encode(self, examples):
        """Documents of `examples`, and how many tokens reached over the border of a learned part."""
        encoded = self.rust.encode_batch(
            [example.text for example in examples], add_special_tokens=False
        )
        documents, straddling = [], 0
        for example, encoding in zip(examples, encoded):
            tokens = np.array(encoding.ids, dtype=np.uint32)
            learned, over = learned_mask(encoding, example)
            if example.with_bos:
                tokens = np.concatenate([self.bos, tokens])
                learned = np.concatenate([np.zeros(len(self.bos), dtype=bool), learned])
            if example.with_eos:
                tokens = np.append(tokens, np.uint32(self.eos))
                learned = np.append(learned, True)
            documents.append(Document(tokens, learned))
            straddling += over
        return documents, straddling

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


def learned_mask(encoding, example):
    """(mask, straddling count) of the tokens that lie inside the example's spans."""
    if example.spans == [(0, len(example.text))]:
        return np.ones(len(encoding.ids), dtype=bool), 0
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    begin, end = offsets[:, 0], offsets[:, 1]
    learned, straddling = np.zeros(len(begin), dtype=bool), 0
    for first, last in example.spans:
        inside = (begin >= first) & (end <= last) & (begin < last) & (end > first)
        straddling += int(np.count_nonzero((begin < last) & (end > first) & ~inside))
        learned |= inside
    return learned, straddling


def bytes_of_token(path, decoder):
    """The function from a vocabulary entry to its bytes, by the kind of decoder in tokenizer.json."""
    kinds = decoder_kinds(decoder)
    if "ByteLevel" in kinds:
        table = byte_level_table()
        return lambda token: (
            bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        )
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
    """Byte-level BPE writes each byte as a printable character: itself where printable, else 256, 257, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + i): byte for i, byte in enumerate(others)},
    }


def metaspace_bytes(token):
    """SentencePiece: U+2581 stands for a space, <0xHH> for a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace("\u2581", " ").encode("utf-8")
