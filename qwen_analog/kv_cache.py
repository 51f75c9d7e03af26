"""Keys and values of the tokens already read."""
import torch

__all__ = ["KVCache"]


class KVCache:
    """Preallocated keys and values for every layer, [B, K, max_length, h] each.

    2 * layers * K * h * bytes-per-element are held for each token (see `nbytes`).
    """

    def __init__(self, num_layers: int, batch_size: int, num_kv_heads: int, head_dim: int, max_length: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str | None = None):
        shape = (num_layers, batch_size, num_kv_heads, max_length, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.lengths = [0] * num_layers

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    @property
    def length(self) -> int:
        """Tokens held by every layer (between forward passes all layers hold the same number)."""
        return min(self.lengths)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def update(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `keys`, `values` [B, K, T, h] to one layer; return all it holds, [B, K, S, h] each.

        Raises ValueError when the new tokens do not fit.
        """
        start = self.lengths[layer_idx]
        end = start + keys.shape[2]
        if end > self.max_length:
            raise ValueError(f"the KV cache holds {self.max_length} tokens; {end} are needed: make it with a larger max_length")
        self.keys[layer_idx, :, :, start:end] = keys
        self.values[layer_idx, :, :, start:end] = values
        self.lengths[layer_idx] = end
        return self.keys[layer_idx, :, :, :end], self.values[layer_idx, :, :, :end]

    def crop(self, length: int) -> None:
        """Forget every token from position `length` on. Raises ValueError when fewer are held."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop to {length} tokens: the cache holds {self.length}")
        self.lengths = [length] * len(self.lengths)
