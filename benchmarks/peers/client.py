"""The peers' process: started in their environment, asked one thing at a time, a JSON line each way.

It stays alive between its turns, asleep, so that loading torch and a model is paid once and never timed.
"""
import json
import os
import selectors
import subprocess
import tempfile
import time

from .stats import Gone

SERVER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "server.py")

# glibc then gives no freed memory back, so that torch does not wait for fresh pages at every large tensor: the peer's best.
KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 << 20)}

# torch and bitsandbytes each bring an OpenMP of their own, whose threads wait by spinning in each other's way.
WAITS_ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}


class PeerError(Exception):
    """The peer said that something is wrong: a bug or a missing module, not a slow machine."""


class Peer:
    """`with Peer(python, threads) as peer: peer.ask("decode", out=..., limit_s=60)`."""

    def __init__(self, python, threads, scratch=None, keeps_memory=True, settings=None):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
                       "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        if scratch:
            environment["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(scratch, "inductor")
        environment.update(settings or {})
        if keeps_memory:
            environment.update(KEEPS_MEMORY)
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([python, SERVER, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, env=environment)
        self.buffer = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()

    def ask(self, what, limit_s=None, **request):
        """The answer as a dict. Gone if it takes longer than limit_s (the process is ended then) or memory is not enough."""
        if self.process.poll() is not None:
            raise Gone("the peer's process is gone")
        try:
            self.process.stdin.write(json.dumps({"what": what, **request}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._died()
        answer = json.loads(self._line(limit_s))
        if "failed" in answer:
            if answer.get("memory"):
                raise Gone("no memory: " + answer["failed"])
            raise PeerError(answer["failed"])
        return answer

    def _line(self, limit_s):
        deadline = None if limit_s is None else time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.buffer:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not selector.select(left):
                    self.process.kill()
                    raise Gone(f"over {limit_s:.0f} s")
                piece = os.read(self.process.stdout.fileno(), 1 << 16)
                if not piece:
                    self._died()
                self.buffer += piece
        line, self.buffer = self.buffer.split(b"\n", 1)
        return line

    def _died(self):
        code = self.process.wait()
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()] or ["no output"]
        if code == -9:  # the kernel's out-of-memory killer; our own kill has been told as a limit
            raise Gone("killed by the system: no memory")
        raise PeerError(f"exit {code}: {lines[-1]}")
