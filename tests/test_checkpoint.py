"""Checkpoints back to models: weights, configuration, tokenizer, settings."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    CONFIG,
    PLAIN,
    SHARDED,
    TOKENIZER,
    changed,
    checkpointer,
    contents,
    damages,
    fresh,
    one_line,
    same,
)

from qwen_analog.archive import CheckpointError
from qwen_analog.checkpoint import (
    consolidate,
    load_checkpoint,
    load_model,
    checkpoint_config,
    read_state,
    save_checkpoint,
)
from qwen_analog.restore import restore_checkpoint

pytest_plugins = ["checkpoint_cases"]
pytestmark = pytest.mark.usefixtures("folder")


def test_consolidate_adds_the_cards_files(trained):
    model, optimizers = trained
    checkpointer("runs", **SHARDED).save("step_1", model, optimizers, {"step": 1})
    assert not Path("runs/step_1/checkpoint.pt").exists()
    file = consolidate("runs/step_1")
    checkpoint = torch.load(file)
    assert (
        same(checkpoint["model_state_dict"], dict(model.state_dict()))
        and checkpoint["step"] == 1
    )
    assert Path("runs/step_1/model.safetensors").is_file() and not list(
        Path("runs/step_1").glob("*.partial")
    )
    other, its_optimizers = fresh(seed=5)
    restore_checkpoint(
        file, other, its_optimizers
    )  # the file stands for its directory, where the optimizer is
    assert same(contents(other, its_optimizers), contents(model, optimizers))
    shutil.move(file, "checkpoint.pt")  # on its own it is weights
    restore_checkpoint("checkpoint.pt", fresh(seed=6)[0], [])
    with pytest.raises(
        CheckpointError,
        match=(
            "checkpoint.pt holds no optimizer state: training cannot be resumed from it"
        ),
    ):
        restore_checkpoint("checkpoint.pt", other, its_optimizers)
    with pytest.raises(CheckpointError, match="nowhere holds no sharded checkpoint"):
        consolidate("nowhere")


def test_damage_to_a_plain_checkpoint_is_named():
    model, optimizers = fresh()
    save_checkpoint("step_1", model, TOKENIZER, step=1)
    file = Path("step_1/checkpoint.pt")
    for _, bad in damages(file.read_bytes()):
        file.write_bytes(bad)
        for load in (
            lambda: restore_checkpoint("step_1", model, optimizers),
            lambda: load_model("step_1"),
            lambda: load_checkpoint(file),
        ):
            with pytest.raises(
                CheckpointError,
                match="step_1/checkpoint.pt is damaged or not a checkpoint",
            ) as raised:
                load()
            assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError, match="there is no checkpoint at nowhere"):
        restore_checkpoint("nowhere", model, optimizers)


WEIGHTS = {
    "missing: model.norm.weight": lambda w: w.pop("model.norm.weight"),
    "of another shape": lambda w: w.update({"model.norm.weight": torch.ones(3)}),
    "not of this model: extra": lambda w: w.update(extra=torch.ones(3)),
    "not floating point": lambda w: w.update(
        {"model.norm.weight": torch.ones(32).long()}
    ),
    "model_state_dict.model.norm.weight": lambda w: w.update(
        {"model.norm.weight": "ones"}
    ),
    "keys|string": lambda w: w.update({5: torch.ones(3)}),
}


@pytest.mark.parametrize("word", WEIGHTS)
def test_weights_that_do_not_fit_are_one_line(word, trained):
    save_checkpoint("bad", trained[0], TOKENIZER, optimizers=trained[1])
    changed("bad", lambda state: WEIGHTS[word](state["model_state_dict"]))
    before = contents(*fresh(seed=5))
    other = fresh(seed=5)
    line = one_line(
        "bad", lambda: restore_checkpoint("bad", *other), lambda: load_model("bad")
    )
    assert any(each in line for each in word.split("|")) and same(
        contents(*other), before
    )


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10_000},
        {"vocab_size": 2**23},
        {"hidden_size": True},
        {"rope_theta": "x"},
        {"x": 1},
        {5: 1},
    ],
)
def test_a_configuration_beyond_the_weights_is_refused_before_memory_is_taken(
    config, trained
):
    save_checkpoint("bad", trained[0], TOKENIZER)
    changed("bad", lambda state: state["config"].update(config))
    one_line("bad", lambda: load_model("bad"))
    save_checkpoint("good", trained[0], TOKENIZER)
    assert checkpoint_config("good") == CONFIG


@pytest.mark.parametrize("options", [PLAIN, SHARDED])
def test_generation_settings_and_tokenizer_come_back_and_are_compared(options):
    model, _ = fresh()
    model.generation_config = {
        "eos_token_id": [258, 256],
        "do_sample": True,
        "top_k": 17,
    }
    checkpointer("runs", **options).save("step_1", model, [], {})
    assert (
        json.loads(Path("runs/step_1/generation_config.json").read_text())
        == model.generation_config
    )
    assert (
        load_model("runs/step_1")[0].generation_config
        == model.generation_config
        == read_state("runs/step_1")["generation_config"]
    )
    if options:
        consolidate("runs/step_1")
        assert load_model("runs/step_1")[0].generation_config == model.generation_config
        Path("runs/step_1/checkpoint.pt").unlink()
    file = Path("runs/step_1/tokenizer.tiktoken")
    rows = [line.split() for line in file.read_text().splitlines()]
    rows[70][0], rows[75][0] = rows[75][0], rows[70][0]
    file.write_text("".join(" ".join(row) + "\n" for row in rows))
    assert "tokenizer.tiktoken, which is damaged or was replaced" in one_line(
        "runs/step_1", lambda: load_model("runs/step_1")
    )
    file.write_text("no ranks")
    one_line("runs/step_1", lambda: load_model("runs/step_1"))


def test_a_checkpoint_without_generation_settings_has_none(trained):
    save_checkpoint("old", trained[0], TOKENIZER)
    changed("old", lambda state: state.pop("generation_config"))
    assert (
        load_model("old")[0].generation_config == {}
        and not Path("old/generation_config.json").exists()
    )


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "tiktoken",
        "tiktoken:",
        "tiktoken:../outside.tiktoken",
        "hf:Qwen/Qwen2.5-0.5B",
        "hf:.",
        "hf:..",
        "other:tokenizer.tiktoken",
        "sentencepiece:tokenizer.tiktoken",
        "tiktoken:/etc/passwd",
        "tiktoken:a\nb",
    ],
)
def test_a_tokenizer_outside_of_the_checkpoint_is_refused(spec, trained):
    TOKENIZER.save(".")
    Path("tokenizer.tiktoken").rename("outside.tiktoken")
    save_checkpoint("bad", trained[0], TOKENIZER)
    changed("bad", lambda state: state.update(tokenizer=spec))
    one_line("bad", lambda: load_model("bad"))


def test_modes_follow_the_umask(trained):
    before = os.umask(0o027)
    try:
        save_checkpoint("plain", *trained[:1], TOKENIZER, safetensors=True)
        checkpointer("runs", **SHARDED).save("step_1", *trained, {})
        consolidate("runs/step_1")
    finally:
        os.umask(before)
    modes = {
        path.stat().st_mode & 0o777
        for root in ("plain", "runs")
        for path in Path(root).rglob("*")
        if path.is_file()
    }
    assert modes == {0o640} and Path("plain").stat().st_mode & 0o777 == 0o750


def test_reading_needs_no_more_than_the_core(trained):
    """The libraries of training and serving are not there."""
    save_checkpoint("plain/step_1", trained[0], TOKENIZER, optimizers=trained[1])
    checkpointer("sharded", **SHARDED).save("step_1", *trained, {})
    code = """
import sys
for name in (
    "pydantic datasets pyarrow zstandard matplotlib tensorboard starlette uvicorn gguf"
).split():
    sys.modules[name] = None
from qwen_analog.checkpoint import load_checkpoint, load_model, read_state
from qwen_analog.run_directory import newest_whole
for run in ("plain", "sharded"):
    path = newest_whole(run)
    load_model(path), load_checkpoint(path), read_state(path)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


class DiskFull(OSError):
    pass


@contextlib.contextmanager
def failing_call(number, monkeypatch):
    """The `number`-th call of torch.save, Path.write_text or Path.rename raises; a
    failing torch.save leaves half a file.
    """
    calls, save = [], torch.save

    def wrap(function):
        def wrapped(*args, **kwargs):
            calls.append(function)
            if len(calls) == number:
                if function is save:
                    save(*args, **kwargs)
                    file = Path(args[1])
                    file.write_bytes(file.read_bytes()[:1000])
                raise DiskFull
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", wrap(torch.save))
        patch.setattr(Path, "write_text", wrap(Path.write_text))
        patch.setattr(Path, "rename", wrap(Path.rename))
        yield


def check_save(save, monkeypatch):
    """Whatever call fails, the newest checkpoint loads, and is the old or the new."""
    model, _ = fresh()
    for number in range(1, 6):
        root = Path(tempfile.mkdtemp(dir="."))
        save(root / "step_1", model, TOKENIZER, step=1)
        with failing_call(number, monkeypatch), contextlib.suppress(OSError):
            save(root / "step_2", model, TOKENIZER, step=2)
        there = sorted(root.glob("step_[12]/checkpoint.pt"))
        assert there, f"failure {number}: no checkpoint is left"
        newest = there[-1].parent
        assert load_checkpoint(newest)["step"] in (1, 2), f"failure {number}"
        names = {path.name for path in newest.iterdir()}
        assert {"config.json", "tokenizer.tiktoken"} <= names, f"failure {number}"


def write_state(directory, model, state):
    contents = {"model_state_dict": model.state_dict(), **state}
    contents["config"] = model.config.to_dict()
    torch.save(contents, directory / "checkpoint.pt")


def save_in_place(directory, model, tokenizer, **state):
    directory.mkdir()
    write_state(directory, model, state)
    (directory / "config.json").write_text("{}")
    tokenizer.save(directory)


def save_state_last(directory, model, tokenizer, **state):
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    tokenizer.save(directory)
    write_state(directory, model, state)


def delete_then_save(directory, model, tokenizer, **state):
    for old in directory.parent.glob("step_*"):
        shutil.rmtree(old)
    save_checkpoint(directory, model, tokenizer, **state)


def test_a_save_that_fails_anywhere_leaves_a_checkpoint(monkeypatch):
    check_save(save_checkpoint, monkeypatch)


@pytest.mark.mutant
@pytest.mark.parametrize("save", [save_in_place, save_state_last, delete_then_save])
def test_other_ways_of_saving_are_noticed(save, monkeypatch):
    with pytest.raises((AssertionError, CheckpointError)):
        check_save(save, monkeypatch)


def test_a_tied_head_is_no_second_weight_of_a_checkpoint():
    model, _ = fresh(tie_word_embeddings=True)
    file = save_checkpoint("tied/step_1", model, TOKENIZER)
    contents = load_checkpoint(file)
    contents["config"]["num_hidden_layers"] += 9
    torch.save(contents, file)
    with pytest.raises(CheckpointError, match=f"holds {model.count_parameters():,}$"):
        load_model(file)
