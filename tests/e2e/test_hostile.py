"""Bad inputs of every kind: one error line that names the file and what is wrong with it, the promised exit code on all
ranks, and nothing written. Each row of the folder hostile/ spoils one of the good inputs, with which the same command
passes. QSHARD_HOSTILE=REGEX takes only the rows whose names match."""
import collections
import concurrent.futures
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
import unittest

import support

from hostile import changes as to
from hostile import inputs, models, runs, settings, stores, tools  # noqa: F401  (most fill CASES)
from hostile.case import CASES, DEEP, HTML
from hostile.inputs import COMMANDS, command_line

SLOWDOWN = int(os.environ.get("QSHARD_TEST_SLOWDOWN", "1"))
LIMIT_S = 20 * SLOWDOWN  # a case takes a fraction of a second; whoever waits for a pipe would wait for ever
LEAST_CASES = 200
SIDE_BY_SIDE = 2 * (os.cpu_count() or 1)  # mpirun mostly waits
CODES_OF_CRASHES = (124, 134, 136, 137, 139)


def tree(folder):
    """Everything below a folder: what each name is, its content, and for files the inode and the time of the last change, so
    that the same bytes written anew show as well."""
    found = {}
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(at, name)
            info = os.lstat(path)
            what = [stat.S_IFMT(info.st_mode)]
            if stat.S_ISLNK(info.st_mode):
                what.append(os.readlink(path))
            elif stat.S_ISREG(info.st_mode):
                what += [hashlib.sha256(to.read(path)).hexdigest(), info.st_ino, info.st_mtime_ns]
            found[os.path.relpath(path, folder)] = what
    return found


def differences(before, after):
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))


class Hostile(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.good = os.path.join(support.scratch("qshard-hostile-"), "good")
        os.mkdir(cls.good)
        inputs.make_all(cls.good)

    def prepared(self, command):
        """A folder with copies of what the command needs."""
        folder = tempfile.mkdtemp(dir=os.path.dirname(self.good))
        for name in COMMANDS[command].needs:
            source, target = os.path.join(self.good, name), os.path.join(folder, name)
            (shutil.copytree if os.path.isdir(source) else shutil.copy)(source, target)
        return folder

    def run_in(self, folder, command, ranks):
        return self.run_words(folder, command_line(COMMANDS[command], ranks))

    def run_words(self, folder, words):
        words = ["timeout", "-k", "2", str(LIMIT_S), *words]
        return subprocess.run(words, cwd=folder, env=support.environment(PYTHONDONTWRITEBYTECODE="1"), stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, errors="replace")

    def together(self, work, rows):
        """work(row) for all rows, some at a time; what it returns is what is wrong."""
        with concurrent.futures.ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            for row, wrong in zip(rows, pool.map(work, rows)):
                with self.subTest(str(getattr(row, "name", row))):
                    self.assertFalse(wrong, "\n".join(wrong))

    # ---- the commands pass on good inputs ----

    def accepted(self, row):
        command, ranks, change = row
        folder = self.prepared(command)
        change(folder)
        done = self.run_in(folder, command, ranks)
        shutil.rmtree(folder)
        passed = done.returncode == 0 and "error[" not in done.stderr and "left with" not in re.sub("left with 0", "", done.stderr)
        return [] if passed else [f"exit {done.returncode}", done.stderr[-2000:]]

    def test_good_inputs_are_accepted(self):
        """So a refusal comes from what a row changes; and what signs a file again signs it well."""
        def nothing(folder):
            pass

        used = sorted({(case.command, case.ranks) for case in CASES}, key=str)
        self.assertEqual({command for command, _ in used}, set(COMMANDS))
        rows = [(command, ranks, nothing) for command, ranks in used]
        manifest = inputs.STEP + "/manifest.json"
        yaml = to.read(os.path.join(self.good, "run.yaml"))
        rows += [("train", 2, to.signed_base()), ("check base", None, to.signed_base()), ("check data", None, to.signed_data()),
                 ("train", 2, to.dataset("base.h5", "index", lambda data: data)), ("resume", 2, to.signed_files(inputs.STEP)),
                 ("export", None, to.manifest_field("step", 2, manifest)), ("quantize", 2, to.tensors("model/model.safetensors", dict)),
                 ("quantize", None, to.header_text("model/model.safetensors", lambda text: text + b"   ")),
                 ("quantize bnb", None, to.tensors("bnb/model.safetensors", dict)),
                 ("quantize sharded", None, to.field("sharded/model.safetensors.index.json", "metadata", {})),
                 ("train", None, to.put("run.yaml", yaml.replace(b"\n", b"\r\n"))),
                 ("check config", None, to.put("run.yaml", b"\xef\xbb\xbf" + yaml)),
                 ("train", 2, to.put("run.yaml", b"\xef\xbb\xbf" + yaml.replace(b"\n", b"\r\n"))),
                 *((command, None, change("model/generation_config.json")) for command in ("quantize", "inspect model")
                   for change in (to.directory, to.fifo, to.endless, to.link_loop, to.empty,
                                  lambda name: to.put(name, DEEP), lambda name: to.put(name, HTML),
                                  lambda name: to.put(name, b'{"eos_token_id": [' + b"2," * 10**6 + b"2]}"))),
                 ("train", 2, to.attribute("train.h5", "chat_template", to.GONE)),
                 ("prep", None, to.put("data.jsonl", b'\xef\xbb\xbf{"text": "one and two"}\r\n'))]
        self.together(self.accepted, rows)

    # ---- the rows ----

    def refused(self, case):
        folder = self.prepared(case.command)
        case.change(folder)
        before = tree(folder)
        done = self.run_in(folder, case.command, case.ranks)
        wrong = self.complaints(case, done)
        changed = [name for name in differences(before, tree(folder)) if not re.fullmatch(case.may_change or "(?!)", name)]
        shutil.rmtree(folder)
        return wrong + ([f"written or removed: {changed}"] if changed else [])

    def complaints(self, case, done):
        """What is not as promised in how the program left and what it said."""
        wrong = []
        codes = [int(code) for code in re.findall(r"rank left with (\d+)", done.stderr)] if case.ranks else [done.returncode]
        if codes != [case.code // 100] * (case.ranks or 1):
            wrong.append(f"exit {codes}, not {case.code // 100}")
        if done.returncode in CODES_OF_CRASHES or "Traceback" in done.stderr:
            wrong.append("a crash or no end")
        lines = [line for line in re.split(r"[\r\n]", done.stderr) if line.startswith("error[")]
        start = f"error[E{case.code}] "
        if len(lines) != 1:
            wrong.append(f"{len(lines)} error lines")
        elif not lines[0].startswith(start) or not re.match(case.says, lines[0][len(start):]):
            wrong.append(f"expected {start}{case.says}")
        elif not lines[0].isprintable():
            wrong.append("the line holds control characters")
        return wrong + [done.stderr[-1500:]] if wrong else []

    def test_a_model_directory_whose_name_is_not_utf8(self):
        """Before anything is quantized, as the base has to name it."""
        folder = self.prepared("quantize")
        name = os.fsdecode(b"mod\xffl")
        os.rename(os.path.join(folder, "model"), os.path.join(folder, name))
        for ranks in (None, 2):
            done = self.run_words(folder, support.command(("quantize", name, "-o", "out.h5"), ranks))
            self.assertEqual(done.returncode, 2)
            self.assertEqual(len(re.findall(r"(?m)^error\[E202\] mod.l: .*not UTF-8", done.stderr)), 1, done.stderr)
        self.assertEqual(os.listdir(folder), [name])

    def test_bad_inputs_are_refused(self):
        only = os.environ.get("QSHARD_HOSTILE", "")
        rows = [case for case in CASES if re.search(only, case.name)]
        names = collections.Counter(case.name for case in CASES)
        self.assertEqual([name for name, count in names.items() if count > 1], [])
        self.together(self.refused, rows)
        print(f"{len(rows)} bad inputs, {sum(case.ranks is not None for case in rows)} of them on several ranks")
        self.assertTrue(only or len(rows) >= LEAST_CASES)


if __name__ == "__main__":
    unittest.main()
