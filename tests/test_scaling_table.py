"""benchmarks/scaling_table.py on made-up runs: medians, speed-up, what is warned of and what is refused."""
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import unittest

TOOL = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "benchmarks", "scaling_table.py")


class Table(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="qshard-table-")
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def run_of(self, name, ranks, times, tokens=1000, hosts=None, wait=0.25, group=None, **about):
        """A run directory; the first two of `times` do not count."""
        run = os.path.join(self.folder, name)
        os.mkdir(run)
        hosts = hosts or [f"n{i}" for i in range(ranks)]
        with open(os.path.join(run, "run.json"), "w", encoding="utf-8") as file:
            json.dump({"nranks": ranks, "hosts": hosts, "finished": True, "starts": 1, "build": "abc", **about}, file)
        with open(os.path.join(run, "metrics.jsonl"), "w", encoding="utf-8") as file:
            for i, time in enumerate(times):
                file.write(json.dumps({"step": i + 1, "loss": 3.25, "all_tokens": tokens, "step_time_s": time, "wait_s": wait,
                                       "tokens_per_s": tokens / time, "gather_s": None}) + "\n")
            file.write(json.dumps({"step": len(times), "eval_loss": 3.0}) + "\n")
        with open(os.path.join(run, "ranks.jsonl"), "w", encoding="utf-8") as file:
            for step in (1, len(times)):
                for rank in range(ranks):
                    file.write(json.dumps({"step": step, "rank": rank, "peak_bytes": 100 * step + rank, "gather_group": 2,
                                           "shard_group": group or ranks, "keep_resident": 0, "keep_decoded": 0}) + "\n")
        return run

    def table(self, *words, expect=0):
        done = subprocess.run([sys.executable, TOOL, *words], capture_output=True, text=True)
        self.assertEqual(done.returncode, expect, done.stderr)
        return list(csv.DictReader(io.StringIO(done.stdout))), done.stderr

    def test_medians_speedup_and_efficiency(self):
        """Repetitions of the fewest ranks are one baseline; steps at the beginning do not count."""
        runs = [self.run_of("four", 4, [9, 9, 0.5, 0.5, 0.5]), self.run_of("one-a", 1, [9, 9, 1, 2, 4, 3]), self.run_of("one-b", 1, [9, 9, 1.25])]
        rows, said = self.table(*runs)
        self.assertEqual([row["run"] for row in rows], [runs[1], runs[2], runs[0]])
        self.assertEqual((rows[0]["step_s"], rows[0]["step_p25_s"], rows[0]["step_p75_s"], rows[0]["steps"]), ("2.5", "1.75", "3.25", "4"))
        base = (float(rows[0]["tokens_per_s"]) + 800) / 2
        self.assertAlmostEqual(float(rows[2]["speedup"]), 2000 / base, delta=1e-4)
        self.assertAlmostEqual(float(rows[2]["efficiency"]), 2000 / base / 4, delta=1e-4)
        self.assertEqual((rows[2]["peak_bytes"], rows[2]["loss"], rows[2]["nodes"]), ("503", "3.25", "4"))
        self.assertEqual(said, "")

    def test_weak_scaling_that_is_perfect(self):
        rows, _ = self.table(self.run_of("one", 1, [1] * 4), self.run_of("two", 2, [1] * 4, tokens=2000))
        self.assertEqual([(row["speedup"], row["efficiency"]) for row in rows], [("1", "1"), ("2", "1")])

    def test_what_a_device_does_not_tell_is_empty(self):
        rows, _ = self.table(self.run_of("gpu", 1, [1] * 4, wait=None))
        self.assertEqual((rows[0]["wait_s"], rows[0]["optimizer_s"]), ("", ""))

    def test_an_algorithm_that_changes_is_told(self):
        _, said = self.table(self.run_of("three", 3, [1] * 3), self.run_of("four", 4, [1] * 3, group=2, build="def"))
        self.assertIn("shard_group differs between the lines (2, 3)", said)
        self.assertIn("build differs between the lines (abc, def)", said)

    def test_a_table_is_written_whole(self):
        path = os.path.join(self.folder, "table.csv")
        self.table(self.run_of("one", 1, [1] * 3), "-o", path)
        with open(path, encoding="utf-8") as file:
            self.assertEqual(len(list(csv.DictReader(file))), 1)
        self.assertEqual(sorted(os.listdir(self.folder)), ["one", "table.csv"])

    def test_refused(self):
        short, again = self.run_of("short", 1, [1] * 2), self.run_of("again", 1, [1] * 3, starts=2)
        running = self.run_of("running", 1, [1] * 3, finished=False)
        for words, says in (((short,), "has 2 steps, of which --skip 2 leaves none"), ((again,), "was started 2 times"),
                            ((running,), "not finished: "), ((running, "--finished"), "not finished: "),
                            ((os.path.join(self.folder, "nowhere"),), "not finished: ")):
            with self.subTest(says):
                _, said = self.table(*words, expect=1)
                self.assertIn(says, said)
                self.assertEqual(said.count("\n"), 1, said)
        rows, _ = self.table(running, self.run_of("done", 2, [1] * 3), "--finished")
        self.assertEqual([row["ranks"] for row in rows], ["2"])


if __name__ == "__main__":
    unittest.main()
