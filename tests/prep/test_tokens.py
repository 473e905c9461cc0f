"""The tokenizer's ids: texts are encoded in chunks, and the ids must be those of the whole text."""
import json
import os
import random
import unittest

import tokenizers
from support import ROOT, FolderTest, byte_alphabet, make_model

from qprep import tokens
from qprep.tokens import LLAMA3_PATTERN, Example, Tokenizer

PIECES = ["a", "B", "he", "é", "日", "1", "23", " ", "  ", "\n", "\n\n", "\t", "\r\n", ".", "!", "'s", "'", "'LL", "\u00a0", "\u2003",
          "\x1c", "\x85", "\u2028", "(", "foo", "\u0301", "½", "👍🏽", "<|im_end|>", "<|im_", "_", "-", "\u3000"]


def level(use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


GPT2 = level(True)
SMOLLM = sequence({"type": "Digits", "individual_digits": True}, level(True))
LLAMA3 = sequence(split(LLAMA3_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), level(False))
QWEN = sequence(split(LLAMA3_PATTERN), level(False))
DIGITS = sequence({"type": "Digits", "individual_digits": False}, level(True))
KNOWN = {"gpt2": GPT2, "smollm": SMOLLM, "digits": DIGITS, "llama3": LLAMA3, "qwen": QWEN}


def merges_of_everything(rng):
    """Merges at random, so that a wrong cut shows: of letters, white space, marks and digits."""
    alphabet = byte_alphabet()
    common = [alphabet[byte] for byte in b" \n\t.a(1he'" + "é".encode()]
    merges, seen = [], set(alphabet) | {"he"}
    while len(merges) < 150:
        left, right = (rng.choice(common if rng.random() < 0.6 else sorted(seen)) for _ in range(2))
        if left + right not in seen and len(left + right) < 7:
            seen.add(left + right)
            merges.append(f"{left} {right}")
    return merges


def texts(rng, count):
    return ["".join(rng.choices(PIECES, k=rng.randrange(0, 16))) for _ in range(count)]


class Characters:
    """Cuts every character off."""

    __call__ = staticmethod(list)
    parts = staticmethod(list)


class Tokens(FolderTest):
    def tokenizer(self, pre_tokenizer=GPT2, **changes):
        make_model(self.folder, merges=merges_of_everything(random.Random(5)), vocab_size=500, pre_tokenizer=pre_tokenizer)
        if changes:
            with open(self.path("tokenizer.json"), encoding="utf-8") as file:
                self.write("tokenizer.json", json.dumps({**json.load(file), **changes}))
        return Tokenizer(self.folder)

    def assert_same_ids(self, tokenizer, samples):
        whole = tokenizer.rust.encode_batch(samples, add_special_tokens=False)
        encoded, _ = tokenizer.encode([Example(text, [], False, False) for text in samples])
        self.assertEqual(encoded.lengths.tolist(), [len(encoding.ids) for encoding in whole])
        self.assertEqual(encoded.tokens.tolist(), [i for encoding in whole for i in encoding.ids])

    def test_chunks_give_the_ids_of_the_whole_text(self):
        for name, pre_tokenizer in KNOWN.items():
            for normalizer in (None, {"type": "NFC"}):
                with self.subTest(name=name, normalizer=normalizer):
                    tokenizer = self.tokenizer(pre_tokenizer, normalizer=normalizer)
                    samples = texts(random.Random(2), 4000)
                    self.assertIsNotNone(tokenizer.cut)
                    self.assertTrue(all("".join(tokenizer.cut(text)) == text for text in samples))
                    self.assertTrue(all("".join(tokenizer.cut.parts(text)) == text for text in samples))
                    self.assert_same_ids(tokenizer, samples)
                    self.assertIsNotNone(tokenizer.cut, "the comparison found a difference")

    def test_what_is_not_certain_is_encoded_whole(self):
        for changes in (
            {"pre_tokenizer": sequence(split(r"\s+"), level(False))},
            {"pre_tokenizer": sequence(split(LLAMA3_PATTERN), level(True))},
            {"pre_tokenizer": {**GPT2, "add_prefix_space": True}},
            {"pre_tokenizer": {"type": "Whitespace"}},
            {"pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True}},
            {"normalizer": {"type": "Lowercase"}},
            {"added_tokens": [{"id": 0, "content": "<|endoftext|>", "single_word": False, "lstrip": True, "rstrip": False,
                               "normalized": False, "special": True}]},
        ):
            with self.subTest(changes=str(changes)[:60]):
                tokenizer = self.tokenizer(**changes)
                self.assertIsNone(tokenizer.cut)
                self.assert_same_ids(tokenizer, texts(random.Random(3), 300))

    def test_a_stretch_between_added_tokens_that_comes_again_is_one_chunk(self):
        tokenizer = self.tokenizer()
        for _ in range(3):
            self.assert_same_ids(tokenizer, ["<|im_end|>he foo (1)<|im_end|>B he", "<|im_end|>he foo (1)"])
        self.assertEqual(tokenizer.cut("<|im_end|>he foo (1)<|im_end|>"), ["<|im_end|>", "he foo (1)", "<|im_end|>"])
        tokenizer.cut.stretches = set(map(str, range(tokens.STRETCHES_LIMIT)))
        cuts = [tokenizer.cut("<|im_end|>a B") for _ in range(3)]
        self.assertEqual(cuts, [["<|im_end|>", "a", " B"]] * 3, "no more than the limit is kept")

    def test_a_wrong_cut_is_found_and_given_up(self):
        tokenizer = self.tokenizer()
        tokenizer.cut = Characters()  # which is too much
        self.assert_same_ids(tokenizer, ["the end", "he"])
        self.assertIsNone(tokenizer.cut)

    def test_masks_are_those_of_the_whole_texts_offsets(self):
        rng = random.Random(4)
        for pre_tokenizer in KNOWN.values():
            tokenizer = self.tokenizer(pre_tokenizer)
            examples = []
            for text in texts(rng, 1500):
                borders = sorted(rng.sample(range(len(text) + 1), min(4, len(text) + 1) // 2 * 2))
                examples.append(Example(text, list(zip(borders[::2], borders[1::2])), False, False))
            encoded, straddling = tokenizer.encode(examples)
            learned, over = [], 0
            whole = tokenizer.rust.encode_batch([example.text for example in examples], add_special_tokens=False)
            for example, encoding in zip(examples, whole):
                for begin, end in encoding.offsets:
                    learned.append(any(first <= begin and end <= last for first, last in example.spans))
                    over += sum(begin < border < end for span in example.spans for border in span)
            self.assertEqual(encoded.learned.tolist(), learned)
            self.assertEqual(straddling.sum(), over)

    def test_known_chunks_are_bounded(self):
        self.addCleanup(setattr, tokens, "KNOWN_LIMIT", tokens.KNOWN_LIMIT)
        tokens.KNOWN_LIMIT = 10
        tokenizer = self.tokenizer()
        for seed in range(5):
            self.assert_same_ids(tokenizer, texts(random.Random(seed), 50))
        self.assertLess(len(tokenizer.known.number), 300)

    def test_the_real_tokenizer_gives_the_same_ids_in_chunks(self):
        model = os.environ.get("QSHARD_SMOLLM2") or os.path.join(ROOT, "build", "smollm2")
        if not os.path.exists(os.path.join(model, "tokenizer.json")):
            self.skipTest(f"no {model}")
        tokenizer = Tokenizer(model)
        self.assertIsNotNone(tokenizer.cut)
        prose = []
        for folder, _, names in os.walk(os.path.join(ROOT, "docs")):
            for name in sorted(names):
                with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
                    words = file.read().split(" ")
                prose += [" ".join(words[i:i + 60]) for i in range(0, len(words), 60)]
        self.assert_same_ids(tokenizer, prose + texts(random.Random(6), 3000))
        self.assertIsNotNone(tokenizer.cut)

    def test_the_tokenizers_library_joins_nothing_over_added_tokens(self):
        tokenizer = tokenizers.Tokenizer.from_file(os.path.join(self.tokenizer() and self.folder, "tokenizer.json"))
        both = tokenizer.encode("h<|im_end|>e", add_special_tokens=False).ids
        self.assertEqual(both, [3 + ord("h"), 2, 3 + ord("e")])


if __name__ == "__main__":
    unittest.main()
