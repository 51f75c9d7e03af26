"""One step: the same however it is cut; what is not finite is left out; evaluation."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import MODEL, settings

from qwen_analog import step as module
from qwen_analog.config import QwenConfig
from qwen_analog.data import TokenSequence
from qwen_analog.distributed import DistributedContext
from qwen_analog.loss import IGNORE_INDEX
from qwen_analog.model import QwenForCausalLM
from qwen_analog.optim import build_optimizers
from qwen_analog.step import count_targets, evaluate, micro_batches, train_step

ALONE = DistributedContext()


def sequences(count=8, length=32):
    """Sequences of two documents each, with between 1 and `length` targets."""
    g = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        ids = torch.randint(278, (length + 1,), generator=g) // (1 + i % 3)
        kept = torch.arange(length) < 1 + i * i % length
        targets = ids[1:].where(kept, IGNORE_INDEX)
        documents = (torch.arange(length) >= 20).long()
        made.append(TokenSequence(ids[:-1], targets, documents, [f"d:{i}"]))
    return made


def model():
    torch.manual_seed(1)
    return QwenForCausalLM(QwenConfig(**MODEL))


def weights_after(size, take=train_step, **changes):
    """Return loss, norm and weights after one step of micro-batches of `size`."""
    config = settings(micro_batch_size=size, max_grad_norm=0.5, **changes)
    trained = model()
    # a large eps: the step follows the gradient's size
    optimizers = build_optimizers(trained, 1e-2, eps=1e-2)
    batches = micro_batches(sequences(), config)
    loss, norm, applied = take(trained, optimizers, batches, config, ALONE)
    assert applied
    return loss, norm, torch.cat([p.detach().flatten() for p in trained.parameters()])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("isolate", [True, False])
def test_a_step_is_the_same_however_it_is_cut(size, isolate):
    loss, norm, weights = weights_after(8, isolate_documents=isolate)
    cut_loss, cut_norm, cut = weights_after(size, isolate_documents=isolate)
    assert cut_norm == pytest.approx(norm, rel=1e-4) and norm > 0.5  # it is clipped
    assert cut_loss == pytest.approx(loss, rel=1e-5)
    assert (cut - weights).abs().max() < 1e-6


def test_isolated_documents_are_not_the_same_as_joined_ones():
    assert weights_after(8)[0] != weights_after(8, isolate_documents=False)[0]


def mean_loss(model, batch, config, device, summed=module.forward_loss):
    share = count_targets([batch]) / batch["targets"].numel()
    return summed(model, batch, config, device) / share


MUTANTS = {
    "mean of means": ("forward_loss", mean_loss),
    "padding counted as targets": ("count_targets", lambda b: 32 * 8),
    "not clipped": ("clip_grad_norm", lambda m, n, c=module.clip_grad_norm: c(m, 1e9)),
    "first micro-batch only": (
        "accumulate_gradients",
        lambda m, b, *rest, a=module.accumulate_gradients: a(m, b[:1], *rest),
    ),
}


@pytest.mark.mutant
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_step_is_noticed(name, monkeypatch):
    *_, weights = weights_after(8)
    monkeypatch.setattr(module, *MUTANTS[name])
    *_, broken = weights_after(2)
    assert (broken - weights).abs().max() > 1e-5


def two_steps():
    """Return the weights after two steps, each with gradients of its own."""
    config, trained = settings(micro_batch_size=4, max_grad_norm=0.5), model()
    optimizers = build_optimizers(trained, 1e-2, eps=1e-2)
    for half in (sequences()[:4], sequences()[4:]):
        train_step(trained, optimizers, micro_batches(half, config), config, ALONE)
    return torch.cat([p.detach().flatten() for p in trained.parameters()])


@pytest.mark.mutant
def test_gradients_that_are_never_cleared_are_noticed(monkeypatch):
    right = two_steps()
    assert torch.equal(two_steps(), right)
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda *a, **options: None)
    assert (two_steps() - right).abs().max() > 1e-5


def test_the_average_over_processes_is_undone():
    """Averaged over two processes, twice the gradient is the gradient."""
    batches = micro_batches(sequences(), settings(micro_batch_size=4))
    targets, gradients = count_targets(batches), {}
    for world_size in (1, 2):
        trained = model()
        arguments = (batches, targets, settings(), torch.device("cpu"), world_size)
        module.accumulate_gradients(trained, *arguments)
        gradients[world_size] = trained.model.norm.weight.grad
    torch.testing.assert_close(gradients[2], 2 * gradients[1])


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(value, where):
    config, trained = settings(micro_batch_size=8), model()
    optimizers = build_optimizers(trained, 1e-2)
    batches = micro_batches(sequences(), config)
    train_step(trained, optimizers, batches, config, ALONE)
    if where == "loss":
        trained.model.norm.register_forward_hook(lambda *a: a[-1] * value)
    else:
        trained.model.norm.weight.register_hook(lambda gradient: gradient * value)
    before = [p.detach().clone() for p in trained.parameters()]
    moments = [v.clone() for s in optimizers[0].state.values() for v in s.values()]
    result = train_step(trained, optimizers, batches, config, ALONE)
    assert not result.applied
    assert all(map(torch.equal, before, trained.parameters()))
    after = [v for s in optimizers[0].state.values() for v in s.values()]
    assert all(map(torch.equal, moments, after))
    assert all(p.grad is None for p in trained.parameters())


class Held:
    """Held-out sequences."""

    tokens_per_epoch, bytes_per_epoch = 100, 250

    def __init__(self, count):
        self.sequences = sequences(count)

    def epoch(self, limit):
        return self.sequences[:limit]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_held_out_loss_is_a_mean_over_targets(size):
    config = settings(micro_batch_size=size, eval_sequences=5, z_loss=1.0)
    trained = model()
    scores = evaluate(trained, Held(8), config, ALONE)
    nll = targets = 0
    for one in sequences(5):
        (batch,) = micro_batches([one], config)
        nll += trained(**batch, reduction="sum").item()  # without the z-loss
        targets += count_targets([batch])
    assert scores["loss"] == pytest.approx(nll / targets, rel=1e-5)
    bits = scores["loss"] / math.log(2) * 100 / 250
    assert scores["bits_per_byte"] == pytest.approx(bits)
    assert trained.training and all(p.grad is None for p in trained.parameters())


def test_the_reported_loss_holds_the_z_loss_and_the_held_out_loss_does_not():
    config, trained = settings(micro_batch_size=3, z_loss=0.01), model()
    batches = micro_batches(sequences(), config)
    with torch.no_grad():
        plain = [trained(**b, reduction="sum").item() for b in batches]
        both = [trained(**b, reduction="sum", z_loss=0.01).item() for b in batches]
    held = evaluate(trained, Held(8), settings(z_loss=0.01, eval_sequences=8), ALONE)
    result = train_step(trained, build_optimizers(trained, 0.0), batches, config, ALONE)
    targets = count_targets(batches)
    assert held["loss"] == pytest.approx(sum(plain) / targets, rel=1e-5)
    assert result.loss == pytest.approx(sum(both) / targets, rel=1e-5)
    assert result.loss > held["loss"] + 0.1


class Rank(DistributedContext):
    """One of several processes, whose sums are only its own."""

    def __init__(self, rank, world_size):
        super().__init__()
        self.rank, self.world_size = rank, world_size

    def all_reduce_sum(self, *values):
        return list(values)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_processes_share_the_held_out_sequences_in_equal_numbers(world_size):
    config = settings(eval_sequences=5)
    shares = [
        module._own_share(Held(8), config, Rank(rank, world_size))
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    real = [s for share in shares for s in share if (s.targets != IGNORE_INDEX).any()]
    assert sorted(s.sources for s in real) == [[f"d:{i}"] for i in range(5)]


def test_padding_has_no_targets():
    (batch,) = micro_batches([replace(sequences(1)[0])], settings())
    assert count_targets([batch]) == 1


def test_a_replicated_model_holds_its_gradients_once():
    """DDP makes other buckets before the second step: until then nothing is kept."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trained = model()
        wrapped = DistributedDataParallel(trained, gradient_as_bucket_view=True)
        optimizers = build_optimizers(trained, 1e-2)
        config = settings(micro_batch_size=4)
        batches = micro_batches(sequences(), config)
        kept = []
        for _ in range(3):
            train_step(wrapped, optimizers, batches, config, ALONE)
            kept.append([p.grad is not None for p in trained.parameters()])
    finally:
        dist.destroy_process_group()
    assert not any(kept[0]) and all(kept[1]) and all(kept[2])
