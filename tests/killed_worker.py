"""Fine-tunings that SIGKILL ends: each in a fork, before any of them has computed."""

import os
import signal
import sys

import torch

from qwen_analog import checkpoint
from qwen_analog.train import train
from qwen_analog.train_config import TrainConfig

torch.set_num_threads(1)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_step():
    """Between the gradients and the weights of the fourth step."""
    real, calls = torch.optim.AdamW.step, []

    def step(self, *arguments):
        calls.append(self)
        return die() if len(calls) == 4 else real(self, *arguments)

    torch.optim.AdamW.step = step


def in_a_save():
    """With half of the weights written."""
    real = torch.save

    def save(contents, path):
        real(contents, path)
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    checkpoint.torch.save = save


for spec in sys.argv[1:]:
    for place in (in_a_step, in_a_save):
        pid = os.fork()
        if pid == 0:
            config = TrainConfig.from_file(spec)
            place()
            options = {"resume_from": "auto"}
            if place is in_a_step:
                options = {"init_from": "base"}
            train(config, **options)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    print(spec)
