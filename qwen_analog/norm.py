"""Root-mean-square layer normalisation."""
import torch
from torch import nn

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale it (Zhang & Sennrich 2019, eq. 4).

    Statistics are taken in float32; the result is cast back to the input's dtype *before* the
    multiplication by `weight`, which is the order Qwen2 uses and the one that is bit-equal to it in bfloat16.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., D] -> [..., D], in the dtype of `x` (promoted with the weight's)."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"
