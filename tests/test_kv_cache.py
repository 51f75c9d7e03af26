"""The cache alone: room made in advance or growing, overflow, and the same keys and
values either way.
"""

import pytest
import torch
from book import hugging_face, scramble_
from hypothesis import given, settings, strategies as st
from transformers.cache_utils import DynamicCache

from qwen_analog import KVCache, QwenConfig, QwenForCausalLM, attention
from qwen_analog.attention import GQAttention
from qwen_analog.rope import RotaryEmbedding, apply_rotary


def fill(cache, pieces, layers=2):
    """Random keys and values in `pieces` of the given lengths; everything written,
    [layers][keys, values] each [B, K, S, h].
    """
    dice, written = torch.Generator().manual_seed(0), [[[], []] for _ in range(layers)]
    for length in pieces:
        for layer in range(layers):
            new = torch.randn(2, 2, 3, length, 4, generator=dice)
            got = cache.update(layer, *new)
            for kept, x, y in zip(written[layer], new, got):
                kept.append(x)
                assert torch.equal(y, torch.cat(kept, dim=2))
    return written


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    spare=st.integers(0, 40),
)
def test_a_growing_cache_holds_the_same(pieces, spare):
    total = sum(pieces)
    growing, fixed = (
        KVCache(2, 2, 3, 4, max_length=total + spare, growable=growable)
        for growable in (True, False)
    )
    fill(growing, pieces)
    fill(fixed, pieces)
    assert (
        growing.length == fixed.length == total
        and growing.max_length == fixed.max_length == total + spare
    )
    for a, b in ((growing.keys, fixed.keys), (growing.values, fixed.values)):
        assert (
            torch.equal(a[:, :, :, :total], b[:, :, :, :total])
            and total <= a.shape[3] <= b.shape[3] == total + spare
        )
        assert a.shape[3] <= max(16, 2 * total)


def test_doubles_up_to_the_end_and_no_further():
    cache, rooms = KVCache(1, 1, 1, 2, max_length=100, growable=True), []
    for _ in range(100):
        cache.update(0, *torch.zeros(2, 1, 1, 1, 2))
        rooms.append(cache.keys.shape[3])
    assert sorted(set(rooms)) == [16, 32, 64, 100] and cache.nbytes == 2 * 100 * 2 * 4
    with pytest.raises(ValueError, match="holds 100 tokens; 101 are needed"):
        cache.update(0, *torch.zeros(2, 1, 1, 1, 2))
    assert cache.length == 100 and cache.keys.shape[3] == 100
    assert KVCache(1, 1, 1, 2, max_length=5, growable=True).keys.shape[3] == 5


@pytest.mark.parametrize("growable", [False, True])
def test_overflow_changes_nothing(growable):
    cache = KVCache(2, 2, 3, 4, max_length=20, growable=growable)
    fill(cache, [7])
    before, room = cache.keys[:, :, :, :7].clone(), cache.keys.shape
    with pytest.raises(
        ValueError,
        match="holds 20 tokens; 21 are needed: make it with a larger max_length",
    ) as error:
        cache.update(0, *torch.zeros(2, 2, 3, 14, 4))
    assert "\n" not in str(error.value)
    assert (
        cache.lengths == [7, 7]
        and cache.keys.shape == room
        and torch.equal(cache.keys[:, :, :, :7], before)
    )


def test_growing_keeps_dtype_device_and_what_crop_left():
    cache = KVCache(
        2, 1, 2, 4, max_length=64, dtype=torch.bfloat16, device="meta", growable=True
    )
    cache.update(0, *torch.zeros(2, 1, 2, 40, 4, dtype=torch.bfloat16, device="meta"))
    assert (
        cache.keys.shape == (2, 1, 2, 40, 4)
        and cache.keys.dtype == torch.bfloat16
        and cache.values.is_meta
    )
    cache = KVCache(2, 2, 3, 4, max_length=64, growable=True)
    fill(cache, [15])
    kept = cache.keys[:, :, :, :5].clone()
    cache.crop(5)
    fill_more = torch.ones(2, 2, 3, 30, 4)
    for layer in range(2):
        cache.update(layer, *fill_more)
    assert (
        cache.length == 35
        and torch.equal(cache.keys[:, :, :, :5], kept)
        and (cache.keys[:, :, :, 5:35] == 1).all()
    )


def test_one_layer_may_run_ahead():
    cache, new = (
        KVCache(2, 1, 1, 2, max_length=64, growable=True),
        torch.randn(2, 1, 1, 40, 2),
    )
    for piece in new.split(10, dim=3):
        keys, values = cache.update(0, *piece)
    assert (
        cache.lengths == [40, 0]
        and torch.equal(keys, new[0])
        and torch.equal(values, new[1])
    )


def test_a_model_writes_the_same_with_either():
    model = QwenForCausalLM(QwenConfig.from_preset("tiny")).eval()
    config, ids = (
        model.config,
        torch.randint(512, (2, 50), generator=torch.Generator().manual_seed(0)),
    )
    growing = KVCache(
        config.num_hidden_layers,
        2,
        config.num_key_value_heads,
        config.head_dim,
        50,
        growable=True,
    )
    fixed = model.new_cache(2, 50)
    with torch.no_grad():
        for piece in ids.split([1, 15, 1, 20, 13], dim=1):
            assert torch.equal(model(piece, cache=growing), model(piece, cache=fixed))


# A layer with a cache, in pieces, beside one pass, and wrong uses of a cache.

WAYS = ([8], [1] * 8, [3, 5], [5, 1, 2], [1, 7])


@pytest.fixture(scope="module")
def one_pass():
    layer = scramble_(GQAttention(32, 4, 4)).double()
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 32, generator=dice, dtype=torch.float64)
    cos, sin = RotaryEmbedding(8, 1e4)(torch.arange(8)[None], x.dtype)
    with torch.no_grad():
        return layer, x, layer(x, cos, sin)


def first_difference(one_pass, start=lambda length: length):
    """Return the first way of cutting whose outputs differ from one pass."""
    layer, x, whole = one_pass
    rope = RotaryEmbedding(8, 1e4)
    for way in WAYS:
        cache, out = KVCache(1, 2, 4, 8, max_length=8, dtype=x.dtype), []
        for piece in x.split(way, dim=1):
            begin = start(out_length(out))
            positions = torch.arange(begin, begin + piece.shape[1])[None]
            cos, sin = rope(positions, x.dtype)
            with torch.no_grad():
                out.append(layer(piece, cos, sin, cache=cache))
        gap = (torch.cat(out, dim=1) - whole).abs().max().item()
        if not gap < 1e-9:
            return f"cut into {way}: outputs differ by {gap:.1e}"
    return None


def out_length(out):
    return sum(piece.shape[1] for piece in out)


def test_any_pieces_give_the_outputs_of_one_pass(one_pass):
    assert first_difference(one_pass) is None


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-5), (torch.float32, 1e-4), (torch.bfloat16, 0)],
)
def test_pieces_give_the_logits_of_hugging_face(dtype, bound):
    config = QwenConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=False,
    )
    theirs = scramble_(hugging_face(config))
    ours = QwenForCausalLM(config)
    ours.load_state_dict(theirs.state_dict())
    ours.to(dtype)
    theirs.to(dtype)
    ids = torch.randint(96, (2, 11), generator=torch.Generator().manual_seed(0))
    our_cache, their_cache = ours.new_cache(2, 11), DynamicCache()
    for piece in ids.split([4, 1, 5, 1], dim=1):
        with torch.no_grad():
            our_logits = ours(piece, cache=our_cache)  # [B, T, V]
            their_logits = theirs(piece, past_key_values=their_cache).logits
        assert (our_logits - their_logits).abs().max() <= bound


real_update = KVCache.update


def overwrite_first(cache, layer_idx, k, v):
    cache.crop(0)
    return real_update(cache, layer_idx, k, v)


def one_short(cache, layer_idx, k, v):
    cache.crop(max(0, cache.length - 1))
    return real_update(cache, layer_idx, k, v)


def values_late(cache, layer_idx, k, v):
    k, v = real_update(cache, layer_idx, k, v)
    return k, v.roll(1, dims=2)


def only_last_piece(cache, layer_idx, k, v):
    real_update(cache, layer_idx, k, v)
    return k, v


def kept_before_rotation(cache, layer_idx, k, v):
    positions = torch.arange(cache.length, cache.length + k.shape[2])[None]
    cos, sin = RotaryEmbedding(8, 1e4)(positions, k.dtype)
    raw, v = real_update(cache, layer_idx, apply_rotary(k, cos, -sin), v)
    return torch.cat((raw[:, :, : -k.shape[2]], k), dim=2), v


def top_left(T, S, device=None):
    return torch.ones(T, S, dtype=torch.bool).tril()


def no_mask(T, S, device=None):
    return torch.ones(T, S, dtype=torch.bool)


MUTANTS = {
    "mask aligned top-left": (attention, "causal_mask", top_left),
    "no mask": (attention, "causal_mask", no_mask),
    "keys kept before rotation": (KVCache, "update", kept_before_rotation),
    "writes at the start again": (KVCache, "update", overwrite_first),
    "overwrites the last token": (KVCache, "update", one_short),
    "values shifted against keys": (KVCache, "update", values_late),
    "returns only the new tokens": (KVCache, "update", only_last_piece),
}
POSITIONS = {
    "positions restart at each piece": lambda length: 0,
    "positions one too far": lambda length: length + (length > 0),
}


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", [*MUTANTS, *POSITIONS])
def test_a_mutant_is_noticed(mutant, one_pass, monkeypatch):
    if mutant in POSITIONS:
        assert first_difference(one_pass, POSITIONS[mutant]) is not None
        return
    monkeypatch.setattr(*MUTANTS[mutant])
    assert first_difference(one_pass) is not None


def test_every_way_to_cut_eight_tokens_with_documents():
    """All cuts of a packed row through grouped heads, each piece with its rows of the
    mask.
    """
    layer = scramble_(GQAttention(48, 4, 2)).double()
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0] * 8])
    mask = attention.document_mask(ids)
    positions = attention.document_positions(ids)
    cos, sin = RotaryEmbedding(12, 1e4)(positions, torch.float64)
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 48, generator=dice, dtype=torch.float64)

    def cuts(n):
        later = [[k, *rest] for k in range(1, n) for rest in cuts(n - k)]
        return [[n], *later]

    with torch.no_grad():
        whole = layer(x, cos, sin, mask)
        assert len(cuts(8)) == 2**7
        for way in cuts(8):
            cache, out = KVCache(1, 2, 2, 12, max_length=8, dtype=x.dtype), []
            for n in way:
                new = slice(cache.length, cache.length + n)
                seen = mask[..., new, : new.stop]
                tables = cos[:, new], sin[:, new]
                out.append(layer(x[:, new], *tables, seen, cache))
            assert torch.allclose(torch.cat(out, dim=1), whole, atol=1e-12)
