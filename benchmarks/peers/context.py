"""What every case gets: options, the program, the peers, what the machine has."""
import json
import os
import time

from . import ours, stats
from .client import WAITS_ASLEEP, Peer

# Each aim's peer setting: torch's dtype by the name in the tables.
SETTINGS = {"fp32": "float32", "bf16": "bfloat16"}


class Context:
    def __init__(self, options):
        self.options, self.quick, self.work = options, options.quick, os.path.abspath(options.work)
        os.makedirs(self.work, exist_ok=True)
        self.threads = options.threads
        self.program = ours.Program(options.qshard, self.threads, self.work)
        self.cpu = ours.this_cpu()
        self.started = time.monotonic()
        self.hurried = options.seconds > 0
        self.left_out = []  # of the case under way
        self.peer_settings = {}

    def turns(self, usual):
        """How often each side has its turn: --turns, or what the case wants; once for a smoke run and in a hurry."""
        return self.options.turns or (1 if self.quick or self.hurried else usual)

    def has_time(self, what, seconds=0.0):
        """Whether what takes about that long still fits into --seconds; what does not is left out by name."""
        fits = not self.hurried or time.monotonic() - self.started + seconds <= self.options.seconds
        if not fits:
            self.left_out.append(what)
            self.log(f"{what}: left out, does not fit into {self.options.seconds:.0f} s")
        return fits

    def peer(self, **more):
        return Peer(self.options.peer_python, self.threads, self.work, settings=self.peer_settings, **more)

    def choose_peer_settings(self):
        """Lets the peer's threads wait in the way that makes its decode and product in fp32 faster. Its versions."""
        seconds, versions = [], {}
        for settings in ({}, WAITS_ASLEEP):
            self.peer_settings = settings
            with self.peer() as peer:
                versions = peer.ask("about")
                answer = peer.ask("gemm", direction="forward", out=2048, tokens=512, dtype="float32", compiled=False,
                                  repeats=5, slow_s=60.0, **{"in": 2048})
                seconds.append(stats.figure(answer["seconds"])["median"])
        self.peer_settings = WAITS_ASLEEP if seconds[1] < seconds[0] else {}
        self.log(f"the peer's product takes {1e3 * seconds[0]:.0f} ms, with threads that wait asleep {1e3 * seconds[1]:.0f} ms: "
                 f"{'so they do' if self.peer_settings else 'so they spin'}")
        return versions

    def path(self, *parts):
        return os.path.join(self.work, *parts)

    def log(self, text):
        print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    def bounds(self):
        """{"copy GB/s", "products GFLOP/s"}, measured now by the program."""
        report = self.program.bench("gemm", "--shape", "512x512", "--tokens", "64", "--repeats", "1")
        return report["bounds"]

    # --- models: {"name", "folder", "base"}
    def small_model(self):
        return self._model("SmolLM2-135M", self.options.model)

    def big_model(self):
        """TinyLlama's shape; in a smoke run the small model stands for it."""
        if self.quick:
            return self.small_model()
        from . import models  # its packages are needed by those cases alone

        self.log("the checkpoint of 1.1B, 2.2 GB, made up")
        return self._model("Llama 1.1B", models.llama_1b(self.path("llama-1b")))

    def _model(self, name, folder):
        base = self.path(name.split()[-1] + ".h5")
        if not os.path.exists(base):
            self.program.quantize(folder, base)
        return {"name": name, "folder": folder, "base": base}

    def quantized_for_peer(self, model):
        """{"folder", "seconds", "mib"}: the model as transformers and bitsandbytes save it, made once, so that the peer does
        not quantize at each of its starts. PeerError or stats.Gone where that fails."""
        folder = self.path("bitsandbytes-" + model["name"].split()[-1])
        made = os.path.join(folder, "made.json")
        if not os.path.exists(made):
            self.log(f"{model['name']} quantized by transformers and bitsandbytes")
            with self.peer(keeps_memory=False) as peer:
                answer = peer.ask("quantize_transformers", model=model["folder"], out=folder)
                answer["mib"] = peer.ask("peak")["mib"]
            with open(made, "w", encoding="utf-8") as file:
                json.dump(answer, file)
        with open(made, encoding="utf-8") as file:
            return {**json.load(file), "folder": folder}

    def workload(self, model, length, sequences, batch=1, adapter=""):
        """Settings of ours.Program.train for random sequences of `length` tokens; the file of tokens is made."""
        tokens = self.path(f"{model['name'].split()[-1]}-{length}-{sequences}.h5")
        if not os.path.exists(tokens):
            from . import models

            models.write_tokens(tokens, model["folder"], sequences, length)
        return {"base": model["base"], "tokens": tokens, "length": length, "batch": batch, "adapter": adapter,
                "recompute": "none", "gemm": "auto"}
