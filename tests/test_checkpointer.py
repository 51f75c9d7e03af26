"""Saves that are whole or not there: kills, full disks, what is on the disk first."""

import multiprocessing
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    BACKGROUND,
    CONFIG,
    IDS,
    PLAIN,
    SHARDED,
    TOKENIZER,
    checkpointer,
    contents,
    fresh,
    in_a_fork,
    same,
    train,
)

from qwen_analog.archive import CheckpointError
from qwen_analog.checkpoint import (
    load_checkpoint,
    load_model,
    read_state,
    save_checkpoint,
)
from qwen_analog.model import QwenForCausalLM
from qwen_analog.restore import restore_checkpoint
from qwen_analog.run_directory import latest_checkpoint

pytest_plugins = ["checkpoint_cases"]
pytestmark = pytest.mark.usefixtures("folder")


def test_plain_and_sharded_hold_the_same_and_load_as_models():
    model, optimizers = fresh(kind="muon")
    train(model, optimizers, 1)
    for name, options in (("plain", PLAIN), ("sharded", SHARDED)):
        checkpointer(name, **options).save(
            "final", model, optimizers, {"step": 1}, final=True
        )
    save_checkpoint(
        "alone/final",
        model,
        TOKENIZER,
        optimizers=optimizers,
        safetensors=True,
        step=1,
        rank_states=[None],
    )
    plain = load_checkpoint("plain/final")
    assert same(plain, load_checkpoint("sharded/final")) and same(
        plain, load_checkpoint("alone/final")
    )
    assert same(plain["model_state_dict"], dict(model.state_dict()))
    assert same(
        plain["optimizer_state_dicts"],
        [optimizer.state_dict() for optimizer in optimizers],
    )
    for name in ("plain", "sharded"):
        card = QwenForCausalLM(CONFIG)
        card.load_state_dict(
            torch.load(f"{name}/final/checkpoint.pt")["model_state_dict"]
        )  # as the card loads it
        assert same(dict(card.state_dict()), dict(model.state_dict()))
    assert (
        Path("plain/final/model.safetensors").read_bytes()
        == Path("sharded/final/model.safetensors").read_bytes()
    )
    Path("sharded/final/checkpoint.pt").unlink()
    loaded, tokenizer = load_model("sharded/final")
    assert (
        torch.equal(loaded(IDS), model(IDS))
        and tokenizer.fingerprint == TOKENIZER.fingerprint
    )
    assert (
        read_state("plain/final") == read_state("sharded/final")
        and read_state("plain/final")["step"] == 1
    )


def test_what_could_not_be_loaded_again_is_not_saved():
    model, optimizers = fresh()
    for options in (PLAIN, SHARDED):
        with pytest.raises(
            CheckpointError,
            match=(
                "can hold tensors, numbers, strings, lists and dicts only, not"
                " pathlib.PosixPath$"
            ),
        ):
            checkpointer("runs", **options).save(
                "step_1", model, optimizers, {"path": Path("x")}
            )
    assert list(Path("runs").iterdir()) == [] and latest_checkpoint("runs") is None


@pytest.mark.parametrize("options", [PLAIN, SHARDED, BACKGROUND])
def test_pruning_keeps_the_last_and_the_milestones(options):
    model, optimizers = fresh()
    writer = checkpointer("runs", **{**options, "keep_last": 2, "keep_every": 4})
    Path("runs/step_9.partial").mkdir(parents=True)
    for step in range(1, 8):
        writer.save(f"step_{step}", model, optimizers, {"step": step})
    writer.save("final", model, optimizers, {"step": 8}, final=True)
    assert {path.name for path in Path("runs").iterdir()} == {
        "step_4",
        "step_6",
        "step_7",
        "final",
    }
    assert latest_checkpoint("runs").name == "final"
    with pytest.raises(CheckpointError, match="runs/step_7 exists already"):
        writer.save("step_7", model, optimizers, {})


def save_forever(options, model, optimizers, step):
    writer = checkpointer("runs", **options)
    while True:
        step += 1
        writer.save(f"step_{step}", model, optimizers, {"step": step})


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [PLAIN, SHARDED, BACKGROUND], ids=["plain", "sharded", "background"]
)
def test_kills_at_random_moments(options):
    options = {**options, "keep_last": 2, "keep_every": 1000}
    model, optimizers = fresh()
    train(model, optimizers, 1)
    expected, moments, inside, reached = (
        contents(model, optimizers),
        random.Random(0),
        0,
        0,
    )
    for _ in range(8):
        process = in_a_fork(save_forever, options, model, optimizers, reached)
        while (newest := latest_checkpoint("runs")) is None or int(
            newest.name[5:]
        ) == reached:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        inside += any(Path("runs").glob("*.partial"))
        newest = latest_checkpoint("runs")
        other, its_optimizers = fresh(seed=5)
        step = restore_checkpoint(newest, other, its_optimizers)["step"]
        assert (
            newest.name == f"step_{step}"
            and step > reached
            and same(contents(other, its_optimizers), expected)
        )
        reached = step
    assert inside > 0  # some kills hit a save, else this tests nothing


def fill_the_disk(options, final, results):
    """Saves where no file can grow beyond 50 kB."""
    model, optimizers = fresh()
    train(model, optimizers, 1)
    writer = checkpointer("runs", **options)
    writer.save("step_1", model, optimizers, {"step": 1})
    writer.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        writer.save(
            "final" if final else "step_2", model, optimizers, {"step": 2}, final=final
        )
        writer.wait()
    except OSError as error:
        results.put(str(error))
    left = sorted(path.name for path in Path("runs").iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    writer.save("step_3", model, optimizers, {"step": 3})  # there is room again
    writer.wait()
    results.put(left)


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize(
    "options", [PLAIN, SHARDED, BACKGROUND, {"asynchronous": True}]
)
def test_a_full_disk_ends_in_one_line_and_leaves_what_was_there(options, final):
    results = multiprocessing.get_context("fork").Queue()
    process = in_a_fork(fill_the_disk, options, final, results)
    message, left = results.get(timeout=60), results.get(timeout=60)
    process.join()
    assert (
        "partial cannot be written" in message
        and "\n" not in message
        and left == ["step_1"]
    )
    assert (
        load_checkpoint("runs/step_1")["step"] == 1
        and latest_checkpoint("runs").name == "step_3"
    )


@pytest.mark.parametrize("options", [PLAIN, SHARDED])
def test_what_a_checkpoint_relies_on_is_on_the_disk_before_it(options, trained, events):
    here = Path.cwd()
    writer = checkpointer("a/b/runs", **options)
    writer.save("step_1", *trained, {})
    assert {
        str(here),
        str(here / "a"),
        str(here / "a/b"),
        str(here / "a/b/runs"),
    } <= set(events)
    Path("a/b/runs/ledger").mkdir()
    for name in ("metrics.jsonl", "ledger/rank_0.jsonl"):
        Path("a/b/runs", name).write_text("{}\n")
    del events[:]
    writer.save("step_2", *trained, {})
    before = events[: events.index("-> a/b/runs/step_2")]
    assert {
        str(here / "a/b/runs" / name)
        for name in ("metrics.jsonl", "ledger", "ledger/rank_0.jsonl", "step_2.partial")
    } <= set(before)
