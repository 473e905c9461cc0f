"""The CUDA backend as a user meets it: the same program with device: cuda. Where there is no GPU its kernels, device layer
and communicator run on the CPU (tests/emulator), so what is shown here is what the program computes, never how fast."""
import hashlib
import os
import re
import subprocess
import unittest

import numpy as np
import support
from tensors import bf16_bits

EMULATED = os.path.join(os.path.dirname(support.QSHARD), "libqshard_emulated.so")
MPIFAULT = os.path.join(os.path.dirname(support.QSHARD), "tests", "libmpifault.so")
# Emulated kernels are slow: a few short steps of five slots, and no evaluation but the one that is tested.
SMALL = {"cpu__gemm": "strict", "train__steps": 3, "train__global_batch": 5, "train__micro_batch": 1, "train__save_every": 0,
         "train__eval_every": 0, "data__eval": ""}


STORED_AS = {"bf16": bf16_bits, "f16": lambda x: x.astype(np.float16), "f32": lambda x: x}


def digest(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def on_gpu(**more):
    """The environment of a run on the emulated card."""
    return {"QSHARD_PLUGIN": EMULATED, **more}


def by_rank(ranks, script, output, expect=0, options=("--dry-run",), environment=None, **how):
    """Trains as support.train does; each rank with what the shell's `script` makes of its environment."""
    done = subprocess.run(["timeout", "-k", "5", "300", "mpirun", "-np", str(ranks), "sh", "-c", script + '; exec "$@"', "sh",
                           *support.command(["train", support.TINY_YAML, *support.settings(support.tiny(), output, **{**SMALL, **how}),
                                             *options])],
                          env=support.environment(1, **on_gpu(**(environment or {}))), stdin=subprocess.DEVNULL, capture_output=True,
                          text=True)
    if done.returncode != expect:
        raise AssertionError(f"exit {done.returncode}, not {expect}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def losses(output):
    return [line["loss"] for line in support.metrics(output) if "loss" in line]


@unittest.skipUnless(os.path.exists(EMULATED), "libqshard_emulated.so is not built")
class Training(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = support.scratch()
        cls.reference = os.path.join(cls.folder, "reference")
        cls.log = cls.train("reference").stdout
        cls.curve = support.curve(cls.reference)
        cls.adapter = support.adapter_digest(cls.reference)

    @classmethod
    def train(cls, name, environment=None, options=(), **how):
        how = {**SMALL, "device": "cuda", **how}
        return support.train(os.path.join(cls.folder, name), environment=on_gpu(**(environment or {})),
                             options=("--allow-shared-device", *options), **how)

    def same_as_reference(self, name, **how):
        done = self.train(name, **how)
        output = os.path.join(self.folder, name)
        self.assertEqual(support.curve(output), self.curve)
        self.assertEqual(support.adapter_digest(output), self.adapter)
        return done

    def test_version_names_the_plugin(self):
        done = subprocess.run([support.QSHARD, "--version"], env={**os.environ, **on_gpu()}, capture_output=True, text=True)
        self.assertRegex(done.stdout, r"\n  GPU       (?!no plugin)\w")

    def test_loss_is_the_cpus(self):
        """bf16 against fp32: 5e-3 of the loss at every step."""
        output = os.path.join(self.folder, "cpu")
        support.train(output, device="cpu", **SMALL)
        mine, cpus = losses(self.reference), losses(output)
        self.assertEqual(len(mine), SMALL["train__steps"])
        self.assertNotEqual(mine, cpus)  # else this ran on the CPU
        for step, (a, b) in enumerate(zip(mine, cpus)):
            self.assertLess(abs(a - b), 5e-3 * b, f"step {step + 1}: {a} instead of {b}")

    def test_gradients_are_the_cpus(self):
        grads = {}
        for device in ("cpu", "cuda"):
            path = os.path.join(self.folder, f"{device}.safetensors")
            support.train(os.path.join(self.folder, "unused"), environment=on_gpu(), device=device,
                          options=("--dump-grads", path), **SMALL)
            grads[device] = support.read_safetensors(path)
        self.assertEqual(sorted(grads["cuda"]), sorted(grads["cpu"]))
        for name, want in grads["cpu"].items():
            got, want = grads["cuda"][name].astype(np.float64), want.astype(np.float64)
            if np.any(want):  # A's gradient is zero as long as B is
                self.assertLess(np.linalg.norm(got - want), 3e-2 * np.linalg.norm(want), name)
            else:
                self.assertFalse(np.any(got), name)

    def test_same_bits_again_and_with_other_schedules_of_the_threads(self):
        """The emulator runs the threads of a block in another order: a missing barrier would change bits."""
        self.same_as_reference("again")
        self.same_as_reference("seed", environment={"QSHARD_EMULATOR_SEED": "7"})

    def test_same_bits_on_any_number_of_ranks(self):
        for ranks in (1, 2, 3):
            with self.subTest(ranks=ranks):
                self.same_as_reference(f"ranks-{ranks}", ranks=ranks)

    def test_same_bits_in_groups_with_copies_of_the_base(self):
        """Two communicators a rank, over two and over four GPUs: as the plan has counted them."""
        done = self.same_as_reference("groups", ranks=4, shard__group=2, options=("--verbose",),
                                      environment={"QSHARD_EMULATOR_DEVICES": "4"})
        self.assertEqual(re.findall(r"NCCL: (\d+) communicators", done.stderr), 4 * ["2"])
        self.assertRegex(done.stdout, r"(?m)^  NCCL, 2 communicators +1792\.0$")

    def test_ranks_that_see_the_cards_of_their_socket(self):
        """As with --gpu-bind=closest, in turns on two sockets of two cards each: every rank has a card of its own."""
        visible = "case $OMPI_COMM_WORLD_RANK in 0|2) export CUDA_VISIBLE_DEVICES=0,1 ;; *) export CUDA_VISIBLE_DEVICES=2,3 ;; esac"
        output = os.path.join(self.folder, "sockets")
        by_rank(4, visible, output, options=(), environment={"QSHARD_EMULATOR_DEVICES": "2"}, device="cuda")
        self.assertEqual(support.curve(output), self.curve)
        self.assertEqual(support.adapter_digest(output), self.adapter)

    @unittest.skipUnless(os.path.exists(MPIFAULT), "libmpifault.so is not built")
    def test_a_step_that_is_given_up(self):
        """By a stop signal in the middle of the second one: rows of the embedding are on their way. The next start has the same bits."""
        for ranks in (1, 2):
            with self.subTest(ranks=ranks):
                name, passes = f"given-up-{ranks}", -(-SMALL["train__global_batch"] // ranks)
                done = self.train(name, ranks=ranks, expect=75, train__gather_group=1, environment={
                    "QSHARD_FAULT_PASS": str(2 * passes), "QSHARD_FAULT_LATE": "100", **support.preload(MPIFAULT)})
                self.assertRegex(done.stderr, "step 2: given up for a stop signal")
                self.assertEqual([line["step"] for line in support.metrics(os.path.join(self.folder, name))], [1])
                self.same_as_reference(name, ranks=3 - ranks)

    def test_a_gpu_for_each_task_as_schedulers_give_them(self):
        """--gpus-per-task=1: every rank sees one card, another one, and calls it number 0."""
        output = os.path.join(self.folder, "tasks")
        settings = support.settings(support.tiny(), output, device="cuda", **SMALL)
        own_card = 'CUDA_VISIBLE_DEVICES=$OMPI_COMM_WORLD_RANK exec "$@"'
        done = subprocess.run(["timeout", "240", "mpirun", "-np", "2", "sh", "-c", own_card, "task", support.QSHARD, "train",
                               support.TINY_YAML, *settings], env=support.environment(**on_gpu()), capture_output=True,
                              text=True, stdin=subprocess.DEVNULL)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        self.assertEqual(support.curve(output), self.curve)
        self.assertEqual(support.adapter_digest(output), self.adapter)

    def test_same_bits_with_recompute_groups_and_offload(self):
        for name, how in {"selective": {"train__recompute": "selective"},
                          "none": {"train__recompute": "none", "train__gather_group": 2},
                          "offload": {"memory__offload": "[activations, weights, embedding]"},
                          "offload-2": {"memory__offload": "[activations, weights]", "ranks": 2,
                                        "train__gather_group": 2},
                          "resident": {"memory__offload": "[weights]", "shard__keep_resident": 1, "shard__prefetch": 3},
                          "resident-2": {"ranks": 2, "shard__keep_resident": 2, "shard__prefetch": 2}}.items():
            with self.subTest(name):
                self.same_as_reference(name, **how)

    def test_same_bits_with_layers_that_stay_decoded(self):
        """memory.keep_decoded, where every layer lies here, where only those do that stay, and where weights are offloaded; what
        auto takes where not all fit, and what the plan says of it."""
        def run(name, **how):
            log = self.same_as_reference(name, memory__keep_decoded=how.pop("keep"), **how)
            rows = support.plan_and_peak(log.stdout)
            for kind in ("decoded layers",) if "ranks" in how else ("decoded layers", "total"):
                self.assertLess(abs(rows[kind][0] - rows[kind][1]), max(0.03 * rows[kind][0], 0.11), kind)
            self.kept = support.metrics(os.path.join(self.folder, name), "ranks.jsonl")[-1]["keep_decoded"]
            return rows["decoded layers"][1], rows["total"][0], re.findall(r"memory\.keep_decoded: .*", log.stderr)

        self.assertEqual(support.plan_and_peak(self.log)["decoded layers"], (0.0, 0.0))
        layer, total, _ = run("one", keep=1)
        self.assertGreater(layer, 0)
        self.assertEqual(self.kept, 1)
        most, _, said = run("auto", keep="auto", train__recompute="none", train__gather_group=2)
        layers = round(most / layer) + 1  # the last needs no room of its own
        self.assertEqual(said, [f"memory.keep_decoded: auto is {layers} of {layers} layers"])
        self.assertEqual(self.kept, layers)
        self.assertAlmostEqual(run("number", keep=layers)[0], most, delta=0.11)
        self.assertAlmostEqual(run("ranks", keep=2, ranks=2)[0], 2 * layer, delta=0.11)
        self.assertAlmostEqual(run("offloaded", keep=1, memory__offload="[weights]", ranks=2)[0], layer, delta=0.11)
        beside = 256 + 0.5 * layer  # MiB for code, and not quite another layer
        tight, _, said = run("tight", keep="auto", memory__device_limit=int((total + beside) / 0.95 * 2**20))
        self.assertAlmostEqual(tight, layer, delta=0.11)
        self.assertEqual(said, [f"memory.keep_decoded: auto is 1 of {layers} layers: a rank has no room for more"])

    def test_resume_gives_the_undisturbed_bits(self):
        """Stopped by the clock after a step, continued on another number of ranks."""
        name = "resumed"
        self.train(name, expect=75, train__max_time=0.001)
        self.same_as_reference(name, ranks=2)

    def test_a_run_does_not_change_the_kind_of_device(self):
        self.train("kind", expect=75, train__max_time=0.001)
        done = self.train("kind", device="cpu", expect=8)
        self.assertIn("error[E802]", done.stderr)

    def test_peak_is_the_plan(self):
        """Every class of device memory reaches what --dry-run promised, within 3 %."""
        table = re.search(r"device memory of rank 0.*?\n(.*?)\n\s*total\s+([\d.]+)\s+([\d.]+)", self.log, re.S)
        self.assertIsNotNone(table, self.log)
        plan, peak = float(table[2]), float(table[3])
        self.assertGreater(peak, 0)
        self.assertLess(abs(peak - plan), 0.03 * plan, table[0])
        dry = self.train("dry", options=("--dry-run",)).stdout
        self.assertIn(f"{plan:.1f}", dry)

    def test_evaluation_and_samples_with_the_trained_adapter(self):
        result = {}
        for device in ("cpu", "cuda"):
            done = support.qshard("eval", support.TINY_YAML, *support.settings(support.tiny(), "none", device=device, cpu__gemm="strict"),
                                  "--adapter", self.reference, **on_gpu())
            result[device] = float(done.stdout.split()[1])
        self.assertLess(abs(result["cuda"] - result["cpu"]), 5e-3 * result["cpu"])
        self.assertNotEqual(result["cuda"], result["cpu"])


@unittest.skipUnless(os.path.exists(EMULATED), "libqshard_emulated.so is not built")
class Layers(unittest.TestCase):
    """The layers of Gemma, Phi-3, OLMo, SmolLM3 and Granite on the device, and all with their residual stream in bf16: the CPU's
    losses, its plan, and the same bits whatever is kept where."""
    MODELS = {"gemma2": support.GEMMA2, "gemma3": support.GEMMA3, "phi3": support.PHI3, "olmo3": support.OLMO3,
              "smollm3": support.SMOLLM3, "granite": support.GRANITE}

    def train(self, output, options, device="cuda", **how):
        how = {**SMALL, "train__steps": 2, "train__global_batch": 3, "base": support.base_of(*options), **how}
        return support.train(output, environment=on_gpu(), options=("--allow-shared-device",), device=device, **how)

    def check(self, options, **settings):
        """Returns the losses."""
        folder = support.scratch()
        reference, cpu = os.path.join(folder, "reference"), os.path.join(folder, "cpu")
        log = self.train(reference, options, **settings).stdout
        self.train(cpu, options, device="cpu")
        for mine, cpus in zip(losses(reference), losses(cpu)):
            self.assertLess(abs(mine - cpus), 5e-3 * cpus)
        self.assertNotEqual(losses(reference), losses(cpu))
        for kind, (plan, peak) in support.plan_and_peak(log).items():
            self.assertLess(abs(peak - plan), max(0.03 * plan, 0.11), kind)
        for name, how in {"none": {"train__recompute": "none", "train__gather_group": 2},
                          "selective": {"train__recompute": "selective", "ranks": 2},
                          "offload": {"memory__offload": "[activations, weights, embedding]"}}.items():
            with self.subTest(name):
                output = os.path.join(folder, name)
                self.train(output, options, **how, **settings)
                self.assertEqual(support.curve(output), support.curve(reference))
                self.assertEqual(support.adapter_digest(output), support.adapter_digest(reference))
        return losses(reference)

    def test_models(self):
        for name, options in self.MODELS.items():
            with self.subTest(model=name):
                in_fp32 = self.check(options)
                self.assertNotEqual(self.check(options, train__residual_fp32="false"), in_fp32)


@unittest.skipUnless(os.path.exists(EMULATED), "libqshard_emulated.so is not built")
class Quantizing(unittest.TestCase):
    """qshard quantize --device cuda: the file of the CPU, byte for byte."""

    @classmethod
    def setUpClass(cls):
        cls.folder = support.scratch()

    def model(self, name, dtype, *options):
        """A seed-made model in a dtype of its own; one linear has zero blocks."""
        folder = os.path.join(self.folder, name)
        support.python(os.path.join(support.PREP, "qshard_tiny.py"), folder, "--layers", "2", "--examples", "8", *options)
        weights = os.path.join(folder, "model.safetensors")
        tensors = support.read_safetensors(weights)
        tensors["model.layers.1.mlp.up_proj.weight"][:, :] = 0.0
        support.write_safetensors(weights, {key: STORED_AS[dtype](tensor) for key, tensor in tensors.items()})
        return folder

    def quantize(self, model, *options, device="cuda", ranks=None, expect=0, **environment):
        """What the program said, and the file's SHA-256 (None if it failed)."""
        output = os.path.join(support.scratch(), "base.h5")
        done = support.qshard("quantize", model, "-o", output, "--device", device, "--head-chunk-rows", "100", *options,
                              ranks=ranks, expect=expect, **on_gpu(**environment))
        self.assertEqual(os.path.exists(output), expect == 0)
        return done, digest(output) if expect == 0 else None

    def test_the_file_is_the_cpus(self):
        odd = ("--hidden", "72", "--heads", "3", "--kv-heads", "1", "--head-dim", "20", "--ffn", "91", "--untied")
        wide = ("--hidden", "1040", "--heads", "8", "--ffn", "1400")  # linears of more than a piece
        for name, dtype, shape in (("bf16", "bf16", ()), ("f16", "f16", odd), ("f32", "f32", odd), ("wide", "bf16", wide)):
            model = self.model(name, dtype, *shape)
            for options in ((), ("--no-double-quant",)):
                with self.subTest(model=name, options=options):
                    on_cpu, want = self.quantize(model, *options, device="cpu")
                    self.assertNotIn(" 0 zero blocks", on_cpu.stdout)
                    done, got = self.quantize(model, *options)
                    self.assertEqual(got, want)
                    self.assertIn("cuda: emulated", done.stderr + done.stdout)

    def test_the_file_is_the_same_on_several_ranks_and_with_auto(self):
        model = self.model("ranks", "bf16")
        want = self.quantize(model, device="cpu")[1]
        for device, ranks, options, environment in (
                ("cuda", 2, (), {"QSHARD_EMULATOR_DEVICES": "2"}), ("cuda", 3, ("--allow-shared-device",), {}),
                ("auto", None, (), {}), ("auto", 2, (), {"QSHARD_EMULATOR_DEVICES": "1"}),
                ("auto", None, (), {"QSHARD_EMULATOR_DEVICES": "0"}), ("cuda", None, (), {"QSHARD_EMULATOR_SEED": "7"})):
            with self.subTest(device=device, ranks=ranks, environment=environment):
                done, got = self.quantize(model, *options, device=device, ranks=ranks, **environment)
                self.assertEqual(got, want)
                cpu_instead = device == "auto" and environment
                self.assertIn("device: cpu, since" if cpu_instead else "cuda: emulated", done.stderr + done.stdout)

    def test_what_is_refused(self):
        """With one line and the code of the same failure elsewhere; nothing is left."""
        model, bad = self.model("refused", "bf16"), self.model("infinite", "bf16")
        weights = os.path.join(bad, "model.safetensors")
        tensors = support.read_safetensors(weights)
        tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = np.inf
        support.write_safetensors(weights, {key: STORED_AS["bf16"](tensor) for key, tensor in tensors.items()})
        for words, expect, source, how in (
                (["error[E801]", "device: cuda", "no GPU is visible"], 8, model, {"QSHARD_EMULATOR_DEVICES": "0"}),
                (["error[E801]", "--allow-shared-device"], 8, model, {"ranks": 2}),
                (["error[E900]"], 9, model, {"QSHARD_EMULATOR_FAIL": "cudaMemcpyAsync:9"}),
                (["error[E900]"], 9, model, {"QSHARD_EMULATOR_FAIL": "cudaStreamSynchronize:3"}),
                (["error[E700]"], 7, model, {"QSHARD_EMULATOR_MEMORY": "1000000"}),
                (["error[E302]", "model.layers.0.mlp.down_proj.weight", "not finite"], 3, bad, {}),
                (["error[E302]", "model.layers.0.mlp.down_proj.weight", "not finite"], 3, bad, {"device": "cpu"}),
                (["error[E200]", "--device", "gpu", "auto | cpu | cuda"], 2, model, {"device": "gpu"})):
            with self.subTest(words=words, how=how):
                done, _ = self.quantize(source, expect=expect, **how)
                line, = (line for line in done.stderr.splitlines() if "error[" in line)
                for word in words:
                    self.assertIn(word, line)


@unittest.skipUnless(os.path.exists(EMULATED), "libqshard_emulated.so is not built")
class Refusals(unittest.TestCase):
    """What is missing is named before anything is loaded, with the documented exit code on all ranks."""

    def refuse(self, expect, words, environment=None, **how):
        output = os.path.join(support.scratch(), "run")
        done = support.train(output, expect=expect, environment=on_gpu(**(environment or {})),
                             **{**SMALL, "device": "cuda", **how})
        lines = [line for line in done.stderr.splitlines() if "error[" in line]
        self.assertEqual(len(lines), 1, done.stderr)
        for word in words:
            self.assertIn(word, lines[0])
        return done

    def test_no_device(self):
        self.refuse(8, ["error[E801]", "device: cuda"], {"QSHARD_EMULATOR_DEVICES": "0"})

    def test_old_driver(self):
        self.refuse(8, ["error[E801]", "driver", "11.4"], {"QSHARD_EMULATOR_DRIVER": "11040"})

    def test_unsupported_card(self):
        self.refuse(8, ["error[E801]", "sm_75", "sm_80"], {"QSHARD_EMULATOR_CAPABILITY": "7.5"})

    def test_no_plugin(self):
        self.refuse(8, ["error[E801]", "/nonexistent.so"], {"QSHARD_PLUGIN": "/nonexistent.so"})

    def test_more_ranks_than_devices(self):
        done = self.refuse(8, ["error[E801]", "--allow-shared-device"], ranks=2)
        self.assertEqual(done.stderr.count("error["), 1)

    def test_a_host_without_a_gpu_is_named(self):
        done = by_rank(3, "test $OMPI_COMM_WORLD_RANK != 1 || export QSHARD_EMULATOR_DEVICES=0", os.path.join(support.scratch(), "run"),
                       expect=8, device="auto", environment={"QSHARD_EMULATOR_DEVICES": "3"})
        line, = (line for line in done.stderr.splitlines() if "error[" in line)
        self.assertRegex(line, r"error\[E800\] device: auto finds a GPU on some hosts only; rank 1 on \S+ has none, since no GPU is visible; ")

    def test_auto_warns_of_gpus_that_are_too_few(self):
        done = support.train(os.path.join(support.scratch(), "run"), ranks=3, options=("--dry-run",), device="auto",
                             environment=on_gpu(QSHARD_EMULATOR_DEVICES="2"), **SMALL)
        self.assertRegex(done.stderr, r"warning: device: cpu, since 3 ranks on \S+ see 2 GPUs, and ranks 0 and 2 would share one: start as many")
        self.assertIn("kernels strict", done.stderr)

    def test_gpus_that_differ_are_named(self):
        """What can decide bits, not the memory. One line names rank 0 and the first other one."""
        for setting, mine, others in (("CAPABILITY=8.0", "sm_90", "sm_80"), ("NAME=other", "emulated, sm_90", "other, sm_90"),
                                      ("DRIVER=13010", "driver 13.0", "driver 13.1"), ("MEMORY=4294967296", None, None)):
            done = by_rank(3, f"test $OMPI_COMM_WORLD_RANK = 0 || export QSHARD_EMULATOR_{setting}", os.path.join(support.scratch(), "run"),
                           device="cuda", environment={"QSHARD_EMULATOR_DEVICES": "3"})
            said = [line for line in done.stderr.splitlines() if "libraries differ" in line]
            with self.subTest(setting=setting, said=said):
                self.assertEqual(len(said), mine is not None)
                if said:
                    self.assertRegex(said[0], rf"warning: .* rank 0 on \S+ has .*{mine}.*; rank 1 on \S+ has .*{others}.*The bits of the loss")

    def test_auto_goes_on_without_a_device(self):
        output = os.path.join(support.scratch(), "run")
        done = support.train(output, environment=on_gpu(QSHARD_EMULATOR_DEVICES="0"), device="auto", **SMALL)
        self.assertIn("kernels strict", done.stderr + done.stdout)

    def test_doctor(self):
        """MPI is tried in a child, which must not come after the GPUs' contexts; what NCCL needs is said where there are GPUs."""
        text = support.qshard("doctor", **on_gpu()).stdout
        self.assertLess(re.search(r"(?m)^OK +MPI ", text).start(), re.search(r"(?m)^OK +GPU ", text).start(), text)
        self.assertRegex(text, r"(?m)^(OK|WARN) +shared mem +/dev/shm: \d+\.\d\d GiB free$")
        self.assertNotIn("/dev/shm", support.qshard("doctor", **on_gpu(QSHARD_EMULATOR_DEVICES="0")).stdout)

    def test_products_of_the_cpu_have_no_effect(self):
        """One line says so, and what is recorded is what was computed with."""
        for gemm in ("bf16", "fp16", "amx"):
            output = os.path.join(support.scratch(), "run")
            done = support.train(output, environment=on_gpu(), device="cuda", options=("--allow-shared-device",),
                                 **{**SMALL, "cpu__gemm": gemm, "train__steps": 1})
            said = [line for line in done.stderr.splitlines() if "cpu.gemm" in line]
            self.assertEqual(len(said), 1, done.stderr)
            self.assertIn(f"cpu.gemm: {gemm} is for the CPU and has no effect with device: cuda", said[0])
            with open(os.path.join(output, "config.yaml"), encoding="utf-8") as file:
                self.assertRegex(file.read(), r"(?m)^ *gemm: strict  #")

    def test_a_model_that_the_operations_do_not_take(self):
        """head_dim 20: refused before anything is written with device: cuda, on the CPU with auto. Its vocabulary is the
        tiny model's, so the data fit."""
        folder = support.scratch()
        model, base, output = (os.path.join(folder, name) for name in ("model", "odd.h5", "run"))
        support.python(os.path.join(support.PREP, "qshard_tiny.py"), model, "--head-dim", "20", "--examples", "8")
        support.qshard("quantize", model, "-o", base, "--head-chunk-rows", "128")
        for ranks, shared in ((None, ()), (2, ("--allow-shared-device",))):
            done = support.train(output, expect=2, ranks=ranks, options=shared, environment=on_gpu(),
                                 **{**SMALL, "device": "cuda", "base": base})
            line, = (line for line in done.stderr.splitlines() if "error[" in line)
            for word in ("error[E203]", "device: cuda", base, "head_dim=20", "multiples of 8", "device: cpu"):
                self.assertIn(word, line)
            self.assertFalse(os.path.exists(output))
        done = support.train(output, environment=on_gpu(), **{**SMALL, "device": "auto", "base": base})
        self.assertIn(f"device: cpu, since {base}: head_dim=20", done.stderr + done.stdout)
        self.assertIn("kernels strict", done.stderr + done.stdout)
        on_cpu = os.path.join(folder, "cpu")
        support.train(on_cpu, **{**SMALL, "device": "cpu", "base": base})
        self.assertEqual(support.curve(output), support.curve(on_cpu))

    def test_memory_that_does_not_fit(self):
        done = self.refuse(7, ["error[E700]", "offload", "micro_batch"], {"QSHARD_EMULATOR_MEMORY": "2000000"})
        self.assertIn("device memory of rank 0", done.stdout)

    def test_a_limit_of_ones_own(self):
        self.refuse(7, ["error[E700]", "memory.device_limit"], memory__device_limit=1000000)

    def test_a_device_that_fails(self):
        """Errors of the card come up at the next wait, with CUDA's words."""
        for what in ("cudaMemcpyAsync:40", "cudaStreamSynchronize:12", "cudaEventRecord:30"):
            with self.subTest(what):
                self.refuse(9, ["error[E900]"], {"QSHARD_EMULATOR_FAIL": what})

    def test_a_peer_that_fails(self):
        output = os.path.join(support.scratch(), "run")
        done = support.train(output, expect=6, ranks=2, options=("--allow-shared-device",), device="cuda",
                             environment=on_gpu(QSHARD_EMULATOR_NCCL_FAIL="11"), **SMALL)
        self.assertIn("error[E600]", done.stderr)

    def test_a_peer_that_does_not_connect(self):
        """Those that have waited for it in vain cannot agree on that with it: it is elsewhere by then, and would wait."""
        output = os.path.join(support.scratch(), "run")
        done = support.train(output, expect=6, ranks=3, options=("--allow-shared-device",), device="cuda",
                             environment=on_gpu(QSHARD_NCCL_TIMEOUT="3", QSHARD_EMULATOR_NCCL_FAIL="init@1"), **SMALL)
        self.assertIn("of 3 has waited 3 s for the others", done.stderr)
        self.assertEqual(len(re.findall(r"^error\[E600\] ncclCommInitRankConfig: unhandled system error.* \(rank 1 on \S+\)$", done.stderr, re.M)),
                         1, done.stderr)  # the cause, from the rank that the others' end of the job ends


if __name__ == "__main__":
    unittest.main()
