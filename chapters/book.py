"""What every chapter shares: the look of its plots, scrambled weights, programs in
several processes, and the checking of exercises.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

# transformers' progress bars warn, with a path of this machine, where ipywidgets is
# missing
warnings.filterwarnings("ignore", message="IProgress not found")
plt.style.use(Path(__file__).resolve().parents[1] / "figures" / "book.mplstyle")


@torch.no_grad()
def scramble_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a value a broken part cannot hide behind: norms 1 + 0.3 N,
    biases 0.5 N, matrices 1.5 N / sqrt(fan_in).

    A freshly initialised Qwen2 has zero biases and unit norms, so that dropping a bias
    or swapping two norms changes nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        if p.ndim > 1:
            p.copy_(1.5 * noise / p.shape[-1] ** 0.5)
        elif name.endswith("bias"):
            p.copy_(0.5 * noise)
        else:
            p.copy_(1 + 0.3 * noise)
    return module


def attempt(check: Callable, answer: Callable) -> None:
    """Run an exercise's check on a reader's answer and say in one line how it went."""
    try:
        check(answer)
    except Exception as error:
        print(f"{answer.__name__}: not yet. {type(error).__name__}: {error}")
    else:
        print(f"{answer.__name__}: correct.")


def prove(check: Callable, solution: Callable, *wrong: Callable) -> None:
    """Test the check itself: it must accept the solution and no wrong answer."""
    check(solution)
    for answer in wrong:
        try:
            check(answer)
        except Exception as error:
            print(f"rejects {answer.__name__}: {type(error).__name__}: {error}")
        else:
            raise AssertionError(
                f"the check accepts the wrong answer {answer.__name__}"
            )
    print(f"accepts {solution.__name__}")


PROCESS = """
import json, os, sys
import torch, torch.distributed as dist

rank, world_size = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group(
    "gloo",
    init_method=f"file://{os.getcwd()}/{sys.argv[3]}",
    rank=rank,
    world_size=world_size,
)
results = {}
"""


def on_processes(count: int, program: str) -> list[dict]:
    """Run a program in `count` processes that know each other.

    It finds `rank` and `world_size`, and puts what it found out into `results`, which
    are returned in the order of the ranks.
    """
    end = "\ndist.barrier()\ndist.destroy_process_group()\nprint(json.dumps(results))"
    with tempfile.TemporaryDirectory(dir=".") as folder:
        meeting = f"{folder}/meeting"
        code = PROCESS + program + end
        command = [sys.executable, "-W", "ignore", "-c", code]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(count), meeting],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]
        outputs = [process.communicate() for process in processes]
    failed = any(process.returncode for process in processes)
    assert not failed, "".join(errors for _, errors in outputs)
    return [json.loads(output) for output, _ in outputs]
