"""qshard-prep from the command line: what is in the token file, and what is refused."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc
import unittest
from unittest import mock

import h5py
import numpy as np
import xxhash
from support import BYTE, CHATML, END, HE, PREP, SPECIALS, FolderTest, byte_alphabet, ids, make_model, prep, tool

from qprep.parts import split_off
from qprep.tokenfile import IGNORED, arrange
from qprep.tokens import Documents

def talk(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


class Prep(FolderTest):
    def setUp(self):
        super().setUp()
        self.model = make_model(self.folder)

    def learned(self, data):
        """Texts of the runs of learned labels."""
        labels, offsets, raw = data["labels"], data["decode_offsets"], data["decode_bytes"]
        runs = np.split(np.arange(len(labels)), np.flatnonzero(np.diff((labels != IGNORED).astype(int))) + 1)
        return [b"".join(raw[offsets[t]:offsets[t + 1]].tobytes() for t in labels[run]).decode("utf-8", "replace")
                for run in runs if labels[run[0]] != IGNORED]

    def test_a_python_without_the_packages_is_named(self):
        for name in ("qshard_prep.py", "qshard_gguf.py", "qshard_tiny.py", "plot_loss.py"):
            result = subprocess.run([sys.executable, "-S", os.path.join(PREP, name), "--help"], capture_output=True, text=True,
                                    check=False)
            self.assert_one_error(result, 8, sys.executable, "requirements.txt")

    # --- contents

    def test_messages_learn_the_assistants_turn_and_its_end(self):
        self.prep([talk("Hi there", "Hey, the end"), talk("2", "é日")])
        data, attributes = self.load()
        self.assertEqual(self.learned(data), ["Hey, the end<|im_end|>", "é日<|im_end|>"])
        want = [1] + ids("user\nHi there") + [END] + ids("\n") + [1] + ids("assistant\nHey, the end") + [END] + ids("\n")
        self.assertEqual(data["tokens"][:len(want)].tolist(), want)
        self.assertEqual(attributes["n_targets"], data["seq_targets"].sum())
        self.assertEqual(data["seq_targets"].tolist(), [len(ids("Hey, the end")) + 1, len("é日".encode()) + 1])

    def test_alpaca_learns_the_output_and_the_end_of_text(self):
        self.prep([{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Say", "output": "the"}])
        data, attributes = self.load()
        self.assertEqual(self.learned(data), ["3<|im_end|>", "the<|im_end|>"])
        text = self.decode(data, 0)
        self.assertIn("paired with an input", text)
        self.assertTrue(text.endswith("### Input:\n1 2\n\n### Response:3<|im_end|>"), text)
        self.assertNotIn("### Input", self.decode(data, 1))
        self.assertEqual(attributes["template_sha256"], "")
        self.assertNotIn("chat_template", attributes)

    def test_text_learns_all_but_the_first_token(self):
        self.prep([{"text": "the"}, {"text": "cat"}])
        data, _ = self.load()
        self.assertEqual(data["tokens"].tolist(), ids("the") + [END] + ids("cat") + [END])
        self.assertEqual(data["labels"].tolist(), [IGNORED, HE, END, IGNORED, *ids("at"), END])
        self.assertEqual(data["seq_targets"].tolist(), [2, 3])

    def decode(self, data, s):
        offsets, raw = data["decode_offsets"], data["decode_bytes"]
        tokens = data["tokens"][data["seq_offsets"][s]:data["seq_offsets"][s + 1]]
        return b"".join(raw[offsets[t]:offsets[t + 1]].tobytes() for t in tokens).decode("utf-8")

    def test_white_space_of_an_answer_is_learned(self):
        self.prep([{"instruction": "a", "output": " \n b \n  "}])
        self.assertEqual(self.learned(self.load()[0]), [" \n b \n  <|im_end|>"])

    def test_a_token_over_the_border_of_an_answer_is_not_learned_and_counted(self):
        template = self.write("t.jinja", "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
                              "{{ m.content }}{% endgeneration %}e{% else %}{{ m.content }}{% endif %}{% endfor %}")
        result = self.prep([talk("oh", "exh")], "--chat-template", template)  # o he x he
        data, _ = self.load()
        self.assertEqual(data["tokens"].tolist(), ids("ohexhe"))
        self.assertEqual(self.learned(data), ["x"])
        self.assertIn("2 straddling", result.stdout)

    def test_most_documents_straddling_is_warned_of_with_its_cause(self):
        bad, good = {"prompt": "h", "completion": "ex"}, {"prompt": "o", "completion": "ex"}
        for records, warned in (([bad, bad, good], "2 of 3 documents"), ([bad, good], ""), ([good], "")):
            for jobs in ("1", "2"):
                result = self.prep(records, "--overwrite", "--jobs", jobs)
                self.assertEqual(result.stderr.startswith(f"warning: in {warned}") if warned else result.stderr == "", True,
                                 result.stderr)
                self.assertIn("ends in a space" if warned else "", result.stderr)
        # two tokens of one document are one document
        template = self.write("t.jinja", "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
                              "{{ m.content }}{% endgeneration %}e{% else %}{{ m.content }}{% endif %}{% endfor %}")
        result = self.prep([talk("oh", "exh"), talk("o", "x"), talk("o", "x")], "--chat-template", template, "--overwrite")
        self.assertIn("2 straddling", result.stdout)
        self.assertEqual(result.stderr, "")

    def change_tokenizer(self, **changes):
        with open(self.path("tokenizer.json"), encoding="utf-8") as file:
            tokenizer = {**json.load(file), **changes}
        self.write("tokenizer.json", json.dumps(tokenizer))

    def test_the_tokenizers_own_first_token_stands_before_text_but_not_before_a_template(self):
        bos = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        self.change_tokenizer(post_processor={"type": "TemplateProcessing", "single": single, "pair": single + [
            {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"<|endoftext|>": bos}})
        self.prep([{"text": "the"}])
        self.assertEqual(self.load()[0]["tokens"].tolist(), [0] + ids("the") + [END])
        self.assertEqual(self.load()[0]["seq_targets"].tolist(), [3])
        self.prep([{"instruction": "a", "output": "b"}], "--overwrite")
        self.assertEqual(self.load()[0]["tokens"][0], 0)
        self.assertEqual(self.learned(self.load()[0]), ["b<|im_end|>"])
        self.prep([talk("a", "b")], "--overwrite")
        self.assertEqual(self.load()[0]["tokens"][:2].tolist(), [1, BYTE + ord("u")])
        for records in ([{"text": "<|endoftext|>the"}, {"text": "the"}, {"text": "<|endoftext|>"}],  # text that begins with it
                        [{"prompt": "<|endoftext|>", "completion": "the"}, {"prompt": "", "completion": "the"}]):
            self.prep(records, "--overwrite")
            self.assertEqual(self.documents()[:2], ["<|endoftext|>⟦the<|im_end|>⟧"] * 2)
        self.prep([{"text": "<|endoftext|><|endoftext|>a"}, {"text": ""}, {"text": "b<|endoftext|>"}], "--overwrite")
        self.assertEqual(self.documents(), ["<|endoftext|>⟦<|endoftext|>a<|im_end|>⟧", "<|endoftext|>⟦<|im_end|>⟧",
                                            "<|endoftext|>⟦b<|endoftext|><|im_end|>⟧"])
        self.prep([{"text": "the"}, {"text": ""}], "--eos", "never", "--overwrite")
        self.assertEqual(self.documents(), ["<|endoftext|>⟦the⟧"])

    def test_a_sentencepiece_like_tokenizer_decodes_to_the_same_bytes(self):
        tokens = SPECIALS + ["<unk>"] + [f"<0x{b:02X}>" for b in range(256)] + ["\u2581", "a", "b", "\u2581a"]
        self.change_tokenizer(
            pre_tokenizer=None, normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            decoder={"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}]},
            model={"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                   "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
                   "vocab": {token: i for i, token in enumerate(tokens)}, "merges": ["\u2581 a"]})
        self.prep([{"text": "b a é"}, {"text": "a"}])
        data, _ = self.load()
        self.assertEqual([self.decode(data, s) for s in range(2)], ["b a é<|im_end|>", "a<|im_end|>"])
        self.assertIn(len(tokens) - 1, data["tokens"].tolist())

    def test_an_unknown_decoder_is_refused(self):
        self.change_tokenizer(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
        self.assert_one_error(self.prep([{"text": "the"}], expect=None), 3, "WordPiece")

    def test_the_decode_table_gives_back_every_text(self):
        texts = ["plain", "Größe 東京 👍🏽 \t\n  x", "<|endoftext|>", "\x01\x7f\x80\xad\u00a0"]
        self.prep([{"text": text} for text in texts])
        data, attributes = self.load()
        self.assertEqual([self.decode(data, s) for s in range(4)], [text + "<|im_end|>" for text in texts])
        self.assertEqual(attributes["vocab_size"], len(SPECIALS) + 256 + 1)
        self.assertEqual(len(data["decode_offsets"]), attributes["vocab_size"] + 1)

    def test_the_file_is_what_the_format_says(self):
        self.prep([talk("a", "b")] * 3, "--seq-len", "64")
        data, attributes = self.load()
        types = {name: (values.dtype.str, values.ndim) for name, values in data.items()}
        self.assertEqual(types, {"tokens": ("<u4", 1), "labels": ("<i4", 1), "seq_offsets": ("<i8", 1),
                                 "doc_offsets": ("<i8", 1), "seq_targets": ("<u4", 1), "decode_offsets": ("<i8", 1),
                                 "decode_bytes": ("|u1", 1)})
        with open(self.path("tokenizer.json"), "rb") as file:
            tokenizer = hashlib.sha256(file.read()).hexdigest()
        self.assertEqual(attributes, {
            "format": "qshard-data", "format_version": 1, "vocab_size": 260, "seq_len": 64, "packed": 0,
            "n_sequences": 3, "n_tokens": len(data["tokens"]), "n_targets": 6, "tokenizer_sha256": tokenizer,
            "template_sha256": hashlib.sha256(CHATML.encode()).hexdigest(), "chat_template": CHATML,
            "source": "data.jsonl",
            "tokens_xxh3": xxhash.xxh3_128_hexdigest(data["tokens"].tobytes()),
            "labels_xxh3": xxhash.xxh3_128_hexdigest(data["labels"].tobytes()),
            "layout_xxh3": xxhash.xxh3_128_hexdigest(attributes["labels_xxh3"].encode() + data["seq_offsets"].tobytes() +
                                                     data["doc_offsets"].tobytes())})
        with h5py.File(self.path("out.h5"), "r") as file:
            for name in data:
                self.assertIsNone(file[name].chunks)
                self.assertIsNotNone(file[name].id.get_offset(), f"{name} is not contiguous")
                self.assertEqual(file[name].id.get_create_plist().get_alloc_time(), h5py.h5d.ALLOC_TIME_EARLY)
            kind = file.attrs.get_id("format").get_type()
            self.assertFalse(kind.is_variable_str())
            self.assertEqual(file.attrs.get_id("n_tokens").get_type(), h5py.h5t.STD_I64LE)

    def test_the_same_input_gives_the_same_bytes(self):
        self.prep([talk("a", "b")] * 20, "--pack")
        with open(self.path("out.h5"), "rb") as file:
            first = file.read()
        self.prep([talk("a", "b")] * 20, "--pack", "--overwrite")
        with open(self.path("out.h5"), "rb") as file:
            self.assertEqual(first, file.read())

    # --- lengths

    def test_packing_is_greedy_in_order_and_keeps_document_borders(self):
        lengths = [3, 6, 5, 9, 2, 2, 10]  # of "a" * n and the end token: 4 + 7 fill a sequence, 6, 10, 3 + 3, 11
        self.prep([{"text": "a" * n} for n in lengths], "--pack", "--seq-len", "11")
        data, attributes = self.load()
        self.assertEqual(np.diff(data["doc_offsets"]).tolist(), [n + 1 for n in lengths])
        self.assertEqual(np.diff(data["seq_offsets"]).tolist(), [11, 6, 10, 6, 11])
        self.assertTrue(set(data["seq_offsets"]) <= set(data["doc_offsets"]))
        self.assertEqual(data["seq_targets"].tolist(), [9, 5, 9, 4, 10])
        self.assertEqual(attributes["packed"], 1)

    def test_long_documents_are_cut_dropped_or_split_as_asked(self):
        records = [{"text": "abcdefgh"}, {"text": "x"}]
        for choice, want in (("truncate", [5, 2]), ("drop", [2]), ("split", [5, 4, 2])):
            result = self.prep(records, "--seq-len", "5", "--long", choice, "--overwrite")
            data, _ = self.load()
            self.assertEqual(np.diff(data["seq_offsets"]).tolist(), want)
            self.assertRegex(result.stdout, {"truncate": "1 truncated", "drop": "1 dropped, too long",
                                             "split": "1 split"}[choice])

    def test_what_has_lost_its_answer_is_dropped_and_counted(self):
        result = self.prep([talk("q" * 100, "late"), talk("q", "a")], "--seq-len", "60")
        self.assertIn("1 dropped, nothing to learn", result.stdout)
        self.assertEqual(self.load()[1]["n_sequences"], 1)

    def test_longer_sequences_than_the_model_knows_are_refused(self):
        self.assert_one_error(self.prep([talk("a", "b")], "--seq-len", "5000", expect=None), 2, "4096 positions")

    # --- held-out part

    def test_the_held_out_part_is_disjoint_complete_and_decided_by_the_seed(self):
        records = [{"text": f"{i:03d}"} for i in range(100)]
        data = self.write_records("d.jsonl", records)
        held = {}
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            result = prep("--model", self.model, data, "-o", self.path(f"{name}.h5"), "--eval-out",
                          self.path(f"{name}e.h5"), "--eval-fraction", "0.1", "--seed", seed)
            self.assertEqual(result.returncode, 0, result.stderr)
            train, test = self.load(f"{name}.h5")[0], self.load(f"{name}e.h5")[0]
            texts = [self.decode(test, s) for s in range(10)]
            both = texts + [self.decode(train, s) for s in range(90)]
            self.assertEqual(sorted(both), [f"{i:03d}<|im_end|>" for i in range(100)])
            self.assertEqual(texts, sorted(texts))
            held[name] = texts
        self.assertEqual(held["a"], held["b"])
        self.assertNotEqual(held["a"], held["c"])

    # --- prompts and preview

    def test_prompts_are_open_for_an_answer_and_learn_nothing(self):
        self.prep([talk("Hi", "not this"), {"messages": [{"role": "user", "content": "q"}]}], "--prompts")
        data, attributes = self.load()
        self.assertEqual(attributes["n_targets"], 0)
        self.assertTrue((data["labels"] == IGNORED).all())
        self.assertEqual(self.decode(data, 0), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        self.assertEqual(self.decode(data, 1), "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")

    def test_prompts_that_are_too_long_are_left_out_whole(self):
        records = [{"text": "abcdef"}, {"text": "the"}]
        result = self.prep(records, "--prompts", "--seq-len", "4")
        self.assertEqual(self.load()[0]["tokens"].tolist(), ids("the"))
        self.assertIn("1 dropped, too long", result.stdout)
        result = self.prep(records, "--prompts", "--seq-len", "2", "--overwrite", "--on-bad-record=skip", expect=None)
        self.assertEqual(result.returncode, 0)
        result = self.prep(records[:1], "--prompts", "--seq-len", "2", "--overwrite", expect=None)
        self.assert_one_error(result, 3, "every prompt is empty or longer")

    def test_preview_sets_what_is_not_learned_apart(self):
        data = self.write_records("d.jsonl", [talk("Hi\x1b[2J", "Hey")])
        result = tool("qshard_prep.py", "--model", self.model, data, "--preview", "1")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("⟦<|im_start|>user\nHi\\x1b[2J<|im_end|>\n<|im_start|>assistant\n⟧Hey<|im_end|>⟦\n⟧", result.stdout)
        self.assertEqual(sorted(os.listdir(self.folder)),
                         ["config.json", "d.jsonl", "tokenizer.json", "tokenizer_config.json"])

    def test_holding_out_and_laying_out_take_few_bytes_a_token(self):
        count, length = 5000, 100
        tokens = np.arange(count * length, dtype="<u4")
        documents = Documents(tokens, np.ones(len(tokens), bool), np.full(count, length), np.arange(count))
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        arrange(split_off(documents, 0.02, 42)[0], 512)
        # 5 of the part that is kept and 5 of its labels and mask; numbers of tokens would be 8 and more
        self.assertLess(tracemalloc.get_traced_memory()[1] / len(tokens), 16)

    # --- refusals

    def assert_nothing_written(self):
        self.assertEqual([name for name in os.listdir(self.folder) if "out" in name or "tmp" in name], [])

    def test_data_that_would_train_nothing_is_refused_with_the_reason(self):
        only_user = {"messages": [{"role": "user", "content": "q"}]}
        self.assert_one_error(self.prep([only_user], expect=None), 3, "no record has an assistant message")
        marked = {"messages": [*only_user["messages"], {"role": "assistant", "content": "a", "weight": 0}]}
        self.assert_one_error(self.prep([marked], expect=None), 3, '"weight": 0')
        masked = {"input_ids": [5, 6], "labels": [-100, -100]}
        self.assert_one_error(self.prep([masked], expect=None), 3, "labels and masks allow no token")
        self.assert_one_error(self.prep([{"text": ""}], expect=None), 3, "the texts are empty")
        self.assert_one_error(self.prep([{"prompt": "q", "completion": ""}], "--eos", "never", expect=None), 3, "the answers are empty")
        self.assert_one_error(self.prep([talk("q" * 99, "a")], "--seq-len", "50", expect=None), 3, "--seq-len=50")
        self.assert_one_error(self.prep(self.write("e.jsonl", "\n\n"), expect=None), 3, "no usable record in 2 lines")
        self.assert_one_error(self.prep(self.write("z.jsonl", ""), expect=None), 3, "no usable record in 0 lines")

    def test_an_unknown_option_names_one_that_is_near(self):
        for given, meant in (("--max_seq_len", "--seq-len"), ("--packing", "--pack"), ("--train_on_input=1", "--train-on-inputs")):
            self.assert_one_error(self.prep([talk("a", "b")], given, expect=None), 2, f'did you mean "{meant}"?')
        self.assert_one_error(self.prep([talk("a", "b")], "--xyz", expect=None), 2, "unrecognized arguments: --xyz; see qshard-prep --help")
        self.assert_nothing_written()

    def test_a_bad_record_stops_with_its_line_or_is_skipped_and_counted(self):
        path = self.write("b.jsonl", '{"text": "ok"}\n{"text": 1}\n{"text": "ok"}\n')
        self.assert_one_error(self.prep(path, expect=None), 3, "b.jsonl:2:", "--on-bad-record=skip")
        self.assert_nothing_written()
        result = self.prep(path, "--on-bad-record=skip")
        self.assertIn("2 records of 3 lines (0 empty, 1 bad skipped)", result.stdout)

    def test_an_existing_output_is_kept(self):
        self.write("out.h5", "mine")
        self.assert_one_error(self.prep([talk("a", "b")], expect=None), 2, "out.h5", "--overwrite")
        with open(self.path("out.h5"), "rb") as file:
            self.assertEqual(file.read(), b"mine")

    def test_a_pipe_as_output_is_refused_even_with_overwrite(self):
        os.mkfifo(self.path("pipe"))
        os.symlink(self.path("pipe"), self.path("link"))
        for name in ("pipe", "link"):
            before = os.lstat(self.path(name)).st_ino
            result = prep("--model", self.model, self.write_records("d.jsonl", [talk("a", "b")]), "-o", self.path(name),
                          "--overwrite")
            self.assert_one_error(result, 2, name, "is a device or a pipe")
            metrics = self.write_records("m.jsonl", [{"step": 1, "loss": 2.0}])
            self.assert_one_error(tool("plot_loss.py", metrics, "-o", self.path(name)), 2, name, "is a device or a pipe")
            self.assertEqual(os.lstat(self.path(name)).st_ino, before)

    def test_input_as_output_is_refused_even_with_overwrite(self):
        path = self.write_records("out.h5", [talk("a", "b")])
        self.assert_one_error(self.prep(path, "--overwrite", expect=None), 2, "both input and output")

    def test_wrong_usage_is_one_line_and_code_2(self):
        for options in (["--frmat", "text"], ["--seq-len", "many"], ["--seq-len", "1"], ["--eval-fraction", "0.5"],
                        ["--eval-out", "e.h5"], ["--prompts", "--pack"], ["--format", "csv"], ["--train-roles", "human"], ["--turns", "some"],
                        ["--template-arg", "x"], ["--template-arg", "messages=1"], ["--samples", "0"], ["--jobs", "-1"],
                        ["--format", "fsdp_qlora:dummy"], ["--train-on-inputs", "--turns", "all"], ["--seed", "-1"],
                        ["--format", "text", "--turns", "all"], ["--format", "text", "--train-roles", "user"],
                        ["--chat"], ["--samples", "3"], ["--long", "split"], ["--prompts", "--eos", "never"]):
            self.assert_one_error(self.prep([talk("a", "b")], *options, expect=None), 2)
        self.assert_nothing_written()

    def test_a_full_disk_is_code_4_and_leaves_nothing(self):
        """Full within the tokens, and within the small arrays behind them, which HDF5 would write when it lets go of them."""
        disk = self.path("disk")
        os.mkdir(disk)
        data = self.write_records("d.jsonl", [{"text": "x" * 200}] * 500)  # of 785 KiB and 16 KiB
        for size, *more in (("64k",), ("300k",), ("788k",), ("792k",), ("796k",), ("804k", "--eval-out", os.path.join(disk, "eval.h5"),
                                                                            "--eval-fraction", "0.2")):
            with self.subTest(size=size):
                mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True, check=False)
                if mounted.returncode:
                    self.skipTest("a tmpfs cannot be mounted here: " + mounted.stderr.decode().strip())
                try:
                    result = tool("qshard_prep.py", "--model", self.model, data, "-o", os.path.join(disk, "out.h5"), *more)
                    self.assert_one_error(result, 4, "error[E401]", ".h5: cannot write: No space left on device; free some space or "
                                          "raise the quota")
                    self.assertEqual(os.listdir(disk), [])
                finally:
                    subprocess.run(["umount", disk], check=False)

    def test_a_disk_that_changes_a_bit_is_found_before_the_file_has_its_name(self):
        """Whichever write it is of: what the file holds, and what it says of itself, is as if nothing had been, or there is none."""
        from qprep.tokenfile import Output

        def held():
            with h5py.File(self.path("out.h5"), "r") as file:
                return {**{name: file[name][()].tobytes() for name in file}, **{name: str(value) for name, value in file.attrs.items()}}

        self.prep([talk("a", "b")])
        whole, write, found, number = held(), Output.write_all, [], 0

        def flip(output, data):
            count[0] += 1
            if count[0] == number:
                data = bytearray(data)
                data[len(data) // 2] ^= 4
            write(output, data)

        while not number or count[0] >= number:
            os.remove(self.path("out.h5"))
            number, count = number + 1, [0]
            with mock.patch.object(Output, "write_all", flip):
                result = self.prep([talk("a", "b")], expect=None)
            if result.returncode:
                self.assert_one_error(result, 4, "error[E402]", "out.h5: reads back differently from what was written; check the disk")
                self.assert_nothing_written()
                found.append(number)
                self.prep([talk("a", "b")])
            self.assertEqual(held(), whole, number)
        self.assertGreater(len(found), 10)

    def test_a_signal_while_hdf5_writes_is_one_line_and_leaves_nothing(self):
        from qprep.tokenfile import Output

        write, sent = Output.write_all, []

        def signalled(output, data):
            write(output, data)
            if not sent:
                sent.append(True)
                os.kill(os.getpid(), signal.SIGTERM)

        with mock.patch.object(Output, "write_all", signalled):
            result = self.prep([talk("a", "b")], expect=143)
        self.assertEqual((sent, result.stderr.count("\n")), ([True], 1))
        self.assert_nothing_written()

    def test_a_stopped_run_removes_what_it_has_begun(self):
        from qprep.tokenfile import write_token_file

        self.addCleanup(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_DFL))  # nohup ctest
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            with self.subTest(signal=number.name):
                found = []

                def write_and_stop(path, *arguments):
                    write_token_file(path, *arguments)
                    found.append(os.path.exists(path))
                    os.kill(os.getpid(), number)

                with mock.patch("qshard_prep.write_token_file", write_and_stop):
                    result = self.prep([talk("a", "b")], expect=code)
                self.assertEqual(found, [True])
                self.assertRegex(result.stderr, r"\Astopped by [^\n]*\n\Z")
                self.assert_nothing_written()
        self.assertEqual(signal.getsignal(signal.SIGTERM), signal.SIG_DFL)

    def start_two(self):
        """qshard-prep at work with two processes, in a group of its own as from a terminal, and their pids."""
        data = self.write_records("many.jsonl", [{"text": "the " * 50}] * 20_000)
        started = subprocess.Popen(
            [sys.executable, os.path.join(PREP, "qshard_prep.py"), "--model", self.model, data, "-o", self.path("out.h5"),
             "--jobs", "2", "--overwrite"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        workers = []
        while len(workers) < 2 and started.poll() is None:
            found = subprocess.run(["pgrep", "-f", "-P", str(started.pid), "spawn_main"], capture_output=True, check=False)
            workers = [int(pid) for pid in found.stdout.split()]
        return started, workers

    def end_of(self, started):
        try:
            return started.communicate(timeout=60)[1]
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            return self.fail(f"it did not end: {started.communicate()}")

    def test_several_processes_stop_together(self):
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with self.subTest(signal=number.name):
                started, _ = self.start_two()
                os.killpg(started.pid, number)
                said = self.end_of(started)
                self.assertEqual(started.returncode, code, said)
                self.assertRegex(said, r"\Astopped by [^\n]*\n\Z")
                self.assert_nothing_written()

    def test_a_killed_run_leaves_no_process(self):
        started, workers = self.start_two()
        started.kill()
        self.end_of(started)  # only once nobody holds its output open any more
        self.assertEqual([pid for pid in workers if os.path.exists(f"/proc/{pid}/exe")], [])

    def test_a_missing_output_folder_is_code_4(self):
        data = self.write_records("d.jsonl", [talk("a", "b")])
        result = tool("qshard_prep.py", "--model", self.model, data, "-o", self.path("no/out.h5"))
        self.assert_one_error(result, 4, "does not exist")

    def test_a_tokenizer_of_a_larger_model_is_refused(self):
        make_model(self.folder, vocab_size=259)
        self.assert_one_error(self.prep([talk("a", "b")], expect=None), 3, "largest token id is 259")

    def test_added_tokens_that_the_model_does_not_reach_are_refused_in_the_data_alone(self):
        """Gemma 3's models of texts have such a token for images."""
        make_model(self.folder, vocab_size=260)
        with open(self.path("tokenizer.json"), encoding="utf-8") as file:
            tokenizer = json.load(file)
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 260, "content": "<image>"})
        self.write("tokenizer.json", json.dumps(tokenizer))
        good, bad = {"text": "the"}, {"text": "an <image>"}
        self.prep([good])
        data, attributes = self.load()
        self.assertEqual((attributes["vocab_size"], len(data["decode_offsets"])), (260, 261))
        for record, words in ((bad, ['the text holds "<image>"', "token 260", "vocab_size is 260"]),
                              (talk("q", "<image>"), ['"<image>"']), (talk("<image>", "a"), ['"<image>"']),
                              ({"input_ids": [5, 260]}, ['input_ids[1] holds "<image>"']),
                              ({"input_ids": [5, 261]}, ["input_ids[1] is \"261\", must be 0..259"])):
            self.assert_one_error(self.prep([record], "--overwrite", expect=None), 3, "data.jsonl:1:", *words)
        result = self.prep([good, bad, good], "--overwrite", "--on-bad-record=skip")
        self.assertIn("2 records of 3 lines (0 empty, 1 bad skipped)", result.stdout)
        # the model has no use for it as an end either, and a normalizer may make it of other words
        self.write("tokenizer_config.json", json.dumps({"eos_token": "<image>"}))
        self.assert_one_error(self.prep([good], "--overwrite", expect=None), 3, "names no eos_token")
        tokenizer["added_tokens"][-1].update(normalized=True, special=False)
        self.write("tokenizer.json", json.dumps({**tokenizer, "normalizer": {"type": "Lowercase"}}))
        result = self.prep([{"text": "an <IMAGE>"}], "--overwrite", "--eos", "never", expect=None)
        self.assert_one_error(result, 3, "tokenizer.json: makes the token 260")

    def test_of_a_model_of_text_and_images_the_text_part_counts(self):
        """What text_config leaves out is the default of its class; the id that ends a text stands beside it."""
        def model(kind, text, **outer):
            make_model(self.folder)
            self.write("config.json", json.dumps({"model_type": kind, "text_config": text, **outer}))

        record = [{"text": "the"}]
        for kind, text, words in (("gemma3", {}, None), ("gemma3", {"vocab_size": None}, None), ("mistral3", {"vocab_size": 260}, None),
                                  ("gemma3", {"vocab_size": 259}, ["largest token id is 259", "vocab_size is 259"]),
                                  ("gemma3", {"max_position_embeddings": 64}, ["knows 64 positions"]),
                                  ("llava", {"vocab_size": 260}, ["vocab_size=None"]), ("gemma3", 7, ["vocab_size=None"]),
                                  (["gemma3"], {"vocab_size": 260}, ["vocab_size=None"])):
            with self.subTest(kind=kind, text=text):
                model(kind, text)
                result = self.prep(record, "--overwrite", "--seq-len", "128", expect=None)
                if words is None:
                    self.assertEqual(result.returncode, 0, result.stderr)
                else:
                    self.assert_one_error(result, 2 if "positions" in words[0] else 3, *words)
        for outer, end in (({"eos_token_id": [5, 6]}, 5), ({}, 7)):
            model("gemma3", {"eos_token_id": 7}, **outer)
            self.write("tokenizer_config.json", json.dumps({}))
            self.prep(record, "--overwrite")
            self.assertEqual(self.load()[0]["tokens"][-1], end)

    def test_messages_need_a_template(self):
        make_model(self.folder, template=None)
        self.assert_one_error(self.prep([talk("a", "b")], expect=None), 3, "--chat-template")
        template = self.write("own.jinja", "{% for m in messages %}{{ m.content }}|{% endfor %}")
        self.prep([talk("a", "b")], "--chat-template", template)
        self.assertEqual(self.decode(self.load()[0], 0), "a|b|<|im_end|>")

    def test_a_missing_or_broken_tokenizer_is_named(self):
        self.write("tokenizer.json", "{}")
        self.assert_one_error(self.prep([talk("a", "b")], expect=None), 3, "tokenizer.json", "not a usable tokenizer")
        os.unlink(self.path("tokenizer.json"))
        self.assert_one_error(self.prep([talk("a", "b")], expect=None), 3, "tokenizer.json", "no such file")


class Alphabet(unittest.TestCase):
    def test_the_toy_alphabet_has_256_characters(self):
        self.assertEqual(len(set(byte_alphabet())), 256)


if __name__ == "__main__":
    unittest.main()
