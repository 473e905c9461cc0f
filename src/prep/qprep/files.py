"""Files that are either complete under their final name or not there at all.

Everything is written under a temporary name in the same folder, flushed to the disk, and renamed. A run that is stopped
(Ctrl-C, TERM, HUP) removes it; a killed one leaves `.NAME.tmp-PID`, which no program of ours takes for a result.
"""

import contextlib
import hashlib
import json
import os
import stat

from . import errors
from .errors import PrepError


def refuse_existing(path, overwrite=False, inputs=()):
    """Checks an output path before the work starts: it must not be an input, nor be there unless `overwrite`."""
    for name in inputs:
        if os.path.exists(path) and os.path.exists(name) and os.path.samefile(path, name):
            raise PrepError(
                errors.CONFIG_PAIR, path, "is both input and output; name another output"
            )
    refuse_special(path)
    if os.path.lexists(path) and not overwrite:
        raise PrepError(
            errors.OUTPUT_TAKEN,
            path,
            "is there already; remove it, name another output, or give --overwrite",
        )
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise PrepError(
            errors.IO_FAILED, path, f"the folder {folder} does not exist; create it first"
        )


def refuse_special(path):
    """A rename puts a plain file in the place of /dev/null or /dev/stdout, for all of a machine."""
    if os.path.isdir(path):
        raise PrepError(errors.OUTPUT_TAKEN, path, "is a folder; name a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise PrepError(errors.OUTPUT_TAKEN, path, "is a device or a pipe; name a file")


def sync_folder(folder):
    """Makes renames inside `folder` last over a crash."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def finished(path):
    """Gives a temporary name to write to; when the block ends well, the file gets the name `path`."""
    refuse_special(path)
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.tmp-{os.getpid()}")
    try:
        yield temporary
        fd = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # h5py raises the latter when closing fails
        raise errors.write_failed(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def write_bytes(path, data):
    with finished(path) as temporary:
        with open(temporary, "wb") as out:
            out.write(data)


def write_json(path, value, indent=2):
    """Deterministic JSON: the same value gives the same bytes, so its hash can be recorded."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    write_bytes(path, (text + "\n").encode("utf-8"))


def open_input(path):
    """A plain file, opened for reading bytes. A pipe would make us wait, and what is read from one cannot be read again."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        mode = os.fstat(fd).st_mode
    except OSError as error:
        raise PrepError(errors.INPUT_MISSING, path, f"cannot read: {error.strerror}") from error
    if stat.S_ISREG(mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    what = "is a folder; name a file" if stat.S_ISDIR(mode) else "is not a plain file; write the data to one"
    raise PrepError(errors.INPUT_FORMAT, path, what)


def unique_keys(pairs):
    """For json: an object whose keys differ. Of two values one would be taken in silence."""
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {errors.quoted(twice)} appears twice")
    return value


def read_json(path, limit_bytes=64 << 20):
    """A JSON object from a file; every way of being bad is an error that names the file."""
    try:
        with open_input(path) as file:
            if os.fstat(file.fileno()).st_size > limit_bytes:
                raise PrepError(
                    errors.INPUT_FORMAT,
                    path,
                    f"is larger than {limit_bytes >> 20} MiB, which no file of this kind is",
                )
            value = json.loads(file.read().decode("utf-8"), object_pairs_hook=unique_keys)
    except OSError as error:
        raise PrepError(errors.INPUT_MISSING, path, f"cannot read: {error.strerror}") from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PrepError(errors.INPUT_FORMAT, path, f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise PrepError(errors.INPUT_FORMAT, path, "must be a JSON object")
    return value


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
