"""transformers + peft in fp32 on given weights: loss, LoRA gradients and training curves. Needs torch (setup.sh).

Documents pass one by one, so that attention and positions are per document by construction, whatever masks do.
"""
import json
import math
import os

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from counter_random import DROPOUT_SITE, permuted, sample_key, uniforms
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

IGNORED = -100


class Tokens:
    """A token file: per sequence the list of (ids, labels) of its documents."""

    def __init__(self, path):
        with h5py.File(path, "r") as file:
            tokens, labels = file["tokens"][()].astype(np.int64), file["labels"][()].astype(np.int64)
            seq_offsets, doc_offsets = file["seq_offsets"][()], file["doc_offsets"][()]
            self.seq_targets = file["seq_targets"][()]
        self.sequences = []
        for begin, end in zip(seq_offsets[:-1], seq_offsets[1:]):
            borders = doc_offsets[(doc_offsets >= begin) & (doc_offsets <= end)]
            self.sequences.append([(tokens[a:b], labels[a:b]) for a, b in zip(borders[:-1], borders[1:])])

    def __len__(self):
        return len(self.sequences)


def targets_of(labels):
    """How many positions of a document carry loss: those whose next label is not ignored."""
    return int(np.count_nonzero(labels[1:] != IGNORED))


def read_order(path):
    """The file of `qshard train --dump-order`: sequence numbers of each step."""
    with open(path, encoding="utf-8") as file:
        return [[int(word) for word in line.split()] for line in file if line.strip()]


def base_model(config, weights):
    """A transformers model in fp32 that holds `weights` ({HF name: float32 array})."""
    config = AutoConfig.for_model(**{k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    state = {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not (name == "lm_head.weight" and config.tie_word_embeddings)]
    if missing or unexpected:
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()  # dropout off; nothing else depends on it


def with_adapter(model, adapter_dir):
    """`model` with a PEFT adapter whose weights are trainable."""
    return PeftModel.from_pretrained(model, adapter_dir, is_trainable=True).eval()


# In the order of the program's qs_linear, whose number draws the mask; no layer has all.
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
                                                          "self_attn.qkv_proj", "mlp.gate_up_proj"]


class CounterDropout(torch.nn.Module):
    """The dropout of one linear's adapter with the masks of the program: `place` says which rows pass."""

    def __init__(self, p, place, layer, linear):
        super().__init__()
        self.p, self.place, self.layer, self.site = np.float32(p), place, layer, DROPOUT_SITE + linear

    def forward(self, x):
        rows, width = x.shape[-2:]
        drawn = uniforms(self.place.key, self.place.row * width, rows * width, self.site, self.layer)
        kept = np.where(drawn >= self.p, np.float32(1) / (np.float32(1) - self.p), np.float32(0)).astype(np.float32)
        return x * torch.from_numpy(kept.reshape(x.shape))


class Place:
    """Where a document stands: the step's seed and number, the global sample and the row within it."""

    def __init__(self, seed):
        self.seed, self.key, self.row = seed, None, 0

    def at(self, step, sample, row):
        self.key, self.row = sample_key(self.seed, step, sample), row


def add_dropout(model, p, seed):
    """Puts CounterDropout into every adapter of `model` and has it trained with it; returns the Place to set."""
    place = Place(seed)
    for name, module in model.named_modules():
        if hasattr(module, "lora_dropout"):
            layer, linear = name.split(".layers.")[1].split(".", maxsplit=1)
            for adapter in module.lora_dropout:
                module.lora_dropout[adapter] = CounterDropout(p, place, int(layer), LINEARS.index(linear))
            module.training = True  # peft's DoRA asks; the modules around it stay as they are
    return place


def remove_dropout(model):
    """As in evaluation."""
    model.eval()
    for module in model.modules():
        for adapter in getattr(module, "lora_dropout", {}):
            module.lora_dropout[adapter] = torch.nn.Identity()


def program_order(seed, sequences, steps, batch):
    """The sequences of each step as the program draws them."""
    numbers = range(steps * batch)
    order = [permuted(seed, number // sequences, sequences, number % sequences) for number in numbers]
    return [order[step * batch : (step + 1) * batch] for step in range(steps)]


def logits_of(model, ids):
    return model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0]


def placed_documents(sequences):
    """(position in the step, row of its first token within the sequence, ids, labels) of every document."""
    for i, sequence in enumerate(sequences):
        row = 0
        for ids, labels in sequence:
            yield i, row, ids, labels
            row += len(ids)


def step_loss(model, sequences, backward, step=0, place=None):
    """Mean loss over all positions that carry one, in the sequences of one step; gradients stay in the parameters.
    With dropout (`place`) the sequences must be in the order of the step."""
    total = sum(targets_of(labels) for _, _, _, labels in placed_documents(sequences))
    loss_sum = 0.0
    for i, row, ids, labels in placed_documents(sequences):
        if targets_of(labels) == 0:
            continue
        if place is not None:
            place.at(step, step * len(sequences) + i, row)
        with torch.set_grad_enabled(backward):
            logits = logits_of(model, ids)
            # In float64: torch's float32 log_softmax on a CPU is 8e-6 too low over 49,152 words.
            loss = F.cross_entropy(
                logits[:-1].double(), torch.from_numpy(labels[1:]), ignore_index=IGNORED, reduction="sum"
            )
        if backward:
            (loss / total).backward()
        loss_sum += loss.item()
    return loss_sum / total


def adapter_parameters(model):
    """{PEFT file name: parameter}; peft keeps the adapter's name inside its own."""
    names = {n: n.replace(".default.", ".") for n, p in model.named_parameters() if p.requires_grad}
    # peft writes magnitudes without the last part of their name.
    names = {n: file.replace("magnitude_vector.weight", "magnitude_vector") for n, file in names.items()}
    return {names[n]: p for n, p in model.named_parameters() if n in names}


def gradients(model, sequences, place=None):
    """(mean loss, {PEFT name: gradient})."""
    model.zero_grad(set_to_none=True)
    loss = step_loss(model, sequences, backward=True, place=place)
    return loss, {n: p.grad.numpy().copy() for n, p in adapter_parameters(model).items()}


def learning_rate(settings, step):
    """Warm-up by (step + 1) / warmup_steps, then down to min_lr_ratio. A fraction of a step is a whole one."""
    s = settings
    warmup_steps = math.ceil(s.warmup * s.steps - 1e-9) if s.warmup < 1 else int(s.warmup)
    if step < warmup_steps:
        return s.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, s.steps - warmup_steps)
    height = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    low = 1.0 if s.schedule == "constant" else s.min_lr_ratio
    return s.lr * (low + (1.0 - low) * height[s.schedule])


def train(model, settings, tokens, order, place=None):
    """AdamW on the adapter; per step the loss before the update, the rate, and the gradient's norm before clipping."""
    s, parameters = settings, list(adapter_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=s.lr, betas=tuple(s.betas), eps=s.eps, weight_decay=s.weight_decay)
    curve = []
    for step, sequences in enumerate(order):
        optimizer.zero_grad(set_to_none=False)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, step)
        loss = step_loss(model, [tokens.sequences[i] for i in sequences], True, step, place)
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in parameters))
        scale = min(1.0, s.clip / (norm + 1e-6)) if s.clip > 0 else 1.0
        for p in parameters:
            p.grad.mul_(scale)
        optimizer.step()
        curve.append({"step": step + 1, "loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm})
    return curve


def versions():
    import peft
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}


def read_config(model_dir):
    with open(os.path.join(model_dir, "config.json"), encoding="utf-8") as file:
        return json.load(file)
