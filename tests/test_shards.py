"""Shards: an index and a manifest that are wrong, damage to any file."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    SHARDED,
    checkpointer,
    contents,
    damages,
    fresh,
    one_line,
    rehash,
    same,
)

from qwen_analog.archive import CheckpointError
from qwen_analog.checkpoint import consolidate, load_checkpoint, load_model
from qwen_analog.restore import restore_checkpoint
from qwen_analog.shards import write_manifest

pytest_plugins = ["checkpoint_cases"]
pytestmark = pytest.mark.usefixtures("folder")


def test_damage_to_any_file_of_a_sharded_checkpoint_is_named(trained):
    checkpointer("runs", **SHARDED).save("step_1", *trained, {"step": 1})
    files = [
        Path("runs/step_1", name)
        for name in (
            "sharded/__0_0.distcp",
            "sharded/index.json",
            "sharded/.metadata",
            "state.pt",
            "manifest.json",
        )
    ]
    for file in files:
        good = file.read_bytes()
        for _, bad in damages(good):
            file.write_bytes(bad)
            other, its_optimizers = fresh(seed=5)
            for load in (
                lambda: restore_checkpoint("runs/step_1", other, its_optimizers),
                lambda: load_model("runs/step_1"),  # noqa: B023
                lambda: load_checkpoint("runs/step_1"),
                lambda: consolidate("runs/step_1"),
            ):
                with pytest.raises(
                    CheckpointError,
                    match=f"{file} is damaged.*: resume from an earlier",
                ) as raised:
                    load()
                assert "\n" not in str(raised.value)
            assert same(contents(other, its_optimizers), contents(*fresh(seed=5)))
        file.unlink()
        if (
            file.name != "index.json"
        ):  # without which it is no sharded checkpoint at all
            with pytest.raises(CheckpointError, match=f"{file} is (missing|damaged)"):
                load_checkpoint("runs/step_1")
        file.write_bytes(good)
    restore_checkpoint("runs/step_1", *trained)


def chunk(index, name="weights/model.norm.weight"):
    return index[name]["chunks"][0]


INDEXES = {
    "no chunks": lambda i: i["weights/model.norm.weight"].update(chunks=[]),
    "a gap": lambda i: chunk(i)[1].__setitem__(0, 31),
    "the same twice": (
        lambda i: i["weights/model.norm.weight"]["chunks"].append(chunk(i))
    ),
    "beyond the shape": lambda i: chunk(i)[0].__setitem__(0, 8),
    "a negative offset": lambda i: chunk(i)[0].__setitem__(0, -1),
    "a start beyond the file": lambda i: chunk(i).__setitem__(3, 10**9),
    "a length beyond the file": lambda i: chunk(i).__setitem__(4, 10**9),
    "a length too short": lambda i: chunk(i).__setitem__(4, 100),
    "another tensor's bytes": (
        lambda i: chunk(i).__setitem__(
            slice(2, None), chunk(i, "weights/model.embed_tokens.weight")[2:]
        )
    ),
    "another file": lambda i: chunk(i).__setitem__(2, "../state.pt"),
    "a file that is not listed": lambda i: chunk(i).__setitem__(2, "x"),
    "a type of tensors": lambda i: i["weights/model.norm.weight"].update(dtype="nn"),
    "a huge shape": lambda i: i["weights/model.norm.weight"].update(shape=[10**15]),
    "a negative shape": lambda i: i["weights/model.norm.weight"].update(shape=[-32]),
    "text for a number": lambda i: chunk(i).__setitem__(3, "0"),
    "a weight too many": lambda i: i.update(
        {"weights/extra": i.pop("weights/model.norm.weight")}
    ),
    "a name": lambda i: i.update(x=i.pop("weights/model.norm.weight")),
    "an optimizer of nothing": lambda i: i.update(
        {"optimizer/nothing/step": i.pop("optimizer/model.norm.weight/step")}
    ),
    "a list": lambda i: i.update({"weights/model.norm.weight": [1]}),
}


@pytest.mark.parametrize("label", INDEXES)
def test_an_index_that_is_wrong_is_refused(label, sharded):
    shutil.copytree(sharded, "bad")
    file = Path("bad/sharded/index.json")
    index = json.loads(file.read_text())
    INDEXES[label](index)
    file.write_text(json.dumps(index))
    rehash(Path("bad"))
    before = contents(*fresh(seed=5))
    other = fresh(seed=5)
    loads = [lambda: restore_checkpoint("bad", *other)]
    if "optimizer" not in label:
        loads += [lambda: load_model("bad"), lambda: consolidate("bad")]
    one_line("bad", *loads)
    assert same(contents(*other), before) and not list(Path("bad").glob("*.pt*"))[1:]


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"files": {}, "sha256": ""}',
        '{"files": [], "sha256": 1}',
        "[" * 100_000,
        "\xff",
        "null",
        '{"files": {"state.pt": 5}, "sha256": 1}',
    ],
)
def test_a_manifest_that_lists_nothing_verifies_nothing(text, sharded):
    shutil.copytree(sharded, "bad")
    Path("bad/manifest.json").write_text(text)
    one_line(
        "bad/manifest.json",
        lambda: restore_checkpoint("bad", *fresh()),
        lambda: load_model("bad"),
        lambda: consolidate("bad"),
    )
    write_manifest(Path("bad"), {})
    assert "does not list sharded/index.json and state.pt" in one_line(
        "bad/manifest.json",
        lambda: load_model("bad"),
        lambda: restore_checkpoint("bad", *fresh()),
    )


def test_a_shard_holds_tensors_of_its_own_bytes_only(sharded):
    """Chunks are archives too: one that claims more bytes than it has, or is
    compressed, is refused.
    """
    for label in ("compressed", "another type", "a storage beyond its bytes"):
        shutil.copytree(sharded, "bad")
        file = Path("bad/sharded/index.json")
        index = json.loads(file.read_text())
        data = io.BytesIO()
        torch.save({"a": 1} if label == "another type" else torch.ones(1000), data)
        if label != "another type":
            with zipfile.ZipFile(data) as archive:
                members = {name: archive.read(name) for name in archive.namelist()}
            data = io.BytesIO()
            with zipfile.ZipFile(
                data,
                "w",
                zipfile.ZIP_DEFLATED if label == "compressed" else zipfile.ZIP_STORED,
            ) as archive:
                for name, member in members.items():
                    archive.writestr(
                        name,
                        (
                            member.replace(b"M\xe8\x03", b"M\xff\xff")
                            if name.endswith("data.pkl")
                            else member
                        ),
                    )
        place = chunk(index)
        shard = Path("bad/sharded", place[2])
        place[3:] = [shard.stat().st_size, len(data.getvalue())]
        shard.write_bytes(shard.read_bytes() + data.getvalue())
        file.write_text(json.dumps(index))
        rehash(Path("bad"))
        one_line(
            "bad",
            lambda: load_model("bad"),
            lambda: restore_checkpoint("bad", *fresh()),
        )
        shutil.rmtree("bad")
