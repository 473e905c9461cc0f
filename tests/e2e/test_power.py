"""The power fails: of what was written only that is left which was synced, of names only those whose directory was. libpowerlog.so notes what
that is behind each fsync of an undisturbed run; from each such state a run goes on as if nothing had been, from where it said to have saved."""
import os
import re
import shutil
import unittest

import support

POWERLOG = os.path.join(os.path.dirname(support.QSHARD), "tests", "libpowerlog.so")
STEPS = {"train__steps": 4, "train__save_every": 2, "train__eval_every": 1, "train__keep_last": 1}


class Disk:
    """What the syncs of a command have put on the disk of a folder, which was empty and is there."""

    def __init__(self):
        self.folder = support.scratch("/dev/shm/qshard-power-")
        self.root, self.log = os.path.join(self.folder, "root"), os.path.join(self.folder, "log")
        os.mkdir(self.root)
        os.mkdir(self.log)
        self.environment = {"POWER_ROOT": self.root, "POWER_LOG": self.log, **support.preload(POWERLOG)}

    @staticmethod
    def entries(text):
        """(inode, kind, bytes, name) of each."""
        words = (entry.decode().split(" ", 3) for entry in text.split(b"\0") if entry)
        return [(int(inode), kind, int(size), name) for inode, kind, size, name in words]

    def cuts(self):
        """Behind each sync: the names there are just before the next one, what is on the disk of directories and of files."""
        directories, files, states = {}, {}, []
        for name in sorted(os.listdir(self.log)):
            with open(os.path.join(self.log, name), "rb") as file:
                text = file.read()
            kind, _, inode = name.split(".")[1].partition("-")
            if kind == "names":
                states.append((self.entries(text), dict(directories), dict(files)))
            elif kind == "d":
                directories[int(inode)] = self.entries(text)
            else:
                files[int(inode)] = text
        states.append((states[-1][0], directories, files))
        return states[1:]

    def build(self, state, target, late_names):
        """The folder as it is found again: with names as they were synced, or, with `late_names`, all of them, as where a file system writes
        those first: bytes that were not synced are zeros."""
        names, directories, files = state
        shutil.rmtree(target, ignore_errors=True)
        os.mkdir(target)

        def put(path, inode, size):
            content = files.get(inode, b"")
            with open(path, "wb") as file:
                file.write(content + bytes(max(0, size - len(content))) if late_names else content)

        def fill(folder, inode):
            for number, kind, size, name in directories.get(inode, []):
                path = os.path.join(folder, name)
                if kind == "d":
                    os.mkdir(path)
                    fill(path, number)
                else:
                    put(path, number, size)

        if not late_names:
            fill(target, os.stat(self.root).st_ino)
            return
        for inode, kind, size, name in names:
            path = target + name.removeprefix(self.root)
            if kind == "d":
                os.makedirs(path, exist_ok=True)
            else:
                put(path, inode, size)


def content(folder):
    """{path in the folder: bytes of a file, None of a directory}"""
    found = {}
    for parent, folders, files in os.walk(folder):
        found.update({os.path.relpath(os.path.join(parent, name), folder): None for name in folders})
        for name in files:
            with open(os.path.join(parent, name), "rb") as file:
                found[os.path.relpath(os.path.join(parent, name), folder)] = file.read()
    return found


@unittest.skipUnless(os.path.exists(POWERLOG) and os.path.isdir("/dev/shm"), "needs libpowerlog.so and a file system in memory")
class Power(unittest.TestCase):
    def test_a_run_goes_on_from_what_was_synced(self):
        disk = Disk()
        output = os.path.join(disk.root, "runs", "run")  # two levels that were not there
        support.train(output, environment=disk.environment, **STEPS)
        curve, adapter = support.curve(output), support.adapter_digest(output)
        back, newest, before = os.path.join(disk.folder, "back"), 0, []
        again = os.path.join(back, "runs", "run")
        for cut, state in enumerate(disk.cuts()):
            for late_names in (False, True):
                disk.build(state, back, late_names)
                now = content(back)
                if now in before:
                    continue
                before.append(now)
                with self.subTest(cut=cut, late_names=late_names):
                    there = [int(step) for step in re.findall(r"/step-(\d+)/manifest\.json'", str(list(now)))]
                    if not late_names:  # a sync of the run's directory was all that a step lacked
                        self.assertGreaterEqual(max([0, *there]), newest)
                    newest = max([newest, *there])
                    done = support.train(again, **STEPS)
                    self.assertTrue(newest == 0 or "finished" in done.stderr or f"resuming after step {newest}" in done.stderr, done.stderr)
                    self.assertEqual(support.curve(again), curve)
                    self.assertEqual(support.adapter_digest(again), adapter)
                    self.assertEqual([name for name in os.listdir(again) if "tmp" in name or "bad" in name], [])
        self.assertEqual(newest, STEPS["train__steps"])

    def test_outputs_are_there_whole_or_not_at_all(self):
        run = os.path.join(support.scratch(), "run")
        support.train(run, train__steps=1)
        for ranks, name, command in ((2, "base.h5", ("quantize", os.path.join(support.tiny(), "model"))), (None, "adapter", ("export", run)),
                                     (None, "merged", ("merge", run, "--shard-size", "200K"))):
            with self.subTest(command=command[0]):
                disk = Disk()
                support.qshard(*command, "-o", os.path.join(disk.root, name), ranks=ranks, **disk.environment)
                whole = content(disk.root)
                back = os.path.join(disk.folder, "back")
                for state in disk.cuts():
                    for late_names in (False, True):
                        disk.build(state, back, late_names)
                        found = {path: data for path, data in content(back).items() if "tmp" not in path}
                        self.assertTrue(found in ({}, whole), sorted(found))
                disk.build(disk.cuts()[-1], back, False)
                self.assertEqual(content(back), whole)


if __name__ == "__main__":
    unittest.main()
