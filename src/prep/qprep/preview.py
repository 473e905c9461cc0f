"""Prints sequences as text with what is not learned set apart: dimmed on a terminal, in ⟦⟧ elsewhere."""

import sys

import numpy as np

from .tokenfile import IGNORED

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def show(arrays, table, count, out=None):
    """The first `count` sequences; a document border inside a packed one is shown as a line."""
    out = out or sys.stdout
    terminal = out.isatty()
    if hasattr(out, "reconfigure"):
        out.reconfigure(errors="replace")
    documents = set(arrays["doc_offsets"].tolist())
    borders = arrays["seq_offsets"]
    for s in range(min(count, len(borders) - 1)):
        begin, end = int(borders[s]), int(borders[s + 1])
        out.write(f"--- sequence {s}: {end - begin} tokens, {arrays['seq_targets'][s]} learned\n")
        for first, last in pieces(arrays["labels"], begin, end, documents):
            if first in documents and first != begin:
                out.write("\n--- next document\n")
            text = visible(decode(arrays["tokens"][first:last], table))
            if arrays["labels"][first] == IGNORED:
                text = f"{DIM}{text}{PLAIN}" if terminal else f"⟦{text}⟧"
            out.write(text)
        out.write("\n")


def pieces(labels, begin, end, documents):
    """Ranges of tokens that are all learned or all not, cut at document borders."""
    learned = labels[begin:end] != IGNORED
    changes = set((np.flatnonzero(learned[1:] != learned[:-1]) + begin + 1).tolist())
    cuts = sorted({begin, end} | changes | {d for d in documents if begin < d < end})
    return zip(cuts[:-1], cuts[1:])


def decode(tokens, table):
    offsets, data = table
    return b"".join(data[offsets[t] : offsets[t + 1]].tobytes() for t in tokens.tolist()).decode(
        "utf-8", "replace"
    )


def visible(text):
    """Control characters of the data must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
