"""A real pretrained model: SmolLM2-135M-Instruct. Gradients against transformers + peft, and the same bits on every number
of ranks. test.sh takes the model out of its package and names it in QSHARD_SMOLLM2."""
import hashlib
import json
import os
import unittest

import support

MODEL = os.environ.get("QSHARD_SMOLLM2", os.path.join(support.ROOT, "build", "smollm2"))
COMPARE = os.path.join(support.ORACLE, "compare.py")


ENGLISH = (
    "Bread is one of the oldest foods that people make. Flour is mixed with water, salt and a little yeast, and the dough "
    "is left in a warm place until it has doubled in size. The baker then shapes it into loaves and puts them into a hot "
    "oven. After half an hour the crust is brown, and the smell fills the whole house. In many countries a loaf of bread "
    "is still bought fresh every morning, and children are sent to the shop before breakfast."
)


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

    def test_plain_english_is_likely(self):
        """Wrong rows of q and k, a wrong RoPE base or a wrong tokenizer give thousands."""
        text, tokens = (os.path.join(self.folder, name) for name in ("english.jsonl", "english.h5"))
        with open(text, "w", encoding="utf-8") as file:
            file.write(json.dumps({"text": ENGLISH}) + "\n")
        support.python(os.path.join(support.PREP, "qshard_prep.py"), "--model", MODEL, text, "-o", tokens, "--seq-len",
                       "256", "--format", "text")
        done = support.qshard("eval", os.path.join(self.folder, "run.yaml"), "--set", f"data.eval={tokens}", ranks=2)
        perplexity = float(done.stdout.split()[3])
        print(done.stdout)
        self.assertTrue(2 < perplexity < 25, done.stdout)

    def test_threads_do_not_change_bits(self):
        outputs = {support.qshard("eval", os.path.join(self.folder, "run.yaml"), threads=threads).stdout
                   for threads in (1, 2)}
        self.assertEqual(len(outputs), 1, outputs)

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
