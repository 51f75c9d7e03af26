"""The right sides of the appendix on symptoms are those of the package."""

import math
from types import SimpleNamespace

import faults
import pytest
import torch
from book import scramble_

from qwen_analog import attention
from qwen_analog.model import QwenModel


def test_step_by_step_attention_is_the_packages():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    ours = attention.grouped_query_attention(q, k, v)
    torch.testing.assert_close(faults.attend(q, k, v), ours)


def test_the_shown_forward_is_the_packages():
    model, ids = scramble_(faults.tiny()), torch.arange(6)[None]
    with torch.no_grad(), faults.instead(QwenModel, "forward", faults.forward):
        found = model(ids)
    torch.testing.assert_close(found, model(ids))


def test_each_shown_line_is_the_edited_one():
    removed, added = faults.beside(faults.penalize, "logit * 2", "logit / 2")
    assert removed == ["return logit / 2 if logit > 0 else logit * 2"]
    assert added == ["return logit / 2 if logit > 0 else logit / 2"]
    broken = faults.edited(faults.penalize, "logit * 2", "logit / 2")
    assert (faults.penalize(-2.0), broken(-2.0)) == (-4.0, -1.0)


@pytest.mark.parametrize("section", faults.PARTS)
def test_a_check_finds_each_fault_of(section):
    names = [name for name, *_ in faults.findings(section)]
    assert len(names) == len(set(names)) > 0


ATTEND = attention.grouped_query_attention
OFF_BY_ONE = "attn_mask=torch.ones(T, S, dtype=torch.bool).tril(1)"
MASKS = [
    ("no mask", ATTEND, "is_causal=True", "is_causal=False", attention),
    ("mask off by one", ATTEND, "is_causal=True", OFF_BY_ONE, attention),
]


def test_a_replaced_function_is_noticed_and_put_back():
    for name, function, right, wrong, owner in (*MASKS, *faults.TRAINED):
        parts, around, code = faults.edit(function, right, wrong, owner)
        assert not parts
        model, ids = scramble_(faults.tiny()), torch.arange(6)[None]
        with torch.no_grad():
            healthy = model(ids)
            with around:
                assert not torch.allclose(model(ids), healthy), name
            assert torch.equal(model(ids), healthy)
        assert code.startswith(function.__qualname__)


def test_a_gallery_refuses_a_fault_that_no_check_notices():
    gallery = faults.Gallery(None, lambda **parts: iter(()), None, [], ())
    with pytest.raises(AssertionError, match="harmless"):
        gallery.check("harmless", faults.penalize, "logit * 2", "2 * logit")


def test_a_gallery_keeps_every_check_that_fails():
    failures = lambda **parts: iter([("first", "no"), ("second", "no")])
    run = SimpleNamespace(losses=[2.0, 1.0])
    gallery = faults.Gallery(lambda **parts: run, failures, lambda run: None, [], ())
    gallery.show("divides", faults.penalize, "logit * 2", "logit / 2")
    assert gallery.fails == {"divides": ["first", "second"]}
    assert gallery.found == {"divides": "first"}
    assert gallery.losses == {"divides": [2.0, 1.0]}


def test_the_best_loss_is_that_of_a_fair_guess():
    # 4 stories begin alike: only the last but one letter is a guess, among 4
    stories = [f"xyz{letter}\n" for letter in "abcd"]
    row = "xyza\nxyzb\n"
    assert faults.best_loss(stories, [row]) == pytest.approx(2 * math.log(4) / 9)
    assert faults.best_loss(["ab\n", "ac\n"], ["ab"]) == pytest.approx(math.log(2))


def test_the_mystery_has_two_broken_parts():
    def next_batch(step):
        window = torch.arange(8)[None]
        return window[:, :-1], window[:, 1:]

    def make_optimizer(model):
        RATE = 0.1
        optim = torch.optim
        return optim.AdamW(model.parameters(), RATE, weight_decay=0.0, fused=True)

    program = SimpleNamespace(
        next_batch=next_batch, make_optimizer=make_optimizer, rate=1
    )
    broken = faults.mystery(program)
    inputs, targets = broken.next_batch(0)
    assert torch.equal(targets, inputs + 2) and broken.rate == 1
    made = broken.make_optimizer(torch.nn.Linear(2, 2))
    assert isinstance(made, torch.optim.SGD)
    assert program.next_batch is next_batch
