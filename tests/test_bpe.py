"""Byte-pair encoding: the merges of the naive trainer and of the library, and texts
of any length."""

import math
import unicodedata
from collections import Counter

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from text_helpers import CORPUS, reference_bpe, reference_ranks

from qwen_analog import bpe
from qwen_analog.bpe import (
    BYTE_ORDER,
    QWEN_PATTERN,
    decode,
    encode,
    encode_piece,
    text_pieces,
    train_bpe,
)
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


# encoding

FEW = CORPUS[:2] + CORPUS[-1:]
RANKS_400 = train_bpe(CORPUS, 400)


def check_encoder():
    library = tiktoken.Encoding(
        "ours", pat_str=QWEN_PATTERN, mergeable_ranks=RANKS_400, special_tokens={}
    )
    for text in [text[:2000] for text in FEW] + ["cafe\u0301 O'Donnell, O'The"]:
        normal = unicodedata.normalize("NFC", text)
        ids = bpe.encode(text, RANKS_400)
        assert ids == library.encode_ordinary(normal)
        assert bpe.decode(ids, RANKS_400) == normal
        assert bpe.decode(ids[1:], RANKS_400) == library.decode(ids[1:])
    cut = list("naïve".encode())[2:]  # begins inside a character
    halves = [RANKS_400[bytes([b])] for b in cut[1:]]
    assert bpe.decode(halves, RANKS_400) == library.decode(halves)
    assert "\ufffd" in bpe.decode(halves, RANKS_400)


def test_the_encoder_has_the_ids_of_tiktoken():
    check_encoder()
    assert encode("", RANKS_400) == [] and decode([], RANKS_400) == ""
    assert encode_piece(b"", RANKS_400) == []


@examples
@given(st.text(max_size=40))
def test_any_text_comes_back(text):
    ids = encode(text, RANKS_400)
    assert decode(ids, RANKS_400) == unicodedata.normalize("NFC", text)


# mutants: each a part of the trainer or the encoder with one mistake

HARD = [
    *[text[:3000] for text in CORPUS[:3]],
    unicodedata.normalize("NFD", "L'été à Orléans, où naît la rivière. " * 9),
    *["in 1999 and 1999"] * 40,
]


def check_trainer():
    assert bpe.train_bpe(HARD, 330) == reference_ranks(HARD, 330)


def best(self, key):
    counts = {pair: n for pair, n in self.counts.items() if n > 0}
    return min(counts, key=key(counts)) if counts else None


def ties_to_the_larger_ids(self):
    return best(self, lambda n: lambda pair: (-n[pair], -pair[0], -pair[1]))


def ties_to_the_pair_met_first(self):
    return best(self, lambda n: lambda pair: -n[pair])


def the_rarest_pair(self):
    return best(self, lambda n: lambda pair: (n[pair], pair))


def fallen_pairs_are_lost(self):
    while self.heap:
        n, pair = bpe.heapq.heappop(self.heap)
        if self.counts[pair] == -n:
            return pair


def old_counts_are_believed(self):
    while self.heap:
        _, pair = bpe.heapq.heappop(self.heap)
        if self.counts[pair] > 0:
            return pair


def words_that_are_made_are_not_noted(self, w):
    for pair in zip(self.words[w], self.words[w][1:]):
        self.pairs.counts[pair] += self.frequency[w]
        if max(pair) < 256:
            self.where[pair].add(w)


plain_words = bpe.count_words


def each_word_counts_once(texts, pattern):
    return [(ids, 1) for ids, _ in plain_words(texts, pattern)]


def merges_cross_words(text, pattern=QWEN_PATTERN):
    return [unicodedata.normalize("NFC", text)]


def no_nfc(text, pattern=QWEN_PATTERN):
    return regex.findall(pattern, text)


def digits_stay_together(text, pattern=QWEN_PATTERN):
    pattern = pattern.replace(r"|\p{N}|", r"|\p{N}+|")
    return regex.findall(pattern, unicodedata.normalize("NFC", text))


TRAINERS = [
    ("PairCounts.most_frequent", ties_to_the_larger_ids),
    ("PairCounts.most_frequent", ties_to_the_pair_met_first),
    ("PairCounts.most_frequent", the_rarest_pair),
    ("PairCounts.most_frequent", fallen_pairs_are_lost),
    ("PairCounts.most_frequent", old_counts_are_believed),
    ("MergeableWords.add_pairs", words_that_are_made_are_not_noted),
    ("BYTE_ORDER", [bytes([b]) for b in range(256)]),
    ("count_words", each_word_counts_once),
    ("split_text", merges_cross_words),
    ("split_text", no_nfc),
    ("split_text", digits_stay_together),
]


def test_the_trainer_passes_its_check():
    check_trainer()


@pytest.mark.mutant
@pytest.mark.parametrize(
    "place, broken", TRAINERS, ids=lambda m: getattr(m, "__name__", "")
)
def test_a_mistake_of_the_trainer_is_found(place, broken, monkeypatch):
    monkeypatch.setattr(f"qwen_analog.bpe.{place}", broken)
    with pytest.raises((AssertionError, KeyError)):
        check_trainer()


def longest_first(piece, ranks):
    ids = []
    while piece:
        end = next(end for end in range(len(piece), 0, -1) if piece[:end] in ranks)
        ids.append(ranks[piece[:end]])
        piece = piece[end:]
    return ids


def highest_rank_first(parts, ranks):
    joins = [a + b for a, b in zip(parts, parts[1:])]
    places = [i for i, join in enumerate(joins) if join in ranks]
    return max(places, key=lambda i: ranks[joins[i]], default=None)


def first_from_the_left(parts, ranks):
    joins = [a + b for a, b in zip(parts, parts[1:])]
    return next((i for i, join in enumerate(joins) if join in ranks), None)


def decodes_token_by_token(ids, ranks):
    token_of = {rank: token for token, rank in ranks.items()}
    return "".join(token_of[i].decode(errors="replace") for i in ids)


def decode_ignores_errors(ids, ranks):
    token_of = {rank: token for token, rank in ranks.items()}
    return b"".join(token_of[i] for i in ids).decode(errors="ignore")


ENCODERS = [
    ("encode_piece", longest_first),
    ("lowest_join", highest_rank_first),
    ("lowest_join", first_from_the_left),
    ("split_text", no_nfc),
    ("split_text", merges_cross_words),
    ("decode", decodes_token_by_token),
    ("decode", decode_ignores_errors),
]


@pytest.mark.mutant
@pytest.mark.parametrize(
    "place, broken", ENCODERS, ids=lambda m: getattr(m, "__name__", "")
)
def test_a_mistake_of_the_encoder_is_found(place, broken, monkeypatch):
    monkeypatch.setattr(f"qwen_analog.bpe.{place}", broken)
    with pytest.raises(AssertionError):
        check_encoder()
