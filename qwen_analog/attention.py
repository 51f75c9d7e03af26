"""Grouped-query attention."""
import torch
import torch.nn.functional as F
from torch import nn

from qwen_analog.kv_cache import KVCache
from qwen_analog.mask import causal_mask
from qwen_analog.rope import apply_rotary

__all__ = ["GQAttention"]


class GQAttention(nn.Module):
    """Causal attention in which H / K query heads share one key/value head (Ainslie et al. 2023)."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int | None = None,
                 bias: bool = True, layer_idx: int = 0):
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.layer_idx = layer_idx
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                mask: torch.Tensor | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """`x` [B, T, D], `cos` and `sin` [B, T, h] -> [B, T, D].

        `mask` is boolean, True where a query may see a key, broadcastable to [B, 1, T, S]; without it
        attention is causal. With a `cache`, the new keys and values are appended to it and S counts all it holds.
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)     # [B, H, T, h]
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)     # [B, K, T, h]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)     # [B, K, T, h]
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer_idx, k, v)                        # [B, K, S, h]
        S = k.shape[2]
        # is_causal aligns its triangle top-left: right only where no earlier keys came from a cache
        if mask is None and 1 < T < S:
            mask = causal_mask(T, S, device=x.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T == S, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))            # [B, H, T, h] -> [B, T, H h] -> [B, T, D]
