"""The commands prepare and tokenizer: whole files or none, no held-out text seen."""

import errno
import json
from pathlib import Path

import pytest

from helpers import BYTES, refused
from qwen_analog import prepare
from qwen_analog.cli import main
from qwen_analog.jsonl import write_jsonl
from qwen_analog.token_cache import held_out_mask
from qwen_analog.tokenizer import TiktokenTokenizer, load_tokenizer


def test_a_vocabulary_of_one_s_own_text(here, capsys):
    assert (
        main(
            "tokenizer --data d.jsonl --vocab-size 290 --output v/w"
            " --heldout-fraction 0.2".split()
        )
        == 0
    )
    said = capsys.readouterr().out
    tokenizer = load_tokenizer("tiktoken:v/w/tokenizer.tiktoken")
    assert (
        tokenizer.vocab_size == 290
        and '"tiktoken:v/w/tokenizer.tiktoken"' in said
        and '"vocab_size": 290' in said
    )
    assert [p.name for p in Path("v/w").iterdir()] == ["tokenizer.tiktoken"]
    assert "exists already" in refused(
        capsys,
        "tokenizer",
        "--data",
        "d.jsonl",
        "--vocab-size",
        "320",
        "--output",
        "v/w",
    )


@pytest.mark.parametrize(
    "fraction", [0.5, 0.001]
)  # by the hash alone, and where it chooses none
def test_a_vocabulary_never_sees_what_is_held_out(fraction, here, monkeypatch):
    given = []
    monkeypatch.setattr(
        prepare, "learn", lambda texts, size: given.extend(texts) or BYTES
    )
    rows = [json.loads(line) for line in Path("d.jsonl").read_text().splitlines()][:20]
    write_jsonl(rows, "few.jsonl")
    assert (
        main(
            [
                "tokenizer",
                "--data",
                "few.jsonl",
                "--vocab-size",
                "300",
                "--output",
                "v",
                "--heldout-fraction",
                str(fraction),
            ]
        )
        == 0
    )
    held = held_out_mask([row["title"] for row in rows], fraction)
    assert 0 < held.sum() < 20 and given == [
        row["text"] for row, out in zip(rows, held) if not out
    ]


def test_a_vocabulary_learns_from_an_even_sample_of_much_text(
    here, monkeypatch, capsys
):
    monkeypatch.setattr(prepare, "LEARN_FROM", 1000)
    given = []
    monkeypatch.setattr(
        prepare, "learn", lambda texts, size: given.extend(texts) or BYTES
    )
    assert (
        main(
            "tokenizer --data d.jsonl --vocab-size 300 --output v"
            " --heldout-fraction 0".split()
        )
        == 0
    )
    numbers = [int(text.split()[1]) for text in given]
    assert (
        900 < sum(map(len, given)) < 1100
        and numbers[0] < 10
        and numbers[-1] > 190
        and max(b - a for a, b in zip(numbers, numbers[1:])) < 15
    )
    assert "a sample of" in capsys.readouterr().out


@pytest.mark.parametrize(
    "data, said",
    [
        ("nowhere.jsonl", "nowhere.jsonl"),
        ("bad.jsonl", "line 1"),
        ("empty.jsonl", "empty.jsonl"),
    ],
)
def test_a_vocabulary_of_nothing(data, said, here, capsys):
    Path("bad.jsonl").write_text("{\n")
    Path("empty.jsonl").touch()
    assert said in refused(
        capsys, "tokenizer", "--data", data, "--vocab-size", "300", "--output", "v"
    )
    assert not list(Path("v").glob("*"))


def test_a_corpus_is_written_whole_or_not_at_all(here, monkeypatch, capsys):
    monkeypatch.setitem(
        prepare.CORPORA,
        "wiki",
        lambda: iter([{"title": str(i), "text": f"text {i}"} for i in range(30)]),
    )

    def full(tokenizer, directory):
        raise OSError(errno.ENOSPC, "No space left on device", str(directory))

    with monkeypatch.context() as patched:
        patched.setattr(TiktokenTokenizer, "save", full)
        assert "No space" in refused(
            capsys, "prepare", "wiki", "--output", "w", "--vocab-size", "300"
        )
    assert not list(Path("w").iterdir())
    assert main(["prepare", "wiki", "--output", "w", "--vocab-size", "300"]) == 0
    assert sorted(p.name for p in Path("w").iterdir()) == [
        "tokenizer.tiktoken",
        "wiki.jsonl",
    ]
    assert "exists already" in refused(
        capsys, "prepare", "wiki", "--output", "w", "--vocab-size", "300"
    )
