"""cpu.gemm: fp16 and amx, computed by the portable inner loops: near the strict curve, the same bits on any number of ranks and threads."""
import os
import unittest

import support

PORTABLE = {"QSHARD_CPU_FP16": "portable", "QSHARD_CPU_AMX": "portable"}  # slow: few steps
STEPS = 8


class Products(unittest.TestCase):
    def train(self, name, gemm, **how):
        output = os.path.join(self.folder, name)
        support.train(output, environment=PORTABLE, cpu__gemm=gemm, train__steps=STEPS, **how)
        return output

    def setUp(self):
        self.folder = support.scratch()

    def check(self, gemm):
        strict, other = self.train("strict", "strict"), self.train("other", gemm)
        losses = [[line["loss"] for line in support.metrics(run) if "loss" in line] for run in (strict, other)]
        self.assertEqual([len(of) for of in losses], [STEPS, STEPS])
        self.assertNotEqual(losses[0], losses[1])
        for a, b in zip(*losses):
            self.assertLess(abs(a - b), 1e-2)
        two = self.train("two", gemm, ranks=2, threads=2)
        self.assertEqual(support.curve(two), support.curve(other))
        self.assertEqual(support.adapter_digest(two), support.adapter_digest(other))

    def test_fp16(self):
        self.check("fp16")

    def test_amx(self):
        self.check("amx")

    def test_other_products_do_not_go_on(self):
        """A curve is computed one way: what amx began neither auto nor another goes on with."""
        output = self.train("amx", "amx")
        before = support.adapter_digest(output)
        for gemm in ("auto", "strict", "fp16"):
            done = support.train(output, environment=PORTABLE, expect=8, cpu__gemm=gemm, train__steps=STEPS)
            self.assertEqual(done.stderr.count("error["), 1, done.stderr)
            self.assertRegex(done.stderr, r"error\[.*cpu\.gemm")
        self.assertIn("finished", support.train(output, environment=PORTABLE, cpu__gemm="amx", train__steps=STEPS).stderr)
        self.assertEqual(support.adapter_digest(output), before)

    def test_refused_without_the_instructions(self):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = file.read().split()
        for gemm, flag, needs in (("fp16", "avx512_fp16", "AVX512-FP16"), ("amx", "amx_bf16", "AMX-BF16")):
            if flag in flags:
                continue
            done = support.train(os.path.join(self.folder, "no"), expect=8, cpu__gemm=gemm, train__steps=1)
            self.assertEqual(done.stderr.count("error["), 1, done.stderr)
            self.assertRegex(done.stderr, rf"error\[E801\].*cpu\.gemm: {gemm} needs .*{needs}")


if __name__ == "__main__":
    unittest.main()
