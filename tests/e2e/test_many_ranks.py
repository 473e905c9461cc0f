"""64 ranks on this machine, however few its cores: the bits of one rank, and what each of them holds and receives stays within
what it should. Waiting ranks give their core away (mpi_yield_when_idle), so that this takes seconds, not minutes."""
import os
import re
import time
import unittest

import support

RANKS = 64
LIMIT_S = 150 * int(os.environ.get("QSHARD_TEST_SLOWDOWN", "1"))

# A micro-batch for each rank; the evaluation has fewer, so that most ranks only join its gathers.
SETTINGS = {"device": "cpu", "train__steps": 3, "train__global_batch": RANKS, "train__micro_batch": 1,
            "train__eval_every": 3, "train__save_every": 0}


class ManyRanks(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = support.scratch()
        cls.one, cls.many = os.path.join(cls.folder, "one"), os.path.join(cls.folder, "many")
        support.train(cls.one, **SETTINGS)
        started = time.monotonic()
        cls.log = support.train(cls.many, ranks=RANKS, **SETTINGS)
        cls.seconds = time.monotonic() - started
        cls.ranks = support.metrics(cls.many, "ranks.jsonl")

    def test_same_bits(self):
        curve = support.curve(self.many)
        self.assertEqual(len(curve), 4, curve)  # three steps and an evaluation
        self.assertEqual(curve, support.curve(self.one))
        self.assertEqual(support.adapter_digest(self.many), support.adapter_digest(self.one))

    def test_in_time(self):
        self.assertLess(self.seconds, LIMIT_S)

    def test_every_rank_had_its_part(self):
        self.assertEqual(sorted(line["rank"] for line in self.ranks), list(range(RANKS)))
        self.assertTrue(all(line["flops"] > 0 for line in self.ranks))

    def test_memory_is_the_plans(self):
        """No rank holds more than rank 0's plan says."""
        planned = support.plan_and_peak(self.log.stdout + self.log.stderr)["total"][0] * 2**20
        for line in self.ranks:
            self.assertLessEqual(line["peak_bytes"], planned * 1.02, line)

    def test_bench_counts_a_message_from_every_other_rank(self):
        done = support.qshard("bench", "gather", "--begin-bytes", "64K", "--end-bytes", "64K", "--repeats", 2, "--warmup", 0,
                              "--threads", 1, ranks=RANKS)
        row = re.search(r"^ +65536 .*", done.stdout, re.M)[0].split()
        self.assertEqual(row[-2:], [str(RANKS - 1), "0"], done.stdout)


if __name__ == "__main__":
    unittest.main()
