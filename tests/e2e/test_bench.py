"""qshard bench: what its tables say is what its JSON says, results are checked, and what is counted is what must travel."""
import json
import os
import re
import shutil
import subprocess
import unittest

import numpy as np

import support

BINARIES = os.path.dirname(support.QSHARD)
EMULATED = os.path.join(BINARIES, "libqshard_emulated.so")
MPIFAULT = os.path.join(BINARIES, "tests", "libmpifault.so")
SIZES = ("--begin-bytes", "16K", "--end-bytes", "256K", "--repeats", 3, "--warmup", 1, "--threads", 1)


def bench(*options, ranks=None, expect=0, **environment):
    """(the finished process, its JSON document)"""
    path = os.path.join(support.scratch(), "bench.json")
    done = support.qshard("bench", *options, "--json", path, ranks=ranks, expect=expect, **environment)
    document = None
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    return done, document


def rows(document, table):
    return document["tables"][table]["rows"]


class Collectives(unittest.TestCase):
    def test_sizes_and_rates(self):
        for name in ("gather", "reduce"):
            for ranks, group in ((None, ()), (2, ()), (3, ()), (4, ("--group", 2)), (4, ("--group", "node"))):
                with self.subTest(name=name, ranks=ranks, group=group):
                    done, document = bench(name, *SIZES, *group, ranks=ranks)
                    members = 2 if group == ("--group", 2) else ranks or 1
                    self.assertEqual(document["settings"]["group"], members)
                    self.assertEqual(document["host"]["ranks"], ranks or 1)
                    self.assertEqual(document["host"]["comm"], "self" if ranks is None else "mpi")
                    self.assertEqual(len(rows(document, "sizes")), 3)
                    printed = re.findall(r"(?m)^ +\d+ .*", done.stdout)
                    for row, line in zip(rows(document, "sizes"), printed, strict=True):
                        self.assertEqual(row["#wrong"], 0)
                        self.assertLessEqual(row["min"], row["time"])
                        self.assertLessEqual(row["time"], row["max"])
                        self.assertAlmostEqual(row["algbw"], row["size"] / row["time"] * 1e-3, delta=row["algbw"] * 1e-6)
                        self.assertAlmostEqual(row["busbw"], row["algbw"] * (members - 1) / members,
                                               delta=row["algbw"] * 1e-6)
                        self.assertEqual(int(line.split()[0]), row["size"])

    def test_messages(self):
        """A gather is a message from every other rank; so is a reduction whose pieces all have owners."""
        for name, size in (("gather", "64K"), ("reduce", "256K")):
            for ranks in (2, 3, 4):
                _, document = bench(name, "--begin-bytes", size, "--end-bytes", size, "--repeats", 1, "--threads", 1, ranks=ranks)
                self.assertEqual(rows(document, "sizes")[0]["messages"], ranks - 1)

    @unittest.skipUnless(os.path.exists(MPIFAULT), "libmpifault.so is not built")
    def test_a_changed_byte_is_found(self):
        """Every rank's share arrives changed in its last byte at each of the others: exit 5, one line, the count."""
        for name, bytes_each, wrong in (("gather", 65536 // 4, 12), ("reduce", 16384, 4)):
            with self.subTest(name=name):
                done, document = bench(name, "--begin-bytes", "64K", "--end-bytes", "64K", "--repeats", 1, "--threads", 1,
                                       ranks=4, expect=5, QSHARD_FAULT_BYTES=str(bytes_each), **support.preload(MPIFAULT))
                self.assertEqual(done.stderr.count("error["), 1, done.stderr)
                self.assertIn(f"error[E500] bench {name}: {wrong} elements are wrong", done.stderr)
                self.assertEqual(rows(document, "sizes")[0]["#wrong"], wrong)
                self.assertEqual(document["result"]["wrong"], wrong)

    @unittest.skipUnless(os.path.exists(EMULATED), "libqshard_emulated.so is not built")
    def test_nccl(self):
        for name in ("gather", "reduce"):
            _, document = bench(name, *SIZES, "--device", "cuda", "--allow-shared-device", ranks=2, QSHARD_PLUGIN=EMULATED)
            self.assertEqual(document["host"]["comm"], "nccl")
            self.assertEqual(document["result"]["wrong"], 0)


class Single(unittest.TestCase):
    def test_other_products(self):
        """cpu.gemm's paths have rows and a bound of their own where the CPU, here a variable, has them."""
        shape = ("gemm", "--shape", "96x128", "--tokens", 20, "--repeats", 1, "--threads", 2)
        _, document = bench(*shape, QSHARD_CPU_FP16="portable", QSHARD_CPU_AMX="portable",
                            QSHARD_CPU_BF16="portable")
        found = {row["operation"]: row for row in rows(document, "operations")}
        self.assertEqual(sorted(found), sorted(["dense"] + [f"{path} {way}" for path in ("nf4", "bf16", "fp16", "amx")
                                                           for way in ("forward", "backward")]))
        for path in ("bf16", "fp16", "amx"):
            bound = document["bounds"][f"{path} products GFLOP/s"]
            self.assertNotEqual(bound, document["bounds"]["products GFLOP/s"])
            for way in ("forward", "backward"):
                row = found[f"{path} {way}"]
                self.assertEqual(row["#wrong"], 0)
                self.assertEqual(row["bound"], bound)
                self.assertTrue(1e-5 < row["error"] < 1e-2, row["error"])  # operands were rounded
        self.assertLess(found["nf4 forward"]["error"], 1e-5)

    SMALL = {"gemm": ("--shape", "96x80", "--tokens", 20), "decode": ("--shape", "96x80"), "head": ("--shape", "96x80", "--tokens", 20),
             "attention": ("--heads", 4, "--kv-heads", 2, "--head-dim", 32, "--tokens", 40)}

    def check(self, options, environment):
        for name, shape in self.SMALL.items():
            with self.subTest(name=name):
                _, document = bench(name, *shape, *options, "--repeats", 2, **environment)
                for row in rows(document, "operations"):
                    self.assertGreater(row["checked"], 0)
                    self.assertEqual(row["#wrong"], 0)
                    self.assertGreaterEqual(row["error"], 0)
                    self.assertAlmostEqual(row["share"], 100 * row["rate"] / row["bound"], delta=1e-5 * row["share"])

    def test_cpu(self):
        self.check((), {})

    @unittest.skipUnless(os.path.exists(EMULATED), "libqshard_emulated.so is not built")
    def test_gpu(self):
        self.check(("--device", "cuda"), {"QSHARD_PLUGIN": EMULATED})


class Step(unittest.TestCase):
    OPTIONS = ("--set", "device=cpu", "--set", "train.seq_len=64", "--set", "train.global_batch=8", "--set", "train.micro_batch=1",
               "--threads", 1, "--repeats", 2, "--warmup", 1)

    def step(self, *options, ranks=None):
        _, document = bench("step", "--base", f"{support.tiny()}/base.h5", *self.OPTIONS, *options, ranks=ranks)
        return document

    def test_parts_add_up(self):
        parts = {row["part"]: row for row in rows(self.step(), "parts")}
        whole = sum(parts[name]["time"] for name in ("wait", "compute", "reduce", "optimizer", "lora"))
        self.assertAlmostEqual(whole / parts["total"]["time"], 1, delta=0.3)  # medians of two steps on a busy machine
        self.assertEqual(parts["wait"]["bound"], 0)
        self.assertGreater(parts["compute"]["bound"], 0)

    def test_parts_are_those_of_one_rank(self):
        """Of the one that computes longest, whoever waits for it: one repeat, so that its parts are its step."""
        for ranks, batch, idle in ((3, 4, "2 of the 3 ranks have no micro-batch in the last of 2 turns, and wait: a step has 4"),
                                   (3, 1, "2 of the 3 ranks have no micro-batch, and wait: a step has 1 "), (2, 4, None)):
            with self.subTest(ranks=ranks, batch=batch):
                done, document = bench("step", "--base", f"{support.tiny()}/base.h5", *self.OPTIONS, "--repeats", 1, "--set",
                                       f"train.global_batch={batch}", ranks=ranks)
                parts = {row["part"]: row for row in rows(document, "parts")}
                whole = sum(parts[name]["time"] for name in parts if name != "total")
                self.assertAlmostEqual(whole / parts["total"]["time"], 1, delta=1e-6)
                for row in parts.values():
                    self.assertLessEqual(row["share"] or 0, 100)
                    self.assertLessEqual(row["least"], row["mean"])
                self.assertGreaterEqual(parts["compute"]["time"], parts["compute"]["mean"])
                self.assertEqual(re.findall(r"warning: .* no micro-batch", done.stderr) != [], idle is not None)
                self.assertIn(idle or "", done.stderr)

    def test_any_ranks_the_same_loss(self):
        losses = {ranks: self.step(ranks=ranks)["speed"]["loss"] for ranks in (None, 2, 3)}
        self.assertEqual(len(set(losses.values())), 1, losses)

    def test_what_is_computed_again_is_told_apart(self):
        """A model of other recompute modes has the same model FLOPs, and of all ranks together those of one."""
        tiny = f"{support.tiny()}/base.h5"
        all_modes = (("none", None), ("selective", None), ("full", None), ("full", 3))
        dora = ("--set", "lora.dora=true", "--set", "lora.dropout=0.1")
        for base, more, modes in ((tiny, (), all_modes), (support.base_of(*support.GEMMA3), dora, (("none", None), ("full", None)))):
            work = {}
            for mode, ranks in modes:
                _, document = bench("step", "--base", base, *self.OPTIONS, *more, "--set", f"train.recompute={mode}", "--repeats", 1,
                                    "--warmup", 0, ranks=ranks)
                work[mode, ranks] = {key: value * (ranks or 1) for key, value in document["work"].items()}
                self.assertAlmostEqual(work[mode, ranks]["GFLOP"],
                                       work[mode, ranks]["model GFLOP"] + work[mode, ranks]["recomputed GFLOP"], delta=1e-6)
                self.assertGreater(document["work"]["HFU %"], 0)
            model = work["none", None]["model GFLOP"]
            self.assertEqual(work["none", None]["recomputed GFLOP"], 0)
            for case in work.values():
                self.assertAlmostEqual(case["model GFLOP"] / model, 1, delta=1e-6)
            self.assertGreater(work["full", None]["recomputed GFLOP"], 0)
            if modes is not all_modes:
                continue
            self.assertLess(work["selective", None]["GFLOP"], work["full", None]["GFLOP"])
            self.assertAlmostEqual(work["full", 3]["recomputed GFLOP"] / work["full", None]["recomputed GFLOP"], 1, delta=1e-6)
            self.assertGreater(work["full", 3]["most GFLOP"], work["full", 3]["GFLOP"])  # 8 micro-batches on 3 ranks

    def test_one_rank_has_no_link(self):
        done, document = bench("step", "--base", f"{support.tiny()}/base.h5", *self.OPTIONS, "--repeats", 1, "--warmup", 0)
        self.assertIn("all-gather GB/s -\n", done.stdout)
        self.assertNotIn("nan", done.stdout)
        self.assertIsNone(document["bounds"]["all-gather GB/s"])
        self.assertNotIn("the first step took", done.stderr)

    def test_a_long_measurement_says_how_long(self):
        """A thousand steps of however many milliseconds; nobody waits for them."""
        process = subprocess.Popen(support.command(("bench", "step", "--base", f"{support.tiny()}/base.h5", *self.OPTIONS, "--set",
                                   "train.global_batch=64", "--repeats", 1000, "--warmup", 1000)), env=support.environment(),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            said = next((line for line in process.stderr if "the first step" in line), "")
            self.assertRegex(said, r"the first step took \S+ s; 1999 more take about \S+ s")
        finally:
            process.kill()
            process.communicate()

    def test_cores_that_are_too_few_are_named(self):
        core = str(min(os.sched_getaffinity(0)))
        done = subprocess.run(["taskset", "-c", core, *support.command(("bench", "step", "--base", f"{support.tiny()}/base.h5",
                              *self.OPTIONS, "--threads", 2, "--json", os.path.join(support.scratch(), "bench.json")))],
                              env=support.environment(), capture_output=True, text=True, check=True)
        self.assertRegex(done.stderr, r"warning: the rank that computed longest was on [01]\.\d\d cores with 2 threads")
        self.assertRegex(done.stdout, r"CPU / wall [01](\.\d+)?\n")

    def test_a_file_and_its_changes(self):
        _, document = bench("step", support.TINY_YAML, *support.settings(support.tiny(), "unused", train__global_batch=4),
                            "--repeats", 1, "--warmup", 0)
        self.assertEqual(document["settings"]["global_batch"], 4)
        self.assertEqual(document["settings"]["seq_len"], 64)

    def test_what_must_travel(self):
        """With one pass a rank gathers each layer twice and each chunk once, but for those that a buffer still holds."""
        traffic = {row["traffic"]: row for row in rows(self.step(ranks=2), "traffic")}
        layers = 4
        self.assertGreaterEqual(traffic["units"]["calls"], 2 * layers - 1)
        self.assertEqual(traffic["units"]["messages"], traffic["units"]["calls"])
        for name in ("gradients", "lora"):
            self.assertEqual(traffic[name]["calls"], layers)
            self.assertEqual(traffic[name]["messages"], layers)
        self.assertIsNone(traffic["agreement"]["messages"])


class Document(unittest.TestCase):
    """What stands in the JSON document alone."""

    def test_where_figures_come_from(self):
        _, document = bench("gather", *SIZES, ranks=2, NCCL_DEBUG="WARN", SLURM_JOB_ID="7", SLURM_JWT="hidden", HOME_TOKEN="hidden",
                            OMPI_MCA_some_secret="hidden")
        found = document["provenance"]
        self.assertRegex(found["date"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
        self.assertEqual(found["command"][1:3], ["bench", "gather"])
        self.assertEqual(found["commit"], document["commit"])
        self.assertEqual(found["kernel"], f"{os.uname().sysname} {os.uname().release}")
        self.assertTrue(found["compiler"] and found["build"] and found["libraries"]["mpi"] and found["libraries"]["hdf5"])
        self.assertEqual([rank["host"] for rank in found["ranks"]], [os.uname().nodename] * 2)
        for rank in found["ranks"]:
            self.assertGreaterEqual(rank["cores"], 1)
            self.assertGreaterEqual(rank["load"], 0)
        self.assertEqual(found["environment"]["NCCL_DEBUG"], "WARN")
        self.assertEqual(found["environment"]["SLURM_JOB_ID"], "7")
        self.assertEqual({name.split("_")[0] for name in found["environment"]} - {"OMPI", "OMP", "NCCL", "SLURM"}, set())
        self.assertNotIn("hidden", json.dumps(found))
        self.assertNotIn("_uri", json.dumps(found))

    def test_samples(self):
        """Of every repeat, in order; times and quartiles are made of them."""
        _, sizes = bench("gather", *SIZES, "--repeats", 6, ranks=2)
        _, step = bench("step", "--base", f"{support.tiny()}/base.h5", *Step.OPTIONS, "--repeats", 3, ranks=2)
        for document, table, count in ((sizes, "sizes", 6), (step, "parts", 3)):
            self.assertEqual(document["tables"][table]["units"]["samples"], document["tables"][table]["units"]["time"])
            for row in rows(document, table):
                self.assertEqual(len(row["samples"]), count)
                for key, value in (("time", np.median(row["samples"])), ("min", min(row["samples"])), ("max", max(row["samples"])),
                                   ("p25", np.quantile(row["samples"], 0.25)), ("p75", np.quantile(row["samples"], 0.75))):
                    self.assertAlmostEqual(row[key], value, delta=1e-6 * abs(value) + 1e-9)
        parts = {row["part"]: row["samples"] for row in rows(step, "parts")}
        total = parts.pop("total")
        for i in range(3):
            self.assertAlmostEqual(sum(samples[i] for samples in parts.values()), total[i], delta=1e-5)

    def test_a_step_can_be_told_again(self):
        _, document = bench("step", "--base", f"{support.tiny()}/base.h5", *Step.OPTIONS)
        config = os.path.join(support.scratch(), "run.yaml")
        with open(config, "w", encoding="utf-8") as file:
            file.write(document["config"])
        _, again = bench("step", config, "--repeats", 2, "--warmup", 1)  # the loss is that of the last step
        self.assertEqual(again["config"], document["config"])
        self.assertEqual(again["speed"]["loss"], document["speed"]["loss"])
        self.assertEqual(again["base_sha256"], document["base_sha256"])
        self.assertRegex(document["base_sha256"], "^[0-9a-f]{64}$")


class Refused(unittest.TestCase):
    def test_one_line_each(self):
        for options, ranks, text in (
                (("gathr",), None, "there are gather, reduce"), (("gather", "--factor", "1"), None, "--factor"),
                (("gather", "--begin-bytes", "1M", "--end-bytes", "1K"), 2, "--begin-bytes"),
                (("reduce", "--group", "2"), 3, "--group: 2"), (("gather", "--group", "host"), None, "--group"),
                (("gather", "--set", "shard.group=1"), 2, "--set: bench gather does not read it; that is for step"),
                (("reduce", "--base", "x.h5"), None, "--base: bench reduce"), (("gather", "--tokens", 8), None, "for gemm, attention, head"),
                (("gemm", "--heads", 8), None, "--heads: bench gemm does not read it; that is for attention"),
                (("decode", "--warmup", 1), None, "for gather, reduce, step"), (("step", "--base", "x.h5", "--group", 2), 2, "for gather, reduce"),
                (("gemm",), 2, "without mpirun"), (("gemm", "run.yaml"), None, "one argument too many"),
                (("gemm", "--shape", "4096"), None, "--shape"), (("step",), None, "--base"),
                (("attention", "--heads", 5, "--kv-heads", 2), None, "--kv-heads 2"),
                (("step", support.TINY_YAML, "--base", "x.h5"), None, "names a base already")):
            with self.subTest(options=options):
                done = support.qshard("bench", *options, ranks=ranks, expect=2)
                self.assertEqual(done.stderr.count("error["), 1, done.stderr)
                self.assertIn(text, done.stderr)

    def test_what_there_is_is_kept(self):
        """A size that there is no memory for ends the table, which is written with the error; its advice is bench's own."""
        path = os.path.join(support.scratch(), "bench.json")
        for name in ("gather", "reduce"):
            done = subprocess.run(["prlimit", f"--as={4 << 30}", *support.command(("bench", name, "--begin-bytes", "64K", "--end-bytes", "64G",
                                  "--factor", 1 << 20, "--repeats", 1, "--threads", 1, "--json", path))], env=support.environment(),
                                  capture_output=True, text=True, check=False)
            self.assertEqual(done.returncode, 7, done.stderr)
            self.assertRegex(done.stderr, r"error\[E700\] .*; give a smaller --end-bytes")
            self.assertNotIn("micro_batch", done.stderr)
            with open(path, encoding="utf-8") as file:
                document = json.load(file)
            self.assertEqual([row["size"] for row in rows(document, "sizes")], [65536])
            self.assertRegex(document["error"], "^E700 .*--end-bytes$")
            os.remove(path)

    def test_a_step_takes_the_device_that_is_given(self):
        base = ("step", "--base", f"{support.tiny()}/base.h5", "--repeats", 1, "--warmup", 0, "--threads", 1)
        settings = support.settings(support.tiny(), "unused", device="cuda")
        done = support.qshard("bench", *base, "--device", "cuda", expect=8, QSHARD_PLUGIN="/nowhere/plugin.so")
        self.assertIn("error[E801] device: cuda", done.stderr)
        _, document = bench("step", support.TINY_YAML, *settings, *base[3:], "--device", "cpu", QSHARD_PLUGIN="/nowhere/plugin.so")
        self.assertNotEqual(document["host"]["backend"], "cuda")

    def test_what_cannot_be_written_is_said_at_the_beginning(self):
        base = f"{support.tiny()}/base.h5"
        for command, option, path in (
                (("bench", "gather", *SIZES), "--json", "/nowhere/bench.json"),
                (("train", support.TINY_YAML, "--set", f"base={base}"), "--dump-grads", "/nowhere/grads.safetensors"),
                (("eval", support.TINY_YAML, "--set", f"base={base}"), "--dump-logits", "/nowhere/logits.safetensors")):
            for ranks in (None, 2):
                with self.subTest(command=command[0], ranks=ranks):
                    done = support.qshard(*command, option, path, *(("--set", f"data.train={support.tiny()}/train.h5", "--set",
                                          f"data.eval={support.tiny()}/eval.h5") if command[0] != "bench" else ()), ranks=ranks, expect=4)
                    self.assertEqual(done.stderr.count("error["), 1, done.stderr)
                    self.assertIn(path, done.stderr)
                    self.assertEqual(done.stdout, "")

    def test_no_file_of_others_is_replaced(self):
        """Not the base and the data of the very command; what a bench or a trace wrote before is."""
        folder, outputs = support.tiny(), support.scratch()
        settings = support.settings(folder, os.path.join(outputs, "run"), base=os.path.join(outputs, "base.h5"))
        shutil.copy(os.path.join(folder, "base.h5"), outputs)
        for command, option in ((("bench", "gather", *SIZES), "--json"), (("train", support.TINY_YAML, *settings), "--dump-grads"),
                                (("train", support.TINY_YAML, *settings), "--dump-order"),
                                (("train", support.TINY_YAML, *settings), "--trace"),
                                (("eval", support.TINY_YAML, *settings), "--dump-logits")):
            for ranks in (None, 2):
                with self.subTest(option=option, ranks=ranks):
                    done = support.qshard(*command, option, os.path.join(outputs, "base.h5"), ranks=ranks, expect=2)
                    self.assertEqual(re.findall(r"error\[E\d+\] [^:]*: is there already", done.stderr),
                                     [f"error[E204] {outputs}/base.h5: is there already"])
                    self.assertEqual(os.listdir(outputs), ["base.h5"])
        with open(os.path.join(folder, "base.h5"), "rb") as mine, open(os.path.join(outputs, "base.h5"), "rb") as other:
            self.assertEqual(mine.read(), other.read())
        for _ in range(2):
            support.qshard("bench", "gather", *SIZES, "--json", os.path.join(outputs, "bench.json"))
            support.qshard("train", support.TINY_YAML, *settings, "--trace", os.path.join(outputs, "trace.json"), "--set", "train.steps=3",
                           "--set", "train.eval_every=0")
            shutil.rmtree(os.path.join(outputs, "run"))


if __name__ == "__main__":
    unittest.main()
