"""The optimizers against rules written out here, every parameter in one group, and the
schedule's properties.
"""

import copy
import math

import nbformat
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from book import scramble_
from chapter_code import CHAPTERS
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from qwen_analog import QwenConfig, QwenForCausalLM, optim as module
from qwen_analog.optim import (
    AdamWBf16,
    build_optimizers,
    learning_rate_at,
    parameter_groups,
    set_learning_rate,
    stochastic_round_,
)
from qwen_analog.norm import RMSNorm

LEARNING_RATE, DECAY = 0.01, 0.1
KINDS = ("adamw", "adamw-bf16", "muon")


def tiny(tied=True):
    return scramble_(
        QwenForCausalLM(QwenConfig.from_preset("tiny", tie_word_embeddings=tied))
    )


def set_gradients(model, step):
    for i, p in enumerate(model.parameters()):
        g = torch.randn(
            p.shape, generator=torch.Generator().manual_seed(1000 * step + i)
        )
        p.grad = (g * 10.0 ** -(i % 9)).to(p.dtype)  # down to the size of eps


def is_table(name):
    return name in ("model.embed_tokens.weight", "lm_head.weight")


def adamw_reference(values, gradients, decay, beta1=0.9, beta2=0.95, eps=1e-8):
    """AdamW as in PyTorch (decay times lr), in float64, the averages as plain sums."""
    w = values.double()
    for t in range(1, len(gradients) + 1):
        g = torch.stack(gradients[:t]).double()
        age = torch.arange(t - 1, -1, -1, dtype=torch.float64).view(-1, *[1] * w.ndim)
        m = ((1 - beta1) * beta1**age * g).sum(0) / (1 - beta1**t)
        v = ((1 - beta2) * beta2**age * g**2).sum(0) / (1 - beta2**t)
        w = w - LEARNING_RATE * (m / (v.sqrt() + eps) + decay * w)
    return w


def muon_reference(values, gradients, decay, momentum=0.95):
    """Jordan et al. 2024 with the update's size of Liu et al. 2025, in float64."""
    w, mean = values.double(), torch.zeros_like(values).double()
    for g in gradients:
        mean = momentum * mean + (1 - momentum) * g.double()
        X = (1 - momentum) * g.double() + momentum * mean  # one step ahead
        X = X / X.norm().clamp(min=1e-7)  # some of the gradients here are that small
        for _ in range(5):
            X = 3.4445 * X - 4.7750 * X @ X.T @ X + 2.0315 * X @ X.T @ X @ X.T @ X
        w = w - LEARNING_RATE * (0.2 * max(w.shape) ** 0.5 * X + decay * w)
    return w


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_five_steps_equal_the_rules(kind, tied):
    model, seen = tiny(tied), {}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, LEARNING_RATE, DECAY, kind=kind)
    for step in range(5):
        set_gradients(model, step)
        for name, p in model.named_parameters():
            seen.setdefault(name, []).append(p.grad.clone())
        for optimizer in optimizers:
            optimizer.step()
    for name, p in model.named_parameters():
        decay = DECAY if p.ndim == 2 else 0.0
        if kind == "muon" and p.ndim == 2 and not is_table(name):
            gap = (p - muon_reference(before[name], seen[name], decay)).pow(
                2
            ).mean().sqrt() / (5 * LEARNING_RATE)
            assert gap < 5e-3, (  # Newton-Schulz runs in bfloat16
                f"{name}: rms difference {gap:.1e} learning rates a step"
            )
        else:
            torch.testing.assert_close(
                p.double(),
                adamw_reference(before[name], seen[name], decay),
                rtol=1e-6,
                atol=1e-6,
            )


MUON_FAULTS = {
    "no Nesterov": {"nesterov": False},
    "no size matching": {"adjust_lr_fn": "original"},
    "no decay": {"weight_decay": 0.0},
    "momentum not orthogonalised": {"ns_steps": 0},
}


@pytest.mark.mutant
@pytest.mark.parametrize("fault", MUON_FAULTS)
def test_a_fault_of_muon_is_noticed(fault, monkeypatch):
    def broken(*arguments, **settings):
        muon, adamw = build(*arguments, **settings)
        for group in muon.param_groups:
            assert MUON_FAULTS[fault].keys() <= group.keys()  # they have an effect
            group.update(MUON_FAULTS[fault])
        return muon, adamw

    build = build_optimizers
    monkeypatch.setitem(globals(), "build_optimizers", broken)
    with pytest.raises(AssertionError, match="learning rates a step"):
        test_five_steps_equal_the_rules("muon", True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_one_group(kind, tied):
    model = tiny(tied)
    optimizers = build_optimizers(model, LEARNING_RATE, kind=kind)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert (
        sum(len(group["params"]) for group in groups)
        == len(decays)
        == len(list(model.parameters()))
    )
    for name, p in model.named_parameters():
        assert decays[id(p)] == (
            0.0 if name.endswith(("bias", "norm.weight", "layernorm.weight")) else DECAY
        ), name
    assert (
        sum(p.numel() for group in groups for p in group["params"])
        == model.count_parameters()
    )


@pytest.mark.parametrize("tied", [True, False])
def test_muon_has_the_hidden_matrices_only(tied):
    model = tiny(tied)
    muon, adamw = build_optimizers(model, LEARNING_RATE, kind="muon")
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert (
        hidden == {name for name in names.values() if name.endswith("_proj.weight")}
        and len(hidden) == 2 * 7
    )
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert {name for name in rest if is_table(name)} == {
        "model.embed_tokens.weight"
    } | (set() if tied else {"lm_head.weight"})


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_are_left_out(kind):
    model = tiny()
    model.model.layers[0].requires_grad_(False)
    chosen = [
        p
        for o in build_optimizers(model, LEARNING_RATE, kind=kind)
        for group in o.param_groups
        for p in group["params"]
    ]
    assert {id(p) for p in chosen} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def test_empty_groups_are_left_out():
    (group,) = parameter_groups(nn.Linear(2, 2, bias=False), DECAY)
    assert group["weight_decay"] == DECAY
    (group,) = parameter_groups(nn.LayerNorm(2), DECAY)
    assert group["weight_decay"] == 0.0


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'sgd'"):
        build_optimizers(tiny(), LEARNING_RATE, kind="sgd")


@pytest.mark.parametrize("kind", KINDS)
def test_the_learning_rate_reaches_every_group_and_scales_the_step(kind):
    steps = []
    for rate in (1e-3, 2e-3):
        model = tiny()
        before = [p.detach().clone() for p in model.parameters()]
        optimizers = build_optimizers(model, 1.0, weight_decay=0.0, kind=kind)
        set_learning_rate(optimizers, rate)
        assert {
            group["lr"] for optimizer in optimizers for group in optimizer.param_groups
        } == {rate}
        set_gradients(model, 0)
        for optimizer in optimizers:
            optimizer.step()
        steps.append([p.detach() - q for p, q in zip(model.parameters(), before)])
    for one, two in zip(*steps):
        torch.testing.assert_close(two, 2 * one, rtol=1e-2, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_of_optimizers_goes_through_a_distributed_checkpoint(kind):
    def stepped(step, model, optimizers):
        torch.manual_seed(step)
        set_gradients(model, step)
        for optimizer in optimizers:
            optimizer.step()

    model = tiny()
    optimizers = build_optimizers(model, LEARNING_RATE, kind=kind)
    stepped(0, model, optimizers)
    state = copy.deepcopy(
        get_optimizer_state_dict(model, optimizers)
    )  # as read from a file: no memory shared
    twin = tiny()
    twin.load_state_dict(model.state_dict())
    restored = build_optimizers(twin, 1.0, kind=kind)
    set_optimizer_state_dict(twin, restored, state)
    for both in ((model, optimizers), (twin, restored)):
        stepped(1, *both)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


runs = st.integers(1, 500).flatmap(
    lambda n: st.fixed_dictionaries(
        {
            "learning_rate": st.floats(1e-6, 1.0),
            "max_steps": st.just(n),
            "warmup_steps": st.integers(0, n - 1),
            "schedule": st.sampled_from(["cosine", "wsd", "constant"]),
            "min_ratio": st.floats(0.0, 1.0),
            "decay_fraction": st.floats(0.0, 1.0),
        }
    )
)


@settings(max_examples=200, deadline=None)
@given(runs)
def test_schedule_properties(run):
    peak, n, warmup = run["learning_rate"], run["max_steps"], run["warmup_steps"]
    rates = [learning_rate_at(t, **run) for t in range(n + 10)]
    rounding = 1e-12 * peak
    lowest = min(run["min_ratio"], 1 / warmup if warmup else 1.0) * peak
    assert all(0 < rate or run["min_ratio"] == 0 for rate in rates[:n])
    assert all(lowest - rounding <= rate <= peak + rounding for rate in rates), "bounds"
    assert all(a < b for a, b in zip(rates[:warmup], rates[1:warmup])), "warmup rises"
    assert math.isclose(rates[max(0, warmup - 1)], peak), (
        "the warmup's last step has the peak rate"
    )
    assert all(
        a >= b - rounding for a, b in zip(rates[warmup:], rates[warmup + 1 :])
    ), "falls afterwards"
    end = peak if run["schedule"] == "constant" else run["min_ratio"] * peak
    assert all(math.isclose(rate, end, abs_tol=rounding) for rate in rates[n:]), (
        "stays at the floor"
    )
    # continuous: no jump is larger than the steepest of the three shapes allows
    decay = max(1, min(round(run["decay_fraction"] * n), n - warmup))
    steepest = {
        "cosine": math.pi / 2 / (n - warmup),
        "wsd": 1 / decay,
        "constant": 0.0,
    }[run["schedule"]]
    assert all(
        abs(a - b) <= max(1 / max(1, warmup), steepest) * peak + rounding
        for a, b in zip(rates, rates[1:])
    ), "continuous"


@pytest.mark.parametrize(
    "schedule, at_half", [("cosine", 0.55), ("wsd", 1.0), ("constant", 1.0)]
)
def test_schedule_values(schedule, at_half):
    at = lambda step: learning_rate_at(
        step, learning_rate=1.0, max_steps=110, warmup_steps=10, schedule=schedule
    )
    assert (at(0), at(4), at(9)) == (0.1, 0.5, 1.0) and math.isclose(at(60), at_half)
    assert math.isclose(
        at(99),
        {
            "cosine": 0.1 + 0.45 * (1 + math.cos(0.89 * math.pi)),
            "wsd": 0.55,
            "constant": 1.0,
        }[schedule],
    )


def test_an_unknown_schedule_is_refused_during_warmup():
    with pytest.raises(ValueError, match="'linear'"):
        learning_rate_at(
            0, learning_rate=1.0, max_steps=10, warmup_steps=5, schedule="linear"
        )


def test_stochastic_rounding_has_the_right_mean_and_keeps_what_fits():
    torch.manual_seed(0)
    values = torch.tensor(
        [
            1 + 2**-9,
            -1 - 2**-10,
            2 - 2**-12,
            3.14159,
            -1e-3,
            1e-30,
            1e-40,
            2.0**-133 * 0.3,
        ]
    )
    draws = torch.stack(
        [
            stochastic_round_(torch.empty(8, dtype=torch.bfloat16), values)
            for _ in range(20_000)
        ]
    ).double()
    down, up = draws.min(0).values, draws.max(0).values
    assert (
        all(len(column.unique()) == 2 for column in draws.T)
        and ((down < values) & (values < up)).all()
    )
    deviation = (
        (up - values.double()) * (values.double() - down) / 20_000
    ).sqrt()  # of the mean of coin tosses
    assert ((draws.mean(0) - values.double()).abs() < 4.5 * deviation).all()
    exact = torch.tensor(
        [0.0, -0.0, 1.0, -1.5, 2.0**-130, 3.3895314e38, math.inf, -math.inf]
    )
    for _ in range(100):
        rounded = stochastic_round_(torch.empty(8, dtype=torch.bfloat16), exact)
        assert torch.equal(
            rounded.view(torch.int16), exact.bfloat16().view(torch.int16)
        )
    nan = torch.tensor([0x7FC00000, -1, 0x7F800001], dtype=torch.int32).view(
        torch.float32
    )  # -1 has every bit set
    assert stochastic_round_(torch.empty(3, dtype=torch.bfloat16), nan).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_in_bf16_follows_the_rule_in_the_mean(dtype):
    """20,000 copies of each of three weights see the same gradients; their mean is the
    float64 rule's weight.
    """
    torch.manual_seed(0)
    p = nn.Parameter(
        torch.tensor([1.0, -0.5, 2.0])[:, None].expand(3, 20_000).contiguous().to(dtype)
    )
    optimizer = AdamWBf16([p], lr=LEARNING_RATE, weight_decay=DECAY)
    gradients = [
        torch.tensor([1.0, 0.01 * (-1) ** t, 1.0 + 0.5 * math.sin(t)])[:, None].expand(
            3, 20_000
        )
        for t in range(60)
    ]
    for g in gradients:
        p.grad = g.to(dtype)
        optimizer.step()
    w = adamw_reference(
        torch.tensor([1.0, -0.5, 2.0]), [g[:, 0].to(dtype) for g in gradients], DECAY
    )
    state, t = optimizer.state[p], 60
    assert (
        p.dtype == dtype
        and state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    )
    torch.testing.assert_close(
        p.double().mean(1), w, rtol=0, atol=2e-3
    )  # of 0.6 that the first one moves
    age = torch.arange(t - 1, -1, -1, dtype=torch.float64)[:, None]
    g = torch.stack([g[:, 0] for g in gradients]).to(dtype).double()
    torch.testing.assert_close(
        state["exp_avg"].double().mean(1),
        (0.1 * 0.9**age * g).sum(0),
        rtol=1e-3,
        atol=1e-5,
    )
    torch.testing.assert_close(
        state["exp_avg_sq"].double().mean(1),
        (0.05 * 0.95**age * g**2).sum(0),
        rtol=1e-3,
        atol=1e-7,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_in_bf16_goes_on_bit_for_bit_from_its_state(dtype, tmp_path):
    def stepped(model, optimizer, step):
        set_gradients(model, step)
        optimizer.step()

    def new():
        model = tiny().to(dtype)
        return model, *build_optimizers(model, LEARNING_RATE, kind="adamw-bf16")

    torch.manual_seed(3)
    model, optimizer = new()
    for step in range(2):
        stepped(model, optimizer, step)
    torch.save(
        [model.state_dict(), optimizer.state_dict(), torch.get_rng_state()],
        tmp_path / "state.pt",
    )
    stepped(model, optimizer, 2)
    twin, restored = new()
    weights, state, rng = torch.load(tmp_path / "state.pt")
    twin.load_state_dict(weights)
    restored.load_state_dict(state)
    for i, saved in state["state"].items():
        loaded = restored.state_dict()["state"][i]
        assert (
            all(
                loaded[name].dtype == saved[name].dtype
                and torch.equal(loaded[name], saved[name])
                for name in saved
            )
            and len(saved) == 3
        )
    torch.set_rng_state(rng)
    stepped(twin, restored, 2)
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters())]
    same += [
        torch.equal(optimizer.state[p][n], restored.state[q][n])
        for p, q in zip(model.parameters(), twin.parameters())
        for n in ("exp_avg", "exp_avg_sq")
    ]
    assert all(same)


def test_adamw_in_bf16_calls_a_closure_and_leaves_weights_without_gradient_alone():
    p, q = nn.Parameter(torch.ones(3).double()), nn.Parameter(torch.ones(3))
    optimizer = AdamWBf16([p, q], lr=0.1)

    def closure():
        loss = p.sum()
        loss.backward()
        return loss

    assert (
        optimizer.step(closure).item() == 3.0
        and (p < 1).all()
        and (q == 1).all()
        and set(optimizer.state) == {p}
    )


def _sharded(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))

    def pieces(dtype=torch.float32):
        return scramble_(
            nn.Sequential(
                nn.Linear(7, 5), nn.Linear(5, 24), nn.Linear(24, 9, bias=False)
            )
        ).to(dtype)  # 5, 9 and 7 do not divide by 2

    def stepped(model, optimizers, steps, first=0):
        torch.manual_seed(first)
        for t in range(first, first + steps):
            for i, p in enumerate(model.parameters()):
                g = torch.randn(
                    p.shape, generator=torch.Generator().manual_seed(100 * t + i)
                ).to(p.dtype)
                p.grad = (
                    distribute_tensor(g, p.device_mesh, p.placements)
                    if isinstance(p, DTensor)
                    else g
                )
            for optimizer in optimizers:
                optimizer.step()

    def run(kind, shard, dtype=torch.float32):
        model = pieces(dtype)
        if shard:
            fully_shard(model, mesh=mesh)
        optimizers = build_optimizers(model, LEARNING_RATE, kind=kind)
        stepped(model, optimizers, 4)
        return model, optimizers

    for kind, dtype, bound in (
        ("muon", torch.float32, 0.01),
        ("adamw-bf16", torch.float32, 0.01),
        ("adamw-bf16", torch.bfloat16, 0.3),
    ):
        model, optimizers = run(kind, True, dtype)
        whole, _ = run(kind if kind == "muon" else "adamw", False)
        for p, q in zip(model.parameters(), whole.parameters()):
            assert isinstance(p, DTensor) and p.dtype == dtype
            gap = (p.full_tensor() - q).pow(2).mean().sqrt() / (4 * LEARNING_RATE)
            assert gap < bound, (
                f"{kind} {dtype}: a weight of shape {tuple(p.shape)} is off by"
                f" {gap:.1e} learning rates a step"
            )
    assert all(
        isinstance(state["exp_avg"], DTensor)
        and state["exp_avg"].dtype == torch.bfloat16
        for state in optimizers[0].state.values()
    )

    # the last of them through a distributed checkpoint: the next step is the same, bit
    # for bit
    dcp.save(
        {
            "model": model.state_dict(),
            "optimizer": get_optimizer_state_dict(model, optimizers),
        },
        checkpoint_id=f"{folder}/checkpoint",
    )
    twin, restored = run("adamw-bf16", True, torch.bfloat16)
    stepped(twin, restored, 1, first=77)  # somewhere else
    state = {
        "model": twin.state_dict(),
        "optimizer": get_optimizer_state_dict(twin, restored),
    }
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    twin.load_state_dict(state["model"])
    set_optimizer_state_dict(twin, restored, state["optimizer"])
    for both in ((model, optimizers), (twin, restored)):
        stepped(*both, 1, first=5)
    assert all(
        torch.equal(p.to_local(), q.to_local())
        for p, q in zip(model.parameters(), twin.parameters())
    )

    # copies on two processes that are seeded alike stay equal
    copy_, _ = run("adamw-bf16", False, torch.bfloat16)
    for p in copy_.parameters():
        other = p.detach().clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, p)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_parameters_get_the_updates_of_whole_ones(tmp_path):
    mp.start_processes(_sharded, (tmp_path,), nprocs=2, start_method="forkserver")


def mean_of_bf16_is_the_rule(steps, copies=5000):
    """Many copies of one weight, all gradients 1: do their means follow AdamW?"""
    torch.manual_seed(0)
    p = nn.Parameter(torch.ones(copies).bfloat16())
    optimizer = AdamWBf16([p], lr=0.001, weight_decay=0.1)
    w = torch.ones((), dtype=torch.float64)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, steps + 1):
        p.grad = torch.ones_like(p)
        optimizer.step()
        m, v = 0.9 * m + 0.1, 0.95 * v + 0.05
        w = w * (1 - 0.001 * 0.1)
        w -= 0.001 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    state = optimizer.state[p]
    return all(
        abs(ours.double().mean() / rule - 1) < bound
        for ours, rule, bound in (
            (state["exp_avg"], m, 0.001),
            (state["exp_avg_sq"], v, 0.001),
            (1 - p.double(), 1 - w, 0.03),
        )
    )


def nearest(which):
    """Round m (0), v (1) or the weight (2) to nearest: they take turns."""
    calls = []

    def rounded(target, source, real=module.stochastic_round_):
        calls.append(target)
        if (len(calls) - 1) % 3 == which:
            return target.copy_(source)
        return real(target, source)

    return "stochastic_round_", rounded


def update(change):
    def changed(p, g, state, group, real=module._adamw_bf16):
        return real(p, g, state, change(state, group))

    return "_adamw_bf16", changed


def without_bias_correction(state, group):
    if state:
        state["step"] = torch.tensor(1e9)
    return group


MUTANTS = {
    "first average to nearest": nearest(0),
    "second average to nearest": nearest(1),
    "weights to nearest": nearest(2),
    "all three to nearest": (
        "stochastic_round_",
        lambda target, source: target.copy_(source),
    ),
    "betas swapped": update(lambda state, group: {**group, "betas": (0.95, 0.9)}),
    "no bias correction": update(without_bias_correction),
    "decay not scaled by lr": update(
        lambda state, group: {**group, "weight_decay": 0.1 / 0.001}
    ),
    "no decay": update(lambda state, group: {**group, "weight_decay": 0.0}),
}


def test_the_mean_of_many_weights_follows_the_rule():
    assert mean_of_bf16_is_the_rule(100) and mean_of_bf16_is_the_rule(5)


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_of_adamw_in_bf16_is_noticed(mutant, monkeypatch):
    monkeypatch.setattr(module, *MUTANTS[mutant])
    assert not (mean_of_bf16_is_the_rule(100) and mean_of_bf16_is_the_rule(5))


def taught(name, old="", new=""):
    """A function of the chapter, with one edit in its source."""
    (path,) = CHAPTERS.glob("*_optimizer.ipynb")
    notebook = nbformat.read(path, 4)
    (source,) = (
        cell.source[cell.source.index(f"def {name}(") :]
        for cell in notebook.cells
        if cell.cell_type == "code" and f"\ndef {name}(" in f"\n{cell.source}"
    )
    source = source.split("\n\n\n")[0]
    if old:
        assert source.count(old) == 1, f"{old!r} is not in the source once"
    space = {"torch": torch}
    exec(source.replace(old, new), space)
    return space[name]


def slopes_of(p, t):
    """Slopes over ten powers of ten, one of them always zero."""
    g = torch.randn(
        p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(t)
    )
    scale = torch.logspace(-10, 0, p.numel(), dtype=torch.float64)
    scale[1] = 0.0
    return g * scale.view(p.shape)


def pieces():
    return scramble_(nn.Sequential(nn.Linear(6, 4), RMSNorm(4))).double()


@torch.no_grad()
def differs_from_torchs_adamw(update, groups=parameter_groups, bound=1e-13):
    """Do 30 steps in float64 leave another weight than torch's AdamW with its groups
    written out by hand?
    """
    ours, (linear, norm) = pieces(), pieces()
    vectors = {"params": [linear.bias, norm.weight], "weight_decay": 0.0}
    matrix = {"params": [linear.weight], "weight_decay": DECAY}
    options = dict(lr=LEARNING_RATE, betas=(0.9, 0.95), foreach=False)
    reference = torch.optim.AdamW([matrix, vectors], **options)
    chosen = groups(ours, DECAY)
    state = {p: [torch.zeros_like(p), torch.zeros_like(p)] for p in ours.parameters()}
    theirs = [linear.weight, linear.bias, norm.weight]
    for t in range(1, 31):
        for group in chosen:
            for p in group["params"]:
                decay = group["weight_decay"]
                new, *state[p] = update(p, slopes_of(p, t), *state[p], t, decay)
                p.copy_(new)
        for p in theirs:
            p.grad = slopes_of(p, t)
        reference.step()
        for p, q in zip(ours.parameters(), theirs):
            if not (p - q).abs().max() < bound:  # nan differs too
                return True
    return False


def by_name(spared):
    """Groups that decay every parameter but those whose name ends in `spared`."""
    return lambda model, decay: [
        {"params": [p], "weight_decay": 0.0 if name.endswith(spared) else decay}
        for name, p in model.named_parameters()
    ]


EDITS = {
    "mean not corrected": (" / (1 - beta1**t)", ""),
    "mean square not corrected": (" / (1 - beta2**t)", ""),
    "betas swapped": ("beta1, beta2 = betas", "beta2, beta1 = betas"),
    "decay inside the gradient (L2)": (
        "beta1, beta2 = betas",
        "beta1, beta2 = betas\n    g, decay = g + decay * p, 0.0",
    ),
    "decay not scaled by lr": ("lr * decay * p", "decay * p"),
    "eps inside the root": ("mean_square.sqrt() + eps", "(mean_square + eps).sqrt()"),
    "no eps": (" + eps", ""),
    "no square root": (".sqrt()", ""),
    "square of the mean, not mean square": ("g**2", "m**2"),
    "gradient instead of momentum": ("lr * mean /", "lr * g /"),
}
GROUPS = {
    "decay on nothing": lambda model, decay: parameter_groups(model, 0.0),
    "decay on everything": by_name(("nothing",)),
    "decay on norms": by_name(("bias",)),
    "decay on biases": by_name(("1.weight",)),
}


def test_the_taught_adamw_is_torchs():
    assert not differs_from_torchs_adamw(taught("adamw_update"))


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", EDITS)
def test_a_mutant_of_the_taught_adamw_is_noticed(mutant):
    assert differs_from_torchs_adamw(taught("adamw_update", *EDITS[mutant]))


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", GROUPS)
def test_wrong_groups_are_noticed(mutant):
    assert differs_from_torchs_adamw(taught("adamw_update"), GROUPS[mutant])


def test_newton_schulz_brings_singular_values_near_one():
    """The quintic of Muon, and of the same five steps the classical cubic does not."""
    newton_schulz = taught("newton_schulz")
    g = torch.Generator().manual_seed(0)
    M = torch.randn(40, 20, generator=g, dtype=torch.float64)
    M = M * torch.logspace(0, -2, 20, dtype=torch.float64)
    values = torch.linalg.svdvals(newton_schulz(M))
    assert ((values > 0.5) & (values < 1.5)).all()
    cubic = torch.linalg.svdvals(newton_schulz(M, coefficients=(1.5, -0.5, 0.0)))
    assert (cubic < 0.5).sum() > 5


def differs_from_muon(update, shape):
    """Do three steps in float64 leave another matrix than the rule?"""
    update.__globals__["newton_schulz"] = taught("newton_schulz")
    g = torch.Generator().manual_seed(0)
    p, *slopes = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in "pggg")
    expected = muon_reference(p, slopes, DECAY)
    m = torch.zeros_like(p)
    for x in slopes:
        p, m = update(p, x, m, DECAY, LEARNING_RATE)
    return not torch.allclose(p, expected, rtol=1e-7, atol=1e-7)


MUON_EDITS = {
    "no step ahead": ("newton_schulz(ahead)", "newton_schulz(m)"),
    "no size matching": ("0.2 * max(p.shape) ** 0.5 * ", ""),
    "size of the shorter side": ("max(p.shape)", "min(p.shape)"),
    "decay not scaled by lr": ("lr * decay * p", "decay * p"),
    "momentum not orthogonalised": ("newton_schulz(ahead)", "ahead / ahead.norm()"),
}


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_the_taught_muon_is_the_rule(shape):
    assert not differs_from_muon(taught("muon_update"), shape)


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", MUON_EDITS)
def test_a_mutant_of_the_taught_muon_is_noticed(mutant):
    assert differs_from_muon(taught("muon_update", *MUON_EDITS[mutant]), (6, 4))


def test_the_step_of_a_turned_matrix_is_the_turned_step():
    newton_schulz = taught("newton_schulz")
    g = torch.Generator().manual_seed(0)
    M, *square = (
        torch.randn(shape, generator=g, dtype=torch.float64)
        for shape in ((12, 7), (12, 12), (7, 7))
    )
    P, Q = (torch.linalg.qr(x)[0] for x in square)
    torch.testing.assert_close(newton_schulz(P @ M @ Q), P @ newton_schulz(M) @ Q)


@pytest.mark.parametrize(
    ("kind", "bytes_a_matrix"), [("adamw", 8), ("adamw-bf16", 4), ("muon", 4)]
)
def test_bytes_of_state(kind, bytes_a_matrix):
    model = tiny()
    optimizers = build_optimizers(model, LEARNING_RATE, kind=kind)
    set_gradients(model, 0)
    for optimizer in optimizers:
        optimizer.step()
    held = sum(
        value.nbytes
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if value.ndim > 0  # without step counters
    )
    expected = 0
    for name, p in model.named_parameters():
        hidden = p.ndim == 2 and not is_table(name)
        elsewhere = 4 if kind == "adamw-bf16" else 8
        expected += p.numel() * (bytes_a_matrix if hidden else elsewhere)
    assert held == expected
