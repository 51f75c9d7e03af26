"""The cache alone: room made in advance or growing, overflow, and the same keys and
values either way.
"""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from qwen_analog import KVCache, QwenConfig, QwenForCausalLM


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
