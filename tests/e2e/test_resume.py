"""Killed or out of disk, a run ends with the bits of the undisturbed one. QSHARD_KILLS sets the number of kills."""
import csv
import os
import random
import re
import shutil
import signal
import subprocess
import time
import unittest

import support

KILLS = int(os.environ.get("QSHARD_KILLS", "12"))
SEED = int(os.environ.get("QSHARD_KILL_SEED", "1"))
STEPS = {"train__save_every": 3, "train__eval_every": 10}
IOFAULT = os.path.join(os.path.dirname(support.QSHARD), "tests", "libiofault.so")


def summarized_steps(output):
    """What summary.csv says; None without one."""
    path = os.path.join(output, "summary.csv")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return int(next(csv.DictReader(file))["steps"])


def plain_files(folder):
    """{name: contents}"""
    found = {}
    for name in os.listdir(folder):
        if os.path.isfile(os.path.join(folder, name)):
            with open(os.path.join(folder, name), "rb") as file:
                found[name] = file.read()
    return found


class Resume(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = support.scratch()
        cls.reference = os.path.join(cls.folder, "reference")
        begin = time.monotonic()
        support.train(cls.reference, ranks=2, **STEPS)
        cls.run_s = time.monotonic() - begin
        cls.curve = support.curve(cls.reference)
        cls.adapter = support.adapter_digest(cls.reference)

    def options(self, output):
        return ["train", support.TINY_YAML, *support.settings(support.tiny(), output, **STEPS)]

    def same_as_reference(self, output):
        self.assertEqual(support.curve(output), self.curve)
        self.assertEqual(support.adapter_digest(output), self.adapter)
        support.qshard("check", output)

    def test_kills_at_random_times(self):
        """The whole job or one rank, at any time, resumed on another number of ranks."""
        draw = random.Random(SEED)
        done = 0
        while done < KILLS:
            output = os.path.join(self.folder, f"kill-{done}")
            for _ in range(draw.randint(1, 3)):
                process = support.start(*self.options(output), ranks=draw.randint(1, 4))
                time.sleep(draw.uniform(0.1, self.run_s))
                pids = support.ranks_of(process)
                if draw.random() < 0.5 and pids:
                    support.kill(draw.choice(pids))
                    try:
                        process.communicate(timeout=60)
                    except subprocess.TimeoutExpired:
                        self.fail("the other ranks did not end")
                support.kill_all(process)
                done += 1
            support.qshard(*self.options(output), "--takeover", ranks=draw.randint(1, 4))
            with self.subTest(output=output, seed=SEED):
                self.same_as_reference(output)
            leftovers = [name for name in os.listdir(output) if ".tmp" in name]
            self.assertEqual(leftovers, [])
            shutil.rmtree(output)

    def test_kills_while_the_logs_are_cut(self):
        """Lines behind the newest checkpoint go: by cutting the file, or by writing it anew where something else stands in between. A kill
        leaves the one file or the other."""
        first, output = os.path.join(self.folder, "first"), os.path.join(self.folder, "cut")
        stop = {"train__max_time": 0.001, **STEPS}
        support.train(first, expect=75, **stop)
        for name, between in (("metrics.jsonl", ""), ("ranks.jsonl", "\n")):
            path = os.path.join(output, name)
            with open(os.path.join(first, name), encoding="utf-8") as file:
                kept = file.read()
            line = kept.splitlines()[0]
            before = between + kept + line.replace('"step": 1', '"step": 2') + "\n" + line[:20]
            for kind in ("killbefore", "killafter"):
                calls, code = 0, -signal.SIGKILL
                while code == -signal.SIGKILL:
                    calls += 1
                    shutil.rmtree(output, ignore_errors=True)
                    shutil.copytree(first, output)
                    with open(path, "w", encoding="utf-8") as file:
                        file.write(before)
                    fault = {"FAULT": f"io:{calls}:{kind}", "FAULT_PATH": path, **support.preload(IOFAULT)}
                    code = support.train(output, expect=None, environment=fault, **stop).returncode
                    with open(path, encoding="utf-8") as file:
                        after = file.read()
                    self.assertTrue(after == before or after.startswith(kept) and line[:20] not in after[len(kept):], (name, kind, calls, after))
                self.assertEqual(code, 75)  # the run has gone on by another step
                self.assertGreater(calls, 3)
                self.assertEqual([line["step"] for line in support.metrics(output)], [1, 2])
                self.assertEqual([line["step"] for line in support.metrics(output, "ranks.jsonl")], [1, 2])

    def test_lines_wait_for_room(self):
        """A disk that is full for a moment costs none; one that is full to the end is told, and the next start knows the losses as well."""
        how = {"train__steps": 4, "train__save_every": 2, "train__eval_every": 2}
        whole, output = os.path.join(self.folder, "whole"), os.path.join(self.folder, "waits")
        support.train(whole, **how)
        for fault, code in (("io:2:ENOSPC", 0), ("io:4:EDQUOT", 0), ("io:4:ENOSPC+", 4)):  # call 1 opens
            with self.subTest(fault=fault):
                shutil.rmtree(output, ignore_errors=True)
                done = support.train(output, ranks=2, expect=code, environment={
                    "FAULT": fault, "FAULT_RANK": "0", "FAULT_PATH": os.path.join(output, "metrics.jsonl"), **support.preload(IOFAULT)}, **how)
                self.assertIn("the run goes on, and the line waits", done.stderr)
                self.assertEqual(len(re.findall(r"(?m)^error\[E401\] \S+: lines of metrics are lost", done.stderr)), int(code == 4), done.stderr)
                self.assertEqual(support.curve(output), support.curve(whole)[:2] if code else support.curve(whole))
                self.assertEqual(support.adapter_digest(output), support.adapter_digest(whole))

    def test_a_checkpoint_by_time(self):
        """Behind the first step that ends later than train.save_time after the last one, here each; the bits are those of no such."""
        output = os.path.join(self.folder, "by-time")
        how = {**STEPS, "train__steps": 5, "train__save_every": 0, "train__keep_last": 9}
        support.train(output, ranks=2, train__save_time=1e-6, **how)
        self.assertEqual(sorted(name for name in os.listdir(output) if name.startswith("step-")), [f"step-{n:08d}" for n in range(1, 6)])
        other = os.path.join(self.folder, "by-none")
        support.train(other, train__save_time=0, **how)
        self.assertEqual([name for name in os.listdir(other) if name.startswith("step-")], ["step-00000005"])
        self.assertEqual(support.curve(output), support.curve(other))
        self.assertEqual(support.adapter_digest(output), support.adapter_digest(other))

    def test_finished_run_says_so(self):
        done = support.qshard(*self.options(self.reference), ranks=2)
        self.assertIn("finished", done.stderr)

    def test_more_steps_after_a_finished_run(self):
        """Where the schedule does not depend on the run's end: the bits of a run that was as long from the start."""
        constant = {"optim__schedule": "constant", "optim__warmup": 2}
        at_once, output = (os.path.join(self.folder, name) for name in ("at-once", "more"))
        support.train(at_once, ranks=2, train__steps=8, **constant)
        support.train(output, train__steps=4, **constant)
        self.assertEqual(summarized_steps(output), 4)
        support.train(output, ranks=2, expect=75, train__steps=8, train__max_time=0.001, **constant)
        self.assertEqual(support.metrics(output)[-1]["step"], 5)
        self.assertIsNone(summarized_steps(output))  # not that of the four
        support.train(output, ranks=3, train__steps=8, **constant)
        self.assertEqual(summarized_steps(output), 8)
        losses = [[line for line in support.curve(run) if line[1][0] == "loss"] for run in (at_once, output)]
        self.assertEqual(len(losses[0]), 8)
        self.assertEqual(losses[1], losses[0])
        self.assertEqual(support.adapter_digest(output), support.adapter_digest(at_once))
        support.qshard("check", output)
        done = support.train(output, ranks=2, train__steps=8, **constant)
        self.assertIn("finished", done.stderr)

    def test_a_start_on_other_data_is_refused_and_leaves_all_as_it_was(self):
        """Of a finished run that was to go on, too: it stays finished."""
        output, constant = os.path.join(self.folder, "other-data"), {"optim__schedule": "constant", "optim__warmup": 2}
        support.train(output, train__steps=4, **constant)

        before = plain_files(output)
        done = support.train(output, ranks=2, expect=8, train__steps=8, data__train=os.path.join(support.tiny(), "eval.h5"), **constant)
        self.assertRegex(done.stderr, r"(?m)^error\[E802\] .*data\.train")
        self.assertEqual(plain_files(output), before)
        self.assertIn("finished", support.train(output, train__steps=4, **constant).stderr)

    def test_more_steps_that_change_the_steps_done_are_refused_with_the_remedy(self):
        for name, schedule, warmup, remedy in (("cosine", "cosine", 1, "lora.init"), ("linear", "linear", 0.25, "lora.init"),
                                               ("fraction", "constant", 0.5, "give optim.warmup=2 as well")):
            with self.subTest(name=name):
                output = os.path.join(self.folder, name)
                settings = {"optim__schedule": schedule, "optim__warmup": warmup}
                support.train(output, train__steps=4, **settings)
                kept = support.curve(output)
                done = support.train(output, ranks=2, expect=8, train__steps=8, **settings)
                self.assertRegex(done.stderr, r"(?m)^error\[E802\] .*train\.steps \(then and now: 4 and 8\).*" + remedy)
                self.assertEqual(done.stderr.count("error["), 1, done.stderr)
                self.assertEqual(support.curve(output), kept)
                self.assertEqual(summarized_steps(output), 4)
        support.train(output, ranks=2, train__steps=8, optim__schedule="constant", optim__warmup=2)
        self.assertEqual(len([line for line in support.curve(output) if line[1][0] == "loss"]), 8)

    def test_other_settings_are_refused(self):
        output = os.path.join(self.folder, "other")
        support.train(output, train__steps=3, train__save_every=3)
        done = support.qshard(*self.options(output), "--set", "optim.lr=0.123", "--set", "train.steps=6", ranks=2,
                              expect=None)
        self.assertEqual(done.returncode, 8, done.stderr)
        self.assertEqual(done.stderr.count("error["), 1, done.stderr)

    def test_damaged_checkpoint_is_not_used(self):
        output = os.path.join(self.folder, "damaged")
        process = support.start(*self.options(output), ranks=2)
        while len([n for n in (os.listdir(output) if os.path.isdir(output) else []) if n.startswith("step-") and
                   ".tmp" not in n]) < 2:
            self.assertIsNone(process.poll(), "the run ended before it could be stopped")
            time.sleep(0.01)
        support.kill_all(process)
        newest = max(n for n in os.listdir(output) if n.startswith("step-") and ".tmp" not in n)
        victim = os.path.join(output, newest, "rank-00001.h5")
        with open(victim, "r+b") as file:
            file.seek(os.path.getsize(victim) // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        support.qshard(*self.options(output), "--takeover", ranks=2)
        self.assertTrue(any(name.startswith(newest) and name.endswith(".bad") for name in os.listdir(output)))
        self.assertEqual(support.curve(output), self.curve)


@unittest.skipUnless(os.geteuid() == 0, "mounting a small tmpfs needs root")
class DiskFull(unittest.TestCase):
    def setUp(self):
        self.folder = support.scratch()
        self.mount = os.path.join(self.folder, "small")
        os.mkdir(self.mount)

    def mounted(self, size):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", self.mount], capture_output=True)
        if done.returncode != 0:
            self.skipTest("a tmpfs cannot be mounted here: " + done.stderr.decode())
        self.addCleanup(subprocess.run, ["umount", "-l", self.mount])

    def test_training_survives_and_tells(self):
        """There is room for one checkpoint."""
        self.mounted("2600k")
        output = os.path.join(self.mount, "run")
        done = support.train(output, ranks=2, expect=None, train__save_every=1, train__steps=6)
        checkpoints = [n for n in os.listdir(output) if n.startswith("step-")]
        if done.returncode == 0:
            self.fail("2.6 MB cannot hold this run's checkpoints: the test has to be made smaller")
        self.assertEqual(checkpoints, ["step-00000001"])
        self.assertEqual(done.returncode, 4, done.stderr)
        self.assertEqual(done.stderr.count("error["), 1, done.stderr)
        self.assertEqual([n for n in checkpoints if ".tmp" in n], [])
        for name in checkpoints:
            support.qshard("check", os.path.join(output, name))

    def test_a_run_that_can_keep_nothing_does_not_begin(self):
        self.mounted("1100k")
        output = os.path.join(self.mount, "runs", "run")
        for options in ((), ("--dry-run",)):
            for ranks in (None, 2):
                done = support.train(output, ranks=ranks, expect=4, options=options, train__steps=6)
                self.assertEqual(len(re.findall(r"(?m)^error\[E401\] \S+: a checkpoint needs \d+ bytes, but \d+ are free", done.stderr)), 1,
                                 done.stderr)
                self.assertNotIn("train  1/6", done.stderr)
                self.assertEqual(os.listdir(self.mount), [])

    def test_quantize_leaves_nothing(self):
        self.mounted("200k")
        target = os.path.join(self.mount, "base.h5")
        done = support.qshard("quantize", os.path.join(support.tiny(), "model"), "-o", target, ranks=2, expect=4)
        self.assertEqual(done.stderr.count("error["), 1, done.stderr)
        self.assertEqual(os.listdir(self.mount), [])


if __name__ == "__main__":
    unittest.main()
