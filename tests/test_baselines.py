"""Baselines: proper n-grams, and what text adds to an .xz file."""

import lzma
import math
from collections import Counter

import numpy as np
import pytest

from qwen_analog.baselines import NGram, xz_bits_per_byte, xz_size


def random_text(seed, lines=60, letters=6):
    """A Markov chain of order 2 over a few ids; id 0 opens each document."""
    rng = np.random.default_rng(seed)
    table = np.random.default_rng(99).dirichlet(
        np.full(letters, 0.15), size=(letters + 1, letters + 1)
    )
    documents = []
    for _ in range(lines):
        ids = [0, 0]
        for _ in range(int(rng.integers(1, 30))):
            ids.append(1 + int(rng.choice(letters, p=table[ids[-2], ids[-1]])))
        documents.append(ids[1:])
    return documents


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_ngrams_sum_to_one(order):
    model = NGram(9, order).fit(random_text(0))
    for context in (
        [0],
        [0, 3],
        [0, 1, 2, 3, 4, 5, 6],
        [0, 8, 8, 8],
        [0, *[2] * 9],
        [7],
    ):
        p = model.distribution(context)
        assert p.shape == (9,) and abs(p.sum() - 1) < 1e-12 and (p > 0).all()


def test_ngram_nll_is_the_distribution_s():
    model = NGram(9, 3).fit(random_text(0))
    ids = random_text(1)[4]
    assert np.allclose(
        model.nll(ids),
        [-math.log(model.distribution(ids[:t])[ids[t]]) for t in range(1, len(ids))],
    )
    assert len(model.nll(ids)) == len(ids) - 1 and len(model.nll([0])) == 0


def kneser_ney(documents, vocab_size, order, context, token):
    """By the definition, with dictionaries."""
    padded = [[d[0]] * (order - 1) + list(d) for d in documents]
    grams = Counter(
        tuple(d[t - order + 1 : t + 1]) for d in padded for t in range(order, len(d))
    )
    levels = [grams]
    for _ in range(order - 1):
        levels.insert(
            0, Counter(g[1:] for g in levels[0])
        )  # how many different ids stand before it
    p = 1 / vocab_size
    for k, counts in enumerate(levels):
        history = tuple(
            ([context[0]] * order + list(context))[len(context) + order - k :]
        )
        once, twice = (sum(c == n for c in counts.values()) for n in (1, 2))
        D = once / (once + 2 * twice) if once and twice else 0.5
        total, kinds = (
            sum(f(c) for g, c in counts.items() if g[:-1] == history)
            for f in (int, bool)
        )
        if total:
            p = (max(counts[(*history, token)] - D, 0) + D * kinds * p) / total
    return p


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ngram_equals_its_definition(order):
    documents = random_text(2, lines=12)
    model = NGram(9, order).fit(documents)
    for context in ([0], [0, 1], [0, 3, 2, 2], [0, 5, 5, 5, 1, 2], [0, 8, 1]):
        expected = [
            kneser_ney(documents, 9, order, context, token) for token in range(9)
        ]
        assert np.allclose(model.distribution(context), expected, atol=1e-12)


def test_higher_orders_help_and_stop_helping():
    train, held = random_text(3, lines=800), random_text(4, lines=100)
    models = [NGram(9, order).fit(train) for order in (1, 2, 3, 5)]
    losses = [np.concatenate([model.nll(d) for d in held]).mean() for model in models]
    assert (
        losses[0] > losses[1] + 0.1 and losses[1] > losses[2] + 0.1
    )  # the text has order 2: a trigram says it all
    assert losses[2] - 0.01 < losses[3] < losses[2] + 0.05
    table = np.random.default_rng(99).dirichlet(np.full(6, 0.15), size=(7, 7))
    entropy = np.mean(
        [
            -math.log(table[([0] + d)[t - 1], d[t - 1]][d[t] - 1])
            for d in held
            for t in range(1, len(d))
        ]
    )
    assert entropy < losses[2] < entropy + 0.1


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: NGram(9, 0), "order of at least 1"),
        (lambda: NGram(9).fit([[0, 9]]), "ids must lie from 0 to 8"),
        (lambda: NGram(9).fit([[0], [0]]), "no tokens"),
        (lambda: NGram(9).fit(random_text(0)).nll([0, 12]), "ids must lie"),
    ],
)
def test_impossible_ngrams(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_xz():
    noise = np.random.default_rng(0).bytes(20_000)
    assert 7.9 < xz_bits_per_byte(noise) < 8.3
    assert xz_bits_per_byte(noise, before=noise) < 0.2
    assert xz_bits_per_byte(b"abc " * 5000) < 0.1


def test_pieces_are_one_file():
    """The sizes of texts that come one by one are those of the joined text."""
    texts = ["one text", "", "another, longer text " * 50]
    joined = "\n".join(texts).encode()
    preset = 9 | lzma.PRESET_EXTREME
    assert xz_size(iter(texts)) == len(lzma.compress(joined, preset=preset))
    assert xz_size([], joined) == xz_size(texts)


def test_nothing_to_compress_or_to_count():
    for nothing in (
        lambda: xz_bits_per_byte(b""),
        lambda: NGram(9).fit([]),
        lambda: NGram(9).fit([[]]),
    ):
        with pytest.raises(ValueError):
            nothing()
