"""Held-out documents, and tokens that are made once, by any number of processes, and
kept in a cache that is checked."""

import errno
import math
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_helpers import END, RANKS, TOKENIZER, Counting, lines, texts, tokenized, write

from qwen_analog import token_cache
from qwen_analog.data import PackedDataset, held_out_dataset
from qwen_analog.jsonl import DataError, read_lines
from qwen_analog.streaming import StreamingDataset, open_stream
from qwen_analog.token_cache import (
    held_out_mask,
    is_held_out,
    skipped_lines,
    tokenize_files,
)
from qwen_analog.tokenizer import TiktokenTokenizer

pytest_plugins = ["text_fixtures"]
pytestmark = pytest.mark.usefixtures("quiet")


def test_held_out_is_a_property_of_the_key():
    keys = [f"title {i}" for i in range(20_000)]
    held = {
        f: {k for k in keys if is_held_out(k, f)} for f in (0.0, 0.01, 0.05, 0.5, 1.0)
    }
    assert not held[0.0] and len(held[1.0]) == len(keys)
    assert held[0.01] < held[0.05] < held[0.5]
    assert abs(len(held[0.05]) / len(keys) - 0.05) < 0.005
    assert (
        sum(is_held_out(str(i), 0.5) for i in range(1000)) == 523
    )  # the same in every process and on every machine


def test_rows():
    write("a.jsonl", {"text": "caf\u00e9", "title": "t"}, {"text": "b"}, b"{")
    rows = tokenized("a.jsonl", 0.5, skip_bad_lines=True)
    assert rows["input_ids"][:] == [
        [END, *TOKENIZER.encode("caf\u00e9")],
        [END, *TOKENIZER.encode("b")],
        [],
    ]
    assert (rows["num_tokens"][:], rows["num_bytes"][:]) == ([6, 2, 0], [5, 1, 0])
    assert rows["source"][:] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert rows["held_out"][:2] == [is_held_out("t", 0.5), is_held_out("b", 0.5)]


def test_a_special_token_spelled_in_a_text_stays_text():
    write("a.jsonl", {"text": "the end <|endoftext|> is not here"})
    assert tokenized("a.jsonl")[0]["input_ids"].count(END) == 1


def test_tokenized_once_and_again_when_something_changes():
    def encoded(path="a.jsonl", tokenizer=None, *args):
        Counting.encoded = 0
        rows = tokenize_files(
            [path], tokenizer or Counting(RANKS), *args, cache_dir="cache"
        )
        return Counting.encoded, rows["num_tokens"][:]

    write("a.jsonl", {"text": "one"}, {"text": "two"})
    assert encoded() == (2, [4, 4]) and encoded() == (0, [4, 4])
    stat = os.stat("a.jsonl")
    write("a.jsonl", {"text": "six"}, {"text": "ten"})  # the same size, another time
    os.utime("a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    assert encoded()[0] == 2
    write("a.jsonl", {"text": "one"}, {"text": "three"})
    os.utime(
        "a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns)
    )  # the same time, another size
    assert encoded() == (2, [4, 6])
    assert encoded("a.jsonl", Counting({**RANKS, b"th": 256})) == (
        2,
        [4, 5],
    )  # another vocabulary
    assert (
        encoded("a.jsonl", None, 0.5)[0] == 0 and encoded()[0] == 0
    )  # who is held out is no part of the cache


def cache_files():
    return sorted(Path("cache").rglob("*.*"))


def test_the_cache_knows_files_by_their_content():
    def encoded():
        Counting.encoded = 0
        tokenize_files(["a.jsonl"], Counting(RANKS), cache_dir="cache")
        return Counting.encoded

    write("a.jsonl", {"text": "one"}, {"text": "two"})
    assert encoded() == 2
    stat = os.stat("a.jsonl")
    os.utime("a.jsonl", ns=(0, 0))  # copied, touched, moved back and forth
    assert encoded() == 0
    write("a.jsonl", {"text": "six"}, {"text": "ten"})
    os.utime(
        "a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns)
    )  # edited: the same size and the same time
    assert encoded() == 2 and len(cache_files()) == 2


DAMAGE = {
    "flipped first bit": lambda b: bytes([b[0] ^ 1]) + b[1:],
    "flipped bit": lambda b: b[:9] + bytes([b[9] ^ 64]) + b[10:],
    "flipped last bit": lambda b: b[:-1] + bytes([b[-1] ^ 1]),
    "cut": lambda b: b[: len(b) // 2],
    "empty": lambda b: b"",
    "grown": lambda b: b + b"x",
    "zeros": lambda b: bytes(len(b)),
    "another file": lambda b: b"{}",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_again(damage, capsys):
    write("a.jsonl", *texts([3, 1, 2]))
    healthy = tokenized("a.jsonl")["input_ids"][:]
    (path,) = cache_files()
    content = path.read_bytes()
    path.write_bytes(DAMAGE[damage](content))
    assert (
        tokenized("a.jsonl")["input_ids"][:] == healthy and path.read_bytes() == content
    )
    assert capsys.readouterr().err.count("\n") == 1 and cache_files() == [path]


def test_what_a_killed_writer_leaves_is_no_cache():
    write("a.jsonl", {"text": "one"})
    Path("cache/qwen_analog").mkdir(parents=True)
    old, new = Path("cache/qwen_analog/x.partial"), Path("cache/qwen_analog/y.partial")
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert (
        len(tokenized("a.jsonl")) == 1 and not old.exists() and new.exists()
    )  # the second may still be written


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    write("a.jsonl", {"text": "one"})
    Path("file").touch()
    with pytest.raises(
        DataError,
        match=(
            "^the cache of tokens file/qwen_analog cannot be used: Not a directory. Set"
            " HF_DATASETS_CACHE"
        ),
    ):
        tokenize_files(["a.jsonl"], TOKENIZER, cache_dir="file")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_cache.shutil, "copyfileobj", full)
    with pytest.raises(
        DataError, match="cache/qwen_analog cannot be used: No space left on device"
    ):
        tokenized("a.jsonl")
    assert not cache_files()


def test_two_runs_that_make_one_cache_do_not_harm_each_other():
    write("a.jsonl", *texts(range(1, 60)))
    ready, found = threading.Barrier(4), []

    class Waiting(TiktokenTokenizer):
        def encode(self, text, special=False):
            if text == "0.":
                ready.wait(20)  # all have seen that there is no cache
            return super().encode(text, special)

    def run():
        found.append(
            tokenize_files(["a.jsonl"], Waiting(RANKS), cache_dir="cache")["input_ids"][
                :
            ]
        )

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        len(found) == 4
        and all(ids == tokenized("a.jsonl")["input_ids"][:] for ids in found)
        and len(cache_files()) == 1
    )


def test_a_file_that_changes_while_it_is_read_is_refused():
    write("a.jsonl", {"text": "one"})

    class Writing(TiktokenTokenizer):
        def encode(self, text, special=False):
            write("a.jsonl", {"text": "one"}, {"text": "two"})
            return super().encode(text, special)

    with pytest.raises(DataError, match="a.jsonl: changed while it was read"):
        tokenize_files(["a.jsonl"], Writing(RANKS), cache_dir="cache")
    assert not cache_files()


def test_memory_does_not_grow_with_documents():
    write("a.jsonl", *({"text": f"{i} " + "a word and " * 80_000} for i in range(12)))
    tracemalloc.start()
    rows = tokenized("a.jsonl", 0.1)
    sequences = PackedDataset(rows, 64)
    sequences.take(20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sequences.tokens_per_epoch > 8_000_000 and peak < 25_000_000
    assert rows[3]["input_ids"][1:] == TOKENIZER.encode("3 " + "a word and " * 80_000)


def test_skipped_lines():
    write("a.jsonl", {"text": "a"}, b"{", {"text": "b"}, b"")
    assert skipped_lines(tokenized("a.jsonl", skip_bad_lines=True)) == (2, "a.jsonl:2")
    assert skipped_lines(tokenized(write("b.jsonl", {"text": "a"}))) == (0, "")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=3), max_size=12), st.floats(0, 1))
def test_held_out_mask(keys, fraction):
    mask, by_hash = (
        held_out_mask(keys, fraction),
        [is_held_out(key, fraction) for key in keys],
    )
    assert mask.dtype == bool and mask.shape == (len(keys),)
    if len(keys) >= 2 and 0 < fraction < 1 and len(set(by_hash)) == 1:
        assert mask.any() and not mask.all()
    elif len(keys) == 1 and fraction < 1:
        assert not mask.any()
    else:
        assert mask.tolist() == by_hash


def test_the_document_with_the_smallest_hash_is_held_out():
    keys = [f"document {i}" for i in range(60)]
    (chosen,) = np.flatnonzero(held_out_mask(keys, 1e-9))
    fraction = next(
        f for f in np.linspace(0, 0.2, 2001) if is_held_out(keys[chosen], f)
    )
    assert not any(is_held_out(key, fraction - 1e-4) for key in keys)


@pytest.mark.parametrize("count", [2, 3, 60])
@pytest.mark.parametrize("fraction", [1e-9, 0.01, 1 - 1e-9])
def test_few_documents_train_without_a_word_about_the_fraction(count, fraction):
    write("few.jsonl", *({"text": f"document {i}"} for i in range(count)))
    rows = tokenized("few.jsonl", fraction)
    training, held_out = PackedDataset(rows, 8), held_out_dataset(rows, 8)
    expected = [
        f"few.jsonl:{i}"
        for i in 1
        + np.flatnonzero(
            held_out_mask([f"document {i}" for i in range(count)], fraction)
        )
    ]
    sources = {s for b in held_out.epoch() for s in b.sources}
    assert (
        sources == set(expected)
        and len(training.shuffled.rows) == count - len(expected) > 0
    )
    streamed = StreamingDataset(
        open_stream(["few.jsonl"]),
        TOKENIZER,
        8,
        heldout_fraction=fraction,
        buffer_size=7,
    )
    held_out = streamed.held_out_dataset(10**6)
    assert {s for b in held_out.epoch() for s in b.sources} == set(expected)
    trained = {s for b in streamed.take(count * 3) for s in b.sources}
    assert not trained & set(expected) and len(trained) == count - len(expected)


@pytest.mark.parametrize("fraction", [0.01, 1 - 1e-9])
def test_a_document_alone_is_trained_on(fraction):
    write("one.jsonl", {"text": "alone"})
    rows = tokenized("one.jsonl", fraction)
    assert held_out_dataset(rows, 4) is None and PackedDataset(rows, 4).take(3)
    streamed = StreamingDataset(
        open_stream(["one.jsonl"]), TOKENIZER, 4, heldout_fraction=fraction
    )
    assert streamed.held_out_dataset(4) is None and streamed.take(3)


@pytest.mark.parametrize("fraction", [math.nan, math.inf, -0.1, 1.1, "0.1", None])
def test_fractions_that_are_none(fraction):
    write("a.jsonl", {"text": "a"})
    for call in (
        lambda: is_held_out("a", fraction),
        lambda: held_out_mask(["a"], fraction),
        lambda: tokenized("a.jsonl", fraction),
        lambda: StreamingDataset(
            open_stream(["a.jsonl"]), TOKENIZER, 4, heldout_fraction=fraction
        ),
    ):
        with pytest.raises(
            ValueError, match="heldout_fraction must be a number from 0 to 1"
        ):
            call()


def test_a_failed_run_leaves_nothing_in_the_cache():
    write("a.jsonl", {"text": "one"}, {"text": 2})
    for _ in range(2):
        with pytest.raises(DataError, match="line 2"):
            tokenized("a.jsonl")
    assert len(tokenized("a.jsonl", skip_bad_lines=True)) == 2


def test_no_document():
    write("empty.jsonl")
    write("bad.jsonl", b"{", b"")
    for path in ("empty.jsonl", "bad.jsonl"):
        with pytest.raises(DataError, match=f"no document in {path}"):
            tokenized(path, skip_bad_lines=True)
        with pytest.raises(DataError, match="no document to train on in the stream"):
            StreamingDataset(open_stream([path], True), TOKENIZER, 4).take(1)
    assert (
        len(
            tokenize_files(
                ["empty.jsonl", write("a.jsonl", {"text": "a"})],
                TOKENIZER,
                cache_dir="cache",
            )
        )
        == 1
    )
