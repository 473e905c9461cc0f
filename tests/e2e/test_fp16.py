"""cpu.gemm: fp16, computed by the portable inner loops: near the strict curve, the same bits on any number of ranks and threads."""
import os
import unittest

import support

PORTABLE = {"QSHARD_CPU_FP16": "portable"}  # slow: few steps
STEPS = 8


class Fp16(unittest.TestCase):
    def train(self, name, gemm, **how):
        output = os.path.join(self.folder, name)
        support.train(output, environment=PORTABLE, cpu__gemm=gemm, train__steps=STEPS, **how)
        return output

    def setUp(self):
        self.folder = support.scratch()

    def test_curve(self):
        strict, fp16 = self.train("strict", "strict"), self.train("fp16", "fp16")
        losses = [[line["loss"] for line in support.metrics(run) if "loss" in line] for run in (strict, fp16)]
        self.assertEqual([len(of) for of in losses], [STEPS, STEPS])
        self.assertNotEqual(losses[0], losses[1])
        for a, b in zip(*losses):
            self.assertLess(abs(a - b), 1e-2)
        two = self.train("two", "fp16", ranks=2, threads=2)
        self.assertEqual(support.curve(two), support.curve(fp16))
        self.assertEqual(support.adapter_digest(two), support.adapter_digest(fp16))


if __name__ == "__main__":
    unittest.main()
