"""The batch templates of slurm/ under a real Slurm: two nodes on this machine, started here (cluster.sh)."""
import csv
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "tests", "e2e"))
import support  # noqa: E402

EMULATED = os.path.join(os.path.dirname(support.QSHARD), "libqshard_emulated.so")
CLUSTER = os.path.join(ROOT, "tests", "slurm", "cluster.sh")
TOOL = os.path.join(ROOT, "benchmarks", "scaling_table.py")
PATIENCE_S = 100 * int(os.environ.get("QSHARD_TEST_SLOWDOWN", "1"))
STEPS = 20
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
USR1_BIT = 1 << (signal.SIGUSR1 - 1)


def reason_to_skip():
    probe = subprocess.run([CLUSTER, "check"], capture_output=True, text=True)
    return None if probe.returncode == 0 else (probe.stdout + probe.stderr).strip()


SKIP = reason_to_skip()


def wait_for(what, condition):
    """The first value of condition() that is true."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {PATIENCE_S} s")


def process(pid, name):
    """A file of /proc of a process, "" where it is gone."""
    try:
        with open(f"/proc/{pid}/{name}", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


@unittest.skipIf(SKIP is not None, SKIP)
class Slurm(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = support.scratch("qshard-slurm-")
        cls.cluster = os.path.join(cls.folder, "cluster")
        cls.addClassCleanup(subprocess.run, [CLUSTER, "down", cls.cluster], check=False)
        up = subprocess.run([CLUSTER, "up", cls.cluster], capture_output=True, text=True, timeout=120)
        if up.returncode != 0:
            raise unittest.SkipTest("Slurm does not start here: " + (up.stdout + up.stderr).strip())
        shutil.copy(support.TINY_YAML, os.path.join(cls.folder, "run.yaml"))
        cls.alone = os.path.join(cls.folder, "alone")
        support.train(cls.alone, train__steps=STEPS)
        cls.curve = support.curve(cls.alone)

    # ---- a job ----

    def slurm(self, *words, cwd=None, **more):
        env = support.environment(1, **{"QSHARD": support.QSHARD, **more})
        env.pop("OMP_NUM_THREADS")  # the templates say it
        done = subprocess.run([CLUSTER, "run", self.cluster, *words], cwd=cwd or self.folder, env=env, capture_output=True,
                              text=True, stdin=subprocess.DEVNULL, timeout=PATIENCE_S)
        self.assertEqual(done.returncode, 0, f"{words}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, template, output, options=(), words=(), nodes=2, steps=STEPS, **more):
        """sbatch of a template of slurm/; returns (job, log file)."""
        job = self.slurm("sbatch", "--parsable", f"--nodes={nodes}", f"--ntasks-per-node={2 // nodes}", "--cpus-per-task=1",
                         *options, os.path.join(ROOT, "slurm", f"{template}.sbatch"), "run.yaml",
                         *support.settings(support.tiny(), os.path.join(self.folder, output), train__steps=steps), *words,
                         **more).strip()
        name = "qshard-scaling" if template == "scaling" else "qshard"
        return job, os.path.join(self.folder, f"{name}_{job}.log")

    def field(self, job, name):
        return re.search(rf"\b{name}=(\S+)", self.slurm("scontrol", "show", "job", "-o", job))[1]

    def end_of(self, job):
        """(state, exit code of the script) once the job is over."""
        state = wait_for(f"the end of job {job}", lambda: self.field(job, "JobState") in OVER and self.field(job, "JobState"))
        return state, self.field(job, "ExitCode")

    def text(self, log):
        wait_for(log, lambda: os.path.exists(log))
        with open(log, encoding="utf-8") as file:
            return file.read()

    def completes(self, job, log):
        self.assertEqual(self.end_of(job), ("COMPLETED", "0:0"), self.text(log))

    def ranks(self, job):
        """Pids of the job's ranks on both nodes."""
        pids = subprocess.run([CLUSTER, "pids", self.cluster], capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in pids if process(pid, "comm").strip() == "qshard" and
                f"\0SLURM_JOB_ID={job}\0" in "\0" + process(pid, "environ")]

    def after_step(self, job, log, output, steps=3):
        """The ranks of the job once it has done some steps, stopped where they are, so that no test depends on speed."""
        path = os.path.join(self.folder, output, "metrics.jsonl")

        def started():
            state = self.field(job, "JobState")
            if state in OVER:
                self.fail(f"{state} before step {steps}:\n{self.text(log)}")
            return os.path.exists(path) and len(support.metrics(os.path.dirname(path))) >= steps

        wait_for(f"step {steps} of job {job}", started)
        pids = self.ranks(job)
        self.assertEqual(len(pids), 2)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        return pids

    def go_on(self, pids):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                pass

    def losses(self, output):
        return [line["loss"] for line in support.metrics(output) if "loss" in line]

    def same_as_alone(self, output):
        output = os.path.join(self.folder, output)
        self.assertEqual(support.curve(output), self.curve)
        self.assertEqual(support.adapter_digest(output), support.adapter_digest(self.alone))

    # ---- tests ----

    def test_all_templates_give_the_bits_of_one_rank(self):
        support.train(os.path.join(self.folder, "mpirun"), ranks=2, train__steps=STEPS)
        self.same_as_alone("mpirun")
        started = [(name, *self.submit(name, name, nodes=nodes, words=["--verbose"]))
                   for name, nodes in (("single_node", 1), ("multi_node", 2), ("multi_node_mpirun", 2))]
        for name, job, log in started:
            with self.subTest(template=name):
                self.completes(job, log)
                self.same_as_alone(name)
                text = self.text(log)
                self.assertIn("ended with exit code 0", text)
                self.assertNotIn("requeue", text)
                # What the launcher has made of the request: who is where, and with how many threads.
                places = re.findall(r"on host (\w+): local rank (\d) of (\d), (\d+) cores.*, (\d+) threads", text)
                hosts = {"single_node": [("0", "2"), ("1", "2")]}.get(name, [("0", "1")] * 2)
                self.assertEqual(sorted(place[1:3] for place in places), hosts, text)
                self.assertEqual(len({place[0] for place in places}), 1 if name == "single_node" else 2, text)
                self.assertEqual({place[4] for place in places}, {"1"}, text)

    def test_groups_on_two_nodes_give_the_bits_of_one_rank(self):
        """Two ranks on each of two nodes: one base over all, one a node, one a rank; sums inside of a node first."""
        started = [(group, *self.submit("multi_node", f"group-{group}", options=["--ntasks-per-node=2"],
                                        words=["--set", f"shard.group={group}"])) for group in ("world", "node", 1)]
        for group, job, log in started:
            with self.subTest(group=group):
                self.completes(job, log)
                self.same_as_alone(f"group-{group}")
                text = self.text(log)
                self.assertIn("between 2 hosts of 2 ranks", text)
                gathered = [line["gathered_bytes"] for line in support.metrics(os.path.join(self.folder, f"group-{group}"), "ranks.jsonl")]
                self.assertEqual(all(gathered), group != 1, gathered)
                self.assertEqual(any(gathered), group != 1, gathered)

    def test_threads_follow_the_launcher(self):
        """cpus-per-task becomes threads of a rank, under srun and under mpirun, whatever environment sbatch was told to pass on."""
        names = ",".join(["QSHARD", *support.OMPI])
        for name, export in itertools.product(("multi_node", "multi_node_mpirun"), ("ALL", names)):
            job, log = self.submit(name, f"threads-{name}-{len(export)}", options=["--cpus-per-task=2", f"--export={export}"],
                                   words=["--verbose"], steps=2)
            self.completes(job, log)
            self.assertEqual(re.findall(r"local rank 0 of 1, .*, (\d+) threads", self.text(log)), ["2", "2"], self.text(log))

    @unittest.skipUnless(os.path.exists(EMULATED), "libqshard_emulated.so is not built")
    def test_every_rank_sees_all_gpus_of_its_node_and_takes_its_own(self):
        """With the options that the templates and README.md give for GPUs, under srun and under mpirun."""
        program = os.path.join(self.folder, "qshard-says-what-it-sees")
        with open(program, "w", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o755)) as file:
            file.write(f'#!/bin/sh\necho "sees $CUDA_VISIBLE_DEVICES"\nexec {shlex.quote(support.QSHARD)} "$@"\n')
        with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
            advice = re.search(r"sbatch ((?:--[a-z-]+=\w+ )+)\.\.\.`", file.read())[1].replace("=4", "=2").split()
        for name in ("single_node", "multi_node", "multi_node_mpirun", "scaling"):
            with open(os.path.join(ROOT, "slurm", f"{name}.sbatch"), encoding="utf-8") as file:
                options = re.search(r"a rank each: ((?:--[a-z-]+=\w+[ .])+)", file.read())[1].rstrip(". ").replace("=N", "=2").split()
            self.assertEqual(sorted(options), sorted(advice), name)
        for name, nodes in (("single_node", 1), ("multi_node_mpirun", 2)):
            shared = ["--allow-shared-device"] if nodes == 2 else []  # the emulator's cards have the same names on both nodes
            job, log = self.submit(name, f"gpus-{name}", nodes=nodes, options=advice, steps=1,
                                   words=["--set", "device=cuda", "--set", "cpu.gemm=strict", *shared], QSHARD=program,
                                   QSHARD_PLUGIN=EMULATED, QSHARD_EMULATOR_DEVICES="2")
            self.completes(job, log)
            self.assertEqual(re.findall(r"sees (.*)", self.text(log)), 2 * nodes * ["0,1"], self.text(log))

    def test_the_network_of_mpi_is_nccls_too(self):
        """Where it is named; NCCL knows no addresses, and what the user has set stands."""
        program = os.path.join(self.folder, "qshard-says-its-network")
        with open(program, "w", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o755)) as file:
            file.write('#!/bin/sh\necho "NCCL takes [$NCCL_SOCKET_IFNAME] and MPI [$OMPI_MCA_btl_tcp_if_include]"\n')
        route = subprocess.run(["ip", "-o", "route", "get", "192.0.2.1"], capture_output=True, text=True).stdout
        cases = [("multi_node", "lo", {}, "=lo"), ("multi_node", "127.0.0.0/8", {}, ""),
                 ("multi_node", "lo", {"NCCL_SOCKET_IFNAME": "eth"}, "eth")]
        cases += [("multi_node_mpirun", card, {}, f"={card}") for card in re.findall(r" dev (\S+)", route)]  # its daemons take no lo
        for name, network, more, taken in cases:
            job, log = self.submit(name, "network", QSHARD=program, NETWORK=network, **more)
            self.completes(job, log)
            self.assertEqual(self.text(log).count(f"NCCL takes [{taken}] and MPI [{network}]"), 2, self.text(log))

    def test_usr1_before_the_limit_saves_requeues_and_resumes(self):
        """Both ways to start at once: Slurm sends the signal at its own time, up to 30 s after the job could get it."""
        names = ("multi_node", "multi_node_mpirun")
        jobs = {}
        for name in names:
            batch = "B:" if name.endswith("mpirun") else ""
            jobs[name] = self.submit(name, f"limit-{name}", options=["--time=1", f"--signal={batch}USR1@55"])
        stopped = {name: self.after_step(*jobs[name], f"limit-{name}") for name in names}
        for name in names:
            if name.endswith("mpirun"):
                wait_for("USR1 in the script", lambda: "USR1: save and stop" in self.text(jobs[name][1]))
            else:  # pending while the rank is stopped; Slurm may send CONT as well
                wait_for("USR1 at the ranks", lambda: all(
                    int(re.search(r"ShdPnd:\s*(\w+)", process(pid, "status") or "ShdPnd: ffff")[1], 16) & USR1_BIT or
                    "saved; requeue" in self.text(jobs[name][1]) for pid in stopped[name]))
            self.go_on(stopped[name])
        for name in names:
            with self.subTest(template=name):
                job, log = jobs[name]
                self.completes(job, log)
                text = self.text(log)
                self.assertEqual(self.field(job, "Restarts"), "1", text)
                self.assertEqual((text.count("saved; requeue"), text.count("resuming after step")), (1, 1), text)
                self.assertNotIn("error[", text)
                self.same_as_alone(f"limit-{name}")

    def test_scancel(self):
        """Ends the job and its ranks; what was saved goes on under another launcher."""
        job, log = self.submit("multi_node", "cancelled", words=["--set", "train.save_every=2"])
        pids = self.after_step(job, log, "cancelled")
        self.slurm("scancel", job)
        self.go_on(pids)
        self.assertEqual(self.end_of(job)[0], "CANCELLED")
        wait_for("the end of the ranks", lambda: not self.ranks(job))
        self.assertNotIn("saved; requeue", self.text(log))
        done = support.train(os.path.join(self.folder, "cancelled"), ranks=3, train__steps=STEPS, train__save_every=2,
                             options=["--takeover"])
        self.assertIn("resuming after step", done.stderr)
        self.same_as_alone("cancelled")

    def test_a_failing_job_says_why_and_is_not_requeued(self):
        for name in ("single_node", "multi_node", "multi_node_mpirun"):
            with self.subTest(template=name):
                job, log = self.submit(name, f"failing-{name}", nodes=1 if name == "single_node" else 2,
                                       words=["--set", "train.micro_batch=0"])
                self.assertEqual(self.end_of(job), ("FAILED", "2:0"), self.text(log))
                text = self.text(log)
                self.assertEqual(len(re.findall(r"^error\[E202\] .*micro_batch", text, re.M)), 1, text)
                self.assertEqual(text.count("error[E"), 1, text)
                self.assertNotIn("requeue", text)
                self.assertEqual(self.field(job, "Restarts"), "0")

    def test_a_killed_rank_ends_the_job(self):
        job, log = self.submit("multi_node", "killed", words=["--set", "train.save_every=2"])
        pids = self.after_step(job, log, "killed")
        os.kill(pids[0], signal.SIGKILL)
        self.go_on(pids)
        self.assertEqual(self.end_of(job)[0], "FAILED", self.text(log))
        self.assertNotIn("saved; requeue", self.text(log))
        wait_for("the end of the ranks", lambda: not self.ranks(job))
        again = self.submit("multi_node", "killed", words=["--set", "train.save_every=2", "--takeover"])
        self.completes(*again)
        self.same_as_alone("killed")

    def test_a_stopped_rank_ends_the_job(self):
        """The other one does not wait for it until the time limit; the next start goes on."""
        words = ["--set", "train.save_every=2", "--set", "train.stall_limit=2"]
        job, log = self.submit("multi_node", "stopped", words=words)
        first, _ = self.after_step(job, log, "stopped")
        self.go_on([first])
        self.assertEqual(self.end_of(job)[0], "FAILED", self.text(log))  # by 6, or by 137 of the one that had to be killed
        self.assertEqual(len(re.findall(r"error\[E601\] (?:saving )?step \d+: ", self.text(log))), 1, self.text(log))
        self.assertNotIn("requeue", self.text(log))
        wait_for("the end of the ranks", lambda: not self.ranks(job))
        self.completes(*self.submit("multi_node", "stopped", words=[*words, "--takeover"]))
        self.same_as_alone("stopped")

    def test_scaling(self):
        """One run on one and two nodes: a line each, with the same loss."""
        job, log = self.submit("scaling", "unused", options=["--array=0-1%1", "--ntasks-per-node=1"], NODES="1 2",
                               STEPS=str(STEPS), REPEATS="2", TABLE="table.csv", TOOL=TOOL)
        logs = [log.replace(".log", f"_{element}.log") for element in range(2)]
        wait_for("the end of the array", lambda: self.slurm("squeue", "-h", "-j", job) == "")
        for element, path in enumerate(logs):
            self.assertIn("done: the line is in", self.text(path))
            self.assertNotIn("given back", self.text(path))
            self.assertEqual(self.field(f"{job}_{element}", "NumNodes"), str(element + 1))
        with open(os.path.join(self.folder, "table.csv"), encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual([(row["nodes"], row["ranks"], row["run"]) for row in rows],
                         [(n, n, f"table-{n}-{i}") for n in "12" for i in "12"])
        for row in rows:
            self.assertEqual(float(row["loss"]), self.losses(self.alone)[-1])
            self.assertEqual(int(row["steps"]), STEPS - 2)
            self.assertGreater(float(row["step_s"]), 0)
            self.assertAlmostEqual(float(row["efficiency"]) * int(row["ranks"]), float(row["speedup"]), delta=1e-3)
        again, log = self.submit("scaling", "unused", options=["--array=0", "--ntasks-per-node=1"], NODES="1", TABLE="table.csv", TOOL=TOOL)
        self.assertEqual(self.end_of(again), ("FAILED", "2:0"))
        self.assertIn("table-1-1 is there already: set TABLE", self.text(log.replace(".log", "_0.log")))
        weak, log = self.submit("scaling", "unused", options=["--array=0", "--ntasks-per-node=1"], NODES="2", STEPS="3", WEAK="5",
                                TABLE="weak.csv", TOOL=TOOL)
        self.completes(weak, log.replace(".log", "_0.log"))
        with open(os.path.join(self.folder, "weak-2-1", "config.yaml"), encoding="utf-8") as file:
            self.assertRegex(file.read(), r"global_batch: 10\b")

    def test_the_lines_of_the_readme_lead_to_a_loss_curve(self):
        """As they stand, but for the account, in a folder like the one that quickstart.sh --tiny leaves."""
        with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
            section = re.search(r"^## On a cluster\n(.*?)^## ", file.read(), re.M | re.S)[1]
        quickstart, sbatch, squeue, plot = re.search(r"^```sh\n(.*?)\n```$", section, re.M | re.S)[1].split("\n")
        self.assertRegex(quickstart, r"^\./quickstart\.sh --tiny ")
        clone = os.path.join(self.folder, "clone")
        for name, source in (("slurm", None), ("inputs", None), ("src", None), ("quickstart/tiny", support.tiny()),
                             ("build/release/qshard", support.QSHARD)):
            os.makedirs(os.path.dirname(os.path.join(clone, name)), exist_ok=True)
            os.symlink(source or os.path.join(ROOT, name), os.path.join(clone, name))
        python = os.path.join(clone, "build", "venv", "bin", "python")
        os.makedirs(os.path.dirname(python))
        with open(python, "w", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o755)) as file:
            file.write(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')  # a link to it would not see its packages

        def line(text):
            return self.slurm("bash", "-c", text, cwd=clone, QSHARD="", PYTHONDONTWRITEBYTECODE="1")

        job = re.fullmatch(r"Submitted batch job (\d+)\n", line(sbatch.replace("ACCOUNT", "physics")))[1]
        wait_for(f"the end of job {job}", lambda: job not in line(squeue).split())
        log = os.path.join(clone, re.search(r"\w+_JOB\.log", squeue)[0].replace("JOB", job))
        self.completes(job, log)
        self.assertIn("ends with exit code 0", squeue)
        self.assertRegex(self.text(log), r"ended with exit code 0\n$")
        self.assertIn("loss.png: 40 steps, 2 evaluations", line(plot))
        with open(os.path.join(clone, "loss.png"), "rb") as file:
            self.assertEqual(file.read(8), b"\x89PNG\r\n\x1a\n")
        first, last, steps = re.search(r"falls from ([\d.]+) to ([\d.]+) in (\d+) steps", section).groups()
        losses = self.losses(os.path.join(clone, "runs", "first"))
        self.assertEqual(len(losses), int(steps))
        # The data here are a third of quickstart.sh's, and products of another CPU may round otherwise.
        self.assertAlmostEqual(losses[0], float(first), delta=0.1)
        self.assertAlmostEqual(losses[-1], float(last), delta=0.3)


if __name__ == "__main__":
    unittest.main()
