"""Hostile files: lines that are not what they say, lines without an end, files that
end too early, names; and a writer that leaves whole files only."""

import errno
import gzip
import json
import os
import sys
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_helpers import lines, tokenized, write

from qwen_analog import jsonl
from qwen_analog.data import PackedDataset
from qwen_analog.jsonl import DataError, find_files, read_jsonl, write_jsonl
from qwen_analog.streaming import open_stream

pytest_plugins = ["text_helpers"]
pytestmark = pytest.mark.usefixtures("quiet")

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


@pytest.mark.parametrize(
    "suffix, compress",
    [("jsonl", bytes), ("jsonl.gz", gzip.compress), ("jsonl.zst", zstandard.compress)],
)
def test_a_line_beyond_the_limit_is_bad_and_never_held(suffix, compress, monkeypatch):
    monkeypatch.setattr(jsonl, "LINE_LIMIT", 3_000_000)
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
    monkeypatch.setattr(jsonl, "LINE_LIMIT", 2_000_000)
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
