"""Files that are whole or not there; JSON of strangers."""

import os
from pathlib import Path

import pytest

from qwen_analog.files import (
    commit_partial,
    flush_to_disk,
    make_directory,
    new_partial,
    read_json,
    write_json,
)


pytestmark = pytest.mark.usefixtures("folder")


class Stopped(BaseException):
    """The machine is gone."""


def write(directory):
    partial = new_partial(directory)
    (partial / "part").mkdir()
    (partial / "part/a").write_text("a")
    write_json({"b": 1}, partial / "b.json")
    commit_partial(partial, directory)


@pytest.mark.parametrize("calls", range(12))
def test_a_directory_is_whole_or_absent_wherever_the_machine_stops(calls, monkeypatch):
    left = [calls]

    def counted(function):
        def call(*args, **options):
            if left[0] == 0:
                raise Stopped
            left[0] -= 1
            return function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for owner, name in (
            (os, "fsync"),
            (Path, "mkdir"),
            (Path, "write_text"),
            (Path, "rename"),
        ):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            write(Path("out/model"))
        except Stopped:
            pass
        else:
            assert calls > 8
    if not Path("out/model").exists():
        write(Path("out/model"))  # what was left behind is in nobody's way
    assert Path("out/model/part/a").read_text() == "a"
    assert read_json("out/model/b.json") == {"b": 1}
    assert not Path("out/model.partial").exists()


def test_all_of_it_is_flushed_before_it_has_its_name(events):
    here = Path.cwd()
    write(Path("new/model"))
    named = events.index("-> new/model")
    flushed = {Path(event).name for event in events[:named]}
    assert {"a", "part", "b.json", "model.partial"} <= flushed
    assert events[named + 1 :] == [str(here / "new")]
    del events[:]
    make_directory(Path("x/y"))
    make_directory(Path("x/y"))  # nothing is left to do
    assert events == [str(here), str(here / "x")]
    with pytest.raises(FileNotFoundError):
        flush_to_disk(Path("nothing"))


def test_a_directory_that_exists_is_left_alone():
    write(Path("model"))
    with pytest.raises(ValueError, match="^model exists already: move it away"):
        new_partial(Path("model"))
    assert not Path("model.partial").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    {
        b'{"a": 1': "Expecting",
        b"": "Expecting value",
        b'{"a": 1, "b": {"c": 1, "c": 2}}': "'c' stands twice",
        b"[" * 100_000: "recursion",
        b"[1]": "must hold a JSON object, not a list",
        b'{"a": "\xfc"}': "utf-8",
        b" " * 101: "larger than 100 bytes",
        b'{"a": 1' + b"0" * 5000 + b"}": "4300 digits",
        None: "no regular file",
    }.items(),
)
def test_what_is_no_json_object_is_one_line_that_names_the_file(content, reason):
    if content is None:
        os.mkfifo("x.json")
    else:
        Path("x.json").write_bytes(content)
    most = 100 if content == b" " * 101 else 2**26
    with pytest.raises(ValueError, match=reason) as raised:
        read_json("x.json", most)
    assert str(raised.value).startswith("x.json ") and "\n" not in str(raised.value)


def test_json_comes_back_and_has_no_nan():
    values = {"text": "Zürich", "list": [1, 2.5, None, True]}
    write_json(values, "x.json")
    assert read_json("x.json") == values
    assert Path("x.json").read_bytes().endswith(b"\n}\n")
    Path("x.json").write_bytes(b"\xef\xbb\xbf" + Path("x.json").read_bytes())
    assert read_json("x.json") == values  # some editors begin a file with a mark
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json({"loss": float("nan")}, "y.json")
    assert not Path("y.json").exists()
