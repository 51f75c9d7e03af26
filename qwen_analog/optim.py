"""The optimizer and the learning-rate schedule."""
import math

import torch
from torch import nn

__all__ = ["parameter_groups", "build_optimizer", "learning_rate_at"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices are decayed; biases and norm weights (one-dimensional) are not."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float = 0.1,
                    betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2), fused, over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=betas, eps=eps, fused=True)


def learning_rate_at(step: int, *, learning_rate: float, max_steps: int, warmup_steps: int = 0,
                     schedule: str = "cosine", min_ratio: float = 0.1, decay_fraction: float = 0.2) -> float:
    """The learning rate of optimizer step `step` (0-based) of `max_steps`.

    Linear warmup, then "cosine" down to `min_ratio * learning_rate`, or "wsd" (constant, then linear over the last
    `decay_fraction` of the steps), or "constant".
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    floor = min_ratio * learning_rate
    if schedule == "constant":
        return learning_rate
    if schedule == "cosine":
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return floor + 0.5 * (learning_rate - floor) * (1 + math.cos(math.pi * progress))
    if schedule == "wsd":
        decay_steps = max(1, round(decay_fraction * max_steps))
        remaining = min(1.0, max(0, max_steps - step) / decay_steps)
        return floor + (learning_rate - floor) * remaining
    raise ValueError(f"schedule must be 'cosine', 'wsd' or 'constant', not {schedule!r}")
