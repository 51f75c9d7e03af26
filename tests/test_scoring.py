"""Scores of text: every token counted once and as Hugging Face counts it, honest
intervals, grammar.
"""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import BYTES, SMALL
from hypothesis import given, strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from book import scramble_
from qwen_analog.checkpoint import hf_config
from qwen_analog.model import QwenForCausalLM
from qwen_analog.scoring import (
    MINIMAL_PAIRS,
    Evaluation,
    document_nll,
    evaluate_documents,
    loss_by_position,
    minimal_pair_accuracy,
    paired_difference,
    sliding_windows,
    summary,
    token_nll,
    wilson,
)
from qwen_analog.bpe import train_bpe
from qwen_analog.tokenizer import TiktokenTokenizer

BPE = TiktokenTokenizer(
    train_bpe(["the cat sat on the mat and the other cat sat on the hat"] * 3, 270)
)
CONFIG = dataclasses.replace(SMALL, max_position_embeddings=24)
MODEL = scramble_(QwenForCausalLM(CONFIG)).eval()
TEXTS = [
    "The cat sat.",
    "a",
    "Zürich, one of the larger cities by the lake; it is old.",
    "",
    "the cat sat on the mat and on the hat",
]


def ids_of(text, tokenizer=BYTES):
    return [tokenizer.eos_token_id, *tokenizer.encode(text)]


def nll_after(context, token):
    """-ln p of one token after exactly these, from one forward pass."""
    with torch.no_grad():
        return -MODEL(torch.tensor([context]))[0, -1].log_softmax(-1)[token].item()


def hugging_faces():
    """MODEL as transformers builds it."""
    values = hf_config(CONFIG)
    del values["architectures"], values["model_type"]
    theirs = Qwen2ForCausalLM(Qwen2Config(**values)).eval()
    theirs.load_state_dict(MODEL.state_dict())
    return theirs


# windows


@given(length=st.integers(0, 200), context=st.integers(1, 40), data=st.data())
def test_windows_count_every_token_once(length, context, data):
    stride = data.draw(st.integers(1, context))
    windows = list(sliding_windows(length, context, stride))
    assert [t for _, first, end in windows for t in range(first, end)] == list(
        range(length)
    )
    for start, first, end in windows:
        assert 0 <= start <= first < end and end - start <= context
        # target t sees inputs start .. t: the end-of-text token or text, and context -
        # stride more at least
        assert start == 0 or first - start >= context - stride


def check_windows(windows):
    """Every token is counted once, with as much context as promised."""
    cases = ((20, 8, 4), (20, 8, 8), (7, 8, 4), (8, 8, 3), (1, 4, 1), (0, 4, 2))
    for length, context, stride in (*cases, (23, 5, 1)):
        found = list(windows(length, context, stride))
        counted = [t for _, first, end in found for t in range(first, end)]
        assert counted == list(range(length))
        for start, first, end in found:
            assert end - start <= context
            assert start == 0 or first - start >= context - stride


def counts_the_overlap_again(start, first, end, context, stride):
    return start, start, end


def drops_the_first_token(start, first, end, context, stride):
    return start, max(1, first), end


def drops_the_tail(start, first, end, context, stride):
    return (start, first, end) if end - first in (context, stride) else None


def starts_anew(start, first, end, context, stride):
    return first, first, end


def reads_one_too_many(start, first, end, context, stride):
    return max(0, start - 1), first, end


def test_windows():
    check_windows(sliding_windows)


@pytest.mark.mutant
@pytest.mark.parametrize(
    "change",
    [
        counts_the_overlap_again,
        drops_the_first_token,
        drops_the_tail,
        starts_anew,
        reads_one_too_many,
    ],
)
def test_windows_kill(change):
    def windows(length, context, stride):
        for window in sliding_windows(length, context, stride):
            if changed := change(*window, context, stride):
                yield changed

    with pytest.raises(AssertionError):
        check_windows(windows)


def test_equals_one_forward_pass_when_the_context_fits():
    for text in TEXTS[:3]:
        ids = torch.tensor([ids_of(text)])[:, :25]
        expected = torch.nn.functional.cross_entropy(
            MODEL(ids[:, :-1])[0], ids[0, 1:], reduction="none"
        ).detach()
        (nats,) = token_nll(MODEL, BYTES, [BYTES.decode(ids[0, 1:].tolist())])
        assert np.allclose(nats, expected, atol=1e-5) and len(nats) == ids.shape[1] - 1


@pytest.mark.parametrize("context,stride", [(8, 3), (8, 8), (5, 1), (24, 12), (1, 1)])
def test_sliding_equals_a_pass_for_each_token(context, stride):
    ids = ids_of(TEXTS[2])
    expected, end = [], min(context, len(ids) - 1)
    while len(expected) < len(ids) - 1:
        expected += [
            nll_after(ids[max(0, end - context) : t + 1], ids[t + 1])
            for t in range(len(expected), end)
        ]
        end = min(end + stride, len(ids) - 1)
    (nats,) = token_nll(MODEL, BYTES, [TEXTS[2]], context=context, stride=stride)
    assert np.allclose(nats, expected, atol=1e-4)
    total, count = document_nll(MODEL, BYTES, TEXTS[2], context=context, stride=stride)
    assert abs(total - sum(expected)) < 1e-3 and count == len(ids) - 1 == len(
        BYTES.encode(TEXTS[2])
    )


def test_a_full_context_is_the_default_and_half_of_it_the_stride():
    assert document_nll(MODEL, BYTES, TEXTS[2]) == document_nll(
        MODEL, BYTES, TEXTS[2], context=24, stride=12
    )
    assert document_nll(MODEL, BYTES, TEXTS[2]) != document_nll(
        MODEL, BYTES, TEXTS[2], stride=24
    )


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batches_do_not_mix(batch_size):
    together = token_nll(
        MODEL, BYTES, TEXTS, context=9, stride=4, batch_size=batch_size
    )
    for text, nats in zip(TEXTS, together):
        assert np.allclose(
            nats, token_nll(MODEL, BYTES, [text], context=9, stride=4)[0], atol=1e-5
        )
    assert [len(nats) for nats in together] == [
        len(BYTES.encode(text)) for text in TEXTS
    ]


def test_equals_hugging_face():
    theirs = hugging_faces()
    for text in TEXTS[:3]:
        ids = torch.tensor([ids_of(text)])[:, :25]
        with torch.no_grad():
            loss = theirs(
                ids, labels=ids
            ).loss.item()  # the mean over all tokens but the first
        nats, tokens = document_nll(MODEL, BYTES, BYTES.decode(ids[0, 1:].tolist()))
        assert abs(nats / tokens - loss) < 1e-5


@pytest.mark.parametrize(
    "options,message",
    [
        ({"context": 25}, "context must lie from 1 to 24"),
        ({"context": 0}, "context must lie"),
        ({"context": 8, "stride": 9}, "stride must lie from 1 to"),
        ({"stride": 0}, "stride must lie"),
    ],
)
def test_impossiblesliding_windows(options, message):
    with pytest.raises(ValueError, match=message):
        document_nll(MODEL, BYTES, "text", **options)


def test_a_tokenizer_of_another_model():
    big = TiktokenTokenizer(
        train_bpe(
            [
                "some more words, enough of them for a few dozen merges, "
                + " ".join(TEXTS)
            ],
            310,
        )
    )
    assert big.vocab_size > CONFIG.vocab_size
    with pytest.raises(ValueError, match="do not belong together"):
        document_nll(MODEL, big, "text")


def test_weights_that_are_not_finite():
    broken = scramble_(QwenForCausalLM(CONFIG)).eval()
    broken.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="not all finite"):
        document_nll(broken, BYTES, "text")


# documents


def test_evaluation_adds_up():
    found = evaluate_documents(MODEL, BPE, TEXTS)
    assert found.tokens.tolist() == [len(BPE.encode(text)) for text in TEXTS]
    assert (
        found.bytes.tolist() == [len(text.encode()) for text in TEXTS]
        and found.bytes.sum() > found.tokens.sum()
    )
    total = sum(document_nll(MODEL, BPE, text)[0] for text in TEXTS)
    assert math.isclose(
        found.loss, total / found.tokens.sum(), rel_tol=1e-5
    ) and math.isclose(found.perplexity, math.exp(found.loss))
    assert math.isclose(
        found.bits_per_byte,
        total / math.log(2) / sum(len(text.encode()) for text in TEXTS),
        rel_tol=1e-5,
    )


def test_bytes_are_those_of_the_text_as_given():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    a, b = (evaluate_documents(MODEL, BYTES, [text]) for text in (composed, decomposed))
    assert (
        a.nll == b.nll and a.tokens == b.tokens == 5
    )  # the tokenizer brings both to the same ids
    assert a.bytes == 5 and b.bytes == 6 and a.bits_per_byte > b.bits_per_byte


def test_nothing_to_evaluate():
    for texts in ([], [""]):
        with pytest.raises(ValueError, match="no tokens"):
            evaluate_documents(MODEL, BYTES, texts)


def draw_documents(rng, n):
    """Documents whose bits per byte differ, with a length that goes with it."""
    bytes = rng.integers(20, 400, n)
    return Evaluation(bytes * rng.normal(1.5 - 0.001 * bytes, 0.2), bytes // 4, bytes)


def test_standard_error_covers_and_equals_the_bootstrap():
    rng = np.random.default_rng(0)
    truth = draw_documents(rng, 200_000).bits_per_byte
    samples = [draw_documents(rng, 60) for _ in range(400)]
    inside = np.mean(
        [abs(e.bits_per_byte - truth) < 1.96 * e.standard_error for e in samples]
    )
    assert 0.91 < inside < 0.98
    one = samples[0]
    rows = rng.integers(60, size=(2000, 60))
    bootstrap = [
        Evaluation(one.nll[r], one.tokens[r], one.bytes[r]).bits_per_byte for r in rows
    ]
    assert 0.9 < one.standard_error / np.std(bootstrap) < 1.12
    assert math.isnan(
        Evaluation(np.array([3.0]), np.array([2]), np.array([5])).standard_error
    )


def test_paired_difference():
    rng = np.random.default_rng(1)
    inside, wins = [], 0
    for _ in range(300):
        a = draw_documents(rng, 60)
        b = Evaluation(
            a.nll - a.bytes * rng.normal(0.02, 0.05, 60) * math.log(2),
            a.tokens,
            a.bytes,
        )
        difference, error = paired_difference(a, b)
        inside.append(abs(difference - 0.02) < 1.96 * error)
        wins += error < 0.5 * a.standard_error
    assert (
        0.91 < np.mean(inside) < 0.985 and wins == 300
    )  # and far finer than each figure alone
    with pytest.raises(ValueError, match="same documents"):
        paired_difference(a, draw_documents(rng, 60))


def unpaired(a, b):
    """The errors of the two, as if they had read different documents."""
    return math.hypot(a.standard_error, b.standard_error)


def by_token(a, b):
    """As if every token were drawn by itself."""
    spread = np.std((a.nll - b.nll) / a.tokens) / math.log(2)
    return spread * a.tokens.sum() ** 0.5 / a.bytes.sum()


def paired(a, b):
    return paired_difference(a, b)[1]


def coverage(error):
    """How often two errors to either side hold the true difference."""
    rng, inside = np.random.default_rng(1), []
    for _ in range(300):
        a = draw_documents(rng, 60)
        gain = a.bytes * rng.normal(0.02, 0.05, 60) * math.log(2)
        b = Evaluation(a.nll - gain, a.tokens, a.bytes)
        difference = a.bits_per_byte - b.bits_per_byte
        inside.append(abs(difference - 0.02) < 1.96 * error(a, b))
    return np.mean(inside)


def test_paired_errors_cover():
    assert 0.91 < coverage(paired) < 0.985


@pytest.mark.mutant
@pytest.mark.parametrize("error", [unpaired, by_token])
def test_coverage_kills(error):
    assert not 0.91 < coverage(error) < 0.985


def test_loss_by_position():
    mean, count = loss_by_position(token_nll(MODEL, BYTES, TEXTS, context=14), 14)
    assert (
        len(mean) == len(count) == 14
        and count[0] == 4
        and count[1] == 3
        and count[13] == 2
        and count[12] == 2
    )
    assert math.isclose(
        mean[0],
        np.mean([nll_after(ids_of(t)[:1], ids_of(t)[1]) for t in TEXTS if t]),
        rel_tol=1e-5,
    )
    assert math.isclose(
        mean[13],
        np.mean(
            [nll_after(ids_of(t)[:14], ids_of(t)[14]) for t in (TEXTS[2], TEXTS[4])]
        ),
        rel_tol=1e-5,
    )
    mean, count = loss_by_position(token_nll(MODEL, BYTES, ["abc"]), 24)
    assert count[3] == 0 and np.isnan(mean[3]) and len(mean) == 24


# the grammar probe


def test_the_pairs_are_pairs():
    assert (
        5 <= len(MINIMAL_PAIRS) <= 8
        and 60 <= sum(map(len, MINIMAL_PAIRS.values())) <= 120
    )
    sentences = [
        sentence
        for pairs in MINIMAL_PAIRS.values()
        for pair in pairs
        for sentence in pair
    ]
    assert len(set(sentences)) == len(sentences) and all(
        s[0].isupper() and s[-1] == "." and s.isascii() for s in sentences
    )
    for name, pairs in MINIMAL_PAIRS.items():
        for good, bad in pairs:
            a, b = good.split(), bad.split()
            if name == "word order":
                assert sorted(a) == sorted(b) and a != b
            else:
                assert (
                    len(a) - len(b) in (0, 1)
                    and sum((Counter(a) - Counter(b)).values()) <= 3
                )


BALANCED = (
    "agreement",
    "agreement at a distance",
    "determiner and noun",
    "reflexives",
    "verb forms",
    "a or an",
)


@pytest.mark.parametrize("name", BALANCED)
def test_a_preference_for_words_does_not_help(name):
    """A word that makes one sentence right makes another one wrong, so word frequencies
    alone say nothing.
    """
    changes = Counter()
    for good, bad in MINIMAL_PAIRS[name]:
        changes.update(Counter(good.split()) - Counter(bad.split()))
        changes.subtract(Counter(bad.split()) - Counter(good.split()))
    assert not +changes


def test_accuracy_counts_the_right_sentences():
    pairs = {
        "first": [("ab", "ba"), ("cd", "dc"), ("same", "same")],
        "second": [("the cat", "cat the")],
    }
    nats = {
        s: document_nll(MODEL, BYTES, s)[0]
        for group in pairs.values()
        for pair in group
        for s in pair
    }
    right = {
        name: sum(nats[good] < nats[bad] for good, bad in group)
        for name, group in pairs.items()
    }
    found = minimal_pair_accuracy(MODEL, BYTES, pairs)
    assert {name: (a.correct, a.total) for name, a in found.items()} == {
        "first": (right["first"], 3),
        "second": (right["second"], 1),
        "all": (sum(right.values()), 4),
    }
    flipped = minimal_pair_accuracy(
        MODEL,
        BYTES,
        {
            "x": [
                (bad, good)
                for group in pairs.values()
                for good, bad in group
                if good != bad
            ]
        },
    )
    assert flipped["all"].correct == 3 - sum(right.values())


def test_wilson():
    a = wilson(9, 12)
    assert (
        abs(a.low - 0.4677) < 1e-3 and abs(a.high - 0.9111) < 1e-3 and a.share == 0.75
    )
    assert (
        wilson(12, 12).high == 1
        and 0.7 < wilson(12, 12).low < 0.8
        and wilson(0, 12).low == 0
    )
    rng = np.random.default_rng(0)
    assert (
        0.92
        < np.mean(
            [
                w.low < 0.8 < w.high
                for w in (wilson(int(rng.binomial(12, 0.8)), 12) for _ in range(2000))
            ]
        )
        < 0.98
    )


def test_figures_that_are_no_numbers_are_none():
    huge = Evaluation(np.array([1e6]), np.array([2]), np.array([1]))
    assert (
        huge.perplexity == math.inf
        and summary(huge)["perplexity"] is None
        and summary(huge)["standard_error"] is None
    )
    json.dumps(summary(huge), allow_nan=False)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        Evaluation(np.array([1.0]), np.array([2]), np.array([0]))
    for nothing in (
        lambda: wilson(0, 0),
        lambda: minimal_pair_accuracy(MODEL, BYTES, {}),
    ):
        with pytest.raises(ValueError):
            nothing()
