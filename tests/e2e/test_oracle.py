"""Loss, LoRA gradients and training curve against transformers + peft, from the committed golden values."""
import os
import unittest

import support


class Oracle(unittest.TestCase):
    def check(self, case):
        folder = os.path.join(support.scratch(), case)
        support.python(os.path.join(support.ORACLE, "make_inputs.py"), case, folder)
        support.qshard("quantize", os.path.join(folder, "model"), "-o", os.path.join(folder, "base.h5"))
        compare = os.path.join(support.ORACLE, "compare.py")
        run = os.path.join(folder, "run.yaml")
        grads = os.path.join(folder, "grads.safetensors")
        for ranks in (1, 3):
            with self.subTest(case=case, ranks=ranks, what="gradients"):
                support.qshard("train", run, *self.whole_data(folder), "--dump-grads", grads, ranks=ranks, cwd=folder)
                print(support.python(compare, "grads", case, grads))
        support.qshard("train", run, ranks=2, cwd=folder)
        metrics = os.path.join(folder, "run", "metrics.jsonl")
        print(support.python(compare, "curve", case, metrics))

    def whole_data(self, folder):
        """The golden gradients belong to one step over the whole file."""
        import h5py
        with h5py.File(os.path.join(folder, "train.h5"), "r") as file:
            count = int(file.attrs["n_sequences"])
        return ["--set", f"train.global_batch={count}"]

    def test_tiny2(self):
        self.check("tiny2")

    def test_odd_sizes_and_rope_scaling(self):
        self.check("odd")

    def test_biases(self):
        self.check("biases")


if __name__ == "__main__":
    unittest.main()
