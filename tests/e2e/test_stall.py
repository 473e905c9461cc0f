"""A rank that is stopped, or a cable that is out, ends the job with one line and exit code 6 (train.stall_limit); a job that is stopped as a whole,
or a rank for a moment, goes on."""
import os
import re
import signal
import subprocess
import time
import unittest

import hosts
import support
from hosts import SKIP, HostsTest

EMULATED = os.path.join(os.path.dirname(support.QSHARD), "libqshard_emulated.so")
LIMIT_S = 4
STEPS = 400  # far more than pass before the stop
IN_STEPS = {"train__save_every": 0, "train__eval_every": 0}  # so that the stop is in a step: a save has twelve times as long


def processes(tag):
    """{pid: rank} of the job that was started with this tag in its environment."""
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            with open(f"/proc/{pid}/comm", encoding="utf-8") as comm, open(f"/proc/{pid}/environ", "rb") as environ:
                text = environ.read()
                rank = re.search(rb"OMPI_COMM_WORLD_RANK=(\d+)", text)
                if comm.read().strip() == "qshard" and rank and f"QSHARD_HOSTS_TAG={tag}\0".encode() in text:
                    found[pid] = int(rank[1])
        except OSError:
            pass  # gone, or not ours
    return found


class Stall(unittest.TestCase):
    def setUp(self):
        self.folder = support.scratch()
        self.output = os.path.join(self.folder, "run")
        self.tag = os.path.basename(self.folder)

    def one_step(self, ranks):
        """And a checkpoint."""
        support.train(self.output, ranks=ranks, train__steps=STEPS, train__micro_batch=1, train__max_time=0.001, expect=75, **IN_STEPS)

    def start(self, ranks=None, steps=100, limit=LIMIT_S, **more):
        how = {"train__steps": steps, "train__stall_limit": limit, "train__micro_batch": 1, **IN_STEPS, **more}
        process = support.start("train", support.TINY_YAML, *support.settings(support.tiny(), self.output, **how), ranks=ranks,
                                QSHARD_HOSTS_TAG=self.tag)
        self.addCleanup(self.end, process)
        metrics = os.path.join(self.output, "metrics.jsonl")
        while not os.path.exists(metrics) or len(support.metrics(self.output)) < 8:
            self.assertIsNone(process.poll(), "the run ended before it could be stopped")
            time.sleep(0.01)
        pids = {rank: pid for pid, rank in processes(self.tag).items()}
        self.assertEqual(sorted(pids), list(range(ranks)))
        return process, pids

    def end(self, process):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()

    def test_a_stopped_rank_ends_the_job(self):
        self.one_step(ranks=3)
        process, pids = self.start(ranks=3, steps=STEPS)
        os.kill(pids[1], signal.SIGSTOP)
        begin = time.monotonic()
        text, _ = process.communicate(timeout=90)
        self.assertLess(time.monotonic() - begin, 60)
        self.assertEqual(process.returncode, 6, text)
        said = re.findall(r"^error\[.*", text, re.M)
        self.assertEqual(len(said), 1, text)
        self.assertRegex(said[0], r"error\[E601\] step \d+: (nothing has come from rank 1 on \S+ for \d|rank [02] on \S+ has waited \d+ s for all ranks)")
        self.assertEqual(processes(self.tag), {})
        self.same_in_the_end()

    def same_in_the_end(self):
        """What was saved goes on, and ends as if nothing had been."""
        before = support.curve(self.output)
        self.assertGreaterEqual(len(before), 8)
        self.one_step(ranks=2)
        self.assertEqual(support.curve(self.output), before[:2])

    def test_a_short_stop_does_not(self):
        process, pids = self.start(ranks=2)
        os.kill(pids[0], signal.SIGSTOP)
        time.sleep(LIMIT_S / 2)
        os.kill(pids[0], signal.SIGCONT)
        text, _ = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, text)

    def test_a_rank_without_work_waits_longer(self):
        """For the only micro-batch of a step, which tells it nothing of how long that may take. Here rank 1, which has it, stands still."""
        process, pids = self.start(ranks=2, train__global_batch=1, shard__group=1)
        os.kill(pids[1], signal.SIGSTOP)
        time.sleep(4 * LIMIT_S)
        os.kill(pids[1], signal.SIGCONT)
        text, _ = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, text)

    def test_a_job_that_is_suspended_goes_on(self):
        process, pids = self.start(ranks=2)
        for pid in pids.values():
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2 * LIMIT_S)
        for pid in pids.values():
            os.kill(pid, signal.SIGCONT)
        text, _ = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, text)

    def test_without_a_limit_it_waits(self):
        process, pids = self.start(ranks=2, limit=0)
        os.kill(pids[1], signal.SIGSTOP)
        with self.assertRaises(subprocess.TimeoutExpired):
            process.wait(timeout=2 * LIMIT_S)
        os.kill(pids[1], signal.SIGCONT)
        text, _ = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, text)


@unittest.skipUnless(os.path.exists(EMULATED), "libqshard_emulated.so is not built")
class Start(unittest.TestCase):
    def test_a_rank_that_has_failed_says_so_where_another_hangs(self):
        """Rank 1 cannot have its GPU, and rank 0, which is to hear of it, stands in opening the plugin, a pipe that nobody writes to. Its
        watch ends the job, before rank 1 has lost its patience."""
        folder = support.scratch()
        pipe = os.path.join(folder, "pipe.so")
        os.mkfifo(pipe)
        each = f'case $OMPI_COMM_WORLD_RANK in 0) export QSHARD_PLUGIN={pipe} ;; 1) export QSHARD_EMULATOR_FAIL=cudaGetDeviceCount:2 ;; esac; ' \
               'exec "$@"'
        how = {"device": "cuda", "train__stall_limit": 0.5}
        done = subprocess.run(["timeout", "-k", "5", "90", "mpirun", "-np", "2", "sh", "-c", each, "each", support.QSHARD, "train",
                               support.TINY_YAML, *map(str, support.settings(support.tiny(), os.path.join(folder, "run"), **how))],
                              env=support.environment(QSHARD_PLUGIN=EMULATED, QSHARD_EMULATOR_DEVICES="2"), stdin=subprocess.DEVNULL,
                              capture_output=True, text=True)
        self.assertEqual(done.returncode, 6, done.stderr)
        hang, cause = sorted(re.findall(r"^error\[.*", done.stderr, re.M))
        self.assertRegex(hang, r"^error\[E601\] start: rank 0 on \S+ has not got on for \d+ s, and waits for no other")
        self.assertRegex(cause, r"^error\[E801\] GPU 0 was asked for, but there are fewer \(rank 1 on \S+\)$")


@unittest.skipIf(SKIP is not None, SKIP)
class Cable(HostsTest):
    def test_a_cable_that_is_out_ends_all_ranks(self):
        """Each rank by itself: the launcher may wait for ever for a host that it does not reach."""
        output = os.path.join(support.scratch(), "run")
        tag = f"qs{os.getpid()}"
        env = support.environment(1, QSHARD_HOSTS_TAG=tag)
        how = {"train__steps": STEPS, "train__stall_limit": LIMIT_S, **IN_STEPS}
        log = os.path.join(os.path.dirname(output), "log")  # a file: whoever outlives the launcher would keep a pipe open
        with open(log, "w", encoding="utf-8") as file:
            process = subprocess.Popen(["bash", hosts.SCRIPT, "run", "4", support.QSHARD, "train", support.TINY_YAML,
                                        *map(str, support.settings(support.tiny(), output, **how))], env=env, stdin=subprocess.DEVNULL,
                                       stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            metrics = os.path.join(output, "metrics.jsonl")
            while not os.path.exists(metrics) or len(support.metrics(output)) < 8:
                self.assertIsNone(process.poll(), "the run ended before the cable was out")
                time.sleep(0.01)
            self.assertEqual(len(processes(tag)), 4)
            subprocess.run(["ip", "-n", f"{tag}-h1", "link", "set", "eth0", "down"], check=True)
            end = time.monotonic() + 60
            while processes(tag) and time.monotonic() < end:
                time.sleep(0.1)
            self.assertEqual(processes(tag), {})
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with open(log, encoding="utf-8") as file:
            text = file.read()
        self.assertRegex(text, r"error\[E601\] step \d+: ")


if __name__ == "__main__":
    unittest.main()
