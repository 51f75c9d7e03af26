"""The commands generate, export, import, consolidate and trace."""

import json
import os
from pathlib import Path

import pytest

from helpers import BYTES, SMALL, refused
from qwen_analog import commands, hardware
from qwen_analog.cli import main
from qwen_analog.hf import save_pretrained
from qwen_analog.model import QwenForCausalLM


def test_what_does_not_fit_is_refused_and_can_be_overruled(here, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "available_memory", lambda device: 1000)
    for command in (
        ["generate", "x", "--model", "c", "--max-new-tokens", "9"],
        ["eval", "--model", "c", "--data", "d.jsonl"],
        ["export", "c", "e"],
        ["import", "c", "i"],
    ):
        line = refused(capsys, *command)
        assert "--ignore-memory" in line and "MB" in line
        assert main([*command, "--ignore-memory"]) == 0


def test_a_long_answer_is_counted(here, monkeypatch, capsys):
    left = sum(p.nbytes for p in QwenForCausalLM(SMALL).parameters()) * 3
    monkeypatch.setattr(
        hardware,
        "available_memory",
        lambda device: left if len(asked.append(1) or asked) == 1 else 1000,
    )
    asked = []
    assert "--max-new-tokens" in refused(
        capsys, "generate", "x", "--model", "c", "--max-new-tokens", "60"
    )


def test_the_model_s_own_settings_count_where_no_flag_is_given(
    here, model, monkeypatch, capsys
):
    taken = []
    monkeypatch.setattr(
        commands, "complete", lambda *a, **options: taken.append(options) or "text"
    )
    monkeypatch.setattr(commands, "load", lambda *_, **__: (model, BYTES))
    for own, flags, expected in (
        ({}, [], {"temperature": 0.7}),
        ({"do_sample": False}, [], {"temperature": 0}),
        ({"do_sample": True, "temperature": 0.3, "top_k": 0}, [], {"temperature": 0.3}),
        (
            {"do_sample": True, "temperature": 0.3, "top_k": 5},
            ["--temperature", "0.9"],
            {"temperature": 0.9, "top_k": 5},
        ),
    ):
        monkeypatch.setattr(model, "generation_config", own, raising=False)
        assert main(["generate", "x", *flags]) == 0
        options = taken.pop()
        assert {
            name: options[name]
            for name in commands.SAMPLING
            if options.get(name) is not None
            and (name, options[name]) != ("repetition_penalty", 1.0)
        } == expected


def test_an_answer_too_long_is_refused_by_the_flag_s_name_before_any(here, capsys):
    line = refused(
        capsys, "generate", "x", "x" * 50, "--model", "c", "--max-new-tokens", "20"
    )
    assert "leaves 13 of c's 64 positions" in line and "--max-new-tokens" in line


def test_what_transformers_wrote_can_be_written_with(here, model, capsys):
    save_pretrained(model, BYTES, "theirs")
    assert main("generate a --model theirs --max-new-tokens 2 --seed 1".split()) == 0
    assert capsys.readouterr().out.startswith("a")


def test_export_and_import_are_refused_before_weights_are_read(
    here, monkeypatch, capsys
):
    monkeypatch.setattr(
        commands, "load", lambda *a, **o: pytest.fail("weights are read")
    )
    Path("there").mkdir()
    Path("file").touch()
    os.symlink("nowhere", "dangling")
    for command in ("export", "import"):
        for directory in ("there", "file", "file/x", "/proc/nowhere/x", "dangling"):
            assert directory.split("/")[0] in refused(capsys, command, "c", directory)
    assert (
        sorted(p.name for p in here.iterdir())
        == "c d.jsonl dangling file there".split()
    )


@pytest.mark.parametrize("directory", ["nowhere", "c", "d.jsonl", "/dev/null", "."])
def test_consolidate_names_what_holds_no_shards(directory, here, capsys):
    assert f"{directory} holds no sharded checkpoint" in refused(
        capsys, "consolidate", directory
    )


def test_trace_shows_conversations_pairs_and_questions(here, monkeypatch, capsys):
    silent, user = ({"role": r, "content": f"a {r}"} for r in ("system", "user"))
    call = {"function": {"name": "f", "arguments": {}}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    lines = [
        {"messages": [silent, user, {"role": "assistant", "content": "yes"}]},
        {"messages": [user, calling]},
        {"prompt": "why?", "completion": "so"},
        {"chosen": [user, {"role": "assistant", "content": "b"}], "rejected": [user]},
        {"prompt": [user], "answer": 7},
        {"messages": 3},
        {"text": "a text", "messages": []},
        [1],
    ]
    Path("chat.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + "{\n")
    sources = [f"chat.jsonl:{n}" for n in range(1, 11)]
    monkeypatch.setattr(commands, "documents_of_step", lambda *_: sources)
    assert main(["trace", "3"]) == 0
    found = capsys.readouterr().out.splitlines()
    texts = [line.partition("  ")[2] for line in found]
    assert texts[1].startswith("\"a user / [{'function': {'name': 'f'")
    assert texts[:1] + texts[2:] == [
        "'a user / yes'",
        "'why? / so'",
        "'a user / b'",
        "'a user / 7'",
        "'3'",
        "'a text'",
        "''",
        "''",
        "(the file has no such line any more)",
    ]


def test_trace_says_where_texts_are_gone(here, monkeypatch, capsys):
    sources = ["d.jsonl:2", "d.jsonl:900", "gone.jsonl:1", "hf:owner/name:7"]
    monkeypatch.setattr(commands, "documents_of_step", lambda *_: sources)
    assert main(["trace", "3"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "d.jsonl:2  'document 1 says that 1 is a number'",
        "d.jsonl:900  (the file has no such line any more)",
        "gone.jsonl:1",
        "hf:owner/name:7",
    ]
    assert "gone.jsonl" in said.err and said.err.count("\n") == 1
