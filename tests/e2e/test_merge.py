"""A merged checkpoint is a checkpoint: its weights are base plus adapter, and it can be quantized and evaluated."""
import json
import os
import re
import shutil
import signal
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

    def test_the_tokenizer_of_another_model_is_left(self):
        """In the folder that the base was made from stands another model of one shape by now."""
        folder = support.scratch()
        model, base = os.path.join(folder, "model"), os.path.join(folder, "base.h5")
        shutil.copytree(os.path.join(support.tiny(), "model"), model)
        support.qshard("quantize", model, "-o", base, "--head-chunk-rows", "128")

        def merge(name, *options):
            done = support.qshard("merge", self.trained, "-o", os.path.join(folder, name), "--base", base, *options)
            return done.stderr, os.path.exists(os.path.join(folder, name, "tokenizer.json")), done.stdout

        said, copied, _ = merge("same")
        self.assertTrue(copied)
        self.assertNotIn("warning", said)
        with open(f"{model}/tokenizer.json", "a", encoding="utf-8") as file:
            file.write("\n")
        said, copied, printed = merge("other")
        self.assertFalse(copied or os.path.exists(f"{folder}/other/tokenizer_config.json"))
        self.assertIn(f"{model}: its tokenizer.json is not the one beside which the base was made, so it holds another model", said)
        self.assertIn("copy the tokenizer's files by hand", printed)
        said, copied, _ = merge("given", "--original", model)
        self.assertTrue(copied)
        self.assertIn("it is copied as it is", said)


def content(*names):
    """Of a file; None where there is none."""
    path = os.path.join(*names)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


def prepare(model, source, target, *options):
    support.python(os.path.join(support.PREP, "qshard_prep.py"), "--model", model, source, "-o", target, "--seq-len", "64",
                   *options)


class ChatTemplate(unittest.TestCase):
    """Whoever serves a model prompts it in the format that it was trained in."""

    OTHER = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}" \
            "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}{# \"é\" #}\n"

    @classmethod
    def setUpClass(cls):
        cls.folder = support.scratch()
        cls.model = os.path.join(support.tiny(), "model")
        cls.other = cls.path("other.jinja")
        with open(cls.other, "w", encoding="utf-8") as file:
            file.write(cls.OTHER)
        prepare(cls.model, f"{cls.model}/train.jsonl", cls.path("train.h5"), "--chat-template", cls.other)

    @classmethod
    def path(cls, name):
        return os.path.join(cls.folder, name)

    def config(self, folder):
        return content(folder, "tokenizer_config.json")

    def merge(self, source, name, *options):
        """What it printed, and the directory."""
        done = support.qshard("merge", source, "-o", self.path(name), "--base", f"{support.tiny()}/base.h5", *options)
        return done.stdout, self.path(name)

    def test_another_template_goes_where_the_model_goes(self):
        """Through a stop, a file that moved, and ranks; the evaluation's template, the model's own, is not taken."""
        run, adapter, moved = self.path("run"), self.path("adapter"), self.path("moved.h5")
        shutil.copy(self.path("train.h5"), self.path("first.h5"))
        how = {"train__steps": 4, "train__eval_every": 2}
        support.train(run, ranks=2, expect=75, data__train=self.path("first.h5"), train__max_time=0.001, **how)
        os.rename(self.path("first.h5"), moved)
        support.train(run, ranks=3, data__train=moved, **how)
        os.remove(moved)
        said = support.qshard("export", run, "-o", adapter).stdout
        self.assertRegex(said, r"(?m)^  template  chat_template.jinja: that of the training data")
        self.assertEqual(content(adapter, "chat_template.jinja"), self.OTHER)
        own = json.loads(self.config(self.model))
        self.assertNotEqual(own["chat_template"], self.OTHER)
        for source, name, options in ((run, "of-run", ()), (run, "of-original", ("--original", self.model)),
                                      (adapter, "of-adapter", ())):
            said, merged = self.merge(source, name, *options)
            self.assertEqual(len(re.findall(r"(?m)^  template .*not the model's own$", said)), 1, said)
            self.assertEqual(content(merged, "chat_template.jinja"), self.OTHER)
            self.assertEqual(json.loads(self.config(merged)), {**own, "chat_template": self.OTHER})
            self.assertEqual(content(merged, "tokenizer.json"), content(self.model, "tokenizer.json"))
        prepare(self.path("of-run"), f"{self.model}/train.jsonl", self.path("again.h5"))
        with open(self.path("again.h5"), "rb") as again, open(self.path("train.h5"), "rb") as first:
            self.assertEqual(again.read(), first.read())

    def test_the_models_own_template_and_none_change_nothing(self):
        import h5py
        shutil.copy(self.path("train.h5"), self.path("first.h5"))
        with h5py.File(self.path("first.h5"), "r+", libver=("v110", "v110")) as file:
            del file.attrs["chat_template"]  # a file from before it was kept
        with open(self.path("texts.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": f"{i} plus {i} is {2 * i}"}) + "\n" for i in range(16))
        prepare(self.model, self.path("texts.jsonl"), self.path("texts.h5"), "--chat-template", self.other)
        for name, data, own in (("own", f"{support.tiny()}/train.h5", True), ("first", self.path("first.h5"), False),
                                ("texts", self.path("texts.h5"), False)):
            support.train(self.path(name), data__train=data, train__steps=1)
            support.qshard("export", self.path(name), "-o", self.path(name + "-adapter"))
            kept = content(self.path(name + "-adapter"), "chat_template.jinja")
            self.assertEqual(kept, json.loads(self.config(self.model))["chat_template"] if own else None)
            said, merged = self.merge(self.path(name), name + "-merged")
            self.assertNotIn("  template", said)
            self.assertIsNone(content(merged, "chat_template.jinja"))
            self.assertEqual(self.config(merged), self.config(self.model))


class Originals(unittest.TestCase):
    def test_numbers_that_no_tensor_shows_are_compared(self):
        """The same weights under another number are another model."""
        windows = ["full_attention", "sliding_attention"] * 2  # as they are, on the layers that were without RoPE
        changes = {support.GRANITE: [{"embedding_multiplier": 6.0}, {"attention_multiplier": 0.5}, {"residual_multiplier": 1.0},
                                     {"logits_scaling": 8.0}],
                   support.SMOLLM3: [{"no_rope_layer_interval": 4, "layer_types": windows}, {"no_rope_layers": [1, 0, 1, 1]}]}
        for options, numbers in changes.items():
            base, folder = support.base_of(*options), support.scratch()
            model, original, run = os.path.join(os.path.dirname(base), "model"), f"{folder}/original", f"{folder}/run"
            support.train(run, base=base, train__steps=1, train__eval_every=0, data__eval="")
            shutil.copytree(model, original)
            config = json.loads(content(model, "config.json"))
            for number in numbers:
                with self.subTest(**number):
                    with open(f"{original}/config.json", "w", encoding="utf-8") as file:
                        json.dump({**config, **number}, file)
                    done = support.qshard("merge", run, "-o", f"{folder}/merged", "--base", base, "--original", original, expect=3)
                    self.assertIn("another number is not the base's", done.stderr)
            support.qshard("merge", run, "-o", f"{folder}/merged", "--base", base, "--original", model)


class EndOfTurn(unittest.TestCase):
    def test_a_sample_ends_where_generation_config_says(self):
        """Chat models name the token that ends a turn there alone. The first token that the model says is made one."""
        import h5py
        folder = support.scratch()
        model, prompts = os.path.join(folder, "model"), os.path.join(folder, "prompts.h5")
        shutil.copytree(os.path.join(support.tiny(), "model"), model)
        with open(f"{model}/eval.jsonl", encoding="utf-8") as lines, open(f"{folder}/one.jsonl", "w", encoding="utf-8") as one:
            one.write(next(lines))
        prepare(model, f"{folder}/one.jsonl", prompts, "--prompts")

        def said(name, tokens, ids=None):
            if ids is not None:
                with open(f"{model}/generation_config.json", "w", encoding="utf-8") as file:
                    json.dump({"eos_token_id": ids}, file)
            base = os.path.join(folder, name)
            support.qshard("quantize", model, "-o", base, "--head-chunk-rows", "128")
            texts = [support.qshard("sample", support.TINY_YAML, *support.settings(support.tiny(), "none", base=base),
                                    "--prompts", prompts, "--tokens", tokens, ranks=ranks).stdout for ranks in (None, 2)]
            self.assertEqual(texts[0], texts[1])
            return texts[0].split("--- continuation\n")[1].removesuffix("\n")

        first, more = said("plain.h5", 1), said("more.h5", 4)
        self.assertNotEqual(first, "")
        self.assertTrue(more.startswith(first) and more != first, (first, more))
        with h5py.File(prompts, "r") as file:
            offsets, raw = file["decode_offsets"][()], file["decode_bytes"][()].tobytes()
        ids = [i for i in range(len(offsets) - 1)
               if raw[offsets[i]:offsets[i + 1]].decode("utf-8", "backslashreplace") == first]
        self.assertTrue(0 < len(ids) < 16, first)
        self.assertEqual(said("end.h5", 4, [*ids, 0]), "")
        self.assertEqual(said("other.h5", 4, [i for i in range(20, 30) if i not in ids][:1]), more)
        self.assertEqual(said("none.h5", 4, "no id"), more)
        with open(f"{folder}/plain.h5", "rb") as plain, open(f"{folder}/none.h5", "rb") as none:
            self.assertEqual(plain.read(), none.read())

    def test_a_text_is_printed_when_it_ends(self):
        """The first of two ends at once; the other has far to go, and is not waited for."""
        import h5py
        folder = support.scratch()
        model, prompts = os.path.join(folder, "model"), os.path.join(folder, "prompts.h5")
        shutil.copytree(os.path.join(support.tiny(), "model"), model)
        base = os.path.join(support.tiny(), "base.h5")

        def words(base, tokens):
            return ("sample", support.TINY_YAML, *support.settings(support.tiny(), "none", base=base), "--prompts", prompts, "--tokens", tokens)

        def prompted(lines, base, tokens):
            with open(f"{folder}/some.jsonl", "w", encoding="utf-8") as some:
                some.writelines(lines)
            if os.path.exists(prompts):
                os.remove(prompts)
            prepare(model, f"{folder}/some.jsonl", prompts, "--prompts")
            texts = support.qshard(*words(base, tokens)).stdout.split("--- continuation\n")[1:]
            return [text.split("\n--- prompt")[0].removesuffix("\n") for text in texts]

        with open(f"{model}/eval.jsonl", encoding="utf-8") as file:
            lines = file.readlines()
        said = prompted(lines, base, 1)
        longer = prompted(lines, base, 40)
        first, other = next((a, b) for a in range(len(lines)) for b in range(len(lines)) if said[a] and said[a] not in longer[b])
        with h5py.File(prompts, "r") as file:
            offsets, raw = file["decode_offsets"][()], file["decode_bytes"][()].tobytes()
        ids = [i for i in range(len(offsets) - 1) if raw[offsets[i]:offsets[i + 1]].decode("utf-8", "backslashreplace") == said[first]]
        with open(f"{model}/generation_config.json", "w", encoding="utf-8") as file:
            json.dump({"eos_token_id": ids}, file)
        ends = os.path.join(folder, "ends.h5")
        support.qshard("quantize", model, "-o", ends, "--head-chunk-rows", "128")
        self.assertEqual(prompted([lines[first], lines[other]], ends, 2)[0], "")
        process = support.start(*words(ends, 1900), "--quiet")
        heard = ""
        while not heard.endswith("--- continuation\n\n"):
            line = process.stdout.readline()
            self.assertNotEqual(line, "", heard)
            heard += line
        os.killpg(process.pid, signal.SIGKILL)
        self.assertNotIn("--- prompt 2", heard + process.stdout.read())
        process.stdout.close()
        process.wait()


if __name__ == "__main__":
    unittest.main()
