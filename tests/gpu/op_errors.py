#!/usr/bin/env python3
"""Errors of the device's operations against float64, beside those of PyTorch's bf16 operations on the same inputs.

    op_errors.py DIR        what op_dump wrote

An error is ||out - ref|| / ||ref||. Ours must be at most PyTorch's (with 5 % for chance), and without PyTorch at most
1e-2, the most that bf16 operands cost. numpy is needed, torch and its GPU are used where they are.
"""
import os
import sys

import numpy as np

LIMIT_ALONE = 1e-2
LEEWAY = 1.05
LORA_SCALE, EPS = 2.0, 1e-5
HEADS, KV_HEADS, ROPE_HEADS = 4, 2, 4
JOINED = 3  # q, k and v


def read(folder):
    """{operation: {name: float64 array}}."""
    tensors = {}
    for file in sorted(os.listdir(folder)):
        op, name, shape, ending = file.split(".")
        if ending == "f32":
            rows, cols = map(int, shape.split("x"))
            data = np.fromfile(os.path.join(folder, file), dtype=np.float32).reshape(rows, cols)
            tensors.setdefault(op, {})[name] = data.astype(np.float64)
    return tensors


# --- float64 ------------------------------------------------------------------------------------------------------------
def linear64(t):
    return {"y": t["x"] @ t["w"].T, "dx": t["dy"] @ t["w"]}


def lora64(t):
    xa, g = t["x"] @ t["a"].T, t["dy"] @ t["b"]
    return {"y": t["x"] @ t["w"].T + LORA_SCALE * xa @ t["b"].T, "dx": t["dy"] @ t["w"] + LORA_SCALE * g @ t["a"],
            "da": LORA_SCALE * g.T @ t["x"], "db": LORA_SCALE * t["dy"].T @ xa}


def joined(t):
    """The linears that share an x: a slice of W's rows each, A and B."""
    sizes = [t[f"b{i}"].shape[0] for i in range(JOINED)]
    ends = np.cumsum(sizes)
    return [(slice(end - size, end), t[f"a{i}"], t[f"b{i}"]) for i, (size, end) in enumerate(zip(sizes, ends))]


def joined64(t):
    out = {"y": t["x"] @ t["w"].T, "dx": t["dy"] @ t["w"]}
    for i, (rows, a, b) in enumerate(joined(t)):
        part = lora64({"x": t["x"], "w": t["w"][rows], "a": a, "b": b, "dy": t["dy"][:, rows]})
        out["y"][:, rows] = part["y"]
        out["dx"] += part["dx"] - t["dy"][:, rows] @ t["w"][rows]
        out |= {f"da{i}": part["da"], f"db{i}": part["db"]}
    return out


def dora64(t):
    """No gradient passes the norm."""
    moved = t["w"] + LORA_SCALE * t["b"] @ t["a"]
    norm = np.sqrt((moved ** 2).sum(axis=1))
    gain, z = t["m"][0] / norm, t["x"] @ moved.T
    u = t["dy"] * gain
    return {"norm": norm[None, :], "y": gain * z, "dx": u @ moved, "da": LORA_SCALE * (u @ t["b"]).T @ t["x"],
            "db": LORA_SCALE * u.T @ (t["x"] @ t["a"].T), "dm": ((t["dy"] * z).sum(axis=0) / norm)[None, :]}


def rmsnorm64(t):
    rstd = 1.0 / np.sqrt((t["x"] ** 2).mean(axis=1, keepdims=True) + EPS)
    unit, g = t["x"] * rstd, t["dy"] * t["w"]
    return {"y": unit * t["w"], "dx": rstd * (g - unit * (g * unit).mean(axis=1, keepdims=True))}


def swiglu64(t):
    sigma = 1.0 / (1.0 + np.exp(-t["gate"]))
    silu = t["gate"] * sigma
    slope = sigma * (1.0 + t["gate"] * (1.0 - sigma))
    return {"act": silu * t["up"], "dgate": t["dact"] * t["up"] * slope, "dup": t["dact"] * silu}


def geglu64(t):
    g = t["gate"]
    tanh = np.tanh(np.sqrt(2.0 / np.pi) * (g + 0.044715 * g**3))
    gelu = 0.5 * g * (1.0 + tanh)
    slope = 0.5 * (1.0 + tanh) + 0.5 * g * (1.0 - tanh**2) * np.sqrt(2.0 / np.pi) * (1.0 + 3 * 0.044715 * g**2)
    return {"act": gelu * t["up"], "dgate": t["dact"] * t["up"] * slope, "dup": t["dact"] * gelu}


def rope64(t):
    rows, half = t["cos"].shape
    x = t["x"].reshape(rows, ROPE_HEADS, 2, half)
    cos, sin = t["cos"][:, None, :], t["sin"][:, None, :]
    y = np.stack([x[:, :, 0] * cos - x[:, :, 1] * sin, x[:, :, 1] * cos + x[:, :, 0] * sin], axis=2)
    return {"y": y.reshape(rows, -1)}


def by_head(x, heads):
    """[heads, T, head_dim]"""
    return x.reshape(x.shape[0], heads, -1).transpose(1, 0, 2)


def attention64(t):
    share = HEADS // KV_HEADS
    q, do = by_head(t["q"], HEADS), by_head(t["do"], HEADS)
    k, v = (by_head(t[name], KV_HEADS).repeat(share, axis=0) for name in ("k", "v"))
    length, scale = q.shape[1], 1.0 / np.sqrt(q.shape[2])
    scores = np.where(np.tril(np.ones((length, length), dtype=bool)), q @ k.transpose(0, 2, 1) * scale, -np.inf)
    p = np.exp(scores - scores.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    dp = do @ v.transpose(0, 2, 1)
    ds = p * (dp - (dp * p).sum(axis=2, keepdims=True)) * scale
    grouped = {"dk": ds.transpose(0, 2, 1) @ q, "dv": p.transpose(0, 2, 1) @ do}
    out = {name: x.reshape(KV_HEADS, share, length, -1).sum(axis=1) for name, x in grouped.items()}
    out |= {"o": p @ v, "dq": ds @ k}
    return {name: x.transpose(1, 0, 2).reshape(length, -1) for name, x in out.items()}


def head64(t):
    target = t["target"][0].astype(int)
    logits = t["x"] @ t["w"].T
    top = logits.max(axis=1, keepdims=True)
    p = np.exp(logits - top)
    total = p.sum(axis=1, keepdims=True)
    rows = np.arange(len(target))
    loss = (top + np.log(total))[:, 0] - logits[rows, target]
    p /= total
    p[rows, target] -= 1.0
    return {"loss": loss[None, :], "dx": p @ t["w"] / len(target)}


# --- PyTorch in bf16 ----------------------------------------------------------------------------------------------------
def torch_results(torch, op, t, device):
    """What a model in bf16 computes, written as transformers and peft do; gradients by autograd."""
    from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention, silu

    def leaf(name, grad=False):
        x = torch.from_numpy(t[name]).to(device=device, dtype=torch.bfloat16)
        return x.requires_grad_(grad)

    def gradients(out, seed, **leaves):
        out.backward(leaf(seed) if isinstance(seed, str) else None)
        return {"d" + name: x.grad for name, x in leaves.items()}

    if op == "linear":
        x = leaf("x", True)
        y = linear(x, leaf("w"))
        return {"y": y, **gradients(y, "dy", x=x)}
    if op == "lora":
        x, a, b = leaf("x", True), leaf("a", True), leaf("b", True)
        y = linear(x, leaf("w")) + linear(linear(x, a), b) * LORA_SCALE
        return {"y": y, **gradients(y, "dy", x=x, a=a, b=b)}
    if op == "joined":
        x, w = leaf("x", True), leaf("w")
        leaves = {name: leaf(name, True) for i in range(JOINED) for name in (f"a{i}", f"b{i}")}
        y = torch.cat([linear(x, w[rows]) + linear(linear(x, leaves[f"a{i}"]), leaves[f"b{i}"]) * LORA_SCALE
                       for i, (rows, _, _) in enumerate(joined(t))], dim=1)
        return {"y": y, **gradients(y, "dy", x=x, **leaves)}
    if op == "dora":
        x, a, b, m, w = leaf("x", True), leaf("a", True), leaf("b", True), leaf("m", True), leaf("w")
        norm = (w + LORA_SCALE * b @ a).detach().norm(dim=1)[None, :]
        base = linear(x, w)
        y = base + (m / norm - 1) * base + m / norm * linear(linear(x, a), b) * LORA_SCALE
        return {"norm": norm, "y": y, **gradients(y, "dy", x=x, a=a, b=b, m=m)}
    if op == "rmsnorm":
        x = leaf("x", True)
        wide = x.float()
        y = leaf("w") * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).bfloat16()
        return {"y": y, **gradients(y, "dy", x=x)}
    if op == "swiglu":
        gate, up = leaf("gate", True), leaf("up", True)
        act = silu(gate) * up
        return {"act": act, **gradients(act, "dact", gate=gate, up=up)}
    if op == "geglu":
        gate, up = leaf("gate", True), leaf("up", True)
        act = gelu(gate, approximate="tanh") * up
        return {"act": act, **gradients(act, "dact", gate=gate, up=up)}
    if op == "rope":
        rows = t["x"].shape[0]
        x = leaf("x").view(rows, ROPE_HEADS, -1)
        cos, sin = (torch.cat([leaf(name)] * 2, dim=-1)[:, None, :] for name in ("cos", "sin"))
        first, second = x.chunk(2, dim=-1)
        return {"y": (x * cos + torch.cat([-second, first], dim=-1) * sin).view(rows, -1)}
    if op == "attention":
        leaves = {name: leaf(name, True) for name in "qkv"}
        heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
        q, k, v = (leaves[n].view(leaves[n].shape[0], heads[n], -1).transpose(0, 1)[None] for n in "qkv")
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        o = scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1).reshape(t["q"].shape)
        return {"o": o, **gradients(o, "do", **leaves)}
    x = leaf("x", True)
    target = torch.from_numpy(t["target"][0]).long().to(device)
    loss = cross_entropy(linear(x, leaf("w")).float(), target, reduction="none")
    return {"loss": loss[None, :], **gradients(loss.mean(), None, x=x)}


REFERENCES = {"linear": linear64, "lora": lora64, "joined": joined64, "dora": dora64, "rmsnorm": rmsnorm64, "swiglu": swiglu64,
              "geglu": geglu64, "rope": rope64, "attention": attention64, "head": head64}


def error(out, ref):
    return float(np.linalg.norm(out - ref) / np.linalg.norm(ref)) if np.isfinite(out).all() else float("inf")


def main():
    tensors = read(sys.argv[1])
    if "w" in tensors.get("linear", {}) and "lora" in tensors:
        tensors["lora"] |= {name: tensors["linear"][name] for name in ("w", "x", "dy")}
        if "dora" in tensors:
            tensors["dora"] |= {name: tensors["lora"][name] for name in ("w", "x", "dy", "a", "b")}
    try:
        import torch
        device = "cuda" if torch.cuda.is_available() else "cpu"
    except ImportError:
        torch, device = None, None
        print("not run: errors of PyTorch's bf16 operations: python3 has no torch")
    where = f"torch {torch.__version__} bf16 on {device}" if torch else "torch bf16"
    print(f"| operation | result | error against float64 | {where} | |")
    print("|---|---|---|---|---|")
    bad = []
    for op, reference in REFERENCES.items():
        if op not in tensors:
            bad.append(op)
            continue
        theirs = torch_results(torch, op, tensors[op], device) if torch else {}
        for name, ref in reference(tensors[op]).items():
            ours = error(tensors[op][name], ref)
            peer = error(theirs[name].detach().double().cpu().numpy().reshape(ref.shape), ref) if theirs else None
            good = ours <= (LIMIT_ALONE if peer is None else LEEWAY * peer)
            bad += [] if good else [f"{op} {name}"]
            print(f"| {op} | {name} | {ours:.2e} | {'' if peer is None else f'{peer:.2e}'} | {'ok' if good else 'FAILED'} |")
    if bad:
        print(f"too large: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
