"""What `test_distributed.py` runs to see processes fail: one scenario after the other,
each on forked processes.

`ranks_worker.py FOLDER NAME...` writes what each process ended with, its exit code and
its words on stderr, into FOLDER/found.json: {scenario: [[code, words], ...]}. Forking
saves the seconds that importing torch takes.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from qwen_analog import distributed
from qwen_analog.distributed import DistributedContext, RankError

FOLDER = Path(sys.argv[1])
QUICK = 0.05  # minutes: three seconds


def error_in_a_meeting(processes):
    with processes.together():
        if processes.rank == 1:
            raise ValueError("d.jsonl, line 2 is bad")


def error_of_the_first(processes):
    with processes.one_first(FOLDER):
        raise OSError("No space left on device")


def error_in_a_collective(processes):
    processes.step = 3
    if processes.rank == 1:
        raise torch.OutOfMemoryError("out of memory")
    processes.all_reduce_sum(1)


def interrupted(processes):
    if processes.rank == 1:
        raise KeyboardInterrupt
    processes.barrier()


def killed_in_a_collective(processes):
    processes.step = 7
    processes.all_reduce_sum(1)  # both are at the step
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.all_reduce_sum(1)


def first_killed_in_a_meeting(processes):
    if processes.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.broadcast("a value")


def stopped(processes):
    processes.step = 9
    processes.all_reduce_sum(1)
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    processes.all_reduce_sum(1)


def late(processes):
    processes.step = 9
    if processes.rank == 1:
        time.sleep(60)
    processes.all_reduce_sum(1)


def patient(processes):
    """Work of one process may take longer than the time-out, and so may work of all."""
    with processes.one_first(FOLDER):
        if processes.rank == 0:
            time.sleep(4.5)
    time.sleep(4.5)
    assert processes.all_reduce_sum(processes.rank, 1) == [1, 2]
    assert processes.broadcast({"a": (processes.rank, Path("x"))}) == {
        "a": (0, Path("x"))
    }


def shared_cache(processes):
    """One process works for a directory that both see, both at once for their own."""
    shared, own = FOLDER / "shared", [FOLDER / "own 0", FOLDER / "own 1"]
    with processes.one_first(shared):
        if not (shared / "made").exists():
            time.sleep(0.2)
            (shared / "made").touch(exist_ok=False)
    with processes.one_first(own[processes.rank]):
        (own[processes.rank] / "begun").touch()
        until = time.monotonic() + 3
        while not all((directory / "begun").exists() for directory in own):
            assert time.monotonic() < until, "one waits for the other"
            time.sleep(0.01)
    assert [path.name for path in shared.iterdir()] == ["made"]


def other_settings(processes):
    processes.agree({"seed": 0, "sequence_length": 32 + processes.rank}, "setting")


def other_size(processes):
    raise AssertionError("nobody comes here")


missing = taken = unreachable = other_size


def in_child(scenario, rank, world_size, port):
    """One process of a scenario; does not return."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.dup2(
        os.open(
            FOLDER / f"{scenario.__name__ if callable(scenario) else scenario}.{rank}",
            os.O_CREAT | os.O_WRONLY,
        ),
        2,
    )
    code = 1
    try:
        if scenario is patient:  # a process may form one group after the other
            with DistributedContext(QUICK) as processes:
                processes.all_reduce_sum(1)
        with DistributedContext(QUICK) as processes:
            scenario(processes)
        code = 0
    except KeyboardInterrupt:
        code = 130
    except (RankError, ValueError, OSError, RuntimeError) as error:
        code = 3 if isinstance(error, RankError) else 2
        print(f"error: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Scenario:
    """Its processes, started."""

    def __init__(self, name):
        self.name, port = name, free_port()
        globals()[name].__name__ = name
        self.places = {
            "other_size": [(0, 2), (1, 3)],
            "missing": [(0, 2)],
            "unreachable": [(1, 2)],
            "taken": [(0, 2)],
        }.get(name, [(0, 2), (1, 2)])
        self.held = (
            socket.create_server(("127.0.0.1", port)) if name == "taken" else None
        )
        self.codes, self.children = {}, []
        for rank, size in self.places:
            child = os.fork()
            if child == 0:
                in_child(globals()[name], rank, size, port)
            self.children.append(child)

    def ended(self, late):
        """Whether all have; after too long a time those that have not are killed."""
        for child in set(self.children) - self.codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                self.codes[child] = os.waitstatus_to_exitcode(status)
            elif late or self.codes and self.name == "stopped":
                os.kill(child, signal.SIGKILL)
        return len(self.codes) == len(self.children)

    def found(self):
        return [
            [self.codes[child], (FOLDER / f"{self.name}.{rank}").read_text().strip()]
            for child, (rank, _) in zip(self.children, self.places)
        ]


if __name__ == "__main__":
    distributed.HEARTBEAT, distributed.GRACE, distributed.JOIN_TIMEOUT = 0.5, 8, 8.0
    scenarios, until = [Scenario(name) for name in sys.argv[2:]], time.monotonic() + 60
    while not all([scenario.ended(time.monotonic() > until) for scenario in scenarios]):
        time.sleep(0.05)
    (FOLDER / "found.json").write_text(
        json.dumps({scenario.name: scenario.found() for scenario in scenarios})
    )
