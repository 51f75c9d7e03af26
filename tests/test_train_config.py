"""The settings of a run: files, flags, names of older versions, and their refusals."""

import argparse
import json
import re
import typing
from pathlib import Path

import pytest
from training import (  # noqa: F401
    ROOT,
    as_file,
    run,
    folder,
    settings,
)

from qwen_analog import QwenConfig
from qwen_analog import train as module
from qwen_analog.config import ACTIVATION_CHECKPOINTING, PRECISIONS, STRATEGIES
from qwen_analog.train_config import TrainConfig, add_arguments, fitted, given_settings


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(learning_rte=1), "learning_rte"),
        (dict(max_steps=0), "max_steps"),
        (dict(max_steps=2.5), "max_steps"),
        (dict(max_steps="9"), "max_steps"),
        (dict(optimizer="sgd"), "optimizer"),
        (dict(precision="fp16"), "precision"),
        (dict(learning_rate=float("nan")), "learning_rate"),
        (dict(model={"hidden_sze": 3}), "hidden_sze"),
        (dict(model={"num_key_value_heads": 3}), "num_key_value_heads"),
        (dict(model="huge"), "unknown preset 'huge'"),
        (dict(data="corpus.jsonl"), "data"),
        (dict(beta2=1.0), "beta2"),
    ],
)
def test_a_bad_setting_names_itself_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        settings(**changes)
    assert "\n" not in str(caught.value)


def test_the_shipped_settings_are_the_card():
    config = TrainConfig.from_file(ROOT / "qwen_analog" / "train_config.json")
    assert config.qwen_config() == QwenConfig() == TrainConfig().qwen_config()
    assert config.model_copy(
        update={"model": "analog-3b"}
    ) == TrainConfig() and config.model_fields_set == set(TrainConfig.model_fields)
    card = TrainConfig(model="card").qwen_config()
    assert card == TrainConfig().qwen_config()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"max_steps": NaN}',
        b'{"model": 3}',
        b'{"data": [1]}',
        b"null",
    ],
)
def test_hostile_settings_files_are_one_line(content, tmp_path):
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        TrainConfig.from_file(path)
    assert "settings.json" in str(caught.value) and "\n" not in str(caught.value)


def test_every_setting_beyond_the_run_is_named():
    config, notes = fitted(
        settings(
            max_steps=20,
            warmup_steps=19,
            schedule="wsd",
            save_every=21,
            eval_every=22,
            log_every=23,
            keep_every=7,
        )
    )
    assert config.warmup_steps == 19
    for name in (
        "wsd",
        "save_every 21",
        "eval_every 22",
        "log_every 23",
        "keep_every 7",
    ):
        assert any(name in note for note in notes)
    config, (note,) = fitted(
        settings(max_steps=20, warmup_steps=20)
    )  # would end at the highest rate
    assert (
        config.warmup_steps == 2
        and "warmup_steps 20 does not fit into 20 steps" in note
    )
    assert (
        fitted(settings())[1] == []
        and fitted(settings(max_steps=1, warmup_steps=1, save_every=1, eval_every=1))[1]
        == []
    )
    assert (
        "profile_steps"
        in fitted(settings(max_steps=2, profile_steps=1, eval_every=1))[1][0]
    )


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"max_steps": 3, "max_steps": 4}', "'max_steps' stands twice in it"),
        ('{"model": {"vocab_size": 1, "vocab_size": 2}}', "vocab_size"),
        ('{"learning_rate": 1e999}', "learning_rate"),
        ('{"z_loss": NaN}', "z_loss"),
        ('{"weight_decay": true}', "weight_decay"),
        ('{"max_steps": true}', "max_steps"),
        ('{"beta1": "0.9"}', "beta1"),
        ('{"seed": 1' + "0" * 30 + "}", "seed"),
        ('{"output_dir": ""}', "output_dir"),
        ('{"data": ["a\\u0000b"]}', "data"),
        ('{"a\\nb": 1}', "no such setting"),
        (" " * 2**21, "larger than"),
        ('{"max_steps": ' + "9" * 5000 + "}", "settings.json"),
    ],
)
def test_odd_settings_files_are_one_line(content, message):
    Path("settings.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        TrainConfig.from_file("settings.json")
    assert "settings.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_directory_is_no_settings_file_and_a_byte_order_mark_is_no_fault():
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        TrainConfig.from_file(".")
    Path("settings.json").write_bytes(b'\xef\xbb\xbf{"max_steps": 3}')
    assert TrainConfig.from_file("settings.json").max_steps == 3


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--learning-rate", "nan"),
        ("--weight-decay", "-1"),
        ("--peak-tflops", "inf"),
        ("--max-steps", "-5"),
        ("--beta2", "1"),
        ("--heldout-fraction", "1"),
        ("--micro-batch-size", "99999999999999999999"),
        ("--model", "huge"),
    ],
)
def test_a_flag_is_refused_by_its_name(flag, value, capsys):
    for config in ([], ["--config", as_file(settings())]):
        assert module.main([*config, flag, value]) == 2
        said = capsys.readouterr().err
        assert flag in said and said.count("\n") == 1


# --- names


def test_settings_of_version_0_1_0_have_their_present_names():
    old = {"block_size": 32, "eval_blocks": 3, "max_steps": 9}
    config = TrainConfig.create(old)
    assert config == TrainConfig(sequence_length=32, eval_sequences=3, max_steps=9)
    assert config.model_fields_set == {"sequence_length", "eval_sequences", "max_steps"}
    both = TrainConfig.create({"block_size": 32, "sequence_length": 64})
    assert both.sequence_length == 64
    Path("settings.json").write_text(json.dumps(old))
    assert TrainConfig.from_file("settings.json") == config
    assert (
        TrainConfig.from_file("settings.json", sequence_length=8).sequence_length == 8
    )
    with pytest.raises(ValueError, match="sequence_length"):
        TrainConfig.create({"block_size": 0})


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_a_flag_goes_before_the_file_and_only_what_was_given_is_set():
    Path("settings.json").write_text('{"max_steps": 9, "block_size": 32, "seed": 4}')
    words = ["--config", "settings.json", "--block-size", "64", "--no-stream"]
    config = given_settings(parsed(*words, "--data", "a.jsonl", "b.jsonl"))
    given = {"max_steps": 9, "seed": 4, "sequence_length": 64, "stream": False}
    assert config.model_dump(exclude_unset=True) == given | {
        "data": ["a.jsonl", "b.jsonl"]
    }
    assert given_settings(parsed()).model_fields_set == set()


def flag_for(name, value):
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-")]
    return [flag, *map(str, value if isinstance(value, list) else [value])]


OTHER = {
    "method": "dpo",
    "format": "chat",
    "lora_targets": ["q_proj", "up_proj"],
    "compile": True,
    "model": "qwen2.5-0.5b",
    "optimizer": "muon",
    "schedule": "wsd",
    "precision": "fp32",
    "activation_checkpointing": "none",
    "parallel": "hsdp",
    "skip_steps": [3, 4],
}


@pytest.mark.parametrize("name", TrainConfig.model_fields)
def test_every_setting_has_a_flag_and_an_explanation(name):
    field = TrainConfig.model_fields[name]
    default = field.get_default(call_default_factory=True)
    other = OTHER.get(name)
    if other is None:
        other = {bool: not default, list: ["x", "y"], str: "x"}.get(type(default))
    if other is None:
        other = default + 1 if isinstance(default, int) else default / 2 or 0.5
    config = given_settings(parsed(*flag_for(name, other)))
    assert config.model_dump(exclude_unset=True) == {name: other}
    assert len(field.description) > 10


def test_the_help_needs_no_torch_and_names_every_setting_once():
    code = (
        "import argparse, sys\n"
        "from qwen_analog.train_config import add_arguments\n"
        "parser = argparse.ArgumentParser()\n"
        "add_arguments(parser)\n"
        "print(parser.format_help())\n"
        "assert 'torch' not in sys.modules"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    for name in TrainConfig.model_fields:
        flag = "--" + name.replace("_", "-")
        assert len(re.findall(rf"^  {flag}[ ,\n]", done.stdout, re.MULTILINE)) == 1
    assert "--block-size" not in done.stdout


def test_choices_are_those_of_the_modules_that_offer_them():
    fields = TrainConfig.model_fields
    for name, choices in (
        ("precision", ("auto", *PRECISIONS)),
        ("parallel", STRATEGIES),
        ("activation_checkpointing", ACTIVATION_CHECKPOINTING),
    ):
        assert typing.get_args(fields[name].annotation) == choices
        with pytest.raises(ValueError, match=name):
            TrainConfig.create({name: "other"})
