"""Which documents share a sequence.

    order     a document joins the sequence before it if both fit: keeps the order of the input
    best-fit  the longest document first, each into the fullest sequence that has room for it: fewest sequences

Both depend on the lengths alone, so the same input gives the same file.
"""

import bisect

import numpy as np

METHODS = ("order", "best-fit")


def packed(lengths, seq_len, method):
    """(order, count): the documents in the order of the file, and how many of them each sequence holds."""
    if method == "best-fit":
        return best_fit(lengths, seq_len)
    counts, room = [], 0
    for length in lengths.tolist():
        if counts and length <= room:
            counts[-1] += 1
        else:
            counts.append(1)
            room = seq_len
        room -= length
    return np.arange(len(lengths)), np.array(counts, dtype=np.int64)


def best_fit(lengths, seq_len):
    """Best-fit decreasing. Equal lengths keep their order, documents stand in a sequence in the order of the input, and
    sequences in the order of their first documents."""
    sizes = lengths.tolist()
    sequences = []
    by_room = {}  # room -> numbers of the sequences that have exactly so much, the last one is filled first
    rooms = []  # the keys of by_room, ascending
    for i in np.argsort(-lengths, kind="stable").tolist():
        at = bisect.bisect_left(rooms, sizes[i])
        if at == len(rooms):
            number, left = len(sequences), seq_len - sizes[i]
            sequences.append([i])
        else:
            room = rooms[at]
            number, left = by_room[room].pop(), room - sizes[i]
            sequences[number].append(i)
            if not by_room[room]:
                del by_room[room], rooms[at]
        if left > 0:
            if left not in by_room:
                by_room[left] = []
                bisect.insort(rooms, left)
            by_room[left].append(number)
    for sequence in sequences:
        sequence.sort()
    sequences.sort(key=lambda sequence: sequence[0])
    order = np.array([i for sequence in sequences for i in sequence], dtype=np.int64)
    return order, np.array([len(sequence) for sequence in sequences], dtype=np.int64)
