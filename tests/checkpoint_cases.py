"""What the tests of checkpoints share: a small model, its training, comparisons."""

import dataclasses
import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from book import scramble_
from helpers import BYTES as TOKENIZER, SMALL, same
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qwen_analog.archive import CheckpointError
from qwen_analog.checkpointer import Checkpointer
from qwen_analog.config import QwenConfig
from qwen_analog.model import QwenForCausalLM
from qwen_analog.optim import build_optimizers
from qwen_analog.shards import sha256, write_manifest

CONFIG = dataclasses.replace(SMALL, vocab_size=278)


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


def in_a_fork(function, *arguments):
    """A process that has everything imported already and runs `function`."""
    process = multiprocessing.get_context("fork").Process(
        target=function, args=arguments
    )
    process.start()
    return process


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


def rehash(directory):
    """A manifest that fits the files, as one who means harm would write it."""
    write_manifest(
        directory,
        {
            name: sha256(directory / name)
            for name in json.loads((directory / "manifest.json").read_text())["files"]
        },
    )


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


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, trained):
    directory = tmp_path_factory.mktemp("sharded")
    checkpointer(directory, **SHARDED).save("step_1", *trained, {"step": 1})
    return directory / "step_1"
