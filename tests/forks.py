"""Processes of their own that need not import torch: forks of one which has done so.
For tests that are not about how a process starts.
"""

import multiprocessing
import os
import socket
import sys
import traceback

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["qwen_analog.train", "torch.distributed.fsdp"])


def _run(function, words, folder, environment, log):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(log, "w") as sys.stdout:
        sys.stderr = sys.stdout
        try:
            code = function(words) or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    os._exit(code)


def fork(function, words, folder, environment, log):
    """Start `function(words)`, which may return an exit code; it writes to `log`.

    With "forkserver" the new process has no threads, and nothing that tests have done.
    """
    words, environment = map(str, words), {k: str(v) for k, v in environment.items()}
    process = FORKS.Process(
        target=_run, args=(function, [*words], folder, environment, log)
    )
    process.start()
    return process


def exit_code(process, timeout=180):
    """Wait for a fork's end, which comes at the latest after `timeout` seconds."""
    process.join(timeout)
    process.kill()
    process.join()
    return process.exitcode


def on_ranks(processes, function, words, folder, **environment):
    """Call `function(words)` on so many processes, as torchrun would on one machine;
    all must end with 0.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": probe.getsockname()[1]}
    shared |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, **environment}
    logs = [folder / f"rank_{rank}.log" for rank in range(processes)]
    started = []
    for rank, log in enumerate(logs):
        own = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        started.append(fork(function, words, folder, own, log))
    codes = [exit_code(process, 300) for process in started]
    assert codes == [0] * processes, [log.read_text()[-1000:] for log in logs]
