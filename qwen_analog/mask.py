"""Who may look at whom: boolean attention masks, True where a query may see a key."""
import torch

__all__ = ["causal_mask", "document_mask", "document_positions"]


def causal_mask(query_length: int, key_length: int | None = None, device: torch.device | str | None = None) -> torch.Tensor:
    """[T, S] bool: the last query sees the last key, each earlier query one key fewer (aligned bottom-right).

    `key_length` defaults to `query_length`; it is larger when earlier keys come from a cache.
    """
    key_length = query_length if key_length is None else key_length
    if key_length < query_length:
        raise ValueError(f"key_length {key_length} is smaller than query_length {query_length}")
    ones = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return ones.tril(diagonal=key_length - query_length)


def document_mask(document_ids: torch.Tensor) -> torch.Tensor:
    """`document_ids` [B, T] -> [B, 1, T, T] bool: causal, and only within one document."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same & causal_mask(document_ids.shape[1], device=document_ids.device)


def document_positions(document_ids: torch.Tensor) -> torch.Tensor:
    """`document_ids` [B, T] -> [B, T] int64 positions that start again from 0 at each new document."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - (index * starts).cummax(dim=1).values
