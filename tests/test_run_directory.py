"""A run's directory: the newest whole checkpoint, pruning, claims."""

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from checkpoint_cases import (
    PLAIN,
    SHARDED,
    checkpointer,
    damages,
    fresh,
    in_a_fork,
    one_line,
)

from qwen_analog.archive import CheckpointError
from qwen_analog.checkpoint import load_model, read_state
from qwen_analog.run_directory import (
    claim,
    latest_checkpoint,
    newest_whole,
    prune_checkpoints,
)

pytest_plugins = ["checkpoint_cases"]
pytestmark = pytest.mark.usefixtures("folder")


def test_a_run_that_was_taken_back_keeps_its_own_checkpoints():
    model, optimizers = fresh()
    writer = checkpointer("runs", keep_last=2)
    for step in (2, 8, 9):
        writer.save(f"step_{step}", model, optimizers, {"step": step})
    assert {path.name for path in Path("runs").iterdir()} == {"step_8", "step_9"}
    writer = checkpointer("runs", keep_last=1)
    writer.save(
        "step_5", model, optimizers, {"step": 5}
    )  # resumed from an earlier one than the newest
    assert {path.name for path in Path("runs").iterdir()} == {
        "step_5",
        "step_8",
        "step_9",
    }
    prune_checkpoints("runs", 1)
    assert {path.name for path in Path("runs").iterdir()} == {"step_9"}


def test_the_newest_whole_checkpoint_is_found_and_the_damaged_ones_are_named(
    trained, capsys
):
    assert newest_whole("runs") is None
    for options, damaged in (
        (PLAIN, "checkpoint.pt"),
        (SHARDED, "sharded/__0_0.distcp"),
    ):
        writer = checkpointer("runs", **options)
        for step in (1, 2, 3):
            writer.save(f"step_{step}", *trained, {"step": step})
        writer.save("final", *trained, {"step": 4}, final=True)
        capsys.readouterr()
        assert newest_whole("runs").name == "final" and capsys.readouterr().err == ""
        for name, (_, data) in zip(
            ("final", "step_3"), damages(Path("runs/step_3", damaged).read_bytes())
        ):
            Path("runs", name, damaged).write_bytes(data)
        assert newest_whole("runs").name == "step_2"
        said = capsys.readouterr().err
        assert (
            said.count("\n") == 1
            and "final, step_3 passed over" in said
            and "runs/step_2" in said
        )
        writer.save(
            "step_3", *trained, {"step": 3}
        )  # a run that goes on from step_2 comes by here again
        assert (
            newest_whole("runs").name == "step_3"
            and Path("runs/step_3.damaged").is_dir()
        )
        with pytest.raises(CheckpointError, match="runs/step_3 exists already"):
            writer.save("step_3", *trained, {"step": 3})
        for step in ("final", "step_1", "step_2", "step_3"):
            Path("runs", step, damaged).write_bytes(b"")
        assert "holds no whole checkpoint" in one_line(
            "runs", lambda: newest_whole("runs")
        )
        shutil.rmtree("runs")


@pytest.mark.parametrize("options", [PLAIN, SHARDED])
def test_a_checkpoint_that_lost_a_file_is_passed_over(options, trained, capsys):
    lost = "sharded/index.json" if options else "checkpoint.pt"
    writer = checkpointer("runs", **options)
    for step in (1, 2, 3):
        writer.save(f"step_{step}", *trained, {"step": step})
    Path("runs/step_3", lost).unlink()
    file = Path("runs/step_2/tokenizer.tiktoken")
    file.write_bytes(file.read_bytes()[:100])
    capsys.readouterr()
    assert newest_whole("runs").name == "step_1"
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and "step_3, step_2 passed over" in said and lost in said
    )
    Path("runs/step_1", lost).unlink()
    assert "move step_3, step_2, step_1 away" in one_line(
        "runs", lambda: newest_whole("runs")
    )
    writer.save("step_3", *trained, {"step": 3})
    assert newest_whole("runs").name == "step_3"


def hold(directory, told, child=False):
    with claim(directory):
        if child and os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        told.put(os.getpid())
        time.sleep(60)


def test_a_directory_is_claimed_by_one_run_and_set_free_by_its_death():
    told = multiprocessing.get_context("fork").Queue()
    process = in_a_fork(hold, "new/runs", told)
    pid = told.get(timeout=30)
    line = one_line("new/runs", lambda: claim("new/runs").__enter__())
    assert f"in use by another run (process {pid} on " in line
    process.kill()
    process.join()
    with claim("new/runs"):
        one_line("new/runs", lambda: claim("new/runs").__enter__())
    with claim("new/runs"):
        pass


def test_a_child_does_not_hold_the_claim_of_its_parent():
    ready, tell = os.pipe()
    with claim("runs"):
        child = os.fork()
        if child == 0:
            os.write(tell, b".")
            time.sleep(60)
            os._exit(0)
        os.read(ready, 1)
    try:
        with claim("runs"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(tell)


def test_a_file_system_without_locks_is_said(monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with claim("runs"):
        assert "runs/run.lock cannot be locked" in capsys.readouterr().err
    Path("file").touch()
    with (
        pytest.raises(OSError, match="file/runs cannot be written"),
        claim("file/runs"),
    ):
        pass


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep_last": 0},
        {"keep_last": -1},
        {"keep_last": float("nan")},
        {"keep_last": True},
        {"keep_every": -1},
        {"keep_every": "2"},
    ],
)
def test_numbers_that_are_none_are_refused_by_name(wrong, trained):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} must be"):
        checkpointer("runs", **wrong)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        prune_checkpoints("runs", **{"keep_last": 1, **wrong})
    with pytest.raises(ValueError, match="called final or step_N, not '../x'"):
        checkpointer("runs").save("../x", *trained, {})


def test_names_that_are_no_steps_are_no_checkpoints(trained):
    for name in ("step_" + "9" * 5000, "step_\u0663", "step_-1"):
        with pytest.raises(OSError) if len(name) > 255 else open(os.devnull):
            Path("runs", name).mkdir(parents=True)
            Path("runs", name, "checkpoint.pt").touch()
    assert latest_checkpoint("runs") is None
    Path("loop").symlink_to("loop")
    one_line("loop", lambda: load_model("loop"), lambda: read_state("loop"))
