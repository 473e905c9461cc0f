"""cpu.gemm: bf16, fp16 and amx, by the portable inner loops: near the strict curve, the same bits on any number of ranks and threads."""
import ctypes
import os
import re
import time
import unittest

import support

PORTABLE = {"QSHARD_CPU_FP16": "portable", "QSHARD_CPU_AMX": "portable", "QSHARD_CPU_BF16": "portable"}  # a second a step
STEPS = 4


def lends_tiles(words):
    """Whether this CPU has AMX, and its kernel lends the registers to who asks for them."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return "amx_bf16" in words and ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


class Products(unittest.TestCase):
    def train(self, name, gemm, environment=PORTABLE, **how):
        output = os.path.join(self.folder, name)
        support.train(output, **{"environment": environment, "cpu__gemm": gemm, "train__steps": STEPS, **how})
        return output

    def setUp(self):
        self.folder = support.scratch()

    def check(self, gemm, environment=PORTABLE):
        strict, other = self.train("strict", "strict"), self.train("other", gemm, environment)
        losses = [[line["loss"] for line in support.metrics(run) if "loss" in line] for run in (strict, other)]
        self.assertEqual([len(of) for of in losses], [STEPS, STEPS])
        self.assertNotEqual(losses[0], losses[1])
        for a, b in zip(*losses):
            self.assertLess(abs(a - b), 1e-2)
        two = self.train("two", gemm, environment, ranks=2, threads=2)
        self.assertEqual(support.curve(two), support.curve(other))
        self.assertEqual(support.adapter_digest(two), support.adapter_digest(other))

    def test_fp16(self):
        self.check("fp16")

    def test_amx(self):
        self.check("amx")

    def test_bf16(self):
        self.check("bf16", {})

    def test_the_same_on_every_cpu(self):
        """The fastest inner loops that this CPU has, and AVX2's where it has them, beside portable C."""
        for gemm, variable in (("bf16", "QSHARD_CPU_BF16"), ("fp16", "QSHARD_CPU_FP16"), ("amx", "QSHARD_CPU_AMX")):
            kinds = {"portable": PORTABLE, "avx2": {variable: "avx2"}, "fastest": {}}
            runs = [self.train(gemm + name, gemm, environment, train__steps=2) for name, environment in kinds.items()]
            self.assertEqual([support.curve(run) for run in runs], [support.curve(runs[0])] * 3)
            self.assertEqual([support.adapter_digest(run) for run in runs], [support.adapter_digest(runs[0])] * 3)

    def test_slower_ones_say_so(self):
        for gemm in ("bf16", "fp16", "amx"):
            for ranks, whose in ((None, "this CPU"), (2, "a rank's CPU")):
                done = support.train(os.path.join(self.folder, f"{gemm}{ranks}"), environment=PORTABLE, cpu__gemm=gemm,
                                     train__steps=1, ranks=ranks, threads=1)
                found = re.findall(rf"warning.*cpu\.gemm: {gemm} is slower than strict without .*, which {whose} lacks", done.stderr)
                self.assertEqual(len(found), 1, done.stderr)

    def test_auto_follows_the_cpus_features(self):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            words = file.read().split()
        fast = {"amx": lends_tiles(words), "bf16": "AuthenticAMD" in words and "avx512_bf16" in words,
                "fp16": "avx512_fp16" in words, "strict": True}
        fastest = next(gemm for gemm, is_fast in fast.items() if is_fast)
        for name, environment, expected in (("auto", {}, fastest), ("held", PORTABLE, "strict")):
            output = self.train(name, "auto", environment, train__steps=1)
            with open(os.path.join(output, "config.yaml"), encoding="utf-8") as file:
                self.assertEqual(re.search(r"gemm: (\w+)", file.read()).group(1), expected)

    def test_other_products_do_not_go_on(self):
        """A curve is computed one way: what amx began no other goes on with."""
        output = self.train("amx", "amx")
        before = support.adapter_digest(output)
        for gemm in ("strict", "fp16"):
            done = support.train(output, environment=PORTABLE, expect=8, cpu__gemm=gemm, train__steps=STEPS)
            self.assertEqual(done.stderr.count("error["), 1, done.stderr)
            self.assertRegex(done.stderr, r"error\[.*cpu\.gemm")
        for gemm in ("amx", "auto"):
            self.assertIn("finished", support.train(output, environment=PORTABLE, cpu__gemm=gemm, train__steps=STEPS).stderr)
            self.assertEqual(support.adapter_digest(output), before)

    def test_auto_goes_on_as_it_began(self):
        """A run that is put on another CPU, here one for which auto is strict, keeps its bits."""
        whole = self.train("whole", "fp16")
        cut = os.path.join(self.folder, "cut")
        how = {"cpu__gemm": "fp16", "train__steps": STEPS, "train__save_every": 2}
        process = support.start("train", support.TINY_YAML, *support.settings(support.tiny(), cut, **how), **PORTABLE)
        while not os.path.isdir(os.path.join(cut, "step-00000002")):
            self.assertIsNone(process.poll(), "the run ended before it could be stopped")
            time.sleep(0.01)
        process.kill()
        process.communicate()
        self.assertFalse(os.path.exists(os.path.join(cut, f"step-{STEPS:08}")), "the run was not stopped")
        done = support.train(cut, environment=PORTABLE, ranks=2, **{**how, "cpu__gemm": "auto"})
        self.assertRegex(done.stderr, r"warning.*cpu\.gemm: fp16 is slower than strict")
        self.assertEqual(support.curve(cut), support.curve(whole))
        self.assertEqual(support.adapter_digest(cut), support.adapter_digest(whole))


if __name__ == "__main__":
    unittest.main()
