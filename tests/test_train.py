"""Training: resuming bit for bit, one process against two, what a run writes and how
it ends.
"""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training import (  # noqa: F401
    MODEL,
    ROOT,
    as_file,
    distance,
    entries,
    final_weights,
    folder,
    run,
    same,
    settings,
    stops_after,
    training_state,
    write_corpus,
    launched,
)

from qwen_analog import QwenConfig, QwenForCausalLM, batches, preflight, progress, step
from qwen_analog import train as module
from qwen_analog.checkpoint import load_checkpoint, load_model
from qwen_analog.run_directory import latest_checkpoint
from qwen_analog.cli import main as cli
from qwen_analog.jsonl import DataError
from qwen_analog.train import train
from qwen_analog.train_config import TrainConfig, fitted


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stream", [False, True])
def test_resumed_equals_uninterrupted_bit_for_bit(optimizer, stream):
    shared = dict(
        optimizer=optimizer,
        stream=stream,
        precision="bf16",
        activation_checkpointing="full",
    )
    train(settings(output_dir="whole", **shared))
    for k in (2, 4):
        train(
            settings(output_dir=f"resumed_{k}", **shared),
            resume_from=f"whole/step_{k}/checkpoint.pt",
        )
        assert same(training_state(f"resumed_{k}/final"), training_state("whole/final"))


def forgetful(forget):
    """`TrainerState.load_state_dict` with one thing left as it was before."""
    load = module.TrainerState.load_state_dict

    def broken(trainer, path, state, same_data):
        before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        load(trainer, path, state, same_data and forget != "data")
        if forget == "weights":
            trainer.model.load_state_dict(before)
        elif forget == "optimizer":
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
        elif forget == "step":
            trainer.step = 0

    return broken


@pytest.mark.mutant
@pytest.mark.parametrize("forget", ["weights", "optimizer", "data", "step"])
def test_a_resume_that_forgets_one_thing_ends_elsewhere(forget, monkeypatch):
    train(settings(output_dir="whole"))
    monkeypatch.setattr(module.TrainerState, "load_state_dict", forgetful(forget))
    train(settings(output_dir="resumed"), resume_from="whole/step_2")
    states = [training_state(f"{run}/final") for run in ("resumed", "whole")]
    assert not same(states[0]["model_state_dict"], states[1]["model_state_dict"])


def test_two_runs_are_equal_and_another_seed_is_not():
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(settings(output_dir=name, seed=seed))
    assert same(training_state("a/final"), training_state("b/final"))
    assert not same(
        training_state("a/final")["model_state_dict"],
        training_state("c/final")["model_state_dict"],
    )


@pytest.mark.slow
def test_one_process_equals_two_and_any_accumulation():
    train(settings(output_dir="one"))
    for accumulation, micro in ((2, 2), (4, 1)):
        train(
            settings(
                output_dir=f"accumulated_{accumulation}",
                gradient_accumulation_steps=accumulation,
                micro_batch_size=micro,
            )
        )
        assert (
            distance(final_weights("one"), final_weights(f"accumulated_{accumulation}"))
            < 1e-4
        )
    launched(2, output_dir="two", micro_batch_size=2)
    moved = distance(
        final_weights("one"), QwenForCausalLM(QwenConfig(**MODEL)).state_dict()
    )
    assert distance(final_weights("one"), final_weights("two")) < 1e-4 < 0.01 < moved
    lines = [
        [json.loads(line) for line in Path(d, "metrics.jsonl").read_text().splitlines()]
        for d in ("one", "two")
    ]
    for a, b in zip(*lines, strict=True):
        for name in ("loss", "heldout_loss", "heldout_bits_per_byte"):
            assert a.keys() == b.keys() and a.get(name, 0) == pytest.approx(
                b.get(name, 0), rel=1e-4
            )


@pytest.mark.slow
def test_two_processes_continue_what_one_began():
    train(settings(output_dir="one"))
    launched(2, "--resume", "one/step_4", output_dir="two", micro_batch_size=2)
    assert distance(final_weights("one"), final_weights("two")) < 1e-4


def test_a_checkpoint_holds_what_the_contract_says():
    train(settings(output_dir="checkpoints"))
    checkpoint = torch.load("checkpoints/final/checkpoint.pt")
    model = QwenForCausalLM(QwenConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model_state_dict"])
    loaded, tokenizer = load_model("checkpoints/final")
    ids = torch.tensor([tokenizer.encode("12: abc")])
    assert torch.equal(model(ids), loaded(ids))
    names = {path.name for path in Path("checkpoints/final").iterdir()}
    assert names == {
        "checkpoint.pt",
        "model.safetensors",
        "config.json",
        "tokenizer.tiktoken",
    }
    assert {path.name for path in Path("checkpoints").iterdir()} == {
        "step_2",
        "step_4",
        "final",
        "metrics.jsonl",
        "ledger",
        "tensorboard",
        "loss.png",
        "summary.json",
        "run.lock",
    }


def test_hugging_face_reads_the_final_directory():
    from transformers import AutoModelForCausalLM

    train(settings(output_dir="checkpoints"))
    theirs, (ours, _) = (
        AutoModelForCausalLM.from_pretrained("checkpoints/final"),
        load_model("checkpoints/final"),
    )
    ids = torch.arange(40)[None]
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_old_checkpoints_are_pruned():
    train(settings(keep_last=1, save_every=1))
    assert sorted(
        p.name for p in Path("checkpoints").iterdir() if (p / "checkpoint.pt").exists()
    ) == ["final", "step_5"]


def test_a_crash_in_a_save_leaves_the_last_checkpoint(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    real = torch.save
    monkeypatch.setattr(
        torch,
        "save",
        lambda value, path: full() if value["step"] == 4 else real(value, path),
    )
    with pytest.raises(OSError, match="No space left"):
        train(settings())
    assert latest_checkpoint("checkpoints") == Path("checkpoints/step_2")
    monkeypatch.setattr(torch, "save", real)
    train(settings(), resume_from="auto")
    train(settings(output_dir="whole"))
    assert same(training_state("checkpoints/final"), training_state("whole/final"))


def test_a_step_that_is_not_finite_is_not_applied(monkeypatch):
    real, calls = step.forward_loss, []

    def spoiled(model, *rest):
        loss = real(model, *rest)
        calls.append(model.training)
        return loss * float("nan") if sum(calls) == 3 and model.training else loss

    monkeypatch.setattr(step, "forward_loss", spoiled)
    train(settings())
    lines = [
        json.loads(line)
        for line in Path("checkpoints/metrics.jsonl").read_text().splitlines()
    ]
    (skipped,) = [line for line in lines if "skipped" in line]
    assert skipped["step"] == 3 and all(
        source.startswith("corpus.jsonl:") for source in skipped["sources"]
    )
    assert all(
        torch.isfinite(weight).all() for weight in final_weights("checkpoints").values()
    )


def test_three_such_steps_stop_the_run(monkeypatch):
    real = step.forward_loss
    monkeypatch.setattr(
        step, "forward_loss", lambda model, *rest: real(model, *rest) * float("inf")
    )
    with pytest.raises(ValueError, match="not finite 3 times in a row"):
        train(settings(save_every=100))


@pytest.mark.slow
def test_a_signal_saves_and_ends(tmp_path):
    config = as_file(
        settings(max_steps=100_000, save_every=100_000, eval_every=100_000)
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen_analog.train", "--config", config],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf")},
    )
    deadline = time.monotonic() + 120
    while (
        not Path("checkpoints/metrics.jsonl").exists() and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    newest = latest_checkpoint("checkpoints")
    assert (
        process.returncode == 0
        and "continue with --resume auto" in output
        and newest.name.startswith("step_")
    )
    assert load_checkpoint(newest)["step"] == int(newest.name[5:])


def test_bad_lines_are_named_or_counted(capsys):
    with open("corpus.jsonl", "a") as file:
        file.write('{"text": 1}\n')
    with pytest.raises(DataError, match="corpus.jsonl, line 201"):
        train(settings())
    train(settings(skip_bad_lines=True, max_steps=1))
    assert (
        "skipped 1 bad lines, the first at corpus.jsonl:201" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_the_card_runs_inside_the_package_folder():
    config = as_file(settings(max_steps=2))
    done = run(
        ROOT / "qwen_analog" / "train.py", "--config", config, "--data", "corpus.jsonl"
    )
    assert done.returncode == 0, done.stderr
    done = run(
        ROOT / "qwen_analog" / "train.py",
        "--data",
        "corpus.jsonl",
        "--resume",
        "checkpoints/final/checkpoint.pt",
    )
    assert done.returncode == 0 and "nothing to train" in done.stdout, done.stderr


@pytest.mark.slow
def test_errors_of_the_commands_are_one_line(capsys):
    good = as_file(settings(), "good.json")
    for arguments in (
        ["--data", "nowhere.jsonl"],
        ["--config", "nowhere.json"],
        ["--resume", "nowhere"],
        ["--max-steps", "0"],
    ):
        assert module.main(["--config", good, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in error
    # and so of a process, here the last of them
    done = run("-m", "qwen_analog.train", "--config", good, *arguments)
    assert done.returncode == 2 and done.stderr == error


def test_generate_command(capsys):
    train(settings())
    arguments = [
        "generate",
        "12: ab",
        "--max-new-tokens",
        "5",
        "--seed",
        "1",
        "--min-p",
        "0.01",
        "--repetition-penalty",
        "1.1",
    ]
    assert cli(arguments) == cli(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("12: ab") and lines[-2:] == [lines[-1]] * 2
    assert (
        cli(["generate", "12: ab", "--max-new-tokens", "30", "--temperature", "0"]) == 0
    )
    text = capsys.readouterr().out.rstrip("\n")
    assert (
        cli(
            [
                "generate",
                "12: ab",
                "--max-new-tokens",
                "30",
                "--temperature",
                "0",
                "--stop",
                text[9:11],
                "--stop",
                "never",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == text[: text.index(text[9:11], 6)] + "\n"
    assert cli(["generate", "x", "--checkpoint", "nowhere"]) == 2
    assert "there is no directory nowhere" in capsys.readouterr().err
    assert (
        cli(["generate", "x", "--max-new-tokens", "5"]) == 0
        and cli(["generate", "x", "--checkpoint", "checkpoints/step_99"]) == 2
    )
    assert (
        "there is no checkpoint at checkpoints/step_99: train one first"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_prepare_command(capsys):
    assert cli(["prepare", "stdlib", "--vocab-size", "300"]) == 0
    first = json.loads(Path("data/stdlib/stdlib.jsonl").read_text().splitlines()[0])
    assert (
        set(first) == {"title", "text"} and "stdlib.jsonl: " in capsys.readouterr().out
    )
    assert (
        cli(["prepare", "stdlib"]) == 2 and "exists already" in capsys.readouterr().err
    )


def test_few_documents_are_divided_and_one_is_not(capsys):
    for count in (50, 1):
        write_corpus(count)
        changes = settings().model_dump(exclude_unset=True) | {
            "output_dir": f"out_{count}",
            "max_steps": 2,
            "eval_every": 1,
        }
        del changes["heldout_fraction"]
        train(TrainConfig.create(changes))
        assert any("heldout_loss" in entry for entry in entries(f"out_{count}")) == (
            count > 1
        )
    assert "nothing is held out" in capsys.readouterr().err
    with pytest.raises(DataError, match="heldout_fraction 0.1: one document"):
        train(settings(output_dir="named"))


def test_the_settings_for_a_laptop_train_on_own_documents(capsys):
    write_corpus(50)
    file = ROOT / "qwen_analog" / "train_laptop.json"
    assert (
        cli(
            [
                "tokenizer",
                "--data",
                "corpus.jsonl",
                "--output",
                "data/own",
                "--vocab-size",
                "300",
            ]
        )
        == 0
    )
    assert (
        cli(
            [
                "train",
                "--config",
                str(file),
                "--data",
                "corpus.jsonl",
                "--max-steps",
                "2",
                "--micro-batch-size",
                "2",
                "--eval-sequences",
                "1",
            ]
        )
        == 0
    )
    assert (
        cli(
            [
                "generate",
                "document",
                "--checkpoint",
                "runs/own/final",
                "--max-new-tokens",
                "3",
            ]
        )
        == 0
    )
    config = TrainConfig.from_file(file)
    assert (
        fitted(config)[1] == []
        and load_checkpoint("runs/own/final")["config"]["vocab_size"] < 300
    )
    assert config.precision == "fp32" and config.qwen_config().hidden_size <= 256


class Gone(io.StringIO):
    """An output that nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("lost", [["stdout"], ["stdout", "stderr"]])
def test_a_run_goes_on_when_its_words_are_not_read(lost, monkeypatch):
    for name in lost:
        monkeypatch.setattr(sys, name, Gone())
    assert module.main(["--config", as_file(settings(max_steps=3))]) == 141
    assert (
        Path("checkpoints/final").is_dir() and Path("checkpoints/summary.json").exists()
    )


def test_a_program_that_trains_keeps_its_memory_and_the_function_does_not(monkeypatch):
    kept = []
    monkeypatch.setattr(module, "keep_freed_memory", lambda: kept.append(True))
    train(settings(max_steps=1, output_dir="function"))
    assert not kept
    assert module.main(["--config", as_file(settings(max_steps=1))]) == 0
    assert kept == [True]


def test_training_in_a_thread():
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(
            module.main(["--config", as_file(settings(max_steps=2))])
        )
    )
    thread.start()
    thread.join()
    assert codes == [0] and Path("checkpoints/final").is_dir()


@pytest.mark.parametrize("name", ["summary.json", "loss.png"])
def test_what_is_only_for_looking_at_does_not_fail_a_run(name, capsys):
    Path("checkpoints", name).mkdir(parents=True)
    assert (
        module.main(
            [
                "--config",
                as_file(
                    settings(max_steps=1, sample_prompts=["xyzzy"], sample_tokens=3)
                ),
            ]
        )
        == 0
    )
    said = capsys.readouterr()
    assert (
        f"warning: checkpoints/{name} could not be written" in said.err
        and "xyzzy" in said.out
    )


def test_samples_that_fail_do_not_fail_a_run(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no such text")

    monkeypatch.setattr(progress, "complete", broken)
    assert (
        module.main(
            [
                "--config",
                as_file(settings(max_steps=1, sample_prompts=["x"], sample_tokens=3)),
            ]
        )
        == 0
    )
    assert (
        "sample_prompts could not be written: no such text" in capsys.readouterr().err
    )


def test_summary_and_metrics_are_json_whatever_the_loss_is(monkeypatch):
    real, calls = module.train_step, []

    def spoiled(*arguments):
        loss, norm, applied = real(*arguments)
        calls.append(loss)
        return (
            (loss, norm, applied)
            if len(calls) < 6
            else (float("nan"), float("inf"), False)
        )

    monkeypatch.setattr(module, "train_step", spoiled)
    monkeypatch.setattr(
        module,
        "evaluate",
        lambda *_: {"loss": float("nan"), "bits_per_byte": float("inf")},
    )
    summary = train(settings())
    assert (
        json.loads(
            Path("checkpoints/summary.json").read_text(), parse_constant=pytest.fail
        )
        == summary
    )
    assert summary["loss"] == calls[4] and summary["heldout_loss"] is None
    assert [
        entry["heldout_loss"]
        for entry in entries("checkpoints")
        if "heldout_loss" in entry
    ] == [None, None]


def test_the_last_words_have_a_held_out_loss_of_their_step_only(monkeypatch, capsys):
    for steps, evaluated in ((4, True), (5, False)):
        monkeypatch.setattr(module, "stop_signals", stops_after(steps))
        directory = f"stopped_{steps}"
        summary = train(settings(output_dir=directory, eval_every=2))
        (words,) = (
            line
            for line in capsys.readouterr().out.splitlines()
            if line.startswith(f"step {steps}, tokens")
        )
        assert ("heldout_loss" in words) == ("heldout_loss" in summary) == evaluated
        if evaluated:
            by_step = {
                e["step"]: e["heldout_loss"]
                for e in entries(directory)
                if "heldout_loss" in e
            }
            assert summary["heldout_loss"] == by_step[steps]


@pytest.mark.parametrize(
    "where",
    [
        (batches, "tokenize_files"),
        (module, "build_model"),
        (preflight, "load_tokenizer"),
    ],
    ids=lambda where: where[1],
)
def test_ctrl_c_before_the_first_step_is_one_line(where, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(*where, interrupted)
    assert module.main(["--config", as_file(settings())]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", [DataError, OSError])
def test_data_that_cannot_be_read_saves_the_steps_before(error, monkeypatch):
    """Every process saves, also the one whose own reading failed: a save is common."""
    saved = []

    class Saver:
        def save(self, run):
            saved.append(run.step)

        def wait(self):
            saved.append("waited")

    def fails(source, context):
        raise error("the disk is gone")

    monkeypatch.setattr(module, "next_batch", fails)
    with pytest.raises(DataError, match="the disk is gone; the 7 steps before are sav"):
        module.batch_or_save(iter([]), SimpleNamespace(step=7, context=None), Saver())
    assert saved == [7, "waited"]


def test_a_second_signal_acts_where_a_library_in_c_had_set_the_handler(monkeypatch):
    handlers, killed, now = {}, [], [0.0]

    def set_handler(number, handler):
        assert handler is not None, "signal.signal takes no None"
        before, handlers[number] = handlers.get(number), handler
        return before  # None at first: set by a library in C

    monkeypatch.setattr(module.signal, "signal", set_handler)
    monkeypatch.setattr(module.os, "kill", lambda pid, number: killed.append(number))
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with module.stop_signals() as stopped:
        handler = handlers[signal.SIGTERM]
        handler(signal.SIGTERM, None)
        assert stopped() and not killed
        now[0] = 3.0
        handler(signal.SIGTERM, None)
        assert handlers[signal.SIGTERM] is signal.SIG_DFL and killed == [signal.SIGTERM]
