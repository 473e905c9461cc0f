"""bitsandbytes checkpoints: imported bit for bit, and trained on, with and without double quantization; in the latter
k_proj was left at 16 bits."""
import os
import unittest

import support
from base_reader import Base
from tensors import is_linear, read_safetensors

COMPARE = os.path.join(support.ORACLE, "compare.py")
GOLDEN = os.path.join(support.ROOT, "tests", "golden")
CHECKPOINTS = ("bnb_tiny", "bnb_tiny_plain")


def import_base(checkpoint, folder, ranks=1):
    """base.h5 of a checkpoint of tests/golden."""
    base = os.path.join(folder, f"{checkpoint}-{ranks}.h5")
    support.qshard("quantize", os.path.join(GOLDEN, checkpoint), "-o", base, ranks=ranks)
    return base


def make_case(checkpoint):
    """Inputs of the case bnb_plain, over the import of `checkpoint`: both were made from the same model."""
    folder = os.path.join(support.scratch(), "case")
    support.python(os.path.join(support.ORACLE, "make_inputs.py"), "bnb_plain", folder)
    os.rename(import_base(checkpoint, folder), os.path.join(folder, "base.h5"))
    return folder


def content(path):
    with open(path, "rb") as file:
        return file.read()


class Import(unittest.TestCase):
    def test_linears_are_what_bitsandbytes_decodes(self):
        folder = support.scratch()
        for checkpoint in CHECKPOINTS:
            with self.subTest(checkpoint=checkpoint):
                weights = os.path.join(GOLDEN, checkpoint + "_weights.safetensors")
                print(support.python(COMPARE, "weights", import_base(checkpoint, folder), weights))

    def test_everything_else_is_what_the_checkpoint_holds(self):
        folder = support.scratch()
        for checkpoint, skipped in (("bnb_tiny", set()), ("bnb_tiny_plain", {"k_proj"})):
            stored = read_safetensors(os.path.join(GOLDEN, checkpoint, "model.safetensors"))
            base = Base(import_base(checkpoint, folder))
            others = [name for name in base.names() if name not in base.names("nf4")]
            self.assertEqual({name.split(".")[-2] for name in others if is_linear(name)}, skipped)
            for name in others:
                with self.subTest(checkpoint=checkpoint, name=name):
                    self.assertEqual(base.read(name).tobytes(), stored[name].tobytes())
            base.close()

    def test_ranks_write_the_same_bytes(self):
        folder = support.scratch()
        for checkpoint in CHECKPOINTS:
            with self.subTest(checkpoint=checkpoint):
                one, three = (content(import_base(checkpoint, folder, ranks)) for ranks in (1, 3))
                self.assertEqual(one, three)


class Training(unittest.TestCase):
    def gradients(self, folder, ranks):
        path = os.path.join(folder, f"grads-{ranks}.safetensors")
        done = support.qshard("train", os.path.join(folder, "run.yaml"), "--dump-grads", path, ranks=ranks)
        return path, done.stdout

    def test_ranks_give_the_same_bits(self):
        for checkpoint in CHECKPOINTS:
            with self.subTest(checkpoint=checkpoint):
                folder = make_case(checkpoint)
                (one, loss_of_one), (three, loss_of_three) = (self.gradients(folder, ranks) for ranks in (1, 3))
                self.assertEqual(loss_of_one, loss_of_three)
                self.assertEqual(content(one), content(three))

    def test_gradients_and_curve_of_transformers(self):
        folder = make_case("bnb_tiny_plain")
        print(support.python(COMPARE, "grads", "bnb_plain", self.gradients(folder, 3)[0]))
        support.qshard("train", os.path.join(folder, "run.yaml"), ranks=2)
        for what in ("loss", "curve"):
            print(support.python(COMPARE, what, "bnb_plain", os.path.join(folder, "run", "metrics.jsonl")))

    def test_derivative_with_double_quantization(self):
        folder = make_case("bnb_tiny")
        for i, (slope, expected) in enumerate(support.slopes(folder, os.path.join(folder, "adapter"))):
            with self.subTest(direction=i, slope=slope, expected=expected):
                self.assertLess(abs(slope - expected), 3e-3 * abs(expected))


if __name__ == "__main__":
    unittest.main()
