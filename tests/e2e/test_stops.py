"""Stops: signals to mpirun and to ranks, a terminal, an output or data that go away, at any moment of a run. It looks at moments, so that
nothing else goes on beside it; kills, which may come at any time, are in test_resume.py."""
import json
import os
import shutil
import signal
import subprocess
import time
import unittest

import h5py

import support

MPIFAULT = os.path.join(os.path.dirname(support.QSHARD), "tests", "libmpifault.so")
LATE_S = 100  # far more than a stop waits for the rest of a step, less than train.stall_limit


class Stopped(unittest.TestCase):
    """A run that is stopped saves, asks for another start, and ends there with the bits of the undisturbed one."""

    STEPS = {"train__save_every": 3, "train__eval_every": 10}

    @classmethod
    def setUpClass(cls):
        cls.folder = support.scratch()
        reference = os.path.join(cls.folder, "reference")
        support.train(reference, ranks=2, **cls.STEPS)
        cls.curve = support.curve(reference)
        cls.adapter = support.adapter_digest(reference)

    def options(self, output):
        return ["train", support.TINY_YAML, *support.settings(support.tiny(), output, **self.STEPS)]

    def same_as_reference(self, output):
        self.assertEqual(support.curve(output), self.curve)
        self.assertEqual(support.adapter_digest(output), self.adapter)
        support.qshard("check", output)

    def test_a_terminal_that_goes_away(self):
        """HUP saves, but under nohup it is nothing."""
        for words, code in (((), 75), (("nohup",), 0)):
            with self.subTest(words=words):
                output = os.path.join(self.folder, "-".join(("hup", *words)))
                process = subprocess.Popen([*words, *support.command(self.options(output))], env=support.environment(),
                                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                while not os.path.exists(os.path.join(output, "metrics.jsonl")) or len(support.metrics(output)) < 2:
                    self.assertIsNone(process.poll(), "the run ended before it could be stopped")
                    time.sleep(0.01)
                process.send_signal(signal.SIGHUP)
                text, _ = process.communicate(timeout=60)
                self.assertEqual(process.returncode, code, text)
                self.assertFalse(os.path.exists(os.path.join(output, "run.lock")))
                support.qshard(*self.options(output))
                self.same_as_reference(output)

    @unittest.skipUnless(os.path.exists(MPIFAULT), "libmpifault.so is not built")
    def test_a_term_of_mpirun(self):
        """Which leaves its ranks a second: a step whose rest takes 5 is given up, and the one before it is there."""
        folder, output = support.scratch(), os.path.join(self.folder, "term")
        how = {"train__steps": 4, "train__global_batch": 20, "train__micro_batch": 1, "train__gather_group": 1, "train__save_every": 0,
               "train__eval_every": 0}
        reference = os.path.join(folder, "reference")
        support.train(reference, ranks=2, **how)
        done = support.train(output, ranks=2, expect=75, environment={
            "QSHARD_FAULT_PASS": "15", "QSHARD_FAULT_LATE": "5", "QSHARD_FAULT_PASS_SIGNAL": str(int(signal.SIGTERM)),
            **support.preload(MPIFAULT)}, **how)
        self.assertRegex(done.stderr, r"step 2: given up for a stop signal, with about [\d.]+ s of it left")
        self.assertEqual([name for name in os.listdir(output) if name.startswith("step-")], ["step-00000001"])
        support.train(output, ranks=3, **how)
        self.assertEqual(support.curve(output), support.curve(reference))

    def test_usr1_saves_and_asks_for_requeue(self):
        output = os.path.join(self.folder, "usr1")
        process = support.start(*self.options(output), ranks=2)
        while not os.path.exists(os.path.join(output, "metrics.jsonl")) or len(support.metrics(output)) < 4:
            self.assertIsNone(process.poll(), "the run ended before it could be stopped")
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGUSR1)  # mpirun forwards it to every rank
        text, _ = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 75, text)
        steps = max(line["step"] for line in support.metrics(output))
        self.assertLess(steps, 40)
        self.assertTrue(os.path.isdir(os.path.join(output, f"step-{steps:08d}")))
        support.qshard(*self.options(output), ranks=3)
        self.same_as_reference(output)

    def test_a_signal_during_an_evaluation(self):
        """It is given up: what was not saved is, and the next start evaluates anew. At the last step, too."""
        folder = support.scratch()
        long = {"train__steps": 6, "train__eval_every": 3, "train__micro_batch": 1, "data__eval": os.path.join(support.tiny(), "train.h5")}
        reference, output = os.path.join(folder, "reference"), os.path.join(folder, "run")
        support.train(reference, ranks=2, **long)
        for step in (3, 6):
            process = support.start("train", support.TINY_YAML, *support.settings(support.tiny(), output, **long), ranks=2)
            try:
                metrics = os.path.join(output, "metrics.jsonl")
                while not os.path.exists(metrics) or not any(line["step"] == step for line in support.metrics(output)):
                    self.assertIsNone(process.poll(), "the run ended before it could be stopped")
                    time.sleep(0.002)
                os.kill(process.pid, signal.SIGUSR1)
                text, _ = process.communicate(timeout=60)
            finally:
                support.kill_all(process)
            self.assertEqual(process.returncode, 75, text)
            self.assertIn("the evaluation is left to the next start", text)
            self.assertEqual([line["step"] for line in support.metrics(output) if "eval_loss" in line], [3] if step == 6 else [])
            self.assertTrue(os.path.isdir(os.path.join(output, f"step-{step:08d}")), text)
        support.train(output, ranks=3, **long)
        self.assertEqual(support.curve(output), support.curve(reference))
        self.assertEqual(support.adapter_digest(output), support.adapter_digest(reference))

    @unittest.skipUnless(os.path.exists(MPIFAULT), "libmpifault.so is not built")
    def test_a_signal_within_a_step(self):
        """On one rank, half-way through a step: given up if the rest is long, so that the steps before it are saved at once, else finished."""
        folder = support.scratch()
        how = {"train__steps": 4, "train__global_batch": 20, "train__micro_batch": 1, "train__gather_group": 1, "train__save_every": 0,
               "train__eval_every": 0}
        reference = os.path.join(folder, "reference")
        support.train(reference, ranks=2, **how)

        def stop(output, ranks, step, late):
            """In the middle of this start's step number `step`."""
            passes = -(-20 // ranks)
            done = support.train(output, ranks=ranks, expect=75, environment={
                "QSHARD_FAULT_PASS": str(passes * step - passes // 2), "QSHARD_FAULT_LATE": str(late), **support.preload(MPIFAULT)}, **how)
            return done.stderr

        def saved(output):
            return sorted(name for name in os.listdir(output) if name.startswith("step-"))

        for ranks, others in ((1, 3), (2, 1), (3, 2)):
            with self.subTest(ranks=ranks):
                output = os.path.join(folder, f"long-{ranks}")
                self.assertRegex(stop(output, ranks, 1, LATE_S), r"step 1: given up .*\n.*this start has done no step")
                self.assertFalse(os.path.exists(output))  # nothing has been done
                self.assertRegex(stop(output, ranks, 2, LATE_S), r"step 2: given up for a stop signal, with about \d+ s of it left")
                self.assertEqual(saved(output), ["step-00000001"])
                self.assertEqual([line["step"] for line in support.metrics(output)], [1])
                counted = sum(line["tokens"] for line in support.metrics(output, "ranks.jsonl"))
                self.assertEqual(counted, support.metrics(output)[0]["all_tokens"])
                said = stop(output, ranks, 1, LATE_S)
                self.assertRegex(said, r"step 2: given up .*\n.*this start has done no step")
                self.assertNotIn("saved step", said)
                self.assertEqual(saved(output), ["step-00000001"])
                support.train(output, ranks=others, **how)
                self.assertEqual(support.curve(output), support.curve(reference))
                self.assertEqual(support.adapter_digest(output), support.adapter_digest(reference))
                support.qshard("check", output)

                output = os.path.join(folder, f"short-{ranks}")
                self.assertNotIn("given up", stop(output, ranks, 2, 0))
                self.assertEqual(saved(output), ["step-00000002"])
                support.train(output, ranks=others, **how)
                self.assertEqual(support.curve(output), support.curve(reference))


class Interrupted(unittest.TestCase):
    """Signals that come together, early or late, and what goes away or changes under a run."""

    LONG = {"train__steps": 2000, "train__save_every": 0, "train__eval_every": 0}

    @classmethod
    def setUpClass(cls):
        cls.folder = support.scratch()

    def path(self, name):
        return os.path.join(self.folder, name)

    def started(self, output, ranks, **more):
        """A run that has done a few of its many steps."""
        options = support.settings(support.tiny(), output, **{**self.LONG, **more})
        process = support.start("train", support.TINY_YAML, *options, ranks=ranks)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.kill)
        while not os.path.exists(os.path.join(output, "metrics.jsonl")) or len(support.metrics(output)) < 3:
            self.assertIsNone(process.poll(), "the run ended before it could be stopped")
            time.sleep(0.01)
        return process

    def saved(self, process, output):
        text, _ = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 75, text)
        step = max(line["step"] for line in support.metrics(output))
        self.assertLess(step, self.LONG["train__steps"])
        support.qshard("check", os.path.join(output, f"step-{step:08d}"))
        self.assertFalse(os.path.exists(os.path.join(output, "run.lock")))

    def test_usr1_then_term(self):
        """What a scheduler sends ahead of its time limit, to the processes themselves: the save is finished."""
        output = self.path("alone")
        process = self.started(output, None)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(process.pid, number)
        self.saved(process, output)

    def test_usr1_then_term_on_ranks(self):
        output = self.path("ranks")
        process = self.started(output, 2)
        os.kill(process.pid, signal.SIGUSR1)  # mpirun forwards it
        ranks = support.ranks_of(process)
        self.assertEqual(len(ranks), 2)
        for pid in ranks:
            os.kill(pid, signal.SIGTERM)
        self.saved(process, output)

    @unittest.skipUnless(os.path.exists(MPIFAULT), "libmpifault.so is not built")
    def test_a_signal_while_mpi_starts(self):
        """As soon as the program has begun: it loads, does a step, saves and asks for another start."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            with self.subTest(signal=number.name):
                output = self.path(f"early-{number.name}")
                options = support.settings(support.tiny(), output, **self.LONG)
                support.qshard("train", support.TINY_YAML, *options, ranks=2, expect=75,
                               QSHARD_FAULT_SIGNAL=str(int(number)), **support.preload(MPIFAULT))
                support.qshard("check", os.path.join(output, "step-00000001"))

    @unittest.skipUnless(os.path.exists(MPIFAULT), "libmpifault.so is not built")
    def test_a_signal_before_an_evaluation_of_one_pass(self):
        """It is done with that pass: nothing is left to another start."""
        output = self.path("one-pass")
        options = support.settings(support.tiny(), output, train__steps=1, train__eval_every=1, train__micro_batch=10)
        support.qshard("train", support.TINY_YAML, *options, ranks=2,
                       QSHARD_FAULT_SIGNAL=str(int(signal.SIGUSR1)), **support.preload(MPIFAULT))
        self.assertEqual(len([line for line in support.metrics(output) if "eval_loss" in line]), 1)
        self.assertIn("finished", support.qshard("train", support.TINY_YAML, *options).stderr)

    def test_data_written_over(self):
        """The run notices before it saves what it made of it; a file that was only touched is no news."""
        for name, change, code in (("touched", False, 75), ("changed", True, 3)):
            with self.subTest(name=name):
                output, data = self.path(name), self.path(name + ".h5")
                shutil.copy(os.path.join(support.tiny(), "train.h5"), data)
                process = self.started(output, None, data__train=data)
                with h5py.File(data, "r+") as file:
                    tokens = file["tokens"][:]
                    file["tokens"][:] = tokens[::-1] if change else tokens
                os.utime(data)
                os.kill(process.pid, signal.SIGTERM)
                text, _ = process.communicate(timeout=120)
                self.assertEqual(process.returncode, code, text)
                saved = [entry for entry in os.listdir(output) if entry.startswith("step-")]
                self.assertEqual(len(saved), not change)
                if change:
                    self.assertEqual(text.count("error["), 1, text)
                    self.assertIn(f"error[E304] {data}: was changed while the run was reading it; put the old file", text)

    def test_taken_over_while_it_lives(self):
        """It notices before it writes again, and the run that took over goes on undisturbed."""
        output = self.path("taken")
        options = support.settings(support.tiny(), output, **{**self.LONG, "train__save_every": 50})
        first = self.started(output, 2, train__save_every=50)
        ranks = support.ranks_of(first)
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        second = support.start("train", support.TINY_YAML, *options, "--takeover")
        self.addCleanup(second.stdout.close)
        self.addCleanup(second.kill)
        lines = []
        while "saved step" not in (lines[-1] if lines else ""):
            lines.append(second.stdout.readline())
            self.assertNotEqual(lines[-1], "", "".join(lines))
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        text, _ = first.communicate(timeout=120)
        self.assertEqual(first.returncode, 2, text)
        self.assertRegex(text, rf"(?m)^error\[E204\] {output}: process {second.pid} .*taken over")
        self.assertEqual(text.count("error["), 1, text)
        self.assertIsNone(second.poll())
        second.send_signal(signal.SIGUSR1)
        self.saved(second, output)
        steps = [line["step"] for line in support.metrics(output)]
        self.assertEqual(steps, list(range(1, len(steps) + 1)), "the first one's lines are in no file")
        self.assertEqual([name for name in os.listdir(output) if "bad" in name or "tmp" in name], [])

    @staticmethod
    def locks(pid, output):
        try:
            with open(os.path.join(output, "run.lock"), encoding="utf-8") as file:
                return json.load(file)["pid"] == pid
        except FileNotFoundError:
            return False

    def test_taken_over_while_it_loads(self):
        """It does not cut the other's lines off, which are of later steps than its own checkpoint."""
        output = self.path("loading")
        how = support.settings(support.tiny(), output, **self.LONG)
        support.train(output, expect=75, train__max_time=0.001, **self.LONG)
        held = False
        while not held:  # until it is met between its lock and its first line
            first = support.start("train", support.TINY_YAML, *how)
            self.addCleanup(first.stdout.close)
            self.addCleanup(first.kill)
            while not self.locks(first.pid, output):
                self.assertIsNone(first.poll())
            first.send_signal(signal.SIGSTOP)
            files = [os.path.realpath(entry.path) for entry in os.scandir(f"/proc/{first.pid}/fd")]
            held = os.path.join(os.path.realpath(output), "metrics.jsonl") not in files
            if not held:
                support.kill_all(first)
        second = support.start("train", support.TINY_YAML, *how, "--takeover")
        self.addCleanup(second.stdout.close)
        self.addCleanup(second.kill)
        while len(support.metrics(output)) < 10:
            self.assertIsNone(second.poll())
            time.sleep(0.01)
        first.send_signal(signal.SIGCONT)
        text, _ = first.communicate(timeout=120)
        self.assertEqual(first.returncode, 2, text)
        self.assertRegex(text, rf"(?m)^error\[E204\] {output}: process {second.pid} .*taken over")
        second.send_signal(signal.SIGUSR1)
        self.saved(second, output)
        steps = [line["step"] for line in support.metrics(output)]
        self.assertEqual(steps, list(range(1, len(steps) + 1)))

    def test_the_output_goes_away(self):
        output = self.path("gone")
        process = self.started(output, 2)
        shutil.rmtree(output)
        os.kill(process.pid, signal.SIGUSR1)
        text, _ = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 4, text)
        self.assertRegex(text, rf"(?m)^error\[E400\] {output}.*No such file")
        self.assertEqual(text.count("error["), 1, text)

    def test_killed_between_the_last_save_and_the_end(self):
        """The next start has no step to do, and its summary still knows the losses of the run."""
        output = self.path("last")
        settings = {"train__steps": 4, "train__save_every": 2, "train__eval_every": 2}
        support.train(output, ranks=2, **settings)
        summary = self.summary(output)
        curve = support.curve(output)
        with open(os.path.join(output, "run.json"), encoding="utf-8") as file:
            run = json.load(file)
        run["finished"] = False
        with open(os.path.join(output, "run.json"), "w", encoding="utf-8") as file:
            json.dump(run, file)
        os.remove(os.path.join(output, "summary.csv"))
        support.train(output, ranks=3, **settings)
        again = self.summary(output)
        for name in ("steps", "final_loss", "eval_loss"):
            self.assertEqual(again[name], summary[name], name)
        self.assertNotIn("null", (summary["final_loss"], summary["eval_loss"]))
        self.assertEqual(support.curve(output), curve)

    def summary(self, output):
        with open(os.path.join(output, "summary.csv"), encoding="utf-8") as file:
            names, values = file.read().split()
        return dict(zip(names.split(","), values.split(",")))


if __name__ == "__main__":
    unittest.main()
