"""Files that strangers wrote: nothing runs, and nothing costs more than it deserves."""

import json
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    CONFIG,
    SHARDED,
    TOKENIZER,
    changed,
    checkpointer,
    fresh,
    one_line,
    rehash,
    train,
)
from helpers import Bomb

from qwen_analog.archive import CheckpointError
from qwen_analog.checkpoint import (
    consolidate,
    load_checkpoint,
    load_model,
    read_state,
    save_checkpoint,
)
from qwen_analog.restore import restore_checkpoint
from qwen_analog.run_directory import newest_whole

pytest_plugins = ["checkpoint_cases"]
pytestmark = pytest.mark.usefixtures("folder")


def test_no_file_can_run_code():
    model, optimizers = fresh()
    train(model, optimizers, 1)
    directory = Path("runs/step_1")
    checkpointer("runs", **SHARDED).save("step_1", model, optimizers, {"step": 1})
    index = json.loads((directory / "sharded/index.json").read_text())
    bombs = {
        "sharded/.metadata": pickle.dumps(Bomb()),
        "sharded/__0_0.distcp": pickle.dumps(Bomb()),
        "sharded/index.json": pickle.dumps(Bomb()),
    }
    torch.save(
        {"config": CONFIG.to_dict(), "step": Bomb(), "model_state_dict": {}}, "bomb.pt"
    )
    bombs["state.pt"] = Path("bomb.pt").read_bytes()
    place = index["weights/model.norm.weight"]["chunks"][0]
    torch.save(Bomb(), "shard.pt")
    shard_bomb = Path("shard.pt").read_bytes()
    good = {name: (directory / name).read_bytes() for name in bombs}
    place[3:] = [
        len(good["sharded/__0_0.distcp"]),
        len(shard_bomb),
    ]  # the bomb where a tensor's bytes are looked for
    tries = [{name: bomb} for name, bomb in bombs.items()]
    tries += [
        {
            "sharded/__0_0.distcp": good["sharded/__0_0.distcp"] + shard_bomb,
            "sharded/index.json": json.dumps(index).encode(),
        }
    ]
    for files in tries:
        for name, data in {**good, **files}.items():
            (directory / name).write_bytes(data)
        for honest in (False, True):
            if honest:
                rehash(directory)
            for load in (
                restore_checkpoint,
                lambda *_: load_model(directory),
                lambda *_: load_checkpoint(directory),
                lambda *_: read_state(directory),
                lambda *_: consolidate(directory),
            ):
                try:
                    load(directory, model, optimizers)
                except CheckpointError as error:
                    assert "\n" not in str(error)
                assert not Path("the_bomb_went_off").exists()
    for load in (
        load_checkpoint,
        load_model,
        read_state,
        lambda path: restore_checkpoint(path, model, optimizers),
    ):
        with pytest.raises(
            CheckpointError,
            match=(
                r"bomb.pt is damaged or not a checkpoint \(to load it would call"
                r" posix.mkdir\)"
            ),
        ):
            load("bomb.pt")
    torch.load("bomb.pt", weights_only=False)
    assert Path("the_bomb_went_off").exists()  # it is one


def deep(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def doubled(depth):
    """A list that is small in a file and has 2**depth entries for whoever walks through
    it.
    """
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return value


ENTRIES = {
    "model_state_dict": [1, 2],
    "config": {"hidden_size": 10**12, "head_dim": None},
    "tokenizer": 5,
    "tokenizer_fingerprint": None,
    "step": float("nan"),
    "generation_config": {"temperature": "hot"},
    "rank_states": [5],
    "train_config": "none",
    "optimizer_types": [None],
    "data": 3,
    "spike_watch": {"losses": ["x"]},
}


@pytest.mark.parametrize(
    "rng",
    [
        None,
        [1],
        {"cpu": None},
        {"cpu": torch.ones(3)},
        {"cpu": torch.ones(3, dtype=torch.uint8)},
        {"cuda": 5},
        {"cpu": torch.zeros(5056, dtype=torch.uint8)},
    ],
)
def test_a_random_state_that_is_none_is_refused(rng, trained):
    save_checkpoint(
        "bad",
        trained[0],
        TOKENIZER,
        optimizers=trained[1],
        rank_states=[{"rng": {"cpu": torch.get_rng_state()}}],
    )
    assert read_state("bad")["rank_states"][0]["rng"]["cpu"].dtype == torch.uint8
    changed("bad", lambda state: state.update(rank_states=[{"rng": rng}]))
    one_line(
        "bad", lambda: read_state("bad"), lambda: restore_checkpoint("bad", *trained)
    )


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_of_another_kind_is_named(name, trained):
    save_checkpoint("runs/step_1", trained[0], TOKENIZER, optimizers=trained[1], step=1)
    changed(
        "runs/step_1",
        lambda state: (
            state[name].update(ENTRIES[name])
            if name == "config"
            else state.update({name: ENTRIES[name]})
        ),
    )
    bad = Path("runs/step_1")
    one_line("runs", lambda: newest_whole("runs"))
    line = one_line(
        bad,
        lambda: load_model(bad),
        lambda: load_checkpoint(bad),
        lambda: read_state(bad),
        lambda: restore_checkpoint(bad, *trained),
    )
    assert name in line or "hidden_size" in line


def rewritten(change, compress=zipfile.ZIP_STORED, twice=False):
    """checkpoint.pt in `bad`, with another pickle in the same archive."""
    with zipfile.ZipFile("bad/checkpoint.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in members if name.endswith("data.pkl"))
    members[name] = change(members[name])
    with zipfile.ZipFile("bad/checkpoint.pt", "w", compress) as archive:
        for key, data in members.items():
            archive.writestr(key, data)
        if twice:
            archive.writestr(name.replace("data", "DATA"), members[name])


def call(name, argument):
    """A pickle of {"config": name(argument)}."""
    return (
        b"\x80\x02}X\x06\x00\x00\x00configc"
        + name.replace(" ", "\n").encode()
        + b"\n"
        + pickle.dumps(argument, 2)[2:-1]
        + b"\x85Rs."
    )


def copies(name, value=None):
    """A pickle that calls `name` a thousand times with the same long value: of the
    pairs (0, 1), (1, 2), ... where none is given.
    """
    value = pickle.dumps(
        [(i, i + 1) for i in range(5_000)] if value is None else value, 2
    )[2:-1]
    keep = b"r\x00\x00\x01\x00"  # in the memo, where pickle's own entries do not reach
    return (
        b"\x80\x02]"
        + value
        + keep
        + b"a"
        + b"".join(
            b"c" + name.replace(" ", "\n").encode() + b"\nj\x00\x00\x01\x00\x85Ra"
            for _ in range(1000)
        )
        + b"."
    )


def test_what_an_archive_costs_is_in_proportion_to_its_size(trained):
    save_checkpoint("bad", trained[0], TOKENIZER, optimizers=trained[1], step=1)
    good = Path("bad/checkpoint.pt").read_bytes()
    loads = (
        lambda: load_model("bad"),
        lambda: load_checkpoint("bad"),
        lambda: read_state("bad"),
        lambda: restore_checkpoint("bad", *trained),
    )
    bombs = {
        "compressed": lambda: rewritten(
            lambda data: b"\x80\x02" + b"}0" * 50_000_000, zipfile.ZIP_DEFLATED
        ),
        "two pickles": lambda: rewritten(lambda data: data, twice=True),
        "memory on request": lambda: rewritten(
            lambda data: call("__builtin__ bytearray", 10**11)
        ),
        "a list that is copied as a dictionary": lambda: rewritten(
            lambda data: copies("collections OrderedDict")
        ),
        "a list that is copied as a set": lambda: rewritten(
            lambda data: copies("__builtin__ set")
        ),
        "numbers that are copied as a size": lambda: rewritten(
            lambda data: copies("torch Size")
        ),
        "text that is copied as bytes": lambda: rewritten(
            lambda data: copies("_codecs encode", "x" * 100_000)
        ),
        "a tensor without storage": lambda: rewritten(
            lambda data: call("torch._utils _rebuild_meta_tensor_no_storage", 1)
        ),
        "a list that doubles": lambda: changed(
            "bad", lambda state: state.update(extra=doubled(60))
        ),
        "nested": lambda: changed("bad", lambda state: state.update(extra=deep(200))),
        "a tensor that is one number": lambda: changed(
            "bad", lambda state: state.update(extra=torch.zeros(1).expand(10**9))
        ),
        "a storage beyond its bytes": lambda: rewritten(
            lambda data: data.replace(
                (32 * 32).to_bytes(2, "little"), (2**15).to_bytes(2, "little")
            )
        ),
    }
    for label, bomb in bombs.items():
        bomb()
        tracemalloc.start()
        one_line("bad", *loads)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000, label
        tracemalloc.stop()
        Path("bad/checkpoint.pt").write_bytes(good)
    load_model("bad")
