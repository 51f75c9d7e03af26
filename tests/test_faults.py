"""The right sides of the appendix on symptoms are those of the package."""

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
    with (
        torch.no_grad(),
        faults.instead(QwenModel, "forward", faults.forward)["around"],
    ):
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
