"""The GGUF converter: rows of q and k, names, dtypes, tokenizer, and damaged input."""
import json
import os
import struct
import unittest
import zipfile

import gguf
import numpy as np
import tokenizers
from support import SPECIALS, FolderTest, byte_alphabet, tool

from qshard_gguf import to_bf16

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 64, 4, 2, 96, 2
TOKENS = SPECIALS + byte_alphabet() + ["he"]


def permuted(weight, heads):
    """What llama.cpp's converter does, row by row: row i of a head's first half goes to 2i, of its second to 2i + 1."""
    half = weight.shape[0] // heads // 2
    out = np.empty_like(weight)
    for head in range(heads):
        for i in range(half):
            out[head * 2 * half + 2 * i] = weight[head * 2 * half + i]
            out[head * 2 * half + 2 * i + 1] = weight[head * 2 * half + half + i]
    return out


def bf16(values):
    """Weights that bf16 represents exactly, so that nothing may be lost on the way."""
    return (np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def layer_weights(rng):
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN),
              "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN),
              "mlp.down_proj": (HIDDEN, FFN), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    return {name: bf16(rng.standard_normal(shape)) for name, shape in shapes.items()}


GGUF_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
              "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def make_gguf(path, pre="smollm", arch="llama", drop=None, tied=True, merges=("h e",)):
    """Writes a seed-made GGUF; returns the Hugging Face weights it stands for."""
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, arch)
    for add, value in ((writer.add_block_count, LAYERS), (writer.add_context_length, 128),
                       (writer.add_embedding_length, HIDDEN), (writer.add_feed_forward_length, FFN),
                       (writer.add_head_count, HEADS), (writer.add_head_count_kv, KV_HEADS),
                       (writer.add_rope_freq_base, 100000.0), (writer.add_layer_norm_rms_eps, 1e-5),
                       (writer.add_tokenizer_model, "gpt2"), (writer.add_tokenizer_pre, pre),
                       (writer.add_token_list, TOKENS), (writer.add_token_merges, list(merges)),
                       (writer.add_token_types, [3] * len(SPECIALS) + [1] * 257), (writer.add_bos_token_id, 1),
                       (writer.add_eos_token_id, 2), (writer.add_chat_template, "{{ messages }}")):
        add(value)
    weights = {"model.embed_tokens.weight": bf16(rng.standard_normal((len(TOKENS), HIDDEN))),
               "model.norm.weight": bf16(rng.standard_normal(HIDDEN))}
    tensors = {"token_embd.weight": weights["model.embed_tokens.weight"], "output_norm.weight": weights["model.norm.weight"]}
    if not tied:
        weights["lm_head.weight"] = tensors["output.weight"] = bf16(rng.standard_normal((len(TOKENS), HIDDEN)))
    for layer in range(LAYERS):
        for name, weight in layer_weights(rng).items():
            weights[f"model.layers.{layer}.{name}.weight"] = weight
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(GGUF_NAMES[name])
            tensors[f"blk.{layer}.{GGUF_NAMES[name]}.weight"] = permuted(weight, heads) if heads else weight
    for name, weight in tensors.items():
        if name != drop:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def read_safetensors(path):
    """A strict reader of its own: header, sorted and gapless offsets, bf16 to fp32."""
    with open(path, "rb") as file:
        data = file.read()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    assert header.pop("__metadata__") == {"format": "pt"} and size % 8 == 0
    at, out = 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        assert begin == at and end - begin == 2 * np.prod(entry["shape"]) and entry["dtype"] == "BF16", name
        bits = np.frombuffer(data[8 + size + begin:8 + size + end], dtype="<u2").astype(np.uint32) << 16
        out[name] = bits.view(np.float32).reshape(entry["shape"])
        at = end
    assert 8 + size + at == len(data)
    return out


class Rounding(unittest.TestCase):
    def test_fp32_to_bf16_rounds_to_nearest_and_ties_to_even(self):
        cases = {0x3F800000: 0x3F80, 0x3F808000: 0x3F80, 0x3F818000: 0x3F82, 0x3F808001: 0x3F81, 0x3F807FFF: 0x3F80,
                 0xBF818000: 0xBF82, 0x3FFFFFFF: 0x4000, 0x80000000: 0x8000}
        values = np.array(list(cases), dtype=np.uint32).view(np.float32)
        self.assertEqual(to_bf16(values).tolist(), list(cases.values()))


class Gguf(FolderTest):
    def convert(self, source, out="hf"):
        return tool("qshard_gguf.py", source, "-o", self.path(out))

    def test_every_weight_comes_back_exactly_under_its_name(self):
        for tied in (True, False):
            want = make_gguf(self.path("m.gguf"), tied=tied)
            result = self.convert(self.path("m.gguf"), f"hf{tied}")
            self.assertEqual(result.returncode, 0, result.stderr)
            have = read_safetensors(self.path(f"hf{tied}/model.safetensors"))
            self.assertEqual(sorted(have), sorted(want))
            for name, weight in want.items():
                np.testing.assert_array_equal(have[name], weight, name)
            with open(self.path(f"hf{tied}/config.json"), encoding="utf-8") as file:
                config = json.load(file)
            self.assertEqual(config["tie_word_embeddings"], tied)
            self.assertEqual((config["rms_norm_eps"], config["rope_theta"]), (1e-5, 100000.0))
            self.assertEqual((config["hidden_size"], config["head_dim"], config["vocab_size"]), (64, 16, len(TOKENS)))

    def test_the_rebuilt_tokenizer_splits_digits_and_knows_special_tokens(self):
        make_gguf(self.path("m.gguf"))
        self.convert(self.path("m.gguf"))
        tokenizer = tokenizers.Tokenizer.from_file(self.path("hf/tokenizer.json"))
        got = [tokenizer.id_to_token(i) for i in tokenizer.encode("the 12<|im_end|>").ids]
        self.assertEqual(got, ["t", "he", "Ġ", "1", "2", "<|im_end|>"])
        self.assertEqual(tokenizer.decode(tokenizer.encode("é 東\n").ids), "é 東\n")
        with open(self.path("hf/tokenizer_config.json"), encoding="utf-8") as file:
            config = json.load(file)
        self.assertEqual((config["eos_token"], config["chat_template"]), ("<|im_end|>", "{{ messages }}"))

    def test_a_package_with_the_gguf_inside_gives_the_same_bytes(self):
        make_gguf(self.path("m.gguf"))
        with zipfile.ZipFile(self.path("p.whl"), "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(self.path("m.gguf"), "pkg/m.gguf")
        self.convert(self.path("m.gguf"), "a")
        self.convert(self.path("p.whl"), "b")
        for name in os.listdir(self.path("a")):
            with open(self.path(f"a/{name}"), "rb") as one, open(self.path(f"b/{name}"), "rb") as other:
                self.assertEqual(one.read(), other.read(), name)
        self.assertEqual(len(os.listdir(self.path("b"))), 6)

    def test_what_cannot_be_converted_is_refused_by_name_and_leaves_nothing(self):
        cases = {
            "architecture": ({"arch": "qwen2"}, '"qwen2"'),
            "pre": ({"pre": "llama-bpe"}, '"llama-bpe"; known: gpt-2, smollm'),
            "missing": ({"drop": "blk.1.ffn_up.weight"}, "model.layers.1.mlp.up_proj.weight"),
            "merge": ({"merges": ("h e", "q zz")}, 'merge 1 "q zz"'),
        }
        for name, (change, expected) in cases.items():
            path = self.path(f"{name}.gguf")
            make_gguf(path, **change)
            self.assert_one_error(self.convert(path), 3, f"{name}.gguf", expected)
        self.assertEqual([name for name in os.listdir(self.folder) if not name.endswith(".gguf")], [])

    def test_damaged_files_are_refused(self):
        make_gguf(self.path("m.gguf"))
        with open(self.path("m.gguf"), "rb") as file:
            data = file.read()
        for name, content in (("empty", b""), ("text", b"hello"), ("cut", data[:3000]), ("short", data[:-1000]),
                              ("zip", b"PK\3\4 broken")):
            self.assert_one_error(self.convert(self.write(name, content)), 3, name)
        self.assert_one_error(self.convert(self.path("none")), 3, "no such file")
        self.assertFalse(os.path.exists(self.path("hf")))

    def test_an_existing_folder_is_kept(self):
        make_gguf(self.path("m.gguf"))
        os.mkdir(self.path("hf"))
        self.assert_one_error(self.convert(self.path("m.gguf")), 2, "is there already")


if __name__ == "__main__":
    unittest.main()
