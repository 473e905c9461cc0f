"""What a step spends its time on: the numbers in metrics.jsonl, and the picture of --trace."""
import json
import os
import re
import unittest

import support

LAYERS = 4


class Trace(unittest.TestCase):
    def run_traced(self, ranks, options=(), **more):
        folder = support.scratch()
        path, output = os.path.join(folder, "trace.json"), os.path.join(folder, "run")
        support.train(output, ranks=ranks, options=("--trace", path, *options), train__eval_every=0, **more)
        with open(path, encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        spans = [(e["pid"], e["tid"], e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X"]
        lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
        return [(rank, lanes[lane], *rest) for rank, lane, *rest in spans], support.metrics(output)

    def test_spans_of_all_ranks(self):
        spans, _ = self.run_traced(3, train__steps=6)
        for rank in range(3):
            mine = [span[1:] for span in spans if span[0] == rank]
            compute = {name: (begin, end) for lane, name, begin, end in mine if lane == "compute"}
            self.assertEqual([name for name in compute if name.startswith("step")], ["step 3", "step 4"])
            self.assertEqual(len([1 for lane, n, *_ in mine if (lane, n) == ("compute", "embedding")]), 4)  # micro-batches
            for name in ("head", "sums", "update",
                         *(f"layer {i} {way}" for i in range(LAYERS) for way in ("forward", "backward"))):
                self.assertEqual(len([1 for lane, n, *_ in mine if (lane, n) == ("compute", name)]), 2, name)
            begin, end = compute["step 4"]
            last = [(lane, name, b, e) for lane, name, b, e in mine if b >= begin]
            for lane, name, b, e in last:
                self.assertLessEqual(b, e)
                self.assertLessEqual(e, end + 1, f"{lane} {name}")
            # each layer's sums start in its backward or behind it, all are over before the update
            for layer in range(LAYERS):
                (b, e), = [(b, e) for lane, name, b, e in last if (lane, name) == ("reduce", f"layer {layer}")]
                self.assertGreater(b, compute[f"layer {layer} backward"][0])
                self.assertLessEqual(e, compute["update"][0] + 1)
            # rows of the embedding travel behind the layers: those of the step's first micro-batch came a step ago, those of
            # the second leave as the first is placed; what leaves behind them is for the next step
            rows = sorted((b, e) for lane, name, b, e in last if (lane, name) == ("gather", "rows of the embedding"))
            placed = sorted((b, e) for lane, name, b, e in last if (lane, name) == ("compute", "embedding"))
            self.assertEqual((len(rows), len(placed)), (2, 2))
            self.assertGreaterEqual(rows[0][0], placed[0][0])
            self.assertLessEqual(rows[0][1], placed[1][1])
            self.assertGreaterEqual(rows[1][0], placed[1][0])
            self.assertLessEqual(rows[1][0], compute["layer 1 forward"][1])
            # a unit is gathered before its layer computes
            for lane, name, b, e in last:
                match = re.fullmatch(r"layers\.(\d+)", name)
                if lane == "gather" and match and b < compute["head"][0]:
                    self.assertLessEqual(e, compute[f"layer {match[1]} forward"][1])

    def test_parts_of_a_step_are_the_step(self):
        for ranks in (1, 2):
            _, lines = self.run_traced(ranks, train__steps=5)
            for line in (line for line in lines if "loss" in line):
                parts = sum(line[part] for part in ("wait_s", "compute_s", "reduce_s", "optimizer_s", "lora_s"))
                self.assertAlmostEqual(parts, line["step_time_s"], delta=1e-5)
                self.assertEqual(line["gather_s"] > 0, ranks > 1)
                self.assertLessEqual(line["gather_s"], line["step_time_s"])

    def test_parts_of_each_rank(self):
        """Those of all steps of a start, in ranks.jsonl; rank 0's are those in metrics.jsonl."""
        parts = ("wait_s", "compute_s", "reduce_s", "optimizer_s", "lora_s")
        output = os.path.join(support.scratch(), "run")
        support.train(output, ranks=3, train__steps=4, train__eval_every=0)
        steps = [line for line in support.metrics(output) if "loss" in line]
        ranks = support.metrics(output, "ranks.jsonl")
        self.assertEqual(len(ranks), 3)
        for line in ranks:
            self.assertAlmostEqual(sum(line[part] for part in parts), line["step_s"], delta=1e-5)
            self.assertGreater(line["compute_s"], 0)
        for part in parts:
            self.assertAlmostEqual(sum(step[part] for step in steps), ranks[0][part], delta=1e-5)

    def test_every_field_is_described(self):
        """docs/file-formats.md has a row for each, with a unit's column, under the file's heading."""
        with open(os.path.join(support.ROOT, "docs", "file-formats.md"), encoding="utf-8") as file:
            parts = dict(part.split("\n", 1) for part in file.read().split("\n### ")[1:])
        output = os.path.join(support.scratch(), "run")
        support.train(output, train__steps=2)
        with open(os.path.join(output, "summary.csv"), encoding="utf-8") as file:
            fields = {"summary.csv": file.readline().strip().split(",")}
        for name in ("metrics.jsonl", "ranks.jsonl"):
            fields[name] = {field for line in support.metrics(output, name) for field in line if not field.startswith("eval_")}
        for name, names in fields.items():
            described = {field for row in re.findall(r"(?m)^\| (`.*?) \|.*\|.*\|$", parts[name]) for field in re.findall("`(.*?)`", row)}
            self.assertEqual(described, set(names), name)
        step = support.metrics(output)[0]
        self.assertEqual(step["targets"], step["tokens"])
        self.assertEqual(support.metrics(output, "ranks.jsonl")[-1]["targets"],
                         sum(line["targets"] for line in support.metrics(output) if "loss" in line))

    def test_steps_can_be_chosen_and_a_run_may_end_before_them(self):
        spans, _ = self.run_traced(2, ("--profile-steps", "2:9"), train__steps=4)
        steps = sorted({name for *_, name, _, _ in spans if name.startswith("step")})
        self.assertEqual(steps, ["step 2", "step 3", "step 4"])

    def test_a_file_that_cannot_be_written_ends_the_run_before_it_starts(self):
        output = os.path.join(support.scratch(), "run")
        done = support.train(output, ranks=2, options=("--trace", "/nonexistent/trace.json"), expect=4)
        self.assertRegex("".join(re.findall(r"error\[E\d+\] [^:]*:", done.stderr)),
                         r"\Aerror\[E400\] /nonexistent/trace\.json:\Z")
        self.assertFalse(os.path.exists(output))

    def test_a_full_disk_costs_the_trace_and_not_the_run(self):
        library = os.path.join(os.path.dirname(support.QSHARD), "tests", "libiofault.so")
        for error in ("ENOSPC", "EIO"):  # where the file is given room; before the run it is tried in seven calls
            with self.subTest(error):
                output, path = os.path.join(support.scratch(), "run"), os.path.join(support.scratch(), "trace.json")
                fault = {**support.preload(library), "FAULT": f"io:9:{error}", "FAULT_PATH": "trace.json"}
                done = support.train(output, options=("--trace", path, "--profile-steps", "2:3"), train__steps=6, train__save_every=6,
                                     train__eval_every=0, environment=fault)
                self.assertRegex(done.stderr, r"warning: .*trace\.json\.tmp-\d+: .*; the run goes on without the trace")
                self.assertEqual([line["step"] for line in support.metrics(output) if "loss" in line], [1, 2, 3, 4, 5, 6])
                self.assertTrue(os.path.exists(os.path.join(output, "step-00000006")))
                self.assertEqual(os.listdir(os.path.dirname(path)), [])


if __name__ == "__main__":
    unittest.main()
