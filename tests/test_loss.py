"""The loss: gradients, chunks, ignored targets, precision, and the same gradient
however a step is cut into micro-batches.
"""

import contextlib
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from qwen_analog import loss as loss_module
from qwen_analog.loss import (
    IGNORE_INDEX,
    bits_per_byte,
    cross_entropy,
    linear_cross_entropy,
)


def problem(tokens=13, width=6, vocab=17, ignored=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(tokens + vocab)
    hidden, weight = (
        torch.randn(n, width, generator=g, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for n in (tokens, vocab)
    )
    targets = torch.randint(vocab, (tokens,), generator=g)
    targets[torch.randperm(tokens, generator=g)[:ignored]] = IGNORE_INDEX
    return hidden, weight, targets


def naive(hidden, weight, targets, reduction="mean", z_loss=0.0):
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits, targets, reduction=reduction)
    squares = logits.logsumexp(-1)[targets != IGNORE_INDEX] ** 2
    return loss + z_loss * (squares.mean() if reduction == "mean" else squares.sum())


def results(loss, hidden, weight, *args, **kwargs):
    value = loss(hidden, weight, *args, **kwargs)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"z_loss": 0.2}, {"z_loss": 0.2, "reduction": "sum"}],
)
@pytest.mark.parametrize("chunk_size", [1, 4, 13, None])
def test_gradcheck(options, chunk_size):
    hidden, weight, targets = problem()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(
            h, w, targets, chunk_size=chunk_size, **options
        ),
        (hidden, weight),
    )


def test_gradcheck_inside_a_checkpoint():
    hidden, weight, targets = problem()
    assert torch.autograd.gradcheck(
        lambda h, w: checkpoint(
            linear_cross_entropy, h, w, targets, use_reentrant=False
        ),
        (hidden, weight),
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_changes_no_bit(reentrant):
    hidden, weight, targets = problem(dtype=torch.float32)
    want = results(linear_cross_entropy, hidden, weight, targets)
    loss = checkpoint(
        linear_cross_entropy, hidden, weight, targets, use_reentrant=reentrant
    )
    loss.backward()
    for a, b in zip((loss.detach(), hidden.grad, weight.grad), want):
        assert torch.equal(a, b)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    vocab=st.integers(1, 30),
    chunk_size=st.none() | st.integers(1, 50),
    ignored=st.integers(0, 39),
    z_loss=st.sampled_from([0.0, 1e-4, 0.5]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_any_chunk_size_equals_the_naive_formula(
    tokens, vocab, chunk_size, ignored, z_loss, reduction
):
    hidden, weight, targets = problem(tokens, 5, vocab, min(ignored, tokens - 1))
    got = results(
        linear_cross_entropy, hidden, weight, targets, reduction, chunk_size, z_loss
    )
    for a, b in zip(got, results(naive, hidden, weight, targets, reduction, z_loss)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_leading_dimensions_and_views():
    hidden, weight, targets = problem(24)
    got = results(
        lambda h, w: linear_cross_entropy(
            h.view(2, 12, -1)[:, :-1], w, targets.view(2, 12)[:, 1:], chunk_size=5
        ),
        hidden,
        weight,
    )
    want = results(
        lambda h, w: naive(
            h.view(2, 12, -1)[:, :-1].flatten(0, 1),
            w,
            targets.view(2, 12)[:, 1:].flatten(),
        ),
        hidden,
        weight,
    )
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_a_vocabulary_larger_than_one_block():
    hidden, weight, targets = problem(20, 4, 20_000, dtype=torch.float32)
    for a, b in zip(
        results(linear_cross_entropy, hidden, weight, targets, chunk_size=7),
        results(naive, hidden, weight, targets),
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tokens", [0, 13])
def test_no_target_at_all_gives_zero_and_zero_gradients(reduction, tokens):
    hidden, weight, targets = problem(tokens, ignored=tokens)
    for result in results(
        linear_cross_entropy, hidden, weight, targets, reduction, z_loss=0.1
    ):
        assert not result.any()
    for result in results(
        lambda h, w: cross_entropy(h @ w.T, targets, reduction), hidden, weight
    ):
        assert not result.any()


def test_an_ignored_token_has_no_influence():
    hidden, weight, targets = problem()
    other = torch.where(
        (targets == IGNORE_INDEX)[:, None], 9.0, hidden.detach()
    ).requires_grad_()
    first, second = (
        results(linear_cross_entropy, h, weight, targets, z_loss=0.1, chunk_size=3)
        for h in (hidden, other)
    )
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b)
    assert not first[1][targets == IGNORE_INDEX].any()


@pytest.mark.parametrize("bad", [17, -1, -99, 10**9])
def test_a_target_out_of_range_is_refused(bad):
    hidden, weight, targets = problem()
    targets[2] = bad
    for call in (
        lambda: linear_cross_entropy(hidden, weight, targets),
        lambda: cross_entropy(hidden @ weight.T, targets),
    ):
        with pytest.raises(ValueError, match=f"target {bad} is neither"):
            call()


@pytest.mark.parametrize("tokens, chunk_size", [(12, 4), (14, 4), (13, 0), (13, -1)])
def test_sizes_that_do_not_fit_are_refused(tokens, chunk_size):
    hidden, weight, _ = problem()
    with (
        torch.no_grad(),
        pytest.raises(
            ValueError,
            match=f"13 hidden vectors, {tokens} targets, chunk_size {chunk_size}",
        ),
    ):
        linear_cross_entropy(
            hidden,
            weight,
            torch.zeros(tokens, dtype=torch.int64),
            chunk_size=chunk_size,
        )


def test_an_unknown_reduction_is_refused():
    with pytest.raises(
        ValueError, match="reduction must be 'mean' or 'sum', not 'none'"
    ):
        linear_cross_entropy(*problem(), reduction="none")


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_autocast_is_as_close_to_float64_as_the_naive_loss(z_loss):
    hidden, weight, targets = problem(300, 32, 200, 40, torch.float32)
    exact = results(naive, hidden.double(), weight.double(), targets, z_loss=z_loss)
    with torch.autocast("cpu", torch.bfloat16):
        plain, chunked = (
            results(naive, hidden, weight, targets, z_loss=z_loss),
            results(linear_cross_entropy, hidden, weight, targets, "mean", 16, z_loss),
        )
    for a, b, c in zip(chunked, plain, exact):
        assert a.dtype == torch.float32
        assert (a - c).norm() < 1.5 * (b - c).norm() + 1e-4 * c.norm()


def test_bfloat16_weights():
    hidden, weight, targets = problem(300, 32, 200, 40, torch.bfloat16)
    got, exact = (
        results(linear_cross_entropy, hidden, weight, targets, chunk_size=16),
        results(naive, hidden.double(), weight.double(), targets),
    )
    assert [x.dtype for x in got] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for a, c in zip(got, exact):
        assert (a - c).norm() < 1e-2 * c.norm()


def test_float64_stays_float64_under_autocast():
    hidden, weight, targets = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float64 and torch.equal(
        loss, linear_cross_entropy(hidden, weight, targets)
    )


def test_only_the_gradients_that_are_wanted():
    hidden, weight, targets = problem()
    want = results(linear_cross_entropy, hidden, weight, targets)
    assert torch.equal(
        torch.autograd.grad(
            linear_cross_entropy(hidden.detach(), weight, targets), weight
        )[0],
        want[2],
    )
    assert torch.equal(
        torch.autograd.grad(
            linear_cross_entropy(hidden, weight.detach(), targets), hidden
        )[0],
        want[1],
    )
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), want[0])


@pytest.mark.parametrize(
    "device, mode", [("meta", contextlib.nullcontext), ("cpu", FakeTensorMode)]
)
def test_shapes_without_values(device, mode):
    with mode():
        hidden, weight = (
            torch.empty(n, 8, device=device, requires_grad=True) for n in (20, 11)
        )
        targets = torch.empty(20, dtype=torch.int64, device=device)
        assert [
            x.shape
            for x in results(
                linear_cross_entropy, hidden, weight, targets, chunk_size=7
            )
        ] == [(), (20, 8), (11, 8)]


def test_a_second_backward_pass_gives_the_same_gradients():
    hidden, weight, targets = problem()
    loss = 3 * linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (hidden, weight))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_unequal_documents_in_any_number_of_micro_batches(micro_batches):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(17, 6, generator=g, dtype=torch.float64, requires_grad=True)
    documents = [
        (
            torch.randn(n, 6, generator=g, dtype=torch.float64),
            torch.randint(17, (n,), generator=g),
        )
        for n in (50, 1, 7, 3)
    ]
    count = sum(len(t) for _, t in documents)
    size = len(documents) // micro_batches
    for i in range(0, len(documents), size):
        h, t = (torch.cat(parts) for parts in zip(*documents[i : i + size]))
        (
            linear_cross_entropy(h, weight, t, reduction="sum", chunk_size=4) / count
        ).backward()
    h, t = (torch.cat(parts) for parts in zip(*documents))
    torch.testing.assert_close(
        weight.grad, torch.autograd.grad(naive(h, weight, t), weight)[0]
    )


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(
                17, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64
            )
        )

    def forward(self, h, t, reduction):
        return linear_cross_entropy(
            h, self.weight, t, reduction=reduction, chunk_size=4
        )


def _two_ranks(rank, folder):
    """Eight unequal documents, dealt out to two processes, in 1, 2 or 4 micro-batches
    each: one gradient, that of the whole.
    """
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    # DDP's reducer must go before the group: as its last owner it can wait for ever,
    # with the interpreter's lock held, for a thread that wants this lock
    _check_unequal_documents(rank)
    dist.barrier()
    dist.destroy_process_group()


def _check_unequal_documents(rank):
    g = torch.Generator().manual_seed(0)
    documents = [
        (
            torch.randn(n, 6, generator=g, dtype=torch.float64),
            torch.randint(17, (n,), generator=g),
        )
        for n in (50, 1, 7, 3, 90, 2, 4, 30)
    ]
    for _, t in documents:
        t[::5] = IGNORE_INDEX  # the document of one token has no target left
    h, t = (torch.cat(parts) for parts in zip(*documents))
    model = DistributedDataParallel(Head())
    whole = torch.autograd.grad(naive(h, model.module.weight, t), model.module.weight)[
        0
    ]
    mine = documents[rank::2]
    for micro_batches in (1, 2, 4):
        size = len(mine) // micro_batches
        for right in (True, False):
            count = torch.tensor(sum((t != IGNORE_INDEX).sum() for _, t in mine))
            dist.all_reduce(count)
            model.zero_grad()
            for i in range(0, len(mine), size):
                h, t = (torch.cat(parts) for parts in zip(*mine[i : i + size]))
                with (
                    contextlib.nullcontext()
                    if i + size == len(mine)
                    else model.no_sync()
                ):
                    loss = (
                        model(h, t, "sum") * 2 / count
                        if right
                        else model(h, t, "mean") / micro_batches
                    )  # DDP averages
                    loss.backward()
            off = (model.module.weight.grad - whole).norm() / whole.norm()
            assert off < 1e-12 if right else off > 0.1, (
                f"{micro_batches} micro-batches: off by {off:.1e}"
            )


@pytest.mark.slow
def test_unequal_documents_on_two_ranks(tmp_path):
    mp.start_processes(_two_ranks, (tmp_path,), nprocs=2, start_method="forkserver")


FULL_SIZE = """
import re, sys, torch
from qwen_analog.loss import linear_cross_entropy
T, D, V = 4096, 2048, 151_936
def status(field):
    text = open("/proc/self/status").read()
    return int(re.search(field + r":\\s+(\\d+)", text)[1]) * 1024


hidden = torch.randn(T, D, requires_grad=True)
weight = (0.02 * torch.randn(V, D)).requires_grad_()
before = status("VmRSS")
with torch.autocast("cpu", torch.bfloat16):
    loss = linear_cross_entropy(hidden, weight, torch.randint(V, (T,)))
loss.backward()
print("grew by", status("VmHWM") - before)
"""


@pytest.mark.skipif(
    "QWEN_ANALOG_FULL_SIZE" not in os.environ,
    reason="4 GB and minutes: set QWEN_ANALOG_FULL_SIZE=1",
)
def test_memory_at_the_full_size():
    """Beyond the weight in bfloat16 and the gradients, which every loss needs: a tenth
    of the naive loss's three float32 logits.
    """
    run = subprocess.run(
        [sys.executable, "-c", FULL_SIZE],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    grown = int(re.search(r"grew by (\d+)", run.stdout)[1])
    T, D, V = 4096, 2048, 151_936
    assert grown - (V * D * 2 + V * D * 4 + T * D * 4) < 3 * T * V * 4 / 10, (
        f"{grown:,} bytes"
    )


def test_the_weights_gradient_is_not_held_twice():
    hidden, weight, targets = problem()
    loss = 3 * linear_cross_entropy(hidden, weight, targets)
    kept = (
        loss.grad_fn.next_functions[0][0]
        .next_functions[0][0]
        .saved_tensors[1]
        .data_ptr()
    )  # the tensor itself, held here, would be copied
    loss.backward()
    assert weight.grad.data_ptr() == kept


def test_cross_entropy_is_float32_inside():
    logits, targets = torch.randn(4, 5, 50).bfloat16(), torch.randint(50, (4, 5))
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    )


def test_bits_per_byte():
    assert bits_per_byte(8 * 10 * math.log(2), 10) == pytest.approx(8)


def chunk_loss(
    h,
    w,
    targets,
    z_loss,
    grad_h,
    grad_w,
    *,
    one_hot=1,
    ignored_lost=False,
    z_sign=1,
    z_slope=2,
):
    """`_chunk_loss` written once more, with places to break it."""
    real = targets != IGNORE_INDEX
    ids = targets.where(real, 0)
    logits = loss_module._widened(F.linear(h, w))
    log_p = F.log_softmax(logits, dim=-1)
    loss, log_z = -log_p.gather(1, ids), logits.logsumexp(1, keepdim=True)
    error = log_p.exp() * (1 + z_slope * z_loss * log_z)
    error = error.scatter_add(1, ids, -one_hot * torch.ones_like(loss))
    loss_module._add_gradients(error.to(h.dtype), h, w, real, grad_h, grad_w)
    total = loss + z_sign * z_loss * log_z**2
    return total.sum() if ignored_lost else total.where(real, 0).sum()


def add_gradients(error, h, w, real, grad_h, grad_w, *, change):
    """`_add_gradients` with another rule."""
    rows, weights = change(real)
    if grad_h is not None:
        grad_h.copy_((error @ w) * rows)
    if grad_w is not None:
        grad_w += error.T @ (h * weights)


def last_chunk_only(error, h, w, real, grad_h, grad_w):
    grad_h.copy_((error @ w) * real)
    grad_w.copy_(error.T @ (h * real))


def summed_in_bfloat16(
    error, h, w, real, grad_h, grad_w, add=loss_module._add_gradients
):
    add(error, h, w, real, grad_h, grad_w)
    if grad_w is not None:
        grad_w.copy_(grad_w.bfloat16())


def overflowing(logits, dim):
    return (logits.exp() / logits.exp().sum(dim, keepdim=True)).log()


def softmax_in_bfloat16(logits, dim, real=F.log_softmax):
    return real(logits.bfloat16(), dim).to(logits.dtype)


def wrong_mean(total, targets, reduction, *, count):
    return total if reduction == "sum" else total / count(targets)


def scaled_in_place(ctx, upstream):
    return *(g.mul_(upstream) for g in ctx.saved_tensors), None, None, None


def not_scaled(ctx, upstream):
    return *ctx.saved_tensors, None, None, None


def broken_chunk(**changes):
    return loss_module, "_chunk_loss", partial(chunk_loss, **changes)


def broken_rows(change):
    return loss_module, "_add_gradients", partial(add_gradients, change=change)


def broken_mean(count):
    return loss_module, "_reduce", partial(wrong_mean, count=count)


def broken_backward(function):
    return loss_module._ChunkedCrossEntropy, "backward", staticmethod(function)


MUTANTS = {
    "maximum not subtracted": (loss_module.F, "log_softmax", overflowing),
    "softmax in bfloat16": (loss_module.F, "log_softmax", softmax_in_bfloat16),
    "float64 narrowed": (loss_module, "_widened", lambda x: x.float().to(x.dtype)),
    "one-hot forgotten": broken_chunk(one_hot=0),
    "ignored targets in the loss": broken_chunk(ignored_lost=True),
    "z-loss with the wrong sign": broken_chunk(z_sign=-1),
    "z-loss without its gradient": broken_chunk(z_slope=0),
    "z-loss gradient without the 2": broken_chunk(z_slope=1),
    "ignored rows get a gradient": broken_rows(lambda real: (1, real)),
    "ignored rows in the weight": broken_rows(lambda real: (real, 1)),
    "last chunk only": (loss_module, "_add_gradients", last_chunk_only),
    "weight's gradient in bfloat16": (
        loss_module,
        "_add_gradients",
        summed_in_bfloat16,
    ),
    "ignored targets in the count": broken_mean(lambda t: t.numel()),
    "no guard for an empty count": broken_mean(lambda t: (t != IGNORE_INDEX).sum()),
    "sum divided like a mean": (
        loss_module,
        "_reduce",
        lambda total, targets, reduction: total / (targets != IGNORE_INDEX).sum(),
    ),
    "kept gradients scaled in place": broken_backward(scaled_in_place),
    "upstream factor forgotten": broken_backward(not_scaled),
}


def relative(found, expected):
    return max(
        ((a.double() - b).abs().max() / b.abs().max()).item()
        for a, b in zip(found, expected)
    )


def first_difference():
    """The first case in which the loss differs from the naive formula, or None."""
    hidden, weight, targets = problem()
    for options in ({}, {"reduction": "sum"}, {"z_loss": 0.1}):
        got = results(
            linear_cross_entropy, hidden, weight, targets, chunk_size=5, **options
        )
        if relative(got, NAIVE[str(options)]) > 1e-9:
            return f"{options}"
    value = 3 * linear_cross_entropy(hidden, weight, targets)
    try:
        once, again = (
            torch.autograd.grad(value, weight, retain_graph=True)[0].clone()
            for _ in range(2)
        )
    except RuntimeError as error:
        return str(error)
    if relative([once, again], [3 * NAIVE["{}"][2]] * 2) > 1e-9:
        return "three times the loss, twice"
    single = results(linear_cross_entropy, hidden.float(), weight.float(), targets)
    if relative(single, NAIVE["{}"]) > 1e-5:
        return "float32"
    if not linear_cross_entropy(
        1000 * hidden.float(), weight.float(), targets
    ).isfinite():
        return "large logits"
    nothing = torch.full_like(targets, IGNORE_INDEX)
    empty = results(linear_cross_entropy, hidden, weight, nothing)
    return "nothing to predict" if any(x.any() for x in empty) else None


NAIVE = {
    str(options): results(naive, *problem(), **options)
    for options in ({}, {"reduction": "sum"}, {"z_loss": 0.1})
}


def test_the_loss_is_the_naive_one_whole_and_written_once_more(monkeypatch):
    assert first_difference() is None
    monkeypatch.setattr(*broken_chunk())
    assert first_difference() is None
    monkeypatch.setattr(*broken_rows(lambda real: (real, real)))
    assert first_difference() is None


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_loss_is_noticed(mutant, monkeypatch):
    monkeypatch.setattr(*MUTANTS[mutant])
    assert first_difference() is not None


def formula(hidden, weight, targets, **_):
    """The mean loss in float64, token by token."""
    terms = []
    for vector, target in zip(hidden.double(), targets):
        if target != IGNORE_INDEX:
            z = weight.double() @ vector
            log_z = (z - z.max()).exp().sum().log() + z.max()
            terms.append(log_z - z[target])
    return torch.stack(terms).mean()


def loses_digits():
    """Is the loss off in float64 or float32, for large logits, or under autocast more
    than the naive one?
    """
    hidden, weight, targets = problem(40, 16, 60, 7)
    exact = results(formula, hidden, weight, targets)
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        pair = hidden.detach().to(dtype), weight.detach().to(dtype)
        pair = [x.requires_grad_() for x in pair]
        if relative(results(linear_cross_entropy, *pair, targets), exact) > bound:
            return True
    large = linear_cross_entropy(1000 * hidden.float(), weight.float(), targets)
    if not abs(large / formula(1000 * hidden, weight, targets) - 1) < 1e-4:
        return True
    single = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        chunks = results(linear_cross_entropy, *single, targets, chunk_size=4)
        whole = results(naive, *single, targets)
    off = [relative([a], [b]) for a, b in zip(chunks, exact)]
    allowed = [2 * relative([a], [b]) + 1e-5 for a, b in zip(whole, exact)]
    return any(a > b for a, b in zip(off, allowed))


def test_no_digits_are_lost():
    assert not loses_digits()


@pytest.mark.mutant
@pytest.mark.parametrize("broken", [softmax_in_bfloat16, overflowing])
def test_a_softmax_that_loses_digits_is_noticed(broken, monkeypatch):
    monkeypatch.setattr(loss_module.F, "log_softmax", broken)
    assert loses_digits()


def step_loss(table, documents, shift=1, divide="targets"):
    """The loss of one optimizer step; `table` [V, V] holds the logits of the token
    after each, every document is a micro-batch.
    """
    inputs = [d[: len(d) - shift] for d in documents]
    outputs = [d[shift:] for d in documents]
    sums = [
        cross_entropy(table[a], b, reduction="sum") for a, b in zip(inputs, outputs)
    ]
    if divide == "means":
        return sum(s / len(b) for s, b in zip(sums, outputs)) / len(sums)
    counted = outputs if divide == "targets" else documents
    return sum(sums) / sum(map(len, counted))


def step_is_right(**options):
    """Is the step's loss the mean surprise at every next token?"""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(12, 12, generator=g, dtype=torch.float64)
    documents = [torch.randint(12, (n,), generator=g) for n in (3, 17, 6)]
    surprises = [
        -table[d[i]].log_softmax(-1)[d[i + 1]]
        for d in documents
        for i in range(len(d) - 1)
    ]
    expected = sum(surprises) / len(surprises)
    return torch.allclose(step_loss(table, documents, **options), expected)


MISUSES = {
    "no shift": dict(shift=0),
    "shift by two": dict(shift=2),
    "mean of means": dict(divide="means"),
    "divided by all tokens": dict(divide="tokens"),
}


def test_a_step_used_rightly_is_the_mean_surprise():
    assert step_is_right()


@pytest.mark.mutant
@pytest.mark.parametrize("misuse", MISUSES)
def test_a_misuse_is_noticed(misuse):
    assert not step_is_right(**MISUSES[misuse])


def test_the_forward_pass_keeps_two_gradients_and_no_logits():
    hidden = torch.randn(512, 16, requires_grad=True)
    weight = torch.randn(3000, 16, requires_grad=True)
    targets, held = torch.randint(3000, (512,)), {}

    for loss in (naive, linear_cross_entropy):
        kept = {}

        def keep(x):
            kept[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss(hidden, weight, targets)
        held[loss.__name__] = sum(kept.values())
    assert held["linear_cross_entropy"] < 4 * 16 * (512 + 3000) + 100
    assert held["naive"] > 4 * 512 * 3000


@pytest.mark.parametrize("device, size", [("cpu", 256), ("cuda", 1024)])
def test_the_usual_chunk_is_the_devices(device, size, monkeypatch):
    """A head's gradient is added once a chunk, which a GPU feels."""
    sizes = []

    def noted(hidden, weight, targets, chunk_size, z_loss):
        sizes.append(chunk_size)
        return torch.zeros(())

    monkeypatch.setattr(loss_module._ChunkedCrossEntropy, "apply", noted)
    with FakeTensorMode(), torch.no_grad():
        hidden, weight = torch.empty(6, 8, device=device), torch.empty(4, 8)
        targets = torch.zeros(6, dtype=torch.int64, device=device)
        linear_cross_entropy(hidden, weight, targets, reduction="sum")
    assert sizes == [size]
