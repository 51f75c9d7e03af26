"""Many processes: every layout against one process; the mistakes that a layout invites;
initial weights; launching on two machines.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call

from parallel_worker import BLOCKS, STEPS, batch, small, train
from qwen_analog.loss import IGNORE_INDEX
from qwen_analog.model import QwenForCausalLM
from qwen_analog.parallel import (
    DistributedContext,
    build_model,
    clip_grad_norm,
    end_with_torchrun,
    gradient_sync,
    make_mesh,
)

ROOT = Path(__file__).resolve().parents[1]


class WeightsInBfloat16(nn.Module):
    """What a sharded model computes with "bf16": float32 weights, cast for the forward
    and the backward pass.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return functional_call(
            self.model,
            {name: p.bfloat16() for name, p in self.model.named_parameters()},
            (),
            batch,
        )


@cache
def alone(precision="fp32", tied=True, kind="adamw", sharded=False):
    """Losses and final weights of one process, in one micro-batch a step, on the model
    that the constructor makes.
    """
    torch.manual_seed(0)
    model = QwenForCausalLM(small(tied))
    losses = train(
        model,
        WeightsInBfloat16(model) if sharded else model,
        DistributedContext(),
        kind=kind,
        precision="fp32" if sharded else precision,
    )
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def apart(found, reference):
    """The largest difference of a loss, and of a weight."""
    (losses, weights, _), (losses_, weights_) = found, reference
    assert len(losses) == STEPS and weights.keys() == weights_.keys()
    return max(abs(a - b) for a, b in zip(losses, losses_)), max(
        (weights[n] - weights_[n]).abs().max().item() for n in weights
    )


def start(*launch):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launch],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(*agents):
    for agent in agents:
        output, _ = agent.communicate(timeout=300)
        assert agent.returncode == 0, (
            "\n".join(re.findall(r".*Error.*", output)) or output[-2000:]
        )


def check(found):
    """The bounds: 1e-5 and 2e-6 in float32; in bfloat16 what rounding of each process's
    gradients leaves; mutants beyond them.
    """
    reference = alone()
    torch.manual_seed(0)
    moved = apart(
        (*reference, None),
        (
            reference[0],
            {n: p.detach() for n, p in QwenForCausalLM(small(True)).named_parameters()},
        ),
    )[1]
    assert moved > 0.04 and reference[0][0] - reference[0][-1] > 0.8
    names = list(QwenForCausalLM(small(True)).state_dict())
    for (strategy, what), result in found.items():
        tied = "tied=False" not in what
        label = f"{strategy}, {what}"
        if what in (
            "mean of each process",
            "clipped by its own shard",
            "never synchronised",
        ):
            loss, weight = apart(result, reference)
            assert loss > 1e-2 and weight > 5e-3, (
                f"{label}: the mutant survives, {loss:.1e} {weight:.1e}"
            )
        elif what.startswith("bf16"):
            loss, weight = apart(result, alone("bf16", tied, sharded=strategy != "ddp"))
            assert loss < 5e-3 and weight < 5e-3, f"{label}: {loss:.1e} {weight:.1e}"
            loss, weight = apart(result, alone("fp32", tied))
            assert loss < 1e-2 and weight < 1.5e-2, (
                f"{label} against float32: {loss:.1e} {weight:.1e}"
            )
        elif (
            what == "muon"
        ):  # its matrix products are in bfloat16, here over pieces of the rows
            loss, weight = apart(result, alone(kind="muon"))
            assert loss < 1e-3 and weight < 3e-3, f"{label}: {loss:.1e} {weight:.1e}"
        else:
            loss, weight = apart(result, alone(tied=tied))
            assert loss < 1e-5 and weight < 2e-6, f"{label}: {loss:.1e} {weight:.1e}"
            assert not tied or result[2] == names, (
                f"{label}: the state dict has other names"
            )


def test_two_processes_equal_one(tmp_path):
    finish(
        start(
            "--standalone",
            "--nproc_per_node=2",
            str(ROOT / "tests" / "parallel_worker.py"),
            str(tmp_path / "found.pt"),
        )
    )
    found = torch.load(tmp_path / "found.pt")
    assert {strategy for strategy, _ in found} == {"ddp", "fsdp"} and (
        "fsdp",
        "compiled",
    ) in found
    check(found)


def test_two_machines_of_two_processes_equal_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    launch = (
        "--nnodes=2",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        "--rdzv-id=test",
        str(ROOT / "tests" / "parallel_worker.py"),
        str(tmp_path / "found.pt"),
    )
    finish(start(*launch), start(*launch))
    found = torch.load(tmp_path / "found.pt")
    assert {strategy for strategy, _ in found} == {"ddp", "fsdp", "hsdp"}
    check(found)


ANOTHER = "error: another process, rank {}, {}, and says more in its own line"
SETTING = (
    "error: rank 1 has another setting than rank 0: sequence_length is 33 there and 32"
    " on rank 0"
)
SIZE = "error: rank 1 was started with WORLD_SIZE 3, rank 0 with 2"
ENDED = "error: rank {} ended without a word {}: it was killed, or the memory was full"
# of each process: exit code (2: its own error; 3: another's; negative: the signal) and
# the only line that it says
FAILURES = {
    "error_in_a_meeting": [
        (3, ANOTHER.format(1, "had an error before the first step")),
        (2, "error: d.jsonl, line 2 is bad"),
    ],
    "error_of_the_first": [
        (2, "error: No space left on device"),
        (3, ANOTHER.format(0, "had an error before the first step")),
    ],
    "error_in_a_collective": [
        (3, ANOTHER.format(1, "had an error at step 3")),
        (2, "error: out of memory"),
    ],
    "interrupted": [
        (3, ANOTHER.format(1, "was interrupted before the first step")),
        (130, ""),
    ],
    "killed_in_a_collective": [
        (3, ENDED.format(1, "at step 7")),
        (-signal.SIGKILL, ""),
    ],
    "first_killed_in_a_meeting": [
        (-signal.SIGKILL, ""),
        (3, ENDED.format(0, "before the first step")),
    ],
    "stopped": [
        (None, "error: rank 1 gives no sign of life at step 9"),
        (-signal.SIGKILL, ""),
    ],
    "late": [
        (None, "error: rank 1 lives but did not arrive at step 9"),
        (None, "error: rank 1 lives but did not arrive at step 9"),
    ],
    "patient": [(0, ""), (0, "")],
    "other_settings": [(2, SETTING), (2, SETTING)],
    "other_size": [(3, SIZE), (3, SIZE)],
    "missing": [(3, "error: rank 1 did not arrive: was it started?")],
    "taken": [(3, "error: MASTER_ADDR 127.0.0.1, MASTER_PORT")],
    "unreachable": [
        (3, "error: rank 0 cannot be reached at MASTER_ADDR 127.0.0.1, port")
    ],
}


def test_every_process_of_a_failed_run_ends_with_one_line(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "ranks_worker.py"),
            str(tmp_path),
            *FAILURES,
        ],
        env=environment,
        check=True,
        timeout=120,
    )
    found = json.loads((tmp_path / "found.json").read_text())
    for name, expected in FAILURES.items():
        assert len(found[name]) == len(expected), name
        for rank, ((code, words), (right_code, right_words)) in enumerate(
            zip(found[name], expected)
        ):
            assert code == right_code or right_code is None and code in (2, 3), (
                f"{name}, rank {rank}: exit {code}, {words}"
            )
            assert (
                words.startswith(right_words)
                and "\n" not in words
                and bool(words) == bool(right_words)
            ), f"{name}, rank {rank}: {words}"


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        (
            {"RANK": "2", "WORLD_SIZE": "2"},
            "RANK is '2', and must be a number from 0 to 1",
        ),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({"RANK": "1"}, "RANK is '1'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE is 'x'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR, where rank 0 runs, is not set"),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
            "MASTER_PORT is 'http'",
        ),
        (
            {
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "70000000000",
            },
            "MASTER_PORT is '70000000000'",
        ),
        (
            {
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "no host of this name",
                "MASTER_PORT": "1",
            },
            "no address that this machine knows",
        ),
    ],
)
def test_a_senseless_environment_is_one_line(monkeypatch, variables, words):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ValueError, match=re.escape(words)) as caught,
        DistributedContext(),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with (
        pytest.raises(ValueError, match="LOCAL_RANK 3 has no GPU: this machine has 2"),
        DistributedContext(),
    ):
        pass


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_workers_end_with_their_torchrun(by_torchrun):
    """A worker whose parent is killed gets SIGTERM; started by hand it goes on."""
    ready, said = os.pipe(), os.pipe()

    def worker():
        os.environ.pop("TORCHELASTIC_RUN_ID", None)
        if by_torchrun:
            os.environ["TORCHELASTIC_RUN_ID"] = "test"
        signal.signal(signal.SIGTERM, lambda *_: os.write(said[1], b"ended"))
        end_with_torchrun()
        os.write(ready[1], b"x")
        time.sleep(0.5)
        os.write(said[1], b"lives")
        os._exit(0)

    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            worker()
        time.sleep(60)
        os._exit(0)
    os.read(ready[0], 1)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert os.read(said[0], 5) == (b"ended" if by_torchrun else b"lives")


def test_the_data_are_unequal():
    """The mean of each process is another mean only where the processes' targets differ
    in number.
    """
    for step in range(2):
        targets = (batch(step)["targets"] != IGNORE_INDEX).sum(1)
        assert (
            len(targets) == BLOCKS
            and targets.min() > 0
            and targets[0::2].sum() != targets[1::2].sum()
        )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
def test_one_process_holds_the_model_itself(strategy):
    mesh = make_mesh(strategy, 1, "cpu", shard_size=8 if strategy == "hsdp" else None)
    model, call = build_model(
        small(True),
        11,
        torch.device("cpu"),
        strategy=strategy,
        mesh=mesh,
        precision="bf16-pure",
    )
    torch.manual_seed(11)
    expected = QwenForCausalLM(small(True)).bfloat16().state_dict()
    assert (
        mesh is None
        and call is model
        and all(
            torch.equal(value, expected[name])
            for name, value in model.state_dict().items()
        )
    )
    with gradient_sync(call, False):
        call(**batch(0)).backward()
    norm = (
        torch.stack([p.grad.float().norm() for p in model.parameters()]).norm().item()
    )
    assert clip_grad_norm(model, 0.1) == pytest.approx(norm, rel=1e-2)
    assert torch.stack(
        [p.grad.float().norm() for p in model.parameters()]
    ).norm().item() == pytest.approx(0.1, rel=1e-2)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("zero", 4, "cpu"), "strategy must be one of ddp, fsdp, hsdp, not 'zero'"),
        (("hsdp", 4, "cpu", 3), "shard_size 3 does not divide the 4 processes"),
        (("hsdp", 4, "cpu", 0), "shard_size 0 does not divide"),
        (("fsdp", 4, "cpu", 2), "shard_size 2 is for strategy 'hsdp'"),
    ],
)
def test_wrong_layouts_are_one_line(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        make_mesh(*arguments)
    assert "\n" not in str(caught.value)


def test_the_machine_sets_the_shard_size(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(
        ValueError, match="shard_size 3 does not divide the 8 processes"
    ):
        make_mesh("hsdp", 8, "cpu")


@pytest.mark.parametrize(
    "wrong", [dict(strategy="ddp", precision="fp16"), dict(strategy="zero")]
)
def test_wrong_models_are_one_line(wrong):
    with pytest.raises(ValueError) as caught:
        build_model(small(True), 0, torch.device("cpu"), **wrong)
    assert "\n" not in str(caught.value)


BATCH_SCRIPT = ROOT / "examples" / "pretrain.sbatch"


def slurm(folder, torchrun):
    """Run the batch script where `srun` starts one task, `scontrol` knows two machines,
    and `torchrun` is the given shell text.
    """
    for name, text in {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "torchrun": torchrun,
        "pkill": f'echo "$@" >> {folder}/signalled; touch {folder}/stop',
        "scontrol": (
            'if [ "$1" = show ]; then printf "n1\\nn2\\n"; else echo "$@" >>'
            f" {folder}/queued; fi"
        ),
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "41234",
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_GPUS_ON_NODE": "4",
    }
    return subprocess.Popen(
        ["bash", str(BATCH_SCRIPT), "my data.jsonl", "out"], env=environment
    )


def test_the_batch_script_is_valid_and_its_flags_exist(tmp_path):
    import argparse
    from qwen_analog.train import add_arguments

    subprocess.run(["bash", "-n", str(BATCH_SCRIPT)], check=True)
    assert (
        slurm(tmp_path, f'printf "%s\\n" "$@" > {tmp_path}/given; exit 3').wait(
            timeout=60
        )
        == 3
    )  # the training's own status
    given = (tmp_path / "given").read_text().splitlines()
    cut = given.index("qwen_analog.train")
    assert {
        "--nnodes=2",
        "--nproc-per-node=4",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=n1:21234",
        "--rdzv-id=41234",
    } <= set(given[:cut])
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    known = {flag for action in parser._actions for flag in action.option_strings}
    assert {
        word for word in given[cut:] if word.startswith("--")
    } <= known and "my data.jsonl" in given
    assert not (tmp_path / "queued").exists()


@pytest.mark.parametrize("status", [0, 1])
def test_the_batch_script_saves_and_goes_back_into_the_queue(tmp_path, status):
    job = slurm(
        tmp_path,
        f"touch {tmp_path}/started; while [ ! -e {tmp_path}/stop ]; do sleep 0.05;"
        f" done; exit {status}",
    )
    while not (tmp_path / "started").exists() and job.poll() is None:
        time.sleep(0.05)
    job.terminate()
    assert job.wait(timeout=60) == status
    assert (
        tmp_path / "signalled"
    ).read_text() == "-TERM -f [-]u -m qwen_analog.train\n"
    assert (tmp_path / "queued").exists() == (status == 0)
