"""Processes of their own that need not import torch: forks of one which has done so.
For tests that are not about how a process starts.
"""

import multiprocessing
import os
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
            code = function(words)
        except BaseException:
            traceback.print_exc()
            code = 1
    os._exit(code)


def fork(function, words, folder, environment, log):
    """Start `function(words)`, which returns an exit code; it writes to the file `log`.

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
