"""Checkpoints: every layout into every other, bit for bit; kills, full disks, damage,
files that would run code.
"""

import errno
import fcntl
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import time
import traceback
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from book import scramble_
from qwen_analog.archive import CheckpointError
from qwen_analog.checkpoint import (
    consolidate,
    load_checkpoint,
    load_model,
    read_config,
    read_state,
    save_checkpoint,
)
from qwen_analog.checkpointer import Checkpointer
from qwen_analog.config import QwenConfig
from qwen_analog.model import QwenForCausalLM
from qwen_analog.optim import build_optimizers
from qwen_analog.restore import restore_checkpoint
from qwen_analog.run_directory import (
    claim,
    latest_checkpoint,
    newest_whole,
    prune_checkpoints,
)
from qwen_analog.shards import sha256, write_manifest
from qwen_analog.tokenizer import BYTE_ORDER, TiktokenTokenizer

CONFIG = QwenConfig(
    vocab_size=278,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    rope_theta=1e4,
)
TOKENIZER = TiktokenTokenizer({token: i for i, token in enumerate(BYTE_ORDER)})
IDS = torch.randint(
    256, (2, 17), generator=torch.Generator().manual_seed(0)
)  # [B, T + 1]
PLAIN, SHARDED, BACKGROUND = (
    {},
    {"sharded": True},
    {"sharded": True, "asynchronous": True},
)


def shard(model, mesh=None):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fresh(seed=0, kind="adamw", layout=None, **changes):
    model = scramble_(
        QwenForCausalLM(QwenConfig.from_dict({**CONFIG.to_dict(), **changes})), seed
    )
    if layout is not None:
        shard(model, layout)
    return model, build_optimizers(model, 1e-3, kind=kind)


def train(model, optimizers, steps):
    for _ in range(steps):
        loss = model(IDS[:, :-1], targets=IDS[:, 1:])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def checkpointer(directory, **options):
    return Checkpointer(directory, TOKENIZER, **{"keep_last": 9, **options})


def whole(value):
    """`value` with every tensor full and on its own."""
    if isinstance(value, torch.Tensor):
        return (
            (value.full_tensor() if isinstance(value, DTensor) else value)
            .detach()
            .clone()
        )
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    return value


def contents(model, optimizers):
    """Weights and optimizer state by parameter name, full."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        **whole(dict(model.named_parameters())),
        **{
            (names[p], type(o).__name__): whole(dict(s))
            for o in optimizers
            for p, s in o.state.items()
        },
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return (
        type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, (list, tuple))
        else a == b
    )


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize(
    "options", [PLAIN, SHARDED, BACKGROUND, {"asynchronous": True}]
)
def test_training_goes_on_bit_for_bit(kind, options):
    model, optimizers = fresh(kind=kind)
    train(model, optimizers, 2)
    writer, rng = checkpointer("runs", **options), torch.get_rng_state()
    state = {"step": 2, "data": {"position": 7}}
    writer.save("step_2", model, optimizers, state, {"torch": rng})
    state["data"]["position"] = 9  # a background save must have copied what it writes
    train(model, optimizers, 2)
    writer.wait()
    other, its_optimizers = fresh(seed=5, kind=kind)
    train(other, its_optimizers, 1)  # state that has to give way
    rest = restore_checkpoint("runs/step_2", other, its_optimizers)
    assert (
        rest["step"] == 2
        and rest["data"] == {"position": 7}
        and rest["config"] == CONFIG.to_dict()
    )
    assert same(rest["rank_states"], [{"torch": rng}]) and not any(
        "optimizer" in key or "model_state" in key for key in rest
    )
    assert other.lm_head.weight is other.model.embed_tokens.weight
    train(other, its_optimizers, 2)
    assert same(contents(other, its_optimizers), contents(model, optimizers))


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


def test_consolidate_adds_the_cards_files():
    model, optimizers = fresh()
    train(model, optimizers, 1)
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


class Sgd(torch.optim.Optimizer):
    """State in bfloat16, and a count that is no tensor."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["count"] = state.get("count", 0) + p.numel()
            state["momentum"] = p.grad.to(torch.bfloat16) + state.get("momentum", 0)
            p.sub_(state["momentum"], alpha=0.1)


@pytest.mark.parametrize("options", [PLAIN, SHARDED])
def test_state_keeps_its_dtype_and_what_is_no_tensor(options):
    model, _ = fresh()
    optimizer = Sgd(model.parameters())
    train(model, [optimizer], 2)
    checkpointer("runs", **options).save("step_2", model, [optimizer], {})
    other, _ = fresh(seed=5)
    its_optimizer = Sgd(reversed(list(other.parameters())))  # state goes by name
    restore_checkpoint("runs/step_2", other, [its_optimizer])
    states = contents(other, [its_optimizer])
    assert (
        same(states, contents(model, [optimizer]))
        and states["model.norm.weight", "Sgd"]["momentum"].dtype == torch.bfloat16
    )
    assert states["model.norm.weight", "Sgd"]["count"] == 64


def test_options_given_on_resuming_count():
    model, optimizers = fresh()
    train(model, optimizers, 1)
    save_checkpoint("step_1", model, TOKENIZER, optimizers=optimizers)
    other, _ = fresh()
    its_optimizers = build_optimizers(other, 5e-4, weight_decay=0.02)
    restore_checkpoint("step_1", other, its_optimizers)
    assert [
        (group["lr"], group["weight_decay"]) for group in its_optimizers[0].param_groups
    ] == [(5e-4, 0.02), (5e-4, 0.0)]


def test_a_file_of_version_0_1_0_loads():
    model, optimizers = fresh(kind="muon")
    train(model, optimizers, 2)
    Path("step_2").mkdir()
    torch.save(
        {
            "model_state_dict": model.state_dict(),
            "optimizer_state_dicts": [
                optimizer.state_dict() for optimizer in optimizers
            ],
            "config": CONFIG.to_dict(),
            "step": 2,
        },
        "step_2/checkpoint.pt",
    )
    for layout in (None, "sharded"):
        other, its_optimizers = fresh(seed=5, kind="muon")
        if layout:
            checkpointer("new", **SHARDED).save(
                "step_2", model, optimizers, {"step": 2}
            )
        assert (
            restore_checkpoint(
                "new/step_2" if layout else "step_2/checkpoint.pt",
                other,
                its_optimizers,
            )["step"]
            == 2
        )
        assert same(contents(other, its_optimizers), contents(model, optimizers))


@pytest.mark.parametrize("options", [PLAIN, SHARDED])
def test_another_model_or_optimizer_is_refused(options):
    model, optimizers = fresh()
    train(model, optimizers, 1)
    checkpointer("runs", **options).save("step_1", model, optimizers, {})
    before = contents(*fresh(seed=5))
    other, its_optimizers = fresh(seed=5)
    for message, wrong in (
        ("another model: it differs in num_hidden_layers", fresh(num_hidden_layers=3)),
        ("another model: it differs in rope_theta", fresh(rope_theta=2e4)),
        (
            r"other optimizers \(AdamW of \[26\] parameters\) than Muon, AdamW",
            fresh(kind="muon"),
        ),
        (
            "other parameters in its optimizers",
            (
                other,
                [
                    torch.optim.AdamW(
                        [
                            *list(other.parameters())[:-1],
                            torch.nn.Parameter(torch.ones(3)),
                        ]
                    )
                ],
            ),
        ),
    ):
        if "parameters in" in message:
            other.extra = wrong[1][0].param_groups[0]["params"][-1]
        with pytest.raises(CheckpointError, match=message) as raised:
            restore_checkpoint("runs/step_1", *wrong)
        assert "\n" not in str(raised.value) and "runs/step_1" in str(raised.value)
    assert same(
        {k: v for k, v in contents(other, its_optimizers).items() if k != "extra"},
        before,
    )  # nothing was written before the refusal


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


# ---------------------------------------------------------------- faults


def in_a_fork(function, *arguments):
    """A process that has everything imported already and runs `function`."""
    process = multiprocessing.get_context("fork").Process(
        target=function, args=arguments
    )
    process.start()
    return process


def save_forever(options, model, optimizers, step):
    writer = checkpointer("runs", **options)
    while True:
        step += 1
        writer.save(f"step_{step}", model, optimizers, {"step": step})


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


def damages(data):
    yield (
        "a bit in the middle",
        bytes(
            [
                *data[: len(data) // 2],
                data[len(data) // 2] ^ 1,
                *data[len(data) // 2 + 1 :],
            ]
        ),
    )
    yield "the first half", data[: len(data) // 2]
    yield "nothing", b""


def test_damage_to_any_file_of_a_sharded_checkpoint_is_named():
    model, optimizers = fresh()
    train(model, optimizers, 1)
    checkpointer("runs", **SHARDED).save("step_1", model, optimizers, {"step": 1})
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
    restore_checkpoint("runs/step_1", model, optimizers)


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


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("the_bomb_went_off",)


def rehash(directory):
    """A manifest that fits the files, as one who means harm would write it."""
    write_manifest(
        directory,
        {
            name: sha256(directory / name)
            for name in json.loads((directory / "manifest.json").read_text())["files"]
        },
    )


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
    for changed in tries:
        for name, data in {**good, **changed}.items():
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


# ---------------------------------------------------------------- files that claim what
# is not so


@pytest.fixture(scope="module")
def trained():
    model, optimizers = fresh()
    train(model, optimizers, 1)
    return model, optimizers


def one_line(directory, *functions):
    """Each of `functions` refuses in one line that names `directory`; returns the last
    line.
    """
    for function in functions:
        with pytest.raises(CheckpointError) as raised:
            function()
        line = str(raised.value)
        assert "\n" not in line and str(directory) in line and len(line) < 800, line
    return line


def changed(directory, change, file="checkpoint.pt"):
    """Change what torch.load finds in a file."""
    path = Path(directory, file)
    contents = torch.load(path, weights_only=True)
    change(contents)
    torch.save(contents, path)


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
    assert read_config("good") == CONFIG


def optimizer_state(state):
    return state["optimizer_state_dicts"][0]["state"]


STATES = {
    "a single number": lambda s: [v.update(exp_avg=torch.ones(())) for v in s.values()],
    "another shape": lambda s: s[3].update(exp_avg=torch.ones(3)),
    "one element": lambda s: [
        v.update(exp_avg=torch.ones(1), exp_avg_sq=torch.ones(1)) for v in s.values()
    ],
    "none": lambda s: s[3].pop("exp_avg_sq"),
    "no number": lambda s: s[3].update(exp_avg=None),
    "of a parameter missing": lambda s: s.pop(3),
    "of a parameter too many": lambda s: s.update({99: {}}),
    "integers": lambda s: s[3].update(exp_avg=s[3]["exp_avg"].long()),
    "a step that is many": lambda s: s[3].update(step=torch.ones(2)),
    "a step that is nan": lambda s: s[3].update(step=torch.tensor(float("nan"))),
    "a step below 0": lambda s: s[3].update(step=torch.tensor(-1.0)),
    "a name with a slash": lambda s: s[3].update({"a/b": torch.ones(3)}),
    "a list": lambda s: s.update({3: [1]}),
    "a key of text": lambda s: s.update(x={}),
}


@pytest.mark.parametrize("label", STATES)
def test_optimizer_state_that_does_not_fit_is_refused(label, trained):
    save_checkpoint("bad", trained[0], TOKENIZER, optimizers=trained[1], step=1)
    changed("bad", lambda state: STATES[label](optimizer_state(state)))
    before = contents(*fresh(seed=5))
    other = fresh(seed=5)
    one_line("bad", lambda: restore_checkpoint("bad", *other))
    assert same(contents(*other), before)


def test_groups_and_names_that_do_not_number_the_parameters_are_refused(trained):
    for change in (
        lambda s: s["optimizer_state_dicts"][0]["param_groups"].pop(),
        lambda s: s["optimizer_state_dicts"][0]["param_groups"][0].update(
            params=[0, 0]
        ),
        lambda s: s["optimizer_parameters"][0].pop(),
        lambda s: s.update(optimizer_parameters=[]),
        lambda s: s["optimizer_state_dicts"].append({}),
    ):
        save_checkpoint("bad", trained[0], TOKENIZER, optimizers=trained[1], step=1)
        changed("bad", change)
        one_line("bad", lambda: restore_checkpoint("bad", *fresh(seed=5)))
        shutil.rmtree("bad")


@pytest.mark.parametrize("kind", ["adamw", "muon", "adamw-bf16"])
def test_a_run_goes_on_in_another_precision(kind):
    model, optimizers = fresh(kind=kind)
    train(model, optimizers, 1)
    save_checkpoint("step_1", model, TOKENIZER, optimizers=optimizers)
    other = scramble_(QwenForCausalLM(CONFIG), 5).to(torch.bfloat16)
    its_optimizers = build_optimizers(other, 1e-3, kind=kind)
    restore_checkpoint("step_1", other, its_optimizers)
    train(other, its_optimizers, 1)
    assert all(p.isfinite().all() for p in other.parameters())


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


# ---------------------------------------------------------------- archives and indexes


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


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, trained):
    directory = tmp_path_factory.mktemp("sharded")
    checkpointer(directory, **SHARDED).save("step_1", *trained, {"step": 1})
    return directory / "step_1"


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


# ---------------------------------------------------------------- directories


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


@pytest.mark.parametrize("options", [PLAIN, SHARDED])
def test_what_a_checkpoint_relies_on_is_on_the_disk_before_it(
    options, trained, monkeypatch
):
    events, fsync, rename = [], os.fsync, Path.rename
    here = Path.cwd()

    def noted(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def renamed(path, target):
        events.append(f"-> {target}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
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


# ---------------------------------------------------------------- two processes


def two_processes(rank, folder):
    """Everything that needs two; what is found out goes to files."""
    try:
        os.chdir(folder)
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
        )
        mesh, hybrid = (
            init_device_mesh("cpu", (2,)),
            init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")),
        )

        # uninterrupted: three steps, a checkpoint, two steps; what is where after each
        model, optimizers = fresh(layout=mesh)
        train(model, optimizers, 3)
        at_3 = contents(model, optimizers)
        for options in (SHARDED, BACKGROUND, PLAIN):
            writer = checkpointer("_".join(options) or "plain", **options)
            writer.save(
                "step_3",
                model,
                optimizers,
                {"step": 3},
                {"rank": rank, "rng": torch.get_rng_state()},
                final=False,
            )
            if options == BACKGROUND:
                train(model, optimizers, 2)
                at_5 = contents(model, optimizers)
                writer.save(
                    "final", model, optimizers, {"step": 5}, final=True
                )  # waits for the first
                assert same(
                    restore_checkpoint("sharded/step_3", model, optimizers)[
                        "rank_states"
                    ][rank]["rank"],
                    rank,
                )
                assert same(contents(model, optimizers), at_3)
        held = (
            sum(p.to_local().numel() for p in model.parameters()),
            sum(p.numel() for p in model.parameters()),
        )

        # every file into every layout, and on from there
        for source in (
            "sharded",
            "sharded_asynchronous",
            "plain",
            "one_sharded",
            "one_plain",
        ):
            for layout in (mesh, hybrid, None):
                model, optimizers = fresh(seed=5, layout=layout)
                rest = restore_checkpoint(f"{source}/step_3", model, optimizers)
                found = contents(model, optimizers)
                if source.startswith("one"):
                    assert same(found, torch.load("one.pt"))
                    continue
                assert (
                    same(found, at_3)
                    and rest["step"] == 3
                    and [each["rank"] for each in rest["rank_states"]] == [0, 1]
                )
                if layout is mesh:
                    train(model, optimizers, 2)
                    assert same(contents(model, optimizers), at_5)

        # two replicas, as DDP holds them, and a hybrid
        for name, layout in (("replicas", None), ("hybrid", hybrid)):
            model, optimizers = fresh(seed=6, layout=layout)
            train(model, optimizers, 1)
            checkpointer(name, **SHARDED).save("step_1", model, optimizers, {"step": 1})
            other, its_optimizers = fresh(seed=5, layout=mesh)
            restore_checkpoint(f"{name}/step_1", other, its_optimizers)
            assert same(contents(other, its_optimizers), contents(model, optimizers))

        # a fault on one rank is known to both
        real = os.fsync
        for options in (SHARDED, BACKGROUND):
            model, optimizers = fresh(layout=mesh)
            writer = checkpointer("full", **options)
            if rank == 1:

                def no_space(handle):
                    raise OSError(errno.ENOSPC, "No space left on device")

                os.fsync = no_space
            try:
                writer.save("step_1", model, optimizers, {})
                writer.wait()
                raise AssertionError("a full disk was not noticed")
            except OSError as error:
                assert (
                    "step_1.partial cannot be written: [Errno 28] No space left on"
                    " device"
                    in str(error)
                    and "\n" not in str(error)
                ), error
            os.fsync = real
            dist.barrier()
            assert list(Path("full").iterdir()) == []
        if rank == 0:
            shutil.copytree("sharded/step_3", "damaged")
            damaged = Path("damaged/sharded/__1_0.distcp")
            damaged.write_bytes(damaged.read_bytes()[:-1])
        dist.barrier()
        try:
            restore_checkpoint("damaged", *fresh(layout=mesh))
            raise AssertionError("damage was not noticed")
        except CheckpointError as error:
            assert "damaged/sharded/__1_0.distcp is damaged" in str(error), error
        dist.barrier()
        if rank == 0:
            torch.save({"at_3": at_3, "at_5": at_5, "held": held}, "found.pt")
            Path("rendezvous_done").touch()
        step, writer = 0, checkpointer("killed", keep_last=2, **BACKGROUND)
        model, optimizers = fresh(layout=mesh)
        while True:
            step += 1
            writer.save(f"step_{step}", model, optimizers, {"step": step})
    except BaseException:
        Path(folder, f"error_{rank}").write_text(traceback.format_exc())
        raise


def test_two_processes_and_one(tmp_path):
    model, optimizers = fresh(seed=7)
    train(model, optimizers, 2)
    torch.save(contents(model, optimizers), "one.pt")
    checkpointer("one_sharded", **SHARDED).save(
        "step_3", model, optimizers, {"step": 2}
    )
    checkpointer("one_plain").save("step_3", model, optimizers, {"step": 2})
    processes = [
        multiprocessing.get_context("spawn").Process(
            target=two_processes, args=(rank, str(tmp_path))
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 150
    while (
        latest_checkpoint("killed") is None
        and not list(tmp_path.glob("error_*"))
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    time.sleep(random.Random(1).uniform(0, 0.2))
    errors = [
        path.read_text() for path in tmp_path.glob("error_*")
    ]  # before one process misses the other
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    assert not errors, errors[0]
    newest = latest_checkpoint("killed")
    assert load_checkpoint(newest)["step"] == int(newest.name[5:])

    found = torch.load("found.pt", weights_only=False)
    assert found["held"][0] < 0.6 * found["held"][1]  # it was sharded
    assert len(list(Path("sharded/step_3/sharded").glob("*.distcp"))) == 2
    for source in ("sharded", "sharded_asynchronous", "plain"):
        model, optimizers = fresh(seed=5)
        rest = restore_checkpoint(f"{source}/step_3", model, optimizers)
        assert same(contents(model, optimizers), found["at_3"]) and [
            each["rank"] for each in rest["rank_states"]
        ] == [0, 1]
        assert same(
            load_checkpoint(f"{source}/step_3")["model_state_dict"],
            dict(model.state_dict()),
        )
    card = torch.load("sharded_asynchronous/final/checkpoint.pt")["model_state_dict"]
    assert all(
        torch.equal(card[name], found["at_5"][name])
        for name, _ in model.named_parameters()
    )
    shutil.rmtree(
        "sharded_asynchronous/final/sharded"
    )  # the card's file does not need the shards
    loaded, _ = load_model("sharded_asynchronous/final")
    assert torch.equal(loaded.model.norm.weight, found["at_5"]["model.norm.weight"])
