"""Two network namespaces as two hosts, h1 and h2 (two_hosts.sh), for the tests that need some."""
import os
import shutil
import subprocess
import unittest

import support

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "two_hosts.sh")


def reason_to_skip():
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    name = f"qshard-probe-{os.getpid()}"
    for command in (["add", name], ["exec", name, "true"]):
        probe = subprocess.run(["ip", "netns", *command], capture_output=True, text=True)
        if probe.returncode != 0:
            break
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    return None if probe.returncode == 0 else "no network namespaces here: " + probe.stderr.strip()


SKIP = reason_to_skip()


class HostsTest(unittest.TestCase):
    """Two hosts while a test runs. Subclasses are to be skipped where SKIP says why."""

    def hosts(self, *arguments, **more):
        env = support.environment(1, QSHARD_HOSTS_TAG=f"qs{os.getpid()}", **more)
        return subprocess.run(["timeout", "-k", "5", "200", SCRIPT, *map(str, arguments)], env=env, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True)

    def setUp(self):
        self.hosts("down")
        done = self.hosts("up")
        self.addCleanup(self.hosts, "down")
        self.assertEqual(done.returncode, 0, done.stderr)
