"""What the tests of training share: a small corpus, settings, and runs in processes."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import torch
from forks import on_ranks
from helpers import BYTES, ROOT, SHAPE, same

from qwen_analog.checkpoint import load_checkpoint
from qwen_analog.cli import main
from qwen_analog.monitor import documents_of_step
from qwen_analog.train import main as train_main
from qwen_analog.train import train
from qwen_analog.train_config import TrainConfig

MODEL = {**SHAPE, "vocab_size": 278}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a corpus of unequal documents and a byte vocabulary, as working
    directory.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    BYTES.save(tmp_path)
    (tmp_path / "corpus.jsonl").write_text(
        "".join(
            json.dumps({"text": f"{i}: " + "abcdefgh "[: 1 + i % 9] * (i * i % 17 + 1)})
            + "\n"
            for i in range(200)
        )
    )
    return tmp_path


def settings(**changes):
    values = dict(
        model=MODEL,
        tokenizer="tiktoken:tokenizer.tiktoken",
        data=["corpus.jsonl"],
        heldout_fraction=0.1,
        sequence_length=32,
        micro_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=6,
        warmup_steps=2,
        learning_rate=0.01,
        save_every=2,
        eval_every=3,
        eval_sequences=8,
        log_every=1,
        keep_last=9,
        precision="fp32",
    )
    return TrainConfig.create({**values, **changes})


def training_state(path):
    checkpoint = load_checkpoint(path)
    return {
        k: checkpoint[k]
        for k in ("model_state_dict", "optimizer_state_dicts", "step", "data")
    }


def run(*command, processes=None, timeout=180, **kwargs):
    """A command in a process of its own; `processes` starts it under torchrun."""
    start = (
        [sys.executable]
        if processes is None
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(Path.cwd() / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*start, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout,
        **kwargs,
    )


def as_file(config, name="config.json"):
    Path(name).write_text(config.model_dump_json())
    return name


def final_weights(directory):
    return load_checkpoint(f"{directory}/final")["model_state_dict"]


def distance(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def losses(directory):
    entries = [
        json.loads(line)
        for line in Path(directory, "metrics.jsonl").read_text().splitlines()
    ]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def train_on(processes, *words):
    """`python -m qwen_analog.train` on several processes, without what torchrun and the
    import of torch take.
    """
    here = Path.cwd()
    on_ranks(processes, train_main, words, here, HF_HOME=here / "hf")


def launched(processes, *arguments, **changes):
    """A run on several processes."""
    train_on(processes, "--config", as_file(settings(**changes)), *arguments)


def resumed_to_the_bit() -> dict:
    """Resume a copy of the run `whole` that ended behind step 2; return its state."""
    shutil.copytree("whole", "killed")
    for gone in ("final", "step_6", "step_4", "adapter"):
        shutil.rmtree(f"killed/{gone}", ignore_errors=True)
    assert main(["finetune", "--resume", "auto", "--output-dir", "killed"]) == 0
    whole, resumed = training_state("whole/final"), training_state("killed/final")
    assert same(whole, resumed)
    assert read_the_same("whole", "killed")
    return resumed


def read_the_same(a, b, steps=range(1, 7)):
    return all(
        documents_of_step(a, step) == documents_of_step(b, step) for step in steps
    )


def entries(directory):
    return [
        json.loads(line, parse_constant=pytest.fail)
        for line in Path(directory, "metrics.jsonl").read_text().splitlines()
    ]


def write_corpus(count, first=0, file="corpus.jsonl"):
    Path(file).write_text(
        "".join(
            json.dumps({"text": f"document {i} " * (1 + i % 5)}) + "\n"
            for i in range(first, first + count)
        )
    )


def rewrite(path, change):
    """A checkpoint.pt with its dict changed."""
    checkpoint = torch.load(path)
    change(checkpoint)
    torch.save(checkpoint, path)


def stopped(**changes):
    """A run of 6 steps in `whole`, and a copy in `checkpoints` as if it had been
    stopped after step 4.
    """
    train(settings(output_dir="whole", **changes))
    shutil.copytree("whole", "checkpoints")
    shutil.rmtree("checkpoints/final")


def stops_after(steps):
    """Return `stop_signals` of a run that is stopped after so many steps."""

    @contextmanager
    def stop_signals():
        left = iter(range(steps - 1, -1, -1))
        yield lambda: next(left) == 0

    return stop_signals
