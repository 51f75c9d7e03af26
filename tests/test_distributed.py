"""Processes that fail: each of the others ends with one line; environments that make no
sense; what the processes share.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from qwen_analog import distributed
from qwen_analog.distributed import DistributedContext, end_with_torchrun

ROOT = Path(__file__).resolve().parents[1]

ANOTHER = "error: another process, rank {}, {}, and says more in its own line"
SETTING = (
    "error: rank 1 has another setting than rank 0: sequence_length is 33 there and 32"
    " on rank 0"
)
SIZE = "error: rank 1 was started with WORLD_SIZE 3, rank 0 with 2"
ENDED = "error: rank {} ended without a word {}: it was killed, or the memory was full"
# of each process: exit code (2: its own error; 3: another's; negative: the signal) and
# the only line that it says
FAILURES = {
    "error_in_a_meeting": [
        (3, ANOTHER.format(1, "had an error before the first step")),
        (2, "error: d.jsonl, line 2 is bad"),
    ],
    "error_of_the_first": [
        (2, "error: No space left on device"),
        (3, ANOTHER.format(0, "had an error before the first step")),
    ],
    "error_in_a_collective": [
        (3, ANOTHER.format(1, "had an error at step 3")),
        (2, "error: out of memory"),
    ],
    "interrupted": [
        (3, ANOTHER.format(1, "was interrupted before the first step")),
        (130, ""),
    ],
    "killed_in_a_collective": [
        (3, ENDED.format(1, "at step 7")),
        (-signal.SIGKILL, ""),
    ],
    "first_killed_in_a_meeting": [
        (-signal.SIGKILL, ""),
        (3, ENDED.format(0, "before the first step")),
    ],
    "stopped": [
        (None, "error: rank 1 gives no sign of life at step 9"),
        (-signal.SIGKILL, ""),
    ],
    "late": [
        (None, "error: rank 1 lives but did not arrive at step 9"),
        (None, "error: rank 1 lives but did not arrive at step 9"),
    ],
    "patient": [(0, ""), (0, "")],
    "shared_cache": [(0, ""), (0, "")],
    "other_settings": [(2, SETTING), (2, SETTING)],
    "other_size": [(3, SIZE), (3, SIZE)],
    "missing": [(3, "error: rank 1 did not arrive: was it started?")],
    "taken": [(3, "error: MASTER_ADDR 127.0.0.1, MASTER_PORT")],
    "unreachable": [
        (3, "error: rank 0 cannot be reached at MASTER_ADDR 127.0.0.1, port")
    ],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the processes of every scenario ended with, all run at the same time."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = ROOT / "tests" / "ranks_worker.py"
    subprocess.run(
        [sys.executable, str(worker), str(folder), *FAILURES],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_every_process_of_a_failed_run_ends_with_one_line(found, name):
    assert len(found[name]) == len(FAILURES[name])
    for rank, (code, words) in enumerate(found[name]):
        right_code, right_words = FAILURES[name][rank]
        where = f"rank {rank}: exit {code}, {words}"
        assert code == right_code or right_code is None and code in (2, 3), where
        assert words.startswith(right_words) and "\n" not in words, where
        assert bool(words) == bool(right_words), where


def test_a_word_right_behind_the_greeting_is_not_lost():
    """The first object of a fast process can come in one piece with its greeting."""
    here, there = socket.socketpair()
    context = DistributedContext()
    context.world_size = 2
    watchdog = distributed.Watchdog(context)
    fast = distributed.Peer(there)
    greeting = json.dumps(["hello", ["token", 1, 2]]) + "\n"
    there.sendall((greeting + json.dumps(["object", "early"]) + "\n").encode())
    until = time.monotonic() + 5
    distributed._admit(watchdog, distributed.Peer(here), "token", until)
    assert list(watchdog.connections.peers[1].objects) == ["early"]
    fast.connection.close()


@pytest.mark.parametrize(
    "words",
    [
        b"",
        b"GET / HTTP/1.1\r\n",
        b'{"token": 1}\n',
        b'["hello", ["wrong", 1, 2]]\n',
        b"x" * 5000,
    ],
)
def test_a_stranger_at_the_port_is_no_rank(words):
    here, there = socket.socketpair()
    there.sendall(words)
    there.close()
    watchdog = distributed.Watchdog(DistributedContext())
    with suppress(OSError, EOFError, ValueError, TypeError):  # as `_accept_ranks` does
        until = time.monotonic() + 5
        distributed._admit(watchdog, distributed.Peer(here), "token", until)
    assert not watchdog.connections.peers and watchdog.failure.text is None


def test_the_rank_that_stands_still_is_late():
    late = distributed.LateRanks()
    for begun in ((5, 5), (6, 5), (6, 5), (6, 5)):
        behind = late.update(dict(enumerate(begun)))
    assert dict(behind) == {0: 0, 1: 3}
    assert dict(late.update({0: 6, 1: 6})) == {0: 0, 1: 0}  # it has arrived
    assert dict(late.update({0: 9, 1: 7})) == {0: 0, 1: 0}  # behind, but moves


def test_alone_every_collective_is_itself(tmp_path):
    context = DistributedContext()
    with context.together(), context.one_first(tmp_path / "cache"):
        assert context.all_reduce_sum(3, 0.5) == [3, 0.5]
        assert context.all_gather_object("x") == ["x"]
        assert context.broadcast({1: Path("x")}) == {1: Path("x")}
        context.agree({"seed": 0}, "setting")


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        (
            {"RANK": "2", "WORLD_SIZE": "2"},
            "RANK is '2', and must be a number from 0 to 1",
        ),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({"RANK": "1"}, "RANK is '1'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE is 'x'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR, where rank 0 runs, is not set"),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
            "MASTER_PORT is 'http'",
        ),
        (
            {
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "70000000000",
            },
            "MASTER_PORT is '70000000000'",
        ),
        (
            {
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "no host of this name",
                "MASTER_PORT": "1",
            },
            "no address that this machine knows",
        ),
    ],
)
def test_a_senseless_environment_is_one_line(monkeypatch, variables, words):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ValueError, match=re.escape(words)) as caught,
        DistributedContext(),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with (
        pytest.raises(ValueError, match="LOCAL_RANK 3 has no GPU: this machine has 2"),
        DistributedContext(),
    ):
        pass


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_workers_end_with_their_torchrun(by_torchrun):
    """A worker whose parent is killed gets SIGTERM; started by hand it goes on."""
    ready, said = os.pipe(), os.pipe()

    def worker():
        os.environ.pop("TORCHELASTIC_RUN_ID", None)
        if by_torchrun:
            os.environ["TORCHELASTIC_RUN_ID"] = "test"
        signal.signal(signal.SIGTERM, lambda *_: os.write(said[1], b"ended"))
        end_with_torchrun()
        os.write(ready[1], b"x")
        time.sleep(0.5)
        os.write(said[1], b"lives")
        os._exit(0)

    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            worker()
        time.sleep(60)
        os._exit(0)
    os.read(ready[0], 1)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert os.read(said[0], 5) == (b"ended" if by_torchrun else b"lives")
