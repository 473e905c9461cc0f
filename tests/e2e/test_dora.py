"""DoRA as a user meets it: the same bits on any number of ranks, resumed, evaluated, exported and merged; where magnitudes
start. What it computes is compared with peft in test_oracle.py."""
import json
import os
import subprocess
import unittest

import numpy as np
import support

EMULATED = os.path.join(os.path.dirname(support.QSHARD), "libqshard_emulated.so")
DORA = {"lora__dora": "true", "train__steps": 8, "train__save_every": 0}


def row_lengths(weight):
    return np.sqrt(np.sum(weight.astype(np.float64) ** 2, axis=1))


def base_weights():
    from base_reader import read_base
    return read_base(f"{support.tiny()}/base.h5")[1]


class Dora(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = support.scratch()
        cls.reference = os.path.join(cls.folder, "reference")
        cls.log = support.train(cls.reference, ranks=1, **DORA).stdout
        cls.curve = support.curve(cls.reference)
        cls.adapter = support.adapter_digest(cls.reference)
        cls.exported = os.path.join(cls.folder, "adapter")
        cls.said = support.qshard("export", cls.reference, "-o", cls.exported).stdout

    def path(self, name):
        return os.path.join(self.folder, name)

    def same_as_reference(self, output):
        self.assertEqual(support.curve(output), self.curve)
        self.assertEqual(support.adapter_digest(output), self.adapter)

    def tensors(self, adapter):
        return support.read_safetensors(os.path.join(adapter, "adapter_model.safetensors"))

    def loss(self, *options, base=None):
        more = {} if base is None else {"base": base}
        done = support.qshard("eval", support.TINY_YAML, *support.settings(support.tiny(), "none", **more), *options)
        return float(done.stdout.split()[1])

    def test_it_is_another_function_than_lora(self):
        plain = self.path("plain")
        support.train(plain, **{**DORA, "lora__dora": "false"})
        first = [support.metrics(output)[0]["loss"] for output in (plain, self.reference)]
        self.assertLess(abs(first[0] - first[1]), 0.02 * first[0])  # but for what dropout hides, one start
        self.assertNotEqual(support.curve(plain)[-1], self.curve[-1])

    def test_ranks_threads_recompute_and_groups_do_not_change_bits(self):
        for name, how in (("2", {"ranks": 2}), ("3", {"ranks": 3}), ("threads", {"threads": 2}),
                          ("selective", {"ranks": 2, "train__recompute": "selective", "train__gather_group": 1}),
                          ("none", {"ranks": 3, "train__recompute": "none", "train__gather_group": 2}),
                          ("group", {"train__gather_group": 5})):
            with self.subTest(name):
                support.train(self.path(name), **{**DORA, **how})
                self.same_as_reference(self.path(name))

    def test_instruction_sets_do_not_change_bits(self):
        """In two steps: portable C takes seconds for one. B is zero in the first, so the second is the one with all terms."""
        runs = {isa: self.path(f"isa-{isa}") for isa in ("auto", "avx2", "portable")}
        for isa, output in runs.items():
            support.train(output, environment={} if isa == "auto" else {"QSHARD_CPU_ISA": isa}, **{**DORA, "train__steps": 2})
        for isa in ("avx2", "portable"):
            self.assertEqual(support.curve(runs[isa]), support.curve(runs["auto"]), isa)
            self.assertEqual(support.adapter_digest(runs[isa]), support.adapter_digest(runs["auto"]), isa)

    def test_work_of_the_ranks_adds_up(self):
        total = support.metrics(self.reference, "ranks.jsonl")[-1]
        support.train(self.path("work"), ranks=3, **DORA)
        lines = support.metrics(self.path("work"), "ranks.jsonl")[-3:]
        for what in ("tokens", "flops", "read_bytes"):
            self.assertEqual(sum(line[what] for line in lines), total[what], what)

    def test_stopped_and_resumed_on_other_numbers_of_ranks(self):
        stopped = self.path("stopped")
        for ranks in (3, 1, 2):
            support.train(stopped, ranks=ranks, expect=75, train__max_time=0.001, **DORA)
        support.qshard("check", os.path.join(stopped, "step-00000003"))
        self.assertIn("DoRA", support.qshard("inspect", os.path.join(stopped, "step-00000003")).stdout)
        support.train(stopped, ranks=3, **DORA)
        self.same_as_reference(stopped)

    def test_a_run_does_not_change_its_kind_of_adapter(self):
        output = self.path("kind")
        support.train(output, expect=75, train__max_time=0.001, **DORA)
        done = support.train(output, expect=8, **{**DORA, "lora__dora": "false"})
        self.assertRegex(done.stderr, r"error\[E802\] .*lora.dora")

    def test_planned_memory_is_enough(self):
        table = support.plan_and_peak(self.log)
        for name, (planned, peak) in table.items():
            self.assertLessEqual(peak, planned + 0.15, name)
        self.assertGreater(table["total"][1], 0.75 * table["total"][0])

    def test_magnitudes_start_as_the_rows_of_the_base(self):
        """And stay what they are at a rate of nothing."""
        lengths = {name: row_lengths(weight) for name, weight in base_weights().items() if "_proj" in name}
        for ranks in (1, 3):
            output = self.path(f"start-{ranks}")
            support.train(output, ranks=ranks, **{**DORA, "train__steps": 1, "optim__lr": 1e-30})
            support.qshard("export", output, "-o", output + "-adapter")
            magnitudes = {n: m for n, m in self.tensors(output + "-adapter").items() if n.endswith("magnitude_vector")}
            self.assertEqual(len(magnitudes), len(lengths))
            for name, m in magnitudes.items():
                weight = name.removeprefix("base_model.model.").removesuffix("lora_magnitude_vector") + "weight"
                np.testing.assert_allclose(m, lengths[weight], rtol=1e-6)

    def test_export_names_what_loads_it(self):
        with open(os.path.join(self.exported, "adapter_config.json"), encoding="utf-8") as file:
            self.assertIs(json.load(file)["use_dora"], True)
        self.assertRegex(self.said, r"peft +yes\n +vLLM +no: .*\n +llama.cpp +no: ")
        self.assertIn("DoRA", support.qshard("inspect", self.exported).stdout)
        support.qshard("check", self.exported)

    def test_evaluated_from_checkpoint_and_adapter(self):
        loss = [self.loss("--adapter", source) for source in (self.reference, self.exported)]
        self.assertEqual(loss[0], loss[1])
        evaluated = [line["eval_loss"] for line in support.metrics(self.reference) if "eval_loss" in line]
        self.assertEqual(loss[0], evaluated[-1])
        self.assertLess(loss[0], self.loss())

    def test_sampled_as_evaluated(self):
        """From the exported adapter and, on two ranks, from the checkpoint: the same bytes, and not the base's."""
        prompts = self.path("prompts.h5")
        support.python(os.path.join(support.PREP, "qshard_prep.py"), "--model", f"{support.tiny()}/model",
                       f"{support.tiny()}/model/eval.jsonl", "-o", prompts, "--seq-len", "64", "--prompts")
        words = ["sample", support.TINY_YAML, *support.settings(support.tiny(), "none"), "--prompts", prompts, "--tokens", "6"]
        texts = [subprocess.run(support.command([*words, *adapter], ranks), env=support.environment(), check=True,
                                capture_output=True).stdout  # bytes, which need not be UTF-8
                 for adapter, ranks in (((), None), (("--adapter", self.exported), None), (("--adapter", self.reference), 2))]
        self.assertNotEqual(texts[0], texts[1])
        self.assertEqual(texts[1], texts[2])

    def test_continued_from_its_export(self):
        output = self.path("continued")
        how = {**DORA, "train__steps": 1, "optim__lr": 1e-30, "lora__init": self.exported}
        support.train(output, ranks=3, **how)
        self.assertEqual(support.adapter_digest(output), self.adapter)
        done = support.train(self.path("refused"), expect=3, **{**how, "lora__dora": "false"})
        self.assertRegex(done.stderr, r"error\[E302\] .*use_dora=true, but lora.dora is false")

    def test_merged_rows_have_the_magnitudes_lengths(self):
        merged = self.path("merged")
        support.qshard("merge", self.reference, "-o", merged, "--base", f"{support.tiny()}/base.h5", "--dtype", "f32")
        got, lora = support.read_safetensors(os.path.join(merged, "model.safetensors")), self.tensors(self.exported)
        for name, weight in base_weights().items():
            stem = "base_model.model." + name.removesuffix("weight")
            if stem + "lora_A.weight" not in lora:
                np.testing.assert_array_equal(got[name], weight, name)
                continue
            a, b = (lora[f"{stem}lora_{which}.weight"].astype(np.float64) for which in "AB")
            moved = weight.astype(np.float64) + 2 * (b @ a)
            magnitude = lora[stem + "lora_magnitude_vector"].astype(np.float64)
            want = moved * (magnitude / row_lengths(moved))[:, None]
            np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-6 * np.abs(want).max(), err_msg=name)

    def test_dry_run_and_plan_count_it(self):
        totals = []
        for dora in ("false", "true"):
            done = support.train(self.path("dry"), options=("--dry-run",), **{**DORA, "lora__dora": dora})
            totals.append([float(line.split()[-1]) for line in done.stdout.splitlines() if line.split()[:1] == ["total"]])
        self.assertGreater(totals[1], totals[0])


@unittest.skipUnless(os.path.exists(EMULATED), "libqshard_emulated.so is not built")
class OnGpu(unittest.TestCase):
    """The same with device: cuda, whose kernels run on the CPU here (tests/emulator): few short steps."""
    SMALL = {**DORA, "cpu__gemm": "strict", "train__steps": 3, "train__global_batch": 5, "train__micro_batch": 1, "train__eval_every": 0,
             "data__eval": "", "optim__lr": 3e-3}

    @classmethod
    def setUpClass(cls):
        cls.folder = support.scratch()
        cls.reference = os.path.join(cls.folder, "reference")
        cls.log = cls.train("reference").stdout
        cls.curve, cls.adapter = support.curve(cls.reference), support.adapter_digest(cls.reference)

    @classmethod
    def train(cls, name, options=(), environment=None, **how):
        return support.train(os.path.join(cls.folder, name), options=("--allow-shared-device", *options),
                             environment={"QSHARD_PLUGIN": EMULATED, **(environment or {})},
                             **{**cls.SMALL, "device": "cuda", **how})

    def losses(self, name):
        return [line["loss"] for line in support.metrics(os.path.join(self.folder, name)) if "loss" in line]

    def near(self, name, cpu):
        """bf16 against fp32: 5e-3 of the loss at every step, as without DoRA; and not the CPU's own."""
        mine, cpus = self.losses(name), self.losses(cpu)
        self.assertEqual(len(mine), len(cpus))
        self.assertNotEqual(mine, cpus)
        for step, (a, b) in enumerate(zip(mine, cpus)):
            self.assertLess(abs(a - b), 5e-3 * b, f"step {step + 1}: {a} instead of {b}")

    def test_losses_are_the_cpus(self):
        """With dropout (the tiny configuration's) and without; fused linears."""
        phi3 = {"base": support.base_of(*support.PHI3)}
        for name, how in (("dropout", {}), ("plain", {"lora__dropout": 0}), ("phi3", phi3),
                          ("phi3-plain", {**phi3, "lora__dropout": 0})):
            with self.subTest(name):
                self.train(name, **how)
                self.train(name + "-cpu", device="cpu", **how)
                self.near(name, name + "-cpu")

    def test_gradients_are_the_cpus(self):
        for dropout in (0, 0.1):
            grads = {}
            for device in ("cpu", "cuda"):
                path = os.path.join(self.folder, f"{device}.safetensors")
                self.train("unused", device=device, options=("--dump-grads", path), lora__dropout=dropout)
                grads[device] = support.read_safetensors(path)
            self.assertEqual(sorted(grads["cuda"]), sorted(grads["cpu"]))
            self.assertTrue(any("magnitude" in name for name in grads["cpu"]))
            for name, want in grads["cpu"].items():
                got, want = grads["cuda"][name].astype(np.float64), want.astype(np.float64)
                with self.subTest(name, dropout=dropout):
                    if np.any(want):  # A's gradient is zero as long as B is
                        self.assertLess(np.linalg.norm(got - want), 3e-2 * np.linalg.norm(want))
                    else:
                        self.assertFalse(np.any(got))

    def test_magnitudes_start_as_the_rows_lengths(self):
        """In fp32, though A and B are gathered as bf16."""
        output, exported = os.path.join(self.folder, "start"), os.path.join(self.folder, "start-adapter")
        self.train("start", train__steps=1, optim__lr=1e-30, ranks=2)
        support.qshard("export", output, "-o", exported)
        tensors = support.read_safetensors(os.path.join(exported, "adapter_model.safetensors"))
        lengths = {name: row_lengths(weight) for name, weight in base_weights().items() if weight.ndim == 2}
        magnitudes = {name: m for name, m in tensors.items() if "magnitude" in name}
        self.assertEqual(2 * len(magnitudes), len(tensors) - len(magnitudes))
        for name, m in magnitudes.items():
            weight = name.removeprefix("base_model.model.").removesuffix("lora_magnitude_vector") + "weight"
            np.testing.assert_allclose(m, lengths[weight], rtol=1e-6)

    def test_same_bits(self):
        for name, how in {"again": {"environment": {"QSHARD_EMULATOR_SEED": "7"}}, "ranks": {"ranks": 3},
                          "mixed": {"environment": {"QSHARD_EMULATOR_STREAMS": "mixed"}},
                          "none": {"train__recompute": "none", "train__gather_group": 2},
                          "selective": {"train__recompute": "selective", "ranks": 2},
                          "groups": {"ranks": 4, "shard__group": 2, "environment": {"QSHARD_EMULATOR_DEVICES": "4"}},
                          "offload": {"memory__offload": "[activations, weights, embedding]"}}.items():
            with self.subTest(name):
                self.train(name, **how)
                self.assertEqual(support.curve(os.path.join(self.folder, name)), self.curve)
                self.assertEqual(support.adapter_digest(os.path.join(self.folder, name)), self.adapter)

    def test_resumed_on_other_numbers_of_ranks(self):
        for ranks in (1, 2):
            self.train("resumed", ranks=ranks, expect=75, train__max_time=0.001)
        self.train("resumed")
        self.assertEqual(support.curve(os.path.join(self.folder, "resumed")), self.curve)
        self.assertEqual(support.adapter_digest(os.path.join(self.folder, "resumed")), self.adapter)

    def test_peak_is_the_plan(self):
        for kind, (plan, peak) in support.plan_and_peak(self.log).items():
            self.assertLess(abs(peak - plan), max(0.03 * plan, 0.11), kind)

    def test_evaluated_as_on_the_cpu(self):
        result = {}
        for device in ("cpu", "cuda"):
            done = support.qshard("eval", support.TINY_YAML, *support.settings(support.tiny(), "none", device=device, cpu__gemm="strict"),
                                  "--adapter", self.reference, QSHARD_PLUGIN=EMULATED)
            result[device] = float(done.stdout.split()[1])
        self.assertLess(abs(result["cuda"] - result["cpu"]), 5e-3 * result["cpu"])
        self.assertNotEqual(result["cuda"], result["cpu"])


if __name__ == "__main__":
    unittest.main()
