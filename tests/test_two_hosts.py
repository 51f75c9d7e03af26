"""Two hosts, each with a network, a name, processes and a disk of its own, joined by a
cable: what they read of one another, and how a run goes on when one of them dies.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, same
from qwen_analog.checkpoint import load_checkpoint
from training import as_file, final_weights, folder, launched, losses, settings

__all__ = ["folder"]  # a fixture of every test here

ADDRESSES = {"first": "10.77.0.1", "second": "10.77.0.2"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = ["-m", "qwen_analog.train", "--config", "config.json"]


class Host:
    """A Linux in namespaces of its own, which are gone with its first process."""

    def __init__(self, name):
        self.name = name
        own = ["--pid", "--fork", "--kill-child", "--mount-proc", "--net", "--uts"]
        self.unshare = subprocess.Popen(
            ["unshare", *own, "sleep", "300"], stderr=subprocess.PIPE, text=True
        )
        pid = self.unshare.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        while not (found := children.read_text().split()):
            if self.unshare.poll() is not None:
                raise OSError(self.unshare.stderr.read())
            time.sleep(0.01)
        self.pid = found[0]

    def start(self, *command):
        """Start a command here; what it says goes into NAME.log."""
        environment = {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(Path("disk").absolute()),
            "HF_DATASETS_CACHE": str(Path("cache").absolute()),
        }
        enter = ["nsenter", "--all", f"--target={self.pid}", f"--wdns={Path.cwd()}"]
        with open(f"{self.name}.log", "a") as log:
            return subprocess.Popen(
                [*enter, *command],
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
            )

    def shell(self, script):
        """Run lines of shell here; OSError where one of them fails."""
        if self.start("sh", "-ec", script).wait(timeout=10):
            raise OSError(self.said())

    def said(self):
        return Path(f"{self.name}.log").read_text()

    def die(self):
        """End as when the power fails: the others only hear nothing more."""
        self.shell("ip link set eth0 down")
        self.close()

    def close(self):
        self.unshare.kill()
        self.unshare.wait()


def join(hosts):
    """Lay a cable between two hosts; give each its name, address and disk."""
    a, b = (["ip", "link", "add", "eth0", "netns", host.pid] for host in hosts)
    cable = [*a, "type", "veth", "peer", *b[3:]]
    done = subprocess.run(cable, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr)
    names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
    Path("hosts").write_text("127.0.0.1 localhost\n" + names)
    Path("disk").mkdir()
    for host in hosts:
        host.shell(
            f"""hostname {host.name}
            mount --bind hosts /etc/hosts
            mount -t tmpfs disk disk
            ip link set lo up
            ip address add {ADDRESSES[host.name]}/24 dev eth0
            ip link set eth0 up"""
        )


@pytest.fixture
def hosts(folder):
    """Two hosts that share the working directory but for `disk`."""
    made = []
    try:
        try:
            made += [Host("first")]
            made += [Host("second")]
            join(made)
        except OSError as error:  # no such program, or no such right
            pytest.skip(f"hosts of their own cannot be made here: {error}")
        yield made
    finally:
        for host in made:
            host.close()


def wait_for(path, processes):
    while not Path(path).exists():
        codes = [process.poll() for process in processes]
        assert codes == [None] * len(processes), f"ended before {path} was written"
        time.sleep(0.02)


STANDALONE = ["--standalone", "--nproc-per-node=2"]
ELASTIC = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=1"]
ELASTIC += ["--rdzv-backend=c10d", "--rdzv-endpoint=first:29400", "--rdzv-id=run"]
ELASTIC += ["--rdzv-conf=last_call_timeout=6,keep_alive_interval=1"]


@pytest.mark.slow
def test_a_run_on_two_hosts_outlives_one_of_them(hosts):
    first, second = hosts
    Path("cache").mkdir()  # both see it, and one of them can only read it
    second.shell("mount --bind --options ro cache cache")
    changes = dict(max_steps=40, save_every=5, keep_last=99, eval_every=40)
    as_file(settings(**changes))
    flags = ["--output-dir=run", "--resume=auto", "--collective-timeout-minutes=0.1"]
    run = [host.start(*TORCHRUN, *ELASTIC, *TRAIN, *flags) for host in hosts]
    wait_for("run/step_10", run)
    second.die()
    assert len(list(Path("cache/qwen_analog").iterdir())) == 1  # no mark is left

    # from the shared disk, two processes on the host that is left go on, and end as a
    # run that nothing happened to
    shutil.copytree("run/step_10", "again/step_10")
    flags = ["--output-dir=again", "--resume=auto"]
    again = first.start(*TORCHRUN, *STANDALONE, *TRAIN, *flags)
    launched(2, output_dir="whole", **changes)
    assert again.wait(timeout=60) == 0, first.said()
    expected = losses("whole")
    assert losses("again") == {step: expected[step] for step in range(11, 41)}
    assert same(final_weights("again"), final_weights("whole"))

    # so does the first run by itself, on one process and so with half the batch
    assert run[0].wait(timeout=60) == 0, first.said()
    assert re.search(r"error: rank 1 gives no sign of life at step 1\d,", first.said())
    found = losses("run")
    assert {step: found[step] for step in range(1, 11)} == {
        step: expected[step] for step in range(1, 11)
    }
    assert found.keys() == expected.keys()
    assert load_checkpoint("run/final")["data"] == {"position": 10 * 8 + 30 * 4}
