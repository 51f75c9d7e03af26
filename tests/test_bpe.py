"""Byte-pair encoding: the merges of the naive trainer and of the library, and texts
of any length."""

import math
import unicodedata
from collections import Counter

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from text_helpers import CORPUS, reference_bpe, reference_ranks

from qwen_analog import bpe
from qwen_analog.bpe import BYTE_ORDER, QWEN_PATTERN, text_pieces, train_bpe
from qwen_analog.tokenizer import TiktokenTokenizer

examples = settings(max_examples=60, deadline=None)


# training

WORDS = st.lists(st.text(alphabet="ab é1'\n\u0301", max_size=12), max_size=12)


@settings(max_examples=80, deadline=None)
@given(WORDS, st.integers(256, 300))
def test_training_equals_the_naive_trainer(texts, vocab_size):
    pieces = Counter(
        p
        for text in texts
        for p in regex.findall(QWEN_PATTERN, unicodedata.normalize("NFC", text))
    )
    words = [([bytes([b]) for b in piece.encode()], n) for piece, n in pieces.items()]
    ranks = {token: i for i, token in enumerate(BYTE_ORDER)}
    while len(ranks) < vocab_size:
        counts = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                counts[pair] += n
        if not counts:
            break
        left, right = min(
            counts, key=lambda pair: (-counts[pair], ranks[pair[0]], ranks[pair[1]])
        )
        for word, _ in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == (left, right):
                    word[i : i + 2] = [left + right]
                i += 1
        assert left + right not in ranks, "a token made twice"
        ranks[left + right] = len(ranks)
    assert train_bpe(texts, vocab_size) == ranks


@settings(max_examples=40, deadline=None)
@given(WORDS, st.integers(257, 300))
def test_training_equals_tokenizers(texts, vocab_size):
    assert train_bpe(texts, vocab_size) == reference_ranks(texts, vocab_size)


def test_training_on_real_text():
    ranks = train_bpe(CORPUS, 900)
    assert ranks == reference_ranks(CORPUS, 900) and len(ranks) == 900
    assert train_bpe(CORPUS, 600) == dict(list(ranks.items())[:600])
    assert train_bpe(iter(["\ud800 ab"]), 256) == {
        token: i for i, token in enumerate(BYTE_ORDER)
    }
    with pytest.raises(ValueError, match="at least 256"):
        train_bpe([], 255)


# long texts


@examples
@given(
    st.lists(
        st.sampled_from(
            (
                "word",
                "слово",
                "中文",
                " ",
                "  ",
                "\n",
                "\r\n",
                "'s",
                "12",
                ".",
                "!?",
                "e\u0301",
                "🙂",
                "\u00a0",
            )
        ),
        max_size=80,
    ).map("".join),
    st.integers(20, 60),
)
def test_pieces_have_the_ids_of_the_whole(text, limit):
    tokenizer = TiktokenTokenizer(
        {token: i for i, token in enumerate(BYTE_ORDER)}
        | {b" word": 256, b"ord": 257, b"\r\n": 258, b"  ": 259}
    )
    pieces = list(text_pieces(text, limit))
    assert "".join(pieces) == text and all(0 < len(piece) <= limit for piece in pieces)
    if all(
        regex.fullmatch(r"(?s).*\p{L}", piece) and regex.match(r"[\s\p{P}]", after)
        for piece, after in zip(pieces, pieces[1:])
    ):
        assert [
            i for piece in pieces for i in tokenizer.encode(piece)
        ] == tokenizer.encode(text)


def test_pieces_begin_with_a_blank_where_there_is_one():
    """Before a sign, a tokenizer that opens each text with a blank would add one in the
    middle of a document.
    """
    assert all(
        piece[0] == " "
        for piece in list(text_pieces("one two, (three) four; five! " * 50, 40))[1:]
    )


def test_rare_pieces_make_room(monkeypatch):
    monkeypatch.setattr(bpe, "PIECE_CHARACTERS", 2_000)
    texts = [f"the river {i:x}{i * 7919:x}{i * 104729:x} the sea" for i in range(3_000)]
    assert sum(map(len, bpe.count_pieces(texts, r"\S+|\s+"))) <= 2_000
    assert {b"the", b" river", b" sea"} <= set(train_bpe(texts, 300))


def test_a_word_without_an_end_is_learned_from():
    ranks = train_bpe(["ab" * 300_000], 262)
    assert list(ranks)[256:258] == [b"ab", b"abab"]


@pytest.mark.parametrize("size", [math.nan, math.inf, -1, 255, 300.0, "300", None])
def test_vocabulary_sizes_that_are_none(size):
    with pytest.raises(
        ValueError, match="vocab_size must be a whole number of at least 256"
    ):
        train_bpe(["text"], size)
