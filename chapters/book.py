"""What every chapter shares: the look of its plots, scrambled weights, and the checking
of exercises.
"""

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
    """Test the check itself: it must accept the solution and reject every wrong answer."""
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
