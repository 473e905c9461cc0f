#!/usr/bin/env python3
"""Makes a small checkpoint (Llama, Mistral, Qwen, Gemma, Phi-3, OLMo) and a small instruction data set from a seed: for tests, and to try a machine out.

    qshard_tiny.py OUT --layers 4 --examples 512

OUT is then a Hugging Face model directory (config.json, model.safetensors in bf16, tokenizer.json, a chat template)
that also holds train.jsonl and eval.jsonl: additions and subtractions of small numbers as `messages`.

The same options give the same bytes on every machine and with every version of numpy: random numbers are the raw
64-bit words of Philox, whose stream numpy guarantees, and everything made of them is integer arithmetic and single IEEE
operations. So a normal number here is the sum of four uniform 16-bit ones.
"""
import argparse
import hashlib
import json
import os
import struct

from qprep.packages import need

need("numpy")

import numpy as np

from qprep.errors import PrepError, run
from qprep.files import write_bytes, write_json

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Merges that the data set's sentences use, in order of rank; Ġ is the byte-level alphabet's space.
MERGES = (
    "a d|ad d|s u|su b|t r|tr a|tra c|trac t|sub tract|f r|fr o|fro m|a n|an d|p l|pl u|plu s|m i|mi n|min u|minu s|"
    "i s|u s|e r|us er|a s|as s|is t|ass ist|an t|assist ant|Ġ and|Ġ is|Ġ plus|Ġ minus|Ġ from|1 0|1 1|1 2|1 3|1 4|1 5"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# --- random numbers ---------------------------------------------------------------------------------------------------
def raw_words(seed, name, count):
    """`count` 64-bit words that depend on `seed` and `name` alone."""
    name_key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    philox = np.random.Philox(key=np.array([seed, name_key], dtype=np.uint64))
    return philox.random_raw(count)


def normals(seed, name, count):
    """About normal with deviation 1, at most 3.47 from 0: the sum of the four 16-bit quarters of a word."""
    words = raw_words(seed, name, count)
    quarters = sum((words >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48))
    deviation = np.sqrt(4.0 * (2.0**32 - 1) / 12.0)
    return (quarters.astype(np.float64) - 2.0 * 65535.0) / deviation


# --- safetensors ------------------------------------------------------------------------------------------------------
def bf16_bits(values):
    """Rounds finite numbers to bf16, nearest and ties to even; the result holds the bits."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def safetensors_bytes(tensors):
    """A safetensors file: `tensors` is {name: array}, where uint16 stands for bf16 and floats for themselves.

    Ordered as the reference implementation does: wider types first, then by name; the header is padded to 8 bytes.
    """
    kinds = {np.dtype(np.uint16): "BF16", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32",
             np.dtype(np.uint8): "U8"}
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        array = tensors[name]
        end = at + array.nbytes
        header[name] = {"dtype": kinds[array.dtype], "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(np.ascontiguousarray(tensors[n]).tobytes() for n in names)


# --- the checkpoint ---------------------------------------------------------------------------------------------------
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
}
OLMO = ("olmo2", "olmo3")
GEMMA = ("gemma2", "gemma3_text")
BIASED = ("llama", "smollm3", "granite")  # with both keys for biases
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


def has_bias(config, linear):
    """Qwen2 has biases on q, k and v without a key that says so."""
    if config["model_type"] == "qwen2":
        return linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return config.get("attention_bias" if linear.startswith("self_attn") else "mlp_bias", False)


def linear_shapes(config):
    """{name within a layer: shape} of the linears; Phi-3 has one for q, k and v, and one for gate and up."""
    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    if config["model_type"] == "phi3":
        return {
            "self_attn.qkv_proj": (q + 2 * kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_up_proj": (2 * ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
    return {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }


def tensor_shapes(config):
    """{name: shape} of a checkpoint, biases, norms of q and k and own head included where the config has them."""
    hidden, head_dim, linears = config["hidden_size"], config["head_dim"], linear_shapes(config)
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        norms = ["input_layernorm", "post_attention_layernorm"]
        if config["model_type"] in GEMMA:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        if config["model_type"] in OLMO:  # behind attention and MLP alone
            norms = ["post_attention_layernorm", "post_feedforward_layernorm"]
        for norm in norms:
            shapes[prefix + norm + ".weight"] = (hidden,)
        if config["model_type"] in ("qwen3", "gemma3_text"):
            for norm in ("self_attn.q_norm", "self_attn.k_norm"):
                shapes[prefix + norm + ".weight"] = (head_dim,)
        if config["model_type"] in OLMO:  # over all heads
            for name in ("self_attn.q", "self_attn.k"):
                shapes[prefix + name + "_norm.weight"] = linears[name + "_proj"][:1]
        for name, shape in linears.items():
            shapes[prefix + name + ".weight"] = shape
            if has_bias(config, name):
                shapes[prefix + name + ".bias"] = shape[:1]
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    return shapes


def make_tensor(seed, name, shape, norm_mean):
    """bf16 bits of one tensor. Linears keep the size of what passes them, so that a deep stack stays tame; the rows of
    the embedding have length about 1, so that a tied head gives logits of deviation about 1 and can become sure."""
    z = normals(seed, name, int(np.prod(shape))).reshape(shape)
    if name.endswith("norm.weight"):
        return bf16_bits(norm_mean + 0.1 * z)
    if name.endswith(".bias"):
        return bf16_bits(0.05 * z)
    return bf16_bits(z * (1.0 / np.sqrt(float(shape[-1]))))


def make_config(options):
    """The config.json of the checkpoint; every key that a reader may ask for is there."""
    config = {
        "architectures": [CLASSES[options.arch]],
        "attention_bias": options.attention_bias,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": options.head_dim or options.hidden // options.heads,
        "hidden_act": "silu",
        "hidden_size": options.hidden,
        "initializer_range": 0.02,
        "intermediate_size": options.ffn,
        "max_position_embeddings": options.max_position,
        "mlp_bias": options.mlp_bias,
        "model_type": options.arch,
        "num_attention_heads": options.heads,
        "num_hidden_layers": options.layers,
        "num_key_value_heads": options.kv_heads,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": options.tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": options.vocab,
    }
    if options.arch == "mistral":
        config["sliding_window"] = options.window
    elif options.arch in ("qwen2", "qwen3"):
        config["use_sliding_window"] = options.window is not None
        config["sliding_window"] = options.window
        config["max_window_layers"] = options.window_layers
    elif options.arch in GEMMA:
        config["hidden_activation"] = "gelu_pytorch_tanh"
        config["query_pre_attn_scalar"] = options.query_scalar or config["head_dim"]
        config["sliding_window"] = options.window or 4096
    if options.arch == "phi3":
        config["original_max_position_embeddings"] = options.original_position
        config["partial_rotary_factor"] = options.partial_rotary
        config["sliding_window"] = options.window
        config["resid_pdrop"] = config["embd_pdrop"] = 0.0
    if options.arch == "gemma2":
        config["attn_logit_softcapping"] = options.attention_cap
        config["final_logit_softcapping"] = options.final_cap
    if options.arch == "gemma3_text":
        config["rope_local_base_freq"] = 10000.0
        config["rope_theta"] = 1000000.0
        config["sliding_window_pattern"] = options.window_pattern
    if options.arch == "smollm3":
        config["no_rope_layer_interval"] = options.no_rope_interval
        config["no_rope_layers"] = options.no_rope_layers  # None: by the interval
        config["use_sliding_window"] = options.window is not None
        config["sliding_window"] = options.window
    if options.arch == "granite":
        config.update({key: getattr(options, key) for key in MULTIPLIERS})
    if options.arch == "olmo3":
        every = options.window_pattern
        config["layer_types"] = ["sliding_attention" if i % every else "full_attention" for i in range(1, options.layers + 1)]
        config["rope_theta"] = 500000.0
        config["sliding_window"] = options.window or 4096
    no_keys = {
        "llama": (),
        "olmo2": ("mlp_bias", "pretraining_tp"),
        "olmo3": ("mlp_bias", "pretraining_tp"),
        "smollm3": (),
        "granite": ("pretraining_tp",),
        "qwen3": ("mlp_bias", "pretraining_tp"),
        "gemma2": ("mlp_bias", "pretraining_tp", "hidden_act"),
        "gemma3_text": ("mlp_bias", "pretraining_tp", "hidden_act"),
    }
    for key in no_keys.get(options.arch, ("attention_bias", "mlp_bias", "pretraining_tp")):
        del config[key]  # no keys of these classes
    if options.rope_scaling in ("linear", "dynamic"):
        config["rope_scaling"] = {"factor": 8.0, "rope_type": options.rope_scaling}
    if options.rope_scaling == "longrope":
        pairs = int(config["head_dim"] * options.partial_rotary) // 2
        config["rope_scaling"] = {
            "long_factor": [1.5 + 0.75 * i for i in range(pairs)],
            "short_factor": [1.0 + 0.125 * i for i in range(pairs)],
            "type": "longrope",
        }
        if options.arch != "phi3":  # whose original length stands at top level
            config["rope_scaling"]["original_max_position_embeddings"] = options.original_position
    if options.rope_scaling == "llama3":
        # Borders at 8 and 32 positions: wavelengths of even a short head lie below, between and above them.
        config["rope_scaling"] = {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
            "rope_type": "llama3",
        }
    if options.rope_scaling == "yarn":
        # Between 1 and 4 turns over 32 positions: some pairs of a short head lie above, between and below.
        config["rope_scaling"] = {
            "beta_fast": 4.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_type": "yarn",
        }
    return config


# --- the tokenizer ----------------------------------------------------------------------------------------------------
def byte_alphabet():
    """The byte-level alphabet: printable Latin-1 stands for itself, the other bytes for letters from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def make_vocabulary():
    """Token texts in order of id (special tokens, bytes, merges), and the merges as pairs."""
    merges = [tuple(pair.split(" ")) for pair in MERGES.split("|")]
    letters = [letter for _, letter in sorted(byte_alphabet().items())]
    return SPECIAL_TOKENS + letters + [left + right for left, right in merges], merges


def token_bytes():
    """What each id stands for, as bytes; special tokens as their text."""
    to_byte = {letter: byte for byte, letter in byte_alphabet().items()}
    tokens, _ = make_vocabulary()
    return [text.encode() if text in SPECIAL_TOKENS else bytes(to_byte[c] for c in text) for text in tokens]


def make_tokenizer():
    """tokenizer.json: byte-level BPE, numbers digit by digit only where no merge says otherwise."""
    tokens, merges = make_vocabulary()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: i for i, text in enumerate(tokens)},
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def make_tokenizer_config():
    return {
        "add_bos_token": False,
        "bos_token": "<|im_start|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 1000000,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


# --- the data ---------------------------------------------------------------------------------------------------------
def make_examples(seed, count):
    """`count` different questions with their answers, as `messages`."""
    problems = [(op, a, b) for op in ("add", "subtract") for a in range(60) for b in range(60) if op == "add" or a <= b]
    order = np.argsort(raw_words(seed, "examples", len(problems)), kind="stable")
    if count > len(problems):
        what = f"{count} with those for evaluation are more than the {len(problems)} different ones there are"
        raise PrepError(203, "--examples", f"{what}; ask for {len(problems) * 8 // 9} at most")
    examples = []
    for i in order[:count]:
        op, a, b = problems[i]
        if op == "add":
            question, answer = f"add {a} and {b}", f"{a} plus {b} is {a + b}"
        else:
            question, answer = f"subtract {a} from {b}", f"{b} minus {a} is {b - a}"
        examples.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return examples


def jsonl_bytes(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


# --- command line -----------------------------------------------------------------------------------------------------
def write_checkpoint(folder, config, seed):
    """The model directory: config, weights, tokenizer."""
    norm_mean = 0.0 if config["model_type"] in GEMMA else 1.0  # Gemma multiplies by 1 + w
    tensors = {name: make_tensor(seed, name, shape, norm_mean) for name, shape in tensor_shapes(config).items()}
    write_json(os.path.join(folder, "config.json"), config)
    write_bytes(os.path.join(folder, "model.safetensors"), safetensors_bytes(tensors))
    write_json(os.path.join(folder, "tokenizer.json"), make_tokenizer())
    write_json(os.path.join(folder, "tokenizer_config.json"), make_tokenizer_config())


def write_examples(folder, count, seed):
    """train.jsonl with `count` examples, and eval.jsonl with an eighth as many others."""
    examples = make_examples(seed, count + max(1, count // 8))
    write_bytes(os.path.join(folder, "train.jsonl"), jsonl_bytes(examples[:count]))
    write_bytes(os.path.join(folder, "eval.jsonl"), jsonl_bytes(examples[count:]))


def digits(text):
    """[1, 1, 0] of "110"."""
    if not text or set(text) - {"0", "1"}:
        raise argparse.ArgumentTypeError(f"{text} is not made of 0 and 1")
    return [int(digit) for digit in text]


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", maxsplit=1)[0],
        epilog="The model's vocabulary may be larger than the tokenizer's: the ids above it are never used.",
    )
    parser.add_argument("out", metavar="OUT", help="folder to write; files of an earlier run are replaced")
    parser.add_argument("--hidden", type=int, default=128, help="width of the residual stream [%(default)s]")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers [%(default)s]")
    parser.add_argument("--heads", type=int, default=4, help="attention heads [%(default)s]")
    parser.add_argument("--kv-heads", type=int, default=2, help="heads of keys and values [%(default)s]")
    parser.add_argument("--head-dim", type=int, default=0, help="width of a head [hidden / heads]")
    parser.add_argument("--ffn", type=int, default=352, help="width inside the MLP [%(default)s]")
    parser.add_argument("--vocab", type=int, default=320, help="rows of the embedding [%(default)s]")
    parser.add_argument("--max-position", type=int, default=2048, help="longest sequence [%(default)s]")
    parser.add_argument("--original-position", type=int, default=4096, help="longest before longrope [%(default)s]")
    parser.add_argument("--rope-scaling", choices=["none", "linear", "llama3", "yarn", "longrope", "dynamic"],
                        default="none", help="[%(default)s]")
    parser.add_argument("--partial-rotary", type=float, default=1.0, help="phi3: how much of a head turns [%(default)s]")
    parser.add_argument("--tied", action="store_true", default=True, help="the head is the embedding [default]")
    parser.add_argument("--untied", action="store_false", dest="tied", help="the head has its own weights")
    parser.add_argument("--arch", choices=sorted(CLASSES), default="llama", help="model_type [%(default)s]")
    parser.add_argument("--window", type=int, help="attention sees the last WINDOW positions (not llama, olmo2, granite)")
    parser.add_argument("--window-pattern", type=int, default=6, help="gemma3_text, olmo3: each n-th layer sees all [%(default)s]")
    parser.add_argument("--attention-cap", type=float, default=50.0, help="gemma2: of scores [%(default)s]")
    parser.add_argument("--final-cap", type=float, default=30.0, help="gemma2: of logits [%(default)s]")
    parser.add_argument("--query-scalar", type=int, help="gemma: scores are divided by its root [head-dim]")
    parser.add_argument("--window-layers", type=int, default=0, help="qwen: layers below it see all [%(default)s]")
    parser.add_argument("--no-rope-interval", type=int, default=4, help="smollm3: each n-th layer has no RoPE [%(default)s]")
    parser.add_argument("--no-rope-layers", type=digits, help="smollm3: 1 or 0 for each layer, with RoPE or without: 1101")
    for key, value in zip(MULTIPLIERS, (12.0, 0.0625, 0.22, 8.0)):
        parser.add_argument("--" + key.replace("_", "-"), type=float, default=value, help="granite [%(default)s]")
    parser.add_argument("--attention-bias", action="store_true", help="q, k, v and o have biases")
    parser.add_argument("--mlp-bias", action="store_true", help="gate, up and down have biases")
    parser.add_argument("--seed", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--examples", type=int, default=512, help="lines of train.jsonl [%(default)s]")
    return parser


def check(options):
    """Refuses sizes that are no Llama."""
    for name in ("hidden", "layers", "heads", "kv_heads", "ffn", "max_position", "examples"):
        if getattr(options, name) < 1:
            raise PrepError(202, "--" + name.replace("_", "-"), f"is {getattr(options, name)}; it must be at least 1")
    if options.window is not None and (options.window < 1 or options.arch in ("llama", "olmo2", "granite")):
        what = f"is {options.window}; it must be at least 1, and --arch another than llama, olmo2 and granite"
        raise PrepError(202, "--window", what)
    if (options.attention_bias and options.arch not in (*BIASED, "qwen3", *GEMMA, *OLMO)) or (
        options.mlp_bias and options.arch not in BIASED
    ):
        raise PrepError(202, "--arch", f"is {options.arch}, which has no such biases to choose")
    if options.partial_rotary != 1.0 and (options.arch != "phi3" or not 0.0 < options.partial_rotary < 1.0):
        raise PrepError(202, "--partial-rotary", f"is {options.partial_rotary}; it must lie in (0, 1], and --arch be phi3")
    if options.arch == "phi3" and options.rope_scaling not in ("none", "longrope"):
        raise PrepError(202, "--rope-scaling", f"is {options.rope_scaling}, but phi3 has longrope or none")
    if options.no_rope_interval < 1:
        raise PrepError(202, "--no-rope-interval", f"is {options.no_rope_interval}; it must be at least 1")
    if options.no_rope_layers is not None and len(options.no_rope_layers) < options.layers:
        what = f"has {len(options.no_rope_layers)} of --layers {options.layers}"
        raise PrepError(202, "--no-rope-layers", what)
    for key in MULTIPLIERS:
        if not 1e-3 <= getattr(options, key) <= 1e3:
            raise PrepError(202, "--" + key.replace("_", "-"), f"is {getattr(options, key)}; it must lie in [0.001, 1000]")
    if options.original_position < 2:
        raise PrepError(202, "--original-position", f"is {options.original_position}; it must be at least 2")
    if not 0 <= options.seed < 2**63:
        raise PrepError(202, "--seed", f"is {options.seed}; it must be at least 0 and less than 2^63")
    if options.heads % options.kv_heads:
        raise PrepError(202, "--kv-heads", f"is {options.kv_heads}; it must divide --heads {options.heads}")
    if not options.head_dim and options.hidden % options.heads:
        what = f"is {options.heads} and does not divide --hidden {options.hidden}; give --head-dim"
        raise PrepError(202, "--heads", what)
    head_dim = options.head_dim or options.hidden // options.heads
    if head_dim < 2 or head_dim % 2:
        raise PrepError(202, "--head-dim", f"is {head_dim}; the rotary embedding needs an even number")
    tokens = len(make_vocabulary()[0])
    if options.vocab < tokens:
        raise PrepError(202, "--vocab", f"is {options.vocab}; the tokenizer has {tokens} tokens, so give at least that")


def main(argv):
    options = make_parser().parse_args(argv)
    check(options)
    os.makedirs(options.out, exist_ok=True)
    write_examples(options.out, options.examples, options.seed)
    write_checkpoint(options.out, make_config(options), options.seed)
    held_out = max(1, options.examples // 8)
    print(f"{options.out}: {options.layers} layers, hidden {options.hidden}, vocabulary {options.vocab}; "
          f"{options.examples} examples to train on, {held_out} to evaluate")


if __name__ == "__main__":
    raise SystemExit(run(main))
