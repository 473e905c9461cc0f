"""One error line and one exit code for every tool in this folder, numbered as in src/base/status.h.

A tool raises PrepError; `run` turns it into the line `error[E3xx] FILE:LINE: what, and what to do` on stderr and leaves
with the code of the error's class, its number / 100. Nothing else is printed after that line.
"""

import argparse
import contextlib
import difflib
import errno
import os
import re
import signal
import sys

USAGE = 200  # unknown option, missing or mistyped argument
CONFIG_PAIR = 203  # two options contradict each other
OUTPUT_TAKEN = 204  # the output exists
INPUT_MISSING = 300  # cannot be opened or read
INPUT_FORMAT = 301  # not the format that it claims
INPUT_VALUE = 302  # a field is missing, mistyped, out of range, or contradicts another
INPUT_UNKNOWN = 303  # an architecture, tokenizer or scheme that is not supported
INPUT_TENSOR = 305  # a tensor is missing or of the wrong shape
IO_FAILED = 400  # a write, sync or rename failed
IO_FULL = 401  # no space or quota
IO_VERIFY = 402  # what was written reads back differently
MEMORY = 700
ENVIRONMENT = 801
ENDING = (signal.SIGTERM, signal.SIGHUP)  # beside SIGINT, of which Python makes a KeyboardInterrupt


class PrepError(Exception):
    """`code` is one of the numbers above; `where` is FILE, FILE:LINE or the name of an option."""

    def __init__(self, code, where, what):
        super().__init__(f"error[E{code}] {where}: {what}")
        self.code = code
        self.args_of = (code, where, what)  # to make it anew in another process

    @property
    def exit_code(self):
        return self.code // 100


class BadRecord(ValueError):
    """One record of an input file is not usable; the message says why and what to do. The reader adds FILE:LINE."""


class ReadsBackDifferently(OSError):
    """A disk that said nothing holds something else than what was written."""


def write_failed(path, error):
    """The PrepError for what came up while writing `path`: an OSError, or HDF5's complaint about not being able to close
    a file, which has the OSError as its context."""
    if isinstance(error, ReadsBackDifferently):
        return PrepError(
            IO_VERIFY, path, "reads back differently from what was written; check the disk"
        )
    while error is not None and getattr(error, "errno", None) is None:
        error = error.__context__
    number = error.errno if error is not None else errno.EIO
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    hint = "; free some space or raise the quota" if full else ""
    return PrepError(
        IO_FULL if full else IO_FAILED, path, f"cannot write: {os.strerror(number)}{hint}"
    )


def one_line(text):
    """`text` with line breaks and control characters made visible, so that an error stays one line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def quoted(value, limit=60):
    """`value` as it is shown in a message: one line, cut when long."""
    text = one_line(value)
    return f'"{text[:limit]}..."' if len(text) > limit else f'"{text}"'


class OneLineParser(argparse.ArgumentParser):
    """argparse whose complaints are PrepErrors instead of a page of usage."""

    def error(self, message):
        unknown = re.match("unrecognized arguments: (--[^ =]+)", message)
        near = unknown and difflib.get_close_matches(
            unknown[1].replace("_", "-"), self._option_string_actions, n=1
        )
        meant = f'did you mean "{near[0]}"? ' if near else ""
        raise PrepError(USAGE, self.prog, f"{message}; {meant}see {self.prog} --help")


class Ended(BaseException):
    """A signal that ends the process, as an exception: what was begun is removed on the way out."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


def raise_ended(number, _frame):
    signal.signal(number, signal.SIG_DFL)  # a second one does not wait for the first
    raise Ended(number)


@contextlib.contextmanager
def ending_by_exception():
    """Inside, the signals that would end the process raise Ended; one that is ignored, as under nohup, stays so."""
    taken = [number for number in ENDING if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, raise_ended)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def run(main, argv=None):
    """Runs `main(argv)` and returns the process's exit code; after a signal 128 + its number, as a shell has it."""
    try:
        with ending_by_exception():
            return main(sys.argv[1:] if argv is None else argv) or 0
    except PrepError as error:
        print(one_line(error), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader of our output left (| head)
        return 0
    except KeyboardInterrupt:
        print("stopped by the keyboard; no output was finished", file=sys.stderr)
        return 128 + signal.SIGINT
    except Ended as end:
        print(f"stopped by {signal.Signals(end.number).name}; no output was finished", file=sys.stderr)
        return 128 + end.number
    except MemoryError:
        print(
            f"error[E{MEMORY}] out of memory: split the input into smaller files", file=sys.stderr
        )
        return MEMORY // 100
