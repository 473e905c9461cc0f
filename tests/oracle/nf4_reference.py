#!/usr/bin/env python3
"""NF4 with double quantization in numpy, written from the paper and the format's description, not from the C code.

    nf4_reference.py                 compare with bitsandbytes' CPU code on seed-made tensors (needs torch)

The 16 values and the absmax per 64: Dettmers et al. 2023, arXiv:2305.14314, app. E. The 8-bit map of the second level:
Dettmers et al. 2022, arXiv:2110.02861. All arithmetic is fp32, one rounding an operation, unless a line says otherwise.
"""
import hashlib
import sys
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from tensors import round_to

BLOCK = 64
GROUP = 256  # absmax that share a nested absmax
QUANTUM = BLOCK * GROUP
ZERO_CODE = 7
MAP_SHA256 = "035c4114538df2a03bbcb4d8a39b9325d26d84a00cf6cf29018d1a6608ab14c4"

CODE = np.array(
    [
        0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871, 0x00000000,
        0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000,
    ],
    dtype=np.uint32,
).view(np.float32)  # fmt: skip
THRESHOLD = (CODE[:-1] + CODE[1:]) * np.float32(0.5)


def dynamic_map():
    """The 256 values of the second level: exact rationals, each rounded once to fp32."""
    values = [Fraction(0), Fraction(1)]
    for decade in range(7):
        cells = 2**decade
        for cell in range(cells):
            middle = Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * cell + 1, 2 * cells)
            scaled = middle / 10 ** (6 - decade)
            values += [scaled, -scaled]
    table = np.array(sorted(float(v) for v in values), dtype=np.float64).astype(np.float32)
    assert hashlib.sha256(table.astype("<f4").tobytes()).hexdigest() == MAP_SHA256
    return table


MAP = dynamic_map()


@dataclass(frozen=True)
class Quantized:
    """One tensor. `absmax` is the first level in fp32; the nested fields are None without double quantization."""

    shape: tuple
    packed: np.ndarray  # u8 [ceil(n / 2)], first element in the high nibble
    absmax: np.ndarray  # f32 [ceil(n / 64)]
    offset: np.float32 | None = None
    absmax8: np.ndarray | None = None  # u8 [ceil(n / 64)]
    absmax32: np.ndarray | None = None  # f32 [ceil(n / 16384)]
    map: np.ndarray | None = None  # f32 [256]
    dtype: str = "bf16"
    zero_blocks: int = 0


def padded_blocks(flat, width):
    """`flat` as rows of `width`, the last one filled with zeros."""
    rows = -(-flat.size // width)
    out = np.zeros(rows * width, dtype=flat.dtype)
    out[: flat.size] = flat
    return out.reshape(rows, width)


def normalized(rows):
    """Each row times 1/max|row|, and the maxima. A row of zeros stays zero."""
    largest = np.max(np.abs(rows), axis=1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.where(largest > 0, np.float32(1) / largest, np.float32(0)).astype(np.float32)
        return rows * inverse[:, None], largest


def quantize_blocks(x):
    """First level: (codes [n], absmax, number of all-zero blocks). A value on a threshold takes the lower code."""
    flat = np.ascontiguousarray(x, dtype=np.float32).reshape(-1)
    y, absmax = normalized(padded_blocks(flat, BLOCK))
    codes = np.searchsorted(THRESHOLD, y.reshape(-1), side="left").astype(np.uint8)[: flat.size]
    return codes, absmax, int(np.count_nonzero(absmax == 0))


def pack(codes):
    """Two codes a byte; an odd last one is paired with the code of zero."""
    if codes.size % 2:
        codes = np.append(codes, np.uint8(ZERO_CODE))
    return (codes[0::2] << 4) | codes[1::2]


def unpack(packed, count):
    codes = np.empty(2 * packed.size, dtype=np.uint8)
    codes[0::2], codes[1::2] = packed >> 4, packed & 15
    return codes[:count]


def mean_offset(absmax):
    """The nested offset: the mean, summed in double and rounded once."""
    return np.float32(np.sum(absmax.astype(np.float64)) / absmax.size)


def quantize_absmax(absmax, offset, table=MAP):
    """Second level: (absmax8, absmax32). Nearest entry of the map; halfway (compared exactly, in double) the lower."""
    y, absmax32 = normalized(padded_blocks(absmax - offset, GROUP))
    middles = (table[:-1].astype(np.float64) + table[1:].astype(np.float64)) / 2
    absmax8 = np.searchsorted(middles, y.reshape(-1).astype(np.float64), side="left").astype(np.uint8)
    return absmax8[: absmax.size], absmax32


def quantize(x, nested=True, dtype="bf16", offset=None):
    """`x` (float32) to Quantized; `offset` overrides the mean, to follow another program's."""
    codes, absmax, zero_blocks = quantize_blocks(x)
    state = Quantized(tuple(np.shape(x)), pack(codes), absmax, dtype=dtype, zero_blocks=zero_blocks)
    if not nested:
        return state
    offset = mean_offset(absmax) if offset is None else np.float32(offset)
    absmax8, absmax32 = quantize_absmax(absmax, offset)
    return replace(state, offset=offset, absmax8=absmax8, absmax32=absmax32, map=MAP)


def decoded_absmax(state):
    """The first level as it is used: map * nested absmax, then + offset, two roundings."""
    if state.absmax8 is None:
        return state.absmax
    scale = np.repeat(state.absmax32, GROUP)[: state.absmax8.size]
    return state.map[state.absmax8] * scale + state.offset


def dequantize(state):
    """W as float32: code * absmax, rounded to the tensor's dtype, nearest and ties to even."""
    count = int(np.prod(state.shape))
    absmax = np.repeat(decoded_absmax(state), BLOCK)[:count]
    return round_to(CODE[unpack(state.packed, count)] * absmax, state.dtype).reshape(state.shape)


def ulps_to_threshold(x):
    """Per element: the distance of its normalized value to the nearest threshold, in ulps of that threshold."""
    flat = np.ascontiguousarray(x, dtype=np.float32).reshape(-1)
    y = normalized(padded_blocks(flat, BLOCK))[0].reshape(-1)[: flat.size]
    above = np.clip(np.searchsorted(THRESHOLD, y), 0, 14)
    below = np.clip(above - 1, 0, 14)
    y = y.astype(np.float64)
    distances = [np.abs(y - THRESHOLD[i]) / np.spacing(np.abs(THRESHOLD[i])) for i in (above, below)]
    return np.minimum(*distances)


# --- comparison with bitsandbytes -------------------------------------------------------------------------------------
def bnb_quantize(x, nested, dtype="bf16"):
    """bitsandbytes' CPU result as Quantized, and its own (packed tensor, quant_state) for its decoder."""
    import bitsandbytes.functional as bnb
    import torch

    stored = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype]
    tensor = torch.from_numpy(np.ascontiguousarray(x)).to(stored)
    packed, theirs = bnb.quantize_4bit(tensor, blocksize=BLOCK, compress_statistics=nested, quant_type="nf4")
    state = Quantized(tuple(x.shape), packed.numpy().reshape(-1).copy(), None, dtype=dtype)
    if not nested:
        return replace(state, absmax=theirs.absmax.numpy().copy()), (packed, theirs)
    return (
        replace(
            state,
            offset=np.float32(theirs.offset.item()),
            absmax8=theirs.absmax.numpy().copy(),
            absmax32=theirs.state2.absmax.numpy().copy(),
            map=theirs.state2.code.numpy().copy(),
        ),
        (packed, theirs),
    )


def bnb_dequantize(packed_and_state):
    """bitsandbytes' own decode, as float32."""
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(*packed_and_state).float().numpy()


def compare_with_bnb(x, dtype):
    """Counts of differences between this file and bitsandbytes for one tensor of values of `dtype`."""
    ours = quantize(x)
    plain, plain_raw = bnb_quantize(x, False, dtype)
    nested, nested_raw = bnb_quantize(x, True, dtype)
    count = x.size
    mine, theirs = (unpack(p, count) for p in (ours.packed, plain.packed))
    zero = np.repeat(ours.absmax == 0, BLOCK)[:count]
    different = (mine != theirs) & ~zero
    same_offset = quantize(x, offset=nested.offset)
    return {
        "elements": count,
        "codes_differ": int(different.sum()),
        "codes_differ_not_tie": int((different & (ulps_to_threshold(x) > 2)).sum()),
        "zero_blocks": ours.zero_blocks,
        "absmax_differ": int((ours.absmax != plain.absmax).sum()),
        "offset_ulps": float(abs(np.float64(ours.offset) - nested.offset) / np.spacing(ours.offset)),
        "absmax32_differ": int((same_offset.absmax32 != nested.absmax32).sum()),
        "blocks": ours.absmax.size,
        "absmax8_differ": int((same_offset.absmax8 != nested.absmax8).sum()),
        "absmax8_most": int(np.abs(same_offset.absmax8.astype(int) - nested.absmax8.astype(int)).max()),
        "map_ulps": float(np.max(np.abs(nested.map.astype(np.float64) - MAP) / np.spacing(np.abs(MAP)))),
        "w_plain_differ": int((dequantize(plain) != bnb_dequantize(plain_raw)).sum()),
        "w_nested_differ": int((dequantize(nested) != bnb_dequantize(nested_raw)).sum()),
    }


def seed_made_tensors():
    """{name: (values, dtype)}: ordinary, ragged widths, whole zero blocks, outliers, values on and beside thresholds.

    Width 80 stands for the widths that are divisible by 16 but not by 64, where bitsandbytes' AVX-512 decode is wrong.
    """
    import qshard_tiny

    def normal(name, *shape):
        return qshard_tiny.normals(5, name, int(np.prod(shape))).reshape(shape)

    outliers = normal("outliers", 96, 576)
    outliers[::7, ::53] *= 40
    zeros = normal("zeros", 64, 192)
    zeros.reshape(-1)[3 * 64 : 9 * 64] = 0
    on_threshold = np.resize(np.concatenate([THRESHOLD, np.nextafter(THRESHOLD, 9), [1.0]]), (40, 64))
    cases = {
        "normal 256x576": normal("a", 256, 576) * 0.05,
        "normal 512x1536": normal("b", 512, 1536) * 0.02,
        "ragged 72x200": normal("c", 72, 200),
        "ragged 200x72": normal("d", 200, 72),
        "ragged 80x72": normal("e", 80, 72),
        "ragged 72x80": normal("h", 72, 80),
        "odd 33x77": normal("f", 33, 77),
        "outliers 96x576": outliers,
        "zero blocks 64x192": zeros,
        "tiny values 32x64": normal("g", 32, 64) * 1e-30,
    }
    tensors = {name: (round_to(values.astype(np.float32), "bf16"), "bf16") for name, values in cases.items()}
    tensors["thresholds 40x64"] = (on_threshold.astype(np.float32), "f32")
    return tensors


def main():
    print("tensor, then counts that differ from bitsandbytes (W: dequantized, given bitsandbytes' own state)")
    wrong = 0
    for name, (x, dtype) in seed_made_tensors().items():
        c = compare_with_bnb(x, dtype)
        print(
            f"{name:20s} codes {c['codes_differ']} (no tie: {c['codes_differ_not_tie']}) of {c['elements']}, "
            f"zero blocks {c['zero_blocks']}, absmax {c['absmax_differ']} of {c['blocks']}, "
            f"offset {c['offset_ulps']:.0f} ulp, absmax8 {c['absmax8_differ']} (most {c['absmax8_most']}), "
            f"absmax32 {c['absmax32_differ']}, "
            f"map {c['map_ulps']:.0f} ulp, W plain {c['w_plain_differ']}, W nested {c['w_nested_differ']}"
        )
        wrong += c["codes_differ_not_tie"] + c["absmax_differ"] + c["absmax32_differ"]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
