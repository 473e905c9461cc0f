"""Which documents go where: the held-out part, and how often the documents of each file are taken.

All documents of a record stay together. Where a part of the records is asked for, SHA-256 of the seed and of their numbers
chooses it, so that the choice depends on no library.
"""

import hashlib

import numpy as np
import xxhash

from . import errors
from .errors import PrepError
from .tokenfile import ranges
from .tokens import Documents


def split_off(documents, fraction, seed):
    """(kept, held out), each in the order of the input. All documents of a record go to one side."""
    if not fraction:
        return documents, None
    records, record_of = np.unique(documents.groups, return_inverse=True)
    count = max(1, round(len(records) * fraction))
    if count >= len(records):
        raise PrepError(
            errors.INPUT_VALUE, "--eval-fraction", f"leaves nothing of {len(records)} records"
        )
    held = np.zeros(len(records), dtype=bool)
    held[by_hash(range(len(records)), seed)[:count]] = True
    held = held[record_of]
    return selected(documents, ~held), selected(documents, held)


def fingerprints(documents):
    """A number for each document, by which those of the same tokens and mask are known."""
    ends = np.cumsum(documents.lengths)
    marks = np.empty(len(documents), dtype=np.uint64)
    if not len(marks):  # of nothing there is no memoryview
        return marks
    tokens, learned = memoryview(documents.tokens).cast("B"), memoryview(documents.learned).cast("B")
    size = documents.tokens.itemsize
    for i, (begin, end) in enumerate(zip((ends - documents.lengths).tolist(), ends.tolist())):
        seed = xxhash.xxh3_64_intdigest(learned[begin:end])
        marks[i] = xxhash.xxh3_64_intdigest(tokens[size * begin : size * end], seed)
    return marks


def by_hash(numbers, salt):
    """The places of `numbers` in an order that they and the salt alone decide."""
    return sorted(
        range(len(numbers)), key=lambda i: hashlib.sha256(f"{salt}:{numbers[i]}".encode()).digest()
    )


def taken(documents, sources, times, seed):
    """The documents of each source, as often as `times` says of its path, or once: a Documents for each."""
    parts, first, begin = [], 0, 0
    for source in sources:
        end = int(np.searchsorted(documents.groups, first + source.records))
        which = slice(begin, end)
        if source.path in times:
            which = begin + passes(documents.groups[which] - first, times[source.path], seed)
        parts.append(selected(documents, which))
        first, begin = first + source.records, end
    return parts


def passes(records, times, seed):
    """The numbers of documents that are taken so many times; `records`: those of their records. Pass follows pass, so that
    packing in order does not put a document beside its like."""
    distinct, record_of = np.unique(records, return_inverse=True)
    if not len(distinct):
        return np.zeros(0, dtype=np.int64)
    whole, more = divmod(max(1, round(len(distinct) * times)), len(distinct))
    once_more = np.zeros(len(distinct), dtype=bool)
    if more:
        once_more[by_hash(distinct.tolist(), f"take:{seed}")[:more]] = True
    return np.concatenate([np.tile(np.arange(len(records)), whole), np.flatnonzero(once_more[record_of])])


def selected(documents, which):
    """The documents of a mask, of a slice, or of numbers, which may come again."""
    if isinstance(which, np.ndarray) and which.dtype == bool:
        chosen = np.repeat(which, documents.lengths)  # a byte a token, of which there may be billions; numbers are 24
    else:
        ends = np.cumsum(documents.lengths)
        chosen = ranges((ends - documents.lengths)[which], ends[which])
    return Documents(
        documents.tokens[chosen],
        documents.learned[chosen],
        documents.lengths[which],
        documents.groups[which],
    )
