"""A merged checkpoint is a checkpoint: its weights are base plus adapter, and it can be quantized and evaluated."""
import json
import os
import unittest

import numpy as np
import support


def bf16(values):
    """To the nearest bf16, ties to even, as float32."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(np.float32)


def steps(values):
    """Floats as integers in order, so that neighbours in bf16 differ by 1."""
    bits = np.asarray(values, dtype=np.float32).view(np.int32) >> 16
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


class Merge(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = support.scratch()
        cls.trained = os.path.join(cls.folder, "run")
        support.train(cls.trained, ranks=2, train__steps=6)
        cls.adapter = os.path.join(cls.folder, "adapter")
        support.qshard("export", cls.trained, "-o", cls.adapter)
        cls.merged = os.path.join(cls.folder, "merged")
        support.qshard("merge", cls.trained, "-o", cls.merged, "--base", f"{support.tiny()}/base.h5")

    def test_weights_are_base_plus_adapter(self):
        from base_reader import read_base
        config, base = read_base(f"{support.tiny()}/base.h5")
        merged = support.read_safetensors(os.path.join(self.merged, "model.safetensors"))
        lora = support.read_safetensors(os.path.join(self.adapter, "adapter_model.safetensors"))
        with open(os.path.join(self.adapter, "adapter_config.json"), encoding="utf-8") as file:
            settings = json.load(file)
        scale = settings["lora_alpha"] / settings["r"]
        self.assertEqual(sorted(merged), sorted(base))
        changed = 0
        for name, weight in base.items():
            stem = "base_model.model." + name[: -len(".weight")]
            got = np.asarray(merged[name], dtype=np.float32)
            if stem + ".lora_A.weight" in lora:
                a = lora[stem + ".lora_A.weight"].astype(np.float64)
                b = lora[stem + ".lora_B.weight"].astype(np.float64)
                want = bf16((weight.astype(np.float64) + scale * (b @ a)).astype(np.float32))
                # fp32 sums may fall on the other side of a rounding's border
                self.assertLessEqual(np.abs(steps(got) - steps(want)).max(), 1, name)
                self.assertLess(np.mean(got != want), 1e-3, name)
                changed += 1
            else:
                np.testing.assert_array_equal(got, np.asarray(weight, dtype=np.float32), name)
        self.assertEqual(changed, 7 * config["num_hidden_layers"])

    def test_is_a_checkpoint_again(self):
        """Quantized once more, which rounds a part of the adapter away, it keeps most of what was learned."""
        again = os.path.join(self.folder, "again.h5")
        support.qshard("quantize", self.merged, "-o", again, "--head-chunk-rows", "128", ranks=2)
        loss = {}
        for name, base, options in (("base", None, ()), ("adapter", None, ("--adapter", self.trained)), ("merged", again, ())):
            changes = {} if base is None else {"base": base}
            done = support.qshard("eval", support.TINY_YAML, *support.settings(support.tiny(), "none", **changes), *options)
            loss[name] = float(done.stdout.split()[1])
        self.assertLess(abs(loss["merged"] - loss["adapter"]), 0.3 * abs(loss["base"] - loss["adapter"]), loss)

    def test_nothing_is_overwritten(self):
        done = support.qshard("merge", self.trained, "-o", self.merged, "--base", f"{support.tiny()}/base.h5", expect=2)
        self.assertIn("error[E204]", done.stderr)


if __name__ == "__main__":
    unittest.main()
