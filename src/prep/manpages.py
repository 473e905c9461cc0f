#!/usr/bin/env python3
"""Instruction data from manual pages: "What does `sed` do?", answered by the page's own one-line description.

    apt-get download manpages manpages-dev coreutils util-linux git-man
    manpages.py *.deb -o manpages.jsonl

Takes Debian packages (opened with dpkg-deb, not installed: container images leave manual pages out) and folders such as
/usr/share/man. Every page has a NAME section, "sed - stream editor ...", which is what whatis(1) shows; that line becomes
one conversation of a question and an answer. The wording of the question is chosen by a hash of the name, so the output
depends on the pages alone, and is sorted by name.
"""

import gzip
import hashlib
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile

from qprep import errors
from qprep.errors import OneLineParser, PrepError, run
from qprep.files import finished, refuse_existing

# English pages only: translations lie in man/de/man1/...
PAGE = re.compile(r"(?:^|/man/)man([1-8])/([^/]+)\.([1-8][a-z0-9]*)(?:\.gz|\.xz)?$")
SECTIONS = {
    "1": "a command",
    "2": "a system call",
    "3": "a C library function",
    "4": "a device",
    "5": "a file format",
    "6": "a game",
    "7": "a topic of the system manual",
    "8": "a system administration command",
}
ANY = (
    "What is `{name}`?",
    "Explain `{name}` in one line.",
    "What is `{name}` on a Debian system?",
    "Describe `{name}` briefly.",
    "I came across `{name}` in section {section} of the manual. What is it?",
)
COMMAND = (
    "What does `{name}` do?",
    "When would I use the command `{name}`?",
    "What is the command `{name}` for?",
)
CALL = (
    "What does `{name}` do in a C program?",
    "What does the C function `{name}` do?",
    "What is the function `{name}` for?",
)
QUESTIONS = {"1": ANY + COMMAND, "8": ANY + COMMAND, "2": ANY + CALL, "3": ANY + CALL}


def pages_of_package(path):
    """Yields (member name, bytes) of the regular files in a .deb's man folders."""
    try:
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as unpack:
            with tarfile.open(fileobj=unpack.stdout, mode="r|") as archive:
                for member in archive:
                    if member.isfile() and PAGE.search(member.name):
                        yield member.name, archive.extractfile(member).read()
    except FileNotFoundError as error:
        raise PrepError(
            errors.INPUT_MISSING,
            path,
            "opening packages needs dpkg-deb (package dpkg); "
            "or give a folder such as /usr/share/man",
        ) from error
    except tarfile.TarError as error:
        raise PrepError(
            errors.INPUT_FORMAT,
            path,
            "is not a Debian package that dpkg-deb can open; fetch it again",
        ) from error


def pages_of_folder(path):
    """Yields (relative name, bytes) of the manual pages below a folder, following no links to folders."""
    for folder, _, names in os.walk(path):
        for name in names:
            file = os.path.join(folder, name)
            relative = os.path.relpath(file, path)
            if PAGE.search(relative) and os.path.isfile(file):
                with open(file, "rb") as page:
                    yield relative, page.read()


def page_text(data):
    """The roff source of a page, decompressed; None where it is damaged or only refers to another page (.so)."""
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        elif data[:6] == b"\xfd7zXZ\0":
            data = lzma.decompress(data)
    except (OSError, EOFError, lzma.LZMAError):
        return None
    text = data.decode("utf-8", "replace")
    return None if text.startswith(".so ") else text


def describe(text):
    """The description in a page's NAME section, or None where it is not one plain line."""
    lines = iter(text.splitlines())
    for line in lines:
        if re.match(r'\.S[Hh]\s+"?NAME"?\s*$', line, re.IGNORECASE):
            break
    taken = []
    for line in lines:
        if re.match(r"\.S[HhSs]\b", line):
            break
        taken.append(line)
    mdoc = [line[4:] for line in taken if line.startswith(".Nd ")]
    if mdoc:
        return plain(mdoc[0])
    words = [re.sub(r'^\.(?:B|I|BR|RB|IR|BI|SM)\s+', "", line) for line in taken]
    body = plain(" ".join(line for line in words if not line.startswith((".", "'"))))
    if body is None or " - " not in body:
        return None
    return body.split(" - ", 1)[1].strip() or None


# roff's characters in plain text. `\e` is a backslash, written twice until all escapes are done.
CHARACTERS = {
    r"\-": "-", r"\(hy": "-", r"\[hy]": "-", r"\(em": "-", r"\(en": "-", r"\*(--": "-",
    r"\(aq": "'", r"\[aq]": "'", r"\*(Aq": "'", r"\'": "'", r"\`": "`", r"\(dq": '"',
    r"\ ": " ", r"\~": " ", r"\(bu": "*", r"\*(C+": "C++", r"\e": "\\\\",
}  # fmt: skip
# Changes of font and size, marks of no width, comments.
INVISIBLE = re.compile(r"\\f(?:\[[^]]*\]|\(..|.)|\\s[-+]?\d|\\[&|^/,:%)]|\\\".*")


def plain(text):
    """roff escapes to plain text; None where one is left that this does not know."""
    text = INVISIBLE.sub("", text)
    for escape, character in CHARACTERS.items():
        text = text.replace(escape, character)
    if "\\" in text.replace("\\\\", "") or "\ufffd" in text:
        return None
    return " ".join(text.replace("\\\\", "\\").split())


def conversation(name, section, description):
    """One record in the format `messages`."""
    questions = QUESTIONS.get(section, ANY)
    pick = int.from_bytes(hashlib.sha256(f"{name}.{section}".encode()).digest()[:4], "big") % len(
        questions
    )
    question = questions[pick].format(name=name, section=section)
    end = "" if description.endswith((".", "!", "?")) else "."
    answer = f"`{name}` is {SECTIONS[section]}: {description}{end}"
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def collect(sources):
    """{(name, section): description} of all pages of `sources`."""
    found = {}
    for source in sources:
        if not os.path.exists(source):
            raise PrepError(errors.INPUT_MISSING, source, "no such package or folder")
        pages = pages_of_folder(source) if os.path.isdir(source) else pages_of_package(source)
        for file, data in pages:
            _, name, section = PAGE.search(file).groups()
            text = page_text(data)
            description = describe(text) if text else None
            if description and 8 <= len(description) <= 200 and description.isprintable():
                found.setdefault((name, section[0]), description)
    return found


def main(argv):
    parser = OneLineParser(
        prog="manpages.py", description="one-line descriptions of manual pages as instruction data"
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="DEB_OR_FOLDER",
        help="Debian packages, or folders with man pages",
    )
    parser.add_argument("-o", "--output", required=True, metavar="OUT.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    options = parser.parse_args(argv)
    refuse_existing(options.output, options.overwrite, options.sources)
    found = collect(options.sources)
    if not found:
        raise PrepError(
            errors.INPUT_VALUE,
            ", ".join(options.sources),
            "holds no manual page with a description",
        )
    with finished(options.output) as temporary:
        with open(temporary, "w", encoding="utf-8") as out:
            for (name, section), description in sorted(found.items()):
                out.write(
                    json.dumps(conversation(name, section, description), ensure_ascii=False) + "\n"
                )
    print(f"{options.output}: {len(found)} descriptions")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
