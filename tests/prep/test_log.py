"""A run's metrics to W&B and TensorBoard, stand-ins of which write down what they are given: everything once, whatever happens."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import unittest

from support import PREP, FolderTest, tool

WANDB = """
import json, os
def note(what):
    with open(os.environ["STAND_IN"], "a") as file:
        file.write(json.dumps(what) + "\\n")
class Run:
    last = -1
    def log(self, values, step, commit):
        if os.environ.get("WANDB_MODE") == "fail" and step == 3:
            raise ValueError("the run was deleted")
        assert step > self.last, "W&B leaves out a step that it has had"
        self.last = step
        note({"step": step, **values})
    def finish(self):
        note("finish")
def init(**options):
    if os.environ.get("WANDB_MODE") == "refuse":
        raise RuntimeError("api_key not configured\\n(no-tty)")
    note(["init", options])
    return Run()
"""
WRITER = """
import json, os
class SummaryWriter:
    def __init__(self, folder):
        os.makedirs(folder, exist_ok=True)
        self.held = [["init", MODULE, folder]]
    def add_text(self, name, text, step):
        self.held.append(["text", name, text])
    def add_scalar(self, name, value, step):
        self.held.append({"step": step, name: value})
    def flush(self):
        with open(os.environ["STAND_IN"], "a") as file:
            file.writelines(json.dumps(what) + "\\n" for what in self.held)
        self.held = []
    def close(self):
        self.held.append("finish")
        self.flush()
"""
CONFIG = """# Resolved configuration of a qshard run.
base: "my \\"base\\".h5"  # quantized base, made by qshard quantize
seed: 42  # seed
train:
  steps: 6  # length of the run
  residual_fp32: true  # true | false
optim:
  lr: 5.0e-04  # above 0
  betas: [0.9, 0.999]  # decay
lora:
  targets: [q_proj, v_proj]  # linears
"""
SETTINGS = {"base": 'my "base".h5', "seed": 42, "train.steps": 6, "train.residual_fp32": True, "optim.lr": 5e-4,
            "optim.betas": [0.9, 0.999], "lora.targets": "[q_proj, v_proj]"}


def metrics(first, last, time_s=0.5):
    """Lines of the steps, with an evaluation behind each third; the loss of step 2 is not finite."""
    lines = []
    for step in range(first, last + 1):
        lines.append({"step": step, "tokens": 80 + step, "loss": None if step == 2 else 7.25 - step, "step_time_s": time_s})
        if step % 3 == 0:
            lines.append({"step": step, "eval_loss": 8.5 - step, "eval_tokens": 211})
    return "".join(json.dumps(line) + "\n" for line in lines)


def numbers(lines):
    """{(step, name): value} of lines; fails where one comes twice."""
    found = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and value is not None:
                assert (line["step"], name) not in found, f"{name} of step {line['step']} comes twice"
                found[line["step"], name] = value
    return found


class Log(FolderTest):
    def setUp(self):
        super().setUp()
        self.modules = self.path("modules")
        os.makedirs(os.path.join(self.modules, "torch", "utils"))
        self.write("modules/wandb.py", WANDB)
        self.write("modules/tensorboardX.py", 'MODULE = "tensorboardX"' + WRITER)
        self.write("modules/torch/__init__.py", "")
        self.write("modules/torch/utils/__init__.py", "")
        self.write("modules/torch/utils/tensorboard.py", 'MODULE = "torch"' + WRITER)
        self.environment = {"PYTHONPATH": self.modules, "STAND_IN": self.path("sent")}
        os.mkdir(self.path("run"))
        self.write("run/config.yaml", CONFIG)

    def run_is(self, lines, finished=False, run_id="20261128T095808Z-802f33b8"):
        """The run as it stands now; files that are written anew are other files, as the program's are."""
        for name, text in (("metrics.jsonl", lines), ("run.json", json.dumps({"format": "qshard-run", "run_id": run_id,
                                                                               "finished": finished}))):
            self.write("new", text)
            os.replace(self.path("new"), self.path(f"run/{name}"))

    def append(self, text):
        with open(self.path("run/metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(text)

    def log(self, to, *options, expect=0, **environment):
        result = tool("qshard_log.py", self.path("run"), "--to", to, *options, **{**self.environment, **environment})
        self.assertEqual((result.returncode, result.stderr), (expect, ""))
        return result.stdout

    def sent(self):
        """What the stand-in has written down: (all numbers, all else)."""
        if not os.path.exists(self.path("sent")):
            return {}, []
        with open(self.path("sent"), encoding="utf-8") as file:
            notes = [json.loads(line) for line in file]
        return numbers(note for note in notes if isinstance(note, dict)), [note for note in notes if not isinstance(note, dict)]

    def assert_sent(self, lines):
        self.assertEqual(self.sent()[0], numbers(map(json.loads, lines.splitlines())))

    def both(self):
        """The names of both loggers, each with nothing sent yet."""
        for to in ("wandb", "tensorboard"):
            if os.path.exists(self.path("sent")):
                os.unlink(self.path("sent"))
            yield to

    def test_a_finished_run_is_sent_whole_and_once(self):
        self.run_is(metrics(1, 6), finished=True)
        for to in self.both():
            self.assertIn("8 lines sent to", self.log(to))
            self.assert_sent(metrics(1, 6))
            first, *others = self.sent()[1]
            if to == "wandb":
                self.assertEqual(first[1], {"project": "qshard", "name": "run", "id": "20261128T095808Z-802f33b8", "resume": "allow",
                                            "config": SETTINGS, "dir": self.path("run")})
                self.assertEqual(others, ["finish"])
            else:
                self.assertEqual(first, ["init", "torch", self.path("run/tensorboard")])
                self.assertIn('base: "my', others[0][2])
                self.assertEqual(others[1:], ["finish"])
            for _ in range(2):
                self.assertIn(": 0 lines sent to", self.log(to))
            self.assert_sent(metrics(1, 6))
            self.assertEqual(sum(note[0] == "text" for note in self.sent()[1]), int(to == "tensorboard"))

    def test_wandbs_own_variables_count(self):
        self.run_is(metrics(1, 1), finished=True)
        self.log("wandb", WANDB_PROJECT="p", WANDB_NAME="n", WANDB_DIR="d")
        options = self.sent()[1][0][1]
        self.assertEqual((options["project"], options["name"], options["dir"]), ("p", "n", "d"))

    def test_a_start_goes_on_where_the_last_one_ended(self):
        """Half a line waits for its end, and for W&B, which takes a step once, the last step for what may belong to it."""
        for to in self.both():
            self.run_is(metrics(1, 6).rpartition('{"step": 6, "eval')[0][:-9])  # into the line of step 6
            self.log(to)
            self.assert_sent(metrics(1, 4 if to == "wandb" else 5))
            self.run_is(metrics(1, 6).rpartition('{"step": 6, "eval')[0])  # the evaluation is under way
            said = self.log(to)
            self.assertEqual("step 6 follows when" in said, to == "wandb", said)
            self.run_is(metrics(1, 7))
            self.log(to)
            self.run_is(metrics(1, 8), finished=True)
            self.log(to)
            self.assert_sent(metrics(1, 8))

    def test_steps_that_a_resume_does_again_are_not_sent_again(self):
        for to in self.both():
            self.run_is(metrics(1, 8))
            self.log(to)
            self.run_is(metrics(1, 3) + metrics(4, 5, time_s=0.25))
            self.log(to)
            self.run_is(metrics(1, 3) + metrics(4, 12, time_s=0.25), finished=True)
            self.log(to)
            self.assertEqual(sorted(self.sent()[0]), sorted(numbers(map(json.loads, metrics(1, 12).splitlines()))))

    def follow(self, to):
        return subprocess.Popen([sys.executable, os.path.join(PREP, "qshard_log.py"), self.path("run"), "--to", to, "--follow",
                                 "--every", "0.02"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, **self.environment})

    def wait_until_sent(self, started, step):
        while not any(key[0] == step for key in self.sent()[0]):
            self.assertIsNone(started.poll(), "it ended")
            time.sleep(0.02)

    def test_it_follows_a_run_over_resumes_to_its_end(self):
        for to in self.both():
            for name in ("run.json", "metrics.jsonl"):
                if os.path.exists(self.path(f"run/{name}")):
                    os.unlink(self.path(f"run/{name}"))
            started = self.follow(to)
            self.addCleanup(started.kill)
            self.assertIn("waiting for", started.stderr.readline())
            self.run_is("")
            self.append(metrics(1, 4)[:-20])
            self.wait_until_sent(started, 2)
            self.append(metrics(1, 4)[-20:] + metrics(5, 7))
            self.wait_until_sent(started, 6)
            self.run_is(metrics(1, 3))  # cut by a resume, to another file and then in place
            self.append(metrics(4, 9, time_s=0.25))
            self.wait_until_sent(started, 8)
            with open(self.path("run/metrics.jsonl"), "w", encoding="utf-8") as file:
                file.write(metrics(1, 6) + metrics(7, 14, time_s=0.125))
            self.wait_until_sent(started, 13)
            self.assertIsNone(started.poll())
            self.run_is(metrics(1, 6) + metrics(7, 15, time_s=0.125), finished=True)
            out, err = started.communicate(timeout=60)
            self.assertEqual((started.returncode, err), (0, ""))
            self.assertIn("all up to step 15", out)
            self.assertEqual(sorted(self.sent()[0]), sorted(numbers(map(json.loads, metrics(1, 15).splitlines()))))
            self.assertEqual(self.sent()[1][-1], "finish")

    def test_stopped_by_a_signal_it_goes_on_later(self):
        for to in self.both():
            for number, code, steps in ((signal.SIGTERM, 143, 6), (signal.SIGINT, 130, 9)):
                self.run_is(metrics(1, steps))
                started = self.follow(to)
                self.addCleanup(started.kill)
                self.wait_until_sent(started, steps - 1)
                started.send_signal(number)
                _, err = started.communicate(timeout=60)
                self.assertEqual((started.returncode, err.count("\n")), (code, 1), err)
                self.assertIn("stopped: ", err)
                self.assertEqual(self.sent()[1][-1], "finish")
            self.run_is(metrics(1, 10), finished=True)
            self.log(to)
            self.assert_sent(metrics(1, 10))

    def test_another_run_and_logs_that_were_removed_begin_anew(self):
        for to in self.both():
            self.run_is(metrics(1, 3), finished=True)
            self.log(to)
            os.unlink(self.path("sent"))
            self.run_is(metrics(1, 3), finished=True, run_id="another")
            self.log(to)
            self.assert_sent(metrics(1, 3))
            if to == "tensorboard":
                os.unlink(self.path("sent"))
                shutil.rmtree(self.path("run/tensorboard"))
                self.log(to)
                self.assert_sent(metrics(1, 3))

    def test_tensorboardx_serves_where_there_is_no_torch(self):
        self.run_is(metrics(1, 3), finished=True)
        shutil.rmtree(os.path.join(self.modules, "torch"))
        self.log("tensorboard", "--dir", self.path("elsewhere"))
        self.assertEqual(self.sent()[1][0], ["init", "tensorboardX", self.path("elsewhere/tensorboard")])
        self.assertEqual(sorted(os.listdir(self.path("elsewhere"))), ["tensorboard", "tensorboard.sent.json"])
        self.assertEqual(sorted(os.listdir(self.path("run"))), ["config.yaml", "metrics.jsonl", "run.json"])

    def refused(self, to, code, *words, **environment):
        result = tool("qshard_log.py", self.path("run"), "--to", to, **{**self.environment, **environment})
        self.assert_one_error(result, code, *words)

    def test_what_is_missing_or_broken_is_one_line(self):
        self.refused("wandb", 3, "run: holds no run.json; name the folder of a run")
        self.run_is("")
        os.unlink(self.path("run/metrics.jsonl"))
        self.refused("wandb", 3, "metrics.jsonl: no such file")
        self.run_is(metrics(1, 2) + "broken\n" + metrics(3, 3))
        self.refused("tensorboard", 3, "metrics.jsonl:3: is no line of metrics")
        self.run_is('{"loss": 3.5}\n')
        self.refused("tensorboard", 3, "metrics.jsonl:1: is no line of metrics")
        self.run_is(metrics(1, 3))
        self.refused("wandb", 8, "cannot start: api_key not configured", "WANDB_MODE=offline", WANDB_MODE="refuse")
        self.run_is(metrics(1, 3), finished=True)
        self.refused("wandb", 4, "W&B, run 20261128T095808Z-802f33b8: cannot send: the run was deleted", WANDB_MODE="fail")
        self.log("wandb")
        self.assert_sent(metrics(1, 3))
        shutil.rmtree(self.modules)
        os.mkdir(self.modules)
        self.refused("wandb", 8, sys.executable, "pip install wandb")
        self.write("modules/torch.py", "raise ImportError('torch is blocked for this test')")
        self.write("modules/tensorboardX.py", "raise ImportError('tensorboardX is blocked for this test')")
        self.refused("tensorboard", 8, "torch.utils.tensorboard (", "pip install tensorboardX")
        self.write("run/run.json", '{"format": "other"}')
        self.refused("wandb", 3, "run.json: is not of a run of qshard")


if __name__ == "__main__":
    unittest.main()
