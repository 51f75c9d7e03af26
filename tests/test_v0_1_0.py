"""Checkpoints and settings that version 0.1.0 wrote: `data/v0_1_0` holds a run of one
process with Muon, and one of two processes with FSDP and AdamW.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_analog.checkpoint import (
    verify_checkpoint,
    consolidate,
    load_checkpoint,
    load_model,
    checkpoint_config,
    read_state,
    snapshot,
)
from qwen_analog.checkpointer import Checkpointer
from qwen_analog.model import QwenForCausalLM
from qwen_analog.optim import build_optimizers
from qwen_analog.restore import restore_checkpoint
from qwen_analog.run_directory import latest_checkpoint, newest_whole
from qwen_analog.tokenizer import load_tokenizer

OLD = Path(__file__).parent / "data" / "v0_1_0"
STEPS = {"plain/step_2": "muon", "plain/final": "muon", "fsdp/step_2": "adamw"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")


def restored(path, kind):
    """A model and optimizers that are filled from a checkpoint, and the rest."""
    model = QwenForCausalLM(checkpoint_config(path))
    optimizers = build_optimizers(model, 1e-2, kind=kind)
    return model, optimizers, restore_checkpoint(path, model, optimizers)


@pytest.mark.parametrize("path", STEPS)
def test_model_and_tokenizer_load(path):
    model, tokenizer = load_model(path)
    assert model.generation_config == {} and tokenizer.decode(tokenizer.encode("cat"))
    weights = load_checkpoint(path)["model_state_dict"]
    assert weights.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
    verify_checkpoint(Path(path))


def test_the_final_weights_are_those_of_its_safetensors():
    model, _ = load_model("plain/final")
    for name, weight in load_file("plain/final/model.safetensors").items():
        assert torch.equal(weight, model.state_dict()[name])


@pytest.mark.parametrize("path", STEPS)
def test_weights_and_averages_come_back(path):
    model, optimizers, rest = restored(path, STEPS[path])
    found = load_checkpoint(path)
    assert rest["step"] == found["step"] == (4 if path.endswith("final") else 2)
    names = found["optimizer_parameters"]
    for optimizer, packed, its_names in zip(
        optimizers, found["optimizer_state_dicts"], names
    ):
        own = optimizer.state_dict()["state"]
        assert own.keys() == packed["state"].keys() and own
        for number, state in packed["state"].items():
            assert own[number].keys() == state.keys(), its_names[number]
            for key, value in state.items():
                assert torch.equal(own[number][key], value)
                assert own[number][key].dtype == value.dtype


def test_what_the_two_processes_wrote_is_what_torch_reads():
    """Independent of this package: DCP with its own list, of files we trust."""
    import torch.distributed.checkpoint as dcp

    model, optimizers, _ = restored("fsdp/step_2", "adamw")
    tensors, _ = snapshot(model, optimizers)
    theirs = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(theirs, checkpoint_id="fsdp/step_2/sharded", no_dist=True)
    assert tensors and all(torch.equal(t, theirs[name]) for name, t in tensors.items())


@pytest.mark.parametrize("path", STEPS)
def test_the_state_of_a_run_is_read(path):
    state = read_state(path)
    assert {
        "data",
        "tokenizer",
        "tokenizer_fingerprint",
        "train_config",
        "spike_watch",
        "rank_states",
    } <= state.keys()
    ranks = 2 if path.startswith("fsdp") else 1
    assert len(state["rank_states"]) == ranks
    assert all(rank["rng"]["cpu"].dtype == torch.uint8 for rank in state["rank_states"])
    assert state["train_config"]["block_size"] == 32  # sequence_length now
    assert "losses" in state["spike_watch"]


def test_a_directory_of_an_old_run_goes_on():
    assert newest_whole("plain") == latest_checkpoint("plain") == Path("plain/final")
    assert newest_whole("fsdp") == Path("fsdp/step_2")
    model, optimizers, rest = restored("fsdp/step_2", "adamw")
    tokenizer = load_tokenizer("tiktoken:tokenizer.tiktoken")
    for sharded in (False, True):
        writer = Checkpointer("fsdp", tokenizer, keep_last=3, sharded=sharded)
        writer.save(f"step_{3 + sharded}", model, optimizers, {"step": 3 + sharded})
    old, *new = (load_checkpoint(f"fsdp/step_{n}") for n in (2, 3, 4))
    for each in new:
        for name, weight in old["model_state_dict"].items():
            assert torch.equal(weight, each["model_state_dict"][name])


def test_old_shards_become_one_file():
    model, _ = load_model("fsdp/step_2")
    file = consolidate("fsdp/step_2")
    weights = torch.load(file)["model_state_dict"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])


def test_the_fixtures_are_of_version_0_1_0():
    settings = json.loads(Path("train_config.json").read_text())
    assert {"block_size", "eval_blocks"} <= settings.keys()
    assert Path("fsdp/step_2/sharded/.metadata").is_file()
    for run, ranks in (("plain", 1), ("fsdp", 2)):
        assert Path(run, "metrics.jsonl").is_file()
        assert len(list(Path(run, "ledger").glob("rank_*.jsonl"))) == ranks
