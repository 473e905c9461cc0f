"""train.h5: the token file that the C program reads (docs/file-formats.md).

Each dataset is one contiguous, early-allocated range of bytes, so that ranks can read their part with pread. Attributes
are int64 scalars and fixed-length strings.
"""

import errno

import h5py
import numpy as np
import xxhash

IGNORED = -100


def arrange(documents, seq_len, pack):
    """The arrays of a token file. With `pack`, documents share a sequence, greedily and in order.

    A document's first token is never predicted from the document before it, so its label is always IGNORED.
    """
    lengths = np.array([len(document.tokens) for document in documents], dtype=np.int64)
    doc_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.concatenate([document.tokens for document in documents]).astype("<u4")
    learned = np.concatenate([document.learned for document in documents])
    learned[doc_offsets[:-1]] = False
    seq_offsets = packed_borders(doc_offsets, seq_len) if pack else doc_offsets
    before = np.concatenate([[0], np.cumsum(learned)])  # learned tokens before position i
    return {
        "tokens": tokens,
        "labels": np.where(learned, tokens.astype("<i4"), IGNORED).astype("<i4"),
        "seq_offsets": seq_offsets.astype("<i8"),
        "doc_offsets": doc_offsets.astype("<i8"),
        "seq_targets": np.diff(before[seq_offsets]).astype("<u4"),
    }


def packed_borders(doc_offsets, seq_len):
    """Sequence borders: a document joins the sequence before it if both fit into seq_len."""
    borders = [0]
    for begin, end in zip(doc_offsets[:-1], doc_offsets[1:]):
        if end - borders[-1] > seq_len and begin > borders[-1]:
            borders.append(int(begin))
    return np.array(borders + [int(doc_offsets[-1])], dtype=np.int64)


def write_token_file(path, arrays, decode_table, attributes):
    """Writes `arrays` and the decode table; `attributes` adds the file's own facts to the totals."""
    datasets = {
        **arrays,
        "decode_offsets": decode_table[0].astype("<i8"),
        "decode_bytes": decode_table[1],
    }
    facts = {
        "format": "qshard-data",
        "format_version": 1,
        **attributes,
        "n_sequences": len(arrays["seq_targets"]),
        "n_tokens": len(arrays["tokens"]),
        "n_targets": int(arrays["seq_targets"].sum()),
        "tokens_xxh3": xxhash.xxh3_128_hexdigest(arrays["tokens"].tobytes()),
        "labels_xxh3": xxhash.xxh3_128_hexdigest(arrays["labels"].tobytes()),
    }
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        for name, value in facts.items():
            write_attribute(file, name, value)
        for name, values in datasets.items():
            write_dataset(file, name, values)
        file.flush()
    verify(path, datasets)


def verify(path, datasets):
    """Reads the file back: what a full disk did to it must not be found out in training."""
    with h5py.File(path, "r") as file:
        for name, values in datasets.items():
            if not np.array_equal(file[name][()], values):
                raise OSError(errno.EIO, f"the dataset {name} reads back differently")


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
