"""Models of text and images: their text part is quantized and trained as if it were a model of its own, and the adapter is one of
the whole model. tests/oracle/text_part.py holds the same against transformers and peft."""
import json
import os
import re
import unittest

import support

MODELS = {"gemma3": support.GEMMA3, "mistral3": ("--arch", "mistral", "--untied", "--window", "9")}
PREFIX = {"whole": "base_model.model.model.language_model.layers.", "text": "base_model.model.model.layers."}


def content(*names):
    with open(os.path.join(*names), "rb") as file:
        return file.read()


def index_of(base):
    from base_reader import Base
    return Base(base).index


class TextPart(unittest.TestCase):
    def made(self, kind):
        """The folder of the text model with its base.h5, and for each spelling the wrapper's with its own."""
        text = os.path.dirname(support.base_of(*MODELS[kind]))
        folder = support.scratch()
        for spelling in support.SPELLINGS:
            support.wrapped(os.path.join(text, "model"), os.path.join(folder, spelling), spelling)
            done = support.qshard("quantize", os.path.join(folder, spelling), "-o", os.path.join(folder, spelling + ".h5"),
                                  "--head-chunk-rows", "128", ranks=2)
            self.assertEqual(done.stderr.count(f"the text part of {kind}, which alone is trained; 2 tensors of its other parts"), 1,
                             done.stderr)
        return text, folder

    def trained(self, base, output, **more):
        support.train(output, ranks=2, base=base, train__steps=3, **more)
        return support.curve(output)

    def exported(self, run, target):
        support.qshard("export", run, "-o", target)
        return support.read_safetensors(os.path.join(target, "adapter_model.safetensors"))

    def check(self, kind):
        text, folder = self.made(kind)
        inside, plain = os.path.join(folder, "hub"), os.path.join(text, "model")
        base, whole = os.path.join(text, "base.h5"), os.path.join(folder, "hub.h5")

        # the weights are those of the text model, in both spellings
        wanted = index_of(base)
        for spelling in support.SPELLINGS:
            got = index_of(os.path.join(folder, spelling + ".h5"))
            for key in ("units", "final", "hashes_sha256"):
                self.assertEqual(got[key], wanted[key], (spelling, key))
            self.assertEqual(got["source"]["sha256"], wanted["source"]["sha256"])
            self.assertEqual(got["config"], wanted["config"])
            self.assertEqual((got["part_of"], "part_of" in wanted), (kind, False))

        # so are the losses, and the adapter under the names of the whole model
        runs = {name: os.path.join(folder, "run-" + name) for name in ("text", "whole")}
        curves = [self.trained(path, runs[name]) for name, path in (("text", base), ("whole", whole))]
        self.assertEqual(*curves)
        adapters = {name: os.path.join(folder, "adapter-" + name) for name in runs}
        tensors = {name: self.exported(runs[name], adapters[name]) for name in runs}
        for name in runs:
            self.assertTrue(all(key.startswith(PREFIX[name]) for key in tensors[name]), list(tensors[name])[:3])
        renamed = {key.replace(PREFIX["whole"], PREFIX["text"]): value for key, value in tensors["whole"].items()}
        self.assertEqual(sorted(renamed), sorted(tensors["text"]))
        for key, value in tensors["text"].items():
            self.assertEqual(value.tobytes(), renamed[key].tobytes(), key)
        with open(os.path.join(adapters["whole"], "adapter_config.json"), encoding="utf-8") as file:
            pattern = re.compile(json.load(file)["target_modules"])
        self.assertTrue(pattern.fullmatch("model.language_model.layers.0.self_attn.q_proj"))
        self.assertFalse(pattern.fullmatch("model.vision_tower.encoder.layers.0.self_attn.q_proj"))
        self.assertIn(b"AutoModelForImageTextToText", content(adapters["whole"], "README.md"))

        # either adapter goes on over either base, and is merged into the same model of text
        losses = set()
        for path in (base, whole):
            for adapter in (*adapters.values(), *runs.values()):
                done = support.qshard("eval", support.TINY_YAML, *support.settings(support.tiny(), "none", base=path), "--adapter", adapter)
                losses.add(done.stdout.split()[1])
        self.assertEqual(len(losses), 1, losses)
        curves = [self.trained(path, os.path.join(folder, f"init-{i}"), lora__init=adapters[name])
                  for i, (path, name) in enumerate(((base, "text"), (base, "whole"), (whole, "text"), (whole, "whole")))]
        self.assertEqual(len(set(map(tuple, curves))), 1)
        merges = {"text": (runs["text"],), "whole": (runs["whole"],), "adapter": (adapters["whole"], "--base", whole),
                  "over-text": (runs["text"], "--original", plain), "over": (runs["whole"], "--original", inside)}
        for name, words in merges.items():
            support.qshard("merge", *words, "-o", os.path.join(folder, "merged-" + name))
        for name, other in (("text", "whole"), ("text", "adapter"), ("over-text", "over")):
            for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
                self.assertEqual(content(folder, "merged-" + name, file), content(folder, "merged-" + other, file), (other, file))
        for name in ("whole", "over"):
            merged = json.loads(content(folder, "merged-" + name, "config.json"))
            self.assertEqual(merged, json.loads(content(folder, "merged-text", "config.json")))

        # what looks at the folder says what it is, and reads it
        for words in (("inspect", inside), ("inspect", whole), ("plan", support.TINY_YAML, "--set", f"base={inside}")):
            self.assertIn(f", the text part of {kind}", support.qshard(*words).stdout, words)
        self.assertRegex(support.qshard("inspect", inside).stdout, rf"tensors +{len(support.read_safetensors(plain + '/model.safetensors'))}\n")

    def test_gemma3(self):
        self.check("gemma3")

    def test_mistral3(self):
        self.check("mistral3")

    def test_data_are_the_same(self):
        """The tokenizer's part: the vocabulary, the length and the end of a document are those of the text part."""
        text, folder = self.made("mistral3")
        files = []
        for model in (os.path.join(text, "model"), os.path.join(folder, "hub")):
            files.append(os.path.join(folder, f"data-{len(files)}.h5"))
            support.python(os.path.join(support.PREP, "qshard_prep.py"), "--model", model, os.path.join(text, "model", "train.jsonl"),
                           "-o", files[-1], "--seq-len", "64")
        self.assertEqual(content(files[0]), content(files[1]))

    def test_the_file_is_whole(self):
        """`check` reads the vision part, too, which is all NaN here."""
        _, folder = self.made("mistral3")
        done = support.qshard("check", os.path.join(folder, "hub"), expect=3)
        self.assertRegex(done.stderr, r'"(vision_tower|multi_modal_projector)\..*is not finite')


if __name__ == "__main__":
    unittest.main()
