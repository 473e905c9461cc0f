"""What a row of the table is, and what the rows of several files share."""
import struct
from dataclasses import dataclass
from typing import Callable

from hostile import changes as to

# the files of the good inputs that most rows spoil
CONFIG, TENSORS = "model/config.json", "model/model.safetensors"
BASE, DATA, YAML = "base.h5", "train.h5", "run.yaml"

INT64 = 2**63
NAN_BF16, INF_BF16 = b"\xc0\x7f", b"\x80\x7f"
NAN_F32, INF_F32 = struct.pack("<f", float("nan")), struct.pack("<f", float("-inf"))
DEEP = b"[" * 100000
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1562824\n"


@dataclass
class Case:
    command: str  # of hostile.inputs.COMMANDS
    what: str  # is wrong
    change: Callable  # makes it so
    code: int  # that docs/troubleshooting.md promises
    says: str  # pattern for the error line from its first letter on, which is the file's name
    ranks: int = None  # under mpirun
    may_change: str = None  # pattern of the names that are allowed to

    @property
    def name(self):
        return f"{self.command}: {self.what}" + (f" ({self.ranks} ranks)" if self.ranks else "")


CASES = []


def case(*values):
    CASES.append(Case(*values))


def missing(key, name):
    """The line on a file that a key or an option names and that is not there."""
    return rf"{key}: {name}: not in /.*/[^/]* \(paths start .*; (qshard|--base|name)"


def not_a_file(command, name, empty=301, ranks=None, says=None, key=None):
    """Whatever can stand in a file's place. `says`: the line where it is missing does not name it; `key`: what names it."""
    opened = f"{key}: {name}" if key else name
    case(command, f"{name} is missing", to.gone(name), 300, missing(key, name) if key else says or name, ranks)
    case(command, f"{name} is a directory", to.directory(name), 301, f"{name}: is (not a plain file|a folder)", ranks)
    case(command, f"{name} is a pipe", to.fifo(name), 301, f"{name}: is not a plain file", ranks)
    case(command, f"{name} is a device", to.endless(name), 301, f"{name}: is not a plain file")
    case(command, f"{name} is a link to itself", to.link_loop(name), 300, f"{opened}: .*symbolic links")
    case(command, f"{name} is a link to nothing", to.link(name, "nowhere"), 300, f"{opened}: is a link" if key else name)
    case(command, f"{name} is empty", to.empty(name), empty, name, ranks)
