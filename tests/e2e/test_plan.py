"""qshard plan: what it says of a run that is not there is what the run itself says, and does."""
import json
import os
import re
import shutil
import unittest

import support

EMULATED = os.path.join(os.path.dirname(support.QSHARD), "libqshard_emulated.so")
ROW = re.compile(r"^  (.+?) +(\d+\.\d)$", re.M)
WORKSPACE_MIB = 64.0  # of cuBLASLt, which the emulator has not
LLAMA_3_70B = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
               "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
               "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
               "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
# As published.
SMOLLM3_3B = {"architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 128012,
              "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008,
              "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
              "layer_types": ["full_attention"] * 36, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
              "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004,
              "pretraining_tp": 2, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
              "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0", "use_cache": False, "use_sliding_window": False,
              "vocab_size": 128256}
GRANITE_33_8B = {"architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
                 "attention_multiplier": 0.0078125, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
                 "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12800,
                 "logits_scaling": 16.0, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "granite",
                 "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0,
                 "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000000.0,
                 "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.49.0", "use_cache": True,
                 "vocab_size": 49159}


def tables(text):
    """{title: {class: MiB}} of a printed memory plan."""
    found = {}
    for part in re.split(r"(?=^(?:device |host )?memory of rank 0)", text, flags=re.M)[1:]:
        title, body = part.split("plan MiB", 1)
        rows = {}
        for line in body.splitlines()[1:]:
            match = ROW.match(line)
            if not match:
                break
            rows[match.group(1)] = float(match.group(2))
        found[title.strip()] = rows
    return found


def plan(*options, expect=0, **settings):
    return support.qshard("plan", support.TINY_YAML, *support.settings(support.tiny(), "unused", **settings), *options,
                          expect=expect)


class Memory(unittest.TestCase):
    """Class by class what `train --dry-run` prints, where both can be had."""

    def same(self, ranks, environment, options, workspace=0.0, **settings):
        settings = {"train__global_batch": 8, "cpu__threads": 1, **settings}
        folder = support.scratch()
        dry = support.train(os.path.join(folder, "run"), ranks=ranks, environment=environment,
                            options=("--dry-run", *(["--allow-shared-device"] if environment else [])), **settings)
        planned, real = tables(plan("--gpus", ranks, *options, **settings).stdout), tables(dry.stdout)
        self.assertEqual(sorted(planned), sorted(real))
        for title, rows in real.items():
            self.assertEqual(sorted(planned[title]), sorted(rows))
            for name, mib in rows.items():
                more = workspace if title.startswith("device") and name in ("scratch", "total") else 0.0
                self.assertAlmostEqual(planned[title][name], mib + more, delta=0.11, msg=f"{title}: {name}")

    def test_cpu(self):
        for ranks, more in ((1, {}), (3, {"train__recompute": "none"}), (4, {"shard__group": 2}),
                            (2, {"base": support.base_of(*support.GEMMA3)}),
                            (1, {"base": support.base_of(*support.PHI3), "train__recompute": "none"}),
                            (1, {"base": support.base_of(*support.OLMO3)}), (2, {"base": support.base_of(*support.SMOLLM3)}),
                            (1, {"base": support.base_of(*support.GRANITE)}),
                            (1, {"cpu__gemm": "strict"}), (2, {"cpu__gemm": "fp16"}), (1, {"cpu__gemm": "amx"})):
            with self.subTest(ranks=ranks, **more):
                self.same(ranks, None, (), device="cpu", **more)

    @unittest.skipUnless(os.path.exists(EMULATED), "libqshard_emulated.so is not built")
    def test_gpu(self):
        for ranks, more in ((1, {}), (2, {"train__recompute": "none", "lora__dropout": 0}),
                            (4, {"shard__group": 2}),  # two communicators of NCCL
                            (3, {"lora__dora": "true"}), (1, {"memory__keep_decoded": "auto"}),
                            (2, {"memory__keep_decoded": 1, "memory__offload": "[weights]"}), (2, {"memory__offload": "[activations, weights, embedding]"})):
            with self.subTest(ranks=ranks, **more):
                self.same(ranks, {"QSHARD_PLUGIN": EMULATED}, ("--gpu", "H100"), WORKSPACE_MIB, device="cuda", **more)


class Auto(unittest.TestCase):
    """What `auto` stands for is what fits: in a plan, a dry run and the run, with one reason."""

    SETTINGS = {"device": "cpu", "cpu__threads": 1, "train__global_batch": 8, "train__micro_batch": 1, "train__steps": 2,
                "train__recompute": "none", "lora__dropout": 0}

    def total(self, **more):
        return tables(plan("--gpus", 2, **{**self.SETTINGS, **more}).stdout)["memory of rank 0"]

    def test_micro_batches_a_pass(self):
        """Of four slots a rank, a limit between what passes of two and of four take leaves two."""
        totals = {group: self.total(train__gather_group=group)["total"] for group in (2, 4)}
        limit = int((totals[2] + totals[4]) / 2 * 2**20)
        folder, said, rows = support.scratch(), [], []
        settings = {**self.SETTINGS, "memory__device_limit": limit}
        planned = plan("--gpus", 2, **settings)
        dry = support.train(os.path.join(folder, "dry"), ranks=2, options=("--dry-run",), **settings)
        for done in (planned, dry, support.train(os.path.join(folder, "limited"), ranks=2, **settings)):
            said.append(re.findall(r"train\.gather_group: auto is 2: .*", done.stdout + done.stderr))
            rows.append(tables(done.stdout)["memory of rank 0"])
        self.assertEqual([len(lines) for lines in said], [1, 1, 1])
        self.assertEqual([lines[0] for lines in said], [said[0][0]] * 3)
        self.assertAlmostEqual(rows[0]["total"], totals[2], delta=0.01)
        self.assertEqual(rows[0], rows[1])
        support.train(os.path.join(folder, "free"), ranks=2, **self.SETTINGS)
        for output, group in (("limited", 2), ("free", 4)):
            for line in support.metrics(os.path.join(folder, output), "ranks.jsonl"):
                self.assertEqual((line["gather_group"], line["shard_group"]), (group, 2))
        self.assertEqual(support.curve(os.path.join(folder, "limited")), support.curve(os.path.join(folder, "free")))

    def test_a_number_stays(self):
        totals = {group: self.total(train__gather_group=group)["total"] for group in (2, 4)}
        limit = int((totals[2] + totals[4]) / 2 * 2**20)
        settings = {**self.SETTINGS, "memory__device_limit": limit, "train__gather_group": 4}
        self.assertNotIn("auto is", plan("--gpus", 2, expect=7, **settings).stdout)
        done = support.train(os.path.join(support.scratch(), "run"), ranks=2, options=("--dry-run",), expect=7, **settings)
        self.assertNotIn("auto is", done.stdout + done.stderr)

    def test_each_card_by_its_own_memory(self):
        """Llama-3-70B on four cards: one micro-batch a pass fits into 24 GiB, four into 48; with a residual stream in bf16, of which
        the plan says what it would save, two into 24."""
        folder = support.scratch()
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
            json.dump(LLAMA_3_70B, file)
        settings = {"base": folder, "data__train": "", "data__eval": "", "train__eval_every": 0, "train__seq_len": 2048,
                    "train__micro_batch": 1, "train__global_batch": 16, "lora__rank": 16, "lora__dropout": 0}
        for residual_fp32, groups in (("true", (1, 1, 4, 4)), ("false", (2, 2, 4, 4))):
            text = plan("--gpus", 4, train__residual_fp32=residual_fp32, **settings).stdout
            for name, group in zip(("RTX3090", "RTX4090", "A6000", "H100"), groups):
                self.assertRegex(text, rf"(?m)^{name} +[\d.]+ +[\d.]+ +{group} +yes ")
        said = plan("--gpu", "RTX4090", "--gpus", 4, **settings).stdout
        offer = re.search(r"with train.residual_fp32: false, losses further from fp32's: ([\d.]+) ms, ([\d.]+) GiB", said)
        taken = plan("--gpu", "RTX4090", "--gpus", 4, train__residual_fp32="false", **settings).stdout
        self.assertEqual((re.search(r"(?m)^  step +([\d.]+) ", taken)[1], re.search(r"a rank needs ([\d.]+) GiB", taken)[1]),
                         offer.groups())
        self.assertNotIn("with train.residual_fp32", taken)


    def test_what_decoded_layers_would_save(self):
        """What --gpu offers is what the setting then gives; nothing is offered where it is set, or where there is no room."""
        folder = support.scratch()
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
            json.dump(LLAMA_3_70B, file)
        settings = {"base": folder, "data__train": "", "data__eval": "", "train__eval_every": 0, "train__seq_len": 256,
                    "train__micro_batch": 1, "train__global_batch": 1, "lora__rank": 16, "lora__dropout": 0}
        step, needs = r"(?m)^  step +([\d.]+) ", r"(?m)^fits: a rank needs ([\d.]+) GiB"
        offered = plan("--gpu", "B200", **settings).stdout
        offer = re.search(r"with memory.keep_decoded: auto, (\d+) of 80 layers stay decoded: ([\d.]+) ms, ([\d.]+) GiB", offered)
        taken = plan("--gpu", "B200", memory__keep_decoded="auto", **settings).stdout
        self.assertEqual([re.search(part, taken)[1] for part in (r"memory.keep_decoded: auto is (\d+) of 80 layers: a", step, needs)],
                         list(offer.groups()))
        self.assertLess(float(offer[2]), 0.98 * float(re.search(step, offered)[1]))
        self.assertNotIn("with memory.keep_decoded", taken)
        limit = int((float(re.search(needs, offered)[1]) + 1) * 2**30)
        self.assertNotIn("keep_decoded", plan("--gpu", "B200", memory__device_limit=limit, **settings).stdout)


class Links(unittest.TestCase):
    def test_slow_links_are_printed_with_two_digits(self):
        for given, said in ((("450", "20"), "450 GB/s inside, 20 GB/s between nodes"), (("11", "0.11"), "11 GB/s inside, 0.11 GB/s between nodes"),
                            (("9.94", "1"), "9.9 GB/s inside, 1 GB/s between nodes")):
            words = [word for rate in given for word in ("--link", rate)]
            self.assertIn(f"16 x H100 (NVLink 4), 8 a node: {said}", plan("--gpu", "H100", "--gpus", "16", *words, expect=None).stdout)


class Forward(unittest.TestCase):
    """eval and sample are planned as training is: what they reach is what was planned, and what does not fit is not begun."""

    @classmethod
    def setUpClass(cls):
        cls.adapter = os.path.join(support.scratch(), "run")
        support.train(cls.adapter, train__steps=1)

    def forward(self, command, *options, ranks=None, expect=0, **more):
        more = {"device": "cpu", "cpu__threads": 1, "train__micro_batch": 2, "train__gather_group": 2, **more}
        ends = ("--prompts", os.path.join(support.tiny(), "eval.h5"), "--tokens", 3) if command == "sample" else ()
        return support.qshard(command, support.TINY_YAML, *support.settings(support.tiny(), "unused", **more), *ends, *options,
                              ranks=ranks, expect=expect)

    def total(self, done):
        """Bytes planned and reached, of rank 0 with --verbose."""
        return [int(number) for number in re.search(r"memory: total: (\d+) planned, (\d+) reached", done.stderr).groups()]

    def test_reached_and_refused(self):
        logits = os.path.join(support.scratch(), "logits.safetensors")
        for command, ranks, options in (("eval", None, ()), ("eval", 3, ()), ("eval", None, ("--dump-logits", logits)),
                                        ("eval", 2, ("--adapter", self.adapter)), ("sample", None, ("--adapter", self.adapter)),
                                        ("sample", 3, ())):
            with self.subTest(command=command, ranks=ranks, options=options):
                done = self.forward(command, *options, "--verbose", ranks=ranks)
                planned, reached = self.total(done)
                self.assertLessEqual(reached, planned)
                self.assertGreater(reached, planned - 0.1 * planned - 2**19)  # scratch that only a backward uses
                same = self.forward(command, *options, ranks=ranks, memory__device_limit=planned)
                self.assertEqual(same.stdout, done.stdout)
                refused = self.forward(command, *options, ranks=ranks, memory__device_limit=planned - 1, expect=7)
                self.assertEqual(refused.stderr.count("error["), 1, refused.stderr)
                self.assertIn(f"memory.device_limit is {planned - 1} bytes, a rank would need {planned}: ", refused.stderr)
                self.assertIn("--tokens" if command == "sample" else "train.micro_batch", refused.stderr)
                self.assertNotIn("recompute", refused.stderr)
                self.assertAlmostEqual(tables(refused.stdout)["memory of rank 0"]["total"], planned / 2**20, delta=0.06)
                self.assertNotIn("eval_loss", refused.stdout)

    def test_an_adapter_counts(self):
        without, with_it = (self.total(self.forward("eval", *options, "--verbose"))[0] for options in ((), ("--adapter", self.adapter)))
        weights = sum(len(blob.tobytes()) for blob in self.tensors())
        self.assertGreaterEqual(with_it - without, 2 * weights)  # as it was read, and as it computes

    def tensors(self):
        target = os.path.join(support.scratch(), "adapter")
        support.qshard("export", self.adapter, "-o", target)
        return support.read_safetensors(os.path.join(target, "adapter_model.safetensors")).values()

    def test_micro_batches_a_pass(self):
        """auto takes fewer where more do not fit; the loss stays."""
        three, four = (self.total(self.forward("eval", "--verbose", ranks=2, train__gather_group=group))[0] for group in (3, 4))
        free = self.forward("eval", ranks=2, train__gather_group="auto")
        tight = self.forward("eval", "--verbose", ranks=2, train__gather_group="auto", memory__device_limit=(three + four) // 2)
        self.assertIn("train.gather_group: auto is 3", tight.stderr)
        self.assertEqual(self.total(tight)[0], three)
        self.assertEqual(tight.stdout, free.stdout)


class Inputs(unittest.TestCase):
    """The run files that come with the program."""
    SHAPES = {"llama8b_24g": {**LLAMA_3_70B, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                              "num_attention_heads": 32}, "llama70b_2x24g": LLAMA_3_70B}

    def test_they_fit_where_they_say(self):
        for name, ranks, says in (("llama8b_24g", 1, "needs 9.2 GiB"), ("llama70b_2x24g", 2, "needs 18.9 GiB")):
            with self.subTest(name):
                folder = support.scratch()
                with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
                    json.dump(self.SHAPES[name], file)
                done = support.qshard("plan", os.path.join(support.ROOT, "inputs", name + ".yaml"), "--gpu", "RTX4090", "--gpus", ranks,
                                      "--set", f"base={folder}", cwd=folder)
                self.assertRegex(done.stdout, rf"(?m)^fits: a rank {says}")


class Work(unittest.TestCase):
    """The step that the forecast divides by a card's figures is the one that runs."""

    def counted(self, ranks, **settings):
        """(flops, gathered bytes) a step of the busiest rank: counted by a run of whole epochs, and planned."""
        output = os.path.join(support.scratch(), "run")
        settings = {"device": "cpu", "train__steps": 0, "train__epochs": 1, "train__micro_batch": 2,
                    "train__global_batch": 4, "data__eval": "", "train__save_every": 0, "train__eval_every": 0,
                    **settings}
        support.train(output, ranks=ranks, **settings)
        steps = len([line for line in support.metrics(output) if "loss" in line])
        lines = support.metrics(output, "ranks.jsonl")
        said = plan("--gpus", ranks or 1, "--gpu", "H100", **{**settings, "device": "auto"}).stdout
        self.assertRegex(said, rf"(?m)^the run's {steps} steps take [\d.]+ seconds, without evaluations")
        flops = sum(line["flops"] for line in lines) / len(lines) / steps
        gathered = max(line["gathered_bytes"] for line in lines) / steps
        return ((flops, float(re.search(r"\((\S+) TFLOP", said)[1]) * 1e12),
                (gathered, float(re.search(r"gather .* (\S+) GB received", said)[1]) * 1e9))

    def test_flops(self):
        """The means of lengths make up for each other over an epoch; what is left are the printed digits."""
        for recompute in ("none", "selective", "full"):
            for more in ({}, *({"base": support.base_of(*options)}
                               for options in (support.GEMMA3, support.PHI3, support.OLMO3, support.SMOLLM3))):
                with self.subTest(recompute=recompute, **more):
                    (ran, planned), _ = self.counted(None, train__recompute=recompute, **more)
                    self.assertAlmostEqual(planned / ran, 1, delta=1e-3)

    def test_gathered_bytes(self):
        """One pass of two micro-batches a rank, two passes of one, and two copies of the base. The first pass of a run gathers two
        layers more than those behind it: 1 % over these steps, and more with four buffers."""
        for ranks, more in ((2, {"train__gather_group": 2}), (2, {"train__gather_group": 1}), (4, {"shard__group": 2}),
                            (2, {"shard__prefetch": 3})):
            with self.subTest(ranks=ranks, **more):
                _, (ran, planned) = self.counted(ranks, train__micro_batch=1, **more)
                self.assertAlmostEqual(planned / ran, 1, delta=0.03 if "shard__prefetch" in more else 0.01)


class Answers(unittest.TestCase):
    def test_published_configurations(self):
        """Every key is taken; the base is what its weights are: half a byte, a 64th and a bit for scales; the table, tied, in bf16."""
        for config in (SMOLLM3_3B, GRANITE_33_8B):
            with self.subTest(config["model_type"]):
                folder = support.scratch()
                with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
                    json.dump(config, file)
                said = plan("--gpu", "H100", "--gpus", 1, base=folder, device="cuda").stdout
                hidden, kv = config["hidden_size"], config["num_key_value_heads"] / config["num_attention_heads"]
                layer = 2 * (1 + kv) * hidden**2 + 3 * hidden * config["intermediate_size"]
                weights = config["num_hidden_layers"] * layer * (1 / 2 + 1 / 64) + 2 * hidden * config["vocab_size"]
                shard = next(rows for title, rows in tables(said).items() if not title.startswith("host"))["base shard"]
                self.assertAlmostEqual(shard * 2**20 / weights, 1, delta=2e-3)

    def test_no_file_but_config_json(self):
        """Before anything is downloaded, quantized or prepared: a directory with config.json."""
        folder = support.scratch()
        shutil.copy(os.path.join(support.tiny(), "model", "config.json"), folder)
        done = plan("--gpu", "RTX 4090", base=folder, data__train="nowhere.h5")
        self.assertIn("nowhere.h5 is not there: sequences of 64 tokens", done.stdout)
        self.assertIn("fits: a rank needs", done.stdout)
        self.assertRegex(done.stdout, r"step +\d+\.\d +\d+ tokens/s")

    def test_a_line_for_every_kind(self):
        text = plan("--gpus", 4).stdout
        for name in ("RTX3090", "A6000", "L40S", "A100-40", "H200", "B200"):
            self.assertRegex(text, rf"(?m)^{name} .* yes +\d+\.\d +\d+$")

    def test_short_micro_batches_are_said_to_take_longer(self):
        for options in (("--gpus", 1), ("--gpu", "H100")):
            for tokens, micro, said in ((64, 1, "a micro-batch has 64 tokens"), (512, 2, None), (499, 2, "has 998 tokens")):
                text = plan(*options, data__train="", data__eval="", train__eval_every=0, train__seq_len=tokens,
                            train__micro_batch=micro).stdout
                self.assertEqual("longer than the forecast" in text, said is not None, text)
                self.assertIn(said or "", text)

    def test_does_not_fit(self):
        """Exit 7 with one line that says what to change, and the change is enough."""
        settings = {"train__seq_len": 4096, "train__micro_batch": 8, "train__recompute": "none", "lora__dropout": 0,
                    "data__train": "", "data__eval": "", "train__eval_every": 0, "memory__device_limit": "1500M"}
        done = plan("--gpu", "H100", expect=7, **settings)
        self.assertEqual(done.stderr.count("error["), 1, done.stderr)
        found = re.search(r"it fits with ([^\n]*?)(?:, or on \d+ ranks)?$", done.stderr, re.M)
        self.assertTrue(found, done.stderr)
        changes = dict(re.findall(r"([\w.]+): (\[[^]]*\]|\w+)", found[1]))
        self.assertIn("memory.device_limit", done.stderr)
        fits = plan("--gpu", "H100", **{**settings, **{key.replace(".", "__"): value for key, value in changes.items()}})
        self.assertIn("fits: a rank needs", fits.stdout)

    def test_nothing_makes_it_fit(self):
        """The way out is that of the limit which is in the way."""
        for options, settings, text in ((("--gpu", "H100"), {"memory__device_limit": 1000000}, "a larger memory.device_limit"),
                                        ((), {"memory__device_limit": 1000000, "device": "cpu"}, "a larger memory.device_limit"),
                                        (("--gpu", "RTX3090"), {"train__seq_len": 1048576}, "larger GPUs")):
            with self.subTest(options=options, settings=settings):
                done = plan(*options, expect=7, data__train="", data__eval="", train__eval_every=0, **settings)
                self.assertRegex(done.stderr, rf"no setting and no number of ranks makes it fit: .*, or take {text}$")

    def test_refused(self):
        for options, text in ((("--gpu", "V100"), "known are RTX3090"), (("--link", "fast"), "--link"),
                              (("--gpus", "0"), "--gpus"), (("--link", 1, "--link", 2, "--link", 3), "more than 2")):
            with self.subTest(options=options):
                done = plan(*options, expect=2)
                self.assertEqual(done.stderr.count("error["), 1, done.stderr)
                self.assertIn(text, done.stderr)

    def test_links(self):
        """Slower links never make a step faster, and one GPU has none."""
        def step(*options):
            return float(re.search(r"(?m)^  step +([\d.]+)", plan("--gpu", "H100", *options).stdout)[1])
        self.assertEqual(step("--link", "0.001"), step())
        times = [step("--gpus", 4, "--per-node", 2, "--link", link, "--link", link) for link in (100, 1, 0.01)]
        self.assertEqual(times, sorted(times))
        self.assertLess(times[0], times[2])


@unittest.skipUnless(os.path.exists(EMULATED), "libqshard_emulated.so is not built")
class Check(unittest.TestCase):
    """A run on a card that the table knows says at its end what the forecast would have been."""

    SMALL = {"device": "cuda", "train__steps": 3, "train__global_batch": 2, "train__micro_batch": 1,
             "train__save_every": 0, "train__eval_every": 0, "data__eval": ""}

    def run_on(self, name):
        environment = {"QSHARD_PLUGIN": EMULATED, "QSHARD_EMULATOR_NAME": name}
        return support.train(os.path.join(support.scratch(), "run"), environment=environment, **self.SMALL)

    def test_known_and_unknown(self):
        done = self.run_on("NVIDIA H200")
        said = done.stdout + done.stderr
        found = re.search(r"a step took [\d.]+ ms \(mean of 1\); forecast for H200: ([\d.]+) ms", said)
        self.assertTrue(found, said)
        planned = plan("--gpu", "H200", **self.SMALL).stdout
        self.assertEqual(found[1], re.search(r"(?m)^  step +([\d.]+)", planned)[1])
        other = self.run_on("NVIDIA H200 MIG 1g.18gb")
        self.assertNotIn("forecast", other.stdout + other.stderr)


if __name__ == "__main__":
    unittest.main()
