"""A bf16 checkpoint to NF4 with double quantization: ours against bitsandbytes on the CPU, bytes compared."""
import json
import os
import struct
import sys
import time

import numpy as np

from . import stats
from .tables import AIMS, judged

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "tests", "oracle"))

from base_reader import Base  # noqa: E402  (needs the path)

KINDS = {"U8": np.uint8, "F32": np.float32, "BF16": np.uint16}


class Tensors:
    """A safetensors file, a tensor at a time."""

    def __init__(self, path):
        self.file = open(path, "rb")  # noqa: SIM115  (closed by close)
        size = struct.unpack("<Q", self.file.read(8))[0]
        self.entries, self.begin = json.loads(self.file.read(size)), 8 + size

    def close(self):
        self.file.close()

    def read(self, name):
        entry = self.entries[name]
        begin, end = entry["data_offsets"]
        self.file.seek(self.begin + begin)
        return np.frombuffer(self.file.read(end - begin), dtype=KINDS[entry["dtype"]])


def differences(base_path, peer_path):
    """How many codes, first-level absmax bytes (of the second level's codes) and nested absmax differ, and of how many."""
    base, theirs = Base(base_path), Tensors(peer_path)
    counts = dict.fromkeys(("codes", "of", "absmax8", "blocks", "absmax32", "groups", "offsets"), 0)
    for name in base.names("nf4"):
        ours = base.nf4(name)
        packed = theirs.read(name)
        unlike = packed ^ ours.packed
        counts["codes"] += int(np.count_nonzero(unlike & 15) + np.count_nonzero(unlike >> 4))
        counts["of"] += 2 * packed.size
        absmax = theirs.read(name + ".absmax")
        counts["absmax8"] += int(np.count_nonzero(absmax != ours.absmax8))
        counts["blocks"] += absmax.size
        nested = theirs.read(name + ".nested_absmax")
        counts["absmax32"] += int(np.count_nonzero(np.abs(nested - ours.absmax32) > 1e-6 * np.abs(nested)))
        counts["groups"] += nested.size
    base.close()
    theirs.close()
    return counts


def run(context):
    model = context.big_model()
    outputs = {"ours": context.path("quantized.h5"), "theirs": context.path("quantized.safetensors")}
    peaks = {"ours": [], "theirs": []}

    def our_turn():
        begin = time.perf_counter()
        peaks["ours"].append(context.program.quantize(model["folder"], outputs["ours"]))
        return time.perf_counter() - begin

    def their_turn():
        with context.peer(keeps_memory=False) as peer:  # a fresh one each time, for its peak; its start is not timed
            before = peer.ask("about") and peer.ask("peak")["mib"]
            answer = peer.ask("quantize", model=model["folder"], out=outputs["theirs"])
            peaks["theirs"].append(peer.ask("peak")["mib"])
        return {**answer, "before": before}

    def read_once():
        """So that not only the side that comes first waits for the disk."""
        with open(os.path.join(model["folder"], "model.safetensors"), "rb") as file:
            while file.read(1 << 24):
                pass

    read_once()
    context.log(f"quantize {model['name']}")
    results = stats.in_turns({"theirs": their_turn, "ours": our_turn}, context.turns(2))
    theirs = [answer["seconds"] for answer in results["theirs"]]
    size = os.path.getsize(os.path.join(model["folder"], "model.safetensors"))
    read = [size / seconds / 1e9 for seconds in results["ours"]]
    row = {"what": f"{model['name']}, {size / 1e9:.1f} GB", "unit": "s", "wrong": [],
           "ours": {"quantize": {**stats.figure(results["ours"]), "mib": max(peaks["ours"])}},
           "theirs": {"bitsandbytes, a tensor at a time": {**stats.figure(theirs), "mib": max(peaks["theirs"])}},
           "ratios": {"bitsandbytes": judged(stats.ratio(results["ours"], theirs), AIMS["quantize"]["bitsandbytes"])},
           "facts": {"in its quantize_4bit alone": f"{results['theirs'][0]['quantize_s']:.1f} s",
                     "its modules alone": f"{results['theirs'][0]['before']:.0f} MiB",
                     "qshard reads": f"{stats.figure(read)['median']:.2f} GB/s, a copy does "
                                     f"{context.bounds()['copy GB/s']:.1f}"}}
    once = context.quantized_for_peer(model)
    row["theirs"]["transformers, from_pretrained and save"] = {**stats.figure([once["seconds"]]), "mib": once["mib"],
                                                               "note": "once"}
    counts = differences(outputs["ours"], outputs["theirs"])
    row["facts"]["differ"] = (f"{counts['codes']} of {counts['of']} codes, {counts['absmax8']} of {counts['blocks']} absmax, "
                              f"{counts['absmax32']} of {counts['groups']} nested absmax")
    if counts["codes"] > 1e-6 * counts["of"] or counts["absmax8"] > 1e-2 * counts["blocks"] or counts["absmax32"]:
        row["wrong"].append(f"bytes differ: {row['facts']['differ']}")
    for path in (outputs["ours"], outputs["theirs"]):
        os.unlink(path)
    return [row]
