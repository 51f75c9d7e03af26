"""The optimizers against rules written out here, every parameter in one group, and the schedule's properties."""
import copy
import math

import pytest
import torch
from book import scramble_
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from qwen_analog import QwenConfig, QwenForCausalLM
from qwen_analog.optim import build_optimizers, learning_rate_at, parameter_groups, set_learning_rate

LEARNING_RATE, DECAY = 0.01, 0.1
KINDS = ("adamw", "muon")


def tiny(tied=True):
    return scramble_(QwenForCausalLM(QwenConfig.from_preset("tiny", tie_word_embeddings=tied)))


def set_gradients(model, step):
    for i, p in enumerate(model.parameters()):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i))
        p.grad = g * 10.0 ** -(i % 9)                  # down to the size of eps


def is_table(name):
    return name in ("model.embed_tokens.weight", "lm_head.weight")


def adamw_reference(values, gradients, decay, beta1=0.9, beta2=0.95, eps=1e-8):
    """Loshchilov & Hutter 2019, algorithm 2, in float64, the averages as plain sums."""
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
        X = (1 - momentum) * g.double() + momentum * mean
        X = X / X.norm().clamp(min=1e-7)               # some of the gradients here are that small
        for _ in range(5):
            X = 3.4445 * X - 4.7750 * X @ X.T @ X + 2.0315 * X @ X.T @ X @ X.T @ X
        w = w - LEARNING_RATE * (0.2 * max(w.shape) ** 0.5 * X + decay * w)
    return w


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
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
            gap = (p - muon_reference(before[name], seen[name], decay)).pow(2).mean().sqrt() / (5 * LEARNING_RATE)
            assert gap < 5e-3, f"{name}: rms difference {gap:.1e} learning rates a step"       # Newton-Schulz runs in bfloat16
        else:
            torch.testing.assert_close(p.double(), adamw_reference(before[name], seen[name], decay), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_one_group(kind, tied):
    model = tiny(tied)
    optimizers = build_optimizers(model, LEARNING_RATE, kind=kind)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decays) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert decays[id(p)] == (0.0 if name.endswith(("bias", "norm.weight", "layernorm.weight")) else DECAY), name
    assert sum(p.numel() for group in groups for p in group["params"]) == model.count_parameters()


@pytest.mark.parametrize("tied", [True, False])
def test_muon_has_the_hidden_matrices_only(tied):
    model = tiny(tied)
    muon, adamw = build_optimizers(model, LEARNING_RATE, kind="muon")
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert hidden == {name for name in names.values() if name.endswith("_proj.weight")} and len(hidden) == 2 * 7
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert {name for name in rest if is_table(name)} == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_are_left_out(kind):
    model = tiny()
    model.model.layers[0].requires_grad_(False)
    chosen = [p for o in build_optimizers(model, LEARNING_RATE, kind=kind) for group in o.param_groups for p in group["params"]]
    assert {id(p) for p in chosen} == {id(p) for p in model.parameters() if p.requires_grad}


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
        assert {group["lr"] for optimizer in optimizers for group in optimizer.param_groups} == {rate}
        set_gradients(model, 0)
        for optimizer in optimizers:
            optimizer.step()
        steps.append([p.detach() - q for p, q in zip(model.parameters(), before)])
    for one, two in zip(*steps):
        torch.testing.assert_close(two, 2 * one, rtol=1e-2, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_of_optimizers_goes_through_a_distributed_checkpoint(kind):
    def stepped(step, model, optimizers):
        set_gradients(model, step)
        for optimizer in optimizers:
            optimizer.step()

    model = tiny()
    optimizers = build_optimizers(model, LEARNING_RATE, kind=kind)
    stepped(0, model, optimizers)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizers))        # as read from a file: no memory shared
    twin = tiny()
    twin.load_state_dict(model.state_dict())
    restored = build_optimizers(twin, 1.0, kind=kind)
    set_optimizer_state_dict(twin, restored, state)
    for both in ((model, optimizers), (twin, restored)):
        stepped(1, *both)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


runs = st.integers(1, 500).flatmap(lambda n: st.fixed_dictionaries({
    "learning_rate": st.floats(1e-6, 1.0), "max_steps": st.just(n), "warmup_steps": st.integers(0, n - 1),
    "schedule": st.sampled_from(["cosine", "wsd", "constant"]), "min_ratio": st.floats(0.0, 1.0), "decay_fraction": st.floats(0.0, 1.0)}))


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
    assert math.isclose(rates[max(0, warmup - 1)], peak), "the warmup's last step has the peak rate"
    assert all(a >= b - rounding for a, b in zip(rates[warmup:], rates[warmup + 1:])), "falls afterwards"
    end = peak if run["schedule"] == "constant" else run["min_ratio"] * peak
    assert all(math.isclose(rate, end, abs_tol=rounding) for rate in rates[n:]), "stays at the floor"
    # continuous: no jump is larger than the steepest of the three shapes allows
    decay = max(1, min(round(run["decay_fraction"] * n), n - warmup))
    steepest = {"cosine": math.pi / 2 / (n - warmup), "wsd": 1 / decay, "constant": 0.0}[run["schedule"]]
    assert all(abs(a - b) <= max(1 / max(1, warmup), steepest) * peak + rounding for a, b in zip(rates, rates[1:])), "continuous"


@pytest.mark.parametrize("schedule, at_half", [("cosine", 0.55), ("wsd", 1.0), ("constant", 1.0)])
def test_schedule_values(schedule, at_half):
    at = lambda step: learning_rate_at(step, learning_rate=1.0, max_steps=110, warmup_steps=10, schedule=schedule)
    assert (at(0), at(4), at(9)) == (0.1, 0.5, 1.0) and math.isclose(at(60), at_half)
    assert math.isclose(at(99), {"cosine": 0.1 + 0.45 * (1 + math.cos(0.89 * math.pi)), "wsd": 0.55, "constant": 1.0}[schedule])


def test_an_unknown_schedule_is_refused_during_warmup():
    with pytest.raises(ValueError, match="'linear'"):
        learning_rate_at(0, learning_rate=1.0, max_steps=10, warmup_steps=5, schedule="linear")
