"""The checkpoint of the lowest eval_loss stays, is recorded, and is the same one however often the run was interrupted."""
import csv
import filecmp
import json
import os
import random
import re
import shutil
import time
import unittest

import support

# On answers that the model is not taught the loss falls with its first sums and then rises.
STEPS = {"train__steps": 8, "train__save_every": 1, "train__eval_every": 1, "train__keep_last": 1, "optim__lr": 0.01,
         "optim__schedule": "constant", "optim__warmup": 0, "seed": 2, "cpu__gemm": "strict"}
BEST, SHORT = 3, 5  # its step, and the length of a run to go on from
CURVE = {1: 5.722, 2: 5.424, 3: 5.123, 4: 5.251, 5: 5.279, 6: 5.244, 7: 5.627, 8: 5.979}


def other_answers(folder, name="other", answer=lambda i: "no, " + "xyz"[i % 3] * 3):
    """The evaluation data."""
    with open(os.path.join(support.tiny(), "model", "eval.jsonl"), encoding="utf-8") as file:
        records = [json.loads(line) for line in file][:20]
    for i, record in enumerate(records):
        record["messages"][-1]["content"] = answer(i)
    path = os.path.join(folder, f"{name}.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    support.python(os.path.join(support.PREP, "qshard_prep.py"), "--model", os.path.join(support.tiny(), "model"), path, "-o",
                   path[:-5] + "h5", "--seq-len", "64")
    return path[:-5] + "h5"


def steps_of(output):
    return sorted(int(name[5:]) for name in os.listdir(output) if re.fullmatch(r"step-\d{8}", name))


def record(output):
    with open(os.path.join(output, "run.json"), encoding="utf-8") as file:
        return json.load(file).get("best")


def summary(output):
    with open(os.path.join(output, "summary.csv"), encoding="utf-8") as file:
        return next(csv.DictReader(file))


def losses(output):
    return {line["step"]: line["eval_loss"] for line in support.metrics(output) if "eval_loss" in line}


def flip(path):
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


class Best(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = support.scratch()
        cls.steps = {**STEPS, "data__eval": other_answers(cls.folder)}
        cls.reference = os.path.join(cls.folder, "reference")
        begin = time.monotonic()
        cls.log = support.train(cls.reference, ranks=2, **cls.steps).stderr
        cls.run_s = time.monotonic() - begin
        cls.losses = losses(cls.reference)

    def as_reference(self, output):
        self.assertEqual(steps_of(output), [BEST, 8])
        self.assertEqual(record(output), {"step": BEST, "eval_loss": self.losses[BEST]})
        self.assertEqual(losses(output), self.losses)
        mine, theirs = summary(output), summary(self.reference)
        for name in ("best_eval_loss", "best_eval_step", "eval_loss", "final_loss"):
            self.assertEqual(mine[name], theirs[name])

    def files_of(self, *arguments):
        """What a command that takes -o DIR makes."""
        target = support.scratch() + "/made"
        support.qshard(*arguments, "-o", target)
        return target

    def assert_same_files(self, left, right, expect=True):
        same = filecmp.cmp(left, right, shallow=False)
        self.assertEqual(same, expect, (left, right))

    def test_it_is_kept_beside_the_last_and_recorded(self):
        self.assertEqual({step: round(loss, 3) for step, loss in self.losses.items()}, CURVE, "the case has lost its point")
        self.as_reference(self.reference)
        self.assertEqual(summary(self.reference)["best_eval_step"], str(BEST))
        self.assertEqual(float(summary(self.reference)["best_eval_loss"]), self.losses[BEST])
        self.assertIn(f"best eval_loss {self.losses[BEST]:.6f} at step {BEST}, kept in step-{BEST:08d}; the last is "
                      f"{self.losses[8]:.6f}\n", self.log)

    def test_training_has_the_same_bits(self):
        output = os.path.join(self.folder, "without")
        support.train(output, ranks=2, **{**self.steps, "data__eval": "", "train__eval_every": 0})
        self.assertEqual([line for line in support.curve(output)],
                         [line for line in support.curve(self.reference) if line[1][0] == "loss"])
        self.assertEqual(steps_of(output), [8])
        self.assertIsNone(record(output))
        self.assertEqual(summary(output)["best_eval_step"], "null")
        done = support.qshard("export", output, "--best", "-o", output + "-adapter", expect=4)
        self.assertIn("no checkpoint of the run has an evaluation", done.stderr)
        self.assertFalse(os.path.exists(output + "-adapter"))

    def test_commands_take_it(self):
        best, last = (os.path.join(self.reference, f"step-{step:08d}") for step in (BEST, 8))
        name = "adapter_model.safetensors"
        exported = self.files_of("export", self.reference, "--best")
        self.assert_same_files(f"{exported}/{name}", f"{self.files_of('export', best)}/{name}")
        self.assert_same_files(f"{self.files_of('export', self.reference)}/{name}", f"{self.files_of('export', last)}/{name}")
        self.assert_same_files(f"{exported}/{name}", f"{self.files_of('export', last)}/{name}", expect=False)
        merged = [self.files_of("merge", *words) for words in ((self.reference, "--best"), (best,))]
        self.assert_same_files(*(f"{target}/model.safetensors" for target in merged))
        settings = (support.TINY_YAML, *support.settings(support.tiny(), "", data__eval=self.steps["data__eval"], cpu__gemm="strict"))
        for words, loss in (((best,), self.losses[BEST]), ((exported,), self.losses[BEST]), ((self.reference,), self.losses[8]),
                            ((self.reference, "--best"), self.losses[BEST])):
            for ranks in (None, 2):
                done = support.qshard("eval", *settings, "--adapter", *words, ranks=ranks)
                self.assertEqual(float(done.stdout.split()[1]), loss)
        for ranks in (None, 2):
            texts = [support.qshard("sample", *settings, "--prompts", os.path.join(support.tiny(), "eval.h5"), "--tokens", 4,
                                    "--adapter", *words, ranks=ranks).stdout
                     for words in ((self.reference, "--best"), (best,), (self.reference,))]
            self.assertEqual(texts[0], texts[1])
            self.assertNotEqual(texts[0], texts[2])
            done = support.qshard("eval", *settings, "--best", ranks=ranks, expect=2)
            self.assertEqual(done.stderr.count("error["), 1, done.stderr)
            self.assertIn("--adapter", done.stderr)
            self.assertIn("no run directory", support.qshard("eval", *settings, "--adapter", best, "--best", ranks=ranks, expect=2).stderr)
        done = support.qshard("export", best, "--best", "-o", exported + "2", expect=2)
        self.assertIn("no run directory", done.stderr)

    def test_a_longer_run_on_other_ranks(self):
        output = os.path.join(self.folder, "longer")
        support.train(output, ranks=3, **{**self.steps, "train__steps": SHORT})
        self.assertEqual(steps_of(output), [BEST, SHORT])
        support.train(output, ranks=1, **self.steps)
        self.as_reference(output)

    def test_patience(self):
        """Two evaluations in a row that are not below the lowest end the run as if it had been so short; also where the second comes
        in another start, on other ranks."""
        for name, ranks, stops in (("at-once", 2, 0), ("starts", 3, 4)):
            with self.subTest(name=name):
                output = os.path.join(self.folder, "patience-" + name)
                how = {**self.steps, "train__patience": 2}
                for _ in range(stops):
                    support.train(output, ranks=1, expect=75, train__max_time=0.001, **how)
                done = support.train(output, ranks=ranks, **how)
                self.assertRegex(done.stderr, rf"step {SHORT}: eval_loss was lowest at step {BEST}, 5\.12\d+, .* in 2 evaluations")
                self.assertEqual(losses(output), {step: self.losses[step] for step in range(1, SHORT + 1)})
                self.assertEqual(steps_of(output), [BEST, SHORT])
                self.assertEqual(record(output), {"step": BEST, "eval_loss": self.losses[BEST]})
                self.assertEqual(int(summary(output)["steps"]), SHORT)
                self.assertIn("finished", support.train(output, **how).stderr)

    def test_patience_saves_where_it_ends_and_counts_on(self):
        """A run that was killed behind its last evaluation ends at once when it is started again."""
        output = os.path.join(self.folder, "patience-killed")
        how = {**self.steps, "train__steps": SHORT, "train__save_every": 4}
        support.train(output, **{**how, "train__max_time": 0.0})
        longer = {**how, "train__steps": 8, "train__patience": 2}
        done = support.train(output, ranks=2, **longer)
        self.assertIn(f"step {SHORT}: eval_loss was lowest at step {BEST}", done.stderr)
        self.assertEqual(steps_of(output), [4, SHORT])  # the best that has a checkpoint
        other = os.path.join(self.folder, "patience-saved")
        support.train(other, ranks=2, **{**longer, "train__save_every": 0, "train__save_time": 0})
        self.assertEqual(steps_of(other), [SHORT])
        self.assertEqual(support.adapter_digest(other), support.adapter_digest(output))

    def test_patience_without_evaluations_is_refused(self):
        done = support.train(os.path.join(self.folder, "refused"), ranks=2, expect=2, train__eval_every=0, train__patience=1)
        self.assertEqual(len(re.findall(r"(?m)^error\[E203\] .*train\.patience=1 .*train\.eval_every=0", done.stderr)), 1)

    def test_an_evaluation_before_the_first_step(self):
        """Of the model as it is without training, on any number of ranks, and once however often the run was interrupted."""
        output = os.path.join(self.folder, "at-first")
        how = {**self.steps, "train__steps": SHORT, "train__eval_first": "true", "train__patience": 1}
        support.train(output, ranks=3, expect=75, **how, train__max_time=0.001)
        done = support.train(output, ranks=2, **how)
        untrained = support.qshard("eval", support.TINY_YAML, *support.settings(support.tiny(), "", data__eval=self.steps["data__eval"],
                                                                                cpu__gemm="strict")).stdout
        self.assertEqual(list(losses(output)), list(range(BEST + 2)))
        self.assertEqual(losses(output)[0], float(re.match(r"eval_loss (\S+)", untrained)[1]))
        self.assertEqual({step: loss for step, loss in losses(output).items() if step > 0},
                         {step: self.losses[step] for step in range(1, BEST + 2)})
        self.assertEqual(record(output), {"step": BEST, "eval_loss": self.losses[BEST]})
        self.assertIn("in 1 evaluations", done.stderr)

    def test_where_the_untrained_model_was_the_best(self):
        output = os.path.join(self.folder, "untrained")
        letters = "".join(random.Random(3).choices("abcdefghijklmnopqrstuvwxyz", k=600))  # the model is taught sums
        how = {**self.steps, "train__eval_first": "true", "train__eval_every": 8, "train__save_every": 8,
               "data__eval": other_answers(self.folder, "letters", lambda i: letters[30 * i:30 * i + 30])}
        process = support.start("train", support.TINY_YAML, *support.settings(support.tiny(), output, **how), ranks=2)
        try:
            path = os.path.join(output, "metrics.jsonl")
            while not os.path.exists(path) or not losses(output):
                self.assertIsNone(process.poll(), "the run ended before it could be killed")
                time.sleep(0.002)
        finally:
            support.kill_all(process)
        done = support.train(output, ranks=1, options=("--takeover",), **how)
        self.assertEqual(list(losses(output)), [0, 8])
        self.assertGreater(losses(output)[8], losses(output)[0])
        before, behind = (f"{losses(output)[step]:.6f}" for step in (0, 8))
        self.assertIn(f"eval_loss was lower before the first step, {before}, than behind any, {behind} at best; ", done.stderr)
        self.assertEqual(record(output), {"step": 8, "eval_loss": losses(output)[8]})

    def test_kills_at_random_times(self):
        draw = random.Random(7)
        for i in range(4):
            output = os.path.join(self.folder, f"kill-{i}")
            options = ["train", support.TINY_YAML, *support.settings(support.tiny(), output, **self.steps)]
            for _ in range(3):
                process = support.start(*options, ranks=draw.randint(1, 4))
                time.sleep(draw.uniform(0.1, self.run_s))
                support.kill_all(process)
            support.qshard(*options, "--takeover", ranks=draw.randint(1, 4))
            with self.subTest(output=output):
                self.as_reference(output)

    def test_a_killed_run_says_it_too(self):
        output = os.path.join(self.folder, "killed")
        process = support.start("train", support.TINY_YAML, *support.settings(support.tiny(), output,
                                                                              **{**self.steps, "train__steps": 4000}), ranks=2)
        try:
            path = os.path.join(output, "metrics.jsonl")
            while not os.path.exists(path) or len(losses(output)) < SHORT:
                self.assertIsNone(process.poll(), "the run ended before it could be killed")
                time.sleep(0.002)
        finally:
            support.kill_all(process)
        known = losses(output)
        before = {step: loss for step, loss in known.items() if step < max(known)}  # the last one's may not be noted yet
        self.assertIn(record(output)["step"], {min(some, key=some.get) for some in (known, before)})
        self.assertLess(record(output)["step"], max(known), "the case has lost its point")

    def test_the_former_best_goes_at_the_end(self):
        output = os.path.join(self.folder, "falling")
        support.train(output, ranks=2, **{**self.steps, "data__eval": os.path.join(support.tiny(), "train.h5")})
        self.assertEqual(record(output)["step"], 8, "the case has lost its point")
        self.assertEqual(steps_of(output), [8])

    def test_gone_or_damaged_before_the_next_start(self):
        """The next best of those that are there takes its place."""
        first = os.path.join(self.folder, "first")
        support.train(first, ranks=2, **{**self.steps, "train__steps": SHORT})
        for how in ("gone", "damaged"):
            output = os.path.join(self.folder, how)
            shutil.copytree(first, output)
            best = os.path.join(output, f"step-{BEST:08d}")
            if how == "gone":
                shutil.rmtree(best)
                done = support.qshard("export", output, "--best", "-o", output + "-adapter", expect=4)
                self.assertIn("no longer there", done.stderr)
            else:
                flip(os.path.join(best, "rank-00001.h5"))
            log = support.train(output, ranks=2, **self.steps).stderr
            self.assertEqual(steps_of(output), [6, 8])
            self.assertEqual(record(output), {"step": 6, "eval_loss": self.losses[6]})
            self.assertEqual(losses(output), self.losses)
            self.assertEqual(os.path.exists(best + ".bad"), how == "damaged")
            self.assertEqual("had the best eval_loss, but is no good checkpoint" in log, how == "damaged", log)
            self.assertIn(f"{self.losses[BEST]:.6f} at step {BEST} has no checkpoint", log)

    def test_steps_with_both(self):
        """Evaluations and checkpoints at other steps: the best among those that have both."""
        output = os.path.join(self.folder, "both")
        log = support.train(output, ranks=2, **{**self.steps, "train__save_every": 2}).stderr
        self.assertEqual(losses(output), self.losses)
        self.assertEqual(steps_of(output), [6, 8])
        self.assertEqual(record(output), {"step": 6, "eval_loss": self.losses[6]})
        self.assertIn(f"best eval_loss {self.losses[6]:.6f} at step 6, kept in step-00000006; the last is {self.losses[8]:.6f}; "
                      f"{self.losses[BEST]:.6f} at step {BEST} has no checkpoint (train.save_every)\n", log)

    def test_milestones_count(self):
        output = os.path.join(self.folder, "milestones")
        support.train(output, ranks=2, **self.steps, train__keep_every=4)
        self.assertEqual(steps_of(output), [BEST, 4, 8])
        self.assertEqual(record(output)["step"], BEST)

    def test_other_evaluation_data_begins_anew(self):
        """Losses on other data do not compare."""
        output = os.path.join(self.folder, "data")
        lower = os.path.join(support.tiny(), "train.h5")
        support.train(output, ranks=2, **{**self.steps, "train__steps": SHORT, "data__eval": lower})
        self.assertLess(record(output)["eval_loss"], min(CURVE.values()), "the case has lost its point")
        support.train(output, ranks=2, **self.steps)
        self.assertEqual(record(output), {"step": 6, "eval_loss": self.losses[6]})
        self.assertEqual(steps_of(output), [6, 8])


if __name__ == "__main__":
    unittest.main()
