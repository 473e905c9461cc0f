"""The same bits on any number of ranks and threads, and nobody does another's work."""
import os
import subprocess
import sys
import unittest

import support


class SameBits(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = support.scratch()
        cls.reference = os.path.join(cls.folder, "reference")
        support.train(cls.reference, ranks=1)
        cls.curve = support.curve(cls.reference)
        cls.adapter = support.adapter_digest(cls.reference)

    def same_as_reference(self, name, **how):
        output = os.path.join(self.folder, name)
        support.train(output, **how)
        self.assertEqual(support.curve(output), self.curve)
        self.assertEqual(support.adapter_digest(output), self.adapter)
        return output

    def test_reference_learns(self):
        losses = [line["loss"] for line in support.metrics(self.reference) if "loss" in line]
        self.assertEqual(len(losses), 40)
        self.assertLess(sum(losses[-5:]) / 5, 0.75 * losses[0])

    def test_ranks(self):
        total = support.metrics(self.reference, "ranks.jsonl")[-1]
        for ranks in (2, 3, 4, 5, 8):
            with self.subTest(ranks=ranks):
                output = self.same_as_reference(f"ranks-{ranks}", ranks=ranks)
                self.work_adds_up(output, ranks, total)

    def work_adds_up(self, output, ranks, total):
        """Tokens, FLOPs and bytes read of the ranks sum to one rank's; no rank holds more of the base than promised."""
        lines = support.metrics(output, "ranks.jsonl")[-ranks:]
        for what in ("tokens", "targets", "flops", "read_bytes", "data_bytes"):
            self.assertEqual(sum(line[what] for line in lines), total[what], what)
        for line in lines:
            self.assertLessEqual(line["base_bytes"], base_bound(total["read_bytes"], ranks))

    def test_shard_groups(self):
        """Each group has a copy of the base, whose bytes it reads; gathers are those of its size."""
        total = support.metrics(self.reference, "ranks.jsonl")[-1]
        for ranks, group in ((4, 2), (3, 1), (8, 4), (2, "node"), (2, "world")):
            with self.subTest(ranks=ranks, group=group):
                output = self.same_as_reference(f"group-{ranks}-{group}", ranks=ranks, shard__group=group)
                lines = support.metrics(output, "ranks.jsonl")[-ranks:]
                members = group if isinstance(group, int) else ranks
                self.assertEqual(sum(line["read_bytes"] for line in lines), ranks // members * total["read_bytes"])
                for line in lines:
                    self.assertLessEqual(line["base_bytes"], base_bound(total["read_bytes"], members))
                    self.assertEqual(line["gathered_bytes"] == 0, members == 1)

    def test_layers_that_stay_and_gathers_ahead(self):
        """Other gathers, fewer with more room, the same bits."""
        gathered = {}
        for ranks, keep, prefetch in ((2, 0, 1), (2, 0, 3), (2, 1, 1), (2, 99, 1), (2, "auto", 1), (3, 1, 2)):
            with self.subTest(ranks=ranks, keep=keep, prefetch=prefetch):
                output = self.same_as_reference(f"keep-{ranks}-{keep}-{prefetch}", ranks=ranks,
                                                shard__keep_resident=keep, shard__prefetch=prefetch)
                line = support.metrics(output, "ranks.jsonl")[-1]
                gathered[ranks, keep, prefetch] = line["gathered_bytes"]
                layers = line["keep_resident"]  # 99 and auto: all that there are
                self.assertTrue(layers == keep or 1 < layers < 99)
        self.assertLess(gathered[2, 0, 3], gathered[2, 0, 1])
        self.assertLess(gathered[2, 1, 1], gathered[2, 0, 1])
        self.assertLess(gathered[2, 99, 1], gathered[2, 1, 1])
        self.assertEqual(gathered[2, "auto", 1], gathered[2, 99, 1])

    def test_ranks_that_are_no_multiple_of_the_group(self):
        done = support.train(os.path.join(self.folder, "uneven"), ranks=3, shard__group=2, expect=2)
        self.assertRegex(done.stderr, r"error\[E203\] shard.group: 2, but the run has 3 ranks")

    def test_threads_without_mpirun(self):
        for threads in (1, 2):
            with self.subTest(threads=threads):
                self.same_as_reference(f"threads-{threads}", threads=threads)

    def test_recompute_and_gather_group_do_not_change_bits(self):
        for recompute, group in (("selective", 1), ("none", 2), ("full", 5)):
            with self.subTest(recompute=recompute, group=group):
                self.same_as_reference(f"{recompute}-{group}", ranks=2, train__recompute=recompute,
                                       train__gather_group=group)

    def test_instruction_sets_give_the_same_curve(self):
        """Every step of a short run. --version tells that the variable has really chosen the kernels."""
        curves = {}
        for isa in (None, "avx2", "portable"):
            chosen = {} if isa is None else {"QSHARD_CPU_ISA": isa}
            if isa is not None:
                self.assertIn(f"{isa} kernels", support.qshard("--version", **chosen).stdout)
            output = os.path.join(self.folder, f"isa-{isa}")
            support.train(output, environment=chosen, train__steps=4)
            curves[isa] = (support.curve(output), support.adapter_digest(output))
        self.assertEqual(len(curves[None][0]), 5)  # four steps and the evaluation
        self.assertEqual(curves["avx2"], curves[None])
        self.assertEqual(curves["portable"], curves[None])


class Layers(unittest.TestCase):
    """Norms behind the branches have to find their inputs again, whatever was kept; two tables of angles; gradients in the
    place of what they are of; layers without angles; a stream in another scale."""
    MODELS = {"gemma2": support.GEMMA2, "gemma3": support.GEMMA3, "phi3": support.PHI3, "olmo3": support.OLMO3,
              "smollm3": support.SMOLLM3, "granite": support.GRANITE}

    def test_recompute_groups_and_ranks_do_not_change_bits(self):
        for name, options in self.MODELS.items():
            folder, how = support.scratch(), {"base": support.base_of(*options), "train__steps": 4}
            support.train(os.path.join(folder, "reference"), **how)
            curve = support.curve(os.path.join(folder, "reference"))
            adapter = support.adapter_digest(os.path.join(folder, "reference"))
            for recompute, group, ranks in (("selective", 1, 1), ("none", 2, 3), ("full", 5, 2)):
                with self.subTest(model=name, recompute=recompute, group=group):
                    output = os.path.join(folder, recompute)
                    support.train(output, ranks=ranks, train__recompute=recompute, train__gather_group=group, **how)
                    self.assertEqual(support.curve(output), curve)
                    self.assertEqual(support.adapter_digest(output), adapter)

    def test_resumed_merged_and_sampled(self):
        """Stopped after a step and continued: the same bits. The merged checkpoint is one that is read again."""
        for name, options in self.MODELS.items():
            with self.subTest(model=name):
                folder, how = support.scratch(), {"base": support.base_of(*options), "train__steps": 4}
                whole, stopped, merged = (os.path.join(folder, run) for run in ("whole", "stopped", "merged"))
                support.train(whole, **how)
                support.train(stopped, expect=75, train__max_time=0.001, **how)
                support.train(stopped, ranks=2, **how)
                self.assertEqual(support.curve(stopped), support.curve(whole))
                self.assertEqual(support.adapter_digest(stopped), support.adapter_digest(whole))
                support.qshard("merge", whole, "-o", merged, "--base", how["base"])
                again = os.path.join(folder, "again.h5")
                support.qshard("quantize", merged, "-o", again, "--head-chunk-rows", "128")
                self.assertIn(options[1], support.qshard("inspect", again).stdout)
                loss = [float(support.qshard("eval", support.TINY_YAML, *support.settings(support.tiny(), "none", base=base),
                                             *adapter).stdout.split()[1])
                        for base, adapter in ((how["base"], ()), (how["base"], ("--adapter", whole)), (again, ()))]
                # after so few steps most of the adapter is lost when its sum is quantized again, not all
                self.assertLess(loss[2], loss[0] - 0.1 * (loss[0] - loss[1]), loss)
                prompts = os.path.join(folder, "prompts.h5")
                support.python(os.path.join(support.PREP, "qshard_prep.py"), "--model", f"{support.tiny()}/model",
                               f"{support.tiny()}/model/eval.jsonl", "-o", prompts, "--seq-len", "64", "--prompts")
                said = [support.qshard("sample", support.TINY_YAML, *support.settings(support.tiny(), "none", base=how["base"]),
                                       "--adapter", whole, "--prompts", prompts, "--tokens", "6", ranks=ranks).stdout
                        for ranks in (None, 2)]
                self.assertIn("--- continuation", said[0])
                self.assertEqual(said[0], said[1])


def base_bound(total_bytes, ranks):
    """total / N + 2 max(layer, head chunk) + padding. The tiny model's largest unit is measured in the file."""
    import h5py
    largest = quanta = 0
    with h5py.File(os.path.join(support.tiny(), "base.h5"), "r") as file:
        for unit in file["units"].values():
            sizes = [unit[name].size * unit[name].dtype.itemsize
                     for name in ("packed", "absmax8", "absmax32", "raw") if name in unit]
            largest = max(largest, sum(sizes))
            quanta += 1
    # every unit is cut at whole quanta (at most one NF4 and one raw quantum more) with four sections padded to 128 bytes
    padding = quanta * (8192 + 256 + 4 + 2 * 64 * 4 + 4 * 128)
    gathered = 2 * (largest + ranks * (8452 + 512 + 4 * 128)) if ranks > 1 else 0
    return total_bytes / ranks + gathered + padding


class Binding(unittest.TestCase):
    def test_a_rank_on_one_core_of_many_is_told(self):
        """As Open MPI binds one or two ranks, unless somebody has asked for so many threads."""
        free = len(os.sched_getaffinity(0))
        core = {"OMPI_MCA_hwloc_base_binding_policy": "core", "OMP_NUM_THREADS": ""}
        bound = subprocess.run(["mpirun", "-np", "1", sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"],
                               env=support.environment(1, **core), capture_output=True, text=True)
        if bound.returncode != 0 or 2 * int(bound.stdout) > free:
            self.skipTest(f"mpirun binds to {bound.stdout.strip()} of {free} hardware threads here: {bound.stderr}")
        for environment, settings, told in ((core, {}, True), ({**core, "OMPI_MCA_hwloc_base_binding_policy": "none"}, {}, False),
                                            ({**core, "OMP_NUM_THREADS": "1"}, {}, False), (core, {"cpu__threads": 1}, False),
                                            ({**core, "SLURM_CPUS_ON_NODE": "1"}, {}, False)):
            with self.subTest(environment=environment, settings=settings):
                done = support.train(os.path.join(support.scratch(), "run"), ranks=1, options=("--dry-run",), environment=environment,
                                     **settings)
                self.assertEqual(done.stderr.count("warning: each rank is bound to one core, and this host has "), told, done.stderr)
                self.assertEqual(done.stderr.count("mpirun --bind-to none lets a rank use "), told)


if __name__ == "__main__":
    unittest.main()
