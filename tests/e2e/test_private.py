"""Files that not every host sees: two hosts with mounts of their own. The bits are those of one rank with all files at hand,
checkpoints end up on rank 0's host, and two different files of one name are refused."""
import os
import re
import shutil
import unittest

import h5py

import support
from hosts import SKIP, HostsTest

RANKS = 4  # two on each host


@unittest.skipIf(SKIP is not None, SKIP)
class PrivateFiles(HostsTest):
    @classmethod
    def setUpClass(cls):
        cls.tiny = support.tiny()
        cls.folder = support.scratch()
        cls.alone = os.path.join(cls.folder, "alone")
        support.train(cls.alone, train__steps=6, train__eval_every=3)

    def run_hosts(self, *arguments, expect=0, ranks=RANKS, **mounts):
        """The program on both hosts; h1= and h2= are {folder that the host sees there: folder that it really is}."""
        more = {f"QSHARD_MOUNTS_{host}": " ".join(f"{real}={seen}" for seen, real in pairs.items())
                for host, pairs in mounts.items()}
        done = self.hosts("run", ranks, support.QSHARD, *arguments, **more)
        log = done.stdout + done.stderr
        self.assertEqual(done.returncode, expect, log)
        if expect not in (0, 75):
            self.assertEqual(len(re.findall(r"^error\[E\d+\]", log, re.M)), 1, log)
        return log

    def train(self, output, expect=0, ranks=RANKS, options=(), folder=None, mounts=None, **more):
        more = {"train__steps": 6, "train__eval_every": 3, **more}
        return self.run_hosts("train", support.TINY_YAML, *support.settings(folder or self.tiny, output, **more), *options,
                              expect=expect, ranks=ranks, **(mounts or {}))

    def empty(self):
        return support.scratch("qshard-private-")

    def copy(self, *names):
        """A folder with copies of these files of the tiny model."""
        folder = self.empty()
        for name in names:
            shutil.copy(os.path.join(self.tiny, name), folder)
        return folder

    def same_as_alone(self, output):
        self.assertEqual(support.curve(output), support.curve(self.alone))
        self.assertEqual(support.adapter_digest(output), support.adapter_digest(self.alone))

    def test_same_bits_wherever_the_files_are(self):
        for group in ("world", "node"):
            for host, other in (("h2", "h1"), ("h1", "h2")):
                with self.subTest(group=group, without=host):
                    output = os.path.join(self.folder, f"{group}-{host}")
                    log = self.train(output, shard__group=group, mounts={host: {self.tiny: self.empty()}})
                    for name in ("base.h5", "train.h5", "eval.h5"):
                        self.assertRegex(log, rf"{name}: not seen on host {host} \(No such file .*\): .* host {other}\n")
                    self.same_as_alone(output)
                    lines = support.metrics(output, "ranks.jsonl")[-RANKS:]
                    self.assertTrue(all(line["read_bytes"] > 0 for line in lines), lines)

    def test_a_copy_on_each_host(self):
        output = os.path.join(self.folder, "copies")
        log = self.train(output, mounts={"h2": {self.tiny: self.copy("base.h5", "train.h5", "eval.h5")}})
        self.assertNotIn("not seen", log)
        self.same_as_alone(output)

    def test_checkpoints_are_kept_on_the_host_of_rank_0(self):
        """A step a start, on changing numbers of ranks, with nothing at all on the other host."""
        runs, private = self.empty(), self.empty()
        output = os.path.join(runs, "run")
        mounts = {"h2": {self.tiny: self.empty(), runs: private}}
        for start, ranks in enumerate((4, 3, 2)):
            log = self.train(output, expect=75, ranks=ranks, train__max_time=0.001, options=["--resume", "auto"],
                             mounts=mounts)
            self.assertRegex(log, r"run: not seen on host h2 \(.*\): the checkpoints of its ranks are kept on host h1\n")
            self.assertEqual(f"resuming after step {start}" in log, start > 0, log)
            support.qshard("check", os.path.join(output, f"step-{start + 1:08}"))
        self.train(output, options=["--resume", "must"], mounts=mounts)
        self.assertEqual(os.listdir(private), [])
        self.same_as_alone(output)
        self.assertEqual(sorted(os.listdir(os.path.join(output, f"step-{6:08}"))),
                         ["manifest.json", *(f"rank-{r:05}.h5" for r in range(RANKS))])

    def test_an_adapter_on_one_host(self):
        adapter = os.path.join(self.empty(), "adapter")
        support.qshard("export", self.alone, "-o", adapter)
        runs = os.path.dirname(adapter)
        mounts = {"h2": {self.tiny: self.empty(), runs: self.empty()}}
        words = ["eval", support.TINY_YAML, *support.settings(self.tiny, os.path.join(runs, "none"))]
        expected = support.qshard(*words, "--adapter", adapter).stdout
        self.assertIn(expected, self.run_hosts(*words, "--adapter", adapter, **mounts))
        outputs = [os.path.join(runs, name) for name in ("here", "there")]
        support.train(outputs[0], train__steps=3, lora__init=adapter)
        self.train(outputs[1], train__steps=3, train__eval_every=0, lora__init=adapter, mounts=mounts)
        self.assertEqual(support.adapter_digest(outputs[1]), support.adapter_digest(outputs[0]))

    def test_missing_everywhere(self):
        for name in ("base", "data.train"):
            log = self.train(os.path.join(self.folder, "never"), expect=3,
                             **{name.replace(".", "__"): os.path.join(self.tiny, "missing.h5")})
            self.assertIn("missing.h5", log)

    def test_another_file_on_the_other_host(self):
        """One line that names both hosts, and no run directory left behind."""
        other = self.copy("base.h5", "train.h5", "eval.h5")
        shutil.copy(support.base_of("--seed", "7"), other)
        log = self.train(os.path.join(self.folder, "never"), expect=8, mounts={"h2": {self.tiny: other}})
        self.assertRegex(log, r"error\[E800\] .*base\.h5: host h1 has \d+ bytes.* host h2 another file")
        other = self.copy("base.h5", "eval.h5")
        shutil.copy(os.path.join(self.tiny, "eval.h5"), os.path.join(other, "train.h5"))
        log = self.train(os.path.join(self.folder, "never"), expect=8, mounts={"h2": {self.tiny: other}})
        self.assertRegex(log, r"error\[E800\] .*train\.h5: host h1 has .* host h2 another file")
        self.assertFalse(os.path.exists(os.path.join(self.folder, "never")))

    def test_a_damaged_copy_on_the_other_host(self):
        other = self.copy("base.h5", "train.h5", "eval.h5")
        os.truncate(os.path.join(other, "base.h5"), 5000)
        log = self.train(os.path.join(self.folder, "never"), expect=3, mounts={"h2": {self.tiny: other}})
        self.assertRegex(log, r"error\[E3\d\d\] .*base\.h5: .*on host h2")

    def test_what_arrives_is_verified(self):
        """A byte of the base changed on the host that serves: found by whoever gets it, and said once."""
        damaged = self.copy("base.h5", "train.h5", "eval.h5")
        with h5py.File(os.path.join(damaged, "base.h5"), "r") as file:
            packed = file["units/layers.3/packed"]
            at, count = packed.id.get_offset(), packed.size
        with open(os.path.join(damaged, "base.h5"), "r+b") as file:
            for place in (at, at + count - 1):  # of the first rank's share, and of the last's, on h2
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 1]))
        for group in ("world", "node"):
            log = self.train(os.path.join(self.folder, "never"), expect=3, shard__group=group,
                             mounts={"h1": {self.tiny: damaged}, "h2": {self.tiny: self.empty()}})
            self.assertRegex(log, r"error\[E304\] .*layers\.3.* does not match its hash")

    def test_another_run_on_the_other_host(self):
        runs, theirs = self.empty(), self.empty()
        support.train(os.path.join(theirs, "run"), train__steps=1)
        before = sorted(os.listdir(os.path.join(theirs, "run")))
        log = self.train(os.path.join(runs, "run"), expect=8, mounts={"h2": {runs: theirs}})
        self.assertRegex(log, r"error\[E800\] .*run: host h2 has run .*host h1 writes run")
        self.assertEqual(os.listdir(runs), [])
        self.assertEqual(sorted(os.listdir(os.path.join(theirs, "run"))), before)


if __name__ == "__main__":
    unittest.main()
