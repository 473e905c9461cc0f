"""Edges: uneven data, inputs that do not fit, a damaged file that one rank alone sees."""
import hashlib
import json
import os
import re
import shutil
import subprocess
import unittest

import h5py
import numpy as np

import support

MODEL_SEED = 5
BINARIES = os.path.dirname(support.QSHARD)
MEMFAULT = os.path.join(BINARIES, "tests", "libmemfault.so")


def prepare(lines, output, *options):
    """A token file of the tiny model's first `lines` examples."""
    model = os.path.join(support.tiny(), "model")
    text = output + ".jsonl"
    with open(os.path.join(model, "train.jsonl"), encoding="utf-8") as source:
        examples = source.readlines()[:lines]
    with open(text, "w", encoding="utf-8") as file:
        file.writelines(examples)
    support.python(os.path.join(support.PREP, "qshard_prep.py"), "--model", model, text, "-o", output,
                   "--seq-len", "64", *options)
    return output


class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = support.scratch()

    def path(self, name):
        return os.path.join(self.folder, name)

    def refused(self, command, ranks, code, *texts, **more):
        """The program ends with `code`, one error line that says `texts`, and nothing of a crash."""
        done = support.qshard(*command, ranks=ranks, expect=code, **more)
        self.assertEqual(done.stderr.count("error["), 1, done.stderr)
        for text in texts:
            self.assertIn(text, done.stderr)
        return done

    def command(self, name, *options, **more):
        return [name, support.TINY_YAML, *support.settings(support.tiny(), self.path("run"), **more), *options]


class UnevenData(Case):
    """Steps that do not divide: the bits of one rank on every number of ranks."""

    def same_on(self, numbers, name, steps, **settings):
        curves = []
        for ranks in numbers:
            output = self.path(f"{name}-{ranks}")
            support.train(output, ranks=ranks, **settings)
            losses = [line["loss"] for line in support.metrics(output) if "loss" in line]
            self.assertEqual(len(losses), steps)
            curves.append((ranks, support.curve(output), support.adapter_digest(output)))
        for ranks, curve, adapter in curves[1:]:
            with self.subTest(ranks=ranks):
                self.assertEqual(curve, curves[0][1])
                self.assertEqual(adapter, curves[0][2])

    def test_micro_batch_larger_than_the_data(self):
        """3 sequences, 4 to a micro-batch: one is twice in it, and each step crosses an epoch's border."""
        data = prepare(3, self.path("three.h5"))
        self.same_on((1, 3), "larger", 4, data__train=data, data__eval=data, train__steps=4, train__micro_batch=4,
                     train__global_batch=5, train__eval_every=2)

    def test_micro_batches_cross_epochs(self):
        """7 sequences, 5 a step, 4 to a micro-batch, 3 epochs: 5 steps, the last of one sequence."""
        data = prepare(7, self.path("seven.h5"))
        self.same_on((1, 3), "cross", 5, data__train=data, data__eval=data, train__steps=0, train__epochs=3,
                     train__micro_batch=4, train__global_batch=5)

    def test_evaluations_and_checkpoints_behind_each_epoch(self):
        """9 sequences, 4 a step, 3 epochs: they end in steps 3, 5 and 7."""
        data = prepare(9, self.path("epochs.h5"))
        self.same_on((1, 2), "epochs", 7, data__train=data, train__steps=0, train__epochs=3, train__global_batch=4, train__micro_batch=2,
                     train__eval_every="epoch", train__save_every="epoch", train__keep_last=9)
        output = self.path("epochs-2")
        self.assertEqual([line["step"] for line in support.metrics(output) if "eval_loss" in line], [3, 5, 7])
        self.assertEqual(sorted(int(name[5:]) for name in os.listdir(output) if name.startswith("step-")), [3, 5, 7])

    def test_short_last_step_and_more_ranks_than_slots(self):
        """9 sequences, 8 a step in 2 slots: 6 of 8 ranks never have work, and in the last step 7 of 8."""
        data = prepare(9, self.path("nine.h5"))
        self.same_on((1, 8), "short", 2, data__train=data, data__eval=data, train__steps=0, train__epochs=1,
                     train__micro_batch=4, train__global_batch=8)


class Refused(Case):
    """Inputs that do not fit: the promised exit code and one line, on any number of ranks."""

    def other_run(self, name, *model_options):
        """A run, and its adapter exported, of a model that differs from the tiny one."""
        model, base, output = self.path(name), self.path(name + ".h5"), self.path(name + "-run")
        support.python(os.path.join(support.PREP, "qshard_tiny.py"), model, "--seed", MODEL_SEED, "--examples", "16",
                       *model_options)
        support.qshard("quantize", model, "-o", base, "--head-chunk-rows", "128")
        support.train(output, base=base, train__steps=1, train__global_batch=2)
        support.qshard("export", output, "-o", output + "-peft")
        return output

    def test_adapter_of_another_model(self):
        for name, options in (("layers", ("--layers", "2")), ("width", ("--hidden", "64"))):
            output = self.other_run(name, *options)
            checkpoint = os.path.join(output, "step-00000001")
            for adapter in (output, checkpoint, output + "-peft"):
                for ranks in (None, 2):
                    with self.subTest(adapter=os.path.basename(adapter), model=name, ranks=ranks):
                        self.refused(self.command("eval", "--adapter", adapter), ranks, 3, output)

    def test_checkpoint_of_another_base(self):
        """Of the same shape, so that only its hash tells; an exported adapter carries it in a file of its own."""
        base, output = support.base_of("--seed", "7"), self.path("base")
        support.train(output, train__steps=1, train__eval_every=0)
        support.qshard("export", output, "-o", output + "-peft")
        says = (base, "was trained on a base with hash")
        for adapter in (output, os.path.join(output, "step-00000001"), output + "-peft"):
            for ranks in (None, 2):
                with self.subTest(adapter=os.path.basename(adapter), ranks=ranks):
                    self.refused(self.command("eval", "--adapter", adapter, base=base), ranks, 3, *says)
        adapter = output + "-peft"
        for ranks in (None, 2):
            self.refused(self.command("train", base=base, lora__init=adapter), ranks, 3, *says)
        self.refused(self.command("train", "--dry-run", base=base, lora__init=adapter), 2, 3, *says)
        self.refused(("merge", adapter, "-o", self.path("merged"), "--base", base), None, 3, *says)
        self.assertFalse(os.path.exists(self.path("run")) or os.path.exists(self.path("merged")))
        self.assertIn("eval_loss", support.qshard(*self.command("eval", "--adapter", adapter)).stdout)
        self.refused(self.command("train", lora__init=self.path("nowhere")), 2, 3, f"lora.init: {self.path('nowhere')}: is not there")
        self.refused(self.command("train", lora__init=base), None, 3, f"{base}: a PEFT directory (adapter_config.json) is expected")
        self.refused(self.command("sample", "--adapter", output, "--prompts", os.path.join(support.tiny(), "eval.h5"), "--tokens", 2,
                                  base=base), None, 3,
                     base, "was trained on a base with hash")
        os.remove(os.path.join(adapter, "qshard.json"))  # as of before it was written, or of peft's own
        self.assertIn("eval_loss", support.qshard(*self.command("eval", "--adapter", adapter, base=base)).stdout)
        support.qshard("merge", adapter, "-o", self.path("merged"), "--base", base)

    def test_samples_beyond_the_positions(self):
        """Prompts and --tokens together, as every token computes the whole text again; a run on longer sequences has more of them."""
        prompts, model = prepare(3, self.path("few.h5"), "--prompts"), support.base_of("--max-position", "40")
        with h5py.File(prompts, "r") as file:
            longest = int(np.diff(file["seq_offsets"][()]).max())
        self.assertLess(longest, 40)
        for ranks in (None, 2):
            for base, seq_len, limit, name in ((os.path.join(support.tiny(), "base.h5"), 64, 2048, "max_position_embeddings"),
                                               (model, 32, 40, "max_position_embeddings"), (model, 64, 64, "train.seq_len")):
                with self.subTest(ranks=ranks, limit=limit):
                    words = ("sample", "--prompts", prompts, "--tokens")
                    more = {"base": base, "train__seq_len": seq_len}
                    self.refused(self.command(*words, "100000", **more), ranks, 2, f"--tokens 100000: together with the longest prompt of "
                                 f"{prompts}, {longest} tokens", f"{name}, {limit}; give at most --tokens {limit - longest}\n")
                    self.refused(self.command(*words, limit - longest + 1, **more), ranks, 2, "give at most")
                    if limit < 2048:
                        support.qshard(*self.command(*words, limit - longest, **more), ranks=ranks)
        short = support.base_of("--max-position", str(longest))
        self.refused(self.command(*words, "1", base=short, train__seq_len=2), 2, 2, "leaves nothing", "give shorter prompts")

    def test_data_without_targets(self):
        prompts = prepare(4, self.path("prompts.h5"), "--prompts")
        for ranks in (None, 2):
            with self.subTest(ranks=ranks):
                self.refused(self.command("train", data__train=prompts), ranks, 3, prompts, "n_targets=0")
                self.refused(self.command("eval", data__eval=prompts), ranks, 3, prompts, "n_targets=0")
        self.assertFalse(os.path.exists(self.path("run")), "a refused run leaves no directory")

    def warned(self, command, *pairs):
        """One warning for each (file, file that it is compared with), once whatever the ranks."""
        for ranks in (None, 2):
            said = support.qshard(*command, ranks=ranks).stderr
            self.assertEqual(re.findall(r"(\S+) was made with another tokenizer\.json \(\w{12}\.\.\.\) than (\S+) \(", said), list(pairs), said)

    def test_a_warmup_that_leaves_nothing_of_the_epochs(self):
        """9 sequences, 8 a step, 3 epochs: 4 steps, which the data alone say."""
        data = prepare(9, self.path("warm.h5"))
        epochs = {"data__train": data, "train__steps": 0, "train__epochs": 3, "train__global_batch": 8}
        said = "warm.h5: optim.warmup={} steps leaves nothing of the 4 that train.epochs=3 makes of it; lower it"
        for ranks in (None, 1, 3):
            with self.subTest(ranks=ranks):
                self.refused(self.command("train", optim__warmup=4, **epochs), ranks, 2, "error[E203]", said.format(4))
        self.refused(self.command("train", "--dry-run", optim__warmup=1000, **epochs), None, 2, "error[E203]", said.format(1000))
        self.refused(self.command("plan", optim__warmup=4, **epochs), None, 2, "error[E203]", said.format(4))
        for warmup in (3, 0.99):
            support.qshard(*self.command("train", "--dry-run", optim__warmup=warmup, **epochs))
            support.qshard(*self.command("plan", optim__warmup=warmup, **epochs))
        support.qshard(*self.command("plan", optim__warmup=4, **{**epochs, "data__train": self.path("later.h5")}))  # nobody knows yet

    def test_data_of_another_tokenizer(self):
        """Of the base's, as quantize has seen it, or, where that is not known, of each other."""
        base, other, model = os.path.join(support.tiny(), "base.h5"), self.path("other.h5"), self.path("without")
        files = {name: os.path.join(support.tiny(), name + ".h5") for name in ("train", "eval")}
        shutil.copyfile(files["train"], other)
        with h5py.File(other, "r+") as file:
            file.attrs["tokenizer_sha256"] = np.bytes_("0123456789abcdef" * 4)
        shutil.copytree(os.path.join(support.tiny(), "model"), model)
        os.remove(os.path.join(model, "tokenizer.json"))
        unknown = self.path("unknown.h5")
        support.qshard("quantize", model, "-o", unknown, "--head-chunk-rows", "128")
        for train, evaluated, of, pairs in (
                (files["train"], files["eval"], base, ()), (other, files["eval"], base, [(other, base)]),
                (other, other, base, [(other, base), (other, base)]), (files["train"], other, unknown, [(other, files["train"])]),
                (other, files["eval"], unknown, [(files["eval"], other)]), (other, other, unknown, ())):
            with self.subTest(train=train, eval=evaluated, base=of):
                self.warned(self.command("train", "--dry-run", base=of, data__train=train, data__eval=evaluated), *pairs)
        self.warned(self.command("eval", data__eval=other), (other, base))
        self.warned(self.command("sample", "--prompts", other, "--tokens", 1), (other, base))

    def test_device_limit_too_small(self):
        remedy = ("memory.device_limit", "train.micro_batch", "train.recompute", "more ranks")
        for ranks in (None, 2):
            with self.subTest(ranks=ranks):
                self.refused(self.command("train", memory__device_limit="100K"), ranks, 7, *remedy)
                done = self.refused(self.command("train", "--dry-run", memory__device_limit="100K"), ranks, 7, *remedy)
                self.assertIn("memory of rank 0", done.stdout)
        self.assertFalse(os.path.exists(self.path("run")), "a refused run leaves no directory")


class Finished(Case):
    def test_a_dry_run_says_what_the_output_would_say(self):
        output = self.path("run")
        support.train(output, train__steps=1, train__eval_every=0)
        with open(self.path("notes.txt"), "w", encoding="utf-8") as file:
            file.write("not ours")
        for ranks in (None, 2):
            for dry in ((), ("--dry-run",)):
                with self.subTest(ranks=ranks, options=dry):
                    done = support.train(output, ranks=ranks, options=dry, train__steps=1, train__eval_every=0)
                    self.assertIn(f"{output}: this run is finished; nothing to do", done.stderr)
                    self.refused(self.command("train", "--set", f"output={self.folder}", *dry), ranks, 2, "error[E204]", "no run.json")
                    self.refused(self.command("train", *dry, optim__lr=0.5, train__steps=1, train__eval_every=0), ranks, 8, "error[E802]", "optim.lr")
                    self.refused(self.command("train", "--set", f"output={self.path('new')}", "--resume", "must", *dry), ranks, 4, "error[E403]")
        self.assertFalse(os.path.exists(self.path("new")))

    def test_a_finished_run_without_checkpoints_says_so(self):
        output = self.path("run")
        support.train(output, train__steps=1, train__eval_every=0)
        for ranks in (None, 2):
            self.assertTrue(support.train(output, ranks=ranks, train__steps=1, train__eval_every=0).stderr.endswith(
                f"{output}: this run is finished; nothing to do\n"))
        shutil.rmtree(os.path.join(output, "step-00000001"))
        for ranks in (None, 2):
            self.assertTrue(support.train(output, ranks=ranks, train__steps=1, train__eval_every=0).stderr.endswith(
                f"{output}: this run is finished; nothing to do, and it holds no checkpoint any more: another output trains it again\n"))


class Exported(Case):
    """What an adapter says of its base when nobody names it."""

    def exported(self, folder, parent=None):
        """adapter_config.json's name of the base, and what export said, of a model that stands in `folder`."""
        model, output = self.path(folder), self.path(folder.replace("/", "_") + "-run")
        support.python(os.path.join(support.PREP, "qshard_tiny.py"), model, "--seed", MODEL_SEED, "--examples", "16")
        if parent is not None:
            config = os.path.join(model, "config.json")
            with open(config, encoding="utf-8") as file:
                changed = {**json.load(file), "_name_or_path": parent}
            with open(config, "w", encoding="utf-8") as file:
                json.dump(changed, file)
        support.qshard("quantize", model, "-o", output + ".h5", "--head-chunk-rows", "128")
        support.train(output, base=output + ".h5", train__steps=1, train__global_batch=2)
        done = support.qshard("export", output, "-o", output + "-peft")
        with open(os.path.join(output + "-peft", "adapter_config.json"), encoding="utf-8") as file:
            return json.load(file)["base_model_name_or_path"], done.stderr

    def test_a_model_in_the_cache_of_the_hub(self):
        for folder, name in (("hub/models--some-org--tiny-2b/snapshots/0a1b", "some-org/tiny-2b"),
                             ("hub/models--tiny/snapshots/0a1b", "tiny")):
            with self.subTest(name=name):
                self.assertEqual(self.exported(folder), (name, ""))

    def test_a_local_directory(self):
        name, said = self.exported("local")
        self.assertEqual(name, self.path("local"))
        self.assertRegex(said, rf'\Awarning: [^\n]*local path "{re.escape(name)}"[^\n]*--base-name ORG/MODEL\n\Z')

    def test_the_name_of_a_parent_is_told_only(self):
        name, said = self.exported("tuned", parent="some-org/base-2b")
        self.assertEqual(name, self.path("tuned"))
        self.assertRegex(said, r'\Awarning: [^\n]*names "some-org/base-2b"[^\n]*\n\Z')


class Adapters(Case):
    """Which linears an adapter is of, its tensors say, however target_modules says it."""

    FORMS = ({"target_modules": r".*self_attn\.(q|v)_proj"},
             {"target_modules": [f"model.layers.{i}.self_attn.{name}_proj" for i in range(4) for name in "qv"]},
             {"target_modules": "all-linear", "exclude_modules": ["k_proj", "o_proj", "mlp"]})

    def made(self, *command):
        """SHA-256 of the weights that a command writes to a directory."""
        target = support.scratch() + "/made"
        support.qshard(*command, "-o", target)
        name = next(name for name in os.listdir(target) if name.endswith("model.safetensors"))
        with open(os.path.join(target, name), "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()

    def results(self, adapter, output):
        """Of eval, merge and a run that goes on from it."""
        base = os.path.join(support.tiny(), "base.h5")
        loss = support.qshard(*self.command("eval", "--adapter", adapter), ranks=2).stdout
        support.train(output, ranks=2, train__steps=2, lora__targets="[q_proj, v_proj]", lora__init=adapter)
        return loss, self.made("merge", adapter, "--base", base), self.made("export", output)

    def test_every_form_of_target_modules(self):
        support.train(self.path("first"), ranks=2, train__steps=2, lora__targets="[q_proj, v_proj]")
        support.qshard("export", self.path("first"), "-o", self.path("adapter"))
        expected = self.results(self.path("adapter"), self.path("second"))
        for i, form in enumerate(self.FORMS):
            adapter = self.path(f"form-{i}")
            shutil.copytree(self.path("adapter"), adapter)
            config = os.path.join(adapter, "adapter_config.json")
            with open(config, encoding="utf-8") as file:
                changed = {**json.load(file), **form}
            with open(config, "w", encoding="utf-8") as file:
                json.dump(changed, file)
            with self.subTest(form=form):
                self.assertEqual(self.results(adapter, self.path(f"run-{i}")), expected)
                self.assertIn("targets     q_proj v_proj", support.qshard("inspect", adapter).stdout)
        self.refused(self.command("train", lora__init=self.path("adapter")), 2, 3,
                     "lora.targets to the adapter's, [q_proj, v_proj]")


class Surroundings(Case):
    """What a shell has set up before the program starts."""

    def through_shell(self, prelude, *command):
        return subprocess.run(["sh", "-c", prelude + ' exec "$@"', "sh", support.QSHARD, *map(str, command)],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, env=support.environment(),
                              timeout=support.TIMEOUT_S)

    @staticmethod
    def training(output, steps):
        return ["train", support.TINY_YAML, *support.settings(support.tiny(), output, train__steps=steps)]

    def test_closed_descriptors(self):
        """Files that are opened do not get the numbers of a terminal, into which lines for it would be written."""
        for closed in ("<&- >&- 2>&-", "<&- 2>&-", "2>&-"):
            with self.subTest(closed=closed):
                output = self.path("closed" + str(len(closed)))
                self.through_shell(f"exec {closed};", *self.training(output, 4))
                self.assertEqual([line["step"] for line in support.metrics(output) if "loss" in line], [1, 2, 3, 4])
                self.assertEqual([line["step"] for line in support.metrics(output, "ranks.jsonl")], [4])
                support.qshard("check", output)

    def test_a_limit_on_file_size(self):
        """An error line and code 4 in place of a death by SIGXFSZ; nothing half written stays."""
        for blocks in (0, 16):  # of 512 or 1024 bytes: no lock at all; a lock, but no checkpoint
            with self.subTest(blocks=blocks):
                output = self.path(f"limit{blocks}")
                done = self.through_shell(f"ulimit -f {blocks};", *self.training(output, 2))
                self.assertEqual(done.returncode, 4, done.stderr)
                self.assertEqual(len(re.findall(r"(?m)^error\[E401\] ", done.stderr)), 1, done.stderr)
                self.assertIn("ulimit -f", done.stderr)
                found = os.listdir(output) if os.path.isdir(output) else []
                self.assertEqual([name for name in found if name.startswith("step-") or "lock" in name], [])


class Quiet(Case):
    """--quiet: errors, warnings and one line at the end."""

    def test_a_run(self):
        done = support.train(self.path("run"), options=["--quiet"], train__steps=2)
        self.assertEqual(done.stdout, "")
        self.assertRegex(done.stderr, r"\A[^\n]*run: done: 2 steps in [\d.]+ s\n\Z")
        done = support.train(self.path("run"), options=["--quiet"], train__steps=2)
        self.assertEqual(done.stdout, "")
        self.assertRegex(done.stderr, r"\A[^\n]*run: this run is finished[^\n]*\n\Z")

    def test_a_run_that_is_stopped(self):
        done = support.train(self.path("stopped"), options=["--quiet"], expect=75, train__steps=3, train__max_time=1e-3)
        self.assertEqual(done.stdout, "")
        self.assertRegex(done.stderr, r"\A[^\n]*stopped: stopped behind step 1 of 3; the same command goes on\n\Z")

    def test_a_run_that_does_not_fit(self):
        done = self.refused(self.command("train", "--quiet", memory__device_limit="100K"), None, 7, "device_limit")
        self.assertEqual(done.stdout, "")
        self.assertEqual(done.stderr.count("\n"), 1)

    def test_a_dry_run_prints_its_result(self):
        self.assertIn("memory of rank 0", support.qshard(*self.command("train", "--dry-run", "--quiet")).stdout)


class DamagedBase(Case):
    """One wrong byte in a quantum: only the rank that owns it sees it, and all leave alike."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        import h5py
        cls.base = os.path.join(cls.folder, "base.h5")
        shutil.copy(os.path.join(support.tiny(), "base.h5"), cls.base)
        with h5py.File(cls.base, "r") as file:
            packed = file["units/layers.2/packed"]
            at = packed.id.get_offset() + packed.size - 100  # in the last quantum: of the last rank
        with open(cls.base, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0x10]))

    def test_every_command_ends_on_all_ranks(self):
        prompts = prepare(2, self.path("prompts.h5"), "--prompts")
        commands = {"train": (), "eval": (), "sample": ("--prompts", prompts, "--tokens", "2")}
        for name, options in commands.items():
            for ranks in (2, 3):
                with self.subTest(command=name, ranks=ranks):
                    self.refused(self.command(name, *options, base=self.base), ranks, 3, self.base, "layers.2")


class NoMemory(Case):
    """One rank has none for a text of its own, and all leave alike."""

    def test_the_configuration_of_a_checkpoint(self):
        save = {"train__steps": 2, "train__save_every": 1}
        for rank in (0, 1):
            output = self.path(f"run-{rank}")
            fault = {"FAULT_RANK": str(rank), **support.preload(MEMFAULT)}
            command = ["train", support.TINY_YAML, *support.settings(support.tiny(), output, **save)]
            with self.subTest(rank=rank, at="save"):  # rank 0 has written config.yaml before
                self.refused(command, 2, 7, "no memory for the configuration", QSHARD_FAULT_TEXT="2" if rank == 0 else "1", **fault)
                self.assertEqual([name for name in os.listdir(output) if name.startswith("step-")], [])
            support.train(output, ranks=2, train__max_time=0.001, expect=75, **save)
            with self.subTest(rank=rank, at="resume"):
                self.refused(command, 2, 7, "no memory for the configuration", QSHARD_FAULT_TEXT="1", **fault)
            support.train(output, ranks=2, **save)


class SameOutput(Case):
    """`eval` and `sample` print the same on any number of ranks, also where there is less to do than ranks."""

    def test_eval_and_sample(self):
        output = self.path("run")
        support.train(output, train__steps=5)
        prompts = prepare(2, self.path("prompts.h5"), "--prompts")
        short = prepare(5, self.path("five.h5"))
        commands = {
            "base": self.command("eval"),
            "adapter": self.command("eval", "--adapter", output),
            "uneven": self.command("eval", "--adapter", output, data__eval=short, train__micro_batch=4),
            "sample": self.command("sample", "--adapter", output, "--prompts", prompts, "--tokens", "6"),
        }
        printed = {}
        for name, command in commands.items():
            printed[name] = support.qshard(*command, ranks=1).stdout
            self.assertNotEqual(printed[name], "")
            for ranks in (2, 3):
                with self.subTest(command=name, ranks=ranks):
                    self.assertEqual(support.qshard(*command, ranks=ranks).stdout, printed[name])
        self.assertNotEqual(printed["base"], printed["adapter"])
        self.assertEqual(printed["sample"].count("--- continuation"), 2)


if __name__ == "__main__":
    unittest.main()
