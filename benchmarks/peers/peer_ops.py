"""The peers' products and decode: bitsandbytes' dequantize_4bit (double quantization, as QLoRA has it), then torch."""
import importlib.metadata
import os
import sys
import time

import numpy as np

ORACLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "tests", "oracle")
CHECKED_ROWS = 8
BATCH_S = 0.02  # what a time is taken over, as qshard bench does

weights = {}  # the last one: (out, in, dtype) -> (packed, state)


def about(_):
    import torch

    # Products and decode need neither transformers nor peft.
    return {"torch": torch.__version__, **{name: version(name) for name in ("transformers", "peft", "bitsandbytes")},
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "bf16_in_onednn": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()), "threads": torch.get_num_threads()}


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not here"


def weight(out, columns, dtype):
    """A random matrix [out, in] as bitsandbytes holds it; it decodes to `dtype`."""
    import bitsandbytes.functional as bnb
    import torch

    key = (out, columns, dtype)
    if key not in weights:
        weights.clear()
        torch.manual_seed(out + columns)
        w = (0.02 * torch.randn(out, columns)).to(torch.bfloat16)
        packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
        state.dtype = getattr(torch, dtype)
        weights[key] = packed, state
    return weights[key]


def timed(call, repeats, slow_s):
    """(seconds of each batch, the first result). One call and no batches where the first call took longer than slow_s."""
    begin = time.perf_counter()
    result = call()
    first = time.perf_counter() - begin
    if first > slow_s:
        return [first], result
    begin = time.perf_counter()
    call()
    once = time.perf_counter() - begin
    inner = max(1, min(1000, int(BATCH_S / max(once, 1e-7))))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(inner):
            call()
        seconds.append((time.perf_counter() - begin) / inner)
    return seconds, result


def error_of(result, x, w):
    """Largest difference to x w in fp64 over the largest magnitude of its row, over the first rows."""
    import torch

    right = x[:CHECKED_ROWS].to(torch.float64) @ w.to(torch.float64)
    off = (result[:CHECKED_ROWS].to(torch.float64) - right).abs()
    return float((off.max(dim=1).values / right.abs().max(dim=1).values).max())


def gemm(request):
    """Y = X W^T ("forward") or dX = dY W ("backward"): seconds of each batch, and the error.

    {"direction", "out", "in", "tokens", "dtype", "compiled", "repeats", "slow_s"} -> {"seconds", "error"}
    """
    import bitsandbytes.functional as bnb
    import torch

    packed, state = weight(request["out"], request["in"], request["dtype"])
    forward = request["direction"] == "forward"
    x = torch.randn(request["tokens"], request["in" if forward else "out"]).to(getattr(torch, request["dtype"]))

    def product(x):
        w = bnb.dequantize_4bit(packed, state)
        return torch.nn.functional.linear(x, w) if forward else torch.matmul(x, w)

    call = torch.compile(product, dynamic=False) if request["compiled"] else product
    with torch.no_grad():
        if request["compiled"]:
            call(x)  # compiles
        seconds, result = timed(lambda: call(x), request["repeats"], request["slow_s"])
        w = bnb.dequantize_4bit(packed, state)
        return {"seconds": seconds, "error": error_of(result, x, w.t() if forward else w)}


def decode(request):
    """NF4 to `dtype`, into memory that malloc has kept; once compared with the format's definition.

    {"out", "in", "dtype", "repeats", "check"} -> {"seconds", "weights", "wrong"}
    """
    import bitsandbytes.functional as bnb
    import torch

    packed, state = weight(request["out"], request["in"], request["dtype"])
    with torch.no_grad():
        seconds, result = timed(lambda: bnb.dequantize_4bit(packed, state), request["repeats"], 60.0)
    wrong = int((defined(packed, state) != result.float().numpy()).sum()) if request["check"] else None
    return {"seconds": seconds, "weights": result.numel(), "wrong": wrong}


def defined(packed, state):
    """What the bytes stand for, by tests/oracle/nf4_reference.py, which our decode is tested with, too."""
    if ORACLE not in sys.path:
        sys.path.insert(0, ORACLE)
    import torch
    from nf4_reference import Quantized, dequantize

    kind = "bf16" if state.dtype == torch.bfloat16 else "f32"
    return dequantize(Quantized(tuple(state.shape), packed.numpy().reshape(-1), None, dtype=kind,
                                offset=np.float32(state.offset.item()), absmax8=state.absmax.numpy(),
                                absmax32=state.state2.absmax.numpy(), map=state.state2.code.numpy()))
