"""Every layout into every other, bit for bit; what does not fit is refused."""

import errno
import os
import random
import shutil
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from book import scramble_
from checkpoint_cases import (
    BACKGROUND,
    CONFIG,
    PLAIN,
    SHARDED,
    TOKENIZER,
    changed,
    checkpointer,
    contents,
    fresh,
    one_line,
    same,
    train,
)
from forks import FORKS
from torch.distributed.device_mesh import init_device_mesh

from qwen_analog.archive import CheckpointError
from qwen_analog.checkpoint import load_checkpoint, load_model, save_checkpoint
from qwen_analog.model import QwenForCausalLM
from qwen_analog.optim import build_optimizers
from qwen_analog.restore import restore_checkpoint
from qwen_analog.run_directory import latest_checkpoint

pytest_plugins = ["checkpoint_cases"]
pytestmark = pytest.mark.usefixtures("folder")


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


# ---------------------------------------------------------------- two processes


def saves_and_goes_on(rank, mesh, shared):
    """Uninterrupted: three steps, a checkpoint, two steps; what is where after each."""
    model, optimizers = fresh(layout=mesh)
    train(model, optimizers, 3)
    shared["at_3"] = contents(model, optimizers)
    rank_state = {"rank": rank, "rng": torch.get_rng_state()}
    for options in (SHARDED, BACKGROUND, PLAIN):
        writer = checkpointer("_".join(options) or "plain", **options)
        writer.save("step_3", model, optimizers, {"step": 3}, rank_state)
        if options == BACKGROUND:
            train(model, optimizers, 2)
            shared["at_5"] = contents(model, optimizers)
            # waits for the first
            writer.save("final", model, optimizers, {"step": 5}, final=True)
            rest = restore_checkpoint("sharded/step_3", model, optimizers)
            assert rest["rank_states"][rank]["rank"] == rank
            assert same(contents(model, optimizers), shared["at_3"])
    shared["held"] = (
        sum(p.to_local().numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters()),
    )


def what_two_wrote_goes_into_every_layout(rank, mesh, shared):
    for source in ("sharded", "sharded_asynchronous", "plain"):
        for layout in (mesh, hybrid(), None):
            model, optimizers = fresh(seed=5, layout=layout)
            rest = restore_checkpoint(f"{source}/step_3", model, optimizers)
            assert same(contents(model, optimizers), shared["at_3"])
            assert rest["step"] == 3
            assert [each["rank"] for each in rest["rank_states"]] == [0, 1]
            if layout is mesh:  # and on from there
                train(model, optimizers, 2)
                assert same(contents(model, optimizers), shared["at_5"])


def what_one_wrote_goes_into_every_layout(rank, mesh, shared):
    for source in ("one_sharded", "one_plain"):
        for layout in (mesh, hybrid(), None):
            model, optimizers = fresh(seed=5, layout=layout)
            restore_checkpoint(f"{source}/step_3", model, optimizers)
            assert same(contents(model, optimizers), torch.load("one.pt"))


def replicas_as_ddp_holds_them_and_a_hybrid(rank, mesh, shared):
    for name, layout in (("replicas", None), ("hybrid", hybrid())):
        model, optimizers = fresh(seed=6, layout=layout)
        train(model, optimizers, 1)
        checkpointer(name, **SHARDED).save("step_1", model, optimizers, {"step": 1})
        other, its_optimizers = fresh(seed=5, layout=mesh)
        restore_checkpoint(f"{name}/step_1", other, its_optimizers)
        assert same(contents(other, its_optimizers), contents(model, optimizers))


def a_full_disk_of_one_is_known_to_both(rank, mesh, shared):
    def no_space(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    real = os.fsync
    for options in (SHARDED, BACKGROUND):
        model, optimizers = fresh(layout=mesh)
        writer = checkpointer("full", **options)
        os.fsync = no_space if rank == 1 else real
        with pytest.raises(OSError) as raised:
            writer.save("step_1", model, optimizers, {})
            writer.wait()
        os.fsync = real
        wanted = "step_1.partial cannot be written: [Errno 28] No space left on device"
        assert wanted in str(raised.value) and "\n" not in str(raised.value)
        dist.barrier()
        assert list(Path("full").iterdir()) == []


def damage_is_known_to_both(rank, mesh, shared):
    if rank == 0:
        shutil.copytree("sharded/step_3", "damaged")
        damaged = Path("damaged/sharded/__1_0.distcp")
        damaged.write_bytes(damaged.read_bytes()[:-1])
    dist.barrier()
    with pytest.raises(CheckpointError, match="__1_0.distcp is damaged"):
        restore_checkpoint("damaged", *fresh(layout=mesh))
    dist.barrier()


CLAIMS = [
    saves_and_goes_on,
    what_two_wrote_goes_into_every_layout,
    what_one_wrote_goes_into_every_layout,
    replicas_as_ddp_holds_them_and_a_hybrid,
    a_full_disk_of_one_is_known_to_both,
    damage_is_known_to_both,
]


def hybrid():
    return init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))


def two_processes(rank, folder):
    """Every claim in turn; then saves without end, to be killed."""
    os.chdir(folder)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    mesh, shared = init_device_mesh("cpu", (2,)), {}
    for claim in CLAIMS:
        try:
            claim(rank, mesh, shared)
        except BaseException:
            Path(f"{claim.__name__}_{rank}.error").write_text(traceback.format_exc())
            raise
        Path(f"{claim.__name__}_{rank}.done").touch()
    if rank == 0:
        torch.save(shared, "found.pt")
    dist.barrier()
    step, writer = 0, checkpointer("killed", keep_last=2, **BACKGROUND)
    model, optimizers = fresh(layout=mesh)
    while True:
        step += 1
        writer.save(f"step_{step}", model, optimizers, {"step": step})


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes did all they claim, and were killed."""
    folder, before = tmp_path_factory.mktemp("two"), Path.cwd()
    os.chdir(folder)
    model, optimizers = fresh(seed=7)
    train(model, optimizers, 2)
    torch.save(contents(model, optimizers), "one.pt")
    for name, options in (("one_sharded", SHARDED), ("one_plain", PLAIN)):
        writer = checkpointer(name, **options)
        writer.save("step_3", model, optimizers, {"step": 2})
    os.chdir(before)
    processes = [
        FORKS.Process(target=two_processes, args=(r, str(folder))) for r in range(2)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 150
    while (
        latest_checkpoint(folder / "killed") is None
        and not list(folder.glob("*.error"))
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    time.sleep(random.Random(1).uniform(0, 0.2))
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("claim", [claim.__name__ for claim in CLAIMS])
def test_of_two_processes(claim, two):
    for error in two.glob(f"{claim}_*.error"):
        raise AssertionError(error.read_text())
    assert len(list(two.glob(f"{claim}_*.done"))) == 2


@pytest.mark.slow
def test_two_processes_that_are_killed_leave_a_whole_checkpoint(two):
    newest = latest_checkpoint(two / "killed")
    assert load_checkpoint(newest)["step"] == int(newest.name[5:])


@pytest.mark.slow
def test_two_processes_share_the_work(two):
    held, whole = torch.load(two / "found.pt", weights_only=False)["held"]
    assert held < 0.6 * whole  # it was sharded
    assert len(list((two / "sharded/step_3/sharded").glob("*.distcp"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("source", ["sharded", "sharded_asynchronous", "plain"])
def test_one_process_reads_what_two_wrote(source, two):
    found = torch.load(two / "found.pt", weights_only=False)
    model, optimizers = fresh(seed=5)
    rest = restore_checkpoint(two / source / "step_3", model, optimizers)
    assert same(contents(model, optimizers), found["at_3"])
    assert [each["rank"] for each in rest["rank_states"]] == [0, 1]
    weights = load_checkpoint(two / source / "step_3")["model_state_dict"]
    assert same(weights, dict(model.state_dict()))


@pytest.mark.slow
def test_the_final_file_of_two_does_not_need_the_shards(two):
    at_5 = torch.load(two / "found.pt", weights_only=False)["at_5"]
    shutil.copytree(two / "sharded_asynchronous/final", "final")
    weights = torch.load("final/checkpoint.pt")["model_state_dict"]
    for name, _ in fresh()[0].named_parameters():
        assert torch.equal(weights[name], at_5[name])
    shutil.rmtree("final/sharded")
    loaded, _ = load_model("final")
    assert torch.equal(loaded.model.norm.weight, at_5["model.norm.weight"])


# ---------------------------------------------------------------- compiled blocks


def test_names_do_not_change_where_blocks_are_compiled():
    model, optimizers = fresh(kind="muon")
    train(model, optimizers, 1)
    other, its_optimizers = fresh(seed=5, kind="muon")
    expected = contents(model, optimizers)
    for each in (model, other):
        for layer in each.model.layers:
            layer.compile()
    save_checkpoint("step_1", model, TOKENIZER, optimizers=optimizers)
    restore_checkpoint("step_1", other, its_optimizers)
    assert same(contents(other, its_optimizers), expected)
