"""Whole runs: sharded over processes, continued on other layouts, killed at any moment;
what they log, skip and trace.
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training import (  # noqa: F401
    MODEL,
    as_file,
    distance,
    final_weights,
    folder,
    launched,
    losses,
    read_the_same,
    run,
    same,
    settings,
    training_state,
)

from qwen_analog import QwenConfig, QwenForCausalLM, batches
from qwen_analog import train as module
from qwen_analog.run_directory import latest_checkpoint
from qwen_analog.checkpoint import load_checkpoint
from qwen_analog.cli import main as cli
from qwen_analog.jsonl import DataError
from qwen_analog.memory import flops_per_token
from qwen_analog.monitor import documents_of_step
from qwen_analog.train import train


def saved_settings(directory):
    return load_checkpoint(directory)["train_config"]


@pytest.mark.parametrize("faster", [True, False])
def test_auto_is_what_the_machine_computes_faster(monkeypatch, faster):
    """And a run that goes on asks again, since it may be on another machine."""
    decided = {True: "fp32", False: "bf16"}
    monkeypatch.setattr(module, "float32_is_faster", lambda: faster)
    train(settings(output_dir="auto", precision="auto", max_steps=3, save_every=2))
    train(settings(output_dir="plain", precision=decided[faster], max_steps=3))
    assert losses("auto") == losses("plain")
    assert saved_settings("auto/step_2")["precision"] == decided[faster]
    monkeypatch.setattr(module, "float32_is_faster", lambda: not faster)
    more = settings(output_dir="more", precision="auto", max_steps=5)
    train(more, "auto/step_2")
    assert saved_settings("more/final")["precision"] == decided[not faster]


@pytest.mark.slow
def test_sharded_runs_equal_one_process_and_continue_each_other():
    """fsdp on 2 processes, its checkpoint continued by one; one process's checkpoint
    continued by hsdp on 4.
    """
    train(settings(output_dir="one"))
    launched(
        2,
        output_dir="fsdp",
        parallel="fsdp",
        micro_batch_size=2,
        activation_checkpointing="selective",
        async_checkpoints=True,
        keep_every=4,
        keep_last=1,
    )
    moved = distance(
        final_weights("one"), QwenForCausalLM(QwenConfig(**MODEL)).state_dict()
    )
    assert distance(final_weights("one"), final_weights("fsdp")) < 1e-4 < 0.01 < moved
    assert losses("fsdp") == pytest.approx(losses("one"), rel=1e-4) and read_the_same(
        "one", "fsdp"
    )
    assert (Path("fsdp/step_4") / "sharded").is_dir() and not Path(
        "fsdp/step_2"
    ).exists()

    train(settings(output_dir="narrowed"), resume_from="fsdp/step_4")
    assert distance(
        final_weights("one"), final_weights("narrowed")
    ) < 1e-4 and read_the_same("one", "narrowed", (5, 6))

    launched(
        4,
        "--resume",
        "one/step_4",
        output_dir="widened",
        parallel="hsdp",
        shard_size=2,
        micro_batch_size=1,
    )
    assert distance(
        final_weights("one"), final_weights("widened")
    ) < 1e-4 and read_the_same("one", "widened", (5, 6))
    assert losses("widened") == pytest.approx(
        {step: loss for step, loss in losses("one").items() if step > 4}, rel=1e-4
    )


@pytest.mark.parametrize(
    "precision, optimizer", [("bf16-pure", "adamw-bf16"), ("fp32", "adamw-bf16")]
)
def test_stochastic_rounding_resumes_bit_for_bit(precision, optimizer):
    train(settings(output_dir="whole", precision=precision, optimizer=optimizer))
    train(
        settings(output_dir="resumed", precision=precision, optimizer=optimizer),
        resume_from="whole/step_4",
    )
    assert same(training_state("resumed/final"), training_state("whole/final"))


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_where_it_would_have():
    """SIGKILL at random moments, in a save or out of it; every start goes on from the
    newest checkpoint.
    """
    train(settings(output_dir="whole", max_steps=40, eval_every=100))
    config = as_file(settings(max_steps=40, save_every=1, keep_last=2, eval_every=100))
    rng, kills = random.Random(0), 0
    for _ in range(30):
        before = latest_checkpoint("checkpoints")
        if before and before.name == "final":
            break
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "qwen_analog.train",
                "--config",
                config,
                "--resume",
                "auto",
                "--no-tensorboard",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while (
            kills < 3
            and process.poll() is None
            and latest_checkpoint("checkpoints") == before
        ):
            time.sleep(0.01)  # this start has saved something
        time.sleep(rng.random() / 3)
        if kills < 3 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        assert process.wait(timeout=120) in (0, -signal.SIGKILL)
    assert kills and same(
        training_state("checkpoints/final"), training_state("whole/final")
    )
    assert read_the_same("checkpoints", "whole", range(1, 41))


def test_data_that_vanishes_costs_no_progress(monkeypatch):
    train(settings(output_dir="whole", save_every=100))
    real, taken = batches.PackedDataset.take, []

    def vanishes(self, *place):
        taken.append(place)
        blocks = real(self, *place)  # the position has moved when the error comes
        if len(taken) == 4:
            raise DataError("corpus.jsonl cannot be read: it is gone")
        return blocks

    monkeypatch.setattr(batches.PackedDataset, "take", vanishes)
    with pytest.raises(
        DataError,
        match=(
            r"cannot be read: it is gone; the 3 steps before are saved.*--resume auto"
        ),
    ):
        train(settings(save_every=100))
    assert latest_checkpoint("checkpoints").name == "step_3"
    train(settings(save_every=100), resume_from="auto")
    assert same(training_state("checkpoints/final"), training_state("whole/final"))


def test_skipped_steps_are_read_and_not_learned_from():
    train(settings(output_dir="plain", learning_rate=0.01))
    train(settings(output_dir="skipping", skip_steps=[3, 4]))
    assert read_the_same("plain", "skipping") and losses("skipping").keys() == {
        1,
        2,
        5,
        6,
    }
    assert (
        losses("skipping")[1] == losses("plain")[1]
        and losses("skipping")[5] != losses("plain")[5]
    )
    lines = [
        json.loads(line)
        for line in Path("skipping/metrics.jsonl").read_text().splitlines()
    ]
    assert [
        line["step"] for line in lines if line.get("skipped") == "by skip_steps"
    ] == [3, 4]


def test_a_spike_is_noticed_and_traced_to_its_text(monkeypatch, capsys):
    real, calls = module.train_step, []

    def jumps(*arguments):
        loss, norm, applied = real(*arguments)
        calls.append(loss)
        return (loss + 20 if len(calls) == 80 else loss), norm, applied

    monkeypatch.setattr(module, "train_step", jumps)
    summary = train(
        settings(max_steps=85, save_every=100, eval_every=100, log_every=10)
    )
    lines = [
        json.loads(line)
        for line in Path("checkpoints/metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if line.get("spike")] == [80] and summary[
        "spikes"
    ] == 1
    capsys.readouterr()
    assert cli(["trace", "80"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert (
        len(printed) == len(documents_of_step("checkpoints", 80))
        and printed[0].startswith("corpus.jsonl:")
        and "abc" in printed[-1]
    )
    assert cli(["trace", "86"]) == 2 and "has no step 86" in capsys.readouterr().err


def test_metrics_tensorboard_profile_and_summary():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = train(settings(peak_tflops=0.5, profile_steps=1))
    entry = [
        json.loads(line)
        for line in Path("checkpoints/metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ][-1]
    assert {
        "step",
        "tokens",
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "mfu",
        "memory_gib",
    } <= entry.keys()
    flops = flops_per_token(QwenConfig(**MODEL), 32)
    assert entry["mfu"] == pytest.approx(flops * entry["tokens_per_second"] / 0.5e12)
    events = EventAccumulator("checkpoints/tensorboard").Reload()
    assert {e.step: e.value for e in events.Scalars("loss")} == pytest.approx(
        losses("checkpoints")
    )
    assert {"heldout_bits_per_byte", "grad_norm", "mfu"} <= set(
        events.Tags()["scalars"]
    )
    assert json.loads(Path("checkpoints/trace_rank_0.json").read_text())["traceEvents"]
    assert (
        json.loads(Path("checkpoints/summary.json").read_text()) == summary
        and summary["tokens"] == 6 * 128
    )


def raises(error):
    def action(*_, **__):
        raise error

    return action


CPU = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate"
    " memory: you tried to allocate 9 bytes.\nmore"
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.\nmore"),
        RuntimeError(CPU),
        MemoryError(),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        MemoryError("Unable to allocate 9 TiB"),
    ],
)
def test_out_of_memory_is_one_line_from_every_allocator(error, monkeypatch, capsys):
    monkeypatch.setattr(module, "train", raises(error))
    assert module.main(["--data", "corpus.jsonl"]) == 2
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "memory" in said
        and "qwen-analog plan" in said
        and said.startswith("error: ")
    )


def test_how_a_command_ends(capsys):
    report = module.report_errors
    for error, code, line in (
        (ValueError("two\nlines"), 2, "p: error: two lines\n"),
        (
            OSError(28, "No space left", "f"),
            2,
            "p: error: [Errno 28] No space left: 'f'\n",
        ),
        (ValueError(), 2, "p: error: ValueError\n"),
        (KeyboardInterrupt(), 130, "p: interrupted\n"),
        (BrokenPipeError(), 141, ""),
        (torch.distributed.DistBackendError("gone"), 2, "p: error: gone\n"),
    ):
        assert report("p", raises(error)) == code
        assert capsys.readouterr().err == line
    assert report("p", lambda: None) == 0
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as while the libraries load
    try:
        assert (
            report("p", lambda: None) == 0
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
    finally:
        signal.signal(signal.SIGINT, before)
    for mistake in (
        TypeError("a mistake in the program"),
        RuntimeError("another"),
    ):  # is shown whole
        with pytest.raises(type(mistake)):
            report("p", raises(mistake))


@pytest.mark.slow
def test_sharding_needs_processes_that_divide():
    done = run(
        "-m",
        "qwen_analog.train",
        "--config",
        as_file(settings(parallel="hsdp", shard_size=3)),
        processes=2,
    )
    assert (
        done.returncode != 0
        and "shard_size 3 does not divide the 2 processes" in done.stderr
    )
