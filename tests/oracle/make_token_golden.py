#!/usr/bin/env python3
"""Makes tests/golden/smollm2_tokens.json.gz: 1,000 strings and the ids that llama.cpp's own tokenizer gives them.

llama.cpp reads the vocabulary, merges and pre-tokenizer from the GGUF by itself and shares no code with Hugging Face's
`tokenizers`, which qshard-prep uses on the tokenizer.json that src/prep/qshard_gguf.py rebuilds. Run by hand:

    pip install xllamacpp                         # llama.cpp as a wheel
    make_token_golden.py SmolLM2-135M-Instruct.Q4_1.gguf tests/golden/smollm2_tokens.json.gz
"""
import gzip
import json
import random
import sys
import urllib.request

import xllamacpp

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A shard is what one rank owns; a unit is what is gathered together.",
    "It's what they'd said, we've heard it, and I'm sure you'll agree it isn't his.",
    "IT'S WHAT THEY'D SAID, WE'VE HEARD IT, AND I'M SURE YOU'LL AGREE.",
    "for (int i = 0; i < n; i++) { sum += x[i] * 0.5f; }  // 64 weights",
    "def f(x):\n\treturn x ** 2 if x > 0 else -x\n\n\nprint(f(3))",
    "See https://www.example.org/a/b?c=d&e=%20f#g, or write to me@example.org!",
    "{\"key\": [1, 2.5e-3, null, true], \"nested\": {\"a\\n\": \"b\"}}",
    "Größe, naïve café, señor, Øresund, Łódź, İstanbul, ﬁne ligature",
    "Дорогой друг, как дела? Всё хорошо.",
    "東京は日本の首都です。人口は約1400万人です。",
    "안녕하세요 세계", "مرحبا بالعالم ١٢٣٤٥", "नमस्ते दुनिया १२३", "שלום עולם", "สวัสดีชาวโลก ๔๕",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb, 🇩🇪🇫🇷",
    "x² + y³ = ½ z, Ⅷ and ⅻ, ①②③, H₂O, 10⁻⁹ m, ٪ ‰ ∑∫√∞ ≤ ≥ ≠",
    "e\u0301 is é decomposed, a\u030a is å, n\u0303, \u0915\u094d\u0937",
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>", "<jupyter_code>",
            "<empty_output>", "<issue_closed>", "<gh_stars>")
NEARLY_SPECIAL = ("<|im_end", "im_end|>", "<| im_end |>", "<|IM_END|>", "<<|im_end|>>", "<|im_end|", "<reponame")
SPACES = (" ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\n\n\n", "\r\n", " \n ", "\n \t\n", "        ", "\u00a0",
          "\u3000", "\u2003", "\u200b", "\ufeff", "\v", "\f")
DIGITS = ("0", "7", "42", "1234567890", "3.14159", "1,000,000", "2026-11-22", "0x1F", "007", "1e-8", "٣٤", "१२", "½",
          "²³", "Ⅳ", "①", "𝟙𝟚", "10%", "$9.99", "v1.2.3-rc4", "12:34:56")
RANGES = ((0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x52F), (0x5D0, 0x6FF), (0x900, 0x97F), (0x2000, 0x206F),
          (0x2190, 0x22FF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F))


def words(rng, count):
    """`count` words out of the sentences, with the spaces and digits of a careless writer between them."""
    pieces = []
    for _ in range(count):
        pieces.append(rng.choice(rng.choice(SENTENCES).split() or ["x"]))
        pieces.append(rng.choice(SPACES) if rng.random() < 0.3 else " ")
        if rng.random() < 0.2:
            pieces.append(rng.choice(DIGITS))
    return "".join(pieces)


def characters(rng, count):
    """Any characters of the ranges: mostly text that nobody has written."""
    return "".join(chr(rng.randint(*rng.choice(RANGES))) for _ in range(count))


def dialogue(rng):
    """Text with special tokens where a chat template has them, and some where it has not."""
    pieces = []
    for _ in range(rng.randint(1, 5)):
        pieces.append(rng.choice(SPECIALS + NEARLY_SPECIAL))
        pieces.append(rng.choice(("user\n", "assistant\n", "", " ", "\n", words(rng, 3))))
    return "".join(pieces)


def make_strings():
    """1,000 different strings, none empty, from a fixed seed."""
    rng = random.Random(7)
    makers = (lambda: words(rng, rng.randint(1, 20)),
              lambda: characters(rng, rng.randint(1, 24)),
              lambda: dialogue(rng),
              lambda: "".join(rng.choice(SPACES) for _ in range(rng.randint(1, 8))) + rng.choice(SENTENCES)[:12],
              lambda: rng.choice(SENTENCES) + rng.choice(SPACES) + rng.choice(DIGITS) + rng.choice(DIGITS),
              lambda: "".join(str(rng.randint(0, 10 ** rng.randint(1, 12))) + rng.choice(SPACES + (".", ",", "-"))
                              for _ in range(rng.randint(1, 6))))
    strings = dict.fromkeys(SENTENCES + SPECIALS + NEARLY_SPECIAL + SPACES + DIGITS)
    while len(strings) < 1000:
        strings[rng.choice(makers)()] = None
    return list(strings)


def main(model, output):
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = 64
    params.n_parallel = 1
    server = xllamacpp.Server(params)
    cases = []
    for text in make_strings():
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        request = urllib.request.Request(server.listening_address + "/tokenize", data=body,
                                         headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            cases.append([text, json.load(reply)["tokens"]])
    golden = {"tokenizer": f"llama.cpp by xllamacpp {xllamacpp.__version__}", "cases": cases}
    data = json.dumps(golden, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    with open(output, "wb") as file:
        file.write(gzip.compress(data, 9, mtime=0))
    print(f"{output}: {len(cases)} strings, {sum(len(ids) for _, ids in cases)} ids")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: make_token_golden.py MODEL.gguf OUT.json.gz")
    main(sys.argv[1], sys.argv[2])
