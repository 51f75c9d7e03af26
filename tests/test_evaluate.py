"""Evaluation: every token counted once and as Hugging Face counts it, honest intervals,
proper n-grams, and lm-eval through the adapter.
"""

import argparse
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from book import scramble_
from qwen_analog.checkpoint import hf_config, save_checkpoint
from qwen_analog.config import QwenConfig
from qwen_analog import evaluate as module
from qwen_analog.data import held_out_mask, is_held_out, write_jsonl
from qwen_analog.evaluate import (
    MINIMAL_PAIRS,
    Evaluation,
    NGram,
    _windows,
    add_arguments,
    document_nll,
    evaluate_documents,
    fit_scaling_law,
    lm_eval_model,
    loss_by_position,
    minimal_pair_accuracy,
    paired_difference,
    run,
    token_nll,
    wilson,
    xz_bits_per_byte,
)
from qwen_analog.generate import generate
from qwen_analog.hf import save_pretrained
from qwen_analog.model import QwenForCausalLM
from qwen_analog.tokenizer import BYTE_ORDER, TiktokenTokenizer, train_bpe

BYTES = TiktokenTokenizer({token: rank for rank, token in enumerate(BYTE_ORDER)})
BPE = TiktokenTokenizer(
    train_bpe(["the cat sat on the mat and the other cat sat on the hat"] * 3, 270)
)
CONFIG = QwenConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=24,
    rope_theta=1e4,
)
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


def nats_after(context, token):
    """-ln p of one token after exactly these, from one forward pass."""
    with torch.no_grad():
        return -MODEL(torch.tensor([context]))[0, -1].log_softmax(-1)[token].item()


# windows


@given(length=st.integers(0, 200), context=st.integers(1, 40), data=st.data())
def test_windows_count_every_token_once(length, context, data):
    stride = data.draw(st.integers(1, context))
    windows = list(_windows(length, context, stride))
    assert [t for _, first, end in windows for t in range(first, end)] == list(
        range(length)
    )
    for start, first, end in windows:
        assert 0 <= start <= first < end and end - start <= context
        # target t sees inputs start .. t: the end-of-text token or text, and context -
        # stride more at least
        assert start == 0 or first - start >= context - stride


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
            nats_after(ids[max(0, end - context) : t + 1], ids[t + 1])
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
    theirs = Qwen2ForCausalLM(
        Qwen2Config(
            **{
                k: v
                for k, v in hf_config(CONFIG).items()
                if k not in ("architectures", "model_type")
            }
        )
    ).eval()
    theirs.load_state_dict(MODEL.state_dict())
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
def test_impossible_windows(options, message):
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
        a.nats == b.nats and a.tokens == b.tokens == 5
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
        Evaluation(one.nats[r], one.tokens[r], one.bytes[r]).bits_per_byte for r in rows
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
            a.nats - a.bytes * rng.normal(0.02, 0.05, 60) * math.log(2),
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
        np.mean([nats_after(ids_of(t)[:1], ids_of(t)[1]) for t in TEXTS if t]),
        rel_tol=1e-5,
    )
    assert math.isclose(
        mean[13],
        np.mean(
            [nats_after(ids_of(t)[:14], ids_of(t)[14]) for t in (TEXTS[2], TEXTS[4])]
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


# n-grams


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


def test_ngram_nats_are_the_distribution_s():
    model = NGram(9, 3).fit(random_text(0))
    ids = random_text(1)[4]
    assert np.allclose(
        model.nats(ids),
        [-math.log(model.distribution(ids[:t])[ids[t]]) for t in range(1, len(ids))],
    )
    assert len(model.nats(ids)) == len(ids) - 1 and len(model.nats([0])) == 0


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
    losses = [np.concatenate([model.nats(d) for d in held]).mean() for model in models]
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
        (lambda: NGram(9).fit(random_text(0)).nats([0, 12]), "ids must lie"),
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


# the scaling law


def test_scaling_law_is_recovered():
    sizes = np.array([1e4, 3e4, 1e5, 3e5, 1e6, 1e7])
    law = fit_scaling_law(sizes, 1.7 + 80 * sizes**-0.45)
    assert (
        abs(law.alpha - 0.45) < 0.01
        and abs(law.floor - 1.7) < 0.02
        and law.noise < 1e-3
    )
    assert np.allclose(law.predict(sizes), 1.7 + 80 * sizes**-0.45, rtol=2e-3)
    rising = fit_scaling_law(sizes, [1, 2, 3, 4, 5, 6])
    assert (
        rising.scale == 0 and abs(rising.floor - 3.5) < 1e-9
    )  # no law of this form: the mean
    falling = fit_scaling_law([1, 2, 4, 8, 16, 32], [6, 5, 4, 3, 2, 1])
    assert falling.floor == 0 and falling.scale > 0  # a floor is never below 0
    assert np.sum((falling.predict([1, 2, 4, 8, 16, 32]) - [6, 5, 4, 3, 2, 1]) ** 2) < 2


def test_scaling_intervals_cover():
    rng = np.random.default_rng(0)
    sizes = np.repeat([1e4, 3e4, 1e5, 3e5], 2)
    truth = lambda n: 1.5 + 30 * np.asarray(n) ** -0.3
    inside = {"seen": [], "ten times": []}
    for i in range(80):
        law = fit_scaling_law(
            sizes, truth(sizes) + 0.02 * rng.standard_normal(8), draws=300, seed=i
        )
        for name, n in (("seen", 1e5), ("ten times", 3e6)):
            (low,), (high,) = law.interval([n])
            inside[name].append(low < truth(n) + 0.02 * rng.standard_normal() < high)
    assert all(0.8 < np.mean(hits) < 0.99 for hits in inside.values()), {
        k: np.mean(v) for k, v in inside.items()
    }
    widths = np.subtract(*law.interval([1e5, 3e6])[::-1])
    assert widths[1] > 1.5 * widths[0]  # far away it says less


@pytest.mark.parametrize(
    "sizes,losses",
    [
        ([1, 2, 3], [3, 2, 1]),
        ([1, 1, 2, 2], [3, 2, 1, 1]),
        ([1, 2, 3, 4], [3, 2, 1]),
        ([1, 2, 3, 0], [4, 3, 2, 1]),
        ([1, 2, 3, 4], [4, 3, 2, math.nan]),
    ],
)
def test_impossible_scaling(sizes, losses):
    with pytest.raises(ValueError, match="scaling law|positive finite"):
        fit_scaling_law(sizes, losses)


# lm-eval


class Request:
    def __init__(self, *args):
        self.args = args


def test_lm_eval_loglikelihood_equals_transformers():
    theirs = Qwen2ForCausalLM(
        Qwen2Config(
            **{
                k: v
                for k, v in hf_config(CONFIG).items()
                if k not in ("architectures", "model_type")
            }
        )
    ).eval()
    theirs.load_state_dict(MODEL.state_dict())
    adapter = lm_eval_model(MODEL, BYTES, batch_size=2)
    requests = [
        ("The cat", " sat"),
        ("", "alone"),
        ("a context that is longer than the model", " can hold"),
        ("ends with a space ", "x"),
        (" ", "y"),
    ]
    for (context, continuation), (loglikelihood, greedy) in zip(
        requests,
        adapter.loglikelihood([Request(*r) for r in requests], disable_tqdm=True),
    ):
        spaces = len(context) - len(context.rstrip())
        continuation = context[len(context) - spaces :] + continuation
        ids = ids_of(context[: len(context) - spaces] + continuation)[-25:]
        with torch.no_grad():
            log_p = theirs(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        n = len(BYTES.encode(continuation))
        picked = log_p[-n:].gather(1, torch.tensor(ids[-n:])[:, None])
        assert abs(picked.sum().item() - loglikelihood) < 1e-4
        assert greedy == (log_p[-n:].argmax(-1) == torch.tensor(ids[-n:])).all().item()


def test_lm_eval_says_what_is_greedy():
    def best(text):
        return generate(MODEL, torch.tensor([ids_of(text)]), 1, temperature=0)[
            0, -1
        ].item()

    context = next(
        text for text in map(chr, range(33, 127)) if best(text) < 94
    )  # the likeliest next id is a printable character
    likely = BYTES.decode([best(context)])
    other = "a" if best(context + likely) != BYTES.encode("a")[0] else "b"
    adapter = lm_eval_model(MODEL, BYTES)
    requests = [
        Request(context, likely),
        Request(context, likely + other),
        Request(context, other if other != likely else "c"),
    ]
    assert [
        greedy for _, greedy in adapter.loglikelihood(requests, disable_tqdm=True)
    ] == [True, False, False]


def test_lm_eval_rolling_has_the_harness_s_windows():
    from lm_eval.utils import get_rolling_token_windows

    adapter = lm_eval_model(MODEL, BYTES)
    for text in TEXTS[:3]:
        expected = 0.0
        for inputs, targets in get_rolling_token_windows(
            BYTES.encode(text), BYTES.eos_token_id, 24, 1
        ):
            log_p = MODEL(torch.tensor([inputs]))[0].log_softmax(-1)[-len(targets) :]
            expected += log_p.gather(1, torch.tensor(targets)[:, None]).sum().item()
        assert abs(adapter.loglikelihood_rolling([Request(text)])[0] - expected) < 1e-3


def test_lm_eval_generate_until():
    adapter = lm_eval_model(MODEL, BYTES)
    ids = ids_of("The cat")
    written = generate(
        MODEL,
        torch.tensor([ids]),
        12,
        temperature=0,
        eos_token_id=BYTES.eos_token_id,
        valid_vocab_size=BYTES.vocab_size,
    )[0, len(ids) :]
    text = BYTES.decode([i for i in written.tolist() if i != BYTES.eos_token_id])
    whole, cut, plain = adapter.generate_until(
        [
            Request("The cat", {"until": ["nowhere"], "max_gen_toks": 12}),
            Request("The cat", {"until": ["nowhere", text[3:5]], "max_gen_toks": 12}),
            Request("The cat", {"until": text[2:3], "max_gen_toks": 12}),
        ]
    )
    assert (
        whole == text
        and cut == text.split(text[3:5])[0]
        and plain == text.split(text[2])[0]
    )
    with pytest.raises(ValueError, match="max_gen_toks 24 leaves no room"):
        adapter.generate_until([Request("x", {"max_gen_toks": 24})])
    with pytest.raises(ValueError, match="a continuation has 30 tokens"):
        adapter.loglikelihood([Request("x", "y" * 30)], disable_tqdm=True)


@pytest.mark.parametrize(
    "options, most",
    [
        ({"max_gen_toks": 5}, 5),
        ({"max_new_tokens": 5}, 5),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 5}, 5),
        ({"max_gen_toks": "5"}, 5),
        ({"max_gen_toks": 5, "max_new_tokens": 9}, 5),
        ({"max_gen_toks": 5, "until": None}, 5),
        ({"max_gen_toks": 5, "until": [None, ""]}, 5),
        ({"max_gen_toks": 5, "until": ()}, 5),
        ({"max_gen_toks": 0}, 0),
        ({"max_length": 9}, 5),
        ({"max_length": 999, "max_gen_toks": 2}, 20),
        ({"max_gen_toks": 5, "do_sample": True, "seed": 1}, 5),
        (
            {
                "max_gen_toks": 5,
                "temperature": 0.7,
                "top_k": 0,
                "top_p": 1.0,
                "seed": 1,
            },
            5,
        ),
        (
            {"max_gen_toks": 5, "temperature": None, "do_sample": None, "num_beams": 1},
            5,
        ),
    ],
)
def test_lm_eval_s_names_of_lengths_and_stops(options, most, monkeypatch):
    taken = []
    monkeypatch.setattr(
        module,
        "stream",
        lambda model, tokenizer, **options: taken.append(options) or iter(["text"]),
    )
    assert lm_eval_model(MODEL, BYTES).generate_until([Request("abc", options)]) == [
        "text"
    ]  # a prompt of four tokens
    (given,) = taken
    assert (
        given["max_new_tokens"] == most
        and given["stop"] == []
        and given["prompt"] == ids_of("abc")
    )
    sampled = options.get("do_sample") or options.get("temperature")
    assert (
        given["temperature"] == (options.get("temperature") or 1.0 if sampled else 0.0)
        and "top_k" not in given
    )


@pytest.mark.parametrize(
    "options, said",
    [
        ({"max_gen_toks": -1}, "max_gen_toks"),
        ({"max_gen_toks": "many"}, "max_gen_toks"),
        ({"max_length": 3}, "max_length 3"),
        ({"until": 5}, "until"),
        ({"until": [5]}, "until"),
        ({"num_beams": 4}, "num_beams"),
        ({"tempreature": 1}, "tempreature"),
    ],
)
def test_lm_eval_options_that_cannot_be_are_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        lm_eval_model(MODEL, BYTES).generate_until(
            [Request("abc", {"max_gen_toks": 2, **options})]
        )


def test_lm_eval_charges_for_what_a_continuation_changes():
    """A continuation may melt into the context's last tokens: then all that comes after
    what stays the same counts.
    """
    tokenizer = TiktokenTokenizer(train_bpe(["abcd abcd abcd é é é"] * 9, 264))
    adapter = lm_eval_model(MODEL, tokenizer)
    for context, continuation in (
        ("xa", "bcd"),
        ("xab", "cde"),
        ("e", "\u0301"),
        ("xe", "\u0301y"),
        ("abc", "d"),
        ("xab", "y"),
    ):
        before, whole = (
            tokenizer.encode(context),
            tokenizer.encode(context + continuation),
        )
        same = len(before)
        while whole[:same] != before[:same]:
            same -= 1
        ((value, _),) = adapter.loglikelihood(
            [Request(context, continuation)], disable_tqdm=True
        )
        nats = token_nll(MODEL, tokenizer, [context + continuation])[0]
        assert abs(value + nats[same:].sum()) < 1e-4 and value < 0, (
            context,
            continuation,
        )
    for context, continuation in (("a", ""), ("", "")):
        with pytest.raises(ValueError, match="empty"):
            adapter.loglikelihood([Request(context, continuation)], disable_tqdm=True)


def test_lm_eval_runs_a_task(tmp_path):
    """A task of local data, from its dictionary; the accuracy is counted by hand."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    questions = [
        {"question": q, "choices": [" yes", " no", " maybe"], "answer": i % 3}
        for i, q in enumerate("abcdefgh")
    ]
    (tmp_path / "task.jsonl").write_text(
        "".join(json.dumps(q) + "\n" for q in questions)
    )
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "task.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    results = simple_evaluate(
        model=lm_eval_model(MODEL, BYTES),
        tasks=[task],
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    correct = 0
    for q in questions:
        context = document_nll(MODEL, BYTES, f"{q['question']}:")[0]
        nats = [
            document_nll(MODEL, BYTES, f"{q['question']}:{choice}")[0] - context
            for choice in q["choices"]
        ]
        correct += int(np.argmin(nats)) == q["answer"]
    assert results["results"]["tiny"]["acc,none"] == correct / len(questions)
    assert 0 < correct < len(questions)


# the command


def parsed(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(argv)


def test_the_command(tmp_path, capsys):
    documents = [
        {
            "title": f"t{i}",
            "text": (
                f"document {i}: the cat sat on {i * i} mats, which is"
                f" {'odd' if i % 2 else 'even'}."
            ),
        }
        for i in range(60)
    ]
    write_jsonl(documents, tmp_path / "data.jsonl")
    save_checkpoint(tmp_path / "final", MODEL, BYTES)
    run(
        parsed(
            "--model",
            str(tmp_path / "final"),
            "--data",
            str(tmp_path / "data.jsonl"),
            "--heldout-fraction",
            "0.2",
            "--context",
            "12",
            "--stride",
            "5",
            "--pairs",
            "--positions",
            "--baselines",
            "--json",
            str(tmp_path / "out" / "e.json"),
        )
    )
    held = [d["text"] for d in documents if is_held_out(d["title"], 0.2)]
    written = json.loads((tmp_path / "out" / "e.json").read_text())
    (found,) = written["models"].values()
    expected = evaluate_documents(MODEL, BYTES, held, context=12, stride=5)
    assert (
        math.isclose(found["bits_per_byte"], expected.bits_per_byte, rel_tol=1e-6)
        and found["documents"] == len(held) < 60
    )
    assert (
        found["bytes"] == sum(len(t.encode()) for t in held)
        and found["pairs"]["all"]["total"] == 96
    )
    assert [(b["first"], b["last"]) for b in found["loss_by_position"]] == [
        (0, 0),
        (1, 2),
        (3, 6),
        (7, 11),
    ]
    mean, _ = loss_by_position(token_nll(MODEL, BYTES, held, context=12), 12)
    assert math.isclose(
        found["loss_by_position"][2]["loss"], mean[3:7].mean(), rel_tol=1e-6
    )
    assert written["settings"]["context"] == 12 and set(written["baselines"]) == {
        "xz",
        "xz after the rest",
        "5-gram",
    }
    rest = [d["text"] for d in documents if not is_held_out(d["title"], 0.2)]
    counted = NGram(BYTES.vocab_size, 5).fit(
        [ids_of(text) for text in rest]
    )  # from the rest alone
    assert math.isclose(
        written["baselines"]["5-gram"]["bits_per_byte"],
        Evaluation.from_tokens(
            [counted.nats(ids_of(text)) for text in held], held
        ).bits_per_byte,
        rel_tol=1e-9,
    )
    assert written["baselines"]["xz after the rest"][
        "bits_per_byte"
    ] == xz_bits_per_byte("\n".join(held).encode(), ("\n".join(rest) + "\n").encode())
    assert f"{expected.bits_per_byte:.3f} +-" in capsys.readouterr().out
    with pytest.raises(ValueError, match="heldout-fraction must lie above 0"):
        run(parsed("--data", str(tmp_path / "data.jsonl"), "--heldout-fraction", "0"))
    write_jsonl(documents[:1], tmp_path / "one.jsonl")
    with pytest.raises(ValueError, match="none of the 1 documents is held out"):
        run(parsed("--data", str(tmp_path / "one.jsonl"), "--heldout-fraction", "0.1"))
    assert not (tmp_path / "out" / "e.json.partial").exists()


def test_the_command_opens_what_holds_a_model(tmp_path, capsys):
    write_jsonl(
        [{"text": "one text"}, {"text": "and another"}], tmp_path / "data.jsonl"
    )
    save_checkpoint(tmp_path / "ours", MODEL, BYTES)
    save_pretrained(MODEL, BYTES, tmp_path / "theirs")
    sources = [
        str(tmp_path / "ours"),
        str(tmp_path / "ours" / "checkpoint.pt"),
        str(tmp_path / "theirs"),
    ]
    run(
        parsed(
            "--model",
            *sources,
            "--data",
            str(tmp_path / "data.jsonl"),
            "--heldout-fraction",
            "1",
        )
    )
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 3
        and len({line.split(": ", 1)[1] for line in lines}) == 1
        and "2 documents" in lines[0]
    )
    with pytest.raises(ValueError, match="nowhere"):
        run(
            parsed(
                "--model",
                "nowhere",
                "--data",
                str(tmp_path / "data.jsonl"),
                "--heldout-fraction",
                "1",
            )
        )


def trained(directory, share, **state):
    """A checkpoint that says what it held out."""
    save_checkpoint(
        directory, MODEL, BYTES, train_config={"heldout_fraction": share}, **state
    )
    return str(directory)


def test_what_the_checkpoint_held_out_is_evaluated(tmp_path, capsys):
    documents = [{"title": f"t{i}", "text": f"document {i}"} for i in range(300)]
    write_jsonl(documents, tmp_path / "d.jsonl")
    data, out = ["--data", str(tmp_path / "d.jsonl")], tmp_path / "e.json"
    sources = [
        trained(tmp_path / name, share) for name, share in (("a", 0.1), ("b", 0.02))
    ]
    for models, share in ((sources[:1], 0.1), (sources, 0.02)):
        run(parsed("--model", *models, *data, "--json", str(out)))
        counts = {
            figures["documents"]
            for figures in json.loads(out.read_text())["models"].values()
        }
        assert (
            counts == {sum(is_held_out(d["title"], share) for d in documents)}
            and f"heldout_fraction {share}" in capsys.readouterr().out
        )
        assert json.loads(out.read_text())["settings"]["heldout_fraction"] == share
    run(parsed("--model", sources[1], *data, "--heldout-fraction", "0.1"))
    assert "has seen some" in capsys.readouterr().err
    run(parsed("--model", sources[1], *data, "--heldout-fraction", "0.02"))
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="heldout_fraction 0, on all documents"):
        run(parsed("--model", trained(tmp_path / "all", 0.0), *data))


def test_what_is_evaluated_is_said_where_no_model_says_it(tmp_path, capsys):
    write_jsonl(
        ({"title": f"t{i}", "text": f"document {i}"} for i in range(300)),
        tmp_path / "d.jsonl",
    )
    save_pretrained(MODEL, BYTES, tmp_path / "theirs")
    run(
        parsed("--model", str(tmp_path / "theirs"), "--data", str(tmp_path / "d.jsonl"))
    )
    assert "a part of 0.05" in capsys.readouterr().out


def test_memory_is_asked_for_the_documents_there_are(tmp_path, monkeypatch, capsys):
    """Not for the longest that the model could read."""
    write_jsonl([{"text": "one text"}], tmp_path / "d.jsonl")
    save_checkpoint(tmp_path / "m", MODEL, BYTES)
    asked = []
    monkeypatch.setattr(
        module,
        "require_memory",
        lambda size, device, what, *_: asked.append((size, what)),
    )
    run(
        parsed(
            "--model",
            str(tmp_path / "m"),
            "--data",
            str(tmp_path / "d.jsonl"),
            "--heldout-fraction",
            "1",
        )
    )
    assert asked == [
        (
            module._scoring_memory(MODEL.config, 8),
            f"reading 8 tokens at once with {tmp_path / 'm'}",
        )
    ]
    assert "nan" not in capsys.readouterr().out


def test_few_documents_are_split_as_in_training(tmp_path, capsys):
    """Where the hash chooses none, training held out the one with the smallest."""
    documents = [{"title": f"t{i}", "text": "x" * (i + 1)} for i in range(20)]
    write_jsonl(documents, tmp_path / "d.jsonl")
    run(
        parsed(
            "--model",
            trained(tmp_path / "a", 0.001),
            "--data",
            str(tmp_path / "d.jsonl"),
            "--json",
            str(tmp_path / "e.json"),
        )
    )
    (figures,) = json.loads((tmp_path / "e.json").read_text())["models"].values()
    (held,) = np.flatnonzero(held_out_mask([d["title"] for d in documents], 0.001))
    assert figures["documents"] == 1 and figures["bytes"] == held + 1


@pytest.mark.parametrize("changed", [False, True])
def test_other_data_than_that_of_the_training_is_said(changed, tmp_path, capsys):
    documents = [{"title": f"t{i}", "text": f"document {i}"} for i in range(60)]
    size = sum(len(d["text"]) for d in documents)
    write_jsonl(documents + [{"text": "one more"}] * changed, tmp_path / "d.jsonl")
    source = trained(
        tmp_path / "a",
        0.1,
        data_fingerprint={
            "files": [
                {"name": "d.jsonl", "documents": 60, "bytes": size, "sha256": "-"}
            ],
            "held_out": "-",
        },
    )
    run(parsed("--model", source, "--data", str(tmp_path / "d.jsonl")))
    assert ("60 documents" in capsys.readouterr().err) == changed


def test_documents_are_read_in_pieces(tmp_path, monkeypatch):
    """Groups of any size, windows of any number at once: the same figures."""
    documents = [
        {"title": f"t{i}", "text": f"document {i} " * (i % 7 + 1)} for i in range(30)
    ] + [{"text": "long " * 200}]
    write_jsonl(documents, tmp_path / "d.jsonl")
    save_checkpoint(tmp_path / "m", MODEL, BYTES)
    found = []
    for size, at_once in ((2**21, 2**14), (50, 24), (1, 1)):
        monkeypatch.setattr(module._groups, "__defaults__", (size,))
        monkeypatch.setattr(module, "_AT_ONCE", at_once)
        run(
            parsed(
                "--model",
                str(tmp_path / "m"),
                "--data",
                str(tmp_path / "d.jsonl"),
                "--heldout-fraction",
                "1",
                "--positions",
                "--json",
                str(tmp_path / "e.json"),
            )
        )
        (figures,) = json.loads((tmp_path / "e.json").read_text())["models"].values()
        found.append(figures)
    for other in found[1:]:
        assert (
            math.isclose(
                other["bits_per_byte"], found[0]["bits_per_byte"], rel_tol=1e-6
            )
            and other["tokens"] == found[0]["tokens"]
        )
        assert [b["tokens"] for b in other["loss_by_position"]] == [
            b["tokens"] for b in found[0]["loss_by_position"]
        ]


def test_one_model_that_fails_does_not_take_the_others_figures(tmp_path, capsys):
    write_jsonl([{"text": "one text"}, {"text": "and another"}], tmp_path / "d.jsonl")
    save_checkpoint(tmp_path / "good", MODEL, BYTES)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "checkpoint.pt").write_bytes(b"no checkpoint")
    models = [str(tmp_path / name) for name in ("bad", "good", "nowhere")]
    with pytest.raises(
        ValueError, match="2 of 3 models could not be evaluated: .*bad.*nowhere"
    ) as failed:
        run(
            parsed(
                "--model",
                *models,
                "--data",
                str(tmp_path / "d.jsonl"),
                "--heldout-fraction",
                "1",
                "--json",
                str(tmp_path / "e.json"),
            )
        )
    written = json.loads((tmp_path / "e.json").read_text())
    assert (
        list(written["models"]) == [models[1]]
        and list(written["failed"]) == [models[0], models[2]]
        and "\n" not in str(failed.value)
    )


def test_figures_that_cannot_be_written_are_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "open_model", lambda *a, **o: pytest.fail("a model is opened")
    )
    (tmp_path / "file").touch()
    for name in ("", "file/e.json", "file/x/e.json"):
        with pytest.raises((ValueError, OSError), match="directory|exists"):
            run(parsed("--json", str(tmp_path / name)))
    with pytest.raises(ValueError, match="directory"):
        run(parsed("--json", ""))


def test_figures_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_jsonl([{"text": "one text"}], tmp_path / "d.jsonl")
    save_checkpoint(tmp_path / "m", MODEL, BYTES)
    command = parsed(
        "--model",
        str(tmp_path / "m"),
        "--data",
        str(tmp_path / "d.jsonl"),
        "--heldout-fraction",
        "1",
        "--json",
        str(tmp_path / "e.json"),
    )
    (tmp_path / "e.json").write_text("before")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module.json, "dump", full)
        with pytest.raises(OSError, match="No space left on device: .*e.json"):
            run(command)
    assert (tmp_path / "e.json").read_text() == "before" and not (
        tmp_path / "e.json.partial"
    ).exists()
    run(command)
    assert json.loads((tmp_path / "e.json").read_text())["models"]


def test_bad_lines_are_named_or_left_out(tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text(
        '{"text": "fine"}\n{"text": ""}\n{"text": "also fine"}\n'
    )
    save_checkpoint(tmp_path / "m", MODEL, BYTES)
    flags = [
        "--model",
        str(tmp_path / "m"),
        "--data",
        str(tmp_path / "d.jsonl"),
        "--heldout-fraction",
        "1",
    ]
    with pytest.raises(ValueError, match="line 2"):
        run(parsed(*flags))
    run(parsed(*flags, "--skip-bad-lines"))
    assert "2 documents" in capsys.readouterr().out


def test_figures_that_are_no_numbers_are_none():
    huge = Evaluation(np.array([1e6]), np.array([2]), np.array([1]))
    assert (
        huge.perplexity == math.inf
        and huge.summary()["perplexity"] is None
        and huge.summary()["standard_error"] is None
    )
    json.dumps(huge.summary(), allow_nan=False)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        Evaluation(np.array([1.0]), np.array([2]), np.array([0]))
    for nothing in (
        lambda: wilson(0, 0),
        lambda: minimal_pair_accuracy(MODEL, BYTES, {}),
        lambda: xz_bits_per_byte(b""),
        lambda: NGram(9).fit([]),
        lambda: NGram(9).fit([[]]),
    ):
        with pytest.raises(ValueError):
            nothing()
