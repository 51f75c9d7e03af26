"""Many processes: every layout against one process; the mistakes that a layout invites;
initial weights; launching on two machines.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor.async_compile import AsyncCompile
from torch.func import functional_call

from forks import on_ranks
from parallel_worker import BLOCKS, STEPS, batch, small, train
from parallel_worker import main as worker
from qwen_analog.distributed import DistributedContext
from qwen_analog.loss import IGNORE_INDEX
from qwen_analog.model import QwenForCausalLM
from qwen_analog.parallel import (
    _DrawOnCPU,
    _initialize,
    build_model,
    clip_grad_norm,
    compile_layers,
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


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What parallel_worker.py finds on two processes."""
    out = tmp_path_factory.mktemp("two") / "found.pt"
    on_ranks(2, worker, [out], out.parent)
    return torch.load(out)


@pytest.fixture(scope="module")
def two_machines(tmp_path_factory):
    """What parallel_worker.py finds on two machines of two processes each."""
    out = tmp_path_factory.mktemp("four") / "found.pt"
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    launch = (
        "--nnodes=2",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        "--rdzv-id=test",
        WORKER,
        str(out),
    )
    finish(start(*launch), start(*launch))
    return torch.load(out)


WORKER = str(ROOT / "tests" / "parallel_worker.py")
EVERYWHERE = [
    "tied=True",
    "tied=False",
    "bf16 tied=True",
    "accumulation 4",
    "checkpointing",
]
LAYOUTS = [
    *[("two_processes", s, what) for s in ("ddp", "fsdp") for what in EVERYWHERE],
    *[
        ("two_processes", s, what)
        for s in ("ddp", "fsdp")
        for what in ("bf16 tied=False", "accumulation 1")
    ],
    *[
        ("two_processes", "fsdp", what)
        for what in ("kept after forward", "two ahead", "muon", "compiled")
    ],
    *[
        ("two_machines", s, what)
        for s in ("ddp", "fsdp", "hsdp")
        for what in EVERYWHERE
    ],
]
MUTANTS = [
    ("two_processes", "ddp", "mean of each process"),
    ("two_processes", "fsdp", "mean of each process"),
    ("two_processes", "fsdp", "clipped by its own shard"),
    ("two_processes", "ddp", "never synchronised"),
    ("two_processes", "ddp", "exchanged too early"),
    ("two_machines", "hsdp", "a seed for each process"),
    *[("two_machines", s, "mean of each process") for s in ("ddp", "fsdp", "hsdp")],
]
CLAIMS = [
    *[
        ("two_processes", name.format(strategy))
        for strategy in ("ddp", "fsdp")
        for name in (
            "messages of {}",
            "initial weights of {}, fp32",
            "initial weights of {}, bf16-pure",
        )
    ],
    *[
        ("two_machines", name.format(strategy))
        for strategy in ("ddp", "fsdp", "hsdp")
        for name in (
            "messages of {}",
            "initial weights of {}, fp32",
            "initial weights of {}, bf16-pure",
        )
    ],
    ("two_processes", "messages of fsdp, kept"),
    ("two_processes", "fsdp is sharded after a forward pass"),
    ("two_processes", "hsdp is sharded after a forward pass"),
    ("two_processes", "one compiled block serves all"),
    ("two_machines", "machines are copies"),
    ("two_machines", "no process holds the whole model while it is made"),
]


@pytest.mark.slow
@pytest.mark.parametrize("place, claim", CLAIMS)
def test_the_processes_find(request, place, claim):
    claims = request.getfixturevalue(place)["claims"]
    assert claims[claim] is None, claims[claim]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["two_processes", "two_machines"])
def test_every_result_has_its_test(request, place):
    results = request.getfixturevalue(place)
    listed = {(s, what) for where, s, what in LAYOUTS + MUTANTS if where == place}
    assert set(results["found"]) == listed
    assert set(results["claims"]) == {name for where, name in CLAIMS if where == place}


def test_one_process_learns():
    """What the bounds of the next tests are small against."""
    losses, weights = alone()
    torch.manual_seed(0)
    start = QwenForCausalLM(small(True)).named_parameters()
    moved = max((weights[n] - p.detach()).abs().max().item() for n, p in start)
    assert moved > 0.04 and losses[0] - losses[-1] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("place, strategy, what", LAYOUTS)
def test_many_processes_equal_one(request, place, strategy, what):
    """The bounds: 1e-5 and 2e-6 in float32; in bfloat16 what rounding of each process's
    gradients leaves.
    """
    result = request.getfixturevalue(place)["found"][strategy, what]
    tied = "tied=False" not in what
    if what.startswith("bf16"):
        sharded = alone("bf16", tied, sharded=strategy != "ddp")
        assert_close(apart(result, sharded), 5e-3, 5e-3)
        assert_close(apart(result, alone("fp32", tied)), 1e-2, 1.5e-2)
    elif what == "muon":  # its products are in bfloat16, here over pieces of the rows
        assert_close(apart(result, alone(kind="muon")), 1e-3, 3e-3)
    else:
        assert_close(apart(result, alone(tied=tied)), 1e-5, 2e-6)
        names = list(QwenForCausalLM(small(tied)).state_dict())
        assert result[2] == names, "the state dict has other names"


def assert_close(found, most_loss, most_weight):
    loss, weight = found
    assert loss < most_loss and weight < most_weight, f"{loss:.1e} {weight:.1e}"


@pytest.mark.slow
@pytest.mark.mutant
@pytest.mark.parametrize("place, strategy, what", MUTANTS)
def test_mutants_differ_from_one(request, place, strategy, what):
    result = request.getfixturevalue(place)["found"][strategy, what]
    loss, weight = apart(result, alone())
    assert loss > 1e-2 and weight > 5e-3, f"survives, {loss:.1e} {weight:.1e}"


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


def check_initial(initialize, **changes):
    """Must give the constructor's weights, bit for bit, to a model made on the meta
    device, and leave the generator where it does.
    """
    config = replace(small(True), **changes)
    torch.manual_seed(7)
    expected = QwenForCausalLM(config)
    after = torch.get_rng_state()
    with torch.device("meta"):
        model = QwenForCausalLM(config)
    model.to_empty(device="cpu")
    initialize(model, 7)
    assert model.lm_head.weight is model.model.embed_tokens.weight, "no longer tied"
    for (name, p), q in zip(model.named_parameters(), expected.parameters()):
        assert torch.equal(p, q), f"{name} differs"
    assert torch.equal(after, torch.get_rng_state()), "the next random numbers differ"


def without_the_constructors(model, seed):
    torch.manual_seed(seed)
    with _DrawOnCPU():
        model.init_weights()


def without_tying(model, seed):
    model.init_weights = lambda: [
        module.reset_parameters()
        for module in model.modules()
        if hasattr(module, "reset_parameters")
    ]
    _initialize(model, seed)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "attention_bias": False}])
def test_the_initial_weights_are_the_constructors(changes):
    check_initial(_initialize, **changes)


@pytest.mark.mutant
@pytest.mark.parametrize("initialize", [without_the_constructors, without_tying])
def test_other_initial_weights_are_noticed(initialize):
    with pytest.raises(AssertionError):
        check_initial(initialize)


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


def test_compilers_do_not_hear_what_stops_a_run(monkeypatch):
    """torchrun sends it to all of a run's processes; a compiler that is gone is waited
    for without end.
    """
    started = []

    def warm_pool():
        command = [sys.executable, "-c", "input()"]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE))

    monkeypatch.setattr(AsyncCompile, "warm_pool", warm_pool)
    model = QwenForCausalLM(small(tied=True))
    compile_layers(model)
    assert not started  # a CPU's compiler is another
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    compile_layers(model)
    (compiler,) = started
    compiler.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        compiler.wait(0.5)
    assert compiler.communicate(b"\n") and compiler.returncode == 0
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_one_compiled_block_serves_all(monkeypatch):
    compiled = torch.nn.Module.compile

    def captured(self):
        return compiled(self, backend="eager")  # a back end that compiles nothing

    monkeypatch.setattr(torch.nn.Module, "compile", captured)
    counts = []
    for layers in (1, 3):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model = QwenForCausalLM(replace(small(tied=True), num_hidden_layers=layers))
        compile_layers(model)
        with torch.no_grad():
            model(torch.zeros(1, 8, dtype=torch.int64))
        counts.append(torch._dynamo.utils.counters["stats"]["calls_captured"])
    torch.compiler.reset()
    assert counts[0] == counts[1] > 0
