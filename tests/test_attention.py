"""Masks cell by cell, and grouped-query attention beside Hugging Face's layer: causal,
with documents, with a cache, in five shapes and three number formats.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from book import attention_tables, scramble_
from helpers import small_model
from transformers.cache_utils import DynamicCache
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from qwen_analog import attention
from qwen_analog.attention import (
    GQAttention,
    causal_mask,
    document_mask,
    document_positions,
)
from qwen_analog.kv_cache import KVCache
from qwen_analog.rope import RotaryEmbedding, apply_rotary

SHAPES = {  # D, H, K, h
    "plain": (48, 4, 2, 12),
    "head_dim not D/H": (48, 4, 2, 20),
    "groups of 3": (72, 6, 2, 12),
    "K = 1": (48, 4, 1, 12),
    "K = H": (48, 4, 4, 12),
}
LENGTH, PIECES = 9, (4, 1, 3, 1)
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0] * LENGTH])


def test_masks_cell_by_cell():
    for T, S in ((1, 1), (4, 4), (3, 7), (1, 5)):
        expected = [[s <= t + S - T for s in range(S)] for t in range(T)]
        assert causal_mask(T, S).tolist() == expected
    with pytest.raises(ValueError, match="key_length 2 is smaller than query_length 3"):
        causal_mask(3, 2)
    ids = DOCUMENTS.tolist()
    expected = [
        [[[s <= t and a[s] == a[t] for s in range(LENGTH)] for t in range(LENGTH)]]
        for a in ids
    ]
    assert document_mask(DOCUMENTS).tolist() == expected
    assert document_positions(DOCUMENTS).tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 3, 4],
        list(range(LENGTH)),
    ]


def test_heads_that_do_not_share_evenly_are_refused():
    with pytest.raises(ValueError, match="num_heads 4 is not a multiple of num_kv"):
        GQAttention(48, 4, 3)


def hugging_face(D, H, K, h):
    config = Qwen2Config(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=h,
        num_hidden_layers=1,
    )
    config._attn_implementation = "sdpa"
    return scramble_(Qwen2Attention(config, layer_idx=0))


def reference_in_pieces(module, x, cos, sin):
    cache, out, start = DynamicCache(), [], 0
    for n in PIECES:
        new, start = slice(start, start + n), start + n
        mask = causal_mask(n, start)[None, None] if n > 1 else None
        tables = cos[:, new], sin[:, new]
        out.append(module(x[:, new], tables, mask, past_key_values=cache)[0])
    return torch.cat(out, dim=1)


def ours_in_pieces(module, x, cos, sin):
    K = module.k_proj.out_features // module.head_dim
    cache = KVCache(1, len(x), K, module.head_dim, LENGTH, dtype=x.dtype)
    out, start = [], 0
    for n in PIECES:
        new, start = slice(start, start + n), start + n
        out.append(module(x[:, new], cos[:, new], sin[:, new], cache=cache))
    return torch.cat(out, dim=1)


def run(call, module, x, upstream):
    """Return output, gradient of the input, gradients of the weights."""
    leaf = x.clone().requires_grad_()
    module.zero_grad()
    y = call(leaf)
    y.backward(upstream)
    return {"outputs": y.detach(), "x": leaf.grad} | {
        name: p.grad for name, p in module.named_parameters()
    }


def reference_results(shape, dtype):
    D, H, K, h = SHAPES[shape]
    module = hugging_face(D, H, K, h).to(dtype)
    g = torch.Generator().manual_seed(1)
    x, upstream = torch.randn(2, 2, LENGTH, D, generator=g).to(dtype)
    cos, sin = RotaryEmbedding(h, 1e4)(torch.arange(LENGTH)[None], dtype)
    uses = {
        use: run(lambda v: module(v, (cos, sin), mask)[0], module, x, upstream)
        for use, mask in (("causal", None), ("documents", document_mask(DOCUMENTS)))
    }
    with torch.no_grad():
        uses["cached"] = {"outputs": reference_in_pieces(module, x, cos, sin)}
    return module.state_dict(), (x, upstream, cos, sin), uses


DTYPES = (torch.float64, torch.float32, torch.bfloat16)
REFERENCE = {
    (shape, dtype): reference_results(shape, dtype)
    for shape in SHAPES
    for dtype in DTYPES
}


def our_results(shape, dtype):
    weights, (x, upstream, cos, sin), _ = REFERENCE[shape, dtype]
    D, H, K, h = SHAPES[shape]
    module = GQAttention(D, H, K, h).to(dtype)
    module.load_state_dict(weights)
    uses = {
        use: run(lambda v: module(v, cos, sin, mask), module, x, upstream)
        for use, mask in (("causal", None), ("documents", document_mask(DOCUMENTS)))
    }
    with torch.no_grad():
        uses["cached"] = {"outputs": ours_in_pieces(module, x, cos, sin)}
    return uses


def gap(a, b):
    return float("inf") if b is None else ((a - b).abs().max() / a.abs().max()).item()


def first_difference():
    for dtype, bound in zip(DTYPES, (1e-10, 1e-4, 0)):
        for shape in SHAPES:
            ours, (_, _, theirs) = our_results(shape, dtype), REFERENCE[shape, dtype]
            for use, expected in theirs.items():
                for name, a in expected.items():
                    bits = dtype == torch.bfloat16  # equal bits of outputs are asked
                    if bits and name != "outputs":
                        continue
                    found = gap(a, ours[use].get(name))
                    if not found <= bound:
                        return f"{shape}, {dtype}: {use} {name} off by {found:.1e}"
    return None


def test_it_is_the_reference():
    assert first_difference() is None


real_sdpa, real_attention = (
    F.scaled_dot_product_attention,
    attention.grouped_query_attention,
)


def sdpa(change):
    def changed(q, k, v, **options):
        return real_sdpa(*change(q, k, v, options), **options)

    return attention.F, "scaled_dot_product_attention", changed


def tiled(q, k, v, options):
    n = q.shape[1] // k.shape[1]
    return q, k.repeat(1, n, 1, 1), v.repeat(1, n, 1, 1)


def with_option(**changes):
    def change(q, k, v, options):
        options.update(changes)
        return q, k, v

    return change


def scale_from_width(q, k, v, options):
    options["scale"] = (48 / q.shape[1]) ** -0.5
    return q, k, v


def top_left(T, S=None, device=None):
    S = T if S is None else S
    return torch.ones(T, S, dtype=torch.bool, device=device).tril()


def rotation(change):
    return attention, "apply_rotary", change


def interleaved(x, cos, sin):
    half = x.shape[-1] // 2
    a, b, c, s = (
        x[..., ::2],
        x[..., 1::2],
        cos[:, None, :, :half],
        sin[:, None, :, :half],
    )
    return torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)


def only(keys):
    """Rotate keys only, or queries only: they are told apart by their order."""

    calls = []

    def change(x, cos, sin):
        calls.append(x)
        is_key = len(calls) % 2 == 0
        return apply_rotary(x, cos, sin) if is_key == keys else x

    return change


def drop_bias(name):
    def forward(self, *arguments, real=GQAttention.forward, **options):
        projection = getattr(self, name)
        bias, projection.bias = projection.bias, None
        try:
            return real(self, *arguments, **options)
        finally:
            projection.bias = bias

    return GQAttention, "forward", forward


def split_without_transpose(self, y):
    return y.reshape(y.shape[0], -1, y.shape[1], self.head_dim)


def values_turned(q, k, v, mask=None):
    return real_attention(q, k, v.flip(-1), mask)


def softmax_in_bfloat16(q, k, v, mask=None):
    n, T, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1)
    mask = causal_mask(T, S) if mask is None else mask
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


MUTANTS = {
    "no bias on q": drop_bias("q_proj"),
    "no bias on k": drop_bias("k_proj"),
    "no bias on v": drop_bias("v_proj"),
    "heads tiled": sdpa(tiled),
    "no scale": sdpa(with_option(scale=1.0)),
    "scale from the width": sdpa(scale_from_width),
    "no causal mask": sdpa(with_option(is_causal=False)),
    "queries not rotated": rotation(only(keys=True)),
    "keys not rotated": rotation(only(keys=False)),
    "interleaved rotation": rotation(interleaved),
    "mask top-left": (attention, "causal_mask", top_left),
    "given mask ignored": (
        attention,
        "grouped_query_attention",
        lambda q, k, v, mask=None: real_attention(q, k, v),
    ),
    "keys detached": sdpa(lambda q, k, v, options: (q, k.detach(), v)),
    "values detached": sdpa(lambda q, k, v, options: (q, k, v.detach())),
    "values turned": (attention, "grouped_query_attention", values_turned),
    "softmax in bfloat16": (attention, "grouped_query_attention", softmax_in_bfloat16),
    "split without transpose": (
        attention.HeadProjections,
        "heads",
        split_without_transpose,
    ),
}


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_noticed(mutant, monkeypatch):
    monkeypatch.setattr(*MUTANTS[mutant])
    assert first_difference() is not None


def test_the_output_has_no_bias():
    keys = {f"{n}_proj.weight" for n in "qkvo"} | {f"{n}_proj.bias" for n in "qkv"}
    assert set(GQAttention(48, 4, 2).state_dict()) == keys


def test_the_shown_weights_are_those_that_mix_the_values():
    model = small_model()
    ids = [5, 3, 7, 3]
    tokenizer = SimpleNamespace(encode=lambda text: ids, decode=str)
    _, tables = attention_tables(model, tokenizer, "")  # [layer, H, T, S]
    layer = model.model.layers[1].self_attn
    values, mixed = [], []
    layer.v_proj.register_forward_hook(lambda module, x, y: values.append(y[0]))
    layer.o_proj.register_forward_hook(lambda module, x, y: mixed.append(x[0][0]))
    model(torch.tensor([ids]))
    heads = values[0].unflatten(-1, (-1, layer.head_dim)).transpose(0, 1)  # [K, S, h]
    heads = heads.repeat_interleave(tables.shape[1] // len(heads), dim=0)
    expected = (tables[1] @ heads).transpose(0, 1).flatten(1)  # [T, H h]
    assert torch.allclose(mixed[0], expected, atol=1e-4)
