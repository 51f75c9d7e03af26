"""Attention of given queries, keys and values beside Hugging Face's function: the
package's and the tiled one that a chapter teaches.
"""

import pytest
import torch
import torch.nn.functional as F
from chapter_code import from_chapter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

from qwen_analog import attention
from qwen_analog.attention import causal_mask, document_mask

B, H, h = 2, 4, 16
tiled = from_chapter("B*_attention.ipynb", "def attention_tiled", {"torch": torch})[
    "attention_tiled"
]


class OneGroup(nn.Module):
    num_key_value_groups, training = 1, False


def additive(mask, dtype):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)


def in_tiles(q, k, v, mask):
    return tiled(q, k, v, mask, 4)


def first_difference(candidate):
    """Return what differs first from Hugging Face's function, outputs or gradients."""
    g = torch.Generator().manual_seed(2)
    for dtype, bound in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        for new, total in ((7, 7), (3, 7), (1, 7)):
            q, k, v = (
                2 * torch.randn(B, H, n, h, generator=g).to(dtype)
                for n in (new, total, total)
            )
            upstream = torch.randn(B, H, new, h, generator=g).to(dtype)
            mask = causal_mask(new, total)
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            reference, _ = eager_attention_forward(
                OneGroup(), *leaves, additive(mask, dtype), scaling=h**-0.5
            )
            expected = reference.transpose(1, 2)
            wanted = torch.autograd.grad(expected, leaves, upstream)
            got = candidate(*leaves, mask)
            found = torch.autograd.grad(got, leaves, upstream, allow_unused=True)
            for name, a, b in zip(
                ("outputs", "gradients of q", "gradients of k", "gradients of v"),
                (expected, *wanted),
                (got, *found),
            ):
                gap = float("inf") if b is None else (a - b).abs().max().item()
                if not gap < bound:
                    return f"T={new}, S={total}, {dtype}: {name} differ by {gap:.1e}"
    return None


def packaged(q, k, v, mask):
    """The package's function, without the mask where it makes its own."""
    with_mask = attention.grouped_query_attention(q, k, v, mask)
    without = attention.grouped_query_attention(q, k, v)
    assert torch.allclose(with_mask, without, atol=1e-5)
    return without


@pytest.mark.parametrize("candidate", [packaged, in_tiles])
def test_it_is_the_reference(candidate):
    assert first_difference(candidate) is None


def folds_rightly():
    """Few queries become rows of their key's head; more of them do not."""
    g = torch.Generator().manual_seed(0)
    for T in (1, 2, 5, 16, 17):
        q = torch.randn(2, 6, T, h, generator=g, dtype=torch.float64)
        k, v = torch.randn(2, 2, 2, 20, h, generator=g, dtype=torch.float64)
        each = torch.rand(2, 1, T, 20, generator=g) < 0.7
        each[..., 0] = True  # a query that sees nothing has no answer
        for mask in (each, each[:1, 0], each[:, :, :1], causal_mask(T, 20), None):
            wanted = F.scaled_dot_product_attention(
                q,
                k.repeat_interleave(3, 1),
                v.repeat_interleave(3, 1),
                attn_mask=causal_mask(T, 20) if mask is None else mask,
            )
            assert torch.allclose(
                attention.grouped_query_attention(q, k, v, mask), wanted
            )


def test_few_queries_are_folded():
    folds_rightly()


def each_row_twice(q, mask, K):
    B_, H_, T, h_ = q.shape
    if mask is not None and mask.shape[-2] > 1:
        mask = mask.repeat_interleave(H_ // K, dim=-2)
    return q.reshape(B_, K, H_ // K * T, h_), mask


def heads_in_turn(q, mask, K):
    B_, H_, T, h_ = q.shape
    q = q.unflatten(1, (-1, K)).transpose(1, 2)
    return q.reshape(B_, K, -1, h_), FOLDED(q.flatten(1, 2), mask, K)[1]


FOLDED = attention._folded


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", [each_row_twice, heads_in_turn])
def test_folding_kills(mutant, monkeypatch):
    monkeypatch.setattr(attention, "_folded", mutant)
    with pytest.raises((AssertionError, RuntimeError)):
        folds_rightly()


@pytest.mark.parametrize("tile", [1, 2, 3, 4, 100])
def test_tiles_hold_with_documents_and_gradients(tile):
    """A query whose first tiles are masked entirely must not become nan."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, H, 6, h, generator=g, dtype=torch.float64)
    ids = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 4, 5]])
    leaves = [t.requires_grad_() for t in (q.clone(), k.clone(), v.clone())]
    mask = document_mask(ids)
    expected = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
    got = tiled(*leaves, mask, tile)
    assert torch.allclose(got, expected)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    found = torch.autograd.grad(got.square().sum(), leaves)
    assert all(torch.allclose(a, b) for a, b in zip(wanted, found))


def test_tiles_that_begin_at_minus_infinity_are_nan_with_documents(monkeypatch):
    q = torch.randn(1, 1, 6, 8)
    mask = document_mask(torch.tensor([[0, 0, 0, 1, 1, 2]]))
    assert not tiled(q, q, q, mask, 3).isnan().any()
    new_full = torch.Tensor.new_full
    monkeypatch.setattr(
        torch.Tensor,
        "new_full",
        lambda self, shape, lowest: new_full(self, shape, -torch.inf),
    )
    assert tiled(q, q, q, mask, 3).isnan().any()


def broken(scale=None, mask_of=lambda mask: mask, axis=-1):
    def attend(q, k, v, mask=None):
        mask = causal_mask(q.shape[2], k.shape[2]) if mask is None else mask
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        return scores.masked_fill(~mask_of(mask), -1e9).softmax(axis) @ v

    return attend


def one_ahead(mask):
    return torch.ones_like(mask).tril(mask.shape[1] - mask.shape[0] + 1)


def not_itself(mask):
    T, S = mask.shape
    key, query = torch.arange(S), torch.arange(T)[:, None] + S - T
    return mask & (key != query) | (key == 0)


def masked_afterwards(q, k, v, mask=None):
    mask = causal_mask(q.shape[2], k.shape[2]) if mask is None else mask
    return (q @ k.mT / h**0.5).softmax(-1).masked_fill(~mask, 0) @ v


def tiles_not_rescaled(q, k, v, mask=None):
    mask = causal_mask(q.shape[2], k.shape[2]) if mask is None else mask
    tiles = [
        broken()(q, k[..., part, :], v[..., part, :], mask[:, part])
        for part in (slice(0, 4), slice(4, 7))
    ]
    return torch.stack(tiles).mean(0)


def top_left_kernel(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


MUTANTS = {
    "no mask": broken(mask_of=torch.ones_like),
    "mask off by one": broken(mask_of=one_ahead),
    "mask aligned top-left": broken(mask_of=lambda mask: torch.ones_like(mask).tril()),
    "does not see itself": broken(mask_of=not_itself),
    "no 1/sqrt(h)": broken(scale=1.0),
    "divided by h": broken(scale=1 / h),
    "softmax over queries": broken(axis=-2),
    "is_causal with cached keys": top_left_kernel,
    "masked after the softmax": masked_afterwards,
    "tiles not rescaled": tiles_not_rescaled,
}


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_noticed(mutant, monkeypatch):
    monkeypatch.setattr(attention, "grouped_query_attention", MUTANTS[mutant])
    assert first_difference(packaged) is not None


@pytest.mark.mutant
@pytest.mark.parametrize(
    "mutant", ["mask aligned top-left", "is_causal with cached keys"]
)
def test_whole_sequences_alone_would_let_a_mutant_through(mutant):
    q = torch.randn(B, H, 7, h)
    right = attention.grouped_query_attention(q, q, q)
    assert torch.allclose(MUTANTS[mutant](q, q, q), right, atol=1e-5)


class Created(TorchDispatchMode):
    """Adds up the bytes of new tensors that PyTorch's operations return (a kernel's
    private scratch space is not seen).
    """

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage().data_ptr() for t in inputs}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.nbytes += storage.nbytes() * (storage.data_ptr() not in known)
        return out


def repeated(q, k, v, mask=None):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("masked", [False, True])
def test_shared_heads_are_not_copied_on_a_cpu(masked):
    q, (k, v) = torch.randn(1, 16, 1, 128), torch.randn(2, 1, 2, 1024, 128)
    mask = torch.ones(1, 1024, dtype=torch.bool) if masked else None
    made = {}
    for attend in (attention.grouped_query_attention, repeated):
        with Created() as count:
            out = attend(q, k, v, mask)
        assert torch.allclose(out, repeated(q, k, v), atol=1e-5)
        made[attend] = count.nbytes
    assert made[repeated] > 8 * (k.nbytes + v.nbytes)
    assert made[attention.grouped_query_attention] < k.nbytes / 8
