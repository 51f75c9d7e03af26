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
from qwen_analog.jsonl import DataError, read_lines, write_jsonl
from qwen_analog.streaming import StreamingDataset, open_stream
from qwen_analog.token_cache import (
    held_out_mask,
    is_held_out,
    skipped_lines,
    tokenize_files,
)
from qwen_analog.tokenizer import TiktokenTokenizer

pytest_plugins = ["text_helpers"]
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
    assert sources == set(expected) and len(training.rows) == count - len(expected) > 0
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


# by several processes


def token_file(workers, files=("a.jsonl",), tokenizer=TOKENIZER, **options):
    """Tokenize into a cache of its own; return its one file's name and bytes."""
    where = Path(f"by {workers} {tokenizer.vocab_size} {options}")
    rows = tokenize_files(
        files, tokenizer, cache_dir=where, num_workers=workers, **options
    )
    (path,) = where.rglob("*.*")
    return path.name, path.read_bytes(), rows["source"][:]


def many(count=300, size=40):
    rng = np.random.default_rng(0)
    return [
        {"title": f"{i}", "text": f"{i}: " + "word é 中 " * int(rng.integers(1, size))}
        for i in range(count)
    ]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(token_cache, "BATCH_BYTES", 2_000)


@pytest.mark.parametrize("workers", [2, 3, 7])
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_the_same_bytes_whatever_the_number_of_processes(
    workers, suffix, small_batches
):
    for name, documents in (("a", many()), ("b", many(50, 4)), ("c", [])):
        write_jsonl(documents, f"d/{name}.{suffix}")
    write_jsonl([{"text": "long " * 400_000}, {"text": "after"}], f"d/d.{suffix}")
    files = [f"d/{name}.{suffix}" for name in "abcd"]
    assert token_file(1, files) == token_file(workers, files)


@pytest.mark.parametrize("kind", ["ours", "hf", "sentencepiece", "named"])
def test_every_kind_of_tokenizer_works_in_processes(kinds, kind, small_batches):
    write("a.jsonl", *many())
    assert token_file(1, tokenizer=kinds[kind]) == token_file(2, tokenizer=kinds[kind])


@pytest.mark.parametrize("bad", [0, 3, 150, 298])
def test_a_bad_line_is_named_by_any_process(bad, small_batches):
    documents = many()
    write("a.jsonl", *documents[:bad], b"{", *documents[bad:], b"", {"text": 1})
    with pytest.raises(DataError) as one:
        token_file(1)
    with pytest.raises(DataError) as two:
        token_file(2)
    assert str(one.value) == str(two.value)
    assert str(two.value).startswith(f"a.jsonl, line {bad + 1}: not JSON")
    assert not list(Path().rglob("*.tokens")) + list(Path().rglob("*.partial"))
    skipped = token_file(2, skip_bad_lines=True)
    assert skipped == token_file(1, skip_bad_lines=True) and len(skipped[2]) == 303


def test_a_file_that_breaks_off_is_refused(small_batches):
    write_jsonl(many(), "a.jsonl.gz")
    Path("a.jsonl.gz").write_bytes(Path("a.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(DataError, match="a.jsonl.gz cannot be read"):
        token_file(2, ["a.jsonl.gz"])


class Killed(TiktokenTokenizer):
    def encode(self, text, special=False):
        if text.startswith("150:"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(text, special)


def test_a_killed_process_is_one_line_and_leaves_nothing(small_batches):
    write("a.jsonl", *many())
    with pytest.raises(DataError, match="^a process that tokenized was killed[^\n]*$"):
        token_file(2, tokenizer=Killed(RANKS))
    assert not list(Path().rglob("*.tokens")) + list(Path().rglob("*.partial"))


def test_what_a_tokenizer_refuses_is_raised(small_batches):
    class Refusing(TiktokenTokenizer):
        def encode(self, text, special=False):
            raise ValueError("the tokenizer cannot encode this")

    write("a.jsonl", *many())
    with pytest.raises(ValueError, match="^the tokenizer cannot encode this$"):
        token_file(2, tokenizer=Refusing(RANKS))


SLOW = """
import os, signal, sys, time
from qwen_analog import token_cache
from qwen_analog.arguments import report_errors
from qwen_analog.bpe import BYTE_ORDER
from qwen_analog.tokenizer import TiktokenTokenizer

class Slow(TiktokenTokenizer):
    def encode(self, text, special=False):
        with open(f"worker {os.getpid()}", "w"):
            time.sleep(0.02)
        return super().encode(text, special)

# where tests run in the background of a shell, children begin without it
signal.signal(signal.SIGINT, signal.default_int_handler)
token_cache.BATCH_BYTES = 2_000
tokenizer = Slow({token: rank for rank, token in enumerate(BYTE_ORDER)})
sys.exit(report_errors("test", lambda: token_cache.tokenize_files(
    ["a.jsonl"], tokenizer, cache_dir="cache", num_workers=2)))
"""


def tokenizing_slowly():
    """A process that tokenizes with two others, and the ids of these."""
    write("a.jsonl", *many(3_000))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(token_cache.__file__).parents[1])},
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while len(workers := list(Path().glob("worker *"))) < 2:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    return process, [int(path.name.split()[1]) for path in workers]


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # ended, and nobody has asked for its exit code


def wait_for_the_end(pids):
    until = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < until, "a process is left over"
        time.sleep(0.02)


def test_ctrl_c_ends_all_processes_with_one_line():
    process, workers = tokenizing_slowly()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(30) == 130
    assert process.stderr.read() == "test: interrupted\n"
    wait_for_the_end(workers)
    assert not list(Path("cache").rglob("*.*"))


def test_workers_end_with_the_process_that_started_them():
    process, workers = tokenizing_slowly()
    process.kill()
    process.wait(30)
    wait_for_the_end(workers)


def test_lines_on_their_way_are_bounded(monkeypatch):
    monkeypatch.setattr(token_cache, "BATCH_BYTES", 1_000)
    write("a.jsonl", *({"text": "word " * 100} for _ in range(200)))
    read = []

    def counted():
        for line in read_lines(["a.jsonl"]):
            read.append(len(line.content))
            yield line

    done = 0
    for _, rows in token_cache.tokenize_on_cores(counted(), TOKENIZER, False, 2):
        done += len(rows)
        assert sum(read[done:]) <= (2 * 2 + 3) * 1_000
    assert done == 200


def test_as_many_processes_as_pay(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    write("a.jsonl", {"text": "a" * 90})
    for worker_bytes, expected in ((1 << 24, 1), (101, 1), (50, 2), (10, 4)):
        monkeypatch.setattr(token_cache, "WORKER_BYTES", worker_bytes)
        assert token_cache.count_workers(["a.jsonl"], 0) == expected
    assert token_cache.count_workers(["a.jsonl"], 9) == 9


@pytest.mark.parametrize("value", [math.nan, -1, 1.5, "3", None, True])
def test_numbers_of_processes_that_are_none(value):
    write("a.jsonl", {"text": "a"})
    with pytest.raises(ValueError, match="num_workers must be a whole number"):
        token_file(value)
