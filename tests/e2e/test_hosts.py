"""Two network namespaces as two hosts: the same bits over a network as in one machine's memory."""
import os
import shutil
import unittest

import support
from hosts import SKIP, HostsTest


@unittest.skipIf(SKIP is not None, SKIP)
class TwoHosts(HostsTest):
    def test_the_ranks_are_on_two_hosts(self):
        done = self.hosts("run", 3, "hostname")
        self.assertEqual(sorted(done.stdout.split()), ["h1", "h1", "h2"], done.stderr)

    def test_same_bits_across_hosts(self):
        folder = support.scratch()
        alone, across = os.path.join(folder, "alone"), os.path.join(folder, "across")
        support.train(alone, train__steps=6, train__eval_every=3)
        for ranks in (2, 4):
            with self.subTest(ranks=ranks):
                done = self.hosts("run", ranks, support.QSHARD, "train", support.TINY_YAML,
                                  *support.settings(support.tiny(), across, train__steps=6, train__eval_every=3))
                self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
                self.assertEqual(support.curve(across), support.curve(alone))
                self.assertEqual(support.adapter_digest(across), support.adapter_digest(alone))
                shutil.rmtree(across)

    def test_a_node_keeps_the_base_to_itself(self):
        """shard.group: auto on two hosts is node: the same bits, and only LoRA crosses the cable."""
        folder, lines = support.scratch(), {}
        for group in ("world", "auto"):
            output = os.path.join(folder, group)
            done = self.hosts("run", 4, support.QSHARD, "train", support.TINY_YAML,
                              *support.settings(support.tiny(), output, train__steps=6, shard__group=group))
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            self.assertEqual("auto is node" in done.stdout + done.stderr, group == "auto", done.stdout + done.stderr)
            lines[group] = support.metrics(output, "ranks.jsonl")[-4:]
        self.assertEqual(support.curve(os.path.join(folder, "auto")), support.curve(os.path.join(folder, "world")))
        for world, node in zip(lines["world"], lines["auto"]):
            # Two of the three peers that a gather hears from are on the other host, or none.
            across = 2 * world["gathered_bytes"] // 3
            self.assertGreater(across, 0)
            self.assertGreaterEqual(world["foreign_bytes"] - node["foreign_bytes"], across)
            self.assertGreater(node["foreign_bytes"], 0)
            self.assertLess(node["gathered_bytes"], world["gathered_bytes"])


if __name__ == "__main__":
    unittest.main()
