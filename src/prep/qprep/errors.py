"""One error line and one exit code for every tool in this folder, as the C program has them.

A tool raises PrepError; `run` turns it into the line `error[E3xx] FILE:LINE: what, and what to do` on stderr and leaves
with the code of the error's class. Nothing else is printed after that line.
"""
import os
import sys

EXIT_USAGE = 2  # E2xx: options and their values
EXIT_INPUT = 3  # E3xx: a bad input file
EXIT_OUTPUT = 4  # E4xx: a file that cannot be written
EXIT_BUG = 70
EXIT_INTERRUPTED = 130


class PrepError(Exception):
    """`code` is 2xx, 3xx or 4xx; `where` is FILE, FILE:LINE or the name of an option."""

    def __init__(self, code, where, what):
        super().__init__(f"error[E{code}] {where}: {what}")
        self.code = code
        self.where = str(where)
        self.what = what

    @property
    def exit_code(self):
        return self.code // 100


def one_line(text):
    """`text` with every line break and control character made visible, so that an error stays one line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def quoted(value, limit=60):
    """`value` as it is shown in a message: one line, cut when long."""
    text = one_line(value)
    return f'"{text[:limit]}..."' if len(text) > limit else f'"{text}"'


def run(main, argv=None):
    """Runs `main(argv)` and returns the process's exit code."""
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except PrepError as error:
        print(one_line(error), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader of our output left (| head)
        return 0
    except KeyboardInterrupt:
        print("error[E601] stopped by the keyboard; no file was finished", file=sys.stderr)
        return EXIT_INTERRUPTED
    except MemoryError:
        print("error[E701] out of memory: split the input into smaller files", file=sys.stderr)
        return 7
