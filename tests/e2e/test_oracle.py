"""Loss, LoRA gradients and training curve against transformers + peft, from the committed golden values; and the gradient
against finite differences of the program's own loss."""
import json
import os
import shutil
import unittest

import support
from tensors import read_safetensors, write_safetensors

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

    def test_mistral(self):
        self.check("mistral")

    def test_qwen2(self):
        self.check("qwen2")

    def test_qwen3(self):
        self.check("qwen3")

    def test_gemma2(self):
        self.check("gemma2")

    def test_gemma3(self):
        self.check("gemma3")

    def test_yarn(self):
        self.check("yarn")

    def test_phi3(self):
        self.check("phi3")

    def test_olmo2(self):
        self.check("olmo2")

    def test_olmo3(self):
        self.check("olmo3")

    def test_longrope(self):
        self.check("longrope")

    def test_longrope_short(self):
        self.check("longrope_short")

    def test_dynamic(self):
        self.check("dynamic")

    def test_smollm3(self):
        self.check("smollm3")

    def test_smollm3_with_windows(self):
        self.check("smollm3_window")

    def test_granite(self):
        self.check("granite")

    def test_granite_with_dora_and_dropout(self):
        self.check("dora_granite")

    def test_dropout(self):
        self.check("dropout")

    def test_dora(self):
        self.check("dora")

    def test_dora_with_dropout(self):
        self.check("dora_dropout")


class Derivative(unittest.TestCase):
    """Central differences of the printed loss, over all adapters at once: no other program is involved."""

    def keep_targets(self, adapter, targets):
        """Makes the adapter one of `targets` alone."""
        config_path = os.path.join(adapter, "adapter_config.json")
        with open(config_path, encoding="utf-8") as file:
            config = json.load(file)
        config["target_modules"] = targets
        with open(config_path, "w", encoding="utf-8") as file:
            json.dump(config, file)
        weights = os.path.join(adapter, "adapter_model.safetensors")
        tensors = {k: v for k, v in read_safetensors(weights).items() if any(f".{t}." in k for t in targets)}
        write_safetensors(weights, tensors)

    def check(self, case, targets=None, dropout=0.0):
        folder = make_case(case)
        moved = os.path.join(folder, "moved")
        shutil.copytree(os.path.join(folder, "adapter"), moved)
        options = ["--set", f"lora.dropout={dropout}"]
        if targets is not None:
            self.keep_targets(moved, targets)
            options += ["--set", f"lora.targets=[{', '.join(targets)}]"]
        for i, (slope, expected) in enumerate(support.slopes(folder, moved, options)):
            with self.subTest(case=case, direction=i, slope=slope, expected=expected):
                self.assertLess(abs(slope - expected), 3e-3 * abs(expected))

    def test_all_linears(self):
        self.check("odd")

    def test_some_linears_with_dropout(self):
        self.check("odd", targets=["k_proj", "down_proj"], dropout=0.3)

    def test_fused_linears_with_dropout(self):
        self.check("phi3", targets=["qkv_proj", "gate_up_proj"], dropout=0.3)

    def test_norms_behind_with_dropout(self):
        self.check("olmo2", dropout=0.3)

    def test_biases_with_dropout(self):
        self.check("biases", dropout=0.5)


if __name__ == "__main__":
    unittest.main()
