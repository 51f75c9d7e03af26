"""Next-token cross entropy."""
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["IGNORE_INDEX", "cross_entropy", "linear_cross_entropy", "bits_per_byte"]

IGNORE_INDEX = -100


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """`logits` [..., V] (any float dtype), `targets` [...] int64, `IGNORE_INDEX` where there is none -> float32 nats.

    `reduction` is "mean" over the real targets, or "sum".
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction)


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                         reduction: str = "mean", chunk_size: int | None = 4096) -> torch.Tensor:
    """Cross entropy of `hidden @ weight.T` without holding all the logits at once.

    `hidden` [..., D], `weight` [V, D], `targets` [...] -> float32 scalar. `chunk_size` tokens' logits exist at a time;
    they are made again in the backward pass.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    def chunk_loss(h, t):
        return cross_entropy(F.linear(h, weight), t, reduction="sum")
    total = hidden.new_zeros((), dtype=torch.float32)
    size = len(hidden) if chunk_size is None else chunk_size
    for h, t in zip(hidden.split(size), targets.split(size)):
        total = total + (checkpoint(chunk_loss, h, t, use_reentrant=False) if len(hidden) > size else chunk_loss(h, t))
    return total if reduction == "sum" else total / (targets != IGNORE_INDEX).sum()


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """A summed loss in nats over the text's UTF-8 bytes: comparable across tokenizers."""
    return nats / math.log(2) / num_bytes
