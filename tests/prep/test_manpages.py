"""Manual pages to questions: man and mdoc sources, escapes, packages, and what is left out."""
import gzip
import json
import os
import shutil
import subprocess
import unittest

from support import FolderTest, tool

from manpages import describe, plain


class Describe(unittest.TestCase):
    def test_man_and_mdoc_sources_give_their_description(self):
        cases = {
            '.TH SED 1\n.SH NAME\nsed \\- stream editor\n.SH SYNOPSIS\n': "stream editor",
            '.SH "NAME"\n\\fBa\\fR, \\fBb\\fP \\- do\nit\n.SH X': "do it",
            '.Sh NAME\n.Nm uuidd\n.Nd "UUID daemon"\n.Sh X': '"UUID daemon"',
            '.SH NAME\n.B cat\n\\(em join\n.SH X': "join",
            '.SH NAME\n.Sx cat \\- join\n.SH X': None,  # a macro that is not known: no guess
            '.SH NAME\nx \\- it\\*(Aqs \\(dqq\\(dq \\e\n.SH X': 'it\'s "q" \\',
            '.SH NAME\nx \\- \\*[unknown]\n.SH X': None,
            '.SH NAME\nx \\- two\\ words\\&\n.SH X': "two words",
            '.SH SYNOPSIS\nx - y\n': None,
        }
        for source, want in cases.items():
            self.assertEqual(describe(source), want, source)

    def test_hyphens_inside_words_stay(self):
        self.assertEqual(plain(r"read\-only, half\-done"), "read-only, half-done")


class Manpages(FolderTest):
    PAGES = {
        "man1/sed.1.gz": ".SH NAME\nsed \\- stream editor for filtering and transforming text\n.SH S",
        "man3/strtol.3.gz": ".SH NAME\nstrtol, strtoll \\- convert a string to a long integer\n.SH S",
        "man3/strtoll.3.gz": ".so man3/strtol.3",
        "de/man1/sed.1.gz": ".SH NAME\nsed \\- Datenstromeditor zum Filtern\n.SH S",
        "man5/group.5": ".SH NAME\ngroup \\- user group file\n.SH S",
        "man8/bad.8.gz": None,
    }

    def make_pages(self, root):
        for name, text in self.PAGES.items():
            path = os.path.join(root, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            data = b"\x1f\x8b garbage" if text is None else text.encode()
            if text is not None and name.endswith(".gz"):
                data = gzip.compress(data)
            with open(path, "wb") as file:
                file.write(data)

    def records(self):
        with open(self.path("out.jsonl"), encoding="utf-8") as file:
            return [[m["content"] for m in json.loads(line)["messages"]] for line in file]

    def test_a_folder_gives_one_question_a_page_in_order_of_names(self):
        self.make_pages(self.path("man"))
        result = tool("manpages.py", self.path("man"), "-o", self.path("out.jsonl"))
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        answers = [answer for _, answer in self.records()]
        self.assertEqual(answers, [
            "`group` is a file format: user group file.",
            "`sed` is a command: stream editor for filtering and transforming text.",
            "`strtol` is a C library function: convert a string to a long integer.",
        ])
        self.assertIn("`sed`", self.records()[1][0])

    @unittest.skipUnless(shutil.which("dpkg-deb"), "no dpkg-deb on this machine")
    def test_a_package_gives_the_same_as_its_folder(self):
        root = self.path("pkg")
        self.make_pages(os.path.join(root, "usr/share/man"))
        os.mkdir(os.path.join(root, "DEBIAN"))
        with open(os.path.join(root, "DEBIAN/control"), "w", encoding="ascii") as control:
            control.write("Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n")
        subprocess.run(["dpkg-deb", "-b", root, self.path("x.deb")], check=True, capture_output=True)
        tool("manpages.py", self.path("x.deb"), "-o", self.path("out.jsonl"))
        package = self.records()
        tool("manpages.py", self.path("pkg"), "-o", self.path("out.jsonl"), "--overwrite")
        self.assertEqual(package, self.records())
        self.assertEqual(len(package), 3)

    def test_sources_without_pages_are_refused(self):
        os.mkdir(self.path("empty"))
        out = ("-o", self.path("out.jsonl"))
        self.assert_one_error(tool("manpages.py", self.path("empty"), *out), 3, "no manual page")
        self.assert_one_error(tool("manpages.py", self.path("none"), *out), 3, "no such package")
        self.assert_one_error(tool("manpages.py", self.write("x.deb", "text"), *out), 3, "x.deb")
        self.assertFalse(os.path.exists(self.path("out.jsonl")))


if __name__ == "__main__":
    unittest.main()
