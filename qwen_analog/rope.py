"""Rotary position embedding (Su et al. 2021), half-split pairing."""
import torch
from torch import nn

__all__ = ["RotaryEmbedding", "rotate_half", "apply_rotary", "interleaved_to_half"]


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the angle `position * theta ** (-2i / head_dim)`, pair i of head_dim/2 (RoFormer, eq. 15).

    Holds no buffer: the head_dim/2 frequencies are recomputed in float32 at each call, so that neither
    `model.to(torch.bfloat16)` nor a model made on the meta device can spoil them.
    """

    def __init__(self, head_dim: int, theta: float = 1e6):
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary pairs, not {head_dim}")
        self.head_dim, self.theta = head_dim, theta

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids` [B, T] int64 -> `(cos, sin)`, each [B, T, head_dim] in `dtype`."""
        with torch.autocast(position_ids.device.type, enabled=False):
            even = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=position_ids.device)
            inv_freq = 1.0 / self.theta ** (even / self.head_dim)
            angles = position_ids[..., None].float() * inv_freq
            angles = torch.cat((angles, angles), dim=-1)
            return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """[..., h] -> [..., h]: the two halves (a, b) become (-b, a)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys: `x` [B, heads, T, h] by `cos`, `sin` [B, T, h] -> [B, heads, T, h]."""
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


def interleaved_to_half(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder a q or k projection made for interleaved pairs (2i, 2i+1) to the half-split pairs (i, i + h/2).

    `weight` is [heads * h, D] or a bias [heads * h]; the same shape comes back.
    """
    head_dim = weight.shape[0] // num_heads
    pairs = weight.reshape(num_heads, head_dim // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
