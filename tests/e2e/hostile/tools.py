"""Rows for the Python tools: qshard-prep and the GGUF converter."""
import struct

from hostile import changes as to
from hostile.case import CONFIG, DEEP, HTML, NAN_F32, case, not_a_file

# ---- inputs of qshard-prep: records, tokenizer, template, Megatron ----

TEXT = "data.jsonl"
not_a_file("prep", TEXT, empty=302)
for what, content, code, says in (("is cut off", b'{"text": "a', 302, ":1: "),
                                  ("has a NUL", b'{"text": "a\0"}\n', 302, ":1: .*NUL"),
                                  ("is not UTF-8", b'{"text": "\xff"}\n', 302, ":1: .*UTF-8"),
                                  ("has a key twice", b'{"text": "a", "text": "b"}\n', 302, ":1: .*twice"),
                                  ("has NaN", b'{"text": "a", "n": NaN}\n', 302, ":1: .*NaN"),
                                  ("is nested deep", b'{"text": "a", "n": ' + DEEP + b"}\n", 302, ":1: .*deeper"),
                                  ("has a number for text", b'{"text": 3}\n', 302, ":1: .*text"),
                                  ("is gzip", b"\x1f\x8b" + bytes(50), 301, ".*gzip"),
                                  ("is Parquet", b"PAR1" + bytes(50), 301, ".*Parquet"),
                                  ("is UTF-16", '{"text": "a"}'.encode("utf-16"), 301, ".*UTF-16"),
                                  ("has no record", b"\n\n", 302, ".*no usable record"),
                                  ("has a role of its own", b'{"messages": [{"role": "x\\ny", "content": "a"}]}\n', 302,
                                   ":1: .*role"),
                                  ("ids above the vocabulary", b'{"input_ids": [1, 2147483648]}\n', 302, ":1: .*input_ids")):
    case("prep", f"data.jsonl {what}", to.put(TEXT, content), code, TEXT + says)
TOKENIZER = "model/tokenizer.json"
for name, twice in ((TOKENIZER, "version"), (CONFIG, "vocab_size"), ("model/tokenizer_config.json", "eos_token")):
    case("prep", f"{name} is a directory", to.directory(name), 301, name)
    case("prep", f"{name} is a pipe", to.fifo(name), 301, name)
    case("prep", f"{name} is cut off", to.cut(name, 0.5), 301, name)
    case("prep", f"{name} is nested 100000 deep", to.put(name, DEEP), 301, name)
    case("prep", f"{name} is empty", to.empty(name), 301, name)
    case("prep", f"{name} has a key twice", to.twice(name, twice), 301, f"{name}: .*twice")
case("prep", "tokenizer.json is a link to itself", to.link_loop(TOKENIZER), 300, TOKENIZER)
case("prep", "vocab_size is 2^40", to.field(CONFIG, "vocab_size", 2**40), 302, f"{CONFIG}: vocab_size")
case("prep", "vocab_size is below the tokenizer's", to.field(CONFIG, "vocab_size", 100), 302, f"{TOKENIZER}: .*vocab_size")
case("prep", "an id of 2^31", to.field(TOKENIZER, "model/vocab/a", 2**31), 302, TOKENIZER)
case("prep", "an id of -1", to.field(TOKENIZER, "model/vocab/a", -1), 301, TOKENIZER)
case("prep", "an id twice", to.field(TOKENIZER, "model/vocab/a", 70), 302, f"{TOKENIZER}: .*70")
case("prep", "a merge of nothing", to.field(TOKENIZER, "model/merges", ["no such"]), 301, TOKENIZER)
case("prep", "a merge without a product", to.field(TOKENIZER, "model/merges", ["q x"]), 301, TOKENIZER)
case("prep", "an added token of id 2^40", to.field(TOKENIZER, "added_tokens/0/id", 2**40), 301, TOKENIZER)
TEMPLATE = "model/tokenizer_config.json"
for what, source in (("of 10^9 turns", "{% for a in range(999999999) %}{% endfor %}"),
                     ("that reads classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
                     ("that divides by 0", "{{ 1 / 0 }}"),
                     ("that calls itself", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
                     ("that includes a file", "{% include '/etc/passwd' %}")):
    case("prep chat", f"template {what}", to.field(TEMPLATE, "chat_template", source), 302, "chat.jsonl:1: ")
case("prep chat", "template that is no Jinja", to.field(TEMPLATE, "chat_template", "{% for %}"), 301, f"{TEMPLATE}: .*Jinja")
case("prep chat", "template that is a number", to.field(TEMPLATE, "chat_template", 7), 302, f"{TEMPLATE}: .*chat_template")
case("prep chat", "template file is a pipe", to.fifo("model/chat_template.jinja"), 301,
     "model/chat_template.jinja: is not a plain file")
case("prep chat", "template file is a link to nothing", to.link("model/chat_template.jinja", "nowhere"), 300,
     "model/chat_template.jinja")
IDX, BIN = "corpus.idx", "corpus.bin"
for name in (IDX, BIN):
    case("megatron", f"{name} is a pipe", to.fifo(name), 301, name)
    case("megatron", f"{name} is a directory", to.directory(name), 301, name)
    case("megatron", f"{name} is empty", to.empty(name), 301 if name == IDX else 302, name)
case("megatron", "corpus.idx is cut off", to.cut(IDX, -3), 302, f"{IDX}: .*cut off")
case("megatron", "corpus.idx is another file", to.put(IDX, HTML), 301, f"{IDX}: .*MMIDIDX")
case("megatron", "corpus.bin is cut off", to.cut(BIN, -2), 302, f"{BIN}: .*cut off")
case("megatron", "2^60 sequences", to.word(IDX, 18, 2**60), 302, f"{IDX}: .*sequences")
case("megatron", "ids above the vocabulary", to.put(BIN, b"\xff" * 8), 302, f"{BIN}: .*65535")

# ---- GGUF: the converter ----

GGUF = "model.gguf"
case("gguf", "is missing", to.gone(GGUF), 300, GGUF)
case("gguf", "is a pipe", to.fifo(GGUF), 300, GGUF)
case("gguf", "is empty", to.empty(GGUF), 301, GGUF)
case("gguf", "is HTML", to.put(GGUF, HTML), 301, GGUF)
for keep in (4, 20, 100, 0.3, -1):
    case("gguf", f"is cut at {keep}", to.cut(GGUF, keep), 301, GGUF)
case("gguf", "2^62 tensors", to.word(GGUF, 8, 2**62), 301, GGUF)
case("gguf", "2^62 keys", to.word(GGUF, 16, 2**62), 301, GGUF)
case("gguf", "a key of 2^62 letters", to.word(GGUF, 24, 2**62), 301, GGUF)
case("gguf", "no heads", to.of_content(GGUF, lambda data: number_of(data, b"llama.attention.head_count", 0)), 302,
     f"{GGUF}: .*head")
case("gguf", "3 heads", to.of_content(GGUF, lambda data: number_of(data, b"llama.attention.head_count", 3)), 302,
     f"{GGUF}: .*head")
case("gguf", "2^31 layers", to.of_content(GGUF, lambda data: number_of(data, b"llama.block_count", 2**31)), 302,
     f"{GGUF}: .*block_count")
case("gguf", "NaN in the norm", to.of_content(GGUF, lambda data: data[:-4] + NAN_F32), 302, f"{GGUF}: .*NaN")


def number_of(data, key, value):
    """A u32 of the metadata: behind the key stands its type."""
    at = data.index(key) + len(key) + 4
    return data[:at] + struct.pack("<I", value) + data[at + 4:]
