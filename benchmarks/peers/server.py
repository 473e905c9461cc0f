"""The peers' side: torch, transformers, peft, bitsandbytes. Reads a JSON request a line, prints a JSON answer a line.

    server.py THREADS

Started by client.Peer in the environment of tests/oracle/setup.sh.
"""
import json
import os
import resource
import sys
import traceback

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from peers import peer_model, peer_ops, peer_quantize  # noqa: E402  (needs the path)


def peak(_):
    """MiB, the largest resident set of this process so far."""
    return {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


ASKED = {"about": peer_ops.about, "gemm": peer_ops.gemm, "decode": peer_ops.decode, "load": peer_model.load,
         "step": peer_model.step, "quantize": peer_quantize.lean, "quantize_transformers": peer_quantize.transformers_way,
         "peak": peak}


def main():
    import torch

    threads = int(sys.argv[1])
    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries that print must not be taken for answers
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = ASKED[request.pop("what")](request)
        except Exception as error:  # whatever it is, the other side has to hear of it
            traceback.print_exc()
            text = str(error).strip().splitlines() or [""]
            answer = {"failed": f"{type(error).__name__}: {text[0]}",
                      "memory": isinstance(error, MemoryError) or "not enough memory" in str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
