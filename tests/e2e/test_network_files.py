"""Runs on file systems that are not like a local one: removed files that stay while they are open, listings that fail, hosts
that get another name, processes that /proc does not show."""
import os
import re
import shutil
import subprocess
import time
import unittest

import support

NETFS = os.path.join(os.path.dirname(support.QSHARD), "tests", "libnetfs.so")
IOFAULT = os.path.join(os.path.dirname(support.QSHARD), "tests", "libiofault.so")
SHORT = {"train__steps": 6, "train__save_every": 2, "train__eval_every": 0, "train__keep_last": 1}


def netfs(wish, path):
    return {**support.preload(NETFS), "NETFS": wish, "NETFS_PATH": path}


class NetworkFiles(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.reference = os.path.join(support.scratch(), "reference")
        support.train(cls.reference, **SHORT)

    def setUp(self):
        self.folder = support.scratch()
        self.output = os.path.join(self.folder, "run")

    def same_as_reference(self):
        self.assertEqual(support.curve(self.output), support.curve(self.reference))
        self.assertEqual(support.adapter_digest(self.output), support.adapter_digest(self.reference))

    def steps(self):
        return sorted(name for name in os.listdir(self.output) if name.startswith("step-"))

    # ---- removed, and still open ----

    def test_a_new_run_where_removed_files_stay_while_they_are_open(self):
        for made in (False, True):
            for ranks in (None, 2):
                with self.subTest(made=made, ranks=ranks):
                    shutil.rmtree(self.output, ignore_errors=True)
                    if made:
                        os.mkdir(self.output)
                    support.train(self.output, ranks=ranks, environment=netfs("hidden", self.output), **SHORT)
                    self.same_as_reference()
                    self.assertEqual([name for name in os.listdir(self.output) if name.startswith(".")], [])

    def test_a_hidden_file_of_another_host_makes_a_folder_nobodys(self):
        os.mkdir(self.output)
        for name in (".nfs000000000123456700000001", ".fuse_hidden0000000300000001"):
            with open(os.path.join(self.output, name), "w", encoding="utf-8"):
                pass
        support.train(self.output, **SHORT)
        self.same_as_reference()

    # ---- what cannot be removed ----

    def test_a_checkpoint_that_cannot_be_removed_costs_no_run(self):
        """Somebody has put a folder into one that is rotated away. It stays, is named, and is gone when the folder is."""
        stopped = {**SHORT, "expect": 75, "train__max_time": 0.001}
        support.train(self.output, **stopped)
        inner = os.path.join(self.output, "step-00000001", "adapter")
        support.qshard("export", self.output, "-o", inner)
        for start in range(2):
            done = support.train(self.output, **stopped)
            self.assertEqual(len(re.findall(r"(?m)^.*warning.*step-00000001\.tmp-old: .*adapter", done.stderr)), 1, done.stderr)
            self.assertEqual(self.steps(), ["step-00000001.tmp-old", f"step-0000000{start + 2}"])
        left = os.path.join(self.output, "step-00000001.tmp-old", "adapter")
        self.assertTrue(os.path.exists(os.path.join(left, "adapter_model.safetensors")))
        shutil.rmtree(left)
        support.train(self.output, **SHORT)
        self.same_as_reference()
        self.assertEqual(self.steps(), ["step-00000006"])

    def test_a_checkpoint_that_somebody_reads_costs_no_run(self):
        """Its folder is not empty as long as they do."""
        done = support.train(self.output, environment={**support.preload(IOFAULT), "FAULT": "io:1:EIO+", "FAULT_PATH": ".tmp-old"},
                             **SHORT)
        self.assertRegex(done.stderr, r"warning.*step-00000002\.tmp-old: ")
        self.same_as_reference()
        self.assertEqual(self.steps()[-1], "step-00000006")

    # ---- listings ----

    def test_a_listing_that_fails_starts_nothing_anew(self):
        support.train(self.output, expect=75, train__max_time=0.001, **SHORT)
        before = {name: os.lstat(os.path.join(self.output, name)).st_mtime_ns for name in os.listdir(self.output)}
        for entry in ("step-", "run.json"):
            with self.subTest(entry):
                done = support.train(self.output, expect=4, environment=netfs("list:" + entry, self.output), **SHORT)
                self.assertRegex(done.stderr, r"error\[E400\] \S+/run: cannot be listed: Input/output error")
        after = {name: os.lstat(os.path.join(self.output, name)).st_mtime_ns for name in os.listdir(self.output)}
        self.assertEqual({name: after[name] for name in before}, before)
        support.train(self.output, **SHORT)
        self.same_as_reference()

    # ---- whose a lock is ----

    @unittest.skipUnless(os.geteuid() == 0 and shutil.which("unshare"), "needs root and unshare")
    def test_a_host_may_get_another_name(self):
        how = {**SHORT, "train__steps": 40, "train__save_every": 1}
        words = support.command(["train", support.TINY_YAML, *support.settings(support.tiny(), self.output, **how)])
        # renamed in a namespace of its own, as soon as the run has begun
        script = '"$@" & while [ ! -e "$RUN/metrics.jsonl" ]; do sleep 0.01; kill -0 $! || exit 99; done; hostname renamed; wait $!'
        done = subprocess.run(["timeout", "120", "unshare", "-u", "sh", "-c", script, "sh", *words], capture_output=True, text=True,
                              env=support.environment(RUN=self.output), stdin=subprocess.DEVNULL)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("step-00000040", self.steps())

    @unittest.skipUnless(os.geteuid() == 0 and shutil.which("setpriv") and shutil.which("unshare"), "needs root, unshare and setpriv")
    def test_a_process_that_proc_does_not_show_lives(self):
        """hidepid=2, as clusters have it: another user's run in the same folder is not taken over."""
        os.chmod(self.folder, 0o755)
        os.mkdir(self.output)
        os.chown(self.output, 65534, 65534)
        tiny = support.tiny()
        for root, _, _ in os.walk(tiny):
            os.chmod(root, 0o755)
        how = {**SHORT, "train__steps": 100000, "train__save_every": 0}
        words = support.command(["train", support.TINY_YAML, *support.settings(tiny, self.output, **how)])
        nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
        process = subprocess.Popen([*nobody, *words], env=support.environment(HOME=self.output), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            while not os.path.exists(os.path.join(self.output, "metrics.jsonl")):
                self.assertIsNone(process.poll(), "it did not start")
                time.sleep(0.01)
            os.chmod(self.output, 0o777)
            other = ["setpriv", "--reuid", "65533", "--regid", "65533", "--clear-groups"]
            done = subprocess.run(["unshare", "-m", "sh", "-c", 'mount -t proc -o hidepid=2 proc /proc && exec "$@"', "sh", *other, *words],
                                  env=support.environment(HOME=self.output), stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if "mount" in done.stderr and done.returncode == 32:
                self.skipTest("proc cannot be mounted here")
            self.assertEqual(done.returncode, 2, done.stderr)
            self.assertRegex(done.stderr, rf"error\[E204\] .*process {process.pid} on host \S+ writes here")
            self.assertIsNone(process.poll())
        finally:
            process.kill()
            process.communicate()


if __name__ == "__main__":
    unittest.main()
