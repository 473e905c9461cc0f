"""Two network namespaces as two hosts: the same bits over a network as in one machine's memory."""
import json
import os
import re
import shutil
import unittest

import support
from hosts import SKIP, HostsTest


IOFAULT = os.path.join(os.path.dirname(support.QSHARD), "tests", "libiofault.so")
EMULATED = os.path.join(os.path.dirname(support.QSHARD), "libqshard_emulated.so")


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
            self.assertEqual("auto is node: gathering" in done.stdout + done.stderr, group == "auto", done.stdout + done.stderr)
            self.assertEqual("the base is shared by groups of at most 2 ranks" in done.stdout + done.stderr, group == "auto")
            lines[group] = support.metrics(output, "ranks.jsonl")[-4:]
        self.assertEqual(support.curve(os.path.join(folder, "auto")), support.curve(os.path.join(folder, "world")))
        for world, node in zip(lines["world"], lines["auto"]):
            # Two of the three peers that a gather hears from are on the other host, or none.
            across = 2 * world["gathered_bytes"] // 3
            self.assertGreater(across, 0)
            self.assertGreaterEqual(world["foreign_bytes"] - node["foreign_bytes"], across)
            self.assertGreater(node["foreign_bytes"], 0)
            self.assertLess(node["gathered_bytes"], world["gathered_bytes"])

    def test_a_copy_on_each_host_gives_way_to_the_rest_of_the_plan(self):
        """Where the run fits beside one copy of the base, not beside one a host, auto is world in the end: the same bits, and it says so.
        With five ranks the two of one host lack memory, and the three of the other hear of it."""
        folder = support.scratch()
        alone = os.path.join(folder, "alone")
        settings = {"train__steps": 4, "train__eval_every": 0, "train__gather_group": 1}
        support.train(alone, **settings)
        for ranks in (4, 5):
            def train(name, *options, **more):
                return self.hosts("run", ranks, support.QSHARD, "train", support.TINY_YAML, *options,
                                  *support.settings(support.tiny(), os.path.join(folder, name), **settings, **more),
                                  QSHARD_HOSTS_MAP="slot")
            needed = {}
            for group in ("node", "world"):
                done = train(group, "--dry-run", shard__group=group, memory__device_limit=1)
                self.assertEqual(done.returncode, 7, done.stdout + done.stderr)
                needed[group] = int(re.search(r"a rank would need (\d+)", done.stderr)[1])  # rank 0's
            limit = needed["node"] if ranks == 5 else sum(needed.values()) // 2
            with self.subTest(ranks=ranks, limit=limit, **needed):
                output = os.path.join(folder, f"auto-{ranks}")
                done = train(f"auto-{ranks}", memory__device_limit=limit)
                said = done.stdout + done.stderr
                self.assertEqual(done.returncode, 0, said)
                self.assertNotIn("auto is node", said)  # which it was before the rest of the plan was made
                self.assertNotIn("shared by groups", said)
                self.assertEqual(said.count("shard.group: auto is world"), 1, said)
                self.assertIn("auto is world: with a copy of the base on each node a rank would lack", said)
                self.assertEqual([line["shard_group"] for line in support.metrics(output, "ranks.jsonl")[-ranks:]], [ranks] * ranks)
                self.assertEqual(support.curve(output), support.curve(alone))
                self.assertEqual(train("node", shard__group="node", memory__device_limit=limit).returncode, 7)

    def test_a_rank_that_has_its_host_to_itself(self):
        """Of three ranks the last has a whole copy of the base and gathers nothing: what all settle together, auto among it, they
        settle together, and what gathers take is told by those who gather."""
        folder = support.scratch()
        alone = os.path.join(folder, "alone")
        support.train(alone, train__steps=3, train__eval_every=0)
        for keep, told in (("auto", 0), ("none", 1)):  # layers that all stay are not gathered
            with self.subTest(keep_resident=keep):
                output = os.path.join(folder, keep)
                done = self.hosts("run", 3, support.QSHARD, "train", support.TINY_YAML,
                                  *support.settings(support.tiny(), output, train__steps=3, train__eval_every=0, shard__group="node",
                                                    shard__keep_resident=keep), QSHARD_HOSTS_MAP="slot")
                self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
                self.assertEqual(len(re.findall(r"gathers: a layer's takes .* MB from 1 rank: ", done.stderr)), told, done.stderr)
                self.assertEqual([line["shard_group"] for line in support.metrics(output, "ranks.jsonl")[-3:]], [2, 2, 1])
                self.assertEqual(support.curve(output), support.curve(alone))
                self.assertEqual(support.adapter_digest(output), support.adapter_digest(alone))

    def test_a_host_sends_its_sum_once(self):
        """Ranks of a host that are neighbours add up first: what crosses the cable is, byte for byte, each host's nodes of the slot
        tree and its new weights, and a few words that keep the ranks together."""
        folder, lines = support.scratch(), {}
        alone = os.path.join(folder, "alone")
        support.train(alone, train__steps=8, train__eval_every=0)
        for order, group in (("slot", "node"), ("node", "node"), ("slot", "world")):
            for steps in (3, 8):
                output = os.path.join(folder, f"{order}-{group}-{steps}")
                done = self.hosts("run", 4, support.QSHARD, "train", support.TINY_YAML,
                                  *support.settings(support.tiny(), output, train__steps=steps, train__eval_every=0,
                                                    shard__group=group), QSHARD_HOSTS_MAP=order)
                self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
                self.assertEqual(done.stderr.count("warning: ranks are dealt out to the hosts in turns: "), order == "node", done.stderr)
                lines[order, group, steps] = support.metrics(output, "ranks.jsonl")[-4:]
            self.assertEqual(support.curve(output), support.curve(alone))
            self.assertEqual(support.adapter_digest(output), support.adapter_digest(alone))

        def per_step(order, group, what, rank):
            return (lines[order, group, 8][rank][what] - lines[order, group, 3][rank][what]) / 5

        layers, shards = lora_shards(os.path.join(support.tiny(), "model", "config.json"), lora_rank=8, ranks=4)
        # 5 slots: host 0 has 0, 1 and sends (0 1); host 1 has 2, 3, 4 and sends (2 3) and (4)
        nodes_of_the_other = [2, 2, 1, 1]
        rows = 2 * 2 * 64 * (128 * 2 + 4)  # most of the embedding that a rank asks for: tokens, bf16 rows and ids
        for rank in range(4):
            two_levels, peer = per_step("slot", "node", "foreign_bytes", rank), (rank + 2) % 4
            formula = 4 * layers * (nodes_of_the_other[rank] * shards[rank] + shards[peer])
            self.assertGreaterEqual(two_levels, formula)
            self.assertLess(two_levels, formula + 2048)
            self.assertGreater(per_step("node", "node", "foreign_bytes", rank), 1.4 * two_levels)
            # one base over both hosts: two of the three peers that a gather hears from are on the other one
            rest = per_step("slot", "world", "foreign_bytes", rank) - two_levels
            gathered = 2 / 3 * per_step("slot", "world", "gathered_bytes", rank)
            self.assertGreaterEqual(rest, gathered - 1)
            self.assertLess(rest, gathered + rows + 2048)

    @unittest.skipUnless(os.path.exists(EMULATED), "libqshard_emulated.so is not built")
    def test_two_levels_of_gpus(self):
        """Two hosts of two (emulated) cards each, sums inside first: the bits of one card. What a rank opens of NCCL is what the plan
        counts: the world, a host's cards, one of each host, and with a copy of the base on each card no further one."""
        folder, gpus = support.scratch(), {"QSHARD_PLUGIN": EMULATED, "QSHARD_EMULATOR_DEVICES": "2"}
        small = {"device": "cuda", "train__steps": 2, "train__global_batch": 5, "train__micro_batch": 1,
                 "train__eval_every": 0, "data__eval": ""}
        alone = os.path.join(folder, "alone")
        support.train(alone, environment=gpus, **small)
        for group in ("node", 1):
            across = os.path.join(folder, f"across-{group}")
            done = self.hosts("run", 4, support.QSHARD, "train", support.TINY_YAML,
                              *support.settings(support.tiny(), across, shard__group=group, **small), "--allow-shared-device", "--verbose",
                              QSHARD_HOSTS_MAP="slot", **gpus)  # the cards of both hosts have the same names
            said = done.stdout + done.stderr
            self.assertEqual(done.returncode, 0, said)
            self.assertIn("between 2 hosts of 2 ranks", said)
            self.assertEqual(re.findall(r"NCCL: (\d+) communicators", said), 4 * ["3"])
            self.assertRegex(said, r"(?m)^  NCCL, 3 communicators +2560\.0$")
            self.assertEqual(support.curve(across), support.curve(alone))
            self.assertEqual(support.adapter_digest(across), support.adapter_digest(alone))

    @unittest.skipUnless(os.path.exists(EMULATED), "libqshard_emulated.so is not built")
    def test_ranks_that_would_share_a_gpu_are_named_with_their_host(self):
        """Two cards on h1, one on h2, two ranks each: rank 0, which speaks, is on the host where nothing is wrong."""
        cards = 'case $(hostname) in h1) export CUDA_VISIBLE_DEVICES=0,1 QSHARD_EMULATOR_DEVICES=2 ;; ' \
                'h2) export CUDA_VISIBLE_DEVICES=2 QSHARD_EMULATOR_DEVICES=1 ;; esac; exec "$@"'
        done = self.hosts("run", 4, "sh", "-c", cards, "cards", support.QSHARD, "train", support.TINY_YAML, "--dry-run",
                          *support.settings(support.tiny(), os.path.join(support.scratch(), "run"), device="cuda"),
                          QSHARD_HOSTS_MAP="slot", QSHARD_PLUGIN=EMULATED)
        self.assertEqual(done.returncode, 8, done.stdout + done.stderr)
        said = re.findall(r"^error\[.*", done.stdout + done.stderr, re.M)
        self.assertEqual(len(said), 1, said)
        self.assertRegex(said[0], r"^error\[E801\] device: cuda: 2 ranks on h2 see 1 GPU, and ranks 2 and 3 would share one: ")

    def quantize(self, output, ranks=2, **more):
        """The tiny model's base by both hosts; `more` is in the environment of each rank."""
        words = [f"{name}={value}" for name, value in more.items()]
        return self.hosts("run", ranks, "env", *words, support.QSHARD, "quantize", os.path.join(support.tiny(), "model"), "-o", output,
                          "--head-chunk-rows", "128")

    def test_a_base_that_two_hosts_wrote_is_read_back_whole(self):
        for ranks in (2, 3):
            output = os.path.join(support.scratch(), "base.h5")
            done = self.quantize(output, ranks)
            said = done.stdout + done.stderr
            self.assertEqual(done.returncode, 0, said)
            self.assertRegex(said, r"verify\W+\d+/\d+")
            with open(output, "rb") as made, open(os.path.join(support.tiny(), "base.h5"), "rb") as alone:
                self.assertEqual(made.read(), alone.read())
        alone = support.qshard("quantize", os.path.join(support.tiny(), "model"), "-o", os.path.join(support.scratch(), "base.h5"),
                               ranks=2)
        self.assertNotIn("verify", alone.stdout + alone.stderr)

    @unittest.skipUnless(os.path.exists(IOFAULT), "libiofault.so is not built")
    def test_a_page_of_another_hosts_cache_over_a_base_is_found(self):
        """As NFS does it: rank 1 has read back what it wrote, and then an old page comes over it. No base.h5, and one line."""
        for call in (1, 2, 3):
            with self.subTest(call=call):
                folder = support.scratch()
                output = os.path.join(folder, "base.h5")
                done = self.quantize(output, FAULT=f"io:{call}:stale", FAULT_RANK="1", FAULT_PATH=output, **support.preload(IOFAULT))
                said = done.stdout + done.stderr
                self.assertIn(f"iofault: call {call} pwrite {output}.tmp-", said)
                self.assertEqual(done.returncode, 4, said)
                errors = re.findall(r"^error\[.*", said, re.M)
                self.assertEqual(len(errors), 1, said)
                self.assertRegex(errors[0], rf"^error\[E402\] {re.escape(output)}: unit (layers|embed)\.\d+ reads back differently from what "
                                            r"was written: .* run qshard quantize on one host, or write to a local disk or another file system$")
                self.assertEqual(os.listdir(folder), [])

    def test_a_slow_cable_is_measured(self):
        """A gather cannot be faster than its bytes over the cable; the bits do not care; auto gives a node's copy more memory."""
        mbit, folder = 20, support.scratch()
        self.hosts("down")
        slow = {"QSHARD_SLOW_LINK": os.path.join(os.path.dirname(support.QSHARD), "tests", "slow_link")}
        done = self.hosts("up", mbit, **slow)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        alone = os.path.join(folder, "alone")
        support.train(alone, train__steps=4, train__eval_every=0)
        for ranks, group in ((2, "world"), (4, "auto")):
            output = os.path.join(folder, group)
            done = self.hosts("run", ranks, support.QSHARD, "train", support.TINY_YAML,
                              *support.settings(support.tiny(), output, train__steps=4, train__eval_every=0,
                                                shard__group=group), QSHARD_HOSTS_MAP="slot", **slow)
            said = done.stdout + done.stderr
            self.assertEqual(done.returncode, 0, said)
            self.assertEqual(support.curve(output), support.curve(alone))
            found = re.search(r"a layer's takes (\S+) ms \((\S+) MB from", said)
            over_the_cable_ms = 8e3 * float(found[2]) / mbit
            if group == "world":
                self.assertGreater(float(found[1]), 0.9 * over_the_cable_ms - 1)  # the cable lets half a millisecond through at once
                self.assertRegex(said, r"T\* = \d+ tokens, a pass takes 160 of a rank")
                self.assertRegex(said, r"warning: a pass takes fewer tokens")
            else:
                self.assertRegex(said, r"auto is node: .* of which 80 % may be taken")


def lora_shards(config, lora_rank, ranks):
    """Layers, and floats of a layer's LoRA vector that each rank owns: chunks of 4,096 dealt out evenly."""
    with open(config, encoding="utf-8") as file:
        c = json.load(file)
    head = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    h, q, kv, f = c["hidden_size"], head * c["num_attention_heads"], head * c["num_key_value_heads"], c["intermediate_size"]
    shapes = [(h, q), (h, kv), (h, kv), (q, h), (h, f), (h, f), (f, h)]
    chunks = -(-sum(lora_rank * (i + o) for i, o in shapes) // 4096)
    each = -(-chunks // ranks)
    return c["num_hidden_layers"], [4096 * max(0, min(each, chunks - r * each)) for r in range(ranks)]


if __name__ == "__main__":
    unittest.main()
