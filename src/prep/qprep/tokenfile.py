"""train.h5: the token file that the C program reads (docs/file-formats.md).

Each dataset is one contiguous, early-allocated range of bytes, so that ranks can read their part with pread. Attributes
are int64 scalars and fixed-length strings.
"""

import hashlib
import io

import h5py
import numpy as np
import xxhash

from .errors import INPUT_FORMAT, INPUT_VALUE, PrepError, ReadsBackDifferently
from .packing import packed

IGNORED = -100
TEMPLATE_BYTES = 256 << 10  # the longest chat template; src/hf/chat_template.h has the same


def arrange(documents, seq_len, method=None):
    """The arrays of a token file. With a `method` of packing.METHODS documents share sequences.

    A document's first token is never predicted from the document before it, so its label is always IGNORED.
    """
    lengths, tokens, learned = documents.lengths, documents.tokens, documents.learned
    counts = np.ones(len(lengths), dtype=np.int64)
    if method:
        order, counts = packed(lengths, seq_len, method)
        if (order[1:] < order[:-1]).any():
            ends = np.cumsum(lengths)
            taken = ranges((ends - lengths)[order], ends[order])
            tokens, learned, lengths = tokens[taken], learned[taken], lengths[order]
    doc_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    seq_offsets = doc_offsets[np.concatenate([[0], np.cumsum(counts)])]
    learned = learned.copy()
    learned[doc_offsets[:-1]] = False
    until = np.cumsum(learned, dtype="<u4")[seq_offsets[1:] - 1]  # modulo 2^32, which does not matter to differences
    tokens = tokens.astype("<u4", copy=False)
    labels = np.full(len(tokens), IGNORED, dtype="<i4")
    np.copyto(labels, tokens.view("<i4"), where=learned)
    return {
        "tokens": tokens,
        "labels": labels,
        "seq_offsets": seq_offsets.astype("<i8"),
        "doc_offsets": doc_offsets.astype("<i8"),
        "seq_targets": np.diff(until, prepend=np.uint32(0)),
    }


def ranges(begins, ends):
    """The numbers of all [begin, end), one range after the other; a slice where they are one range."""
    if len(begins) == 0 or (begins[1:] == ends[:-1]).all():
        return slice(int(begins[0]), int(ends[-1])) if len(begins) else slice(0, 0)
    lengths = ends - begins
    shift = np.repeat(begins - (np.cumsum(lengths) - lengths), lengths)
    return np.arange(lengths.sum()) + shift


def write_token_file(path, arrays, decode_table, attributes):
    """Writes `arrays` and the decode table; `attributes` adds the file's own facts to the totals."""
    datasets = {
        **arrays,
        "decode_offsets": decode_table[0].astype("<i8"),
        "decode_bytes": decode_table[1],
    }
    labels_xxh3 = xxhash.xxh3_128_hexdigest(arrays["labels"])
    borders = arrays["seq_offsets"].tobytes() + arrays["doc_offsets"].tobytes()
    facts = {
        "format": "qshard-data",
        "format_version": 1,
        **attributes,
        "n_sequences": len(arrays["seq_targets"]),
        "n_tokens": len(arrays["tokens"]),
        "n_targets": int(arrays["seq_targets"].sum()),
        "tokens_xxh3": xxhash.xxh3_128_hexdigest(arrays["tokens"]),
        "labels_xxh3": labels_xxh3,
        "layout_xxh3": xxhash.xxh3_128_hexdigest(labels_xxh3.encode("ascii") + borders),
    }
    with Output(path) as output:
        with h5py.File(output, "w", libver=("v110", "v110")) as file:
            for name, value in facts.items():
                write_attribute(file, name, value)
            for name, values in datasets.items():
                write_dataset(file, name, values)
    verify(path, facts, datasets)


class Output(io.FileIO):
    """The file that h5py writes to, by calls of ours. What HDF5 cannot write it tries again whenever it lets go of an object, up
    to the end of the interpreter, where it crashes. So it hears of no failure, a signal among them: after the first one
    nothing is written any more, and the end of the block raises it."""

    def __init__(self, path):
        super().__init__(path, "w+")
        self.failure = None

    def __exit__(self, *raised):
        super().__exit__(*raised)  # network file systems may write, and fail, only now
        if self.failure:
            raise self.failure

    def attempt(self, call, *arguments):
        if self.failure:
            return None
        try:
            return call(*arguments)
        except BaseException as error:
            self.failure = error
            return None

    def write(self, data):
        self.attempt(self.write_all, memoryview(data).cast("B"))
        return len(data)

    def write_all(self, data):
        while data:
            data = data[super().write(data) :]

    def readinto(self, data):
        count = self.attempt(super().readinto, data) or 0
        data[count:] = bytes(len(data) - count)  # what is not there yet is zeros, as of a file that was made longer
        return len(data)

    def truncate(self, size=None):
        self.attempt(super().truncate, size)
        return size


def check_template(path, template):
    """Refuses a chat template that a token file cannot keep."""
    try:
        length = len(template.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise PrepError(
            INPUT_FORMAT, path, "the chat template holds half a surrogate pair, which is no text"
        ) from error
    if "\0" in template:
        raise PrepError(INPUT_FORMAT, path, "the chat template holds a NUL, which is no text")
    if length > TEMPLATE_BYTES:
        raise PrepError(
            INPUT_VALUE,
            path,
            f"the chat template has {length} bytes; a token file keeps at most {TEMPLATE_BYTES}",
        )


def template_attributes(texts, kept):
    """What the file says of the chat templates that shaped the data, one after the other, and the one that it keeps, if any."""
    sha256 = hashlib.sha256("".join(texts).encode("utf-8")).hexdigest() if texts else ""
    return {"template_sha256": sha256, **({"chat_template": kept} if kept is not None else {})}


def verify(path, facts, datasets):
    """Reads the file back: what a disk did to it must not be found out in training."""
    try:
        with h5py.File(path, "r") as file:
            same = all(holds(file.attrs[name], value) for name, value in facts.items()) and all(
                np.array_equal(file[name][()], values) for name, values in datasets.items()
            )
    except (OSError, RuntimeError, KeyError, ValueError, TypeError):  # what h5py makes of damage
        same = False
    if not same:
        raise ReadsBackDifferently


def holds(attribute, value):
    if isinstance(value, str):
        attribute = attribute.encode("utf-8") if isinstance(attribute, str) else bytes(attribute)
        value = value.encode("utf-8")
    return attribute == value


def write_attribute(file, name, value):
    if isinstance(value, str):
        data = value.encode("utf-8")
        file.attrs.create(name, data, dtype=h5py.string_dtype("utf-8", max(len(data), 1)))
    else:
        file.attrs.create(name, np.int64(value))


def write_dataset(file, name, values):
    """h5py's own create_dataset allocates late, so the layout is asked for at the lower level."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_obj_track_times(False)
    space = h5py.h5s.create_simple(values.shape)
    kind = h5py.h5t.py_create(values.dtype)
    dataset = h5py.h5d.create(file.id, name.encode("ascii"), kind, space, layout)
    if values.size:
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(values))
