"""Named ways to spoil an input file. Each function gives a change: called with the folder of a case, it alters one file
there. Where a file carries hashes of itself, there is a way that leaves them wrong and one that signs the file again, so
that the checks behind the hashes are reached as well."""
import hashlib
import json
import os
import re
import shutil
import struct

import h5py
import numpy as np
import xxhash

ZEROS = "0" * 64  # stands for self_sha256 while a manifest is hashed


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, content):
    with open(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8"))


def remove(path):
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def of_content(name, alter):
    """The change that replaces the bytes of `name` by alter(bytes)."""
    def change(folder):
        path = os.path.join(folder, name)
        write(path, alter(read(path)))
    return change


def in_place_of(name, make):
    """The change that puts something else where `name` was."""
    def change(folder):
        path = os.path.join(folder, name)
        remove(path)
        make(path)
    return change


def both(*changes):
    def change(folder):
        for one in changes:
            one(folder)
    return change


# ---- any file ----

def gone(name):
    return in_place_of(name, lambda path: None)


def put(name, content):
    return in_place_of(name, lambda path: write(path, content))


def empty(name):
    return put(name, b"")


def directory(name):
    return in_place_of(name, os.mkdir)


def fifo(name):
    return in_place_of(name, os.mkfifo)


def link(name, target):
    return in_place_of(name, lambda path: os.symlink(target, path))


def link_loop(name):
    return link(name, os.path.basename(name))


def endless(name):
    """A device whose reading never ends."""
    return link(name, "/dev/zero")


def cut(name, part):
    """Keeps so many bytes, or from the end if negative, or this fraction."""
    return of_content(name, lambda data: data[: int(len(data) * part) if isinstance(part, float) else part])


def longer(name, more=b"\0"):
    return of_content(name, lambda data: data + more)


def flip(name, at, bit=0x10):
    def alter(data):
        data = bytearray(data)
        data[at] ^= bit
        return bytes(data)
    return of_content(name, alter)


def replaced(name, data, old, new):
    if old not in data:
        raise AssertionError(f"{name} does not hold {old!r}")
    return data.replace(old, new, 1)


def swap(name, old, new):
    """Replaces a text that must be there."""
    return of_content(name, lambda data: replaced(name, data, old, new))


def utf16(name):
    return of_content(name, lambda data: data.decode().encode("utf-16"))


def word(name, at, value):
    """A 64-bit word of a binary file."""
    return of_content(name, lambda data: data[:at] + struct.pack("<Q", value) + data[at + 8:])


def renamed(name, to):
    return lambda folder: os.rename(os.path.join(folder, name), os.path.join(folder, to))


def copied(name, to):
    return lambda folder: shutil.copy(os.path.join(folder, name), os.path.join(folder, to))


# ---- JSON ----

GONE = object()


def set_in(value, key, new):
    """Sets value[a][b] for the key "a/b"; numbers are places in lists. GONE removes."""
    *path, last = [int(word) if word.isdigit() else word for word in key.split("/")]
    for word in path:
        value = value[word]
    if new is GONE:
        del value[last]
    else:
        value[last] = new


def field(name, key, new):
    """One field of a JSON file."""
    def alter(data):
        value = json.loads(data)
        set_in(value, key, new)
        return json.dumps(value, indent=1).encode()
    return of_content(name, alter)


def raw_field(name, key, text):
    """One field of a JSON file, to a text that need not be JSON."""
    def alter(data):
        value = json.loads(data)
        set_in(value, key, "@@")
        return json.dumps(value, indent=1).replace('"@@"', text).encode("utf-8", "surrogateescape")
    return of_content(name, alter)


def twice(name, key):
    """A key that is there two times."""
    return of_content(name, lambda data: b"{" + json.dumps(key).encode() + b": 1," + data.strip()[1:])


# ---- safetensors ----

def split_safetensors(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + size]), data[8 + size:]


def join_safetensors(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def header_field(name, key, new):
    """A field of the header; the key "TENSOR|a/b", as names hold dots only."""
    def alter(data):
        header, body = split_safetensors(data)
        tensor, _, rest = key.partition("|")
        if rest:
            set_in(header[tensor], rest, new)
        elif new is GONE:
            del header[tensor]
        else:
            header[tensor] = new
        return join_safetensors(header, body)
    return of_content(name, alter)


def header_text(name, alter_text):
    """The header's text as bytes, through a function."""
    def alter(data):
        header, body = split_safetensors(data)
        return join_safetensors(alter_text(json.dumps(header).encode()), body)
    return of_content(name, alter)


def header_swap(name, old, new):
    """Replaces a text of the header that must be there."""
    return header_text(name, lambda text: replaced(name, text, old, new))


def header_length(name, length):
    return of_content(name, lambda data: struct.pack("<Q", length % 2**64) + data[8:])


def tensor_bytes(name, tensor, alter_bytes):
    """The bytes of one tensor, as many as before."""
    def alter(data):
        header, body = split_safetensors(data)
        begin, end = header[tensor]["data_offsets"]
        new = alter_bytes(body[begin:end])
        assert len(new) == end - begin
        return join_safetensors(header, body[:begin] + new + body[end:])
    return of_content(name, alter)


def tensors(name, alter_tensors):
    """All tensors as {name: [dtype, shape, bytes]}, laid out anew."""
    def alter(data):
        header, body = split_safetensors(data)
        held = {key: [entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])]]
                for key, entry in header.items() if key != "__metadata__"}
        alter_tensors(held)
        return pack_tensors(held)
    return of_content(name, alter)


def pack_tensors(held):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for key, (dtype, shape, content) in held.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(content)]}
        at += len(content)
    return join_safetensors(header, b"".join(content for _, _, content in held.values()))


def without_tensor(name, tensor):
    return tensors(name, lambda held: held.pop(tensor))


def more_tensor(name, tensor, dtype="F32", shape=(1,), content=b"\0\0\0\0"):
    return tensors(name, lambda held: held.update({tensor: [dtype, list(shape), content]}))


def changed_tensor(name, tensor, dtype=None, shape=None, content=None):
    def alter(held):
        entry = held[tensor]
        entry[0], entry[1] = dtype or entry[0], entry[1] if shape is None else list(shape)
        entry[2] = entry[2] if content is None else content
    return tensors(name, alter)


def number_in(name, tensor, bits, at=0):
    """One number of a tensor, as its stored bytes."""
    return tensor_bytes(name, tensor, lambda data: data[: at * len(bits)] + bits + data[(at + 1) * len(bits):])


# ---- HDF5 ----

def h5(name, alter):
    def change(folder):
        # no lock: a process that another thread is starting would hold it on
        with h5py.File(os.path.join(folder, name), "r+", libver=("v110", "v110"), locking=False) as file:
            alter(file)
    return change


def attribute(name, key, value):
    def alter(file):
        if value is GONE:
            del file.attrs[key]
        else:
            file.attrs[key] = np.bytes_(value) if isinstance(value, (str, bytes)) else value
    return h5(name, alter)


def put_dataset(file, key, array, **more):
    """A dataset as the program writes it: contiguous, allocated at once."""
    if key in file:
        del file[key]
    file.create_dataset(key, data=array, **more)


def dataset(name, key, alter, **more):
    """A dataset through a function, with any type, shape or storage."""
    def change(file):
        if alter is GONE:
            del file[key]
        else:
            put_dataset(file, key, alter(file[key][()]), **more)
    return h5(name, change)


def values(name, key, at, value):
    """Numbers of a dataset, in place."""
    def change(file):
        file[key][at] = value
    return h5(name, change)


# ---- base.h5 ----

def index(alter, name="base.h5"):
    """The index's bytes through a function, in a file that carries no hash of them, as the first versions wrote it."""
    def change(file):
        put_dataset(file, "index", alter(file["index"][()]))
        del file.attrs["index_xxh3"]
    return h5(name, change)


def index_field(key, new, name="base.h5"):
    def alter(data):
        value = json.loads(data.tobytes())
        set_in(value, key, new)
        return np.frombuffer(json.dumps(value).encode(), "u1")
    return index(alter, name)


def index_text(content, name="base.h5"):
    return index(lambda data: np.frombuffer(content, "u1"), name)


def sign_base(file):
    """Computes all hashes of a base anew, from what it holds."""
    index = json.loads(file["index"][()].tobytes())
    chain = hashlib.sha256()
    for unit in index["units"]:
        group = file["units/" + unit["name"]]
        hashes = [hash_of(group, kind, i) for kind, count in (("nf4", unit["nf4_quanta"]), ("raw", unit["raw_quanta"]))
                  for i in range(count)]
        group["hash"][...] = np.array(hashes, "<u8").view("<i8")
        chain.update(group["hash"][()].tobytes())
        sign_small(unit, group)
    sign_small(index["final"], file["final"])
    index["hashes_sha256"] = chain.hexdigest()
    text = json.dumps(index).encode()
    put_dataset(file, "index", np.frombuffer(text, "u1"))
    file.attrs["index_xxh3"] = np.uint64(xxhash.xxh3_64_intdigest(text + file["maps"][()].tobytes())).astype("<i8")


def hash_of(group, kind, i):
    names = ("packed", "absmax8", "absmax32") if kind == "nf4" else ("raw",)
    content = b"".join(group[name][i].tobytes() for name in names if name in group)
    return xxhash.xxh3_64_intdigest(content)


def sign_small(unit, group):
    if "small" in group:
        unit["small_xxh3"] = xxhash.xxh3_64_hexdigest(group["small"][()].tobytes())


def signed_base(*changes, name="base.h5"):
    return both(*changes, h5(name, sign_base))


# ---- token files ----

def sign_data(file):
    for key in ("tokens", "labels"):
        file.attrs[key + "_xxh3"] = np.bytes_(xxhash.xxh3_128_hexdigest(file[key][()].tobytes()))
    layout = [bytes(file.attrs["labels_xxh3"]), *(file[key][()].tobytes() for key in ("seq_offsets", "doc_offsets"))]
    file.attrs["layout_xxh3"] = np.bytes_(xxhash.xxh3_128_hexdigest(b"".join(layout)))


def signed_data(*changes, name="train.h5"):
    return both(*changes, h5(name, sign_data))


# ---- checkpoints ----

def sign_manifest(text):
    """A manifest's text with its own hash, which stands at its end."""
    text = re.sub(r'"self_sha256": "[0-9a-f]{64}"\n}\n$', f'"self_sha256": "{ZEROS}"\n}}\n', text)
    return text.replace(ZEROS, hashlib.sha256(text.encode()).hexdigest())


def manifest(alter_text, name):
    return of_content(name, lambda data: sign_manifest(alter_text(data.decode())).encode())


def manifest_swap(name, old, new):
    return manifest(lambda text: replaced(name, text, old, new), name)


def manifest_field(key, new, name):
    """A field of a manifest, which is signed again; self_sha256 stays last."""
    def alter(text):
        value = json.loads(text)
        set_in(value, key, new)
        value["self_sha256"] = value.pop("self_sha256")
        return json.dumps(value, indent=1) + "\n"
    return manifest(alter, name)


def signed_files(step, *changes):
    """The changes, then the manifest's hashes of all files anew."""
    def sign(folder):
        path = os.path.join(folder, step, "manifest.json")
        value = json.loads(read(path))
        for entry in value["files"]:
            data = read(os.path.join(folder, step, entry["name"]))
            entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest(),
                         xxh3=[xxhash.xxh3_128_hexdigest(data[at:at + 2**20]) for at in range(0, len(data), 2**20)])
        value["self_sha256"] = value.pop("self_sha256")
        write(path, sign_manifest(json.dumps(value, indent=1) + "\n"))
    return both(*changes, sign)
