"""What a rank may have of its host: a run that does not fit into a real limit ends with exit 7 before it loads, one that fits runs."""
import os
import re
import subprocess
import time
import unittest

import support

MIB = 1 << 20
# A plan of about 100 MiB, so that what a process holds beside it does not matter much.
LARGE = {"device": "cpu", "cpu__threads": 1, "train__steps": 1, "train__global_batch": 96, "train__micro_batch": 96,
         "train__recompute": "none", "train__eval_every": 0, "train__save_every": 0, "data__eval": ""}
BESIDE = 16 * MIB  # what src/train/room.c leaves to a process


def within(shell, *arguments, ranks=None, expect=0):
    """The program, started by a shell that does `shell` first; the exit code is asserted."""
    done = subprocess.run(["bash", "-c", shell + '\nexec timeout -k 5 "$@"', "bash", str(support.TIMEOUT_S),
                           *support.command(arguments, ranks)],
                          env=support.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="backslashreplace")  # a sample may be no UTF-8
    if done.returncode != expect:
        raise AssertionError(f"{shell}: exit {done.returncode}, not {expect}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def train_words(output, *options, **more):
    return ("train", support.TINY_YAML, *support.settings(support.tiny(), output, **{**LARGE, **more}), *options)


def needed(**more):
    """Bytes that a rank would need, by the program itself."""
    done = support.qshard(*train_words("unused", "--dry-run", memory__device_limit=1, **more), expect=7)
    return int(re.search(r"a rank would need (\d+)", done.stderr)[1])


@unittest.skipIf(os.environ.get("QSHARD_TEST_SLOWDOWN", "1") != "1", "sanitizers take terabytes of addresses")
class Ulimit(unittest.TestCase):
    """Of address space: any machine can limit it."""

    def setUp(self):
        self.output = os.path.join(support.scratch(), "run")
        self.needed = needed()
        self.assertGreater(self.needed, 90 * MIB)

    def test_too_little_and_enough(self):
        tight = self.needed // 1024
        done = within(f"ulimit -v {tight}", *train_words(self.output), expect=7)
        self.assertEqual(done.stderr.count("error["), 1, done.stderr)
        self.assertRegex(done.stderr, r"error\[E700\] memory of the host: a rank would need \d+ bytes and has \d+, its part of "
                                      r"[\d.]+ GiB of address space \(ulimit -v\): raise it with ulimit -v unlimited; lower train\.micro_batch")
        self.assertIn("memory of rank 0", done.stdout)
        self.assertFalse(os.path.exists(self.output))
        # What is needed beside the plan is there: with so much the run ends well, and with less it is not begun.
        has = int(re.search(r"and has (\d+),", done.stderr)[1])
        enough = tight + (self.needed - has) // 1024 + 512  # 512 KiB: where libraries are mapped changes from run to run
        within(f"ulimit -v {enough}", *train_words(self.output))
        self.assertTrue(os.path.exists(os.path.join(self.output, "summary.csv")))
        less = os.path.join(support.scratch(), "run")
        within(f"ulimit -v {enough - 4096}", *train_words(less), expect=7)
        self.assertFalse(os.path.exists(less))

    def test_each_process_has_its_own(self):
        """Two ranks do not divide it."""
        tight = self.needed // 1024
        done = within(f"ulimit -v {tight + 50 * 1024}", *train_words(self.output, train__global_batch=192), ranks=2, expect=7)
        self.assertEqual(done.stderr.count("error["), 1, done.stderr)
        self.assertIn("ulimit -v", done.stderr)
        self.assertNotIn("for 2 ranks", done.stderr)
        within(f"ulimit -v {tight + 400 * 1024}", *train_words(self.output, train__global_batch=192), ranks=2)

    def test_dry_run_and_plan(self):
        """Both say what the run says; the settings that the plan names are enough."""
        tight = self.needed // 1024
        dry = within(f"ulimit -v {tight}", *train_words(self.output, "--dry-run"), expect=7)
        self.assertIn("ulimit -v", dry.stderr)
        limit = f"ulimit -v {tight + 256 * 1024}"  # what a plan takes a rank to hold, with MPI
        done = within(limit, "plan", *train_words(self.output)[1:], expect=7)
        self.assertEqual(done.stderr.count("error["), 1, done.stderr)
        found = re.search(r"a rank needs [\d.]+ GiB and has [\d.]+ \([\d.]+ GiB of address space \(ulimit -v\); raise it with ulimit -v "
                          r"unlimited\): it fits with ([\w.]+): (\w+)", done.stderr)
        self.assertTrue(found, done.stderr)
        more = {found[1].replace(".", "__"): found[2]}
        self.assertIn("fits: a rank needs", within(limit, "plan", *train_words(self.output, **more)[1:]).stdout)
        within(limit, *train_words(self.output, "--dry-run", **more), ranks=2)

    def test_eval_and_sample(self):
        """A limit that leaves nothing to a plan: neither begins, and in a large one both go through."""
        prompts = ("--prompts", os.path.join(support.tiny(), "eval.h5"), "--tokens", "2")
        for command, ends, word in (("eval", (), "train.micro_batch"), ("sample", prompts, "fewer or shorter prompts")):
            words = (command, support.TINY_YAML, *support.settings(support.tiny(), "unused", device="cpu", cpu__threads=1), *ends)
            done = within("ulimit -v 80000", *words, expect=7)
            self.assertEqual(done.stderr.count("error["), 1, done.stderr)
            self.assertIn("raise it with ulimit -v unlimited", done.stderr)
            self.assertIn(word, done.stderr)
            self.assertIn("memory of rank 0", done.stdout)
            within("ulimit -v 400000", *words)

    def test_doctor(self):
        """A GiB less what a rank holds with MPI (256 MiB) and beside a plan (16)."""
        text = within("ulimit -v 1048576", "doctor").stdout
        self.assertRegex(text, r"for a rank +0\.73 GiB of 1\.00 GiB of address space \(ulimit -v\): raise it with ulimit -v unlimited")

    def test_data(self):
        done = within(f"ulimit -d {self.needed // 1024}", *train_words(self.output), expect=7)
        self.assertIn("ulimit -d unlimited", done.stderr)
        within(f"ulimit -d {(self.needed + 64 * MIB) // 1024}", *train_words(self.output))


class Cgroup:
    """A memory cgroup of the test's own, at the top of what is mounted here."""

    def __init__(self):
        with open("/proc/self/mountinfo", encoding="utf-8") as file:
            mounts = [line.split(" - ") for line in file]
        points = {}
        for place, kind in mounts:
            kind = kind.split()
            if kind[0] == "cgroup2" or (kind[0] == "cgroup" and "memory" in kind[2].split(",")):
                points[kind[0]] = place.split()[4]
        for kind, name in (("cgroup", "memory.limit_in_bytes"), ("cgroup2", "memory.max")):
            if kind not in points:
                continue
            self.path, self.name = os.path.join(points[kind], f"qshard-test-{os.getpid()}"), name
            try:
                os.mkdir(self.path)
            except OSError as error:
                raise unittest.SkipTest(f"no cgroup can be made in {points[kind]}: {error}")
            if os.access(os.path.join(self.path, name), os.W_OK):
                return
            os.rmdir(self.path)
        raise unittest.SkipTest("no memory controller of cgroups is mounted here, or not for us")

    def child(self, name):
        path = os.path.join(self.path, name)
        os.makedirs(path, exist_ok=True)
        return path

    def limit(self, number, below=""):
        with open(os.path.join(self.path, below, self.name), "w", encoding="utf-8") as file:
            file.write(str(number))

    def enter(self, below=""):
        return f"echo $$ > {os.path.join(self.path, below)}/cgroup.procs"

    def kills(self):
        """How often the kernel has ended a process here."""
        name = "memory.events" if self.name == "memory.max" else "memory.oom_control"
        with open(os.path.join(self.path, name), encoding="utf-8") as file:
            return int(re.search(r"oom_kill (\d+)", file.read())[1])

    def remove(self):
        for folder, _, _ in os.walk(self.path, topdown=False):
            for _ in range(50):  # a process that has ended is counted for a while
                try:
                    os.rmdir(folder)
                    break
                except OSError:
                    time.sleep(0.1)


@unittest.skipIf(os.environ.get("QSHARD_TEST_SLOWDOWN", "1") != "1", "sanitizers keep what was freed, and shadows")
class RealCgroup(unittest.TestCase):
    def setUp(self):
        self.cgroup = Cgroup()
        self.addCleanup(self.cgroup.remove)
        self.output = os.path.join(support.scratch(), "run")
        self.needed = needed()

    def test_one_rank(self):
        self.cgroup.limit(self.needed // 4096 * 4096)
        done = within(self.cgroup.enter(), *train_words(self.output), expect=7)
        self.assertEqual(done.stderr.count("error["), 1, done.stderr)
        self.assertRegex(done.stderr, r"GiB that the container or service has \(memory\.\w+ of cgroup \S*/qshard-test-\d+\): start the container")
        self.assertFalse(os.path.exists(self.output))
        self.cgroup.limit(1024 * MIB)  # it loads the GPU plugin, with cuBLAS
        text = within(self.cgroup.enter(), "doctor").stdout
        self.assertRegex(text, r"for a rank +[\d.]+ GiB of [\d.]+ GiB that the container or service has")
        # so much that the check lets it pass: the kernel must agree
        self.cgroup.limit((self.needed + BESIDE + 16 * MIB) // 4096 * 4096)
        within(self.cgroup.enter(), *train_words(self.output))
        self.assertEqual(self.cgroup.kills(), 0)

    def test_ranks_in_one_cgroup_share_it(self):
        settings = {"train__global_batch": 192}
        self.cgroup.limit((2 * self.needed + BESIDE) // 4096 * 4096)
        within(self.cgroup.enter(), *train_words(os.path.join(support.scratch(), "alone"), "--dry-run"))
        done = within(self.cgroup.enter(), *train_words(self.output, **settings), ranks=2, expect=7)
        self.assertRegex(done.stderr, r"qshard-test-\d+\) for 2 ranks: start the container")
        self.cgroup.limit((2 * (self.needed + BESIDE + 24 * MIB)) // 4096 * 4096)
        within(self.cgroup.enter(), *train_words(self.output, **settings), ranks=2)
        self.assertEqual(self.cgroup.kills(), 0)

    def test_ranks_with_a_cgroup_each_do_not(self):
        """As Slurm's tasks: mpirun starts a shell, which enters the rank's own cgroup."""
        for rank in range(2):
            self.cgroup.child(f"task_{rank}")
        if not os.access(os.path.join(self.cgroup.path, "task_0", self.cgroup.name), os.W_OK):
            with open(os.path.join(self.cgroup.path, "cgroup.subtree_control"), "w", encoding="utf-8") as file:
                file.write("+memory")
        words = train_words(self.output, train__global_batch=192)
        enter = f'echo $$ > {self.cgroup.path}/task_$OMPI_COMM_WORLD_RANK/cgroup.procs; exec "$@"'

        def start(expect):
            done = subprocess.run(["timeout", "-k", "5", str(support.TIMEOUT_S), "mpirun", "-np", "2", "bash", "-c", enter, "bash",
                                   support.QSHARD, *map(str, words)], env=support.environment(), stdin=subprocess.DEVNULL,
                                  capture_output=True, text=True)
            self.assertEqual(done.returncode, expect, done.stdout + done.stderr)
            return done.stderr

        self.cgroup.limit((self.needed + BESIDE + 24 * MIB) // 4096 * 4096, "task_0")
        self.cgroup.limit(self.needed // 4096 * 4096, "task_1")
        said = start(7)
        self.assertEqual(said.count("error["), 1, said)
        self.assertRegex(said, r"qshard-test-\d+/task_1\): start the container")
        self.cgroup.limit((self.needed + BESIDE + 24 * MIB) // 4096 * 4096, "task_1")
        start(0)
        self.assertTrue(os.path.exists(os.path.join(self.output, "summary.csv")))


if __name__ == "__main__":
    unittest.main()
