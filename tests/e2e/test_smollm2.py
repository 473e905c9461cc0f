"""A real pretrained model: SmolLM2-135M-Instruct. Gradients against transformers + peft, and the same bits on every number
of ranks. test.sh takes the model out of its package and names it in QSHARD_SMOLLM2."""
import hashlib
import os
import unittest

import support

MODEL = os.environ.get("QSHARD_SMOLLM2", os.path.join(support.ROOT, "build", "smollm2"))
COMPARE = os.path.join(support.ORACLE, "compare.py")


def digest(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


@unittest.skipUnless(os.path.exists(os.path.join(MODEL, "config.json")), "no SmolLM2 in " + MODEL)
class SmolLM2(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = os.path.join(support.scratch(), "smollm2")
        support.python(os.path.join(support.ORACLE, "make_inputs.py"), "smollm2", cls.folder, "--model", MODEL)
        cls.base = os.path.join(cls.folder, "base.h5")
        support.qshard("quantize", MODEL, "-o", cls.base, ranks=2)

    def test_the_base_does_not_depend_on_ranks(self):
        other = os.path.join(self.folder, "other.h5")
        support.qshard("quantize", MODEL, "-o", other, ranks=3)
        self.assertEqual(digest(other), digest(self.base))
        print(support.python(COMPARE, "base", other, MODEL))

    def test_gradients_are_those_of_the_reference_on_any_ranks(self):
        seen = set()
        for ranks in (1, 2, 3, 4, 5, 8):
            grads = os.path.join(self.folder, f"grads-{ranks}.safetensors")
            done = support.qshard("train", os.path.join(self.folder, "run.yaml"), "--dump-grads", grads, "--set",
                                  "train.micro_batch=1", ranks=ranks)
            seen.add((done.stdout, digest(grads)))
            if ranks == 1:
                print(support.python(COMPARE, "grads", "smollm2", grads))
        self.assertEqual(len(seen), 1, "loss and gradient bits differ between rank counts")


if __name__ == "__main__":
    unittest.main()
