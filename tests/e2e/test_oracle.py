"""Loss, LoRA gradients and training curve against transformers + peft, from the committed golden values; and the gradient
against finite differences of the program's own loss."""
import os
import shutil
import sys
import unittest

import numpy as np

import support

sys.path.insert(0, support.ORACLE)
from tensors import read_safetensors, write_safetensors  # noqa: E402

COMPARE = os.path.join(support.ORACLE, "compare.py")


def make_case(case):
    folder = os.path.join(support.scratch(), case)
    support.python(os.path.join(support.ORACLE, "make_inputs.py"), case, folder)
    support.qshard("quantize", os.path.join(folder, "model"), "-o", os.path.join(folder, "base.h5"))
    return folder


class Golden(unittest.TestCase):
    def check(self, case):
        folder = make_case(case)
        run = os.path.join(folder, "run.yaml")
        grads = os.path.join(folder, "grads.safetensors")
        for ranks in (1, 3):
            with self.subTest(case=case, ranks=ranks):
                support.qshard("train", run, "--dump-grads", grads, ranks=ranks)
                print(support.python(COMPARE, "grads", case, grads))
        support.qshard("train", run, ranks=2)
        metrics = os.path.join(folder, "run", "metrics.jsonl")
        print(support.python(COMPARE, "loss", case, metrics))
        print(support.python(COMPARE, "curve", case, metrics))

    def test_tiny2(self):
        self.check("tiny2")

    def test_odd_sizes_and_rope_scaling(self):
        self.check("odd")

    def test_biases(self):
        self.check("biases")


class Derivative(unittest.TestCase):
    def loss_at(self, folder, adapter):
        text = support.qshard("eval", os.path.join(folder, "run.yaml"), "--adapter", adapter, "--set",
                              f"data.eval={folder}/train.h5").stdout
        return float(text.split()[1])

    def test_gradient_is_the_derivative_of_the_loss(self):
        """Central differences along the gradient and along seeded random directions, over all adapters at once."""
        folder = make_case("odd")
        grads_path = os.path.join(folder, "grads.safetensors")
        support.qshard("train", os.path.join(folder, "run.yaml"), "--dump-grads", grads_path)
        grads = read_safetensors(grads_path)
        start = read_safetensors(os.path.join(folder, "adapter", "adapter_model.safetensors"))
        moved = os.path.join(folder, "moved")
        shutil.copytree(os.path.join(folder, "adapter"), moved)
        draw = np.random.default_rng(5)
        directions = [grads] + [{k: g * draw.choice([-1.0, 0.5, 2.0], size=g.shape) for k, g in grads.items()}
                                for _ in range(2)]
        for i, direction in enumerate(directions):
            size = np.sqrt(sum(np.sum(d.astype(np.float64) ** 2) for d in direction.values()))
            losses = []
            for step in (0.02, -0.02):
                write_safetensors(os.path.join(moved, "adapter_model.safetensors"),
                                  {k: (start[k] + step * direction[k] / size).astype(np.float32) for k in start})
                losses.append(self.loss_at(folder, moved))
            slope = (losses[0] - losses[1]) / 0.04
            expected = sum(np.sum(grads[k].astype(np.float64) * direction[k]) for k in grads) / size
            with self.subTest(direction=i, slope=slope, expected=expected):
                self.assertLess(abs(slope - expected), 3e-3 * abs(expected))


if __name__ == "__main__":
    unittest.main()
